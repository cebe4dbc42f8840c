"""Shows what is wrong with volume specs as Airflow import errors.

An import error of a file disables all DAGs of that file. This one makes no DAG, so those of
``chunkflow_volumes.py`` go on.
"""

from __future__ import annotations

from pathlib import Path

from operators.volume_dags import volume_dags

_errors = [str(error) for error in volume_dags(Path(__file__).with_name("volumes")) if isinstance(error, Exception)]
if _errors:
    raise ImportError("volume specs that can't be used:\n" + "\n".join(_errors)) from None
