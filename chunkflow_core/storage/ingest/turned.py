"""Sections that their files say to turn: the tag Orientation of TIFF and EXIF."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError
from chunkflow_core.lattice.boxes import vector
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.stack import Stack

ORIENTATION: Final = 274
"""Number of the tag, in TIFF and in EXIF."""

_TURNS: Final = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
"""For each orientation: whether y and x change places, and which of them is flipped then.

TIFF 6.0, page 36: where the first row and the first column of the stored image are seen.
"""


def turned(stack: Stack, orientation: int, choice: Choice) -> Stack:
    """The stack as it is seen; the same one if that is how it is stored.

    Args:
        stack: Sections as they are stored.
        orientation: Value of the tag; 1 and 0 (not said) leave sections as they are.
        choice: What the user says; rows and columns keep their places in ``axes``.

    Raises:
        DataError: There is no such orientation, or it is not known of which axes it speaks.
    """
    if orientation in (0, 1):
        return stack
    spatial = [axis for axis in choice.axes or "YX" if axis in "YX"]
    if orientation not in _TURNS or spatial != ["Y", "X"]:
        told = "with --axes that turn it, too" if orientation in _TURNS else "which has no meaning"
        raise DataError(
            f"{stack.name}: its tag Orientation is {orientation}, {told}; store it upright, without the tag"
        )
    return _Turned(stack, orientation)


class _Turned(Stack):
    """Another stack, whose sections are turned."""

    def __init__(self, stack: Stack, orientation: int) -> None:
        self._stack = stack
        self._swapped, *flips = _TURNS[orientation]
        self._flips = tuple(slice(None, None, -1 if flipped else None) for flipped in (False, *flips))
        z, y, x = stack.shape
        super().__init__(stack.name, vector((z, x, y) if self._swapped else (z, y, x)), stack.dtype)
        self.notes = stack.notes | {"turned": f"as its tag Orientation says ({orientation})"}
        self.files = stack.files

    def close(self) -> None:
        self._stack.close()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        sections = self._stack.read(start, stop)
        return (np.swapaxes(sections, 1, 2) if self._swapped else sections)[self._flips]
