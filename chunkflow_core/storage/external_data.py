"""Where an ONNX file says that tensors lie which are not in it: its *external data*.

The numbers of messages and fields are those of ``onnx.proto`` (https://github.com/onnx/onnx). They
are read here, since what runs such files does without the package onnx.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from chunkflow_core.errors import SpecError

_MESSAGES: Final[dict[str, dict[int, str]]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
"""The messages that a tensor can be in, and which of their fields hold a message of which kind."""

_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_KEY, _VALUE = 1, 2
_EXTERNAL = 1
"""Value of ``data_location`` of a tensor whose numbers are in another file."""

_FIXED = {1: 8, 5: 4}
"""Bytes of a field of each wire type that has always as many."""


def external_data(path: Path, name: Path | str) -> set[str]:
    """Where the tensors of an ONNX file lie, relative to its folder; empty if all are inside.

    Args:
        path: The ONNX file.
        name: Its path or address for messages.

    Raises:
        SpecError: It is not an ONNX file, or a location leaves its folder.
        OSError: It can't be read.
    """
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                return set()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                locations = {location.decode() for location in _locations(view)}
    except (ValueError, IndexError) as error:
        raise SpecError(f"model.path: {name} is not an ONNX file, or it is damaged: {error}") from error
    for location in sorted(locations):
        parts = PurePosixPath(location).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in location:
            raise SpecError(
                f"model.path: {name} has tensors in {location!r}, expected a file in its own folder; save the model "
                "again with its external data beside it"
            )
    return locations


def _locations(model: memoryview) -> Iterator[bytes]:
    """The locations of all tensors, from those of the graphs to the ones in attributes."""
    todo = [("ModelProto", model)]
    while todo:
        kind, message = todo.pop()
        if kind == "TensorProto":
            yield from _location(message)
            continue
        for field, value in _fields(message):
            inner = _MESSAGES[kind].get(field)
            if inner is not None and isinstance(value, memoryview):
                todo.append((inner, value))


def _location(tensor: memoryview) -> Iterator[bytes]:
    """The location of a tensor's numbers; nothing if they are in the tensor itself."""
    found, is_external = [], False
    for field, value in _fields(tensor):
        if field == _DATA_LOCATION:
            is_external = value == _EXTERNAL
        elif field == _EXTERNAL_DATA and isinstance(value, memoryview):
            entry = {number: bytes(text) for number, text in _fields(value) if isinstance(text, memoryview)}
            if entry.get(_KEY) == b"location":
                found.append(entry.get(_VALUE, b""))
    if is_external:
        yield from found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Numbers and values of a message's fields; those of fixed length are left out.

    Raises:
        ValueError, IndexError: The message is not in protobuf's wire format.
    """
    at = 0
    while at < len(message):
        tag, at = _integer(message, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _integer(message, at)
            yield field, value
        elif wire == 2:
            length, at = _integer(message, at)
            if length > len(message) - at:
                raise ValueError(f"a field of {length} bytes ends after {len(message) - at}")
            yield field, message[at : at + length]
            at += length
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise ValueError(f"it has a field of wire type {wire}")


def _integer(message: memoryview, at: int) -> tuple[int, int]:
    """A varint, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("it has an integer of more than 64 bits")
