"""Addresses of places in storage, their parts, and names of files that every storage takes."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any, Final

FORMATS: Final = ("precomputed", "zarr", "zarr2", "zarr3", "n5")
"""Formats of layers. ``zarr`` is that version of it which is there."""

FORMAT: Final = rf"(?:{'|'.join(FORMATS)})://"
"""Pattern of the prefix of an address that says which format the layer has.

Without one, it is precomputed.
"""

ZARR: Final = "zarr3://"
"""Prefix of addresses of zarr, version 3."""

_STORES = r"(gs|s3|matrix|nokura|tigerdata)://(?!https?:)[^/]|s3://https?://[^/]+/[^/]"
_FORMAT = re.compile(FORMAT)
_PROTOCOL = re.compile(rf"({FORMAT})?(file://[/~]|{_STORES}|(\w+\+)?https?://[^/]).*")
_ALIAS = re.compile(rf"(?:{FORMAT})?(\w+)://[^/]")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def plain(address: str) -> str:
    """The address without the format and without a slash at its end: where the files are."""
    return _FORMAT.sub("", address).rstrip("/")


def layer_format(address: str) -> str:
    """Which of the ``FORMATS`` the layer at an address has."""
    match = _FORMAT.match(address)
    return match[0].removesuffix("://") if match else FORMATS[0]


def is_same_place(one: str, other: str) -> bool:
    """Whether two addresses differ at most by what makes no difference."""
    return _normalised(one) == _normalised(other)


def safe_name(text: str, substitute: str = "-", joint: str = ".", longest: int = 100, *, hidden: bool = False) -> str:
    """A name for a file that every storage and browser takes.

    Args:
        text: What is to be named.
        substitute: Stands for each character that may do harm.
        joint: Stands between the name and a hash.
        longest: Number of characters that are kept.
        hidden: Whether the name may begin with a dot.

    Returns:
        The text if it is a good name; else what is good of it, and a hash that keeps it distinct.
    """
    safe = _UNSAFE.sub(substitute, text)[:longest]
    if safe.startswith(".") and not hidden:
        safe = substitute + safe[1:]
    return safe if safe == text else f"{safe}{joint}{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_address(value: Any) -> Any:
    """The value, if it is the address of a place in storage; ``ValueError`` if not.

    The path of a local one has to be absolute.
    """
    if isinstance(value, str) and "\0" in value:
        raise ValueError("expected a storage path without the character \\0, which no storage takes")
    if isinstance(value, str) and (_PROTOCOL.fullmatch(value) or _has_alias(value)):
        return value
    if isinstance(value, str) and re.match(rf"({FORMAT})?s3://https?:", value):
        raise ValueError('expected endpoint, bucket and path, such as "s3://https://minio.example.org/bucket/em"')
    raise ValueError('expected a storage path such as "file:///data/em", "gs://bucket/em" or "s3://bucket/em"')


def check_writable(value: Any) -> Any:
    """The value, if it is the address of a place that can be written; ``ValueError`` if not."""
    check_address(value)
    if re.match(rf"({FORMAT})?(\w+\+)?https?://", value):
        raise ValueError(
            'expected a place that can be written, such as "file:///data/em" or "gs://bucket/em", not http'
        )
    return value


def is_remote(name: str) -> bool:
    """Whether a path or address of a file is that of one which is not on a disk of this machine."""
    return "://" in name and not name.startswith("file://")


def is_fetchable(address: str) -> bool:
    """Whether a single file can be fetched from an address."""
    return re.match(rf"file://[/~]|{_STORES}", address) is not None or _has_alias(address)


def _has_alias(address: str) -> bool:
    """Whether an address begins with an alias for an endpoint from CloudFiles' ``aliases.json``."""
    match = _ALIAS.match(address)
    file = Path(os.environ.get("CLOUD_FILES_DIR") or "~/.cloudfiles").expanduser() / "aliases.json"
    if match is None or not file.is_file():
        return False
    try:
        aliases = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"the aliases in {file} can't be read, they are not JSON: {error}") from error
    return isinstance(aliases, dict) and match[1] in aliases


def _normalised(address: str) -> str:
    protocol, _, place = plain(address).partition("://")
    return f"{protocol}://{posixpath.normpath(place).lstrip('/')}"
