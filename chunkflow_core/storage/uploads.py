"""Uploads to object stores, with what these say of what they were given.

CloudFiles 6.4 keeps their answers to itself. A question afterwards would be another request, and
tell of whatever somebody else has written meanwhile.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from cloudfiles import interfaces
from cloudfiles.lib import encode_crc32c_b64, md5

from chunkflow_core.storage.clients import open_files, patient


def upload(path: str, name: str, content: bytes, *, kind: str, compression: str | None, cache: str) -> str:
    """Store an object in one request, and return its signature, as a listing gives it.

    Args:
        path: Address of a folder.
        name: Name of the object below the folder.
        content: What to store, compressed already if it is to be.
        kind: Type of the content, a ``Content-Type`` header.
        compression: ``gzip``, ``br`` or ``zstd`` if the content is compressed, else None.
        cache: What HTTP caches may do with the object, a ``Cache-Control`` header.

    Returns:
        The signature; empty if the storage says nothing of what it has stored.
    """
    files = open_files(path)
    with files._get_connection() as connection:
        if isinstance(connection, interfaces.S3Interface):
            return _upload_to_s3(connection, name, content, kind, compression, cache)
        if isinstance(connection, interfaces.GoogleCloudStorageInterface):
            return _upload_to_gcs(connection, name, content, kind, compression, cache)
    files.put(name, content, content_type=kind, compress=compression, cache_control=cache, raw=True)
    return ""


@patient
def _upload_to_s3(connection: Any, name: str, content: bytes, kind: str, compression: str | None, cache: str) -> str:
    answer = connection._conn.put_object(
        Bucket=connection._path.bucket,
        Key=connection.get_path_to_file(name),
        Body=content,
        ContentType=kind,
        CacheControl=cache,
        ChecksumCRC32C=encode_crc32c_b64(content).decode(),
        ACL=interfaces.S3_ACLS.get(connection._path.alias, interfaces.DEFAULT_S3_ACL),
        **({"ContentEncoding": compression} if compression else {}),
        **connection._additional_attrs,
    )
    return s3_signature(answer.get("ETag"), len(content))


@patient
def _upload_to_gcs(connection: Any, name: str, content: bytes, kind: str, compression: str | None, cache: str) -> str:
    blob = connection._bucket.blob(connection.get_path_to_file(name))
    blob.content_encoding, blob.cache_control = compression, cache
    blob.md5_hash = md5(content)  # checked there
    blob.upload_from_string(content, kind)
    return gcs_signature(blob)


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
