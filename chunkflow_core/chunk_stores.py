"""Asks storage what it says of a layer's storage chunks, by as few requests as can be: disks, S3, GCS, web servers."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, Final, TypeVar

from cloudfiles import CloudFiles, interfaces, paths
from cloudfiles.exceptions import UnsupportedProtocolError
from requests.adapters import HTTPAdapter

from chunkflow_core.errors import SpecError
from chunkflow_core.geometry import Box
from chunkflow_core.layer_info import LayerScale
from chunkflow_core.object_stores import located, meaning, open_files, patient

_REQUESTS: Final = 16
"""At the same time."""

_DISK_THREADS: Final = 4
"""Helps where the disk is in the network; on a local one, more would get into each other's way."""

_PAGE = 1000
"""Objects in one answer to a listing: what S3 and GCS give at most."""

_TIMEOUT: Final = 60
"""Seconds."""

_EXTENSIONS: Final = ("", *interfaces.COMPRESSION_EXTENSIONS)

Column = tuple[int, int]
"""Position (y, x) in the layer's grid of storage chunks."""
Wanted = dict[Column, list[int]]
"""Storage chunks to ask for: their positions in z, by column."""
_Found = list[tuple[str, str]]
"""Names and signatures of storage chunks that are there."""

_Item = TypeVar("_Item")


class Chunks:
    """The grid of a scale's storage chunks, and their names."""

    def __init__(self, scale: LayerScale) -> None:
        self._bounds, self._size = scale.bounds, scale.chunk
        self.names = [
            [f"{a}-{min(a + size, stop)}" for a in range(start, stop, size)]
            for start, stop, size in zip(scale.bounds.start, scale.bounds.stop, scale.chunk, strict=True)
        ]
        """Of the ranges of an axis, by position; axes in the order z, y, x."""
        self._positions = [{name: i for i, name in enumerate(names)} for names in self.names]

    def touching(self, box: Box) -> tuple[range, range, range]:
        """Positions of the storage chunks that touch a box, in z, y and x."""
        inside = box & self._bounds
        if not inside:
            return range(0), range(0), range(0)
        z, y, x = (
            range((inside.start[a] - start) // size, (inside.stop[a] - 1 - start) // size + 1)
            for a, (start, size) in enumerate(zip(self._bounds.start, self._size, strict=True))
        )
        return z, y, x

    def name(self, column: Column, z: int) -> str:
        """Of a storage chunk's file."""
        return f"{self.names[2][column[1]]}_{self.names[1][column[0]]}_{self.names[0][z]}"

    def all_names(self, wanted: Wanted) -> list[str]:
        """Names of storage chunks."""
        return [self.name(column, z) for column, zs in wanted.items() for z in zs]

    def place(self, name: str) -> tuple[Column, int] | None:
        """The inverse of ``name``; None if no storage chunk of this scale is called so."""
        try:
            x, y, z = name.split("_")
            return (self._positions[1][y], self._positions[2][x]), self._positions[0][z]
        except (ValueError, KeyError):
            return None


class CannotTell(Exception):
    """A storage chunk is there, but nothing is said of its content."""


class _Disk:
    """A folder on a disk: time of the last change, size and compression of each file."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of those that are there, of the storage chunks that are wanted."""
        names = chunks.all_names(wanted)
        z, y, x = map(len, chunks.names)
        if len(names) * len(_EXTENSIONS) < z * y * x:
            extensions = dict.fromkeys(names, _EXTENSIONS)
        else:
            extensions = dict.fromkeys(names, ())
            self._scan(extensions)
        return _parallel(self._signatures, _batches(list(extensions.items()), 1000), _DISK_THREADS)

    def _scan(self, extensions: dict[str, tuple[str, ...]]) -> None:
        """Note under which extensions files are there."""
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    name, dot, extension = entry.name.partition(".")
                    if name in extensions and dot + extension in _EXTENSIONS:
                        extensions[name] += (dot + extension,)
        except FileNotFoundError:  # no storage chunk has been written yet
            return

    def _signatures(self, batch: list[tuple[str, tuple[str, ...]]]) -> _Found:
        found = []
        for name, extensions in batch:
            # which of several a reader takes is up to the reader
            states = [self._state(f"{self._folder}/{name}{e}", e) for e in sorted(extensions)]
            if signature := " ".join(filter(None, states)):
                found.append((name, signature))
        return found

    def _state(self, path: str, extension: str) -> str:
        try:
            status = os.stat(path)  # noqa: PTH116 (a million of them)
        except FileNotFoundError:
            return ""
        return f"{extension} {status.st_mtime_ns} {status.st_size}"


class _Server(ABC):
    """Files below an address, of which each can be asked for by itself."""

    def __init__(self, files: CloudFiles, key: str) -> None:
        self._files, self._key = files, key

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of storage chunks that are there, among them all that are wanted."""
        return self._each(chunks.all_names(wanted))

    def _each(self, names: list[str]) -> Iterator[tuple[str, str]]:
        return _parallel(self._heads, _batches(names, min(100, 1 + len(names) // (4 * _REQUESTS))))

    def _heads(self, names: list[str]) -> _Found:
        with self._connect() as connection:
            signatures = [(name, self._head(connection, f"{self._key}/{name}")) for name in names]
        return [(name, signature) for name, signature in signatures if signature is not None]

    def _connect(self) -> Any:
        return self._files._get_connection()

    @abstractmethod
    def _head(self, connection: Any, name: str) -> str | None:
        """Signature of a file; None if it isn't there."""


class _Bucket(_Server):
    """Objects, which can be listed by the beginning of their names, too."""

    _may_list = True

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """By as few requests as possible."""
        prefixes, names = _fewest(chunks, wanted) if self._may_list else ([], chunks.all_names(wanted))
        try:
            yield from _parallel(self._list, prefixes)
        except Exception as error:
            if meaning(error) is not SpecError:
                raise
            # who may read another's bucket often may not list it
            self._may_list, names = False, chunks.all_names(wanted)
        yield from self._each(names)

    def _list(self, prefix: str) -> _Found:
        with self._connect() as connection:
            folder: str = connection.get_path_to_file(f"{self._key}/")
            page, token = self._page(connection, folder + prefix, None)
            found = page
            while token:
                page, token = self._page(connection, folder + prefix, token)
                found += page
        return [(name.removeprefix(folder), signature) for name, signature in found]

    @abstractmethod
    def _page(self, connection: Any, prefix: str, token: str | None) -> tuple[_Found, str | None]:
        """One answer to a listing, and the token of the next one."""


class _S3(_Bucket):
    @patient
    def _page(self, connection: Any, prefix: str, token: str | None) -> tuple[_Found, str | None]:
        place = {"Bucket": connection._path.bucket, "Prefix": prefix, "MaxKeys": _PAGE}
        answer = connection._conn.list_objects_v2(**place, **({"ContinuationToken": token} if token else {}))
        objects = answer.get("Contents", [])
        found = [(o["Key"], s3_signature(o.get("ETag"), o["Size"], o["LastModified"])) for o in objects]
        return found, answer.get("NextContinuationToken")

    def _head(self, connection: Any, name: str) -> str | None:
        head = connection.head(name)  # has retries
        return head and s3_signature(head["ETag"], head["Content-Length"], head["Last-Modified"])


class _GCS(_Bucket):
    @patient
    def _page(self, connection: Any, prefix: str, token: str | None) -> tuple[_Found, str | None]:
        fields = "items(name,md5Hash,crc32c,generation,size),nextPageToken"
        blobs = connection._bucket.list_blobs(prefix=prefix, page_size=_PAGE, page_token=token, fields=fields)
        found = [(blob.name, self._signature(blob)) for blob in next(blobs.pages, ())]
        return found, blobs.next_page_token

    @patient
    def _head(self, connection: Any, name: str) -> str | None:
        blob = connection._bucket.get_blob(connection.get_path_to_file(name))
        return None if blob is None else self._signature(blob)

    @staticmethod
    def _signature(blob: Any) -> str:
        return f"{blob.md5_hash or blob.crc32c or blob.generation} {blob.size}"


class _Http(_Server):
    def __init__(self, files: CloudFiles, key: str) -> None:
        super().__init__(files, key)
        self._connection = files._get_connection()
        for protocol in ("http://", "https://"):
            self._connection.session.mount(protocol, HTTPAdapter(pool_maxsize=_REQUESTS))

    def _connect(self) -> Any:
        return self._connection

    @patient
    def _head(self, connection: Any, name: str) -> str | None:
        # always the same encoding, since answers in another one may have another ETag
        headers = {**connection.default_headers(), "Accept-Encoding": "gzip"}
        url = connection.get_path_to_file(name)
        with connection.session.head(url, headers=headers, allow_redirects=True, timeout=_TIMEOUT) as response:
            if response.status_code in (403, 404):  # to CloudFiles, neither is there
                return None
            if response.status_code in (405, 501):
                raise CannotTell
            response.raise_for_status()
            return http_signature(response.headers)


def s3_signature(etag: str | None, size: int, modified: datetime) -> str:
    """What S3 says of an object; stores that look after files for others may have an ETag that is always "1-"."""
    etag = (etag or "-").strip('"')
    return f"{etag} {size}" + (f" {modified.timestamp():.0f}" if etag.endswith("-") else "")


def http_signature(headers: Mapping[str, str]) -> str:
    """What a web server says of a file."""
    if etag := headers.get("ETag"):
        return etag.removeprefix("W/")
    if modified := headers.get("Last-Modified"):
        return f"{modified} {headers.get('Content-Length')}"
    raise CannotTell


def open_store(path: str, key: str) -> _Disk | _Server | None:
    """Whom to ask for the files ``key/…`` of a layer; None if there are none, or nothing is known of them."""
    try:
        place = paths.extract(located(path)["cloudpath"])
    except UnsupportedProtocolError:
        return None
    if place.format != "precomputed":
        return None
    if place.protocol == "file":
        return _Disk(f"{place.path}/{key}")
    stores: dict[str, type[_Server]] = {"s3": _S3, "gs": _GCS, "http": _Http, "https": _Http}
    kind = stores.get(place.protocol)
    return kind(open_files(path), key) if kind else None


def _fewest(chunks: Chunks, wanted: Wanted) -> tuple[list[str], list[str]]:
    """Prefixes to list and names to look at, so that the fewest requests are made if all storage chunks are there.

    Names begin with the range in x, then that in y. Of equal numbers, the smaller answers, which also come at the same time.
    """
    of_column, of_row = (
        -(-objects // _PAGE) for objects in (len(chunks.names[0]), math.prod(map(len, chunks.names[:2])))
    )
    rows: dict[int, Wanted] = defaultdict(dict)
    for column, zs in wanted.items():
        rows[column[1]][column] = zs
    prefixes, names = [], []
    for x, columns in rows.items():
        if of_row < sum(min(of_column, len(zs)) for zs in columns.values()):
            prefixes.append(f"{chunks.names[2][x]}_")
            continue
        listed = {y for (y, _), zs in columns.items() if of_column < len(zs)}
        prefixes += [f"{chunks.names[2][x]}_{chunks.names[1][y]}_" for y in listed]
        names += chunks.all_names({column: zs for column, zs in columns.items() if column[0] not in listed})
    return prefixes, names


def _parallel(
    ask: Callable[[_Item], _Found], items: Iterable[_Item], threads: int = _REQUESTS
) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(ask, items):
            yield from found


def _batches(items: list[_Item], size: int) -> Iterator[list[_Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))
