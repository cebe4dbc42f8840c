"""Lengths in nanometres, without the noise of binary fractions."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

_SYMBOLS: Final = {
    "m": Decimal(10) ** 9,
    "cm": Decimal(10) ** 7,
    "mm": Decimal(10) ** 6,
    **dict.fromkeys(("um", "µm", "μm"), Decimal(1000)),
    "nm": Decimal(1),
    "Å": Decimal("0.1"),
    "pm": Decimal("0.001"),
}
_NAMES: Final = {
    "meter": Decimal(10) ** 9,
    "centimeter": Decimal(10) ** 7,
    "millimeter": Decimal(10) ** 6,
    **dict.fromkeys(("micrometer", "micron"), Decimal(1000)),
    "nanometer": Decimal(1),
    **dict.fromkeys(("angstrom", "ångström"), Decimal("0.1")),
    "picometer": Decimal("0.001"),
}
"""Nanometres in a unit, by its symbol, and by its name in the singular."""

_SMALL: Final = {symbol.lower(): factor for symbol, factor in _SYMBOLS.items()}


def nanometres_in(unit: str, *, any_case: bool = False) -> Decimal | None:
    """Nanometres in a unit of length; None if it is not known.

    Args:
        unit: Its symbol, or its English name, singular or plural.
        any_case: Whether symbols count in capitals too, as some write them; else ``Mm`` is none.
    """
    text = unit.strip()
    word = text.lower().removesuffix("s")
    word = word.removesuffix("metre") + "meter" if word.endswith("metre") else word
    symbol = _SMALL.get(text.lower()) if any_case else _SYMBOLS.get(text)
    return _NAMES.get(word) if symbol is None else symbol


def nanometres(length: float | np.floating[Any], unit: str) -> float | None:
    """A length in nm, an ``int`` if it is one; None for what is no length, or has no known unit.

    A float32 of 0.004 mm is 4000 nm, since it was 0.004 that somebody wrote.
    """
    factor = nanometres_in(unit, any_case=True)
    if factor is None or not 0 < length < math.inf:
        return None
    value = float(Decimal(str(length)) * factor)
    return int(value) if value.is_integer() else value
