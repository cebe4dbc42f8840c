"""What a run does, a file a step, as the DAG has them."""
