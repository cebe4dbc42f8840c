"""Pods that no task waits for: which they are, and that the command needs no Airflow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection

from operators.kubernetes.orphans import PodInfo, orphans


def pod(name: str, run: str = "one", task: str = "infer.0_0_0", dag: str = "volume") -> PodInfo:
    return PodInfo(name, "default", "Running", (dag, run, task), "infer", "0 0 0", 600.0)


def test_a_pod_whose_task_goes_on_is_none() -> None:
    known = {
        "infer.0_0_0": "deferred",
        "infer.0_0_1": "success",
        "infer.0_1_0": "up_for_retry",
        "infer.0_1_1": "failed",
    }
    asked = []

    def states(dag: str, run: str, tasks: Collection[str]) -> dict[str, str]:
        asked.append((dag, run, set(tasks)))
        return {task: state for task, state in known.items() if run == "one" and task in tasks}

    pods = [pod(task, task=task) for task in known]
    pods += [pod("unknown task", task="infer.9_9_9"), pod("unknown run", run="two"), pod("by hand", dag="")]

    lost = {each.name for each in orphans(pods, states)}

    assert lost == {"infer.0_0_1", "infer.0_1_1", "unknown task", "unknown run"}
    assert asked == [("volume", "one", {*known, "infer.9_9_9"}), ("volume", "two", {"infer.0_0_0"})]


def test_the_command_needs_no_airflow() -> None:
    code = "import sys, operators.kubernetes.orphans; print({'airflow', 'kubernetes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
