"""A donation as a file: what it is, its sums, and checksums of both."""

from __future__ import annotations

import json
import struct
from typing import Any

from chunkflow_core.errors import DataError
from chunkflow_core.lattice.blocks import Donation
from chunkflow_core.storage import digests

_MAGIC = b"CFDONATE"


def pack(donation: Donation, payload: bytes, channels: int, fingerprint: str) -> tuple[bytes, str]:
    """A donation as a file, and its checksum: magic, header length, header (JSON), payload.

    The header has the payload's checksum, so the header's is that of the whole file.

    Args:
        donation: what it is.
        payload: its sums, compressed.
        channels: of the sums.
        fingerprint: of the spec.
    """
    header = {"payload": digests.checksum(payload), **_header(donation, channels, fingerprint)}
    text = json.dumps(header, sort_keys=True).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, payload]), digests.checksum(text)


def unpack(data: bytes, donation: Donation, channels: int, fingerprint: str, checksum: str) -> bytes:
    """The payload of a donation file; ``DataError`` unless it is intact and exactly the donation that is expected."""
    try:
        if data[:8] != _MAGIC:
            raise ValueError("it does not begin as a donation (truncated, corrupt or foreign)")
        (length,) = struct.unpack_from("<I", data, 8)
        text, payload = data[12 : 12 + length], data[12 + length :]
        header = json.loads(text)
        if header["payload"] != digests.checksum(payload):
            raise ValueError("the checksum of its content does not match (truncated or corrupt)")
        for name, value in _header(donation, channels, fingerprint).items():
            if header[name] != value:
                raise ValueError(f"its {name} is {header[name]}, expected {value} (a foreign donation)")
        if digests.checksum(text) != checksum:
            raise ValueError("its checksum does not match the block's receipt (an older or foreign donation)")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"donation {donation.key} can't be used: {error}") from error
    return payload


def _header(donation: Donation, channels: int, fingerprint: str) -> dict[str, Any]:
    return {
        "donor": list(donation.donor),
        "receiver": list(donation.receiver),
        "key": donation.key,
        "fingerprint": fingerprint,
        "format": "split float32 zstandard",
        "shape": [channels, *donation.box.shape],
    }
