"""What can go wrong with a finished volume.

Each harm comes with what an audit has to say of it, and what mending it may touch.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chunkflow_core.__main__ import main
from chunkflow_core.exchange.codec import compress, decompress
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.workspace import Workspace
from tests.support.volume import files_below, write_volume

LAST: Vector = (1, 1, 1)
CORE = "32-40_32-40_16-20"
"""A storage chunk of the last block's core."""
FRAME = "24-32_24-32_12-16"
"""A storage chunk of the last block's frame."""


_PARTS = ("input", "output", "exchange")


class Volume:
    """A finished volume, whose donations are kept. It can be put back to what it was."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, write_volume(folder)
        assert main(["run", str(self.path), "--seams", "0", "--set", "exchange.donations=keep"]) == 0
        self.spec: VolumeSpec = load_spec(self.path, ["exchange.donations=keep"])
        self.scale = next(path for path in (folder / "output").iterdir() if re.fullmatch(r"\d+_\d+_\d+", path.name))
        self.exchange = Path(Exchange(self.spec).path.removeprefix("file://"))
        for part in _PARTS:
            shutil.copytree(folder / part, folder / f"{part} as it was")
        self.healthy = self.contents()
        self.times = self.written()

    def restore(self) -> None:
        for part in _PARTS:
            shutil.rmtree(self.folder / part)
            shutil.copytree(self.folder / f"{part} as it was", self.folder / part)

    def contents(self) -> tuple[dict[str, bytes], set[str]]:
        """The storage chunks, and the names of all receipts, which say what they are for.

        What storage has said of storage chunks is left out: it is another thing each time.
        """
        names = (path.name.split("%") for path in self.exchange.rglob("receipts/*/*/*.json"))
        return files_below(self.scale), {"%".join([box, geometry, *rest]) for box, geometry, _, *rest in names}

    def written(self) -> dict[str, int]:
        """When each storage chunk was written."""
        return {path.name.removesuffix(".gz"): path.stat().st_mtime_ns for path in self.scale.iterdir()}

    def chunk(self, name: str) -> Path:
        return self.scale / f"{name}.gz"

    def receipt_file(self, stage: Stage, block: Vector) -> Path:
        return next(self.exchange.glob(f"receipts/{stage}/0_0_0/{self.spec.grid.block(block).box.key}%*.json"))

    def receipt(self, stage: Stage, block: Vector) -> Receipt:
        receipt = Exchange(self.spec).receipt(stage, block)
        assert receipt is not None
        return receipt

    def donation_file(self, donor: Vector = (0, 1, 1), receiver: Vector = LAST) -> Path:
        folder = self.exchange / "donations" / "0_0_0" / self.spec.grid.block(donor).name
        return folder / self.spec.grid.donations(donor, receiver)[0].key

    def chunks_of(self, *stages: tuple[Stage, Vector]) -> set[str]:
        """The storage chunks that some stages write."""
        return {name for stage, block in stages for name in self.receipt(stage, block).written}


@dataclass(frozen=True)
class Harm:
    """One way to harm a volume."""

    do: Callable[[Volume], object]
    kinds: frozenset[str]
    """Kinds of all that is found."""
    told: str
    """What is said of the harm."""
    blocks: frozenset[Vector]
    """Blocks that are to be made right."""
    rewritten: tuple[tuple[Stage, Vector], ...] = ()
    """The stages that may write again."""
    deep: bool = False
    """Whether only a deep audit finds the harm."""
    seams: int = 0
    """Number of seams that are needed to find the harm."""

    def __str__(self) -> str:
        return self.do.__name__


def core_chunk_lost(volume: Volume) -> None:
    volume.chunk(CORE).unlink()


def frame_chunk_lost(volume: Volume) -> None:
    volume.chunk(FRAME).unlink()


def core_voxel_flipped(volume: Volume) -> None:
    _flip_voxel(volume.chunk(CORE))


def frame_voxel_flipped(volume: Volume) -> None:
    _flip_voxel(volume.chunk(FRAME))


def frame_chunk_of_another_size(volume: Volume) -> None:
    file = volume.chunk(FRAME)
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-40]))


def core_chunk_not_to_be_decompressed(volume: Volume) -> None:
    _flip(volume.chunk(CORE))


def donation_cut_off(volume: Volume) -> None:
    file = volume.donation_file()
    file.write_bytes(file.read_bytes()[:-10])


def donation_bit_flipped(volume: Volume) -> None:
    _flip(volume.donation_file())


def donation_of_no_block(volume: Volume) -> None:
    group = volume.exchange / "donations" / "9_9_9"
    group.mkdir()
    shutil.copy(volume.donation_file(), group / "1728-1752_1728-1752_864-876%1728-1736_1728-1736_864-868")


def donation_that_no_receipt_lists(volume: Volume) -> None:
    file = volume.donation_file()
    shutil.copy(file, file.with_name(f"{file.name.partition('%')[0]}%24-28_24-28_12-13"))


def donor_without_receipt(volume: Volume) -> None:
    volume.receipt_file("infer", LAST).unlink()


def receipt_cut_off(volume: Volume) -> None:
    file = volume.receipt_file("blend", LAST)
    file.write_text(file.read_text()[:-50])


def receipt_under_another_name(volume: Volume) -> None:
    file = volume.receipt_file("blend", (0, 0, 1))
    shutil.copy(volume.receipt_file("blend", LAST), file)


def receipt_of_another_fingerprint_in_its_place(volume: Volume) -> None:
    ours = volume.receipt_file("blend", LAST)
    ours.unlink()
    shutil.copy(_of_another_fingerprint(volume), ours.parent)


def receipt_of_another_fingerprint_beside_it(volume: Volume) -> None:
    shutil.copy(_of_another_fingerprint(volume), volume.receipt_file("blend", LAST).parent)


def receipts_that_disagree(volume: Volume) -> None:
    receipt = volume.receipt("blend", LAST)
    consumed = dict.fromkeys(receipt.consumed, "somethingelse")
    Exchange(volume.spec).put_receipt(replace(receipt, consumed=consumed))


def stray_chunks(volume: Volume) -> None:
    for name in ("0-16_0-16_0-8", "0-8_0-8_0-3", "40-48_0-8_0-4", "0-8_0-8_20-24", "00-8_0-8_0-4", "notes.txt"):
        shutil.copy(volume.chunk(CORE), volume.scale / f"{name}.gz")


def wrong_seam_that_was_vouched_for(volume: Volume) -> None:
    """A seam as from a machine whose memory had failed when it blended."""
    for box in volume.spec.grid.block(LAST).frame:
        write_wrong(volume.spec, box)


def wrong_donation_that_was_vouched_for(volume: Volume) -> None:
    """A donation as from a machine whose memory had failed when it inferred."""
    workspace, donor = Workspace(volume.spec), (0, 1, 1)
    exchange, receipt, changed = workspace.exchange, volume.receipt("infer", donor), dict[str, DonationEntry]()
    entries = {entry.key: entry for entry in receipt.donations}
    for donation in volume.spec.grid.donations(donor, LAST):
        payload = exchange.get_donations([(donation, entries[donation.key])])[donation.key]
        sums = decompress(payload, 2, donation.box.shape)
        changed[donation.key] = exchange.put_donation(donation, compress(sums * np.float32(0.5)))
    exchange.retract("infer", donor)
    exchange.put_receipt(replace(receipt, donations=tuple(changed.get(e.key, e) for e in receipt.donations)))
    receive_and_blend(workspace, LAST)


def write_wrong(spec: VolumeSpec, box: Box) -> None:
    """Change each voxel of a box of the output by one bit, and let receipts vouch for that."""
    workspace = Workspace(spec)
    written = workspace.output.write(box, np.nextafter(workspace.output.read(box), np.float32(2)))
    for receipt in workspace.exchange.all_receipts():
        chunks = {name: written.get(name, chunk) for name, chunk in receipt.written.items()}
        if chunks != receipt.written:
            stored = workspace.outputs.as_written(workspace.output, receipt.stage, receipt.block, chunks)
            workspace.exchange.retract(receipt.stage, receipt.block)
            workspace.exchange.put_receipt(replace(receipt, written=chunks, stored=stored))


def _of_another_fingerprint(volume: Volume) -> Path:
    """The last block's receipt of blending, by another model with the same geometry."""
    spec, other = str(volume.path), volume.folder / "other"
    changes = [f"output.path=file://{other}/output", f"exchange.path=file://{other}/exchange", "model.threads=2"]
    if not other.exists():
        assert main(["run", spec, "--seams", "0", *(arg for change in changes for arg in ("--set", change))]) == 0
    box = volume.spec.grid.block(LAST).box.key
    return next((other / "exchange").glob(f"*/*/receipts/blend/0_0_0/{box}%*.json"))


def _flip(file: Path) -> None:
    """Flip a bit in the middle: the checksum of gzip, or our own, does not match any more.

    Nobody has written it: a medium that fails says nothing.
    """
    data, times = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _flip_voxel(file: Path) -> None:
    voxels = bytearray(gzip.decompress(file.read_bytes()))
    voxels[len(voxels) // 2] ^= 1
    file.write_bytes(gzip.compress(voxels))


def _kinds(*names: str) -> frozenset[str]:
    return frozenset(names)


def _blocks(*blocks: Vector) -> frozenset[Vector]:
    return frozenset(blocks)


_MISSING, _WRONG, _RECEIPT, _DONATION = map(_kinds, ("missing chunk", "wrong chunk", "receipt", "donation"))
_LAST, _NONE = _blocks(LAST), _blocks()
_INFER_LAST: tuple[Stage, Vector] = ("infer", LAST)
_BLEND_LAST: tuple[Stage, Vector] = ("blend", LAST)

HARMS = [
    Harm(core_chunk_lost, _MISSING, f"the storage chunk {CORE} is missing", _LAST, (_INFER_LAST,)),
    Harm(frame_chunk_lost, _MISSING, f"the storage chunk {FRAME} is missing", _LAST, (_BLEND_LAST,)),
    Harm(core_voxel_flipped, _WRONG, f"the storage chunk {CORE} is wrong: its voxels", _LAST, (_INFER_LAST,)),
    Harm(frame_voxel_flipped, _WRONG, f"the storage chunk {FRAME} is wrong", _LAST, (_BLEND_LAST,)),
    Harm(frame_chunk_of_another_size, _WRONG, f"{FRAME} is wrong", _LAST, (_BLEND_LAST,)),
    Harm(core_chunk_not_to_be_decompressed, _WRONG, "can't be decompressed", _LAST, (_INFER_LAST,), deep=True),
    Harm(donation_cut_off, _DONATION, "bytes, the receipt of its donor says", _blocks((0, 1, 1))),
    Harm(donation_bit_flipped, _DONATION, "the checksum of its content does not", _blocks((0, 1, 1)), deep=True),
    Harm(donation_of_no_block, _DONATION, "its donor is no block of the volume", _NONE),
    Harm(donation_that_no_receipt_lists, _DONATION, "the receipt of its donor does not list it", _blocks((0, 1, 1))),
    Harm(
        donor_without_receipt,
        _kinds("donation", "incomplete"),
        "inference is not complete",
        _LAST,
        (_INFER_LAST,),
    ),
    Harm(receipt_cut_off, _kinds("receipt", "incomplete"), "it is not intact", _LAST, (_BLEND_LAST,)),
    Harm(
        receipt_under_another_name,
        _kinds("receipt", "incomplete"),
        "its content is that of receipts/blend/0_0_0/24-40_24-48_12-20%",
        _blocks((0, 0, 1)),
        (("blend", (0, 0, 1)),),
    ),
    Harm(
        receipt_of_another_fingerprint_in_its_place,
        _kinds("receipt", "incomplete"),
        "it is of another fingerprint",
        _LAST,
        (_BLEND_LAST,),
    ),
    Harm(receipt_of_another_fingerprint_beside_it, _RECEIPT, "it is of another fingerprint", _LAST),
    Harm(
        receipts_that_disagree,
        _kinds("receipt", "incomplete"),
        "2 receipts of the same stage disagree",
        _LAST,
        (_BLEND_LAST,),
    ),
    Harm(stray_chunks, _kinds("stray chunk"), "lies among the storage chunks", _NONE),
    Harm(
        wrong_seam_that_was_vouched_for,
        _kinds("seam"),
        "differ from a fresh computation",
        _LAST,
        (_BLEND_LAST,),
        seams=12,
    ),
    Harm(
        wrong_donation_that_was_vouched_for,
        _kinds("seam"),
        "differ from a fresh computation",
        _LAST,
        (("infer", (0, 1, 1)), _BLEND_LAST),
        seams=12,
    ),
]
