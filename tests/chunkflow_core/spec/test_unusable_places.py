"""Good specs of layers and files that are not there, are of another kind, or can't be written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.volume import PYTORCH

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]


def test_missing_input_layer(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{tmp_path}/nix"}))
    assert outcome.returncode == 66
    assert f"file://{tmp_path}/nix: there is no layer here" in outcome.stderr


def test_input_layer_below_a_regular_file(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    (tmp_path / "file").write_text("")
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{tmp_path}/file/em"}))
    assert outcome.returncode == 66
    assert "there is no layer here" in outcome.stderr


def test_mip_that_does_not_exist(make_spec: MakeSpec, random_layer: Path, chunkflow: Command) -> None:
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{random_layer}", "mip": 3}))
    assert outcome.returncode == 66
    assert "mip 3 does not exist; the layer has mips 0 to 0" in outcome.stderr


@pytest.mark.parametrize(
    ("info", "piece"),
    [
        ("{", "not JSON"),
        ("\x00\x01", "not JSON"),
        ("[]", "lists no scales"),
        ("{}", "lists no scales"),
        ('{"scales": [{"size": [4, 4, 4]}]}', "mip 0 can't be understood"),
        ('{"scales": [{"size": [4, 4], "resolution": [1, 1, 1], "chunk_sizes": [[1, 1, 1]]}]}', "mip 0 can't"),
        ('{"scales": [7]}', "mip 0 can't be understood"),
    ],
)
def test_info_that_is_not_of_a_layer(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, info: str, piece: str
) -> None:
    (tmp_path / "em").mkdir()
    (tmp_path / "em" / "info").write_text(info)
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{tmp_path}/em"}))
    assert outcome.returncode == 66
    assert f"file://{tmp_path}/em" in outcome.stderr
    assert piece in outcome.stderr


@pytest.mark.parametrize(
    ("change", "scale", "piece"),
    [
        ({"data_type": "uint24"}, {}, "data type 'uint24' not understood"),
        ({"data_type": None}, {}, "data_type is None"),
        ({"num_channels": "one"}, {}, "num_channels is 'one', expected an integer >= 1"),
        ({"num_channels": 0}, {}, "num_channels is 0"),
        ({"scales": 7}, {}, "lists no scales"),
        ({}, {"size": [0, 0, 0]}, "size is [0, 0, 0], expected three integers >= 1"),
        ({}, {"size": [40.5, 48, 20]}, "size is [40.5, 48, 20]"),
        ({}, {"chunk_sizes": [[0, 16, 8]]}, "chunk_sizes is [0, 16, 8]"),
        ({}, {"chunk_sizes": []}, "mip 0 can't be understood"),
        ({}, {"voxel_offset": [0, 0, "0.5"]}, "voxel_offset is [0, 0, '0.5'], expected three integers)"),
        ({}, {"key": None}, "key is None"),
        ({}, {"key": "a\0b"}, r"key is 'a\x00b'"),
        ({}, {"encoding": 5}, "encoding is 5, expected a text"),
        ({}, {"resolution": ["a", 1, 1]}, "resolution is ['a', 1, 1], expected three numbers"),
        ({}, {"resolution": [4, 4]}, "resolution is [4, 4]"),
    ],
)
def test_info_that_is_nearly_of_a_layer(
    make_spec: MakeSpec,
    random_layer: Path,
    tmp_path: Path,
    chunkflow: Command,
    change: dict[str, Any],
    scale: dict[str, Any],
    piece: str,
) -> None:
    layer = tmp_path / "em"
    layer.mkdir()
    info = json.loads((random_layer / "info").read_text())
    info["scales"][0] |= scale
    (layer / "info").write_text(json.dumps(info | change))
    outcome = chunkflow("prepare", make_spec(input={"path": f"file://{layer}"}))
    assert outcome.returncode == 66, outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert f"file://{layer}: the info file is not that of a precomputed layer" in outcome.stderr
    assert piece in outcome.stderr


@pytest.mark.parametrize(
    "roi", [[[20, 0, 0], [40, 48, 40]], [[0, 0, 0], [20, 49, 40]], [[-1, 0, 0], [20, 48, 40]]], ids=str
)
def test_roi_past_the_input_layer(make_spec: MakeSpec, chunkflow: Command, roi: list[list[int]]) -> None:
    outcome = chunkflow("prepare", make_spec(roi=roi))
    assert outcome.returncode == 78
    assert "roi: " in outcome.stderr
    assert "reaches past the input layer" in outcome.stderr
    assert "z 0–20 y 0–48 x 0–40" in outcome.stderr


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dtype": "float32", "chunk_size": [6, 12, 12]}, "has dtype uint8, the spec says float32"),
        ({"chunk_size": [12, 24, 24]}, "has chunk_size (6, 12, 12), the spec says (12, 24, 24)"),
        ({"channels": 2, "chunk_size": [6, 12, 12]}, "has channels 1, the spec says 2"),
    ],
)
def test_output_layer_of_another_kind_is_never_overwritten(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, changes: dict[str, Any], what: str
) -> None:
    assert chunkflow("prepare", make_spec()).returncode == 0
    info = (tmp_path / "output" / "info").read_bytes()
    outcome = chunkflow("prepare", make_spec(output={"path": f"file://{tmp_path}/output"} | changes))
    assert outcome.returncode == 78
    assert "output.path" in outcome.stderr
    assert what in outcome.stderr
    assert (tmp_path / "output" / "info").read_bytes() == info


@pytest.mark.parametrize(
    ("change", "what"),
    [({"encoding": "jpeg"}, "encoding jpeg"), ({"sharding": {"@type": "neuroglancer_uint64_sharded_v1"}}, "sharded")],
)
def test_output_layer_that_is_not_raw_is_refused(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, change: dict[str, Any], what: str
) -> None:
    assert chunkflow("prepare", make_spec()).returncode == 0
    file = tmp_path / "output" / "info"
    info = json.loads(file.read_text())
    info["scales"][0] |= change
    file.write_text(json.dumps(info))
    outcome = chunkflow("prepare", make_spec())
    assert outcome.returncode == 78
    assert what in outcome.stderr
    assert "only raw is written" in outcome.stderr


def test_output_layer_of_another_roi(make_spec: MakeSpec, chunkflow: Command) -> None:
    assert chunkflow("prepare", make_spec()).returncode == 0
    outcome = chunkflow("prepare", make_spec(), "--set", "roi=[[0, 0, 0], [12, 48, 40]]")
    assert outcome.returncode == 78
    assert "has bounds z 0–20" in outcome.stderr


@pytest.mark.parametrize("place", ["exchange", "output"])
def test_place_that_can_not_be_written_is_worth_a_retry(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, place: str
) -> None:
    """Tests run as root, who may write anywhere but below a regular file."""
    (tmp_path / "file").write_text("")
    outcome = chunkflow("prepare", make_spec(), "--set", f"{place}.path=file://{tmp_path}/file/below")
    assert outcome.returncode == 75, outcome.stderr
    assert f"{tmp_path}/file/below" in outcome.stderr


@pytest.mark.parametrize("key", ["path", "weights"])
def test_missing_model_file(make_spec: MakeSpec, model_folder: Path, chunkflow: Command, key: str) -> None:
    outcome = chunkflow("plan", make_spec(model={**PYTORCH, key: "nix.py"}))
    assert outcome.returncode == 66
    assert f"{model_folder}{os.sep}nix.py does not exist" in outcome.stderr
