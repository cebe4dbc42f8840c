"""PZNet: nets compiled beside their weights, their fingerprint, and several in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import load_spec
from tests.support.models.loading import MakeSpec, Section, load, patches
from tests.support.models.pznet import PZNET, convolution

OLD_PZNET = """
from pznet.pznet import PZNet

class znet:
    def load_net(self, net_path, lib_path=None):
        self.net = PZNet(net_path, lib_path)

    def forward(self, patch):
        return self.net.forward(patch)
"""

IN_PYTHON = """
import numpy as np

VALUE = 1

class znet:
    def __init__(self, weights, layers):
        pass

    def forward(self, patch):
        return np.full((len(patch), 2, *patch.shape[2:]), VALUE, np.float32)
"""


def test_digest_of_a_net_covers_its_files_but_not_what_loading_makes(
    make_spec: MakeSpec, output: Section, tmp_path: Path, pznet_net: Callable[..., Section]
) -> None:
    path = make_spec(model=pznet_net(), output=output)
    before = load_spec(path).fingerprint
    load(path)(patches(1))
    assert (tmp_path / "net" / "lib" / "layer.so").exists()
    assert load_spec(path).fingerprint == before
    weights = tmp_path / "net" / "weights" / "convolution.data"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert load_spec(path).fingerprint != before


def test_two_nets_in_one_process(
    make_spec: MakeSpec, output: Section, tmp_path: Path, pznet_net: Callable[..., Section]
) -> None:
    """Both modules have the name znet."""
    one, other = pznet_net("one"), pznet_net("other")
    weights = tmp_path / "other" / "weights" / "convolution.data"
    (np.fromfile(weights, np.float32) * 2).tofile(weights)
    engines = [load(make_spec(model=model, output=output)) for model in (one, other)]
    first, second = (engine(patches()) for engine in engines)
    np.testing.assert_allclose(second, first * 2, rtol=1e-5)


def test_the_package_of_the_time_before(
    make_spec: MakeSpec, output: Section, pznet_net: Callable[..., Section], pznet_package: Callable[[str], None]
) -> None:
    pznet_package(f"{PZNET}\n{OLD_PZNET.replace('from pznet.pznet import PZNet', '')}\ndel PZNet.in_shape")
    engine = load(make_spec(model=pznet_net(), output=output))
    expected = convolution()(torch.from_numpy(patches())).detach().numpy()
    np.testing.assert_allclose(engine(patches()), expected, atol=1e-5)


def test_a_net_without_its_weights(
    make_spec: MakeSpec, output: Section, tmp_path: Path, pznet_net: Callable[..., Section]
) -> None:
    path = make_spec(model=pznet_net(), output=output)
    (tmp_path / "net" / "weights" / "convolution.data").write_bytes(b"")
    with pytest.raises(SpecError, match=r"the net in .*/net can't be loaded: ValueError: weights are short"):
        load(path)


def test_a_net_in_python_runs_as_it_is(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A net is not run as compiled before, when the file has the same size and date as now."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "net" / "znet.py"
    (file.parent / "weights").mkdir(parents=True)
    file.write_text(IN_PYTHON)
    path = make_spec(model={"engine": "pznet", "path": "net"}, output=output)
    assert load(path)(patches()).max() == 1

    date = file.stat().st_mtime_ns
    file.write_text(IN_PYTHON.replace("VALUE = 1", "VALUE = 2"))
    os.utime(file, ns=(date, date))

    assert load(path)(patches()).max() == 2
