"""One Airflow DAG for each volume spec.

Specs are the files ``*.yaml`` in the folder ``volumes`` beside this file, or in the folders that
the environment variable ``CHUNKFLOW_VOLUMES`` lists, separated by colons. Specs that can't be used
are reported by ``chunkflow_spec_errors.py``.
"""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import DAG, get_parsing_context

from operators.volume_dags import volume_dags

# A task's own process parses this file again, and needs no more than that task.
_wanted = get_parsing_context()
for _dag in volume_dags(Path(__file__).with_name("volumes"), only_dag=_wanted.dag_id, only_task=_wanted.task_id):
    if isinstance(_dag, DAG):
        globals()[f"dag_{_dag.dag_id}"] = _dag
