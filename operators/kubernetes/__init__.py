"""Tasks as pods of a Kubernetes cluster.

Nothing is imported here: ``chunkflow-core pods`` loads without Airflow.
"""
