"""One way of saying what went wrong with storage, whichever client it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloudfiles.exceptions import CompressionError, DecompressionError
from cloudvolume.exceptions import DecodingError, EmptyVolumeException

from chunkflow_core.errors import DataError, MissingInputError, StorageError

_CLIENTS = ("boto3", "botocore", "google", "requests", "urllib3", "http", "tenacity", "cloudfiles")


@contextmanager
def storage_errors(doing: str, *, missing: str = "") -> Iterator[None]:
    """Turn a storage client's exceptions into ours; ``doing`` says what was tried and where.

    ``missing`` is the advice for a storage chunk that isn't there.
    """
    try:
        yield
    except EmptyVolumeException as error:
        raise MissingInputError(f"{doing}: a storage chunk is missing ({error}). {missing}") from error
    except (DecodingError, CompressionError, DecompressionError) as error:
        raise DataError(f"{doing}: a stored file is corrupt: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS:
            raise StorageError(f"{doing}: {type(error).__name__}: {error}") from error
        raise
