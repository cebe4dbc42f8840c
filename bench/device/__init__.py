"""The path for accelerators on a GPU: speed and bits."""
