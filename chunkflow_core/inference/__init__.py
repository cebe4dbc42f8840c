"""A block's patches become sums: read ahead, run through the network, blended, on CPUs or a GPU."""
