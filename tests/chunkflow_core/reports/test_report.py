"""The report of a volume, as text, as JSON and as a picture.

Every figure is computed again from the receipts' files.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageColor

from chunkflow_core.__main__ import main
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import STAGES
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.reports.chart import BLEND, FORWARD, INFER, draw_chart
from chunkflow_core.reports.figures import Tally, duration, metric, report_of
from chunkflow_core.reports.tasks import DoneTask, task_of
from chunkflow_core.spec import load_spec
from tests.support.volume import SHAPE, spec_content

MakeSpec = Callable[..., Path]
Command = Callable[..., subprocess.CompletedProcess[str]]

DAY = 86400.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, random_layer: Path) -> Path:
    """A folder with a volume that has been run; another one beside it keeps what it was."""
    folder = tmp_path_factory.mktemp("finished") / "volume"
    folder.mkdir()
    content = spec_content(random_layer, folder) | {"model": {"engine": "identity", "streams": 2}}
    (folder / "spec.yaml").write_text(yaml.safe_dump(content))
    assert main(["run", str(folder / "spec.yaml"), "--seams", "0"]) == 0
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def done(finished: Path) -> Path:
    """The spec of a volume that has been run."""
    shutil.rmtree(finished)
    shutil.copytree(finished.with_name("kept"), finished)
    return finished / "spec.yaml"


def receipts_of(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The receipts of a stage, from their files."""
    files = sorted(folder.glob(f"exchange/*/*/receipts/{stage}/*/*.json"))
    return [json.loads(file.read_text())["receipt"] for file in files]


def rewrite(path: Path, change: Callable[[Receipt, int], Receipt]) -> None:
    """Replace every receipt of a volume, given its number; blends come after all inferences."""
    exchange = Exchange(load_spec(path))
    for stage in STAGES:
        for number, receipt in enumerate(sorted(exchange.receipts(stage).values(), key=lambda r: r.block)):
            exchange.put_receipt(change(receipt, number))


def in_a_row(receipt: Receipt, number: int) -> Receipt:
    """Give a stage's receipt the times of two tasks at a time on two hosts.

    Inferences take 10 s, half of them in forward passes of 4 streams; blends take 5 s, and come
    after all inferences.
    """
    infer = receipt.stage == "infer"
    wall, before = (10.0, 0.0) if infer else (5.0, 40.0)
    seconds = {"forward": 20.0, "stitch": 8.0, "read": 3.0} if infer else {"read": 2.0, "write": 1.5}
    facts = receipt.facts | {
        "seconds": seconds,
        "wall": wall,
        "streams": 4 if infer else 1,
        "finished": 1.7e9 + before + wall * (number // 2 + 1),
        "host": f"host-{number % 2}",
    }
    return replace(receipt, facts=facts)


def report_json(chunkflow: Command, *arguments: object) -> dict[str, Any]:
    outcome = chunkflow("report", *arguments, "--json")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    report: dict[str, Any] = json.loads(outcome.stdout)
    return report


def pixels_of(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1600, 1000))
        return np.asarray(image.convert("RGB"))


def area(pixels: NDArray[np.uint8], colour: str) -> int:
    """Pixels of exactly a colour."""
    return int((pixels == ImageColor.getrgb(colour)).all(axis=-1).sum())


# ------------------------------------------------------------------------------------------ figures


def test_figures_are_those_of_the_receipts(done: Path, chunkflow: Command) -> None:
    report = report_json(chunkflow, done)
    infer, blend = receipts_of(done.parent, "infer"), receipts_of(done.parent, "blend")
    both = infer + blend
    assert (report["inferred"], report["blocks"], report["blended"], report["to_blend"]) == (8, 8, 7, 7)
    assert report["patches"] == sum(r["patches"] for r in infer) == report["all_patches"] == 36
    assert report["voxels"] == np.prod(SHAPE)  # core and frames are the whole volume
    for stage, receipts in (("infer", infer), ("blend", blend)):
        for what in ("read", "written", "donated"):
            assert report["bytes"][f"{stage}: {what}"] == sum(r["facts"]["bytes"][what] for r in receipts)
        walls = [r["facts"]["wall"] for r in receipts]
        assert report["wall"][stage] == {"median": np.median(walls), "least": min(walls), "most": max(walls)}
        shares = [share for name, share in report["shares"].items() if name.startswith(stage)]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    wall = sum(r["facts"]["wall"] for r in infer)
    for phase in ("forward", "stitch"):
        assert all(r["facts"]["streams"] == 2 for r in infer)
        seconds = sum(r["facts"]["seconds"].get(phase, 0) for r in infer) / 2
        assert report["shares"][f"infer: {phase}"] == pytest.approx(seconds / wall, abs=1e-4)
    assert report["forward"] == report["shares"]["infer: forward"]
    for phase in ("read", "write", "donate"):
        seconds = sum(r["facts"]["seconds"][phase] for r in infer)
        assert report["beside"][f"infer: {phase}"] == pytest.approx(seconds / wall, abs=1e-4)
    span = max(r["facts"]["finished"] for r in both) - min(r["facts"]["finished"] - r["facts"]["wall"] for r in both)
    assert report["span"] == pytest.approx(span, abs=1e-3)
    assert report["voxels_per_second"] == pytest.approx(np.prod(SHAPE) / span, rel=1e-3)
    assert report["busy"] <= report["span"]
    assert report["patches_per_second"] == pytest.approx(36 / wall, rel=1e-3)
    rates = [r["facts"]["voxels_per_second"] for r in infer]
    assert report["task_voxels_per_second"]["median"] == pytest.approx(np.median(rates), rel=1e-2)
    assert report["peak_memory"]["value"] == max(r["facts"]["peak_memory_bytes"] for r in both)
    slowest = sorted(both, key=lambda r: -r["facts"]["wall"])[:3]
    assert [f["value"] for f in report["slowest"]] == [r["facts"]["wall"] for r in slowest]
    wall_of = {(r["stage"], "_".join(map(str, r["block"]))): r["facts"]["wall"] for r in both}
    assert all(wall_of[f["stage"], f["block"]] == f["value"] for f in report["slowest"]), (
        "which of equals does not matter"
    )
    assert report["hosts"] == {infer[0]["facts"]["host"]: 15}
    assert sum(report["devices"].values()) == 8
    assert report["runs"] == {infer[0]["run"]: 15}


def test_text(done: Path, chunkflow: Command) -> None:
    rewrite(done, in_a_row)
    text = chunkflow("report", done).stdout
    rows = {line[:20].strip(): line[20:] for line in text.splitlines() if line[:1].strip()}
    assert "► forward passes: 50 % of the inference tasks' time\n" in text
    assert rows["blocks"] == "8 of 8 inferred, 7 of 7 blended"
    assert rows["patches"] == "36 run of 36 in the volume; skipped: none"
    assert rows["speed"] == "640 voxel/s over 60 s from first start to last finish"
    assert "  its time          forward 50 %, idle 30 %, stitch 20 %\n" in text
    assert "  beside it         read 30 %\n" in text
    assert "  its time          read 40 %, write 30 %, other 30 %\n" in text
    assert rows["inference task"] == "median 10 s, 10 s to 10 s"
    assert rows["slowest"] == "infer 0_0_0: 10 s, infer 0_0_1: 10 s, infer 0_1_0: 10 s"
    assert rows["hosts"] == "host-0 (8 tasks), host-1 (7 tasks)"
    assert rows["patches per second"] == "0.45 per inference task"


def test_skipped_patches_by_reason(done: Path, chunkflow: Command) -> None:
    def skip(receipt: Receipt, number: int) -> Receipt:
        return replace(receipt, skipped={"zeros": 2, "outside mask": number}) if receipt.stage == "infer" else receipt

    rewrite(done, skip)
    assert report_json(chunkflow, done)["skipped"] == {"zeros": 16, "outside mask": sum(range(8))}
    assert "skipped: 28 outside mask, 16 zeros\n" in chunkflow("report", done).stdout


def test_one_run_of_several(done: Path, chunkflow: Command) -> None:
    rewrite(done, lambda receipt, number: replace(receipt, run="first" if number < 3 else "second"))
    report = report_json(chunkflow, done, "--run", "first")
    assert (report["inferred"], report["blended"], report["runs"]) == (3, 3, {"first": 6, "second": 9})
    assert report_json(chunkflow, done)["inferred"] == 8
    assert "second (9 tasks), first (6 tasks)" in chunkflow("report", done).stdout


def test_pause_between_runs(done: Path, chunkflow: Command, tmp_path: Path) -> None:
    def later(receipt: Receipt, number: int) -> Receipt:
        receipt = in_a_row(receipt, number)
        moved = receipt.facts["finished"] + (DAY if receipt.stage == "blend" else 0)
        return replace(receipt, facts=receipt.facts | {"finished": moved})

    rewrite(done, later)
    report = report_json(chunkflow, done)
    assert (report["span"], report["busy"]) == (DAY + 60, 60)
    assert "640 voxel/s over the 60 s when tasks ran" in chunkflow("report", done).stdout
    file = tmp_path / "report.png"
    assert chunkflow("report", done, "--picture", file).returncode == 0
    timeline = pixels_of(file)[650:]
    assert area(timeline, FORWARD) > 50_000  # squeezed to nothing, were the day shown
    assert area(timeline, BLEND) > 20_000


def test_blocks_that_receive_nothing_are_not_to_be_blended(make_spec: MakeSpec, chunkflow: Command) -> None:
    spec = make_spec(
        patch_overlap=[0, 4, 0],
        block_size=[16, 24, 16],
        output={"path": make_spec().parent.as_uri() + "/o", "chunk_size": [8, 12, 8]},
    )
    grid = load_spec(spec).grid
    receivers = [index for index in grid.indices() if grid.block(index).frame]
    report = report_json(chunkflow, spec)
    assert 0 < report["to_blend"] == len(receivers) < report["blocks"] == len(list(grid.indices()))


def test_receipts_of_blocks_that_the_volume_no_longer_has(done: Path, chunkflow: Command) -> None:
    done.write_text(done.read_text() + "roi: [[0, 0, 0], [12, 24, 24]]\n")
    report = report_json(chunkflow, done)
    assert (report["blocks"], report["inferred"], report["blended"], report["to_blend"]) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (27.6e6, "28 MB"), (9.97e9, "10 GB"), (3e18, "3000 PB")],
)
def test_metric(value: float, text: str) -> None:
    assert metric(value, "B") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (99, "99 s"), (750, "12.5 min"), (9000, "2.5 h"), (3 * DAY, "3 d")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ------------------------------------------------------------------------------------------ picture


def test_picture(done: Path, tmp_path: Path, chunkflow: Command) -> None:
    rewrite(done, in_a_row)
    file = tmp_path / "new folder" / "report.png"
    outcome = chunkflow("report", done, "--picture", file)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("small ")
    timeline = pixels_of(file)[650:]
    forward, rest, blend = (area(timeline, colour) for colour in (FORWARD, INFER, BLEND))
    # 80 s of inference, half of it forward; 35 s of blending, all in bars of the same height
    assert forward > 50_000
    assert forward == pytest.approx(rest, rel=0.1)
    assert blend == pytest.approx((forward + rest) * 35 / 80, rel=0.1)


def test_picture_and_json(done: Path, tmp_path: Path, chunkflow: Command) -> None:
    file = tmp_path / "report.png"
    assert report_json(chunkflow, done, "--picture", file)["inferred"] == 8
    assert min(area(pixels_of(file), colour) for colour in (FORWARD, BLEND)) > 500


def test_picture_of_one_block(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec, file = make_spec(), tmp_path / "report.png"
    assert chunkflow("run", spec, "--bbox", 0, 0, 0, 6, 6, 6).returncode == 0
    outcome = chunkflow("report", spec, "--picture", file)
    assert "1 of 8 inferred, 0 of 7 blended" in outcome.stdout
    assert area(pixels_of(file)[650:], INFER) > 10_000


@pytest.mark.parametrize("peak", [1_000_099_840, 999_999_488])
def test_picture_shows_tasks_with_the_most_memory(done: Path, tmp_path: Path, chunkflow: Command, peak: int) -> None:
    """All blends took most: without them in the histogram, its half to the right is empty."""

    def measured(receipt: Receipt, _: int) -> Receipt:
        memory = peak if receipt.stage == "blend" else 753_889_280
        return replace(receipt, facts=receipt.facts | {"peak_memory_bytes": memory})

    rewrite(done, measured)
    file = tmp_path / "report.png"
    assert chunkflow("report", done, "--picture", file).returncode == 0
    assert area(pixels_of(file)[400:590, 1150:], BLEND) > 2000


@pytest.mark.parametrize("hosts", [1, 40, 6000])
def test_picture_of_thousands_of_blocks(done: Path, tmp_path: Path, hosts: int) -> None:
    rewrite(done, in_a_row)
    spec = load_spec(done)
    infer, blend = (task_of(spec, next(iter(Exchange(spec).receipts(stage).values()))) for stage in STAGES)
    tally, file = Tally(), tmp_path / "report.png"
    for number in range(3000):
        for task in (infer, blend):
            tally.add(_moved(task, number, hosts))
    draw_chart(report_of(spec, "", tally), tally.tasks, file)
    timeline = pixels_of(file)[650:]
    forward, rest, blended = (area(timeline, colour) for colour in (FORWARD, INFER, BLEND))
    assert forward > 50_000
    assert forward == pytest.approx(rest, rel=0.15)
    assert blended == pytest.approx((forward + rest) / 2, rel=0.15)


def _moved(task: DoneTask, number: int, hosts: int) -> DoneTask:
    """Fifty tasks of a stage at a time."""
    begin = 1.7e9 + 10.0 * (number // 50)
    return replace(task, finished=begin + task.wall, host=f"host-{number % hosts}")


# ------------------------------------------------------------------------- older receipts, and none


@pytest.mark.parametrize(
    "missing",
    [
        ["bytes", "streams", "voxels_per_second"],
        ["finished", "peak_memory_bytes", "host", "processor"],
        ["seconds"],
        ["wall"],
        [
            "seconds",
            "wall",
            "finished",
            "streams",
            "bytes",
            "host",
            "processor",
            "peak_memory_bytes",
            "voxels_per_second",
        ],
    ],
)
def test_older_receipts(done: Path, tmp_path: Path, chunkflow: Command, missing: list[str]) -> None:
    def older(receipt: Receipt, _: int) -> Receipt:
        return replace(receipt, facts={name: fact for name, fact in receipt.facts.items() if name not in missing})

    rewrite(done, older)
    file = tmp_path / "report.png"
    report = report_json(chunkflow, done, "--picture", file)
    assert (report["inferred"], report["blended"], report["patches"]) == (8, 7, 36)
    assert bool(report["bytes"]) == ("bytes" not in missing)
    assert (report["span"] is None) == bool({"finished", "wall"} & {*missing})
    assert (report["peak_memory"] is None) == ("peak_memory_bytes" in missing)
    assert (report["wall"] == {}) == ("wall" in missing)
    assert ("wall" in missing) or area(pixels_of(file), BLEND) > 1000
    assert "8 of 8 inferred" in chunkflow("report", done).stdout


def test_older_receipts_count_as_one_stream(done: Path, chunkflow: Command) -> None:
    def older(receipt: Receipt, number: int) -> Receipt:
        facts = in_a_row(receipt, number).facts | {"seconds": {"forward": 4.0}}
        return replace(receipt, facts={name: fact for name, fact in facts.items() if name != "streams"})

    rewrite(done, older)
    assert report_json(chunkflow, done)["forward"] == 0.4


def test_nothing_done_yet(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    spec = make_spec()
    outcome = chunkflow("report", spec)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "nothing is done yet" in outcome.stdout and "chunkflow-core run SPEC" in outcome.stdout
    report = report_json(chunkflow, spec)
    assert (report["blocks"], report["inferred"], report["span"], report["forward"], report["slowest"]) == (
        8,
        0,
        None,
        None,
        [],
    )
    picture = chunkflow("report", spec, "--picture", tmp_path / "report.png")
    assert (picture.returncode, picture.stdout) == (66, "")
    assert "nothing is done yet" in picture.stderr and str(tmp_path / "exchange") in picture.stderr
    assert not (tmp_path / "report.png").exists()


def test_run_that_there_is_not(done: Path, chunkflow: Command) -> None:
    rewrite(done, lambda receipt, _: replace(receipt, run="monday"))
    assert "no receipt of run 'nix'" in chunkflow("report", done, "--run", "nix").stdout
    assert "'monday'" in chunkflow("report", done, "--run", "nix").stdout


def test_picture_that_can_not_be_written(done: Path, tmp_path: Path, chunkflow: Command) -> None:
    outcome = chunkflow("report", done, "--picture", tmp_path / "report.jpg")
    assert outcome.returncode == 64
    assert "--picture" in outcome.stderr and "ends in .png" in outcome.stderr
    outcome = chunkflow("report", done, "--picture", done / "report.png")
    assert outcome.returncode == 64
    assert "can't be written" in outcome.stderr
