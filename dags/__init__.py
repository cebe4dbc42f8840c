"""DAGs generated from volume specs."""
