"""A stage killed at any moment, then run again, ends with the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.inference_and_donate import main as infer
from chunkflow_core.receive_and_blend import main as blend
from chunkflow_core.spec import load_spec
from tests.support import killed
from tests.support.volume import files_below, write_volume

KILLED = Path(killed.__file__)

INFER_PHASES = ["read", "forward", "blend", "write", "write half", "donate", "donate half", "receipt", "receipt half"]
BLEND_PHASES = ["receive", "write", "write half", "receipt", "receipt half"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["run", str(write_volume(folder)), "--seams", "0"]) == 0
    return folder


@pytest.mark.parametrize(
    ("stage", "phase", "count"),
    [
        ("infer", phase, count)
        for phase in INFER_PHASES
        for count in (1, 2)
        if not (phase.startswith("receipt") and count == 2)
    ]
    + [("blend", phase, count) for phase in BLEND_PHASES for count in (1, 2) if phase == "write" or count == 1],
)
def test_killed_then_run_again(
    tmp_path: Path,
    undisturbed: Path,
    warm_python: Callable[..., CompletedProcess[str]],
    stage: Stage,
    phase: str,
    count: int,
) -> None:
    spec = write_volume(tmp_path)
    assert main(["prepare", str(spec)]) == 0
    blocks = list(load_spec(spec).grid.indices())
    victim = (1, 1, 1) if stage == "blend" else (0, 1, 0)
    for index in blocks if stage == "blend" else []:
        assert infer([str(spec), "--block", *map(str, index)]) == 0

    killed = warm_python(KILLED, stage, phase, count, spec, "--block", *victim)

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    exchange = Exchange(load_spec(spec))
    assert exchange.receipt(stage, victim) is None, "a killed stage must not look complete"
    for index in blocks:
        assert infer([str(spec), "--block", *map(str, index)]) == 0
    for index in blocks:
        assert blend([str(spec), "--block", *map(str, index)]) == 0
    assert exchange.receipt(stage, victim) is not None
    assert chunk_files(tmp_path) == chunk_files(undisturbed)
    assert main(["verify", str(spec)]) == 0


def chunk_files(folder: Path) -> dict[str, bytes]:
    """The output's storage chunks, byte for byte.

    What a killed writer has left, which nobody reads, is not among them.
    """
    files = files_below(folder / "output" / "4_4_40").items()
    return {name: data for name, data in files if not name.endswith(".partial")}
