"""Which files of a folder are sections, in which order, and which are missing. Names only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.axes import Choice

_NUMBER = re.compile(r"([0-9]+)")


def sections(folder: Path, files: Sequence[Path], choice: Choice) -> list[Path | None]:
    """The file of each section, in order; None for a section that is missing.

    Files without numbers are in the order of their names. Others have to have the same name but for
    numbers. One number, that no two files share, counts the sections; it may start anywhere.

    Args:
        folder: The folder, for messages.
        files: Its images.
        choice: ``gaps`` says whether sections may be missing, ``step`` how numbers go on.

    Raises:
        DataError: Files of two kinds lie side by side, a section is there twice or missing, or
            names do not say in which order they come.
    """
    ordered = sorted(files, key=lambda file: (_numbers(file), file.name))
    _check_twice(folder, ordered)
    _check_types(folder, ordered)
    _check_names(folder, ordered)
    places = _varying(ordered)
    if not places:
        return list(ordered)
    numbers = _counter(folder, ordered, places)
    return _with_gaps(folder, dict(zip(numbers, ordered, strict=True)), choice)


def _texts(file: Path) -> tuple[str, ...]:
    return tuple(_NUMBER.split(file.stem.lower())[::2])


def _numbers(file: Path) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(file.stem)))


def _type(file: Path) -> str:
    ending = file.suffix.lower()
    return {".tiff": ".tif", ".jpeg": ".jpg"}.get(ending, ending)


def _check_twice(folder: Path, files: Sequence[Path]) -> None:
    """Check that no two files have the same name but for the ending and leading zeros."""
    known: dict[tuple[object, ...], Path] = {}
    for file in files:
        other = known.setdefault((_texts(file), _numbers(file)), file)
        if other is not file:
            raise DataError(
                f"{folder}: {other.name} and {file.name} are the same section; keep one of them in the folder"
            )


def _check_types(folder: Path, files: Sequence[Path]) -> None:
    kinds = Counter(map(_type, files))
    if len(kinds) > 1:
        told = [f"{n} {kind} ({next(f.name for f in files if _type(f) == kind)})" for kind, n in kinds.most_common()]
        raise DataError(
            f"{folder}: files of several types lie side by side, {' and '.join(told)}; keep one type in the folder"
        )


def _check_names(folder: Path, files: Sequence[Path]) -> None:
    """Check that names differ in numbers only, or have none."""
    kinds = Counter(map(_texts, files))
    if len(kinds) > 1 and any(len(texts) > 1 for texts in kinds):
        (most, _), (other, _) = kinds.most_common()[:2]
        names = [next(f.name for f in files if _texts(f) == texts) for texts in (most, other)]
        raise DataError(
            f"{folder}: {names[1]} is named otherwise than {names[0]}: it is not known which of the two comes first; "
            "keep files in the folder whose names differ in numbers only"
        )


def _varying(files: Sequence[Path]) -> list[int]:
    """Places of the numbers that are not the same in all names."""
    numbers = [_numbers(file) for file in files]
    return [place for place in range(len(numbers[0])) if len({n[place] for n in numbers}) > 1]


def _counter(folder: Path, files: Sequence[Path], places: list[int]) -> list[int]:
    """The number that counts sections, of each file: the one that goes on most closely."""
    columns = [[_numbers(file)[place] for file in files] for place in places]
    own = [column for column in columns if len(set(column)) == len(column)]
    if not own:
        raise DataError(
            f"{folder}: no number of the names counts the sections, {files[0].name} and {files[1].name} differ in "
            "several; give each section a number of its own"
        )
    counter = min(own, key=lambda column: max(column) - min(column))
    if counter != sorted(counter):
        place = next(k for k in range(1, len(counter)) if counter[k] < counter[k - 1])
        raise DataError(
            f"{folder}: the numbers of the names give two orders, as in {files[place - 1].name} and "
            f"{files[place].name}; leave in the names only the number that counts the sections"
        )
    return counter


def _with_gaps(folder: Path, files: dict[int, Path], choice: Choice) -> list[Path | None]:
    known, step = sorted(files), choice.step
    wrong = next((k for k in range(1, len(known)) if (known[k] - known[k - 1]) % step), None)
    if wrong is not None:
        raise DataError(
            f"{folder}: {files[known[wrong - 1]].name} is followed by {files[known[wrong]].name}, which is no whole "
            f"number of steps of --step {step}"
        )
    whole = (known[-1] - known[0]) // step + 1
    missing = whole - len(known)
    if missing and choice.gaps == "error":
        raise DataError(_told(folder, files, known, missing, step))
    if missing > len(known):
        raise DataError(
            f"{folder}: {missing} sections are missing and only {len(known)} there, from {files[known[0]].name} to "
            f"{files[known[-1]].name}; look for a file that does not belong here, or say --step N"
        )
    return [files.get(known[0] + k * step) for k in range(whole)]


def _told(folder: Path, files: dict[int, Path], known: list[int], missing: int, step: int) -> str:
    gaps = [k for k in range(1, len(known)) if known[k] - known[k - 1] != step]
    told = [f"between {files[known[k - 1]].name} and {files[known[k]].name}" for k in gaps[:4]]
    more = f" and in {len(gaps) - 4} more places" if len(gaps) > 4 else ""
    steps = {b - a for a, b in pairwise(known)}
    said = f", or --step {min(steps)} if numbers go in such steps" if len(steps) == 1 else ""
    return (
        f"{folder}: {missing} section{'s' * (missing > 1)} missing {', '.join(told)}{more}; add the files, or say what "
        f"stands for them with --gaps repeat (the section before) or --gaps blank (zeros){said}"
    )
