"""Engines in processes of their own.

All give the same bits and convert a model once, in as many threads as are declared; and what is
said where a package or a compiler is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.models.cases import CASES, Case
from tests.support.models.loading import MakeSpec, Section, load, patches
from tests.support.models.two_convolutions import NET, onnx_file, python_file
from tests.support.nursery import Nursery

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters


@pytest.fixture(scope="module")
def with_torch() -> Iterator[Nursery]:
    """Forks processes that have imported PyTorch and OpenVINO, and computed nothing."""
    nursery = Nursery(["torch", *(f"chunkflow_core.engines.{name}" for name in ("openvino", "tracing", "pytorch"))])
    yield nursery
    nursery.close()


RUN = """
import sys, numpy as np
from chunkflow_core.engines import load_engine
from chunkflow_core.spec import load_spec
batch = np.random.default_rng(3).random((3, 1, 8, 16, 16), np.float32)
results = sys.argv[1]
np.savez(results, *(load_engine(load_spec(path))(batch) for path in sys.argv[2:]))
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(file: Path) -> list[NDArray[np.float32]]:
    with np.load(file) as archive:
        return list(archive.values())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_same_bits_in_other_processes(
    make_case: Callable[[str], Case | None], tmp_path: Path, with_torch: Nursery, compiled: bool
) -> None:
    """Two processes that start at once both convert the models, and give what this one gives."""
    names = [name for name in CASES if (name == "pytorch compiled") == compiled]
    cases = [case for case in map(make_case, names) if case]
    files = [tmp_path / "one.npz", tmp_path / "other.npz"]
    with (tmp_path / "said").open("w") as said:
        commands = [[sys.executable, "-c", RUN, str(file), *(str(case.path) for case in cases)] for file in files]
        for process in [with_torch.start(command, os.environ, tmp_path, said.fileno()) for command in commands]:
            assert process.wait(300) == 0, (tmp_path / "said").read_text()
    for case, one, other in zip(cases, *map(results, files), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=case.path.name)
        np.testing.assert_array_equal(load(case.path)(patches()), one, err_msg=case.path.name)


def test_a_conversion_is_kept_and_used_without_pytorch(
    make_spec: MakeSpec, tmp_path: Path, output: Section, own_cache: Path, with_torch: Nursery
) -> None:
    """Several processes at once leave one conversion, and no trace of a second."""
    path = make_spec(model=python_file(tmp_path, engine="openvino"), output=output)
    with (tmp_path / "said").open("w") as said:
        commands = [[sys.executable, "-c", RUN, f"{tmp_path}/{number}.npz", str(path)] for number in range(3)]
        for child in [with_torch.start(command, os.environ, tmp_path, said.fileno()) for command in commands]:
            assert child.wait() == 0, (tmp_path / "said").read_text()
    (kept,) = own_cache.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    program = RUN + "\nassert 'torch' not in sys.modules and 'model' not in sys.modules"
    process = start(program, tmp_path / "again.npz", path)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == before
    np.testing.assert_array_equal(results(tmp_path / "again.npz"), results(tmp_path / "0.npz"))


THREADS = """
import os, sys, numpy as np
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from chunkflow_core.engines import load_engine
from chunkflow_core.spec import load_spec
engine, barrier = load_engine(load_spec(sys.argv[1])), Barrier(2)
batch = np.zeros((1, 1, 32, 64, 64), np.float32)

def run(_):
    barrier.wait()
    engine(batch)
    barrier.wait()

before = len(os.listdir("/proc/self/task"))
with ThreadPoolExecutor(2) as pool:
    list(pool.map(run, range(2)))
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_patch_is_run_in_the_declared_number_of_threads(
    make_spec: MakeSpec, tmp_path: Path, output: Section, with_torch: Nursery, threads: int
) -> None:
    """That holds in every thread that calls, not only in that which loaded the model."""
    (tmp_path / "model.py").write_text(NET)
    geometry = {"patch_size": [32, 64, 64], "block_size": [30, 60, 60]}
    model = {"engine": "pytorch", "path": "model.py", "threads": threads, "streams": 2}
    path = make_spec(model=model, output=output, **geometry)
    done = with_torch.run([sys.executable, "-c", THREADS, str(path)], os.environ, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * threads  # those that call, and the helpers of each


# ---------------------------------------------------------------------------------- what is missing

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from chunkflow_core.engines import load_engine
from chunkflow_core.commands.arguments import run_command
from chunkflow_core.spec import load_spec
sys.exit(run_command(lambda arguments: print(load_engine(load_spec(arguments[0]))), sys.argv[2:]))
"""


def refused_without(package: str, path: Path) -> str:
    process = start(HIDE, package, path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 78, said
    (line,) = said.splitlines()
    return line


@pytest.mark.parametrize(("engine", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_package_that_is_not_installed(
    make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, package: str
) -> None:
    path = make_spec(model=onnx_file(tmp_path, engine=engine), output=output)
    said = refused_without(package, path)
    assert f'pip install "chunkflow-airflow[{engine}]"' in said
    assert f"model.engine: {engine} needs the package {package}" in said


def test_neither_pznet_nor_a_compiled_net(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    (tmp_path / "net").mkdir()
    path = make_spec(model={"engine": "pznet", "path": "net"}, output=output)
    said = refused_without("pznet", path)
    assert f"{tmp_path}/net has no module znet" in said
    assert "https://github.com/supersergiy/znnphi_interface" in said


def test_compiling_without_a_compiler(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch, with_torch: Nursery
) -> None:
    path = make_spec(model=python_file(tmp_path, engine="pytorch", compile=True), output=output)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # what was compiled before
    done = with_torch.run([sys.executable, "-c", HIDE, "nothing", str(path)], os.environ, tmp_path)
    assert done.returncode == 78, done.stderr
    assert "model.compile: the network can't be compiled" in done.stderr.splitlines()[-1]
    assert "needs a C++ compiler" in done.stderr.splitlines()[-1]
