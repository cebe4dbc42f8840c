"""What blocks leave for each other in shared storage: donations, and receipts that say what is done."""
