"""Which donations are deleted, and what a later run makes of it when that was interrupted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.inference_and_donate import main as infer
from chunkflow_core.receive_and_blend import main as blend
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.cleanup import cleanup
from chunkflow_core.steps.workspace import Workspace
from tests.support.volume import files_below, write_volume

DAY = 86400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A volume that is done, with all donations still there."""
    spec = write_volume(tmp_path, exchange={"path": f"file://{tmp_path}/exchange", "donations": "keep"})
    assert main(["run", str(spec), "--seams", "0"]) == 0
    return spec


def test_keep(path: Path) -> None:
    before = Exchange(load_spec(path)).donation_keys()

    assert main(["cleanup", str(path)]) == 0

    assert len(before) > 7
    assert Exchange(load_spec(path)).donation_keys() == before


def test_delete_what_has_been_consumed(path: Path) -> None:
    spec = load_spec(path, ["exchange.donations=delete"])
    exchange = Exchange(spec)
    exchange.retract("blend", (0, 1, 1))

    deleted = cleanup(spec)

    left = exchange.donation_keys()
    assert left == {d.key for donor in spec.grid.donors((0, 1, 1)) for d in spec.grid.donations(donor, (0, 1, 1))}
    assert deleted > len(left)
    assert blend([str(path), "--block", "0", "1", "1"]) == 0, "all that it needs is there"
    assert cleanup(spec) == len(left)
    assert exchange.donation_keys() == set()


def test_not_what_has_been_made_again_since(path: Path) -> None:
    """A donor with another input has given others what they have not consumed.

    That the input is another is told by its receipt here.
    """
    spec = load_spec(path, ["exchange.donations=delete", "input.prefetch=2"])
    exchange = Exchange(spec)
    assert infer([str(path), "--block", "0", "0", "0", "--force"]) == 0
    assert cleanup(spec) > 0, "the same donations as before count as consumed"
    assert exchange.donation_keys() == set()

    exchange.retract("infer", (0, 0, 0))
    assert infer([str(path), "--block", "0", "0", "1", "--force"]) == 0
    kept = {d.key for r in spec.grid.receivers((0, 0, 1)) for d in spec.grid.donations((0, 0, 1), r)}
    assert cleanup(spec) == 0, "nobody knows what its receivers need: another donor of theirs has no receipt"
    assert exchange.donation_keys() == kept


def test_days(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = load_spec(path, ["exchange.donations={days: 2}"])
    there = len(Exchange(spec).donation_keys())

    assert cleanup(spec, now=time.time() + 1.9 * DAY) == 0
    assert main(["cleanup", str(path), "--set", "exchange.donations={days: 2}"]) == 0
    assert "0 donations deleted (exchange.donations: kept for 2 days)" in capsys.readouterr().out
    assert cleanup(spec, now=time.time() + 2.1 * DAY) == there


def test_interrupted_at_any_point(path: Path, tmp_path: Path) -> None:
    """What is left is never taken for whole.

    A forced block has its receivers' donors donate again where a donation is gone.
    """
    spec = load_spec(path)
    answer = files_below(tmp_path / "output")
    keys = sorted(Exchange(spec).donation_keys())
    for number in range(1, len(keys), 7):
        Exchange(spec).delete_donations(keys[:number])
        Exchange(spec).retract("blend", (1, 1, 1))

        assert main(["run", str(path), "--seams", "0"]) == 0

        assert files_below(tmp_path / "output") == answer
        assert Workspace(spec).exchange.receipt("blend", (1, 1, 1)) is not None


@pytest.mark.parametrize("value", ["{days: 0}", "{days: many}", "{weeks: 1}", "never", "7"])
def test_policies_that_are_none(path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cleanup", str(path), "--set", f"exchange.donations={value}"]) == 78

    error = capsys.readouterr().err
    assert "exchange.donations" in error
    assert "Traceback" not in error
