"""Commands in processes of their own: interrupted, as tasks run them, with a reader that goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core import inference_and_donate
from tests.support.nursery import shared

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]

SLOW = """
import pathlib, sys, time

if not any("resource_tracker" in word for word in sys.orig_argv):
    from chunkflow_core.engines.identity import Identity

    run = Identity.__call__

    def slow(self, patches):
        if pathlib.Path({brake!r}).exists():
            time.sleep(0.2)
        return run(self, patches)

    Identity.__call__ = slow
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_run_is_completed_by_the_next(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, workers: int
) -> None:
    """Ctrl-C goes to all processes of the terminal's foreground group."""
    brake = tmp_path / "brake"
    brake.touch()
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(brake=str(brake)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    spec = make_spec()
    command = [sys.executable, "-m", "chunkflow_core", "run", str(spec), "--workers", str(workers)]
    with (tmp_path / "told").open("w+") as told:
        process = shared().start(command, os.environ | {"PYTHONPATH": path}, tmp_path, told.fileno())
        deadline = time.monotonic() + 90
        while not list(tmp_path.rglob("receipts/infer/*/*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
        told.seek(0)
        said = told.read()
    assert "interrupted; what is complete is kept" in said
    assert "Traceback" not in said
    done = len(list(tmp_path.rglob("receipts/infer/*/*.json")))
    assert 0 < done < 8

    brake.unlink()
    outcome = chunkflow("run", spec, "--seams", 4)
    assert outcome.returncode == 0, outcome.stderr
    assert f"small: {8 - done} blocks to infer" in outcome.stdout


def test_stages_in_processes_of_their_own(make_spec: MakeSpec, chunkflow: Command, python: Command) -> None:
    """One block goes through both stages, as Airflow's tasks run them."""
    spec = make_spec()
    assert chunkflow("prepare", spec).returncode == 0
    assert inference_and_donate.main([str(spec), "--block", "0", "0", "0"]) == 0
    outcome = python("-m", "chunkflow_core.inference_and_donate", spec, "--block", 0, 0, 1, "--run", "by-hand")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("block 0_0_1: 4 patches inferred, 4 storage chunks written, ")
    assert "block 0_0_1: planes 0–6 of 0–14 done" in outcome.stderr
    outcome = python("-m", "chunkflow_core.receive_and_blend", spec, "--block", 0, 0, 1)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("block 0_0_1: donations of 2 blocks blended, 4 storage chunks written")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_of_the_output_that_goes_early(make_spec: MakeSpec, unbuffered: str) -> None:
    """The reader goes early, as in ``chunkflow-core plan SPEC | head -1``.

    Here it does not even wait for the first line.
    """
    command = [sys.executable, "-m", "chunkflow_core", "plan", str(make_spec())]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
