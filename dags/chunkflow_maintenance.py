"""Keeps the clusters that volumes run on clean: an Airflow DAG, if any volume's runner is a cluster."""

from __future__ import annotations

from pathlib import Path

from operators.specs import clusters

_places = clusters(Path(__file__).with_name("volumes"))
if _places:
    from operators.maintenance import maintenance_dag

    dag = maintenance_dag(_places)
