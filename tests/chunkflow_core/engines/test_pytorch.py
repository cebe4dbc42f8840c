"""PyTorch: tensors in and out, settings that decide numbers, precision, and compiling."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkflow_core.engines.pytorch import PyTorch
from chunkflow_core.errors import SpecError
from tests.support.models.cases import COMPILER, STREAMS
from tests.support.models.forms import NET, bare_state, pytorch, trained, with_pre_and_post_process, write
from tests.support.models.loading import PATCH, MakeSpec, Section, load, patches
from tests.support.models.two_convolutions import python_file

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # models of this form are around
Command = Callable[..., Any]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.mark.parametrize("body", ["x.view(-1).view_as(x) * 2", "x.mul_(2)", "x * self.scale.view(-1)[0]"])
def test_network_that_looks_at_memory_or_changes_its_input(
    make_spec: MakeSpec, tmp_path: Path, output: Section, body: str
) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        " def __init__(self): super().__init__(); self.scale = torch.nn.Parameter(torch.full((2, 2, 1, 1, 1), 2.))\n"
        f" def forward(self, x): x = torch.cat([x, x], 1); return {body}\nInstantiatedModel = Net()\n"
    )
    path = make_spec(model={"engine": "pytorch", "path": "model.py", "precision": "bfloat16"}, output=output)
    batch = patches()
    np.testing.assert_allclose(load(path)(batch), np.repeat(patches() * 2, 2, axis=1), rtol=1e-2)
    np.testing.assert_array_equal(batch, patches())


def test_forward_takes_and_gives_tensors(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    engine = load(make_spec(model=python_file(tmp_path, engine="pytorch"), output=output))
    given = engine.forward(torch.from_numpy(patches(1)).to(engine.device or "cpu"))
    assert given.is_contiguous()
    assert given.dtype == torch.float32
    np.testing.assert_array_equal(given.cpu().numpy(), engine(patches(1)))


def test_a_patch_inferencer_is_called_from_one_thread(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    text = "class PatchInferencer:\n def __init__(self, weights): pass\n def __call__(self, patch): return patch\n"
    (tmp_path / "model.py").write_text(text)
    path = make_spec(model={"engine": "pytorch", "path": "model.py", "streams": STREAMS}, output=output)
    assert load(path).streams == 1
    with pytest.raises(SpecError, match=r"model\.compile: only for InstantiatedModel"):
        load(path, "model.compile=true")


def test_a_pre_process_for_cpus_does_on_any_device(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inferencers of chunkflow return a tensor that they have moved to a GPU, or have not."""
    engine = load(make_spec(model=with_pre_and_post_process(tmp_path, trained()), output=output))
    assert isinstance(engine, PyTorch)
    monkeypatch.setattr(engine, "_device", torch.device("meta"))
    assert engine._prepared(torch.zeros(1, 1, *PATCH)).device == torch.device("meta")


# ------------------------------------------------------------------------------------------ numbers


def test_another_process_gives_the_same_bits(
    make_spec: MakeSpec, tmp_path: Path, output: Section, python: Command
) -> None:
    """PyTorch also draws the random parameters of a network without a checkpoint alike."""
    write(tmp_path, NET + "InstantiatedModel = Net()\n")
    path = make_spec(model=pytorch(weights=..., threads=2), output=output)
    program = """
import sys, numpy as np
from chunkflow_core.engines import load_engine
from chunkflow_core.spec import load_spec
batch = np.random.default_rng(3).random((3, 1, 8, 16, 16), np.float32)
np.save(sys.argv[2], load_engine(load_spec(sys.argv[1]))(batch))
"""
    outcome = python("-c", program, path, tmp_path / "there.npy")
    assert outcome.returncode == 0, outcome.stderr
    torch.rand(7)  # this process has drawn other random numbers before
    np.testing.assert_array_equal(load(path)(patches()), np.load(tmp_path / "there.npy"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_used_and_near(make_spec: MakeSpec, tmp_path: Path, output: Section, precision: str) -> None:
    net = trained()
    path = make_spec(model=bare_state(tmp_path, net) | {"activation": "sigmoid"}, output=output)
    exact, low = load(path)(patches()), load(path, f"model.precision={precision}")(patches())
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, exact, atol=2e-2)
    assert not np.array_equal(low, exact), "it was computed in float32"


# ---------------------------------------------------------------------------------------- compiling


@needs_compiler
def test_a_network_is_compiled_once(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    """A network is compiled when it is loaded.

    Threads that run patches never compile, as they would all do it at once.
    """
    from torch._dynamo.utils import counters  # takes seconds to import

    path = make_spec(model=python_file(tmp_path, engine="pytorch", compile=True, streams=2), output=output)
    engine = load(path)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda patch: engine(patch[None]), patches(8)))
    assert counters["stats"]["unique_graphs"] == before
    np.testing.assert_array_equal(np.stack(outputs)[:, 0], engine(patches(8)))
