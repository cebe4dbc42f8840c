"""Affinities in a spec: what users write of a convention, and what fits together.

However it is written, a convention becomes the list of its channels' offsets.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from chunkflow_core.lattice.affinities import CONVENTIONS, Offsets, edges, opposite, orientations
from chunkflow_core.lattice.boxes import AXES, Vector
from chunkflow_core.lattice.weights import MAX_PATCH

_STORED_AT = ("source", "destination")
_EXPECTED = f"expected {', '.join(CONVENTIONS)}, or offsets in voxels, zyx, such as [[-1, 0, 0], [0, -1, 0]]"


def _is_offset(value: Any) -> bool:
    ok = isinstance(value, list | tuple) and len(value) == 3 and all(type(n) is int for n in value)
    return ok and max(map(abs, value)) <= MAX_PATCH


def _convention(value: Any) -> Offsets | None:
    """The offsets of the channels, however they are told; ``ValueError`` if they are not."""
    if value is None:
        return None
    if isinstance(value, str):
        if value not in CONVENTIONS:
            raise ValueError(_EXPECTED)
        return CONVENTIONS[value]
    stored_at = "source"
    if isinstance(value, dict):
        if not {"offsets"} <= set(value) <= {"offsets", "stored_at"}:
            raise ValueError("expected the keys offsets and, if need be, stored_at")
        stored_at, value = value.get("stored_at", stored_at), value["offsets"]
        if stored_at not in _STORED_AT:
            raise ValueError(f"stored_at: {stored_at!r}: expected source (the voxel v of v + offset) or destination")
    if not isinstance(value, list | tuple) or not value or not all(map(_is_offset, value)):
        raise ValueError(f"{_EXPECTED}, each of three integers within ±{MAX_PATCH}")
    offsets: Offsets = tuple((z, y, x) for z, y, x in value)
    for number, offset in enumerate(offsets):
        if offset in offsets[:number]:
            raise ValueError(f"{list(offset)} stands there twice, expected an offset of its own for each channel")
    return offsets if stored_at == "source" else tuple(map(opposite, offsets))


_OFFSETS = {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": "integer"}}}
_SCHEMA = {
    "anyOf": [
        {"enum": [*CONVENTIONS]},
        _OFFSETS,
        {
            "type": "object",
            "properties": {"offsets": _OFFSETS, "stored_at": {"enum": [*_STORED_AT]}},
            "required": ["offsets"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}

Convention = Annotated[Offsets | None, BeforeValidator(_convention), WithJsonSchema(_SCHEMA)]
"""The offsets of a layer's or a network's channels, or None if nothing is said of them."""


def check_orientations(given: Offsets, augmentation: str) -> None:
    """Check that a network gives the affinities of a patch in all orientations.

    Raises:
        ValueError: It lacks those of an offset in one of them.
    """
    turns = orientations(augmentation)
    for offset in given:
        turned = [turn.turned_back(offset) for turn in turns]
        for other in turned:
            if other not in given and opposite(other) not in given:
                raise ValueError(
                    f"model.affinities: {list(other)} is missing, or its negative: model.augmentation: {augmentation} "
                    f"turns {list(offset)} to it"
                )
        missing = [other for other in turned if other not in given]
        if missing and 2 * len(missing) != len(turns):
            raise ValueError(
                f"model.affinities: {list(missing[0])} is missing: model.augmentation: {augmentation} turns edges to "
                "each other of which some are there in both directions; give all of them in both, or each in one"
            )


def check_conversion(given: Offsets, wanted: Offsets, augmentation: str, overlap: Vector) -> None:
    """Check that a layer can hold the affinities that a network gives, in its own convention.

    Args:
        given: Offsets of the network's channels.
        wanted: Offsets of the layer's channels.
        augmentation: ``model.augmentation``.
        overlap: ``patch_overlap``, zyx.

    Raises:
        ValueError: The edges are not the same; or values have to be moved farther than patches
            overlap, so that there would be none between patches.
    """
    known, asked = edges(given), edges(wanted)
    for offset in wanted:
        if edges([offset])[0] not in known:
            raise ValueError(f"output.affinities: {list(offset)} is not in model.affinities, nor is its negative")
    for offset in given:
        edge = edges([offset])[0]
        if known.count(edge) != asked.count(edge):
            raise ValueError(
                f"output.affinities: {list(offset)} of model.affinities, or its negative, is there "
                f"{asked.count(edge)} times, expected {known.count(edge)}: one channel for each of the network's"
            )
    if augmentation != "none":
        return
    for offset in wanted:
        for axis, n in enumerate(offset):
            if offset not in given and abs(n) > overlap[axis]:
                raise ValueError(
                    f"patch_overlap: {overlap[axis]} along {AXES[axis]}, expected {abs(n)} or more, as "
                    f"output.affinities stores {list(offset)} at the other voxel than the network does "
                    "(or model.augmentation: flips)"
                )
