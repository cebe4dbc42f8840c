"""Hashes: short ones for names in storage, longer ones against damage."""

from __future__ import annotations

import hashlib

_DIGITS = "abcdefghijklmnopqrstuvwxyz234567"
_PAIRS = [high + low for high in _DIGITS for low in _DIGITS]


def short_digest(data: bytes) -> str:
    """64 bits of a hash in base 32: 13 letters and digits that any storage takes in a name.

    Planning makes hundreds of thousands; ``base64.b32encode`` takes five times as long.
    """
    bits = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return "".join([_PAIRS[bits >> shift & 1023] for shift in (54, 44, 34, 24, 14, 4)]) + _DIGITS[bits << 1 & 31]


def checksum(data: bytes) -> str:
    """128 bits of a hash, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:32]  # processors have instructions for it
