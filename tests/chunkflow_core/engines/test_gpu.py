"""GPUs: a process claims one, data stay on it, and nobody takes CPUs for one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkflow_core.engines import onnx, pytorch
from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.failures import is_of_the_machine
from chunkflow_core.engines.gpu import claim
from chunkflow_core.errors import SpecError
from tests.support.models.forms import bare_state, trained
from tests.support.models.loading import MakeSpec, Section, load, patches
from tests.support.models.two_convolutions import onnx_file, python_file
from tests.support.nursery import Child, shared

from .conftest import check_refused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters
OnGpu = Callable[..., Engine]
CLAIM = """
import sys, time
from chunkflow_core.engines import onnx, pytorch
from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.failures import is_of_the_machine
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


def test_a_gpu_that_has_no_room_gives_other_bits(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch counts the times that it was refused memory, and only the count tells of it."""
    refused = 3  # of an earlier model of this process
    monkeypatch.setattr(pytorch, "_shortages", lambda device: refused)
    engine = load(make_spec(model=python_file(tmp_path, engine="pytorch"), output=output))
    engine(patches())
    refused += 1
    for _ in range(2):
        with pytest.raises(MemoryError, match=r"memory has run short .* other bits"):
            engine(patches())


@pytest.mark.parametrize(
    ("text", "of_the_machine"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=node ; file=cuda_allocator.cc", True),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", True),
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 4096", True),
        ("Expected 5D input, got 4D", False),
    ],
)
def test_what_a_retry_can_help_with(text: str, of_the_machine: bool) -> None:
    """So PyTorch and ONNX Runtime tell of it."""
    assert is_of_the_machine(RuntimeError(text)) == of_the_machine


# ------------------------------------------------------------------------------------- ONNX Runtime


@pytest.fixture
def onnx_on_gpu(make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    """Load a network where ONNX Runtime is said to have a GPU; what it makes of that is its own.

    A provider that it has everywhere but that knows no layer stands for one that starts, and that
    of CUDA, which this build lacks, for one that does not.
    """
    import onnxruntime

    path = make_spec(model=onnx_file(tmp_path, engine="onnx"), output=output)
    monkeypatch.setattr(onnx, "_gpus", lambda: 1)
    monkeypatch.setattr(onnx, "claim", lambda count: 0)

    def run(device: str, *, starts: bool) -> Engine:
        gpu = "AzureExecutionProvider" if starts else "CUDAExecutionProvider"
        monkeypatch.setattr(onnx, "_CUDA", gpu)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", gpu])
        return load(path, f"model.device={device}")

    return run


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize(
    ("device", "starts", "told"),
    [
        (
            "cuda",
            False,
            "cuda, but ONNX Runtime would run layers of .*model.onnx on CPUs: .* not be started",
        ),
        (
            "cuda",
            True,
            "cuda, but ONNX Runtime would run layers of .*model.onnx on CPUs: .* not know them",
        ),
        ("auto", False, "model.device: auto: there is a GPU, but ONNX Runtime's provider for it could not be started"),
    ],
)
def test_onnx_runtime_never_takes_cpus_for_a_gpu(onnx_on_gpu: OnGpu, device: str, starts: bool, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        onnx_on_gpu(device, starts=starts)


def test_onnx_runtime_takes_cpus_where_they_may_be_taken(onnx_on_gpu: OnGpu) -> None:
    """TensorRT is none of its providers then."""
    there, here = onnx_on_gpu("auto", starts=True), onnx_on_gpu("cpu", starts=True)
    assert there.description["device"] == "AzureExecutionProvider"
    assert here.description["device"] == "CPUExecutionProvider"
    np.testing.assert_array_equal(there(patches()), here(patches()))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_tensorrt_is_refused(onnx_on_gpu: OnGpu, make_spec: MakeSpec, output: Section, precision: str) -> None:
    """It is there, and is the only one that could choose a precision."""
    path = make_spec(model={"engine": "onnx", "path": "model.onnx", "precision": precision}, output=output)
    with pytest.raises(SpecError, match=rf"model\.precision: {precision}.* TensorRT.* by the time .* other bits"):
        load(path)
