"""Audit of an output: storage against receipts, windows computed again, what is wrong undone."""
