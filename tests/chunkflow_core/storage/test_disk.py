"""Listings of a disk name all that is there, or fail: what is not seen is not deleted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.errors import StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.disk import DiskFiles
from chunkflow_core.storage.files import storage_errors
from tests.support.volume import write_volume


def spoil(folder: Path) -> Path:
    """Put a link to itself in a folder's place, which nobody can read; return the folder."""
    kept = folder.rename(folder.with_name(f"{folder.name} as it was"))
    folder.symlink_to(folder.name)
    return kept


def mend(folder: Path, kept: Path) -> None:
    folder.unlink()
    kept.rename(folder)


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "a/bc/", "a/bc/d", "ab", "x", "x/", "a/x", "a/bc/x/y"])
def test_a_listing_has_what_begins_so(tmp_path: Path, prefix: str) -> None:
    names = ["a/b", "a/bc/d.gz", "a/bc/de.br", "a/bc/e", "a/bd/f", "a/c", "ab/g.zstd", "abc.gz", "b", "a/b.d/h.txt"]
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"123")
    (tmp_path / "a" / "bl").symlink_to(tmp_path / "ab")
    plain = sorted(re.sub(r"\.(gz|br|zstd)$", "", name) for name in names)
    files = DiskFiles(f"file://{tmp_path}")

    assert list(files.list(prefix)) == [name for name in plain if name.startswith(prefix)]
    assert list(files.list(prefix, size=True)) == [(name, 3) for name in plain if name.startswith(prefix)]
    if not prefix or prefix.endswith("/"):
        inside = {name.removeprefix(prefix).partition("/")[:2] for name in plain if name.startswith(prefix)}
        linked = {"bl/"} if prefix == "a/" else set()
        expected = sorted(prefix + name for name in {"".join(parts) for parts in inside} | linked)
        assert list(files.list(prefix, flat=True)) == expected


@pytest.mark.parametrize(("prefix", "flat"), [("group/", False), ("group/", True), ("group/a", False), ("", False)])
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, prefix: str, flat: bool) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / "a").touch()
    files = DiskFiles(f"file://{tmp_path}")
    kept = spoil(group)
    with pytest.raises(StorageError, match=r"listing: OSError: .*group"), storage_errors("listing"):
        files.list(prefix, flat=flat)
    group.unlink()
    kept.rename(tmp_path / "other")
    assert list(files.list("group/", flat=flat)) == [], "a folder that is not there is one"


def test_a_file_in_a_folders_place_is_not_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "group").touch()
    with pytest.raises(StorageError), storage_errors("listing"):
        DiskFiles(f"file://{tmp_path}").list("group/")


def test_a_disk_that_fails_stops_what_would_replace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither is a receipt taken for deleted, nor a layer full of voxels for an empty one."""
    path = write_volume(tmp_path)
    assert main(["run", str(path), "--seams", "0"]) == 0
    exchange = Exchange(load_spec(path))
    group = Path(exchange.path.removeprefix("file://")) / "receipts" / "infer" / "0_0_0"
    kept = spoil(group)
    with pytest.raises(StorageError, match="receipts/infer/0_0_0"):
        exchange.retract("infer", (1, 1, 1))
    with pytest.raises(StorageError, match="receipts/infer"):
        exchange.delete_receipts()
    mend(group, kept)
    assert len(exchange.receipts("infer")) == len(exchange.receipts("blend")) + 1 == 8

    scale = tmp_path / "output" / "4_4_40"
    kept = spoil(scale)
    another = ["prepare", str(path), "--set", "model.threads=2"]
    assert main(another) == 75
    assert str(scale) in capsys.readouterr().err
    mend(scale, kept)
    assert main(another) == 78, "the layer is another model's"
