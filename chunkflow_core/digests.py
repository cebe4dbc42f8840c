"""Short hashes, for names in storage."""

from __future__ import annotations

import base64
import hashlib


def short_digest(data: bytes) -> str:
    """64 bits of a hash, as 13 letters and digits that any storage takes in a name."""
    return base64.b32encode(hashlib.sha256(data).digest()[:8]).decode().rstrip("=").lower()
