"""The commands that look at a volume tell what is due, what was done and what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.volume import BLOCKS, files_of

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]


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
