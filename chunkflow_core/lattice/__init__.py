"""Everything that decides bits and is not the network: boxes, blocks, weights, exact sums. No files, no PyTorch."""
