"""TIFF: the series that the file's metadata describe, not its pages one after another."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, UsageError
from chunkflow_core.storage.ingest.axes import Choice, Selection, native, select
from chunkflow_core.storage.ingest.stack import ArrayStack, Stack, readable, reader
from chunkflow_core.storage.ingest.tiff_values import check_whole, is_turned_over, meaning, orientation
from chunkflow_core.storage.ingest.turned import turned

_HARMLESS = ("GDAL_NODATA", "GeoKey", "get_resolution", "nuvu_tags", "andor_tags", "epics_tags")
"""Words in what tifffile logs of private tags, which are not used here."""

_TAG = re.compile(r"TiffTag (\d+) @")
_IDLE_TAGS = {282, 283, 296, 305, 306, 315, 316}
"""Tags that decide no voxel: resolution, software, date, artist, computer."""

_PLAIN = ("generic", "uniform", "shaped")
"""tifffile's kinds of series in which a page may say nothing of its neighbours."""


class Complaints(logging.Filter):
    """Catches what tifffile logs of a file that it gives in part, or with zeros for the rest."""

    _owners: ClassVar[set[int]] = set()
    """The threads that are within a ``with``: what one of them logs is of its own file."""

    def __init__(self) -> None:
        """Make a filter that has caught nothing yet; it works within a ``with``."""
        super().__init__()
        self.texts: list[str] = []
        self._logger, self._thread = logging.getLogger("tifffile"), get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a warning; whether it is to be logged as usual."""
        text = " ".join(record.getMessage().split())
        if record.levelno < logging.WARNING or _is_harmless(text):
            return True
        if record.thread != self._thread and record.thread in self._owners:
            return True  # it is of a file that another thread reads
        self.texts.append(text)
        return False

    def __enter__(self) -> Complaints:
        """Begin to catch."""
        self._owners.add(self._thread)
        self._logger.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave tifffile's log as it was."""
        self._logger.removeFilter(self)
        self._owners.discard(self._thread)

    def check(self, name: str) -> None:
        """Raise what was caught.

        Raises:
            MissingInputError: Other files of the same image are missing.
            DataError: The file can't be read as a whole.
        """
        for text in self.texts:
            if "missing files" in text or "failed to read" in text:
                raise MissingInputError(f"{name} can't be read as a whole, files of its image are missing: {text}")
        if self.texts:
            raise DataError(f"{name} can't be read to its end, it may be truncated: {self.texts[0]}")


def _is_harmless(text: str) -> bool:
    """Whether a warning of tifffile's is of what decides no voxel."""
    tag = _TAG.search(text)
    return int(tag[1]) in _IDLE_TAGS if tag else any(word in text for word in _HARMLESS)


def open_tiff(file: Path, choice: Choice) -> Stack:
    """Open a TIFF file, with the other files of the image that its metadata name.

    Raises:
        DataError: It holds several stacks or none, or it can't be read as a whole.
        MissingInputError: Other files of the image are missing.
        UsageError: There is no such series, level or channel.
    """
    tifffile, name = reader("tifffile"), str(file)
    with Complaints() as complaints:
        tiff = readable(lambda: tifffile.TiffFile(file), name)
        try:
            count = readable(lambda: len(tiff.pages), name)
            series = readable(lambda: list(tiff.series), name)
            _check_members(tiff, series, name)
            complaints.check(name)
            stack = readable(lambda: _stack(tiff, count, series, choice, name), name)
        except BaseException:
            tiff.close()
            raise
    return stack


def _stack(tiff: Any, count: int, series: list[Any], choice: Choice, name: str) -> Stack:
    if choice.series is None and (pages := readable(lambda: _plain_pages(tiff, count, series), name)):
        keyframe = pages[0]
        paged = _PageStack(tiff, pages, (len(pages), *keyframe.shape), f"I{keyframe.axes}", choice, name)
        return turned(paged, paged.orientation, choice)
    levels = _levels(_pyramids(series), count, choice, name)
    if choice.level >= len(levels):
        raise UsageError(f"{name}: has no level {choice.level}; it holds {_told([levels])}")
    chosen = levels[choice.level]
    shape, axes, pages = chosen.shape, chosen.axes, readable(lambda: _pages(chosen), name)
    _check_alike(pages, name)
    lead = _leading(shape, len(pages))
    in_pages = lead is not None and not {"Y", "X"} & set(axes[:lead]) and chosen.transform is None
    if in_pages and not (lead == 0 and len(shape) > 2 and chosen.keyframe.is_final):
        paged = _PageStack(tiff, pages, shape, axes, choice, name)
        return turned(paged, paged.orientation, choice)
    values = meaning(chosen.keyframe, name)
    for page in pages:
        if choice.gaps != "blank":
            check_whole(page, name)
    stack = ArrayStack(_whole(tiff, chosen, name), name, axes, choice, meaning=values)
    _note(stack, chosen.keyframe)
    stack.files = _files(pages)
    orientations = {_orientation(page) for page in pages}
    if len(orientations) > 1:
        raise DataError(_unlike(name, orientations))
    return turned(stack, orientations.pop(), choice)


def _pages(series: Any) -> list[Any]:
    """The pages of a series; of SubIFDs in one piece, tifffile knows the first one only."""
    first = series.pages[0]
    if len(getattr(first, "treeindex", ())) > 1 and series.dataoffset is not None:
        return [first]
    return list(series.pages)


def _whole(tiff: Any, series: Any, name: str) -> Any:
    """A series that does not lie in pages: mapped where the file has it as it is."""
    offset = series.dataoffset
    if offset is None or tiff.filehandle.closed or series.transform is not None:
        return readable(series.asarray, name)
    dtype = np.dtype(tiff.byteorder + series.dtype.char)
    return readable(
        lambda: np.memmap(tiff.filehandle.path, dtype, mode="r", offset=offset, shape=tuple(series.shape)), name
    )


class _PageStack(Stack):
    """Sections that each lie in a page, or in a part of one."""

    def __init__(self, tiff: Any, pages: list[Any], shape: Sequence[int], axes: str, choice: Choice, name: str) -> None:
        keyframe = pages[0].keyframe
        meaning(keyframe, name)
        self._selection: Selection = select(name, shape, axes, choice)
        lead = _leading(shape, len(pages)) or 0
        super().__init__(name, self._selection.shape, keyframe.dtype if keyframe.colormap is None else np.dtype("u1"))
        self._tiff, self._pages, self._sparse = tiff, pages, choice.gaps == "blank"
        self._lead, self._rest = tuple(shape[:lead]), tuple(shape[lead:])
        self._samples = keyframe.samplesperpixel
        self.orientation = _orientation(pages[0])
        self.files = _files(pages)
        # files of a folder are read by threads, so that what tifffile logs is of the thread's file
        self._workers = 1 if self.shape[0] == 1 else None
        _note(self, keyframe)

    def close(self) -> None:
        self._tiff.close()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        z = self._selection.z
        if z is not None and z >= len(self._lead):  # a page has them all
            return self._read(slice(start, stop))
        return np.concatenate([self._read(slice(z, z + 1)) for z in range(start, stop)])

    def _read(self, sections: slice) -> NDArray[Any]:
        """Sections that lie in one page, ``(z, y, x)``."""
        name = f"{self.name}: section {sections.start}"
        index = self._selection.index(sections)
        place = [part.start if isinstance(part, slice) else part for part in index[: len(self._lead)]]
        page = self._pages[int(np.ravel_multi_index(place, self._lead)) if place else 0]
        with Complaints() as complaints:
            found = readable(lambda: self._numbers(page, name), name)
            complaints.check(name)
        if found.size != np.prod(self._rest) or found.dtype != self.dtype:
            raise DataError(f"{name} is {found.dtype} {found.shape}, the first {self.dtype} {self._rest}")
        part = found.reshape(self._rest)[index[len(self._lead) :]]
        if self._selection.z is not None and self._selection.z < len(self._lead):
            part = part[None]
        return self._selection.arrange(part)

    def _numbers(self, page: Any, name: str) -> NDArray[Any]:
        """Grey values of a page, by its own tags where it has some."""
        with _whole_page(page) as whole:
            if not self._sparse:
                check_whole(whole, name)
            if (shape := whole.keyframe.shape) != page.keyframe.shape:
                raise DataError(f"{name} is {whole.keyframe.dtype} {shape}, the first {self.dtype} {self._rest}")
            if _orientation(whole) != self.orientation:
                raise DataError(_unlike(name, {_orientation(whole), self.orientation}))
            return native(meaning(whole.keyframe, name)(whole.asarray(maxworkers=self._workers)))


@contextmanager
def _whole_page(page: Any) -> Iterator[Any]:
    """A page with its own tags, if it has some, in an open file."""
    file = page.parent.filehandle
    closed = file.closed
    if closed:  # another file of the same image
        file.open()
    try:
        yield page if getattr(page, "is_virtual", False) else page.aspage()
    finally:
        if closed:
            file.close()


def _orientation(page: Any) -> int:
    with _whole_page(page) as whole:
        return orientation(whole.keyframe)


def _unlike(name: str, orientations: set[int]) -> str:
    told = " and ".join(map(str, sorted(orientations)))
    return f"{name}: its pages have the orientations {told} (tag 274); store all sections upright, without the tag"


def _files(pages: Sequence[Any]) -> list[Path]:
    """The files that pages lie in."""
    return sorted({Path(page.parent.filehandle.path) for page in pages})


def _note(stack: Stack, keyframe: Any) -> None:
    if is_turned_over(keyframe):
        stack.notes["grey_values"] = "turned over: 0 is white in the file (min-is-white)"


def _leading(shape: Sequence[int], pages: int) -> int | None:
    """How many leading axes number the pages; None if no number of axes does."""
    return next((n for n in range(len(shape) - 1) if int(np.prod(shape[:n])) == pages), None)


def _plain_pages(tiff: Any, count: int, series: list[Any]) -> list[Any] | None:
    """All pages of a file whose pages say nothing of each other and are alike; else None.

    Pages that were appended one by one, or that differ in compression, are series of their own.
    """
    alone = all(len(s.levels) == 1 and s.kind in _PLAIN and (s.kind != "shaped" or len(s) == 1) for s in series)
    shaped = {s.kind for s in series} == {"shaped"}
    if len(series) < 2 or not alone or (shaped and any(s.ndim != 2 for s in series)):
        return None
    pages = [tiff.pages.get(index, aspage=True) for index in range(count)]
    return pages if len({_kind(page) for page in pages}) == 1 else None


def _kind(page: Any) -> tuple[object, ...]:
    """What has to be the same of pages for them to be sections of one stack."""
    samples = (page.bitspersample, int(page.sampleformat), int(page.photometric), page.samplesperpixel)
    return (page.shape, str(page.dtype), *samples, int(page.subfiletype) & 5, bool(page.subifds))


def _check_alike(pages: list[Any], name: str) -> None:
    """Check that no page of a series is missing, or a thumbnail or mask of another."""
    missing = [number for number, page in enumerate(pages) if page is None]
    if missing:
        raise DataError(f"{name}: {len(missing)} of its {len(pages)} planes are missing, the first is {missing[0]}")
    inner = {len(page.treeindex) > 1 for page in pages if hasattr(page, "treeindex")}
    kinds = {int(page.subfiletype) & 5 for page in pages if hasattr(page, "subfiletype")}
    if len(inner) > 1 or len(kinds) > 1:
        raise DataError(f"{name}: thumbnails or masks of the same size lie among its pages; store the sections alone")


def _pyramids(series: list[Any]) -> list[list[Any]]:
    """The series of a file, each with the levels of its pyramid.

    Of some files tifffile gives the levels, which are SubIFDs, as series of their own.
    """
    pyramids: list[list[Any]] = []
    for one in series:
        if pyramids and len(getattr(one.pages[0], "treeindex", ())) > 1 and len(one.levels) == 1:
            pyramids[-1].append(one)
        else:
            pyramids.append(list(one.levels))
    return pyramids


def _levels(pyramids: list[list[Any]], count: int, choice: Choice, name: str) -> list[Any]:
    """The levels of the series to take, out of those of a file of ``count`` pages."""
    if not pyramids:
        raise DataError(f"{name}: holds no image")
    if choice.series is not None:
        if choice.series >= len(pyramids):
            raise UsageError(f"{name}: has no series {choice.series}; it holds {_told(pyramids)}")
        return pyramids[choice.series]
    if len(pyramids) > 1:
        raise DataError(f"{name}: holds {_told(pyramids)}; choose one with --series N")
    only = pyramids[0][0]
    inner = [page for page in only.pages if page is not None and page.parent is only.parent]
    if not only.is_truncated and not only.is_multifile and only.kind != "mmstack" and len(inner) < count:
        raise DataError(
            f"{name}: holds {count} images, of which its metadata describe {len(inner)}: {_told(pyramids)}; to take "
            "these, say --series 0"
        )
    return pyramids[0]


def _told(pyramids: list[list[Any]]) -> str:
    """The series of a file for messages, with the levels of pyramids."""
    parts = []
    for number, levels in enumerate(pyramids[:6]):
        one = levels[0]
        told = f" in {len(levels)} levels" if len(levels) > 1 else ""
        label = f" {one.name!r}" if one.name else ""
        parts.append(f"{number}:{label} {one.axes} {tuple(map(int, one.shape))} {one.dtype}{told}")
    more = ", …" if len(pyramids) > 6 else ""
    return f"{len(pyramids)} series ({', '.join(parts)}{more})"


def _check_members(tiff: Any, series: list[Any], name: str) -> None:
    """Check that an OME file's metadata were used, and that all its files are there.

    Raises:
        DataError: They can't be used; its pages alone do not say what they are.
        MissingInputError: They are in another file, or name files that are not there.
    """
    if not tiff.is_ome:
        if tiff.pages and "<OME " in (getattr(tiff.pages[0], "description", "") or ""):
            raise DataError(f"{name}: its OME metadata are not complete; write the file again")
        return
    from xml.etree import ElementTree

    root = readable(lambda: ElementTree.fromstring(tiff.ome_metadata), f"{name}: its OME metadata")
    elements = {kind: [e for e in root.iter() if e.tag.rpartition("}")[2] == kind] for kind in ("BinaryOnly", "UUID")}
    if elements["BinaryOnly"]:
        other = elements["BinaryOnly"][0].get("MetadataFile", "")
        raise MissingInputError(f"{name}: is a part of an image, whose metadata are in {other}; give that file")
    files = sorted({e.get("FileName", "") for e in elements["UUID"]} - {""})
    folder = Path(name).parent
    missing = [file for file in files if not (folder / file).exists() and file.lower() != Path(name).name.lower()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise MissingInputError(
            f"{name}: {len(missing)} of {len(files)} files of this image are missing in {folder}: "
            f"{', '.join(missing[:5])}{more}"
        )
    if not series or series[0].kind not in ("ome", "mmstack"):
        raise DataError(f"{name}: its OME metadata do not fit its pages; write the file again")
