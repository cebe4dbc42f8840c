"""Airflow operators that run the stages of blocks, the DAG made of them, and the one-machine Airflow service."""
