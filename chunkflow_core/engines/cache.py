"""Where models are kept in the form that an engine has made of them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from chunkflow_core.errors import SpecError

VARIABLE = "CHUNKFLOW_CACHE"
"""Environment variable with the folder of the cache; default: ``~/.cache/chunkflow``."""


def cache_folder(engine: str) -> Path:
    """An engine's folder of the cache; it need not exist."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/chunkflow").expanduser() / engine


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by ``make`` if it isn't there yet.

    It appears whole or not at all, also if several processes make it at once or one is killed while it does: ``make``
    gets a folder beside it, which is renamed when it is complete.

    Raises:
        SpecError: the cache can't be written.
    """
    if folder.is_dir():
        return folder
    unfinished = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        make(unfinished)
        _put_in_place(unfinished, folder)
    except OSError as error:
        raise SpecError(
            f"the cache {folder.parent} can't be written: {error.strerror}; set {VARIABLE} to another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _put_in_place(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, and has made the same
            raise
