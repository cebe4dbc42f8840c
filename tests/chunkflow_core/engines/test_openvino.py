"""OpenVINO: its cache of conversions, and what it can't convert or compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunkflow_core.engines.openvino import OpenVINO
from chunkflow_core.errors import SpecError
from chunkflow_core.storage.model_files import made_once
from tests.support.models.cases import can
from tests.support.models.loading import MakeSpec, Section, load, patches
from tests.support.models.two_convolutions import NET, net, onnx_file, python_file


@pytest.mark.parametrize("change", ["weights", "model file", "patch", "batch_statistics"])
def test_what_makes_a_conversion_another_one(
    make_spec: MakeSpec, tmp_path: Path, output: Section, own_cache: Path, change: str
) -> None:
    path = make_spec(model=python_file(tmp_path, engine="openvino"), output=output)
    first, overrides = load(path)(patches()), []
    if change == "weights":
        torch.save({key: value * 2 for key, value in net().state_dict().items()}, tmp_path / "weights.pt")
    elif change == "model file":
        (tmp_path / "model.py").write_text(NET.replace("relu", "tanh"))
    elif change == "patch":
        overrides = ["patch_size=[8,16,32]", "block_size=[12,24,84]", "output.chunk_size=[6,12,12]"]
    else:
        overrides = ["model.batch_statistics=true"]
    engine = load(path, *overrides)
    if change in ("weights", "model file"):
        assert abs(engine(patches()) - first).max() > 0.1
    assert len(list(own_cache.iterdir())) == 2


def test_a_conversion_is_told_to_nobody(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    """OpenVINO would fork this process and send from there that a model was converted."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    engine = load(make_spec(model=python_file(tmp_path, engine="openvino"), output=output))
    assert isinstance(engine, OpenVINO)
    assert forks == []


THREADS = """
import faulthandler, sys, threading
import numpy as np
from chunkflow_core.engines import load_engine
from chunkflow_core.spec import load_spec

faulthandler.dump_traceback_later(60, exit=True)
engine = load_engine(load_spec(sys.argv[1]))
start = threading.Barrier(8)
sys.setswitchinterval(1e-6)

def run():
    start.wait()
    engine(np.zeros((1, 1, 8, 16, 16), np.float32))

threads = [threading.Thread(target=run, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_begin_at_the_same_time_do_not_wait_for_each_other(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    path = make_spec(model=onnx_file(tmp_path, engine="openvino"), output=output)
    processes = [
        subprocess.Popen([sys.executable, "-c", THREADS, path], stderr=subprocess.PIPE, text=True) for _ in range(6)
    ]
    ends = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, "".join(ends)


def test_half_a_conversion_is_never_used(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "network.xml").write_text("<net>")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        made_once(tmp_path / "cache" / "digest", half)
    assert not list((tmp_path / "cache").iterdir())


def test_cache_that_can_not_be_written(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SpecError, match="can't be written: Not a directory; set CHUNKFLOW_CACHE"):
        load(make_spec(model=python_file(tmp_path, engine="openvino"), output=output))


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        (
            "def InstantiatedModel(x): return torch.cat([x, x], 1) if x.mean() > 0.3 else torch.zeros(1, 2, 8, 16, 16)",
            "other numbers",
        ),
        ("def InstantiatedModel(x): return torch.from_numpy(x.numpy() * 2)", "other numbers"),
        ("class PatchInferencer:\n def __init__(self, weights): pass\n", "can't convert a PatchInferencer"),
        ("def InstantiatedModel(x): return x @ x[:, :, :3]", "openvino can't convert model.py: RuntimeError"),
    ],
)
def test_model_that_can_not_be_converted(
    make_spec: MakeSpec, tmp_path: Path, output: Section, own_cache: Path, text: str, piece: str
) -> None:
    """A model is refused, too, if a conversion would silently give other numbers."""
    (tmp_path / "model.py").write_text(f"import torch\n{text}\n")
    path = make_spec(model={"engine": "openvino", "path": "model.py"}, output=output)
    with pytest.raises(SpecError, match=piece):
        load(path)
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_precision_that_the_cpu_can_not_compute_in(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=python_file(tmp_path, engine="openvino"), output=output)
    if can("FP16"):
        pytest.skip("this CPU computes in float16")
    with pytest.raises(SpecError, match=r"model\.precision: float16: this machine's CPU can't .* one of float32"):
        load(path, "model.precision=float16")
