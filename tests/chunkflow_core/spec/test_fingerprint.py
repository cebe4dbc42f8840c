"""What of a spec and of the model's files decides the fingerprint, and what leaves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chunkflow_core.spec import load_spec
from tests.support.volume import PYTORCH

MakeSpec = Callable[..., Path]


def fingerprint(path: Path, *overrides: str) -> str:
    return load_spec(path, overrides).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "patch_size=[8, 16, 18]",
        "output_patch_size=[8, 16, 14]",
        "patch_overlap=[2, 4, 6]",
        "block_size=[12, 24, 240]",
        "output.range=[0, 2]",
        "output.dtype=float32",
        "output.channels=2",
        "output.channels=[0]",
        "output.channels=[1]",
        "output.dtype=uint16",
        "output.dtype=float16",
        "output.threshold=0.5",
        "output.chunk_size=[6, 12, 2]",
        "output.path=file:///elsewhere",
        "input.padding=edge",
        "input.fill_missing=true",
        "input.values.scale=raw",
        "input.values={mean: 3, std: 2}",
        "input.values={percentiles: [1, 99]}",
        "input.values={percentiles: [1, 99], per_section: true}",
        "input.values.clip=true",
        "input.values.invert=true",
        "roi=[[2, 0, 0], [20, 48, 40]]",
        "model.batch_size=2",
        "model.precision=bfloat16",
        "model.threads=2",
        "model.activation=sigmoid",
        "model.network=Net",
        "model.weights=[weights.pt, weights.pt]",
        "model.batch_statistics=true",
        "model.output=1",
        "model.options.x=1",
    ],
)
def test_what_decides_numbers_changes_the_fingerprint(make_spec: MakeSpec, model_folder: Path, override: str) -> None:
    path = make_spec(model=PYTORCH)
    large = ["block_size=[12, 24, 840]", "output.chunk_size=[6, 12, 1]"]  # fits all of these patches and overlaps
    assert fingerprint(path, *large) != fingerprint(path, *large, override)


def test_what_is_stored_of_the_same_channels_changes_the_fingerprint(make_spec: MakeSpec, model_folder: Path) -> None:
    path, three = make_spec(model=PYTORCH), "output.channels=3"
    stored = ["output.argmax=true", "output.threshold=0.5", "output.threshold=0.25", "output.argmax=false"]
    others = ["output.channels=[0, 1, 2]", "output.channels=[2, 1, 0]", "output.channels=[0, 1, 3]"]
    assert len({fingerprint(path, three, change) for change in stored + others}) == len(stored + others)


@pytest.mark.parametrize("name", ["model.py", "layers.py", "helper.py", "blocks/residual.py", "weights.pt"])
def test_every_file_that_makes_the_model_is_in_the_fingerprint(
    make_spec: MakeSpec, model_folder: Path, name: str
) -> None:
    path = make_spec(model=PYTORCH)
    before = fingerprint(path)
    with (model_folder / name).open("ab") as file:
        file.write(b"# changed\n")
    assert fingerprint(path) != before


def test_input_mip_changes_the_fingerprint(make_spec: MakeSpec, tmp_path: Path, random_layer: Path) -> None:
    shutil.copytree(random_layer, tmp_path / "input")
    info = json.loads((tmp_path / "input" / "info").read_text())
    info["scales"] *= 2
    (tmp_path / "input" / "info").write_text(json.dumps(info))
    path = make_spec(input={"path": f"file://{tmp_path}/input"})
    assert fingerprint(path) != fingerprint(path, "input.mip=1")


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "schedule=@daily",
        "runner.retries=9",
        "runner.parallel=2",
        "exchange.donations=keep",
        "output.compression=none",
        "model.device=cpu",
        "roi=[[0, 0, 0], [12, 48, 40]]",  # the end: a growing volume keeps its finished blocks
        "input.bounds=[[0, 0, 0], [20, 48, 39]]",  # likewise
        "output.range=[0, 1]",  # the default in other digits
        "output.argmax=false",  # likewise
        "output.threshold=null",  # likewise
        "model.channels=null",  # likewise
        "input.values={scale: unit, clip: false}",  # likewise
    ],
)
def test_what_decides_no_number_leaves_the_fingerprint(make_spec: MakeSpec, model_folder: Path, override: str) -> None:
    path = make_spec(model=PYTORCH)
    assert fingerprint(path) == fingerprint(path, override)


def test_names_and_places_of_model_files_leave_the_fingerprint(
    make_spec: MakeSpec, model_folder: Path, tmp_path: Path
) -> None:
    path = make_spec(model=PYTORCH)
    before = fingerprint(path)
    (model_folder / "stranger.py").write_text("changed")
    (model_folder / "weights.pt").rename(model_folder / "renamed.pt")
    assert fingerprint(path, "model.weights=renamed.pt") == before
    moved = tmp_path / "moved"
    shutil.copytree(model_folder, moved, ignore=shutil.ignore_patterns("moved"))
    assert fingerprint(moved / "spec.yaml", "model.weights=renamed.pt") == before
