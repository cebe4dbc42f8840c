"""What was done: a run's manifest, figures from receipts, pictures of both and of the output."""
