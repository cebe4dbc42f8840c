"""Uploads to object stores, with what these say of what they were given.

CloudFiles 6.4 keeps their answers to itself. A question afterwards would be another request, and
tell of whatever somebody else has written meanwhile.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any

from botocore.exceptions import ClientError  # type: ignore[import-untyped]
from cloudfiles import interfaces
from cloudfiles.lib import encode_crc32c_b64, md5
from google.api_core.exceptions import PreconditionFailed

from chunkflow_core.storage.clients import open_files, patient

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Object:
    """What is to be stored, and how."""

    content: bytes
    """Compressed already if it is to be."""
    kind: str
    """Type of the content, a ``Content-Type`` header."""
    compression: str | None = None
    """``gzip``, ``br`` or ``zstd`` if the content is compressed."""
    cache: str = "no-cache"
    """What HTTP caches may do with the object, a ``Cache-Control`` header."""


def upload(path: str, name: str, new: Object) -> str:
    """Store an object in one request, and return its signature, as a listing gives it.

    Args:
        path: Address of a folder.
        name: Name of the object below the folder.
        new: The object.

    Returns:
        The signature; empty if the storage says nothing of what it has stored.
    """
    files = open_files(path)
    with files._get_connection() as connection:
        if isinstance(connection, interfaces.S3Interface):
            return _upload_to_s3(connection, name, new)
        if isinstance(connection, interfaces.GoogleCloudStorageInterface):
            return _upload_to_gcs(connection, name, new)
    settings = {"content_type": new.kind, "compress": new.compression, "cache_control": new.cache}
    files.put(name, new.content, raw=True, **settings)
    return ""


def create(path: str, name: str, new: Object) -> bool:
    """Store an object if there is none of that name, and say whether this request has.

    Of a request whose answer was lost, and that was sent again, it says that it has not.
    """
    with open_files(path)._get_connection() as connection:
        if isinstance(connection, interfaces.GoogleCloudStorageInterface):
            return _create_in_gcs(connection, name, new)
        if isinstance(connection, interfaces.S3Interface):
            return _create_in_s3(connection, name, new)
    raise NotImplementedError(f"{path}: nothing can be written there")


@patient
def _upload_to_s3(connection: Any, name: str, new: Object, **conditions: str) -> str:
    answer = connection._conn.put_object(
        Bucket=connection._path.bucket,
        Key=connection.get_path_to_file(name),
        Body=new.content,
        ContentType=new.kind,
        CacheControl=new.cache,
        ChecksumCRC32C=encode_crc32c_b64(new.content).decode(),
        ACL=interfaces.S3_ACLS.get(connection._path.alias, interfaces.DEFAULT_S3_ACL),
        **({"ContentEncoding": new.compression} if new.compression else {}),
        **connection._additional_attrs,
        **conditions,
    )
    return s3_signature(answer.get("ETag"), len(new.content))


@patient
def _upload_to_gcs(connection: Any, name: str, new: Object, **conditions: int) -> str:
    blob = connection._bucket.blob(connection.get_path_to_file(name))
    blob.content_encoding, blob.cache_control = new.compression, new.cache
    blob.md5_hash = md5(new.content)  # checked there
    blob.upload_from_string(new.content, new.kind, **conditions)
    return gcs_signature(blob)


def _create_in_s3(connection: Any, name: str, new: Object) -> bool:
    try:
        _upload_to_s3(connection, name, new, IfNoneMatch="*")
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == HTTPStatus.PRECONDITION_FAILED:
            return False
        if status != HTTPStatus.NOT_IMPLEMENTED:
            raise
        log.warning("%s knows no If-None-Match: two that write %s at once are not kept apart", connection._path, name)
        if connection.exists(name):
            return False
        _upload_to_s3(connection, name, new)
    return True


def _create_in_gcs(connection: Any, name: str, new: Object) -> bool:
    try:
        _upload_to_gcs(connection, name, new, if_generation_match=0)
    except PreconditionFailed:
        return False
    return True


def s3_signature(etag: str | None, size: int, modified: datetime | None = None) -> str:
    """What S3 says of an object: ETag and size.

    Stores that look after files for others may have an ETag that is always "1-"; then the time of
    the last change, in Unix seconds, is added. Where that is not known, nothing is.
    """
    etag = (etag or "-").strip('"')
    if not etag.endswith("-"):
        return f"{etag} {size}"
    return f"{etag} {size} {modified.timestamp():.0f}" if modified else ""


def gcs_signature(blob: Any) -> str:
    """What GCS says of an object: its checksum, or else its generation, and its size."""
    return f"{blob.md5_hash or blob.crc32c or blob.generation} {blob.size}"
