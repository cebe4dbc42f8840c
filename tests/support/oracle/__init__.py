"""What a volume has to look like after any history, by brute force and without the library."""
