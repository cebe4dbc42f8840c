"""An ``info`` that says anything at all ends in one line and an exit code, never in a traceback."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from cloudvolume.chunks import NEEDS_INSTALL, SUPPORTED_ENCODINGS

from chunkflow_core.errors import ChunkflowError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layer_info import ENCODINGS
from tests.support.volume import write_layer, write_volume

Command = Callable[..., Any]
Place = tuple[str | int, ...]

NUMBERS = [0, -1, 1.5, 2**40, 2**53, 2**63, 10**400, math.nan, math.inf]
TEXTS = ["", "x", "../x", "/x", "a//b", "\ud800", "a" * 999, "float16", "complex64", "O", "f4,f4", ">u2", *ENCODINGS]
SHARDING = {"@type": 1, "hash": 2, "minishard_bits": 3, "preshift_bits": 4, "shard_bits": 5}
VALUES = [
    *(None, True, *NUMBERS, *TEXTS, {"a": 1}, SHARDING),
    *([], [1, 1], ["a"] * 3, [[]], *([number] * 3 for number in NUMBERS), *([[number] * 3] for number in NUMBERS)),
    *([1e-320] * 3, [1e-9] * 3, [1e9] * 3),
]
MORE: list[Place] = [("type",), ("mesh",), *(("scales", 0, key) for key in ("sharding", "jpeg_quality", "hidden"))]
"""Places where nothing stands in a plain layer's ``info``."""


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """All places in a JSON value."""
    yield place
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*place, key))


def changed(value: Any, place: Place, to: Any) -> Any:
    """A JSON value with another part at a place."""
    if not place:
        return to
    copy: Any = value.copy()
    inner = value.get(place[0]) if isinstance(value, dict) else value[place[0]]
    copy[place[0]] = changed(inner, place[1:], to)
    return copy


def make_old(folder: Path) -> None:
    """Set back the dates of all files: what has just been written may still be on its way."""
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - 1e6,) * 2)


def exit_code_of_reading_the_mask(spec: VolumeSpec) -> int:
    """What a stage ends with; 0 if the mask can be read."""
    try:
        mask = Workspace(spec).mask
        assert mask is not None
        mask.window(Box((0, 0, 0), (8, 16, 16)))
    except ChunkflowError as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize("layer", ["input", "mask", "output"])
def test_whatever_an_info_says(tmp_path: Path, chunkflow: Command, layer: str) -> None:
    path = write_volume(tmp_path)
    write_layer(tmp_path / "mask")
    mask = ["--set", f"skip.mask.path=file://{tmp_path}/mask"]
    assert chunkflow("prepare", path, *mask).returncode == 0
    for folder in ("input", "mask"):
        make_old(tmp_path / folder)
    file = tmp_path / layer / "info"
    info = json.loads(file.read_text())
    codes = set()
    for place in [*places(info), *MORE]:
        for value in VALUES:
            file.write_text(json.dumps(changed(info, place, value)))
            if layer == "mask":
                code = exit_code_of_reading_the_mask(load_spec(path, mask[1:]))
            else:
                code = chunkflow("prepare" if layer == "input" else "verify", path, *mask).returncode
            codes.add(code)
            assert code in (0, 65, 66, 78), (place, value)
    assert 66 in codes
    assert len(codes) > 1, "some are as good as what was there"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"scales": ' * 100_000, "\ud800", "9" * 5000])
def test_an_info_that_json_itself_does_not_take(tmp_path: Path, chunkflow: Command, text: str) -> None:
    path = write_volume(tmp_path)
    (tmp_path / "input" / "info").write_bytes(text.encode(errors="surrogatepass"))
    outcome = chunkflow("plan", path)
    assert outcome.returncode == 66
    assert f"file://{tmp_path}/input: the layer's info file is not JSON" in outcome.stderr


@pytest.mark.parametrize("encoding", sorted(set(ENCODINGS) - {"raw"}))
def test_an_encoding_that_is_not_the_files(tmp_path: Path, chunkflow: Command, encoding: str) -> None:
    """Also where what reads it is not installed."""
    path = write_volume(tmp_path)
    file = tmp_path / "input" / "info"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(changed(info, ("scales", 0, "encoding"), encoding)))
    make_old(tmp_path / "input")
    outcome = chunkflow("prepare", path)
    codec = "fpzip" if encoding == "kempressed" else encoding
    assert outcome.returncode == (78 if codec in NEEDS_INSTALL else 65)
    assert f"file://{tmp_path}/input" in outcome.stderr
    assert f"encoding {encoding}" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_the_encodings_are_those_of_cloudvolume() -> None:
    assert set(ENCODINGS) == set(SUPPORTED_ENCODINGS)


def test_an_encoded_layer_is_read(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    info = json.loads((tmp_path / "input" / "info").read_text())
    info["scales"][0]["encoding"] = "jpeg"
    volume = CloudVolume(f"file://{tmp_path}/jpeg", info=info, progress=False)
    volume.commit_info()
    volume[:, :, :] = np.asarray(CloudVolume(f"file://{tmp_path}/input", progress=False)[:, :, :])
    assert chunkflow("prepare", path, "--set", f"input.path=file://{tmp_path}/jpeg").returncode == 0
