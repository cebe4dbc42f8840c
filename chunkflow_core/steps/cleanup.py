"""Deletes the donations that have been used.

A donation is needed until the receiver's receipt says that it has consumed just this. Interrupted
at any point, this leaves donations too many, or some of a donor's: the planner counts them, and has
what is not whole made again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from chunkflow_core.exchange.epochs import delete_earlier
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.lattice.blocks import given_box
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.planning.planner import Done
from chunkflow_core.planning.state import ExchangeReceipts
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.disk import delete_partials
from chunkflow_core.storage.files import is_on_disk

_HOUR, _DAY = 3600.0, 86400.0


def cleanup(spec: VolumeSpec, *, now: float | None = None) -> int:
    """Delete donations as the spec says, and return how many.

    Args:
        spec: The volume. Its ``exchange.donations`` is ``delete``, ``keep``, or the days for which
            donations are kept after their blending.
        now: Unix time; default: the clock's.
    """
    now = time.time() if now is None else now
    exchange = Exchange(spec)
    for path in (exchange.path, plain(spec.output.path)):
        if is_on_disk(path):
            delete_partials(path, older_than=_HOUR)
    delete_earlier(spec, exchange.epoch)
    policy = spec.exchange.donations
    if policy == "keep":
        return 0
    days = 0.0 if policy == "delete" else policy.days
    number = 0
    for spent in _spent(exchange, before=now - days * _DAY if days else None):
        exchange.delete_donations(spent)
        number += len(spent)
    return number


def _spent(exchange: Exchange, before: float | None) -> Iterator[list[str]]:
    """Keys of donations that have been consumed, group by group, since there may be millions.

    With ``before``, in Unix time, only those that a blending has consumed that ended before it.
    """
    grid, receipts = exchange.spec.grid, ExchangeReceipts(exchange)
    consumed = Done(exchange.spec, receipts).has_consumed
    for donated in exchange.donations_of(exchange.groups()):
        receivers = {r for donor in donated for r in grid.receivers(donor)}
        receipts.load(receivers | {d for r in receivers for d in grid.donors(r)})
        done = set(filter(consumed, receivers))
        if before is not None:
            done = {r for r in done if _finished(exchange, r) < before}
        keys = (key for keys in donated.values() for key in keys)
        yield [key for key in keys if grid.holding(given_box(key).start) in done]


def _finished(exchange: Exchange, receiver: Vector) -> float:
    """When a block's blending ended, Unix time; the present time if its receipt does not say."""
    receipt = exchange.receipt("blend", receiver)
    return float(receipt.facts.get("finished", time.time())) if receipt else time.time()
