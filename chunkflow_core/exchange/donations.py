"""A donation as a file: what it is, its sums, and checksums of both."""

from __future__ import annotations

import json
import struct
from typing import Any

from chunkflow_core.errors import DataError
from chunkflow_core.lattice.blocks import Donation
from chunkflow_core.storage import digests

_MAGIC = b"CFDONATE"


class WrongDonationsError(DataError):
    """Donations are not what their donors' receipts say."""

    def __init__(self, message: str, keys: tuple[str, ...]) -> None:
        """Say what is wrong with the first, and name the keys of all."""
        super().__init__(message)
        self.keys = keys


def pack(donation: Donation, payload: bytes, channels: int, fingerprint: str) -> tuple[bytes, str]:
    """Pack a donation as a file: magic, length of the header, header (JSON), payload.

    The header has the payload's checksum, so the header's own is that of the whole file.

    Args:
        donation: What the file says that it is.
        payload: The sums, compressed.
        channels: Number of channels of the sums.
        fingerprint: Fingerprint of the spec.

    Returns:
        The file's content, and its checksum.
    """
    header = {"payload": digests.checksum(payload), **_header(donation, channels, fingerprint)}
    text = json.dumps(header, sort_keys=True).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, payload]), digests.checksum(text)


def unpack(data: bytes, donation: Donation, channels: int, fingerprint: str, checksum: str) -> bytes:
    """Unpack a donation's file, and return its payload.

    Args:
        data: The file's content.
        donation: The donation that it has to be.
        channels: Number of channels that the sums have to have.
        fingerprint: Fingerprint of the spec.
        checksum: Checksum of the file, from the donor's receipt.

    Raises:
        DataError: The file is not intact, or not exactly the donation that is expected.
    """
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
