"""The commands as they are typed: help, wrong usage, and a volume's life from plan to picture."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from numpy.typing import NDArray
from PIL import Image

from chunkflow_core import inference_and_donate, receive_and_blend
from chunkflow_core.__main__ import main
from tests.support.nursery import shared

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]


BLOCKS = [[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)]

REQUEST = ["SPEC", "--set", "--bbox", "--force", "--check-input"]
OPTIONS = {
    "run": [*REQUEST, "--workers", "--seams", "--overwrite", "--accept-mixture", "--repair"],
    "plan": [*REQUEST, "--json", "--run"],
    "repair": ["SPEC", "--set", "--bbox", "--seams", "--json", "--run"],
    "prepare": ["SPEC", "--set", "--overwrite", "--accept-mixture", "--once", "--run", "--json"],
    "compile": ["SPEC", "--set", "--tolerance", "--patches", "--engines"],
    "verify": ["SPEC", "--set", "--bbox", "--seams", "--deep", "--begun", "--run", "--json"],
    "cleanup": ["SPEC", "--set"],
    "report": ["SPEC", "--set", "--run", "--json", "--picture", "--publish"],
    "picture": ["SPEC", "--set", "FILE.png", "--z"],
    "ingest": ["SOURCE", "LAYER", "--voxel-size", "--chunk-size", "--offset", "--overwrite"],
}


def output_of(folder: Path) -> NDArray[np.uint8]:
    return np.asarray(CloudVolume(f"file://{folder}/output", progress=False)[:, :, :])[..., 0].T


def input_of(layer: Path) -> NDArray[np.uint8]:
    return np.asarray(CloudVolume(f"file://{layer}", progress=False)[:, :, :])[..., 0].T


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of all files below a folder.

    The trial that every ``prepare`` makes is left out.
    """
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file() and file.name != "trial.json"
    }


# --------------------------------------------------------------------------------------------- help


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


# --------------------------------------------------------------------------------------------- plan


def test_plan_says_what_would_run_and_changes_nothing(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec()
    before = files_of(tmp_path)
    outcome = chunkflow("plan", spec)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    words = " ".join(outcome.stdout.split())
    for piece in [
        "ROI z 0–20 y 0–48 x 0–40",
        "blocks 2 × 2 × 2 of 12 × 24 × 24, storage chunks 6 × 12 × 12",
        "to infer 8 blocks, 36 patches: (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), …",
        "to blend 7 blocks",
        "up to date 0 blocks",
        "time unknown before `prepare`",
    ]:
        assert piece in words
    assert files_of(tmp_path) == before


def test_plan_as_json(make_spec: MakeSpec, chunkflow: Command) -> None:
    plan = json.loads(chunkflow("plan", make_spec(), "--json").stdout)
    assert plan["infer"] == BLOCKS
    assert plan["blend"] == BLOCKS[1:]
    assert plan["up_to_date"] == []
    assert plan["blocks"] == [2, 2, 2]
    assert plan["roi"] == {"start": [0, 0, 0], "stop": [20, 48, 40]}
    assert plan["patches"] == 36
    assert plan["seconds"] is None
    assert len(plan["fingerprint"]) == 16


def test_plan_of_a_box_names_the_donors_too(make_spec: MakeSpec, chunkflow: Command) -> None:
    """The voxels at block 0 0 1 are only complete with what block 0 0 0 donates."""
    plan = json.loads(chunkflow("plan", make_spec(), "--json", "--bbox", 0, 0, 30, 1, 1, 31).stdout)
    assert plan["infer"] == [[0, 0, 0], [0, 0, 1]]
    assert plan["blend"] == [[0, 0, 1]]


# ---------------------------------------------------------------------------------------------- run


def test_a_volume_from_run_to_cleanup(
    make_spec: MakeSpec, tmp_path: Path, random_layer: Path, chunkflow: Command
) -> None:
    spec = make_spec()
    first = chunkflow("run", spec)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "small: 8 blocks to infer, 7 to blend, 0 up to date"
    assert lines[1] == "verified: 8 blocks, 64 storage chunks, 2 seams computed again: 0 findings"
    assert lines[2] == f"output: file://{tmp_path}/output"
    assert (
        abs(output_of(tmp_path).astype(int) - input_of(random_layer)).max() <= 1
    )  # the weights of a voxel sum up to 1
    assert not list(tmp_path.glob("exchange/*/donations/*/*")), "cleaned up"
    before = files_of(tmp_path)

    plan = json.loads(chunkflow("plan", spec, "--json").stdout)
    assert (plan["infer"], plan["blend"], plan["up_to_date"]) == ([], [], BLOCKS)
    assert plan["seconds"] == 0

    again = chunkflow("run", spec)
    assert again.returncode == 0, again.stderr
    assert "0 blocks to infer, 0 to blend, 8 up to date" in again.stdout
    assert files_of(tmp_path) == before

    for stage in (inference_and_donate, receive_and_blend):  # as Airflow would, on a retry after a success
        assert stage.main([str(spec), "--block", "1", "1", "1"]) == 0
    assert files_of(tmp_path) == before

    assert chunkflow("verify", spec, "--seams", 5).returncode == 0
    assert "0 donations deleted" in chunkflow("cleanup", spec).stdout
    assert files_of(tmp_path) == before


def test_run_of_a_box_then_of_the_rest(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec()
    box = ["--bbox", 0, 30, 0, 1, 31, 1]
    outcome = chunkflow("run", spec, *box)
    assert outcome.returncode == 0, outcome.stderr
    assert "2 blocks to infer, 1 to blend, 0 up to date" in outcome.stdout
    assert "verified: 1 blocks" in outcome.stdout
    assert chunkflow("verify", spec, *box).returncode == 0

    unfinished = chunkflow("verify", spec)
    assert unfinished.returncode == 65
    assert (
        "6 of 8 blocks are not done yet: `chunkflow-core run SPEC` does them; nothing else is wrong"
        in unfinished.stderr
    )

    rest = chunkflow("run", spec)
    assert rest.returncode == 0, rest.stderr
    # Block 0 0 0 donated to others than 0 1 0, too, so it is done; the donations to those are
    # still there.
    assert "6 blocks to infer, 6 to blend" in rest.stdout
    assert chunkflow("verify", spec, "--seams", 4).returncode == 0


def test_forced_run_does_all_again_with_the_same_bytes(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec()
    assert chunkflow("run", spec).returncode == 0
    before = files_of(tmp_path / "output" / "4_4_40")
    outcome = chunkflow("run", spec, "--force")
    assert outcome.returncode == 0, outcome.stderr
    assert "8 blocks to infer, 7 to blend, 0 up to date" in outcome.stdout
    after = files_of(tmp_path / "output" / "4_4_40")
    assert {name: content for name, (content, _) in after.items()} == {name: c for name, (c, _) in before.items()}
    chunks = [name for name in after if name.endswith(".gz")]
    assert len(chunks) == 64
    assert all(after[name][1] > before[name][1] for name in chunks), "written again"


def test_forced_run_of_a_box_does_no_more_than_it_has_to(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command
) -> None:
    """The last block gives to nobody.

    Its donors' donations are kept or, if not, have to be made again.
    """
    spec = make_spec(exchange={"path": f"file://{tmp_path}/exchange", "donations": "keep"})
    assert chunkflow("run", spec, "--seams", 0).returncode == 0
    box = ["--force", "--bbox", 13, 25, 25, 14, 26, 26]
    outcome = chunkflow("run", spec, *box)
    assert outcome.returncode == 0, outcome.stderr
    assert "1 blocks to infer, 1 to blend, 0 up to date" in outcome.stdout
    chunkflow("cleanup", spec, "--set", "exchange.donations=delete")
    assert "8 blocks to infer, 1 to blend, 0 up to date" in chunkflow("run", spec, *box).stdout


def test_run_in_two_processes_gives_the_same_bytes(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec()
    assert chunkflow("run", spec).returncode == 0
    alone = output_of(tmp_path)
    shutil.rmtree(tmp_path / "output")
    outcome = chunkflow("run", spec, "--workers", 2)
    assert outcome.returncode == 0, outcome.stderr
    assert "8 blocks to infer" in outcome.stdout, "without the output, the receipts are lies"
    np.testing.assert_array_equal(output_of(tmp_path), alone)


def test_keep_keeps_donations_and_cleanup_can_be_asked_for_later(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command
) -> None:
    spec = make_spec()
    assert chunkflow("run", spec, "--set", "exchange.donations=keep").returncode == 0
    kept = list(tmp_path.glob("exchange/*/donations/*/*"))
    assert kept
    assert "0 donations deleted" in chunkflow("cleanup", spec, "--set", "exchange.donations=keep").stdout
    assert f"{len(kept)} donations deleted" in chunkflow("cleanup", spec).stdout
    assert not list(tmp_path.glob("exchange/*/donations/*/*"))
    assert "8 up to date" in chunkflow("run", spec).stdout


@pytest.mark.parametrize("provenance", [None, "", "{", "[]", '{"processing": 5}', '{"processing": [{"method": "x"}]}'])
def test_output_layer_with_another_provenance(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, provenance: str | None
) -> None:
    """Who wrote there is not known, so nothing counts as done."""
    spec = make_spec()
    assert chunkflow("run", spec, "--seams", 0).returncode == 0
    path = tmp_path / "output" / "provenance"
    path.unlink() if provenance is None else path.write_text(provenance)
    outcome = chunkflow("prepare", spec)
    assert outcome.returncode == 0, outcome.stderr
    assert len(json.loads(chunkflow("plan", spec, "--json").stdout)["infer"]) == 8
    assert json.loads(path.read_text())["processing"][-1]["method"]["task"] == "chunkflow-airflow"


def test_other_compression_in_the_same_layer_is_refused(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command
) -> None:
    """Files of other compressions can be there side by side, and readers take either.

    On a disk, that is ``0-12_0-12_0-6`` and ``0-12_0-12_0-6.gz``.
    """
    spec = make_spec()
    assert chunkflow("run", spec).returncode == 0
    outcome = chunkflow("run", spec, "--force", "--set", "output.compression=none")
    assert outcome.returncode == 78
    assert "output.compression" in outcome.stderr
    assert "is stored with gzip, the spec says none" in outcome.stderr


def test_blend_before_its_donors_names_the_one_to_run(
    make_spec: MakeSpec, chunkflow: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec()
    assert chunkflow("prepare", spec).returncode == 0
    assert inference_and_donate.main([str(spec), "--block", "0", "0", "1"]) == 0
    capsys.readouterr()
    assert receive_and_blend.main([str(spec), "--block", "0", "0", "1"]) == 66
    told = capsys.readouterr().err.splitlines()[-1]
    assert "block (0, 0, 0) has not donated yet" in told
    assert "inference_and_donate SPEC --block 0 0 0" in told


def test_stage_before_prepare(make_spec: MakeSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference_and_donate.main([str(make_spec()), "--block", "0", "0", "0"]) == 66
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"file://{tmp_path}/output: there is no layer here" in told
    assert "prepare" in told
    assert not list(tmp_path.rglob("receipts/*/*/*.json"))


# --------------------------------------------------------------------- what is looked at afterwards


def test_verify_finds_a_changed_and_a_missing_storage_chunk(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command
) -> None:
    spec = make_spec()
    assert chunkflow("run", spec).returncode == 0
    chunk = tmp_path / "output" / "4_4_40" / "24-36_24-36_12-18.gz"
    content = chunk.read_bytes()
    chunk.unlink()
    outcome = chunkflow("verify", spec, "--json")
    assert outcome.returncode == 65
    (finding,) = json.loads(outcome.stdout)["findings"]
    assert (finding["block"], finding["subject"]) == ([1, 1, 1], "24-36_24-36_12-18")
    assert finding["message"] == "the storage chunk 24-36_24-36_12-18 is missing"
    shutil.copy(tmp_path / "output" / "4_4_40" / "0-12_0-12_0-6.gz", chunk)
    here = ["--bbox", 12, 24, 24, 13, 25, 25, "--seams", 4]
    outcome = chunkflow("verify", spec, *here)
    assert outcome.returncode == 65
    assert "block (1, 1, 1): " in outcome.stderr
    assert "differ from a fresh computation" in outcome.stderr
    chunk.write_bytes(content)
    assert chunkflow("verify", spec, *here).returncode == 0


def test_report(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec()
    nothing = json.loads(chunkflow("report", spec, "--json").stdout)
    assert (nothing["blocks"], nothing["inferred"], nothing["patches_per_second"]) == (8, 0, None)
    assert chunkflow("run", spec).returncode == 0
    report = json.loads(chunkflow("report", spec, "--json").stdout)
    assert (report["name"], report["blocks"], report["inferred"], report["blended"]) == ("small", 8, 8, 7)
    assert (report["patches"], report["storage_chunks"]) == (36, 64)
    assert report["patches_per_second"] > 0
    assert report["donated_bytes"] > 0
    assert report["seconds"]["infer: forward"] >= 0
    text = chunkflow("report", spec).stdout
    assert "patches per second" in text
    assert json.loads(chunkflow("report", spec, "--json", "--run", "nix").stdout)["inferred"] == 0


@pytest.mark.parametrize("z", [None, 0, 19])
def test_picture(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, z: int | None) -> None:
    spec = make_spec()
    assert chunkflow("run", spec, "--seams", 0).returncode == 0
    file = tmp_path / "new folder" / "picture.png"
    outcome = chunkflow("picture", spec, file, *([] if z is None else ["--z", z]))
    assert (outcome.returncode, outcome.stdout) == (0, f"{file}\n"), outcome.stderr
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # not blank: grey voxels, and the yellow faces of blocks
    assert len(np.unique(pixels[:, 0])) > 100
    yellow = (pixels[:, 0] > 200) & (pixels[:, 1] > 200) & (pixels[:, 2] < 80)
    assert yellow.sum() > 500


def test_picture_that_can_not_be_drawn(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec()
    before = chunkflow("picture", spec, tmp_path / "p.png")
    assert before.returncode == 66
    assert f"file://{tmp_path}/output" in before.stderr
    assert chunkflow("run", spec, "--seams", 0).returncode == 0
    for z in (-1, 20):
        outcome = chunkflow("picture", spec, tmp_path / "p.png", "--z", z)
        assert outcome.returncode == 64
        assert f"--z: there is no section {z}; the ROI has 0 to 19" in outcome.stderr
    outcome = chunkflow("picture", spec, tmp_path / "p.jpg")
    assert outcome.returncode == 64
    assert "ends in .png" in outcome.stderr
    outcome = chunkflow("picture", spec, spec / "p.png")  # below a regular file
    assert outcome.returncode == 64
    assert "spec.yaml/p.png: can't be written" in outcome.stderr


def test_prepare_tells_what_a_patch_takes(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec(model={"engine": "identity", "streams": 3})
    assert json.loads(chunkflow("plan", spec, "--json").stdout)["memory_bytes"] is None
    for _ in range(2):  # it can be asked for again
        outcome = chunkflow("prepare", spec)
        assert outcome.returncode == 0, outcome.stderr
        assert re.fullmatch(r"small: ready; a patch takes \d\.\d{3} s, 3 at a time\n", outcome.stdout)
    info = json.loads((tmp_path / "output" / "info").read_text())
    assert info["data_type"] == "uint8"
    assert info["scales"][0]["size"] == [40, 48, 20]
    assert info["scales"][0]["resolution"] == [4, 4, 40]
    assert info["scales"][0]["chunk_sizes"] == [[12, 12, 6]]
    plan = json.loads(chunkflow("plan", spec, "--json").stdout)
    assert plan["memory_bytes"] > plan["data_bytes"] + 50e6, "with the interpreter"
    assert plan["seconds"] > 0


# -------------------------------------------------------------------------- in processes of its own


SLOW = """
import pathlib, sys, time

if not any("resource_tracker" in word for word in sys.orig_argv):
    from chunkflow_core.engines.identity import Identity

    run = Identity.__call__

    def slow(self, patches):
        if pathlib.Path({brake!r}).exists():
            time.sleep(0.2)
        return run(self, patches)

    Identity.__call__ = slow
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_run_is_completed_by_the_next(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, workers: int
) -> None:
    """Ctrl-C goes to all processes of the terminal's foreground group."""
    brake = tmp_path / "brake"
    brake.touch()
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(brake=str(brake)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    spec = make_spec()
    command = [sys.executable, "-m", "chunkflow_core", "run", str(spec), "--workers", str(workers)]
    with (tmp_path / "told").open("w+") as told:
        process = shared().start(command, os.environ | {"PYTHONPATH": path}, tmp_path, told.fileno())
        deadline = time.monotonic() + 90
        while not list(tmp_path.rglob("receipts/infer/*/*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
        told.seek(0)
        said = told.read()
    assert "interrupted; what is complete is kept" in said
    assert "Traceback" not in said
    done = len(list(tmp_path.rglob("receipts/infer/*/*.json")))
    assert 0 < done < 8

    brake.unlink()
    outcome = chunkflow("run", spec, "--seams", 4)
    assert outcome.returncode == 0, outcome.stderr
    assert f"small: {8 - done} blocks to infer" in outcome.stdout


def test_stages_in_processes_of_their_own(make_spec: MakeSpec, chunkflow: Command, python: Command) -> None:
    """One block goes through both stages, as Airflow's tasks run them."""
    spec = make_spec()
    assert chunkflow("prepare", spec).returncode == 0
    assert inference_and_donate.main([str(spec), "--block", "0", "0", "0"]) == 0
    outcome = python("-m", "chunkflow_core.inference_and_donate", spec, "--block", 0, 0, 1, "--run", "by-hand")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("block 0_0_1: 4 patches inferred, 4 storage chunks written, ")
    assert "block 0_0_1: planes 0–6 of 0–14 done" in outcome.stderr
    outcome = python("-m", "chunkflow_core.receive_and_blend", spec, "--block", 0, 0, 1)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("block 0_0_1: donations of 2 blocks blended, 4 storage chunks written")


def test_the_reason_of_the_plan_decides_whether_a_block_is_done_again(
    make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(make_spec())
    assert main(["prepare", spec]) == 0

    def said(stage: Callable[[list[str]], int], *options: str) -> str:
        capsys.readouterr()
        assert stage([spec, "--block", "0", "0", "1", *options]) == 0
        return capsys.readouterr().out

    assert inference_and_donate.main([spec, "--block", "0", "0", "0"]) == 0
    infer, blend = inference_and_donate.main, receive_and_blend.main
    assert "4 patches inferred" in said(infer)
    assert "up to date" in said(infer)
    assert "up to date" in said(infer, "--reason", "input", "--run", "a"), "the input has not changed"
    for reason in ("new", "forced", "donations"):
        assert "4 patches inferred" in said(infer, "--reason", reason, "--run", reason)
        assert "up to date" in said(infer, "--reason", reason, "--run", reason), "once a run"
    assert "2 blocks blended" in said(blend)
    for reason in ("new", "input", "donations"):
        assert "up to date" in said(blend, "--reason", reason, "--run", "b")
    assert "2 blocks blended" in said(blend, "--reason", "forced", "--run", "b")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_of_the_output_that_goes_early(make_spec: MakeSpec, unbuffered: str) -> None:
    """The reader goes early, as in ``chunkflow-core plan SPEC | head -1``.

    Here it does not even wait for the first line.
    """
    command = [sys.executable, "-m", "chunkflow_core", "plan", str(make_spec())]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
