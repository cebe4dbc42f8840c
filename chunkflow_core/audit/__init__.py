"""Is it right? Storage against receipts, windows computed again, and how what is wrong is undone."""
