"""What S3, GCS and web servers say of a layer's storage chunks, by as few requests as can be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from cloudfiles import CloudFiles, paths
from cloudfiles.exceptions import UnsupportedProtocolError
from requests.adapters import HTTPAdapter

from chunkflow_core.errors import SpecError
from chunkflow_core.storage.clients import located, meaning, open_files, patient
from chunkflow_core.storage.listing.grid import VERSION, CannotTell, Chunks, Found, Store, Wanted, batches, in_parallel
from chunkflow_core.storage.uploads import gcs_signature, s3_signature

_REQUESTS: Final = 16
"""Number of requests made at the same time."""

_PAGE = 1000
"""Objects in one answer to a listing: what S3 and GCS give at most."""

_TIMEOUT: Final = 60
"""Seconds after which a request to a web server is given up."""


class _Server(ABC):
    """Files below an address, each of which can be asked for by itself."""

    def __init__(self, files: CloudFiles, key: str, *, is_nested: bool) -> None:
        self._files, self._folder, self._is_nested = files, f"{key}/" if key else "", is_nested

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of storage chunks that are there, among them all that are wanted."""
        return self._each(chunks.all_names(wanted))

    def _each(self, names: list[str]) -> Iterator[tuple[str, str]]:
        return in_parallel(self._heads, batches(names, min(100, 1 + len(names) // (4 * _REQUESTS))), _REQUESTS)

    def _heads(self, names: list[str]) -> Found:
        with self._connect() as connection:
            signatures = [(name, self._head(connection, f"{self._folder}{name}")) for name in names]
        return [(name, signature) for name, signature in signatures if signature is not None]

    def _connect(self) -> Any:
        return self._files._get_connection()

    def everything(self) -> Iterator[tuple[str, str]]:
        """Nothing: a web server has no listing."""
        raise CannotTell

    def names(self) -> Iterator[str]:
        """Names as ``everything`` has them."""
        return (name for name, _ in self.everything())

    def holds(self, names: list[str]) -> bool:
        """Whether there is any file of some names."""
        return any(True for _ in in_parallel(self._held, batches(names, 1), _REQUESTS))

    def _held(self, names: list[str]) -> Found:
        with self._connect() as connection:
            return [(name, "") for name in names if self._holds(connection, f"{self._folder}{name}")]

    def _holds(self, connection: Any, name: str) -> bool:
        return self._head(connection, name) is not None

    @abstractmethod
    def _head(self, connection: Any, name: str) -> str | None:
        """Signature of a file; None if it isn't there."""


class _Bucket(_Server):
    """Objects, which can also be listed by the beginning of their names."""

    _may_list = True

    def ask(self, chunks: Chunks, wanted: Wanted) -> Iterator[tuple[str, str]]:
        """Names and signatures of storage chunks that are there, by as few requests as possible."""
        prefixes, names = chunks.fewest(wanted, _PAGE) if self._may_list else ([], chunks.all_names(wanted))
        try:
            yield from in_parallel(self._list, prefixes, _REQUESTS)
        except Exception as error:
            if meaning(error) is not SpecError:
                raise
            # who may read another's bucket often may not list it
            self._may_list, names = False, chunks.all_names(wanted)
        yield from self._each(names)

    def everything(self) -> Iterator[tuple[str, str]]:
        """Names and signatures of all objects, but for those in others' subfolders."""
        return (found for found in self._pages("") if self._is_nested or "/" not in found[0])

    def names(self) -> Iterator[str]:
        """Names as ``everything`` has them; ``CannotTell`` if they may not be listed."""
        try:
            yield from super().names()
        except Exception as error:
            if meaning(error) is not SpecError:
                raise
            raise CannotTell from error

    def _holds(self, connection: Any, name: str) -> bool:
        try:
            return super()._holds(connection, name)
        except Exception as error:
            if meaning(error) is not SpecError:
                raise
            return False  # who may not list is refused what isn't there

    def _list(self, prefix: str) -> Found:
        return list(self._pages(prefix))

    def _pages(self, prefix: str) -> Iterator[tuple[str, str]]:
        with self._connect() as connection:
            folder: str = connection.get_path_to_file(self._folder)
            token, more = None, True
            while more:
                page, token = self._page(connection, folder + prefix, token)
                yield from ((name.removeprefix(folder), signature) for name, signature in page)
                more = bool(token)

    @abstractmethod
    def _page(self, connection: Any, prefix: str, token: str | None) -> tuple[Found, str | None]:
        """One answer to a listing, and the token of the next one."""


class _S3(_Bucket):
    @patient
    def _page(self, connection: Any, prefix: str, token: str | None) -> tuple[Found, str | None]:
        place = {"Bucket": connection._path.bucket, "Prefix": prefix, "MaxKeys": _PAGE}
        answer = connection._conn.list_objects_v2(**place, **({"ContinuationToken": token} if token else {}))
        objects = answer.get("Contents", [])
        found = [(o["Key"], _of_s3(o.get("ETag"), o["Size"], o["LastModified"])) for o in objects]
        return found, answer.get("NextContinuationToken")

    def _head(self, connection: Any, name: str) -> str | None:
        head = connection.head(name)  # has retries
        return head and _of_s3(head["ETag"], head["Content-Length"], head["Last-Modified"])


class _GCS(_Bucket):
    @patient
    def _page(self, connection: Any, prefix: str, token: str | None) -> tuple[Found, str | None]:
        fields = "items(name,md5Hash,crc32c,generation,size),nextPageToken"
        blobs = connection._bucket.list_blobs(prefix=prefix, page_size=_PAGE, page_token=token, fields=fields)
        found = [(blob.name, _of_gcs(blob)) for blob in next(blobs.pages, ())]
        return found, blobs.next_page_token

    @patient
    def _head(self, connection: Any, name: str) -> str | None:
        blob = connection._bucket.get_blob(connection.get_path_to_file(name))
        return None if blob is None else _of_gcs(blob)


class _Http(_Server):
    def __init__(self, files: CloudFiles, key: str, *, is_nested: bool) -> None:
        super().__init__(files, key, is_nested=is_nested)
        self._connection = files._get_connection()
        for protocol in ("http://", "https://"):
            self._connection.session.mount(protocol, HTTPAdapter(pool_maxsize=_REQUESTS))

    def _connect(self) -> Any:
        return self._connection

    @patient
    def _head(self, connection: Any, name: str) -> str | None:
        with self._request(connection, "HEAD", name) as response:
            status, headers = response.status_code, response.headers
        if status == 403 and self._holds(connection, name):  # it refuses HEAD only
            raise CannotTell
        if status in (403, 404):  # to CloudFiles, neither is there
            return None
        if status in (405, 501):
            raise CannotTell
        response.raise_for_status()
        return http_signature(headers)

    @patient
    def _holds(self, connection: Any, name: str) -> bool:
        with self._request(connection, "GET", name) as response:  # HEAD may not be allowed
            if response.status_code in (403, 404):
                return False
            response.raise_for_status()
            return True

    @staticmethod
    def _request(connection: Any, method: str, name: str) -> Any:
        """The answer to a request for a file, of whose content nothing is read yet."""
        # always the same encoding, since answers in another one may have another ETag
        headers = {**connection.default_headers(), "Accept-Encoding": "gzip"}
        url = connection.get_path_to_file(name)
        return connection.session.request(
            method, url, headers=headers, allow_redirects=True, timeout=_TIMEOUT, stream=True
        )


def _of_s3(etag: str | None, size: int, modified: datetime) -> str:
    return f"{s3_signature(etag, size, modified)}{VERSION}{modified.timestamp():.3f}"


def _of_gcs(blob: Any) -> str:
    return f"{gcs_signature(blob)}{VERSION}{blob.generation}"


def http_signature(headers: Mapping[str, str]) -> str:
    """What a web server says of a file; ``CannotTell`` if it says neither ETag nor last change."""
    modified = headers.get("Last-Modified", "")
    if etag := headers.get("ETag"):
        return f"{etag.removeprefix('W/')}{VERSION}{modified}"
    if modified:
        return f"{modified} {headers.get('Content-Length')}"
    raise CannotTell


def open_server(path: str, key: str, *, is_nested: bool = False) -> Store | None:
    """The server that has the files ``key/…`` of a layer; None if it can't be asked for them."""
    try:
        place = paths.extract(located(path)["cloudpath"])
    except UnsupportedProtocolError:
        return None
    if place.format != "precomputed":
        return None
    stores: dict[str, type[_Server]] = {"s3": _S3, "gs": _GCS, "http": _Http, "https": _Http}
    kind = stores.get(place.protocol)
    return kind(open_files(path), key, is_nested=is_nested) if kind else None
