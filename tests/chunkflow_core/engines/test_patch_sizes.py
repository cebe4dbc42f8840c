"""Patches that a network can't take, and outputs of deep supervision: what is said of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkflow_core.engines.patch_sizes import fitting_patches
from chunkflow_core.errors import DataError
from chunkflow_core.spec import load_spec
from tests.support.models.forms import pytorch, write
from tests.support.models.loading import MakeSpec, Section, load, patches

Command = Callable[..., Any]

UNET = """
import torch
F = torch.nn.functional

def InstantiatedModel(x):
    down = F.avg_pool3d(x, {factor})
    up = F.interpolate(down, scale_factor={factor})
    return torch.cat([x, up], 1) if {joins} else up.repeat(1, 2, 1, 1, 1)
"""


def unet(folder: Path, factor: tuple[int, ...], joins: bool = True) -> Section:
    write(folder, UNET.format(factor=tuple(map(float, factor)), joins=joins).replace(".0", ""))
    return pytorch(weights=...)


@pytest.mark.parametrize("joins", [True, False], ids=["fails", "gives another size"])
@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 4, 4), (4, 8, 8), (1, 16, 16), (3, 2, 2)])
def test_sizes_that_a_network_takes_are_found(
    make_spec: MakeSpec, tmp_path: Path, output: Section, factor: tuple[int, ...], joins: bool
) -> None:
    size = [11, 21, 35] if factor[0] != 3 else [9, 21, 35]
    path = make_spec(model=unet(tmp_path, factor, joins), output=output)
    spec = load_spec(path).model_copy(update={"patch_size": tuple(size)})
    with pytest.raises(DataError):
        load_engine_of(spec)
    told = fitting_patches(spec)
    sizes = [tuple(map(int, text.split(", "))) for text in re.findall(r"\[(.*?)\]", told)]
    assert sizes
    for fitting in sizes:
        assert all(n % f == 0 for n, f in zip(fitting, factor, strict=True))
        assert all(abs(n - m) < 32 for n, m in zip(fitting, size, strict=True))
        load_engine_of(spec.model_copy(update={"patch_size": fitting}))
    if factor[0] in (1, 3):
        assert all(fitting[0] == size[0] for fitting in sizes), "that axis was right"


def load_engine_of(spec: Any) -> None:
    """Run a patch of a spec's size."""
    from chunkflow_core.engines import load_engine

    load_engine(spec)(np.zeros((1, 1, *spec.patch_size), np.float32))


def test_nothing_is_said_where_nothing_fits(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    write(tmp_path, "def InstantiatedModel(x):\n    return undefined\n")
    assert fitting_patches(load_spec(make_spec(model=pytorch(weights=...), output=output))) == ""


def test_prepare_says_the_sizes(make_spec: MakeSpec, tmp_path: Path, output: Section, chunkflow: Command) -> None:
    geometry = {"patch_size": [7, 15, 18], "patch_overlap": [1, 3, 6], "block_size": [12, 24, 24]}
    path = make_spec(model=unet(tmp_path, (1, 2, 2)), output=output, **geometry)
    outcome = chunkflow("prepare", path)
    assert outcome.returncode == 65
    assert "the model takes patch_size: [7, 14, 18] or [7, 16, 18], found by trying" in outcome.stderr
    assert "as the spec is, the model failed with a batch of shape (1, 1, 7, 15, 18)" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not (tmp_path / "output").exists()


HEADS = """
import torch

def pool(y, n):
    return torch.nn.functional.avg_pool3d(y, n)

def InstantiatedModel(x):
    y = torch.cat([x, 1 - x], 1)
    return {heads}
"""


@pytest.mark.parametrize("heads", ["(y, pool(y, 2), pool(y, 4))", "[y, y * 0.5]", "(y, None)", "(y, {'loss': 1})"])
def test_the_first_head_is_taken(make_spec: MakeSpec, tmp_path: Path, output: Section, heads: str) -> None:
    write(tmp_path, HEADS.format(heads=heads))
    path = make_spec(model=pytorch(weights=...), output=output)
    np.testing.assert_array_equal(load(path)(patches(1))[:, 0], patches(1)[:, 0])


@pytest.mark.parametrize(
    ("heads", "index"),
    [
        ("(pool(y, 4), pool(y, 2), y)", 2),
        ("[x, y]", 1),
        ("(None, y)", 1),
        ("([y], y, y)", 1),
        ("(y[0], y[:, :1], y)", 2),
    ],
)
def test_a_first_head_that_does_not_fit_is_not_taken_for_another(
    make_spec: MakeSpec, tmp_path: Path, output: Section, heads: str, index: int
) -> None:
    write(tmp_path, HEADS.format(heads=heads))
    path = make_spec(model=pytorch(weights=...), output=output)
    with pytest.raises(DataError, match=rf"name the one to take, such as model\.output: {index}"):
        load(path)(patches(1))
    given = load(path, f"model.output={index}")(patches(1))
    np.testing.assert_array_equal(given[:, 0], patches(1)[:, 0])


@pytest.mark.parametrize(
    "heads", ["torch.stack([y, y], 1)", "torch.stack([y, y])", "[[y, y]]", "type('Out', (), {})()"]
)
def test_heads_that_can_not_be_named(make_spec: MakeSpec, tmp_path: Path, output: Section, heads: str) -> None:
    write(tmp_path, HEADS.format(heads=heads))
    path = make_spec(model=pytorch(weights=...), output=output)
    with pytest.raises(DataError, match=r"post_process\(output\) in the model file can return the part that is meant"):
        load(path)(patches(1))
