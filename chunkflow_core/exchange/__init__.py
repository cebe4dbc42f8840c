"""What blocks leave for each other in shared storage: donations, and receipts of what is done."""
