"""Of millions of blocks, what commands hold in memory is some bytes each, whatever receipts hold.

The exchanges are as finished runs leave them. Receipts list more storage chunks than their blocks
have, as those of large blocks do.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path

import pytest

from bench.readers import write_volume
from chunkflow_core.audit.findings import Audit
from chunkflow_core.audit.seams import windows
from chunkflow_core.audit.stored import StoredAudit
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.reports import manifest
from chunkflow_core.reports.figures import report_of, tally_of
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.listing import disk

FEW: Vector = (32, 2, 2)
MANY: Vector = (320, 2, 2)
"""Numbers of blocks along each axis: 4 groups, and 40. Of one group, receipts may be in memory."""
NAMES = 20
"""Number of storage chunks that each receipt lists besides its own."""
LIMIT = 200
"""Bytes that each further block may take."""
SIGNATURES = 8 * 8
"""What storage says of a block's storage chunks, in bytes."""


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[VolumeSpec]:
    """Finished volumes of few blocks and of many."""
    specs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # of five thousand receipts
        for size in (FEW, MANY):
            specs.append(load_spec(write_volume(tmp_path_factory.mktemp("volume"), size, names=NAMES)))
    return specs


def report(spec: VolumeSpec) -> None:
    exchange = Exchange(spec)
    done = report_of(spec, exchange.path, tally_of(spec, exchange.all_receipts()))
    assert (done.inferred, done.blended) == (prod(spec.grid.shape), prod(spec.grid.shape) - 1)


def complete_another_run(spec: VolumeSpec) -> None:
    done = manifest.complete(spec, "another", Exchange(spec).all_receipts())
    assert done["blocks"] == {"inferred": [], "blended": [], "changed": []}


def verify(spec: VolumeSpec) -> None:
    workspace, audit = Workspace(spec), Audit()
    stored = StoredAudit(workspace, list(spec.grid.indices()), audit, deep=False, mixed=False)
    stored.run(lambda: None)
    assert (audit.findings, len(stored.complete)) == ([], prod(spec.grid.shape))
    assert len(list(windows(workspace, stored, 4, "bench", 0))) == 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "limit"), [(report, LIMIT), (complete_another_run, LIMIT), (verify, LIMIT + SIGNATURES)]
)
def test_memory_of_a_further_block(
    volumes: list[VolumeSpec],
    command: Callable[[VolumeSpec], None],
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disk, "_LISTED", 200)  # storage chunks at a time: else all that there are here
    for spec in volumes:
        command(spec)  # what is held once is there then

    few, many = (_peak(partial(command, spec)) for spec in volumes)

    assert (many - few) / (prod(MANY) - prod(FEW)) < limit


def _peak(function: Callable[[], None]) -> int:
    """Most bytes that are allocated while a function runs.

    Circles are looked for often: they would stay for longer the more there is besides.
    """
    often = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100, 2, 2)
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.set_threshold(*often)
        gc.unfreeze()


def test_a_disk_is_asked_only_for_what_a_block_has_donated_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other blocks of its group have left there costs a block nothing."""
    content = write_volume(tmp_path, (2, 2, 2))
    spec = load_spec(content)
    block, *others = list(spec.grid.indices())
    scan, seen = os.scandir, list[os.DirEntry[str]]()

    class Scanned:
        def __init__(self, folder: str) -> None:
            self._entries = scan(folder)

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            for entry in self._entries:
                seen.append(entry)
                yield entry

        def __enter__(self) -> Scanned:
            return self

        def __exit__(self, *_: object) -> None:
            self._entries.close()

    def entries_of_a_stage() -> int:
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", Scanned)
            inference_and_donate(Workspace(spec), block, why="forced")
        return len(seen)

    entries_of_a_stage()
    alone = entries_of_a_stage()
    exchange = Exchange(spec)
    for donor in others:
        for donation in (d for r in spec.grid.receivers(donor) for d in spec.grid.donations(donor, r)):
            exchange.put_donation(donation, b"sums")

    assert len(exchange.donation_keys()) > len(others)
    assert 0 < alone == entries_of_a_stage()
