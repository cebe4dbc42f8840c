"""The commands' help, and the hint that whoever types them wrong is given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core import inference_and_donate, receive_and_blend

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]

REQUEST = ["SPEC", "--set", "--bbox", "--force", "--check-input"]
OPTIONS = {
    "run": [*REQUEST, "--workers", "--seams", "--seed", "--overwrite", "--accept-mixture", "--repair"],
    "plan": [*REQUEST, "--json", "--run"],
    "repair": ["SPEC", "--set", "--bbox", "--seams", "--seed", "--json", "--run"],
    "prepare": ["SPEC", "--set", "--overwrite", "--accept-mixture", "--once", "--run", "--json"],
    "model": ["PACKAGE", "--weights", "--test"],
    "compile": ["SPEC", "--set", "--tolerance", "--patches", "--engines"],
    "verify": ["SPEC", "--set", "--bbox", "--seams", "--seed", "--deep", "--begun", "--run", "--json"],
    "cleanup": ["SPEC", "--set"],
    "report": ["SPEC", "--set", "--run", "--json", "--picture", "--publish"],
    "picture": ["SPEC", "--set", "FILE.png", "--z"],
    "ingest": [
        *["SOURCE", "LAYER", "--voxel-size", "--chunk-size", "--offset", "--compression", "--overwrite"],
        *["--series", "--level", "--channel", "--time", "--axes", "--gaps", "--step"],
    ],
}


def test_help_names_all_commands_and_exit_codes(chunkflow: Command) -> None:
    outcome = chunkflow("-h")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    for word in [*OPTIONS, "--verbose", "exit codes", "75 storage"]:
        assert word in outcome.stdout


@pytest.mark.parametrize("name", OPTIONS)
def test_help_of_each_command_names_its_options(chunkflow: Command, name: str) -> None:
    outcome = chunkflow(name, "-h")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    for word in [*OPTIONS[name], "exit codes"]:
        assert word in outcome.stdout


@pytest.mark.parametrize("stage", ["inference_and_donate", "receive_and_blend"])
def test_help_of_the_stages(python: Command, stage: str) -> None:
    outcome = python("-m", f"chunkflow_core.{stage}", "-h")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    for word in ["SPEC", "--block", "--force", "--reason", "--run", "--set", "exit codes"]:
        assert word in outcome.stdout


def test_installed_command() -> None:
    script = Path(sys.executable).with_name("chunkflow-core")
    outcome = subprocess.run([script, "-h"], capture_output=True, text=True, timeout=60, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "COMMAND" in outcome.stdout


# -------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ([], "COMMAND"),
        (["rnu", "SPEC"], "invalid choice: 'rnu'"),
        (["run"], "SPEC"),
        (["plan", "SPEC", "--jsn"], "--jsn"),
        (["plan", "SPEC", "other.yaml"], "other.yaml"),
        (["run", "SPEC", "--workers", "0"], "--workers: 0: expected at least 1"),
        (["run", "SPEC", "--workers", "many"], "--workers"),
        (["run", "SPEC", "--seams", "-1"], "--seams: -1: expected at least 0"),
        (["run", "SPEC", "--bbox", "0", "0", "0", "6"], "--bbox: expected 6 arguments"),
        (["run", "SPEC", "--bbox", *"00066a"], "--bbox: invalid int value: 'a'"),
        (["run", "SPEC", "--set"], "--set: expected one argument"),
        (["picture", "SPEC"], "FILE.png"),
        (["ingest", "stack.tif", "file:///layer"], "--voxel-size"),
    ],
)
def test_wrong_usage_ends_with_64_and_a_hint(
    make_spec: MakeSpec, chunkflow: Command, arguments: list[str], piece: str
) -> None:
    spec = str(make_spec())
    outcome = chunkflow(*[spec if argument == "SPEC" else argument for argument in arguments])
    assert outcome.returncode == 64
    assert outcome.stdout == ""
    said, hint = outcome.stderr.splitlines()
    assert piece in said
    assert hint.startswith("See chunkflow-core") and hint.endswith("-h")


@pytest.mark.parametrize("command", ["plan", "run", "verify"])
@pytest.mark.parametrize(
    "box", [(0, 0, 0, 0, 48, 40), (20, 0, 0, 30, 48, 40), (12, 24, 24, 0, 0, 0), (-9, -9, -9, 0, 1, 1)]
)
def test_box_without_a_voxel_of_the_roi(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, command: str, box: tuple[int, ...]
) -> None:
    spec = make_spec()
    assert chunkflow("prepare", spec).returncode == 0
    outcome = chunkflow(command, spec, "--bbox", *box)
    assert outcome.returncode == 64
    assert "--bbox" in outcome.stderr
    assert "z 0–20 y 0–48 x 0–40" in outcome.stderr
    assert not list(tmp_path.rglob("receipts/*/*/*.json"))


@pytest.mark.parametrize("main", [inference_and_donate.main, receive_and_blend.main])
@pytest.mark.parametrize("block", [(2, 0, 0), (0, 0, -1), (9, 9, 9)])
def test_block_that_does_not_exist(
    make_spec: MakeSpec, capsys: pytest.CaptureFixture[str], main: Command, block: tuple[int, ...]
) -> None:
    assert main([str(make_spec()), "--block", *map(str, block)]) == 64
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert f"--block: there is no block {block}; the volume has (0, 0, 0) to (1, 1, 1)" in told[0]


@pytest.mark.parametrize("main", [inference_and_donate.main, receive_and_blend.main])
@pytest.mark.parametrize("arguments", [[], ["--block", "0", "0"], ["--block", "0", "0", "x"], ["--block"]])
def test_block_that_is_no_block(
    make_spec: MakeSpec, capsys: pytest.CaptureFixture[str], main: Command, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main([str(make_spec()), *arguments])
    assert ending.value.code == 64
    said, hint = capsys.readouterr().err.splitlines()
    assert "--block" in said
    assert hint.startswith("See python -m chunkflow_core.") and hint.endswith(" -h")
