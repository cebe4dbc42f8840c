"""Donations and receipts: what blocks leave for each other in shared storage.

Layout below ``<exchange>/<fingerprint>/``, in groups of 8 × 8 × 8 blocks::

    donations/<group>/<block-range>%<box-range>         weighted partial sums, self-describing
    receipts/infer/<group>/<block-range>%<mark>.json    written last by inference-and-donate
    receipts/blend/<group>/<block-range>%<mark>.json    written last by receive-and-blend
    trial.json                                          what prepare has measured, for estimates
    repair.json                                         the blocks that the last repair has undone

A listing says all that planning needs: the names of receipts have it in their marks (``marks.py``).
Groups are listed at the same time.

Files on a local disk are replaced in one step, so that a second attempt never shows a reader half a
file. Object stores do that by themselves.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

from chunkflow_core.errors import DataError, MissingInputError, StorageError
from chunkflow_core.exchange import donations, receipts
from chunkflow_core.exchange.marks import STAGES, Mark, Stage, merged, parse_mark
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.lattice.blocks import Donation, donor_part, given_box
from chunkflow_core.lattice.boxes import Vector, ceil_to, indices, vector
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.disk import PARTIAL
from chunkflow_core.storage.files import is_on_disk, open_files, put_file, storage_errors

_TRIAL = "trial.json"
_UNDONE = "repair.json"
_GROUP = 8
"""Edge of a group, in blocks."""
_LISTINGS = 16
"""Number of listings requested at a time."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one patch took when it was tried out: for estimates, never decisive."""

    seconds: float
    """Seconds per patch with all streams busy."""
    process_bytes: int
    """Peak memory of the process in bytes: interpreter, libraries, network."""
    streams: int
    """Number of patches run at a time."""


class Exchange:
    """The folder of one fingerprint in the exchange.

    What reads or writes raises ``StorageError`` if the storage does not answer, and ``SpecError``
    if it refuses the credentials.
    """

    def __init__(self, spec: VolumeSpec) -> None:
        """Open the exchange of a spec; nothing is read or written yet."""
        self.fingerprint, self.spec = spec.fingerprint, spec
        self.path = f"{plain(spec.exchange.path)}/{self.fingerprint}"
        self._origin, self._size = spec.grid.roi.start, spec.grid.block_size
        self._files = open_files(self.path)

    def put_donation(self, donation: Donation, payload: bytes | None) -> DonationEntry:
        """Store a donation, and return its entry for the donor's receipt.

        Args:
            donation: What is donated.
            payload: The compressed sums; None if all are zero, then nothing is stored.
        """
        if payload is None:
            return DonationEntry(donation.key, donation.receiver, None, 0)
        data, checksum = donations.pack(donation, payload, self.spec.output.channels, self.fingerprint)
        put_file(self.path, self._donation(donation.key), data)
        return DonationEntry(donation.key, donation.receiver, checksum, len(data))

    def get_donations(self, wanted: Iterable[tuple[Donation, DonationEntry]]) -> dict[str, bytes]:
        """Fetch donations, and check each against its donor's receipt.

        Args:
            wanted: Donations, with their entries in the donors' receipts.

        Returns:
            The compressed sums, by key; donations that are all zeros are left out.

        Raises:
            MissingInputError: A donation isn't there.
            DataError: A donation is not what its donor wrote.
            StorageError: The storage does not answer.
        """
        entries = {d.key: (d, e.checksum) for d, e in wanted if e.checksum is not None}
        with storage_errors(f"fetching donations from {self.path}"):
            answers = self._files.get([self._donation(key) for key in entries])
        found: dict[str, bytes] = {}
        for answer in answers:
            key, content = answer["path"].rpartition("/")[2], answer["content"]
            donation, checksum = entries[key]
            if content is None:
                raise MissingInputError(f"donation {key} is missing in {self.path}. {self.remedy(donation.donor)}")
            try:
                found[key] = donations.unpack(content, donation, self.spec.output.channels, self.fingerprint, checksum)
            except DataError as error:
                raise DataError(f"{error}. {self.remedy(donation.donor)}") from error
        return found

    def remedy(self, donor: Vector) -> str:
        """What a user can do when a donation of this block is missing or wrong."""
        index = " ".join(map(str, donor))
        return (
            f"Run its donor, block {donor}, again: python -m chunkflow_core.inference_and_donate SPEC --block {index} "
            f"--force (in Airflow: trigger the volume with force on that block's bounding box)"
        )

    def has_donations(self, receipt: Receipt) -> bool:
        """Whether all donations of a receipt are still there, in their full size."""
        sizes = {self._donation(entry.key): entry.bytes for entry in receipt.donations if entry.checksum is not None}
        with storage_errors(f"looking for donations in {self.path}"):
            return not sizes or dict(self._files.size(list(sizes))) == sizes

    def donation_keys(self) -> set[str]:
        """Keys of all donations there are."""
        return {name.rpartition("/")[2] for name in self._list("donations/")}

    def donations_of(self, groups: Iterable[Vector]) -> dict[Vector, list[str]]:
        """Keys of the donations that the blocks of some groups have left, by donor."""
        found: dict[Vector, list[str]] = defaultdict(list)
        for _, names in self._list_groups("donations", groups):
            for key in names:
                with suppress(ValueError):  # of what is no donation
                    given_box(key)
                    found[self._donor(key)].append(key)
        return found

    def delete_donations(self, keys: Iterable[str]) -> None:
        """Delete donations; those that aren't there are passed over."""
        self.delete_files([self._donation(key) for key in keys])

    def keep_donations(self, donor: Vector, entries: Iterable[DonationEntry]) -> None:
        """Delete the donations that a block has left and that are not among these entries."""
        kept = {entry.key for entry in entries if entry.checksum is not None}
        there = self._names_of(donor, f"donations/{_group_name(group_of(donor))}")
        self.delete_files([name for name in there if name.rpartition("/")[2] not in kept])

    def put_receipt(self, receipt: Receipt) -> None:
        """Store a receipt: the block's stage is complete from here on."""
        put_file(self.path, f"{_receipts(receipt.stage, group_of(receipt.block))}/{receipt.name}", receipt.pack())

    def receipt(self, stage: Stage, block: Vector) -> Receipt | None:
        """The receipt of a block's stage; None if there is none that counts.

        A receipt counts if it is intact and of this fingerprint, and no other one disagrees with
        it.
        """
        found = [receipt for receipt in self._parsed(self._receipt_names(stage, block)) if receipt]
        return receipts.agreed(found)

    def receipts(self, stage: Stage, groups: Iterable[Vector] | None = None) -> dict[Vector, Receipt]:
        """All receipts of a stage that count, or those of some groups, by block.

        Receipts of a block that has another box since the ROI has grown are left out.
        """
        folder, grid = f"receipts/{stage}", self.spec.grid
        listed = self._list_groups(folder, self.groups() if groups is None else groups)
        names = [f"{folder}/{_group_name(group)}/{name}" for group, found in listed for name in found]
        by_block: dict[Vector, list[Receipt]] = defaultdict(list)
        for receipt in self._parsed(names):
            if receipt and receipt.block in grid and grid.block(receipt.block).box.key == receipt.box:
                by_block[receipt.block].append(receipt)
        counting = {block: receipts.agreed(found) for block, found in by_block.items()}
        return {block: receipt for block, receipt in counting.items() if receipt is not None}

    def all_receipts(self) -> list[Receipt]:
        """All intact receipts of both stages."""
        return [receipt for stage in STAGES for receipt in self.receipts(stage).values()]

    def some_receipts(self, stage: Stage, number: int) -> list[Receipt]:
        """Up to ``number`` intact receipts of a stage, the first that are found."""
        names: list[str] = []
        for group in sorted(self._folders(f"receipts/{stage}")):
            names += self._list(f"receipts/{stage}/{group}/")[: number - len(names)]
            if len(names) >= number:
                break
        return [receipt for receipt in self._parsed(names) if receipt]

    def marks(self, stage: Stage, groups: Iterable[Vector]) -> dict[Vector, Mark]:
        """The marks of the receipts in some groups, by block.

        Blocks with receipts that disagree are left out.
        """
        found: dict[Vector, list[Mark]] = defaultdict(list)
        for group, names in self._list_groups(f"receipts/{stage}", groups):
            for name in names:
                box, _, text = name.removesuffix(".json").partition("%")
                with suppress(ValueError):
                    block, mark = self._block(box), parse_mark(stage, text)
                    if mark is not None and group_of(block) == group:
                        found[block].append(mark)
        marks: dict[Vector, Mark | None] = {}
        for block, several in found.items():
            # Names that agree may be of attempts that have read something else: the files tell.
            counts = len(several) == 1 or self.receipt(stage, block) is not None
            marks[block] = merged(several) if counts else None
        return {block: mark for block, mark in marks.items() if mark is not None}

    def put_signature(self, receipt: Receipt, signature: str) -> None:
        """Note in a receipt what storage says of the same input at present."""
        name = f"{_receipts(receipt.stage, group_of(receipt.block))}/{receipt.name}"
        if name not in self._receipt_names(receipt.stage, receipt.block):
            return  # somebody has retracted it meanwhile
        self.put_receipt(replace(receipt, signature=signature))
        self.delete_files([name])

    def retract(self, stage: Stage, block: Vector) -> None:
        """Delete a block's receipts, before anything that they vouch for is changed.

        A disk is looked at again. An object store has answered for each deletion, and another
        listing would be another request a block.

        Raises:
            StorageError: A receipt is there afterwards.
        """
        listing = partial(self._names_of, block, _receipts(stage, group_of(block)))
        self._delete_all(listing, look_again=is_on_disk(self.path))

    def delete_receipts(self) -> int:
        """Delete all receipts, those of blends first, and return how many there were.

        Raises:
            StorageError: A receipt is there afterwards.
        """
        return self._delete_all(lambda: [n for stage in reversed(STAGES) for n in self._list(f"receipts/{stage}/")])

    def groups(self) -> Iterator[Vector]:
        """All groups of the volume's blocks."""
        return indices((0, 0, 0), vector(ceil_to(n, _GROUP) // _GROUP for n in self.spec.grid.shape))

    def put_undone(self, blocks: Iterable[Vector]) -> None:
        """Remember which blocks a repair is about to undo."""
        put_file(self.path, _UNDONE, json.dumps(sorted(blocks)).encode())

    def undone(self) -> frozenset[Vector]:
        """The blocks that the last repair has undone; they may have been made right since."""
        with storage_errors(f"reading {self.path}/{_UNDONE}"):
            content = self._files.get(_UNDONE)
        return frozenset(vector(block) for block in json.loads(content or b"[]"))

    def put_trial(self, trial: Trial) -> None:
        """Store what ``prepare`` has measured."""
        put_file(self.path, _TRIAL, json.dumps(asdict(trial)).encode())

    def trial(self) -> Trial | None:
        """What ``prepare`` has measured; None if it has not run yet."""
        with storage_errors(f"reading {self.path}/{_TRIAL}"):
            content = self._files.get(_TRIAL)
        with suppress(ValueError, TypeError):
            return Trial(**json.loads(content or b""))
        return None

    def stored_groups(self) -> set[Vector]:
        """The groups of which there is any file, also beyond the volume's end."""
        found = set()
        for folder in (*(f"receipts/{stage}" for stage in STAGES), "donations"):
            for name in self._folders(folder):
                with suppress(ValueError):
                    found.add(vector(map(int, name.split("_"))))
        return found

    def stored_receipts(self, stage: Stage, groups: Iterable[Vector]) -> Iterator[tuple[str, Receipt | str]]:
        """All files among the receipts of some groups: name, and the receipt in each.

        For a file that counts for nothing there is a text that says why, instead of the receipt.
        """
        names = list(self._stored(f"receipts/{stage}", groups))
        with storage_errors(f"reading receipts in {self.path}"):
            answers = self._files.get(names) if names else []
        for answer in answers:
            name, content = answer["path"], answer["content"]
            receipt = receipts.unpack(content, self.fingerprint)
            if receipt is None and content is not None:
                yield name, receipts.why_not(content, self.fingerprint)
            elif receipt is not None:
                proper = f"{_receipts(receipt.stage, group_of(receipt.block))}/{receipt.name}"
                yield name, receipt if name == proper else f"its content is that of {proper}"

    def stored_donations(self, groups: Iterable[Vector]) -> dict[str, int]:
        """Sizes in bytes of all files among the donations of some groups, by name."""
        sizes: dict[str, int] = {}
        for group in groups:
            with storage_errors(f"listing donations in {self.path}"):
                sizes.update(self._files.list(prefix=f"donations/{_group_name(group)}/", size=True))
        return {name: size for name, size in sizes.items() if not name.endswith(PARTIAL)}

    def owner(self, name: str) -> Vector | None:
        """The block that a stored file is of, by its name; None if the volume has no such block."""
        _, group, text = name.rsplit("/", 2)
        with suppress(ValueError):
            block = self._block(text.partition("%")[0])
            if block in self.spec.grid and group == _group_name(group_of(block)):
                return block
        return None

    def delete_files(self, names: Iterable[str]) -> None:
        """Delete stored files, by name."""
        with storage_errors(f"deleting files in {self.path}"):
            self._files.delete(list(names))

    def _delete_all(self, listing: Callable[[], list[str]], *, look_again: bool = True) -> int:
        """Delete what a listing names, look whether any is left, and return how many there were.

        A receipt that stays, or that another attempt leaves meanwhile, would vouch for what is
        going to be replaced.
        """
        if not (names := listing()):
            return 0
        self.delete_files(names)
        if look_again and (left := listing()):
            raise StorageError(
                f"{self.path}: {len(names)} files have been deleted, and there are {len(left)}, such as {left[0]}. "
                "Another attempt may have written them meanwhile: run again when it has ended"
            )
        return len(names)

    def _stored(self, folder: str, groups: Iterable[Vector]) -> Iterator[str]:
        for group, names in self._list_groups(folder, groups):
            yield from (f"{folder}/{_group_name(group)}/{name}" for name in names)

    def _donation(self, key: str) -> str:
        return f"donations/{_group_name(group_of(self._donor(key)))}/{key}"

    def _donor(self, key: str) -> Vector:
        return self._block(donor_part(key))

    def _block(self, box_key: str) -> Vector:
        """Index of the block with a range; ``ValueError`` if the text is no range."""
        x, y, z = box_key.split("_")
        return (
            (int(z[: z.index("-", 1)]) - self._origin[0]) // self._size[0],
            (int(y[: y.index("-", 1)]) - self._origin[1]) // self._size[1],
            (int(x[: x.index("-", 1)]) - self._origin[2]) // self._size[2],
        )

    def _receipt_names(self, stage: Stage, block: Vector) -> list[str]:
        box = self.spec.grid.block(block).box
        return self._list(f"{_receipts(stage, group_of(block))}/{box.key}%")

    def _names_of(self, block: Vector, folder: str) -> list[str]:
        """Files of a block in a group's folder.

        Those from before the ROI grew, when the block ended elsewhere, are among them.
        """
        x = self.spec.grid.block(block).box.start[2]
        return [name for name in self._list(f"{folder}/{x}-") if self.owner(name) == block]

    def _list_groups(self, folder: str, groups: Iterable[Vector]) -> Iterator[tuple[Vector, list[str]]]:
        """Names of the files in some groups of a folder, without their path."""
        wanted = list(groups)
        if len(wanted) > _LISTINGS:  # most may not be there yet
            there = set(self._folders(folder))
            wanted = [group for group in wanted if _group_name(group) in there]
        prefixes = [f"{folder}/{_group_name(group)}/" for group in wanted]
        with ThreadPoolExecutor(_LISTINGS, thread_name_prefix="list") as pool:
            for group, prefix, names in zip(wanted, prefixes, pool.map(self._list, prefixes), strict=True):
                yield group, [name[len(prefix) :] for name in names]

    def _folders(self, folder: str) -> Iterator[str]:
        with storage_errors(f"listing {self.path}/{folder}"):
            for name in self._files.list(prefix=f"{folder}/", flat=True):
                yield name.rstrip("/").rpartition("/")[2]

    def _list(self, prefix: str) -> list[str]:
        with storage_errors(f"listing {self.path}/{prefix}"):
            return [name for name in self._files.list(prefix=prefix) if not name.endswith(PARTIAL)]

    def _parsed(self, names: list[str]) -> Iterator[Receipt | None]:
        """The receipts in some files; None for one that is not intact, or has another name."""
        with storage_errors(f"reading receipts in {self.path}"):
            answers = self._files.get(names) if names else []
        for answer in answers:
            receipt = receipts.unpack(answer["content"], self.fingerprint)
            yield receipt if receipt and answer["path"].endswith(f"/{receipt.name}") else None


def group_of(block: Vector) -> Vector:
    """The group that a block is in."""
    z, y, x = block
    return (z // _GROUP, y // _GROUP, x // _GROUP)


def _group_name(group: Vector) -> str:
    return "{}_{}_{}".format(*group)


def _receipts(stage: Stage, group: Vector) -> str:
    return f"receipts/{stage}/{_group_name(group)}"
