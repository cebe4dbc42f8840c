"""GPUs: a process claims one, and data stay on it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkflow_core.engines.gpu import claim
from chunkflow_core.errors import SpecError
from tests.support.models.forms import bare_state, trained
from tests.support.models.loading import MakeSpec, Section, load, patches
from tests.support.models.two_convolutions import python_file
from tests.support.nursery import Child, shared

from .conftest import check_refused

CLAIM = """
import sys, time
from chunkflow_core.engines.gpu import claim
print(claim(int(sys.argv[2]), sys.argv[1]), claim(int(sys.argv[2]), sys.argv[1]), flush=True)
time.sleep(600)
"""


def test_processes_spread_over_the_gpus_and_a_killed_one_frees_its_place(tmp_path: Path) -> None:
    processes: list[Child] = []

    def another() -> int:
        reading, writing = os.pipe()
        command = [sys.executable, "-c", CLAIM, str(tmp_path), "3"]
        processes.append(shared().start(command, os.environ, tmp_path, writing))
        os.close(writing)
        with os.fdopen(reading) as told:
            first, again = map(int, told.readline().split())
        assert first == again
        return first

    def kill(process: Child) -> None:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    try:
        assert [another() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
        kill(processes.pop(1))
        assert [another(), another()] == [1, 1]
    finally:
        for process in processes:
            kill(process)


def test_a_place_that_another_user_made(tmp_path: Path) -> None:
    """The file of a claim may be opened for reading only, which is enough to lock it."""
    file = tmp_path / "chunkflow-gpu-0-0"
    file.touch(mode=0o444)
    assert claim(1, tmp_path) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_keeps_data_on_the_device(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=python_file(tmp_path, engine="pytorch", batch_size=3), output=output)
    engine = load(path)
    assert engine.batch_size == 3
    assert engine.device is not None
    given = engine.forward(torch.from_numpy(patches()).to(engine.device))
    assert given.device == engine.device
    np.testing.assert_array_equal(given.cpu().numpy(), engine(patches()))
    np.testing.assert_allclose(engine(patches()), load(path, "model.device=cpu")(patches()), atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()) | {"device": "cuda"}, output=output)
    check_refused(path, SpecError, "model.device", "cuda")
