"""Image stacks become precomputed layers: TIFF, folders of images, HDF5, npy.

A file is read as its metadata says, or refused: no voxel is guessed.
"""
