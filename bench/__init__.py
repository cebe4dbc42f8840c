"""Benchmarks, each started by ``python -m bench.NAME`` from the root of the checkout."""
