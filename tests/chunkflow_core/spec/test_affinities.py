"""How affinities are told in a spec, and what of them does not fit together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec, load_spec, parse_spec

MakeSpec = Callable[..., Path]

ABISS = [[0, 0, -1], [0, -1, 0], [-1, 0, 0]]
WATERZ = [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
SOURCE = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
SCHEMA = json.loads((Path(__file__).parents[3] / "docs/volume-spec.schema.json").read_text())


def loaded(
    make_spec: MakeSpec, given: Any = None, wanted: Any = None, channels: int = 3, *overrides: str
) -> VolumeSpec:
    told = [
        *([f"model.affinities={json.dumps(given)}"] if given is not None else []),
        *([f"output.affinities={json.dumps(wanted)}"] if wanted is not None else []),
    ]
    return load_spec(make_spec(), [f"output.channels={channels}", *told, *overrides])


@pytest.mark.parametrize(
    ("told", "offsets"),
    [
        ("abiss", ABISS),
        ("deepem", ABISS),
        ("waterz", WATERZ),
        ("pytc_deepem", WATERZ),
        ("pytc_banis", SOURCE),
        (WATERZ, WATERZ),
        ({"offsets": WATERZ}, WATERZ),
        ({"offsets": SOURCE, "stored_at": "source"}, SOURCE),
        ({"offsets": SOURCE, "stored_at": "destination"}, WATERZ),
        ([[0, 0, 0], [0, -27, 27], [3, 0, 0]], [[0, 0, 0], [0, -27, 27], [3, 0, 0]]),
    ],
    ids=str,
)
def test_however_it_is_told_it_is_a_list_of_offsets(make_spec: MakeSpec, told: Any, offsets: list[list[int]]) -> None:
    spec = loaded(make_spec, told, told)
    assert [list(offset) for offset in spec.network_affinities] == offsets
    assert spec.layer_affinities == spec.network_affinities
    assert spec.fingerprint == loaded(make_spec, offsets, offsets).fingerprint
    assert parse_spec(spec.model_dump(mode="json", exclude={"folder"})).network_affinities == spec.network_affinities
    for section in ("ModelSpec", "OutputSpec"):
        kind = {**SCHEMA["$defs"][section]["properties"]["affinities"]}
        jsonschema.validate(told, kind)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate("zwatershed", kind)


def test_the_default_is_what_was_always_meant(make_spec: MakeSpec) -> None:
    """Fingerprints and records of specs that do not speak of it are those of before."""
    plain, old = loaded(make_spec), loaded(make_spec, None, None, 3, "model.outputs=affinity")
    assert (plain.network_affinities, plain.layer_affinities) == ((), ())
    assert [list(offset) for offset in old.network_affinities] == ABISS
    assert old.layer_affinities == old.network_affinities
    for spec in (plain, old):
        assert spec.unset_later["output"]["affinities"] is spec.unset_later["model"]["affinities"] is True
    converted = loaded(make_spec, None, "waterz", 3, "model.outputs=affinity")
    assert converted.network_affinities == old.network_affinities
    assert [list(offset) for offset in converted.layer_affinities] == WATERZ
    told = loaded(make_spec, "waterz", "abiss")
    assert "affinities" not in {**told.unset_later["output"], **told.unset_later["model"]}


def test_what_is_said_of_affinities_is_in_the_fingerprint(make_spec: MakeSpec) -> None:
    specs = [
        loaded(make_spec, *pair) for pair in [(None, None), ("abiss", None), ("abiss", "waterz"), ("waterz", None)]
    ]
    assert len({spec.fingerprint for spec in specs}) == len(specs)


FLIPS, BOTH = "model.augmentation=flips", "model.augmentation=flips_transpose"
WRONG: dict[str, tuple[Any, Any, list[str], list[str]]] = {
    # case: (of the network, of the layer, further changes, what the message has to say)
    "unknown name": ("zwatershed", None, [], ["model.affinities", "zwatershed", "abiss, deepem, waterz", "[-1, 0, 0]"]),
    "unknown name of the layer": ("abiss", "xyz", [], ["output.affinities", "xyz", "waterz"]),
    "no offset": ([], None, [], ["model.affinities", "[[-1, 0, 0]"]),
    "one offset": ([0, 0, 1], None, [], ["model.affinities", "three integers"]),
    "two numbers": ([[0, 1], [1, 0], [1, 1]], None, [], ["model.affinities", "three integers"]),
    "fractions": ([[0, 0, 0.5], [0, 1, 0], [1, 0, 0]], None, [], ["model.affinities", "three integers"]),
    "boolean": ([[0, 0, True], [0, 1, 0], [1, 0, 0]], None, [], ["model.affinities", "three integers"]),
    "text": (["0-0-1", "0-1-0", "1-0-0"], None, [], ["model.affinities", "three integers"]),
    "number": (1, None, [], ["model.affinities", "abiss"]),
    "farther than any patch": ([[0, 0, 1], [0, 4096, 0], [1, 0, 0]], None, [], ["model.affinities", "within ±2048"]),
    "twice": ([[0, 0, 1], [1, 0, 0], [0, 0, 1]], None, [], ["model.affinities", "[0, 0, 1] stands there twice"]),
    "unknown key": ({"offset": WATERZ}, None, [], ["model.affinities", "offset", "offsets"]),
    "no offsets": ({"stored_at": "source"}, None, [], ["model.affinities", "offsets"]),
    "neither end": (
        {"offsets": WATERZ, "stored_at": "left"},
        None,
        [],
        ["stored_at", "'left'", "source", "destination"],
    ),
    "too few channels": ("abiss", None, ["output.channels=2"], ["3 offsets", "output.channels: 2"]),
    "too many channels": ([[0, 0, 1]], None, [], ["1 offsets", "output.channels: 3"]),
    "told twice": ("abiss", None, ["model.outputs=affinity"], ["model.outputs", "model.affinities: abiss"]),
    "only of the layer": (None, "abiss", [], ["output.affinities", "needs model.affinities"]),
    "an edge that there is not": ("abiss", [[0, 0, 1], [0, 1, 0], [2, 0, 0]], [], ["output.affinities", "[2, 0, 0]"]),
    "an edge left out": ("abiss", ABISS[:2], [], ["output.affinities", "[-1, 0, 0]", "0 times, expected 1"]),
    "an edge at both voxels": (
        "abiss",
        [[0, 0, 1], [0, 0, -1], [0, 1, 0], [1, 0, 0]],
        [],
        ["output.affinities", "[0, 0, -1]", "2 times, expected 1"],
    ),
    "moved farther than patches overlap": (
        [[3, 0, 0], [0, -9, 0], [0, 0, 1]],
        [[-3, 0, 0], [0, -9, 0], [0, 0, -1]],
        [],
        ["patch_overlap: 2 along z", "expected 3 or more", "[-3, 0, 0]", "model.augmentation: flips"],
    ),
    "moved aslant": (
        [[1, 0, 0], [0, 1, 5], [0, 0, 1]],
        [[1, 0, 0], [0, -1, -5], [0, 0, 1]],
        [],
        ["patch_overlap: 4 along x", "expected 5 or more", "[0, -1, -5]"],
    ),
    "no mirror image": (
        [[-1, 0, 0], [0, -4, -9], [0, 0, -1]],
        None,
        [FLIPS],
        ["model.affinities", "[0, -4, 9] is missing", "flips turns [0, -4, -9] to it"],
    ),
    "no transposed one": (
        [[-1, 0, 0], [0, -1, 0], [0, 0, -9]],
        None,
        [BOTH],
        ["model.affinities", "[0, 0, -1] is missing", "flips_transpose turns [0, -1, 0] to it"],
    ),
    "some in both directions": (
        [[0, -1, 0], [0, 1, 0], [0, 0, -1]],
        None,
        [BOTH],
        ["model.affinities", "[0, 0, 1] is missing", "both directions"],
    ),
}


@pytest.mark.parametrize(("given", "wanted", "changes", "words"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_fit_is_told_in_a_sentence(
    make_spec: MakeSpec, given: Any, wanted: Any, changes: list[str], words: list[str]
) -> None:
    with pytest.raises(SpecError) as told:
        loaded(make_spec, given, wanted, 3, *changes)
    assert all(word in str(told.value) for word in words), told.value
    assert told.value.exit_code == 78


@pytest.mark.parametrize(
    ("given", "wanted", "changes"),
    [
        ([[3, 0, 0], [0, -9, 0], [0, 0, 1]], [[-3, 0, 0], [0, -9, 0], [0, 0, -1]], [FLIPS]),
        ([[2, 0, 0], [0, 4, -4], [0, 0, 1]], [[0, -4, 4], [-2, 0, 0], [0, 0, 1]], []),
        ([[-1, 0, 0], [0, -4, -9], [0, 4, -9]], None, [FLIPS]),
        ([[-1, 0, 0], [0, -9, 0], [0, 0, 9]], None, [BOTH]),
        ([[-1, 0, 0], [0, 1, 0], [0, -1, 0]], None, [FLIPS]),
        ([[0, -1, 0], [0, 0, 0], [0, 0, -1]], None, [BOTH]),
    ],
    ids=str,
)
def test_what_fits_is_taken(make_spec: MakeSpec, given: Any, wanted: Any, changes: list[str]) -> None:
    spec = loaded(make_spec, given, wanted, 3, *changes)
    assert [list(offset) for offset in spec.layer_affinities] == (wanted or given)
