"""What our ``airflow.cfg`` names: objects that Airflow imports into its own processes."""

from __future__ import annotations

import copy
from typing import Any

from airflow.config_templates.airflow_local_settings import DEFAULT_LOGGING_CONFIG
from airflow.utils.log.file_task_handler import FileTaskHandler


class LocalTaskLogs(FileTaskHandler):
    """Task logs are read from the files of this machine only.

    Airflow's handler also asks the log servers of the machines that run a task. Those servers
    listen on all interfaces, which no setting can change (``airflow.utils.serve_logs.core``), so
    ours don't run.
    """

    def _read_from_logs_server(self, ti: Any, worker_log_rel_path: str) -> tuple[list[str], list[Any]]:
        return [], []


LOGGING_CONFIG: dict[str, Any] = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
"""Airflow's logging, except that task logs are read by :class:`LocalTaskLogs`."""

LOGGING_CONFIG["handlers"]["task"]["class"] = "operators.service.task_logs.LocalTaskLogs"
