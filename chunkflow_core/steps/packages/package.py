"""What the readers of packages share: what they give, how they read, how they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chunkflow_core.errors import MissingInputError, SpecError

Section = dict[str, Any]
"""A section of a spec, or a part of a description."""


@dataclass(frozen=True)
class TestTensors:
    """Arrays that come with a package, for a trial of it."""

    given: Path
    """What goes in, ``.npy``, ``(1, channels, z, y, x)`` or without z."""
    expected: Path
    """What has to come out, likewise."""
    relative: float
    """Largest difference, relative to the expected number, …"""
    absolute: float
    """… plus this one."""
    mismatches: float
    """Numbers in a million that may differ by more."""


@dataclass(frozen=True)
class Package:
    """What a package says of a spec."""

    title: str
    """Kind and place of it."""
    sections: Section
    """Keys of the spec."""
    notes: tuple[str, ...] = ()
    """What a spec can't say, or its writer has to decide; a sentence each."""
    tests: TestTensors | None = None
    """None if none come with it."""

    @property
    def lines(self) -> str:
        """The lines of a spec, in YAML; notes are comments."""
        comments = [self.title, *self.notes]
        body = yaml.safe_dump(self.sections, sort_keys=False, default_flow_style=None, width=100)
        return "\n".join([*(f"# {text}" for text in comments), body.rstrip()])


@contextmanager
def reading(file: Path, kind: str) -> Iterator[None]:
    """Read a description within this: what is not as the kind has it becomes a ``SpecError``."""
    try:
        yield
    except KeyError as error:
        raise SpecError(f"{file}: not as a {kind} has it: the key {error} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise SpecError(f"{file}: not as a {kind} has it: {error}") from error


def content_of(file: Path) -> Section:
    """The keys and values of a JSON or YAML file.

    Raises:
        MissingInputError: It can't be read.
        SpecError: It is none.
    """
    try:
        return parsed(file.read_bytes(), file)
    except OSError as error:
        raise MissingInputError(f"{file} can't be read: {error.strerror}") from error


def parsed(text: bytes, file: Path) -> Section:
    """The keys and values of a text in JSON or YAML; ``SpecError`` that names ``file`` if none."""
    try:
        content = json.loads(text) if text.lstrip()[:1] == b"{" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise SpecError(f"{file} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{file}: expected keys with values")
    return content


def existing(file: Path, whose: Path) -> Path:
    """A file that a description names; ``MissingInputError`` if it isn't there."""
    if not file.is_file():
        raise MissingInputError(f"there is no {file}, which {whose} names")
    return file


def chosen(kinds: Mapping[str, Any], wanted: str | None, file: Path) -> str:
    """The weights that are wanted, or the first; ``SpecError`` if there are none."""
    if not kinds:
        raise SpecError(f"{file}: has no weights that can be run here")
    if wanted is not None and wanted not in kinds:
        raise SpecError(f"{file}: has no weights {wanted}, expected --weights {' or '.join(kinds)}")
    return wanted or next(iter(kinds))


def geometry(patch: Sequence[int], *, output: Sequence[int] | None = None, overlap: float = 0.5) -> Section:
    """The keys of a spec for patches, zyx or yx, that overlap by a part of their size."""
    size = [1] * (3 - len(patch)) + [int(n) for n in patch]
    result = size if output is None else [1] * (3 - len(output)) + [int(n) for n in output]
    keys: Section = {"patch_size": size}
    if result != size:
        keys["output_patch_size"] = result
    return keys | {"patch_overlap": [min(n - 1, int(n * overlap)) for n in result]}


def dimensions_of(patch: Sequence[int]) -> Section:
    """The key of ``model`` for the dimensions of a patch, zyx or yx; none for three."""
    return {"dimensions": 2} if len(patch) == 2 else {}
