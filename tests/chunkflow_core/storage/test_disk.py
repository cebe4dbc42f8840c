"""Listings of a disk name all that is there, or fail: what is not seen is not deleted.

Nor does a file speak of others that could not be made to last.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.errors import StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.disk import DiskFiles
from chunkflow_core.storage.durable import each
from chunkflow_core.storage.files import put_file, storage_errors
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
        list(exchange.all_receipts())
    mend(group, kept)
    assert len(exchange.receipts("infer")) == len(exchange.receipts("blend")) + 1 == 8

    scale = tmp_path / "output" / "4_4_40"
    kept = spoil(scale)
    another = ["prepare", str(path), "--set", "model.threads=2"]
    assert main(another) == 75
    assert str(scale) in capsys.readouterr().err
    mend(scale, kept)
    assert main(another) == 78, "the layer is another model's"


def sync_with(patch: pytest.MonkeyPatch, before: Callable[[str, bool], object]) -> None:
    """Have something called before each sync, with the path, and whether it is a folder's."""
    fsync = os.fsync

    def called(handle: int) -> None:
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        before(path, stat.S_ISDIR(os.fstat(handle).st_mode))
        fsync(handle)

    patch.setattr(os, "fsync", called)


def test_a_file_that_could_not_be_synced_stops_all_receipts_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second sync of the same file would succeed, although its contents may be lost."""
    place = f"file://{tmp_path}"

    def fail(path: str, _: bool) -> None:
        if path.endswith("/chunk"):
            raise OSError(errno.EIO, "Input/output error", path)

    put_file(place, "chunk", b"voxels")
    with monkeypatch.context() as patch:
        sync_with(patch, fail)
        with pytest.raises(StorageError, match=r"Input/output error.*chunk"):
            put_file(place, "receipt.json", b"{}")
    with pytest.raises(StorageError, match=r"Input/output error.*chunk"):
        put_file(place, "receipt.json", b"{}")
    assert not (tmp_path / "receipt.json").exists()
    put_file(place, "chunk", b"voxels")
    put_file(place, "receipt.json", b"{}")
    assert (tmp_path / "receipt.json").exists()


def test_a_receipt_waits_for_a_sync_that_another_thread_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, order = f"file://{tmp_path}", list[str]()
    begun, second = threading.Event(), threading.Event()

    def take_long(path: str, _: bool) -> None:
        if path.endswith("/chunk"):
            begun.set()
            second.wait(1)  # the other thread ends meanwhile if it does not wait
            order.append("chunk")

    def put_second() -> None:
        begun.wait()
        put_file(place, "second.json", b"{}")
        order.append("second")
        second.set()

    put_file(place, "chunk", b"voxels")
    sync_with(monkeypatch, take_long)
    thread = threading.Thread(target=put_second)
    thread.start()
    put_file(place, "first.json", b"{}")
    thread.join()
    assert order == ["chunk", "second"]


@pytest.mark.parametrize(("error", "passes"), [(errno.EINVAL, True), (errno.EBADF, True), (errno.EIO, False)])
def test_only_a_file_system_that_has_no_sync_of_folders_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, passes: bool
) -> None:
    def fail(_: str, is_folder: bool) -> None:
        if is_folder:
            raise OSError(error, os.strerror(error))

    (tmp_path / "gone").touch()
    sync_with(monkeypatch, fail)
    try:
        put_file(f"file://{tmp_path}", "receipt.json", b"{}")
        DiskFiles(f"file://{tmp_path}").delete("gone")
    except StorageError:
        assert not passes
    else:
        assert passes


def test_many_files_are_deleted_with_one_sync_of_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{folder}/{i}" for folder in "ab" for i in range(40)]
    for size, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    files, synced = DiskFiles(f"file://{tmp_path}"), list[str]()
    assert files.size(names) == {name: size for size, name in enumerate(names)}
    sync_with(monkeypatch, lambda path, _: synced.append(path))
    files.delete([*names, "c/not there"])
    assert sorted(synced) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("number", [0, 1, 2, 16, 17, 40])
def test_results_come_in_order_from_several_threads(number: int) -> None:
    threads = set[int]()

    def slow(item: int) -> int:
        threads.add(threading.get_ident())
        sleep(0.002)
        return item * item

    assert each(slow, range(number)) == [item * item for item in range(number)]
    assert len(threads) > 1 or number < 2
