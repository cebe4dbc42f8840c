"""Questions change nothing: not a byte, not a time, no file that is there for a moment only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chunkflow_core.__main__ import main
from tests.support.harms import HARMS, Volume

QUESTIONS = [
    "plan",
    "plan --check-input",
    "plan --check-input --force --json",
    "verify --seams 2",
    "verify --deep --seams 1 --json",
    "report",
    "report --json",
]


def trace(folder: Path) -> dict[str, tuple[int, int, int]]:
    """When each file and folder has changed, in content, name or rights: a kernel's times.

    Nobody can set the last of them, and a folder's tell of files that have come and gone.
    """
    status = {str(path): path.lstat() for path in [folder, *folder.rglob("*")]}
    return {path: (s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in status.items()}


def touched(folder: str) -> Callable[[Volume], None]:
    """Lets storage say something else of all files of a layer, whose voxels are the same."""

    def touch(volume: Volume) -> None:
        for file in (volume.folder / folder).glob("*/*"):
            os.utime(file)

    return touch


def nothing(volume: Volume) -> None:
    """Leave the volume as it is."""


STATES = [nothing, touched("input"), touched("output"), *(harm.do for harm in HARMS)]


@pytest.mark.parametrize("state", STATES, ids=["healthy", "input copied", "output copied", *map(str, HARMS)])
def test_a_question_changes_nothing(volume: Volume, state: Callable[[Volume], object]) -> None:
    state(volume)
    before = trace(volume.folder)

    for question in QUESTIONS:
        command, *options = question.split()
        main([command, str(volume.path), "--set", "exchange.donations=keep", *options])
        assert trace(volume.folder) == before, question
