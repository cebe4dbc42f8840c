"""The table of a block's way in ``docs/architecture.md`` tells the truth.

What it names exists, and is called in that order.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core import inference_and_donate
from chunkflow_core.__main__ import main

ROOT = Path(__file__).parents[2]


def way_of_a_block() -> list[tuple[str, str, str]]:
    """Step, file and function of each row."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("## The way of a block")[2].partition("##")[0]
    return re.findall(r"^\| ([\w ]+) \| `([\w/.]+)` \| `([\w.]+)` \|$", section, re.MULTILINE)


def module_of(file: str) -> Any:
    """The module that a file of the checkout is."""
    return import_module(file.removesuffix(".py").replace("/", "."))


def test_the_way_has_eight_steps_that_exist() -> None:
    way = way_of_a_block()
    assert [step for step, _, _ in way] == [
        "DAG file",
        "command",
        "stage",
        "reading",
        "patch",
        "sums",
        "storage",
        "receipt",
    ]
    for _, file, function in way:
        module = module_of(file)
        assert Path(module.__file__) == ROOT / file
        assert callable(attrgetter(function)(module)), (file, function)
    assert "volume_dags(" in (ROOT / "dags/chunkflow_volumes.py").read_text()


def test_a_block_goes_that_way(make_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = str(make_spec())
    assert main(["prepare", spec]) == 0
    went: dict[str, None] = {}

    def watched(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            went.setdefault(step)
            return function(*arguments, **options)

        return call

    way = way_of_a_block()[2:]  # the command is called below
    for step, file, function in way:
        owner, _, name = function.rpartition(".")
        place = attrgetter(owner)(module_of(file)) if owner else module_of(file)
        monkeypatch.setattr(place, name, watched(step, getattr(place, name)))

    assert inference_and_donate.main([spec, "--block", "0", "0", "0"]) == 0

    assert list(went) == [step for step, _, _ in way]
    assert inference_and_donate.main is module_of(way_of_a_block()[1][1]).infer
