"""Journals: entries in numbered files, each made by one process alone, on whichever machine.

Two processes that both want to write the next entry ask storage for the same new file, and one is
told that it is there. So whoever reads the last entry and adds another one knows that nothing has
come between: storage has no other order than this that all agree upon.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from chunkflow_core.errors import StorageError
from chunkflow_core.storage.files import create_file, is_on_disk, open_files, put_file, storage_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An entry of a journal."""

    number: int
    """From 1, without gaps."""
    content: dict[str, Any]
    """What it says, for JSON."""


class Journal:
    """The entries in a folder, ``00000001.json`` and so on; the last one holds."""

    def __init__(self, path: str, folder: str) -> None:
        """Read nothing yet.

        Args:
            path: Address of the place where the folder is.
            folder: Name of the folder.
        """
        self._path, self._folder = path, folder

    def numbers(self) -> list[int]:
        """Numbers of all entries there are, in order. Raises as :meth:`read`."""
        with storage_errors(f"listing {self._path}/{self._folder}"):
            names = [name.rpartition("/")[2] for name in open_files(self._path).list(prefix=f"{self._folder}/")]
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def last(self) -> Entry | None:
        """The last entry; None if there is none. Raises as :meth:`read`."""
        numbers = self.numbers()
        return self.read(numbers[-1:]).get(numbers[-1]) if numbers else None

    def read(self, numbers: list[int]) -> dict[int, Entry]:
        """The entries with some numbers, by number; those that aren't there are left out.

        Raises:
            StorageError: Storage does not answer, or there is something else than an entry.
        """
        names = {self._name(number): number for number in numbers}
        with storage_errors(f"reading {self._path}/{self._folder}"):
            answers = open_files(self._path).get(list(names))
        found = {names[answer["path"]]: answer["content"] for answer in answers if answer["content"] is not None}
        return {number: Entry(number, self._parsed(number, content)) for number, content in sorted(found.items())}

    def after(self, entry: Entry) -> Entry | None:
        """The last of the entries that have come after one, or this one; None if it is gone.

        As long as there is none, it takes one request, which asks for two files.
        """
        found = self.read([entry.number, entry.number + 1])
        if entry.number + 1 in found:
            return self.last()
        return found.get(entry.number)

    def add(self, after: Entry | None, content: dict[str, Any]) -> Entry:
        """Write the entry that comes after one.

        Args:
            after: The last entry; None if there is none.
            content: What it says; no other entry says just the same.

        Raises:
            StorageError: Another process has written it, or storage does not answer.
        """
        new = Entry(after.number + 1 if after else 1, content)
        name, text = self._name(new.number), json.dumps(content, indent=1).encode()
        if not create_file(self._path, name, text):
            raise StorageError(f"{self._path}/{name} has just been written by somebody else: look again what it says")
        if after is None and not is_on_disk(self._path):
            self._try_condition(name, text)
        return new

    def replace(self, entry: Entry, content: dict[str, Any]) -> Entry:
        """Write an entry again; only who has added it may do so."""
        put_file(self._path, self._name(entry.number), json.dumps(content, indent=1).encode())
        return Entry(entry.number, content)

    def delete_before(self, number: int) -> None:
        """Delete all entries with lower numbers; some that are there already may stay."""
        old = [self._name(other) for other in self.numbers() if other < number]
        with storage_errors(f"deleting old files in {self._path}/{self._folder}"):
            open_files(self._path).delete(old)

    def _try_condition(self, name: str, text: bytes) -> None:
        """Warn if a store takes a second file of the same name."""
        if create_file(self._path, name, text + b"\n"):
            put_file(self._path, name, text)
            log.warning(
                "%s takes no notice of If-None-Match: processes that prepare one output at the same moment are not "
                "kept apart",
                self._path,
            )

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:08}.json"

    def _parsed(self, number: int, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise StorageError(
                f"{self._path}/{self._name(number)} can't be read: it is being written, or was damaged; then delete it"
            )
        return found
