"""How the clients of object stores are set up, and what their errors mean.

CloudFiles 6.4 and CloudVolume 12.15 are given here what they lack: S3 endpoints in paths of layers,
credentials from the environment without a session token, an end to retries that can't help, and to
waiting for who never answers, notice of what could not be deleted, and silence on standard output.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, TypeVar

import boto3  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import tenacity
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from cloudfiles import CloudFiles, compression, connectionpools, interfaces, paths, secrets
from cloudfiles.exceptions import UnsupportedProtocolError
from google.api_core.exceptions import from_http_response
from google.auth.exceptions import DefaultCredentialsError, RefreshError
from requests.adapters import HTTPAdapter

from chunkflow_core.errors import ChunkflowError, MissingInputError, SpecError, StorageError
from chunkflow_core.storage.addresses import FORMAT

_Request = TypeVar("_Request", bound=Callable[..., Any])

PATIENCE_VARIABLE = "CHUNKFLOW_STORAGE_PATIENCE"
"""Environment variable: seconds for which a request is tried again before a command gives up."""

_PATIENCE = 180.0

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
"""Seconds until a connection that nobody takes, or an answer that does not come, has failed.

What a network policy or a firewall drops gets no answer. The clients of S3 and GCS would wait 60 s
for each connection, that of HTTP for ever.
"""
_NO_CONNECTION = re.compile(r"connect timeout", re.I)

_ENDPOINT = re.compile(rf"(?P<format>{FORMAT})?s3://(?P<endpoint>https?://[^/]+)/(?P<bucket>[^/]+)(?P<rest>.*)")

_CLIENTS = ("boto3", "botocore", "google", "requests", "urllib3", "http", "tenacity", "cloudfiles")

_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound, DefaultCredentialsError)

_SET_UP_WRONG = {
    "AccessDenied",
    "ExpiredToken",
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "InvalidToken",
    "NotImplemented",
}
"""Error codes of S3 for wrong credentials or settings, beside those of status 401 and 403.

The last is of stores that don't know what a request asks for.
"""


def located(path: str) -> dict[str, Any]:
    """The arguments by which CloudFiles and CloudVolume find a place: ``cloudpath``, ``secrets``.

    An S3 endpoint in the path becomes an alias: CloudVolume does not take it otherwise, and
    CloudFiles would use one connection for buckets of the same name at different endpoints.
    """
    _complete_environment()
    match = _ENDPOINT.fullmatch(path)
    if match is None:
        return {"cloudpath": path, "secrets": None}
    endpoint, bucket = match["endpoint"], match["bucket"]
    alias = f"s3_{hashlib.sha256(endpoint.encode()).hexdigest()[:12]}"
    if alias not in paths.ALIASES:
        paths.add_alias(alias, f"s3://{endpoint}/")
    address = f"{match['format'] or ''}{alias}://{bucket}{match['rest']}"
    return {"cloudpath": address, "secrets": secrets.aws_credentials(bucket, "s3")}


def open_files(path: str) -> CloudFiles:
    """The files below an address; nothing is read yet."""
    return CloudFiles(**located(path), progress=False)


def meaning(error: Exception) -> type[ChunkflowError] | None:
    """The kind of error that an error of a client of storage is to a user; None if it isn't one.

    ``SpecError``: no or wrong credentials, no permission. ``MissingInputError``: no such bucket.
    ``StorageError``: anything else, which may pass.
    """
    if isinstance(error, _NO_CREDENTIALS) or (isinstance(error, RefreshError) and not error.retryable):
        return SpecError
    if type(error).__name__ == UnsupportedProtocolError.__name__:  # CloudVolume has one of its own
        return SpecError
    if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _CLIENTS:
        return None
    status, code = _status(error)
    if status == HTTPStatus.PRECONDITION_FAILED:
        return None  # an answer, to who has asked for it
    if status in (401, 403) or code in _SET_UP_WRONG:
        return SpecError
    return MissingInputError if status == 404 else StorageError


def explained(error: Exception) -> str:
    """What to know and to do about an error that has a :func:`meaning`."""
    kind, text = meaning(error), f"{type(error).__name__}: {' '.join(str(error).split())}"
    if type(error).__name__ == UnsupportedProtocolError.__name__:
        return 'the address is not one that CloudVolume takes; expected such as "gs://bucket/em" or "s3://bucket/em"'
    if kind is SpecError:
        return (
            f"{text}. The storage refuses these credentials, or finds none. For s3:// they are looked for in "
            f"{secrets.secretpath('aws-secret.json')}, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, and the "
            f"machine's role; for gs:// in {secrets.secretpath('google-secret.json')}, GOOGLE_APPLICATION_CREDENTIALS, "
            "and the machine's service account. They have to allow reading, writing, deleting and "
            "listing (docs/storage.md). In a cluster, the network policy must let pods ask for the account's tokens "
            "(docs/kubernetes.md: networkPolicy.identity)"
        )
    if kind is MissingInputError:
        return f"{text}. There is no such bucket; buckets have to be made beforehand"
    if _NO_CONNECTION.search(text):
        text = (
            f"{text}. Nothing answers at that address, not even with a refusal: in a cluster, a network policy may "
            "forbid it (docs/kubernetes.md: networkPolicy.ports), elsewhere a firewall"
        )
    return (
        f"{text}. It was tried again for {patience():.0f} s ({PATIENCE_VARIABLE}). See whether the storage is "
        "reachable from here and not over its limits, then run again: what is done is kept"
    )


def patience() -> float:
    """Seconds for which a request is tried again; ``SpecError`` if the variable holds no number."""
    text = os.environ.get(PATIENCE_VARIABLE) or str(_PATIENCE)
    try:
        return float(text)
    except ValueError as error:
        raise SpecError(f"{PATIENCE_VARIABLE}: {text!r}: expected a number of seconds") from error


def _status(error: Exception) -> tuple[int | None, str]:
    """HTTP status of an error, and S3's code for it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code", "")
    return getattr(response, "status_code", None), ""


def _complete_environment() -> None:
    if "AWS_ACCESS_KEY_ID" in os.environ:  # without the third, CloudFiles ends with a KeyError
        os.environ.setdefault("AWS_SESSION_TOKEN", "")
    # Google's client would ask for the bucket's metadata, which takes a permission of its own, once
    # a thread
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


def _set_retries() -> None:
    """Try again what may pass, for a bounded time.

    CloudFiles by itself tries everything seven times, also for want of a bucket or permission.
    Below that, the clients of S3 and GCS have retries of their own, for some seconds and for two
    minutes.
    """
    classes = (
        interfaces.S3Interface,
        interfaces.GoogleCloudStorageInterface,
        interfaces.HttpInterface,
        connectionpools.S3ConnectionPool,
        connectionpools.GCloudBucketPool,
    )
    policy: dict[str, Any] = {
        "retry": tenacity.retry_if_exception(_may_pass),
        "stop": _out_of_patience,
        "wait": tenacity.wait_random_exponential(0.5, 30),
    }
    interfaces.retry = tenacity.retry(reraise=True, **policy)  # of what is decorated later: requests of a listing
    for method in [method for cls in classes for method in vars(cls).values() if hasattr(method, "retry")]:
        vars(method.retry).update(policy)


class _Bounded(HTTPAdapter):
    """Connections to HTTP servers that wait for a bounded time."""

    def send(self, request: Any, stream: bool = False, timeout: Any = None, *rest: Any, **more: Any) -> Any:
        """Send a request; ``timeout`` is in seconds: of connection and answer, or of both."""
        connect, read = timeout if isinstance(timeout, tuple) else (timeout, timeout)
        bounded = (min(connect or _CONNECT_SECONDS, _CONNECT_SECONDS), read or _READ_SECONDS)
        return super().send(request, stream, bounded, *rest, **more)


def _bound_waiting() -> None:
    """Have all clients give up a connection that nobody takes."""
    session = botocore.session.get_session()
    session.set_default_client_config(Config(connect_timeout=_CONNECT_SECONDS))
    boto3.setup_default_session(botocore_session=session)
    interfaces.HttpInterface.adaptor = _Bounded()
    create = connectionpools.GCloudBucketPool._create_connection

    def create_bounded(*arguments: Any, **keywords: Any) -> Any:
        bucket = create(*arguments, **keywords)
        for scheme in ("http://", "https://"):
            bucket.client._http.mount(scheme, _Bounded())
        return bucket

    connectionpools.GCloudBucketPool._create_connection = create_bounded


def _delete_objects(self: Any, names: Iterable[str]) -> None:
    """Delete objects in S3, and raise an error for those that could not be deleted.

    It stands in for CloudFiles' own method, which takes no notice of that part of the answer.
    """
    keys = [{"Key": self.get_path_to_file(name)} for name in names]
    for start in range(0, len(keys), self.delete_batch_size):
        batch: Any = {"Objects": keys[start : start + self.delete_batch_size], "Quiet": True}
        answer = self._conn.delete_objects(Bucket=self._path.bucket, Delete=batch, **self._additional_attrs)
        for failed in answer.get("Errors", []):
            told = {"Code": failed.get("Code", ""), "Message": f"{failed.get('Key')}: {failed.get('Message')}"}
            raise ClientError({"Error": told}, "DeleteObjects")


def _delete_blobs(self: Any, names: Iterable[str]) -> None:
    """Delete objects in GCS, and raise an error for those that could not be deleted.

    It stands in for CloudFiles' own method, which looks at the last failure of a batch only: if
    that is an object that isn't there, it takes no notice of the others.
    """
    keys = [self.get_path_to_file(name) for name in names]
    for start in range(0, len(keys), self.delete_batch_size):
        part = keys[start : start + self.delete_batch_size]
        with self._bucket.client.batch(raise_exception=False) as batch:
            for key in part:
                self._bucket.delete_blob(key)
        for key, answer in zip(part, batch._responses, strict=True):
            if not answer.ok and answer.status_code != HTTPStatus.NOT_FOUND:
                answer.request.method, answer.request.url = "DELETE", key  # for the message; there is a number only
                raise from_http_response(answer)  # type: ignore[no-untyped-call]


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, Exception) and meaning(error) is StorageError


def _out_of_patience(state: tenacity.RetryCallState) -> bool:
    return (state.seconds_since_start or 0) >= patience()


def _quiet(*_: object) -> None:
    """Print nothing.

    It stands in for ``print``: CloudFiles gives advice about credentials and files on standard
    output, where results go.
    """


_set_retries()
_bound_waiting()
patient: Callable[[_Request], _Request] = interfaces.retry
"""Decorator that tries a request again as all others are."""
interfaces.S3Interface.delete_files = patient(_delete_objects)
interfaces.GoogleCloudStorageInterface.delete_files = patient(_delete_blobs)
secrets.print = compression.print = _quiet
