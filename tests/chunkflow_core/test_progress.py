"""Long work shows how far it has come."""

from __future__ import annotations

import logging

import pytest

from chunkflow_core.progress import Lines


def test_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock = [100.0]
    lines = Lines("block b", 12, "patches", every=30.0, now=lambda: clock[0])
    with caplog.at_level(logging.INFO):
        for _ in range(12):
            clock[0] += 8.0
            lines.step()
    told = [message.rpartition(", peak memory ") for message in caplog.messages]
    assert [start for start, _, _ in told] == [
        "block b: 4 of 12 patches (33 %), 0.125/s, some 64 s to go",
        "block b: 8 of 12 patches (66 %), 0.125/s, some 32 s to go",
        "block b: 12 of 12 patches (100 %), 0.125/s, some 0 s to go",
    ]
    assert all(memory.endswith(" GiB") and float(memory.split()[0]) > 0 for _, _, memory in told)
