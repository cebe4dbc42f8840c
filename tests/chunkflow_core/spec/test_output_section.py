"""What may be asked of a network's output: which channels, and what is stored of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import load_spec, parse_spec
from chunkflow_core.steps.provenance import spec_record
from tests.support.volume import PYTORCH

MakeSpec = Callable[..., Path]
Section = dict[str, Any]

LISTS = "or a list of those of them to take, counted from 0, such as [1, 3]"
REFUSED: list[tuple[Section, Section, list[str]]] = [
    # keys of output and of model, and what the message has to say
    ({"channels": []}, {}, ["output.channels: []", LISTS]),
    ({"channels": [-1]}, {}, ["output.channels: [-1]", LISTS]),
    ({"channels": [0, 1.0]}, {}, ["output.channels: [0, 1.0]", LISTS]),
    ({"channels": [True]}, {}, ["output.channels: [true]", LISTS]),
    ({"channels": ["1"]}, {}, ['output.channels: ["1"]', LISTS]),
    ({"channels": [[0, 1]]}, {}, ["output.channels: [[0, 1]]", LISTS]),
    ({"channels": "all"}, {}, ['output.channels: "all"', LISTS]),
    ({"channels": 0}, {}, ["output.channels: 0", "from 1 to 65536"]),
    ({"channels": True}, {}, ["output.channels: true", LISTS]),
    ({"channels": 2.0}, {}, ["output.channels: 2.0", LISTS]),
    ({"channels": 70000}, {}, ["output.channels: 70000", "65536"]),
    ({"channels": [1, 2, 1]}, {}, ["output.channels: [1, 2, 1]", "each channel once"]),
    ({"channels": [1, 4]}, {"channels": 4}, ["output.channels: [1, 4]", "4 channels (model.channels)"]),
    ({"channels": 2}, {"channels": 4}, ["model.channels: 4", "output.channels: 2", "[0, 1]"]),
    ({"channels": [0]}, {"channels": 0}, ["model.channels: 0", "greater than or equal to 1"]),
    ({"channels": [0, 1]}, {"outputs": "affinity"}, ["model.outputs: affinity", "output.channels: 3", "[0, 1]"]),
    (
        {"channels": [0, 1, 2, 3]},
        {"outputs": "affinity", "augmentation": "flips"},
        ["model.outputs: affinity", "got [0, 1, 2, 3]"],
    ),
    ({"channels": 3}, {"outputs": "affinity", "activation": "softmax"}, ["model.activation: softmax", "affinity"]),
    ({"channels": 3, "argmax": True}, {"outputs": "affinity"}, ["output.argmax", "model.outputs: independent"]),
    ({"channels": 1, "argmax": True}, {}, ["output.argmax: of 1 channels", "from 2 to 256"]),
    ({"channels": [7], "argmax": True}, {}, ["output.argmax: of 1 channels", "from 2 to 256"]),
    ({"channels": 257, "argmax": True}, {}, ["output.argmax: of 257 channels", "from 2 to 256"]),
    ({"channels": 2, "argmax": 1}, {}, ["output.argmax: 1", "boolean"]),
    ({"channels": 2, "argmax": True, "threshold": 0.5}, {}, ["output.argmax: with threshold", "one of the two"]),
    ({"channels": 2, "argmax": True, "dtype": "uint16"}, {}, ["output.dtype: uint16", "uint8 with argmax"]),
    ({"threshold": 0.5, "dtype": "float32"}, {}, ["output.dtype: float32", "uint8 with threshold"]),
    ({"threshold": 1.5}, {}, ["output.threshold: 1.5", "above 0 and up to 1 (output.range)"]),
    ({"threshold": 128}, {}, ["output.threshold: 128", "up to 1 (output.range)"]),
    ({"threshold": -3, "range": [-3, 3]}, {}, ["output.threshold: -3", "above -3 and up to 3"]),
    ({"threshold": 0.0}, {}, ["output.threshold: 0", "above 0"]),
    ({"threshold": float("nan")}, {}, ["output.threshold: nan", "above 0"]),
    ({"threshold": True}, {}, ["output.threshold: true", "number"]),
    ({"threshold": "otsu"}, {}, ["output.threshold", "otsu", "number"]),
    ({"threshold": 0, "range": [-8, 8]}, {}, ["output.threshold: 0", "have the value 0", "skip.zeros: false"]),
    ({"threshold": -1, "range": [-8, 8]}, {}, ["output.threshold: -1", "skip.zeros: false"]),
    ({"dtype": "float16", "range": [0, 65505]}, {}, ["output.range: [0, 65505]", "float16", "65504"]),
    ({"dtype": "float16", "range": [-1e6, 0]}, {}, ["output.range", "float16 goes to 65504"]),
    ({"dtype": "float16", "range": [0, 1e-5]}, {}, ["output.range: [0, 1e-05]", "fewer bits", "float32"]),
    ({"dtype": "float64"}, {}, ["output.dtype", "float64", "'float32'"]),
    ({"channels": 2}, {"activation": "relu"}, ["model.activation", "relu", "'softmax'"]),
]


def changed(make_spec: MakeSpec, folder: Path, output: Section, model: Section) -> Path:
    place = {"path": f"file://{folder}/output", "chunk_size": [6, 12, 12]}
    return make_spec(output=place | output, model={"engine": "identity"} | model)


@pytest.mark.parametrize(("output", "model", "pieces"), REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(
    make_spec: MakeSpec, tmp_path: Path, output: Section, model: Section, pieces: list[str]
) -> None:
    path = changed(make_spec, tmp_path, output, model)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert len(str(caught.value).splitlines()) == 1
    for piece in (str(path), *pieces):
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("output", "model", "channels"),
    [
        ({"channels": 4}, {}, (4, 4)),
        ({"channels": 4}, {"channels": 4}, (4, 4)),
        ({"channels": [3]}, {}, (1, 1)),
        ({"channels": [3, 0, 1]}, {"channels": 12, "outputs": "affinity", "augmentation": "flips"}, (3, 3)),
        ({"channels": [0, 1, 2]}, {"activation": "softmax", "augmentation": "flips"}, (3, 3)),
        ({"channels": 256, "argmax": True}, {}, (256, 1)),
        ({"channels": [5, 6], "threshold": 1}, {}, (2, 2)),
        ({"dtype": "float16", "range": [-65504, 2]}, {}, (1, 1)),
    ],
)
def test_channels_that_are_summed_and_stored(
    make_spec: MakeSpec, tmp_path: Path, output: Section, model: Section, channels: tuple[int, int]
) -> None:
    spec = load_spec(changed(make_spec, tmp_path, output, model))
    assert (spec.output.summed_channels, spec.output.stored_channels) == channels
    again = parse_spec(spec.model_dump(), folder=spec.folder)
    assert again.fingerprint == spec.fingerprint


def test_a_threshold_of_nothing_where_all_patches_are_run(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = changed(make_spec, tmp_path, {"threshold": 0, "range": [-8, 8]}, {})
    assert load_spec(path, ["skip.zeros=false"]).output.threshold == 0


def test_keys_that_are_not_set_are_in_no_record(make_spec: MakeSpec, model_folder: Path) -> None:
    """So blocks that were done before there were such keys stay done."""
    record = spec_record(load_spec(make_spec(model=PYTORCH)))
    assert {"threshold", "argmax"}.isdisjoint(record["output"])
    assert "channels" not in record["model"]
    changes = ["output.channels=[0, 1]", "output.argmax=true", "model.channels=2"]
    record = spec_record(load_spec(make_spec(model=PYTORCH), changes))
    assert (record["output"]["channels"], record["output"]["argmax"]) == ([0, 1], True)
    assert record["model"]["channels"] == 2
