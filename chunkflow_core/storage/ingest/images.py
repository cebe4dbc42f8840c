"""One image file, as Pillow reads it: PNG, JPEG, BMP. TIFF has a reader of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.axes import Choice, native, select
from chunkflow_core.storage.ingest.stack import Stack, readable, reader
from chunkflow_core.storage.ingest.tiff import open_tiff
from chunkflow_core.storage.ingest.turned import ORIENTATION, turned

TIFF = (".tif", ".tiff")
IMAGES = (".png", *TIFF, ".jpg", ".jpeg", ".bmp")
"""Endings of the files that are sections of a folder."""

_DTYPES = {"L": "u1", "P": "u1", "LA": "u1", "RGB": "u1", "RGBA": "u1", "CMYK": "u1", "I;16": "u2", "I;16B": "u2"}
"""Dtype of each mode of Pillow that is taken; P is a palette."""
_MODES_OF_16_BITS = {"I;16", "I;16B", "I;16L", "I"}


def open_image(file: Path, choice: Choice) -> Stack:
    """Open a file that is one section; close it after use.

    Raises:
        DataError: It is not one grey image, or can't be read.
        MissingInputError: It is a part of an image, whose other parts are missing.
        UsageError: What the user says does not fit.
        SpecError: What reads it is not installed.
    """
    stack = open_tiff(file, choice) if file.suffix.lower() in TIFF else _open_other(file, choice)
    if stack.shape[0] > 1:
        stack.close()
        raise DataError(f"{file}: holds {stack.shape[0]} images, expected one; give the file instead of its folder")
    return stack


def _open_other(file: Path, choice: Choice) -> Stack:
    image = _Image(file, choice)
    try:
        return turned(image, image.orientation, choice)
    except BaseException:
        image.close()
        raise


class _Image(Stack):
    """A section that Pillow reads."""

    def __init__(self, file: Path, choice: Choice) -> None:
        reader("PIL")
        image_module = reader("PIL.Image")
        # sections of electron microscopy are larger than what Pillow takes for an attack
        image_module.MAX_IMAGE_PIXELS = None
        self._image = readable(lambda: image_module.open(file), str(file))
        try:
            dtype = self._check(str(file))
            samples = (len(self._image.getbands()),) if len(self._image.getbands()) > 1 else ()
            width, height = self._image.size
            self._selection = select(str(file), (height, width, *samples), "YXS"[: 2 + len(samples)], choice)
            super().__init__(str(file), self._selection.shape, np.dtype(dtype))
            self.files = [file]
            self.orientation = readable(self._orientation, str(file))
            """Value of the tag of EXIF, as far as it stands before the pixels."""
        except BaseException:
            self._image.close()
            raise

    def close(self) -> None:
        self._image.close()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        values = readable(self._values, self.name)
        if readable(self._orientation, self.name) != self.orientation:
            raise DataError(f"{self.name}: has an orientation (EXIF) after its pixels; store it upright, without EXIF")
        index = self._selection.index(slice(start, stop))
        return self._selection.arrange(values[index])

    def _orientation(self) -> int:
        """The orientation, as far as the file has been read.

        Pillow's own call for PNG would decode all pixels, to see what stands behind them.
        """
        known = reader("PIL.Image").Image()
        known.info = self._image.info
        return int(known.getexif().get(ORIENTATION, 1))

    def _check(self, name: str) -> str:
        """Check that the numbers are as the file has them; the dtype that holds them."""
        image = self._image
        if (count := getattr(image, "n_frames", 1)) > 1:
            raise DataError(f"{name}: holds {count} images, expected one; give the file instead of its folder")
        stored, mode = _stored(image), "I;16" if image.mode == "I" and image.format == "PNG" else image.mode
        bits = re.fullmatch(r"(?:L;)?([124])", stored)
        if mode == "1" or (bits and mode == "L"):
            count = int(bits[1]) if bits else 1
            kind = " (dtype bool)" if count == 1 else ""
            raise DataError(
                f"{name}: holds samples of {count} bit{'s' * (count > 1)}{kind}, of which readers do not agree how "
                "bright they are; convert it to 8 bits"
            )
        if "16" in stored and mode not in _MODES_OF_16_BITS:
            raise DataError(f"{name}: holds colours or alpha of 16 bits, convert it to grey images of 16 bits")
        if mode not in _DTYPES:
            raise DataError(f"{name}: is an image of the mode {mode}, convert it to grey images of 8 or 16 bits")
        if "transparency" in image.info:
            self._check_opaque(name, mode)
        return _DTYPES[mode]

    def _check_opaque(self, name: str, mode: str) -> None:
        """Check that no pixel is transparent in an image that has a colour for that."""
        opaque = mode in ("L", "P", "RGB") and readable(
            lambda: np.asarray(self._image.convert("RGBA"))[..., 3].min() == 255, name
        )
        if not opaque:
            raise DataError(f"{name}: has transparent pixels, store it without transparency")

    def _values(self) -> NDArray[Any]:
        """Grey values, or samples; of a palette, the values that it stands for."""
        if self._image.mode != "P":
            return native(np.asarray(self._image)).astype(self.dtype, copy=False)
        colours = np.asarray(self._image.convert("RGB"))
        if (colours != colours[:, :, :1]).any():
            raise DataError(
                f"{self.name}: has a palette of colours {colours.shape}, expected grey images (y, x); convert it"
            )
        return colours[:, :, 0]


def _stored(image: Any) -> str:
    """Pillow's name of how pixels lie in the file, such as ``L;4`` for grey values of 4 bits."""
    arguments = image.tile[0].args if image.tile else ""
    stored = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return stored if isinstance(stored, str) else ""
