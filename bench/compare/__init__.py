"""This pipeline beside MONAI's sliding window and chunkflow's inferencer."""
