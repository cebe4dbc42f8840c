"""Boxes and blocks, weights, rounding and sums: the exact arithmetic. No files, no PyTorch."""
