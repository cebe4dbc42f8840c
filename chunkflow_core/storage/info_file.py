"""The ``info`` file of a precomputed layer, read without importing cloudvolume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from chunkflow_core.errors import MissingInputError, StorageError
from chunkflow_core.storage.addresses import check_address, is_same_place, plain
from chunkflow_core.storage.json_text import parsed_json
from chunkflow_core.storage.zarr_info import format_there

_MOST_INFOS: Final = 10
"""Number of ``info`` files that are read until there is one that redirects no further.

CloudVolume reads as many.
"""


def find_info(path: str) -> tuple[str, dict[str, Any]]:
    """Where the layer at ``path`` is, and its ``info``.

    An ``info`` with ``redirect`` says that the layer is at another address, whatever else stands in
    it. As in CloudVolume, one that names its own address, or none, is the layer's.

    Raises:
        MissingInputError: There is no layer, its ``info`` is not that of a layer, or redirects lead
            nowhere.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage did not answer.
    """
    way = [path]
    while len(way) <= _MOST_INFOS:
        place = way[-1]
        said = place if len(way) == 1 else f"{place} (to which {path} redirects)"
        info = _read_info(place, said)
        target = info.get("redirect")
        if not target or (isinstance(target, str) and is_same_place(target, place)):
            if not isinstance(info.get("scales"), list) or not info["scales"]:
                raise MissingInputError(f"{said}: the info file is not that of a precomputed layer, it lists no scales")
            return place, info
        try:
            check_address(target)
        except ValueError as error:
            raise MissingInputError(f"{said}: redirect of its info file is {target!r:.200}: {error}") from error
        if any(is_same_place(target, before) for before in way):
            raise MissingInputError(f"{said}: redirect of its info file leads in a circle, to {target} again")
        way.append(target)
    raise MissingInputError(
        f"{path}: its info file redirects more than {_MOST_INFOS - 1} times, at last to {way[-1]}. Give the address "
        "of the layer itself"
    )


def read_info(path: str) -> dict[str, Any]:
    """What ``find_info`` finds for the layer at ``path``, without its address."""
    return find_info(path)[1]


def _read_info(path: str, said: str) -> dict[str, Any]:
    """The JSON object in the file ``info`` below an address; ``said`` names that in messages."""
    try:
        text = _read_text(plain(path), said)
    except (FileNotFoundError, NotADirectoryError):
        text = None
    except OSError as error:
        raise StorageError(f"{said}: cannot read the layer's info: {error}") from error
    if text is None:
        other = format_there(path)
        advice = (
            f"There is one of another format: write {other}" if other else "Check the path; prepare makes output layers"
        )
        raise MissingInputError(f"{said}: there is no layer here (no info file). {advice}")
    info: dict[str, Any] = parsed_json(text, f"{said}: the layer's info file")
    if not isinstance(info, dict):
        raise MissingInputError(f"{said}: the info file is not that of a precomputed layer, it lists no scales")
    return info


def _read_text(path: str, said: str) -> bytes | None:
    if path.startswith("file://"):
        try:
            return (Path(path.removeprefix("file://")).expanduser() / "info").read_bytes()
        except FileNotFoundError:
            pass  # it may be there compressed
    # imports that a DAG of file:// layers need not pay
    from chunkflow_core.storage.files import open_files, storage_errors

    with storage_errors(f"{said}: cannot read the layer's info"):
        content: bytes | None = open_files(path).get("info")
    return content
