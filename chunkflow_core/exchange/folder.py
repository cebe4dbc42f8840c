"""Donations and receipts: what blocks leave for each other in shared storage.

Layout below ``<exchange>/<fingerprint>/<epoch>/``, in groups of 8 × 8 × 8 blocks::

    donations/<group>/<block>/<block-range>%<box-range> weighted partial sums, self-describing
    receipts/infer/<group>/<block-range>%<mark>.json    written last by inference-and-donate
    receipts/blend/<group>/<block-range>%<mark>.json    written last by receive-and-blend
    receipts/…/<block-range>%<digest>%<digest>.same     what storage said of one content, and says
    trial.json                                          what prepare has measured, for estimates
    reference.json                                      what the network gives on the first machine
    repair.json                                         the blocks that the last repair has undone

An epoch (``claims.py``) begins when the spec takes the output layer. What was left in an earlier
one, or is left there late, counts for nothing; cleaning up deletes it.

A listing says all that planning needs: the names of receipts have it in their marks (``marks.py``).
Groups are listed at the same time. A note (``.same``) says what has been found out by reading
voxels: that what storage describes in one way has the content that it described in another way
before. It is true for ever, whatever becomes of the receipt, and is thrown away with it.

A block may leave hundreds of donations. They are in a folder of its own, since a disk lists a whole
folder: each block would pay for all of its group.

Files on a local disk are replaced in one step, so that a second attempt never shows a reader half a
file. Object stores do that by themselves.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import groupby

from chunkflow_core.errors import DataError, MissingInputError, StorageError
from chunkflow_core.exchange import donations, receipts
from chunkflow_core.exchange.claims import Claim, Claims
from chunkflow_core.exchange.counting import NOTE, VOID, BlockFiles
from chunkflow_core.exchange.donations import WrongDonationsError
from chunkflow_core.exchange.epochs import folder_of
from chunkflow_core.exchange.groups import group_name, group_of, groups_of
from chunkflow_core.exchange.marks import STAGES, Mark, Stage
from chunkflow_core.exchange.receipts import DonationEntry, Receipt
from chunkflow_core.lattice.blocks import Donation, donor_part, given_box
from chunkflow_core.lattice.boxes import Vector, vector
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.disk import PARTIAL, local_path
from chunkflow_core.storage.durable import sync_folders
from chunkflow_core.storage.files import Files, is_on_disk, open_files, put_file, storage_errors

_UNCLAIMED = "unclaimed"
"""Where a spec has left nothing, since the output layer is not its own."""
_TRIAL = "trial.json"
_UNDONE = "repair.json"
_LISTINGS = 16
"""Number of listings requested at a time."""
_FETCHED = 64
"""Number of receipts fetched at a time: of a large block, one has a hundred kilobytes."""


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
    """The folder of one fingerprint in the exchange, of the epoch that holds when it is first used.

    What reads or writes raises ``StorageError`` if the storage does not answer, and ``SpecError``
    if it refuses the credentials.
    """

    def __init__(self, spec: VolumeSpec, epoch: str = "") -> None:
        """Open the exchange of a spec; nothing is read or written yet.

        Args:
            spec: The volume.
            epoch: Name of the epoch; default: the spec's present one, as the last claim on its
                output says, which is looked up at the first use.
        """
        self.fingerprint, self.spec = spec.fingerprint, spec
        self._claims = Claims(spec)
        self._held: Claim | None = None
        if epoch:
            self.epoch = epoch
        self._origin, self._size = spec.grid.roi.start, spec.grid.block_size

    @cached_property
    def path(self) -> str:
        """Address of the folder."""
        return f"{folder_of(self.spec)}/{self.epoch}"

    @cached_property
    def epoch(self) -> str:
        """Name of the epoch."""
        self._held = self._claims.own()
        return self._held.epoch if self._held else _UNCLAIMED

    @cached_property
    def _files(self) -> Files:
        return open_files(self.path)

    def check_claim(self) -> None:
        """Make sure that the output is still the spec's own to write to, and the epoch the same.

        Raises:
            SpecError: It isn't: what would be done now is worth nothing, or does harm.
        """
        epoch = self.epoch  # which looks up the claim
        self._held = self._claims.check(self._held, epoch)

    def put_donation(self, donation: Donation, payload: bytes | None) -> DonationEntry:
        """Store a donation, and return its entry for the donor's receipt.

        Args:
            donation: What is donated.
            payload: The compressed sums; None if all are zero, then nothing is stored.
        """
        if payload is None:
            return DonationEntry(donation.key, donation.receiver, None, 0)
        data, checksum = donations.pack(donation, payload, self.spec.output.summed_channels, self.fingerprint)
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
            WrongDonationsError: Donations are not what their donors wrote.
            StorageError: The storage does not answer.
        """
        entries = {d.key: (d, e.checksum) for d, e in wanted if e.checksum is not None}
        with storage_errors(f"fetching donations from {self.path}"):
            answers = self._files.get([self._donation(key) for key in entries])
        found: dict[str, bytes] = {}
        wrong: dict[str, str] = {}
        for answer in answers:
            key, content = answer["path"].rpartition("/")[2], answer["content"]
            donation, checksum = entries[key]
            if content is None:
                raise MissingInputError(f"donation {key} is missing in {self.path}. {self.remedy(donation.donor)}")
            try:
                found[key] = donations.unpack(
                    content, donation, self.spec.output.summed_channels, self.fingerprint, checksum
                )
            except DataError as error:
                wrong[key] = f"{error}. {self.remedy(donation.donor)}"
        if wrong:
            raise WrongDonationsError(next(iter(wrong.values())), tuple(wrong))
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

    def donations_of(self, groups: Iterable[Vector]) -> Iterator[dict[Vector, list[str]]]:
        """Keys of the donations that the blocks of each of some groups have left, by donor."""
        for group, names in self._list_groups("donations", groups):
            found: dict[Vector, list[str]] = defaultdict(list)
            for name in names:
                key = name.rpartition("/")[2]
                with suppress(ValueError):  # of what is no donation
                    given_box(key)
                    if self._donation(key) == f"donations/{group_name(group)}/{name}":
                        found[self._donor(key)].append(key)
            yield found

    def delete_donations(self, keys: Iterable[str]) -> None:
        """Delete donations; those that aren't there are passed over."""
        self.delete_files([self._donation(key) for key in keys])

    def keep_donations(self, donor: Vector, entries: Iterable[DonationEntry]) -> None:
        """Delete the donations that a block has left and that are not among these entries."""
        kept = {self._donation(entry.key) for entry in entries if entry.checksum is not None}
        self.delete_files([name for name in self._list(f"{_donations(donor)}/") if name not in kept])

    def put_receipt(self, receipt: Receipt) -> None:
        """Store a receipt: the block's stage is complete from here on."""
        put_file(self.path, f"{_receipts(receipt.stage, group_of(receipt.block))}/{receipt.name}", receipt.pack())

    def receipt(self, stage: Stage, block: Vector) -> Receipt | None:
        """The receipt of a block's stage; None if there is none that counts.

        A receipt counts if it is intact and of this fingerprint, and no other one disagrees with
        it.
        """
        present, folder = self.spec.grid.block(block).box.key, _receipts(stage, group_of(block))
        files = BlockFiles(stage, present)
        for name in self._list(f"{folder}/{present}%"):
            files.add(name.rpartition("/")[2])
        return files.receipt(
            [receipt for receipt in self._parsed(f"{folder}/{name}" for name in files.names) if receipt]
        )

    def receipts(self, stage: Stage, groups: Iterable[Vector] | None = None) -> dict[Vector, Receipt]:
        """All receipts of a stage that count, or those of some groups, by block.

        Receipts of a block that has another box since the ROI has grown are left out.
        """
        counting = self._counting(stage, self.groups() if groups is None else groups)
        return {receipt.block: receipt for receipt in counting}

    def all_receipts(self) -> Iterator[Receipt]:
        """All receipts of both stages that count: of inference first, by group, then by block.

        They are read while they are asked for, so that no more than a few are in memory.
        """
        for stage in STAGES:
            yield from self._counting(stage, self.groups())

    def some_receipts(self, stage: Stage, number: int) -> list[Receipt]:
        """Up to ``number`` intact receipts of a stage, the first that are found."""
        names: list[str] = []
        for group in sorted(self._folders(f"receipts/{stage}")):
            found = [name for name in self._list(f"receipts/{stage}/{group}/") if not name.endswith(NOTE)]
            names += found[: number - len(names)]
            if len(names) >= number:
                break
        return [receipt for receipt in self._parsed(names) if receipt]

    def marks(self, stage: Stage, groups: Iterable[Vector]) -> dict[Vector, Mark]:
        """The marks of the receipts in some groups, by block.

        Blocks with receipts that disagree are left out. One from before the ROI grew, when the
        block ended elsewhere, counts only where there is no other.
        """
        marks: dict[Vector, Mark] = {}
        for _, files in self._files_of_blocks(stage, groups):
            for block, its in files.items():
                if (mark := its.mark(partial(self.receipt, stage, block))) is not None:
                    marks[block] = mark
        return marks

    def put_note(self, stage: Stage, block: Vector, before: str, now: str) -> None:
        """Note that what storage describes by two digests, then and now, is of one content."""
        if before and now and before != now:
            box = self.spec.grid.block(block).box
            put_file(self.path, f"{_receipts(stage, group_of(block))}/{box.key}%{before}%{now}{NOTE}", b"")

    def retract(self, stage: Stage, block: Vector) -> None:
        """Delete a block's receipts, before anything that they vouch for is changed.

        Where there are several, which disagree, none of them counts any more if this is ended
        before all are deleted. A disk is looked at again. An object store has answered for each
        deletion, and another listing would be another request a block.

        Raises:
            StorageError: A receipt is there afterwards.
        """
        void = f"{_receipts(stage, group_of(block))}/{self.spec.grid.block(block).box.key}{VOID}"
        names = self._receipts_of(stage, block)
        if several := void in names or sum(name.endswith(".json") for name in names) > 1:
            put_file(self.path, void, b"{}")
        look_again = partial(self._receipts_of, stage, block) if is_on_disk(self.path) else None
        self._delete_all([name for name in names if name != void], look_again, void)
        if several:
            self.delete_files([void])
        if not names and is_on_disk(self.path):
            # An attempt that was killed may have deleted them: no power loss brings them back.
            sync_folders([local_path(self.path) / _receipts(stage, group_of(block))])

    def groups(self) -> Iterator[Vector]:
        """All groups of the volume's blocks."""
        return groups_of(self.spec.grid)

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
        for name, content in self._contents(list(self._stored(f"receipts/{stage}", groups))):
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
                sizes.update(self._files.list(prefix=f"donations/{group_name(group)}/", size=True))
        return {name: size for name, size in sizes.items() if not name.endswith(PARTIAL)}

    def owner(self, name: str) -> Vector | None:
        """The block that a stored file is of, by its name; None if the volume has no such block."""
        folder, _, text = name.rpartition("/")
        with suppress(ValueError):
            block = self._block(text.partition("%")[0])
            proper = (_donations(block), *(_receipts(stage, group_of(block)) for stage in STAGES))
            if block in self.spec.grid and folder in proper:
                return block
        return None

    def delete_files(self, names: Iterable[str]) -> None:
        """Delete stored files, by name."""
        with storage_errors(f"deleting files in {self.path}"):
            self._files.delete(list(names))

    def _delete_all(self, names: list[str], look_again: Callable[[], list[str]] | None, but: str = "") -> None:
        """Delete files, and look whether any is left, but for one.

        A receipt that stays, or that another attempt leaves meanwhile, would vouch for what is
        going to be replaced.
        """
        if names:
            self.delete_files(names)
        if names and look_again and (left := [name for name in look_again() if name != but]):
            raise StorageError(
                f"{self.path}: {len(names)} files have been deleted, and there are {len(left)}, such as {left[0]}. "
                "Another attempt may have written them meanwhile: run again when it has ended"
            )

    def _stored(self, folder: str, groups: Iterable[Vector]) -> Iterator[str]:
        for group, names in self._list_groups(folder, groups):
            yield from (f"{folder}/{group_name(group)}/{name}" for name in names if not name.endswith(NOTE))

    def _donation(self, key: str) -> str:
        return f"{_donations(self._donor(key))}/{key}"

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

    def _receipts_of(self, stage: Stage, block: Vector) -> list[str]:
        """Files of a block among the receipts of a stage.

        Those from before the ROI grew, when the block ended elsewhere, are among them.
        """
        x = self.spec.grid.block(block).box.start[2]
        return [name for name in self._list(f"{_receipts(stage, group_of(block))}/{x}-") if self.owner(name) == block]

    def _list_groups(
        self, folder: str, groups: Iterable[Vector], *, ahead: int = _LISTINGS
    ) -> Iterator[tuple[Vector, list[str]]]:
        """Names of the files in some groups of a folder, without their path.

        Only ``ahead`` groups are listed before they are asked for: names of all would fill memory.
        """
        wanted = deque(groups)
        if len(wanted) > _LISTINGS:  # most may not be there yet
            there = set(self._folders(folder))
            wanted = deque(group for group in wanted if group_name(group) in there)
        listed = deque[tuple[Vector, str, Future[list[str]]]]()
        with ThreadPoolExecutor(_LISTINGS, thread_name_prefix="list") as pool:
            while wanted or listed:
                while wanted and len(listed) < ahead:
                    group = wanted.popleft()
                    prefix = f"{folder}/{group_name(group)}/"
                    listed.append((group, prefix, pool.submit(self._list, prefix)))
                group, prefix, names = listed.popleft()
                yield group, [name[len(prefix) :] for name in names.result()]

    def _folders(self, folder: str) -> Iterator[str]:
        with storage_errors(f"listing {self.path}/{folder}"):
            for name in self._files.list(prefix=f"{folder}/", flat=True):
                yield name.rstrip("/").rpartition("/")[2]

    def _list(self, prefix: str) -> list[str]:
        with storage_errors(f"listing {self.path}/{prefix}"):
            return [name for name in self._files.list(prefix=prefix) if not name.endswith(PARTIAL)]

    def _counting(self, stage: Stage, groups: Iterable[Vector]) -> Iterator[Receipt]:
        """The receipts of some groups that count, by group, then by block."""
        for folder, files in self._files_of_blocks(stage, groups, ahead=2):
            ordered = sorted(block for block in files if block in self.spec.grid)
            parsed = filter(None, self._parsed(f"{folder}/{name}" for block in ordered for name in files[block].names))
            for block, several in groupby(parsed, key=lambda receipt: receipt.block):
                if (counting := files[block].receipt(list(several))) is not None:
                    yield counting

    def _files_of_blocks(
        self, stage: Stage, groups: Iterable[Vector], *, ahead: int = _LISTINGS
    ) -> Iterator[tuple[str, dict[Vector, BlockFiles]]]:
        """For each of some groups, the folder of its receipts, and their files by block."""
        for group, names in self._list_groups(f"receipts/{stage}", groups, ahead=ahead):
            found: dict[Vector, BlockFiles] = {}
            for name in names:
                with suppress(ValueError):  # of what is no range
                    block = self._block(name.partition("%")[0])
                    if group_of(block) != group:
                        continue
                    if block not in found:
                        found[block] = BlockFiles(stage, self._present(block))
                    found[block].add(name)
            yield _receipts(stage, group), found

    def _present(self, block: Vector) -> str:
        """Range of a block as it is now; empty if the volume has none such."""
        return self.spec.grid.block(block).box.key if block in self.spec.grid else ""

    def _parsed(self, names: Iterable[str]) -> Iterator[Receipt | None]:
        """The receipts in some files; None for one that is not intact, or has another name."""
        for name, content in self._contents([name for name in names if not name.endswith(NOTE)]):
            receipt = receipts.unpack(content, self.fingerprint)
            yield receipt if receipt and name.endswith(f"/{receipt.name}") else None

    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
        """Names and contents of some files, read a few at a time, in the order of the names.

        The content of one that isn't there is None.
        """
        for first in range(0, len(names), _FETCHED):
            several = names[first : first + _FETCHED]
            with storage_errors(f"reading receipts in {self.path}"):
                contents = {answer["path"]: answer["content"] for answer in self._files.get(several)}
            for name in several:
                yield name, contents.pop(name)


def _donations(donor: Vector) -> str:
    """The folder of what a block donates, wherever it ends: the ROI may grow."""
    return f"donations/{group_name(group_of(donor))}/{group_name(donor)}"


def _receipts(stage: Stage, group: Vector) -> str:
    return f"receipts/{stage}/{group_name(group)}"
