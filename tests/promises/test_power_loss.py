"""The power may fail at any moment: nothing is believed afterwards that is not true.

Volumes are made on a disk while every call that changes a file is recorded. After each of them,
whatever a power loss may leave is looked at: where a receipt may be there, all that it vouches for
has to be there, whatever else is lost. Some of it is made, and a run goes on with it.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from random import Random

import numpy as np
import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.errors import DataError
from chunkflow_core.exchange import donations
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.receipts import DonationEntry, Receipt, unpack
from chunkflow_core.lattice.blocks import Donation
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.storage import files
from chunkflow_core.storage.compression import EXTENSIONS, decompress
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.durable import sync_written
from chunkflow_core.storage.layer_reader import cloudvolume_slices
from tests.support.power_loss import Disk, Recording, Step, recorded
from tests.support.volume import CHUNK, output_of, write_volume

RUN = ("run", "--seams", "0")
OTHER_MODEL = "model.threads=2"
"""Another model, as far as the fingerprint goes; it gives the same voxels."""
SCENES: dict[str, tuple[str, ...]] = {
    "first run": RUN,
    "changed input": (*RUN, "--check-input"),
    "forced": (*RUN, "--force"),
    "another model": (*RUN, "--set", OTHER_MODEL, "--overwrite"),
    "the first model again": (*RUN, "--overwrite"),
}
"""What is run while it is recorded, by what has happened before.

In all but the first, the output is there, and the input has changed since.
"""


def run(spec: Path, arguments: tuple[str, ...], *more: str) -> None:
    command, *options = arguments
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = main([command, str(spec), *options, *more])
    assert code == 0, told.getvalue()


def change_input(layer: Path) -> None:
    from cloudvolume import CloudVolume

    volume = CloudVolume(f"file://{layer}", progress=False)
    volume[cloudvolume_slices(Box((8, 16, 16), (16, 32, 32)))] = np.full((*reversed(CHUNK), 1), 7, np.uint8)


def record(folder: Path, scene: str) -> tuple[Path, Recording]:
    """Make a volume, and do what the scene says; return its spec, and a record of the last run."""
    path = write_volume(folder)
    if scene != "first run":
        run(path, RUN)
        change_input(folder / "input")
    if scene == "the first model again":
        run(path, SCENES["another model"])
    with recorded(folder / "output", folder / "exchange") as recording:
        run(path, SCENES[scene])
    return path, recording


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Recording]]:
    """Records a scene once for all tests that only look at what was recorded."""
    return cache(lambda scene: record(tmp_path_factory.mktemp("scene"), scene))


@dataclass(frozen=True)
class Vouching:
    """What receipts vouch for, held against all that a disk may have."""

    output: Path
    exchange: Path
    recording: Recording
    specs: tuple[VolumeSpec, ...]

    def lies(self, disk: Disk) -> Iterator[str]:
        """What a receipt that counts may vouch for without its being there."""
        epochs = self._epochs(disk)
        for path in [path for path in disk.entries if "/receipts/" in path and path.endswith(".json")]:
            fingerprint, epoch, *_ = Path(path).relative_to(self.exchange).parts
            for spec in [
                spec for spec in self.specs if (fingerprint, epoch) in epochs and spec.fingerprint == fingerprint
            ]:
                for content, step in self._contents(disk, Path(path)):
                    receipt = unpack_once(content, spec.fingerprint)
                    if receipt is not None:
                        lies = [*self._chunks(receipt, disk), *self._donations(spec, epoch, receipt, step, disk)]
                        yield from (f"{path}: {lie}" for lie in lies)

    def _epochs(self, disk: Disk) -> set[tuple[str, str]]:
        """Fingerprint and epoch of all that the last claim may be: a later one may be lost."""
        found = set()
        for path in sorted((path for path in disk.entries if "/claims/0" in path), reverse=True):
            found |= {claimed(content) for content, _ in self._contents(disk, Path(path))}
            if all(isinstance(value, int) for value, _ in disk.values(path)):
                break
        return found

    @cached_property
    def _donation_paths(self) -> dict[tuple[str, str], str]:
        """Paths of all donations that ever were there, by epoch and key."""
        named = [step.path for step in self.recording.steps if step.kind == "name"]
        inside = [(path, Path(path).relative_to(self.exchange).parts) for path in named if "/donations/" in path]
        return {(parts[1], parts[-1]): path for path, parts in inside}

    def _contents(self, disk: Disk, path: Path) -> list[tuple[bytes, int]]:
        values = disk.values(str(path))
        return [(self.recording.files[value].content, step) for value, step in values if isinstance(value, int)]

    def _chunks(self, receipt: Receipt, disk: Disk) -> Iterator[str]:
        for name, voxels in receipt.voxels.items():
            paths = {path: disk.values(path) for path in chunk_paths(self.output, name)}
            certain = any(all(isinstance(value, int) for value, _ in values) for values in paths.values())
            found = [(value, path) for path, values in paths.items() for value, _ in values if isinstance(value, int)]
            right = (
                value in disk.synced and digest(self.recording.files[value].content, Path(path).suffix) == voxels
                for value, path in found
            )
            if not certain or not all(right):
                yield f"storage chunk {name}"

    def _donations(self, spec: VolumeSpec, epoch: str, receipt: Receipt, since: int, disk: Disk) -> Iterator[str]:
        for entry in (entry for entry in receipt.donations if entry.checksum is not None):
            for value, step in disk.values(self._donation_paths.get((epoch, entry.key), "")):
                used = not isinstance(value, int) and step >= since  # deleted, at the latest before the recording
                whole = isinstance(value, int) and value in disk.synced
                content = self.recording.files[value].content if isinstance(value, int) else b""
                if not used and not (whole and is_donation(content, spec, receipt.block, entry)):
                    yield f"donation {entry.key}"


@cache
def unpack_once(content: bytes, fingerprint: str) -> Receipt | None:
    return unpack(content, fingerprint)


@cache
def claimed(claim: bytes) -> tuple[str, str]:
    """Fingerprint and epoch of a claim."""
    step = json.loads(claim)["method"]
    return step["fingerprint"], step["epoch"]


@cache
def digest(content: bytes, extension: str) -> str:
    return short_digest(decompress(content, EXTENSIONS[extension]))


@cache
def chunk_paths(output: Path, name: str) -> list[str]:
    return [f"{output}/4_4_40/{name}{extension}" for extension in EXTENSIONS]


_DONATIONS: dict[tuple[bytes, str | None], bool] = {}


def is_donation(content: bytes, spec: VolumeSpec, donor: tuple[int, int, int], entry: DonationEntry) -> bool:
    """Whether a file is the donation of which an entry of a receipt speaks."""
    known = content, entry.checksum
    if known not in _DONATIONS:
        given: list[Donation] = spec.grid.donations(donor, entry.receiver)
        donation = next(donation for donation in given if donation.key == entry.key)
        try:
            donations.unpack(content, donation, spec.output.summed_channels, spec.fingerprint, str(entry.checksum))
        except DataError:
            _DONATIONS[known] = False
        else:
            _DONATIONS[known] = True
    return _DONATIONS[known]


def vouching(path: Path, recording: Recording) -> Vouching:
    specs = load_spec(path), load_spec(path, [OTHER_MODEL])
    return Vouching(path.parent / "output", path.parent / "exchange", recording, specs)


def is_json(content: bytes) -> bool:
    """Whether a file is one that is read as JSON: of its beginning alone, that can't be done."""
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def all_lies(path: Path, recording: Recording, steps: list[Step]) -> Iterator[str]:
    """What may be believed without being true, after any of the steps."""
    disk, receipts = Disk(recording), vouching(path, recording)
    for number, step in enumerate(steps):
        disk.apply(step)
        if step.kind == "name" and step.file not in disk.synced and is_json(recording.files[step.file].content):
            yield f"step {number}: {step.path} may be cut short"
        if step.kind in ("name", "delete"):  # a sync leaves less that is possible, and never more
            yield from (f"step {number}: {lie}" for lie in receipts.lies(disk))


@pytest.mark.parametrize("scene", SCENES)
def test_what_is_believed_after_a_power_loss_is_true(
    scenes: Callable[[str], tuple[Path, Recording]], scene: str
) -> None:
    path, recording = scenes(scene)
    counting = [r for stage in ("infer", "blend") for r in Exchange(load_spec(path)).receipts(stage)]
    assert len(counting) == 15 or scene == "another model"
    assert sum(step.kind == "name" and "/receipts/" in step.path for step in recording.steps) >= 8
    assert next(all_lies(path, recording, recording.steps), None) is None


def test_folders_that_another_process_has_made_last_too(tmp_path: Path) -> None:
    """It may have been killed, or be about to sync what is above them."""
    path = write_volume(tmp_path)
    exchange = tmp_path / "exchange" / load_spec(path).fingerprint
    with recorded(tmp_path / "output", tmp_path / "exchange") as recording:
        for folder in (tmp_path / "output" / "4_4_40", tmp_path / "output" / "claims", exchange):
            folder.mkdir(parents=True)
        run(path, RUN)
    assert next(all_lies(path, recording, recording.steps), None) is None


def without(kind: str, below: str = "") -> Callable[[list[Step]], list[Step]]:
    return lambda steps: [step for step in steps if step.kind != kind or below not in step.path]


def without_syncs_after_deletion(steps: list[Step]) -> list[Step]:
    kept, deleted = list[Step](), False
    for step in steps:
        if step.kind != "sync folder" or not deleted:
            kept.append(step)
        deleted = step.kind == "delete" and "/receipts/" in step.path
    return kept


@pytest.mark.parametrize(
    ("scene", "harm"),
    [
        ("first run", without("sync file")),
        ("first run", without("sync file", below="/output/4_4_40/")),
        ("first run", without("sync file", below="/donations/")),
        ("first run", without("sync file", below="/receipts/")),
        ("first run", without("sync folder")),
        ("first run", without("sync folder", below="/output/4_4_40")),
        ("first run", without("sync folder", below="/donations")),
        ("changed input", without_syncs_after_deletion),
        ("forced", without_syncs_after_deletion),
        ("another model", without("sync folder", below="/claims")),
        ("the first model again", without("sync folder", below="/claims")),
        ("first run", without("sync file", below="/claims/")),
    ],
)
def test_a_sync_that_is_left_out_is_noticed(
    scenes: Callable[[str], tuple[Path, Recording]], scene: str, harm: Callable[[list[Step]], list[Step]]
) -> None:
    path, recording = scenes(scene)
    assert next(all_lies(path, recording, harm(recording.steps)), None) is not None


def test_a_receipt_before_what_it_vouches_for_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Exchange.put_receipt

    def put_too_early(self: Exchange, receipt: Receipt) -> None:
        put(self, receipt)
        sync_written()

    monkeypatch.setattr(files, "sync_written", lambda: None)
    monkeypatch.setattr(Exchange, "put_receipt", put_too_early)
    path, recording = record(tmp_path, "first run")
    assert next(all_lies(path, recording, recording.steps), None) is not None


@pytest.mark.parametrize("losses", [2, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("scene", SCENES)
def test_a_run_after_a_power_loss_ends_with_the_same_voxels(tmp_path: Path, scene: str, losses: int) -> None:
    path, recording = record(tmp_path, scene)
    right, random = output_of(path), Random(f"{scene} {losses}")
    for _ in range(losses):
        disk = Disk(recording)
        for step in recording.steps[: random.randrange(len(recording.steps) + 1)]:
            disk.apply(step)
        disk.draw(random)
        run(path, SCENES[scene], "--take-over")  # this process goes on, as none does in earnest
        assert np.array_equal(output_of(path), right)
        other = ("--set", OTHER_MODEL) if scene == "another model" else ()
        assert main(["verify", str(path), "--deep", *other]) == 0
