"""Lengths in headers as nanometres, without the noise of binary fractions."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Final

import numpy as np

_NANOMETRES: Final = {
    **dict.fromkeys(("m", "meter", "metre", "meters", "metres"), Decimal(10) ** 9),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), Decimal(10) ** 7),
    **dict.fromkeys(("mm", "millimeter", "millimetre", "millimeters", "millimetres"), Decimal(10) ** 6),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometre"), Decimal(10) ** 3),
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers", "nanometres"), Decimal(1)),
    **dict.fromkeys(("å", "angstrom", "angstroms"), Decimal("0.1")),
}


def nanometres(length: float | np.floating[Any], unit: str) -> float | None:
    """A length in nm, an ``int`` if it is one; None for what is no length, or has no known unit.

    A float32 of 0.004 mm is 4000 nm, since it was 0.004 that somebody wrote.
    """
    factor = _NANOMETRES.get(unit.strip().lower())
    if factor is None or not 0 < length < math.inf:
        return None
    value = float(Decimal(str(length)) * factor)
    return int(value) if value.is_integer() else value
