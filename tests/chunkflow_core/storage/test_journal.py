"""Entries of a journal are each made by one process alone, on a disk, in S3 and in GCS."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from chunkflow_core.errors import SpecError, StorageError
from chunkflow_core.storage.files import create_file, open_files
from chunkflow_core.storage.journal import Entry, Journal
from tests.support.object_storage import Fault
from tests.support.stores import Store

Use = Callable[[str], Store]

_RACE = """
import sys
from chunkflow_core.storage.files import create_file
place, name = sys.argv[1:]
print(*(int(create_file(place, f"{i}.json", f"{name} {i}".encode())) for i in range(300)))
"""


@pytest.fixture(params=["file", "s3", "gs"])
def place(request: pytest.FixtureRequest, use: Use, tmp_path: Path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else f"{use(request.param).root}/{tmp_path.name}"


def test_of_several_one_makes_the_file(place: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            contents = [f"{number} {thread}".encode() for thread in range(8)]
            made = list(pool.map(partial(create_file, place, f"{number}.json"), contents))
            assert made.count(True) == 1
            assert open_files(place).get(f"{number}.json") == contents[made.index(True)]


def test_of_several_processes_one_makes_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RACE, f"file://{tmp_path}"]
    racers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("one", "another")]
    one, another = ([int(made) for made in racer.communicate()[0].split()] for racer in racers)
    assert [a + b for a, b in zip(one, another, strict=True)] == [1] * 300
    for number, made in enumerate(one):
        assert (tmp_path / f"{number}.json").read_text() == f"{'one' if made else 'another'} {number}"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert create_file(f"file://{tmp_path}", "a.json", b"first")
    assert not create_file(f"file://{tmp_path}", "a.json", b"second")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", b"first")]


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_an_answer_that_is_lost(use: Use, tmp_path: Path, kind: str) -> None:
    """The request is sent again and refused, since it has been done."""
    store = use(kind)
    place = f"{store.root}/{tmp_path.name}"
    store.proxy.faults.append(Fault("lose", r"^(PUT|POST) ", times=1))
    assert create_file(place, "a.json", b"mine")
    assert not create_file(place, "a.json", b"another's")
    assert store.proxy.faults[0].done == 1
    assert open_files(place).get("a.json") == b"mine"


def test_a_store_that_knows_no_conditions(use: Use, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = use("s3")
    place = f"{store.root}/{tmp_path.name}"
    store.proxy.faults[:] = [Fault("refuse", r"^PUT ", times=1, status=501)]
    assert create_file(place, "b.json", b"first")
    assert "knows no If-None-Match" in caplog.text
    store.proxy.faults[:] = [Fault("refuse", r"^PUT ", times=1, status=501)]
    assert not create_file(place, "b.json", b"second")
    assert open_files(place).get("b.json") == b"first"


def test_a_store_that_takes_no_notice_of_conditions(use: Use, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = use("s3")
    journal = Journal(f"{store.root}/{tmp_path.name}", "claims")
    with caplog.at_level(logging.WARNING):
        first = journal.add(None, {"a": 1})
        assert not caplog.records
        open_files(f"{store.root}/{tmp_path.name}").delete(["claims/00000001.json"])
        store.proxy.faults.append(Fault("ignore", r"^PUT "))
        journal.add(None, {"a": 2})
    assert "takes no notice of If-None-Match" in caplog.text
    assert journal.last() == Entry(1, {"a": 2}) != first


def test_what_is_no_condition_is_refused_at_once(use: Use, tmp_path: Path) -> None:
    store = use("s3")
    store.proxy.faults.append(Fault("refuse", r"^PUT ", status=403))
    with pytest.raises(SpecError):
        create_file(f"{store.root}/{tmp_path.name}", "a.json", b"")


def test_entries(place: str) -> None:
    journal, others = Journal(place, "claims"), Journal(place, "claims")
    assert (journal.last(), journal.numbers()) == (None, [])
    first = journal.add(None, {"who": "a"})
    assert first == others.last() == others.after(first) == Entry(1, {"who": "a"})
    with pytest.raises(StorageError, match=r"claims/00000001\.json has just been written by somebody else"):
        others.add(None, {"who": "b"})
    second = others.add(first, {"who": "b"})
    third = others.add(second, {"who": "c"})
    assert journal.after(first) == journal.after(third) == third
    with pytest.raises(StorageError, match="look again"):
        journal.add(first, {"who": "d"})
    assert journal.replace(third, {"who": "c", "since": 1}) == journal.last()
    assert journal.read([1, 2, 7]) == {1: first, 2: second}

    journal.delete_before(3)
    assert journal.numbers() == [3]
    assert journal.after(second) == journal.last(), "an entry that has been deleted since is followed by the last"
    journal.delete_before(4)
    assert journal.after(second) is None


def test_what_is_no_entry(tmp_path: Path) -> None:
    journal = Journal(f"file://{tmp_path}", "claims")
    journal.add(None, {})
    for name in ("notes.txt", "00000001 (1).json", ".hidden.json"):
        (tmp_path / "claims" / name).touch()
    assert journal.numbers() == [1]
    (tmp_path / "claims" / "00000002.json").write_text("[1]")
    with pytest.raises(StorageError, match=r"00000002\.json can't be read"):
        journal.last()
