"""What was done: the manifest of a run, figures from receipts, and pictures of both and of the output."""
