"""An object store in memory: whole objects in one step, and listings that are up to date.

It stands where the clients of object stores are: below it is nothing of the project, above it
everything is. What reads layers of raw voxels is the project's reader of disks, which asks for
files as any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest

from chunkflow_core.storage import clients, layer_reader, uploads
from chunkflow_core.storage.compression import decompress
from chunkflow_core.storage.listing import servers
from chunkflow_core.storage.listing.grid import VERSION, Found
from tests.support.simulation.scheduler import Scheduler

BUCKET = "s3://simulated"

_INFO = "/info"
"""File that says what a layer is: no write of it by an earlier run is under way."""
_CLAIMS = "/claims/"
"""Folder of claims. One that comes late takes the output from the run that is at work, which ends
with 78, as it should, and no run here does what one does then."""


class Object(NamedTuple):
    """An object as it is stored."""

    content: bytes
    compression: str | None
    signature: str
    """What the storage says of it."""
    version: str = ""
    """What tells its write from another one of the same content."""


class Store:
    """Objects by their address; each request is a step of the scheduler's."""

    def __init__(self, scheduler: Scheduler, *, by_content: bool) -> None:
        """Begin with nothing.

        Args:
            scheduler: Decides what becomes of each request.
            by_content: Whether the signature is that of the content, as S3's ETag, or another one
                for each write, as a disk's time.
        """
        self.objects: dict[str, Object] = {}
        self.scheduler = scheduler
        self.written: Callable[[str, bytes], object] = lambda key, content: None
        """Called for each object that gets there."""
        self.by_content, self._writes = by_content, 0
        self.in_time = set[str]()
        """Addresses of objects that are never written late."""

    def put(self, key: str, content: bytes, compression: str | None = None) -> str:
        """Store an object; its signature."""
        do, in_time = partial(self._put, key, content, compression), key.endswith(_INFO) or key in self.in_time
        return self.scheduler.request(f"put {key}", do, may_be_late=not in_time)

    def create(self, key: str, content: bytes) -> bool:
        """Store an object if there is none; whether it was stored by this request."""
        do, in_time = partial(self._create, key, content), _CLAIMS in key
        return self.scheduler.request(f"create {key}", do, may_be_late=not in_time)

    def get(self, key: str) -> Object | None:
        """An object; None if it isn't there."""
        return self.scheduler.request(f"get {key}", partial(self.objects.get, key))

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.scheduler.request(f"delete {key}", partial(self.objects.pop, key, None), may_be_late=True)

    def list(self, prefix: str) -> Sequence[tuple[str, Object]]:
        """Objects whose address begins so, in order."""
        return self.scheduler.request(f"list {prefix}", partial(self._list, prefix))

    def _put(self, key: str, content: bytes, compression: str | None) -> str:
        self._writes += 1
        said = hashlib.md5(content).hexdigest() if self.by_content else str(self._writes)
        self.objects[key] = Object(content, compression, f"{said} {len(content)}", f"{VERSION}{self._writes}")
        self.written(key, content)
        return self.objects[key].signature

    def _create(self, key: str, content: bytes) -> bool:
        if key in self.objects:
            return False
        self._put(key, content, None)
        return True

    def _list(self, prefix: str) -> Sequence[tuple[str, Object]]:
        return sorted((key, found) for key, found in self.objects.items() if key.startswith(prefix))


class Files:
    """The files below an address, with the calls of CloudFiles that are used."""

    def __init__(self, store: Store, path: str) -> None:
        """Name the address."""
        self._store, self._folder = store, f"{path}/"

    def get(self, names: Any, *, raw: bool = False) -> Any:
        """Read a file, or several, each by a request of its own."""
        if isinstance(names, str):
            return self._read(names, raw=raw)["content"]
        return [self._read(name, raw=raw) for name in names]

    def _read(self, name: str, *, raw: bool) -> dict[str, Any]:
        found = self._store.get(self._folder + name)
        if found is None:
            return {"path": name, "content": None, "compress": None}
        content = found.content if raw else decompress(found.content, found.compression)
        return {"path": name, "content": content, "compress": found.compression}

    def list(self, prefix: str = "", flat: bool = False, size: bool = False) -> Iterator[Any]:
        """Names that begin so; with ``flat``, folders instead of what is in them."""
        found = {key[len(self._folder) :]: len(o.content) for key, o in self._store.list(self._folder + prefix)}
        if flat:
            return iter(sorted({prefix + name[len(prefix) :].partition("/")[0] + "/" for name in found}))
        return iter(found.items() if size else found)

    def delete(self, names: str | Iterable[str]) -> None:
        """Delete files in any order."""
        unwanted = [names] if isinstance(names, str) else list(names)
        self._store.scheduler.random.shuffle(unwanted)
        for name in unwanted:
            self._store.delete(self._folder + name)

    def size(self, names: Iterable[str]) -> dict[str, int | None]:
        """Sizes of files; None for those that aren't there."""
        found = {name: self._store.get(self._folder + name) for name in names}
        return {name: None if o is None else len(o.content) for name, o in found.items()}


class _Listing(servers._Bucket):
    """The project's questions to buckets, which come in pages of several objects."""

    def __init__(self, store: Store, path: str, key: str, *, is_nested: bool) -> None:
        self._store, self._place, self._folder, self._is_nested = store, f"{path}/", f"{key}/", is_nested

    def _connect(self) -> Any:
        return nullcontext(self)

    def get_path_to_file(self, name: str) -> str:
        return self._place + name

    def _page(self, connection: Any, prefix: str, token: str | None) -> tuple[Found, str | None]:
        return [(name, found.signature + found.version) for name, found in self._store.list(prefix)], None

    def _head(self, connection: Any, name: str) -> str | None:
        found = self._store.get(self._place + name)
        return found and found.signature + found.version


@contextmanager
def installed(store: Store) -> Iterator[None]:
    """Let the store be what is behind addresses of object stores."""

    def upload(path: str, name: str, new: uploads.Object) -> str:
        return store.put(f"{path}/{name}", new.content, new.compression)

    def create(path: str, name: str, new: uploads.Object) -> bool:
        return store.create(f"{path}/{name}", new.content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients, "open_files", partial(Files, store))
        patch.setattr(uploads, "upload", upload)
        patch.setattr(uploads, "create", create)
        patch.setattr(servers, "open_server", partial(_Listing, store))
        patch.setattr(layer_reader, "DiskFiles", partial(Files, store))
        patch.setattr(layer_reader, "is_on_disk", lambda path: True)
        yield
