"""What tests of engines share.

It is where outputs and conversions go, nets of pznet, and a case of every engine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkflow_core.errors import ChunkflowError
from tests.support.models.cases import CASES, COMPILER, STREAMS, Case, can
from tests.support.models.loading import MakeSpec, Section, load, patches
from tests.support.models.pznet import PZNET, ZNET, convolution
from tests.support.models.two_convolutions import net


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds what another has converted."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


@pytest.fixture
def output(tmp_path: Path) -> Section:
    """The output section for two channels of logits."""
    return {"path": f"file://{tmp_path}/output", "channels": 2, "chunk_size": [6, 12, 12], "range": [-64, 64]}


@pytest.fixture(scope="session")
def znet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension module, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("znet")
    (folder / "znet.c").write_text(ZNET)
    include = sysconfig.get_paths()["include"]
    # the same sums as a convolution of PyTorch, up to rounding
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", f"-I{include}", "znet.c", "-o", "znet.so"], cwd=folder, check=True
    )
    return folder / "znet.so"


@pytest.fixture
def pznet_net(tmp_path: Path, znet: Path) -> Callable[..., Section]:
    """Makes the folder of a compiled net; gives the section ``model``, with more keys at will."""

    def make(name: str = "net", **more: Any) -> Section:
        folder = tmp_path / name
        (folder / "weights").mkdir(parents=True)
        shutil.copy(znet, folder)
        layer = convolution()
        assert layer.bias is not None
        numbers = [layer.weight.detach().numpy().ravel(), layer.bias.detach().numpy()]
        np.concatenate(numbers).astype(np.float32).tofile(folder / "weights" / "convolution.data")
        return {"engine": "pznet", "path": name, **more}

    return make


@pytest.fixture
def pznet_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs the package pznet, in this process and those it starts."""

    def install(package: str = "") -> None:
        folder = tmp_path / "site"
        (folder / "pznet").mkdir(parents=True)
        (folder / "pznet" / "__init__.py").write_text(package and "from pznet.old import znet\n")
        (folder / "pznet" / ("old.py" if package else "pznet.py")).write_text(package or PZNET)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("pznet", "znet")]:
            del sys.modules[name]

    forget()
    yield install
    forget()


@pytest.fixture
def make_case(
    request: pytest.FixtureRequest,
    make_spec: MakeSpec,
    tmp_path: Path,
    output: Section,
    pznet_package: Callable[[str], None],
) -> Callable[[str], Case | None]:
    """Makes a case by its name; gives None if this machine can't run it."""

    def make(name: str) -> Case | None:
        if (name == "pytorch compiled" and COMPILER is None) or (name == "openvino bfloat16" and not can("BF16")):
            return None
        if name == "pznet package":
            pznet_package("")
        section = CASES[name]
        model = request.getfixturevalue("pznet_net")(name) if section is ... else section(tmp_path)
        batch = torch.from_numpy(patches())
        network = convolution() if section is ... else net()
        expected = batch.expand(-1, 2, -1, -1, -1) if name == "identity" else network(batch).detach()
        spec = make_spec(model={**model, "streams": STREAMS}, output=output)
        path = spec.rename(tmp_path / f"{name}.yaml")
        return Case(path, expected.numpy(), 3e-2 if "bfloat16" in name else 1e-5)

    return make


def check_refused(path: Path, kind: type[ChunkflowError] | tuple[type[ChunkflowError], ...], *pieces: str) -> None:
    """Check that a model is refused in one line that says all ``pieces``."""
    with pytest.raises(kind) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000
    for piece in pieces:
        assert piece in str(caught.value)
