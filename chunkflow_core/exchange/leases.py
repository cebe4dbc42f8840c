"""The lease of an output: one run at a time is at work on it.

It is a journal beside the layer, ``<output>/leases/00000001.json`` and so on; the last entry says
which run has it. A run that is at work gives a sign from time to time, and ends its lease at its
end. One that has died is followed by the next: at once if its process is known to be gone, else
when it has given no sign for long. Two runs at once would do no harm to voxels, as each receipt
tells what it vouches for; but each would take back what the other needs, and fail.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final

from chunkflow_core.errors import BusyError, StorageError
from chunkflow_core.machine import has_ended, this_process, user
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.journal import Entry, Journal

log = logging.getLogger(__name__)

FOLDER: Final = "leases"
"""The folder of the leases in an output layer."""
_OF_A_PROCESS, _OF_A_SCHEDULER = 300.0, 900.0
"""Seconds without a sign after which a run counts as dead.

A process gives signs by itself. Of a scheduler's run only its tasks do, and they may wait for a
machine. Clocks of machines may differ by some of it.
"""
_SIGNS = 10
"""Number of signs in that time."""
_TRIES = 5


class Lease:
    """What a run needs to be at work on an output.

    All methods raise ``StorageError`` if the storage does not answer.
    """

    def __init__(self, spec: VolumeSpec, run: str, *, scheduler: str = "", of_process: bool = False) -> None:
        """Read and write nothing yet.

        Args:
            spec: The volume.
            run: Name of the run.
            scheduler: Who has started the run, and knows that no other run of his is at work:
                what another one of them has left is taken over at once.
            of_process: Whether the run is this process, which then gives signs, and ends with it.
        """
        self.run, self._place = run, plain(spec.output.path)
        self._scheduler, self._of_process = scheduler, of_process
        self._journal = Journal(self._place, FOLDER)
        self._entry: Entry | None = None
        self._begun = False
        self._stop = threading.Event()
        self._signs: threading.Thread | None = None

    def take(self, *, take_over: bool = False) -> None:
        """Take the lease for the run, or join in where the run has it already.

        Args:
            take_over: Whether to take it from a run that seems to be at work.

        Raises:
            BusyError: Another run has it.
        """
        for _ in range(_TRIES):
            last = self._journal.last()
            if last is not None and _is_at_work(last):
                if last.content.get("run") == self.run:
                    self._entry = last
                    break
                if not take_over and not self._may_follow(last):
                    raise BusyError(f"{self._place}: {_told(last)}")
            try:
                self._entry = self._journal.add(last, self._content())
            except StorageError:
                if self._journal.last() == last:  # nobody was faster
                    raise
                continue
            self._begun = True
            self._journal.delete_before(self._entry.number - 1)
            if (now := self._journal.last()) is not None and now.number == self._entry.number:
                break
        else:
            raise BusyError(f"{self._place}: other runs begin there again and again")
        if self._of_process and self._signs is None:
            self._signs = threading.Thread(target=self._give_signs, name="lease", daemon=True)
            self._signs.start()

    def check(self) -> None:
        """Make sure that the run still has the lease, and give a sign if the last is some time ago.

        Raises:
            BusyError: Another run has taken it over.
        """
        last = self._journal.after(self._entry) if self._entry else None
        if last is None or last.content.get("run") != self.run or last.content.get("ended"):
            if self._entry is not None:
                self._scheduler = ""  # another of his runs has begun: it is not to be driven out in turn
            self.take()
            return
        self._entry = last
        if time.time() - _sign(last) > _patience(last) / _SIGNS:
            self._entry = self._journal.replace(last, last.content | {"sign": time.time()})

    def end(self, *, only_own: bool = False) -> None:
        """End the lease, if the run has it: the next run may begin.

        Args:
            only_own: Whether to leave one in which this has only joined in.
        """
        self._stop.set()
        if self._signs is not None:
            self._signs.join()
        last = self._journal.after(self._entry) if self._entry else None
        if last is not None and last.content.get("run") == self.run and (self._begun or not only_own):
            self._journal.replace(last, last.content | {"ended": time.time()})
        self._entry = None

    def _may_follow(self, last: Entry) -> bool:
        return bool(self._scheduler) and last.content.get("scheduler") == self._scheduler

    def _content(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "scheduler": self._scheduler,
            "by": user(),
            "host": socket.gethostname(),
            "process": this_process() if self._of_process else None,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "sign": time.time(),
            "patience": _OF_A_PROCESS if self._of_process else _OF_A_SCHEDULER,
            "ended": None,
            "token": secrets.token_hex(8),
        }

    def _give_signs(self) -> None:
        while not self._stop.wait(_OF_A_PROCESS / _SIGNS / 2):
            try:
                self.check()
            except BusyError as error:  # the run's own next look ends it
                log.warning("%s", error)
                return
            except Exception as error:
                log.warning("no sign could be given that the run is at work: %s", error)


@contextmanager
def held(lease: Lease, *, only_own: bool = False) -> Iterator[Lease]:
    """A lease that ends with the context, however that ends; ``only_own`` as in ``Lease.end``."""
    try:
        yield lease
    except BaseException:
        with suppress(Exception):  # what goes wrong now must not hide what went wrong before
            lease.end(only_own=only_own)
        raise
    lease.end(only_own=only_own)


def refuse_beside_others(spec: VolumeSpec) -> None:
    """Raise ``BusyError`` if a run is at work on an output: for work that is no part of a run."""
    place = plain(spec.output.path)
    last = Journal(place, FOLDER).last()
    if last is not None and _is_at_work(last):
        raise BusyError(f"{place}: {_told(last)}")


def _is_at_work(entry: Entry) -> bool:
    if entry.content.get("ended"):
        return False
    process = entry.content.get("process")
    if isinstance(process, dict) and has_ended(process):
        return False
    return time.time() - _sign(entry) < _patience(entry)


def _sign(entry: Entry) -> float:
    return float(entry.content.get("sign", 0))


def _patience(entry: Entry) -> float:
    return float(entry.content.get("patience", _OF_A_SCHEDULER))


def _told(entry: Entry) -> str:
    """Who is at work, and what can be done about it."""
    run, by, host, since = (entry.content.get(key) for key in ("run", "by", "host", "since"))
    seconds, minutes = max(0.0, time.time() - _sign(entry)), _patience(entry) / 60
    return (
        f"run {run} is at work there (by {by} on {host}, since {since}; last sign {seconds:.0f} s ago), and only one "
        f"may be. Wait until it has ended, or end it; without a sign for {minutes:.0f} min it counts as dead. If you "
        "know that it is: `chunkflow-core run` with --take-over goes on at once"
    )
