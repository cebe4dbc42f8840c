"""An Airflow DAG that keeps clean the clusters that volumes run on, if there are any."""

from __future__ import annotations

from pathlib import Path

from operators.volume_dags import clusters

_places = clusters(Path(__file__).with_name("volumes"))
if _places:
    from operators.kubernetes.maintenance import maintenance_dag

    dag = maintenance_dag(_places)
