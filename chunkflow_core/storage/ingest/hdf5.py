"""HDF5: a dataset of a file, if all of it is there."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from chunkflow_core.errors import DataError, MissingInputError, SpecError, UsageError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.hdf5_parts import check_parts
from chunkflow_core.storage.ingest.stack import ArrayStack, Stack, readable, reader

HDF5 = (".h5", ".hdf5", ".hdf")


def open_hdf5(file: Path, dataset: str, choice: Choice) -> Stack:
    """Open a dataset of an HDF5 file.

    Args:
        file: The file.
        dataset: Name of the dataset; empty for the only one.
        choice: What the user says.

    Raises:
        MissingInputError: There is no such dataset, or files of it are missing.
        UsageError: There are several datasets, and none is named.
        DataError: The dataset is no stack, or parts of it were never written.
        SpecError: A filter is missing that it was compressed with.
    """
    h5py = reader("h5py")
    container = readable(lambda: h5py.File(file, "r"), str(file))
    try:
        found = _dataset(h5py, container, file, dataset or _only_dataset(h5py, container, file))
        name = f"{file}:{found.name.lstrip('/')}" if not dataset else f"{file}:{dataset}"
        _check_filters(h5py, found, name)
        incomplete = readable(lambda: check_parts(found, name, blank=choice.gaps == "blank"), name)
        stack = _Dataset(found, file, name, choice)
    except BaseException:
        container.close()
        raise
    if incomplete:
        stack.notes["filled"] = {"with": "the fill value", "parts": incomplete}
    return stack


class _Dataset(ArrayStack):
    """A dataset; its file is closed with it."""

    def __init__(self, dataset: Any, file: Path, name: str, choice: Choice) -> None:
        super().__init__(dataset, name, _axes(dataset), choice)
        self._file = dataset.file
        # of others, it is not looked for which files they are made of
        whole = not dataset.is_virtual and not dataset.external and dataset.file.filename == str(file)
        self.files = [file] if whole else None

    def close(self) -> None:
        self._file.close()


def _only_dataset(h5py: Any, container: Any, file: Path) -> str:
    """Name of the only dataset; links that lead nowhere count, too."""
    names: dict[object, str] = {}

    def visit(name: str, link: Any) -> None:
        try:
            item = container[name]
        except (KeyError, OSError):
            names[name] = name
            return
        if isinstance(item, h5py.Dataset):
            names.setdefault((item.file.filename, h5py.h5o.get_info(item.id).addr), name)

    readable(lambda: container.visititems_links(visit), str(file))
    if len(names) != 1:
        raise UsageError(f"{file}: holds the datasets {sorted(names.values())}; name one: {file}:DATASET")
    return next(iter(names.values()))


def _dataset(h5py: Any, container: Any, file: Path, name: str) -> Any:
    try:
        found = container.get(name)
    except (KeyError, OSError) as error:
        raise MissingInputError(f"{file}: {_broken(h5py, container, name)}") from error
    if isinstance(found, h5py.Dataset):
        return found
    if found is None and isinstance(readable(lambda: container.get(name, getlink=True), str(file)), h5py.ExternalLink):
        raise MissingInputError(f"{file}: {_broken(h5py, container, name)}")
    raise MissingInputError(f"{file}: has no dataset {name}")


def _broken(h5py: Any, container: Any, name: str) -> str:
    link = container.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        return f"{name} is a link to {link.path} in the file {link.filename}, which is not there"
    return f"has no dataset {name}"


def _axes(dataset: Any) -> str | None:
    """Letter of each axis by the dataset's own word, upper case; None if it has none.

    That is HDF5's labels of dimensions, or the attribute ``axistags`` of vigra and ilastik. Words
    that are no letters of axes say nothing.
    """
    labels = readable(lambda: [dimension.label for dimension in dataset.dims], dataset.name)
    if not all(labels) and "axistags" in dataset.attrs:
        try:
            labels = [axis["key"] for axis in json.loads(dataset.attrs["axistags"])["axes"]]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{dataset.name}: its attribute axistags can't be read; name the axes with --axes"
            ) from error
    letters = "".join(labels).upper() if all(len(label) == 1 for label in labels) else ""
    known = len(set(letters)) == len(letters) == len(dataset.shape) and {"Y", "X"} <= set(letters)
    return letters if known else None


def _check_filters(h5py: Any, dataset: Any, name: str) -> None:
    """Check that what the dataset was compressed with is here; hdf5plugin is imported for it.

    Raises:
        SpecError: It is not.
    """
    missing = _missing_filters(h5py, dataset)
    if missing:
        try:
            import_module("hdf5plugin")
        except ImportError as error:
            raise SpecError(
                f"{name}: is compressed with the filter {' and '.join(missing)}, which needs the package hdf5plugin: "
                "pip install hdf5plugin"
            ) from error
        missing = _missing_filters(h5py, dataset)
    if missing:
        raise SpecError(
            f"{name}: is compressed with the filter {' and '.join(missing)}, which hdf5plugin does not have; install "
            "the filter's plugin, and let HDF5_PLUGIN_PATH name its folder"
        )


def _missing_filters(h5py: Any, dataset: Any) -> list[str]:
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(number) for number in range(properties.get_nfilters())]
    return [
        f"{label.decode(errors='replace') or 'unnamed'} ({code})"
        for code, _, _, label in filters
        if not h5py.h5z.filter_avail(code)
    ]
