"""What is written to a finished output, by whomever and whenever, is noticed by a listing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import STAGES, Stage
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.files import put_file
from chunkflow_core.storage.layers import OutputLayer
from tests.support.harms import CORE, FRAME, LAST, Volume
from tests.support.volume import files_below

CHUNKS: dict[Stage, str] = {"infer": CORE, "blend": FRAME}
ALL = tuple(np.ndindex(2, 2, 2))


def write_late(spec: VolumeSpec, name: str) -> None:
    """Overwrite a storage chunk as an attempt that was given up does."""
    layer, box = Workspace(spec).output, Box.from_key(name)
    layer.write(box, layer.read(box) + np.float32(1))


def due(spec: VolumeSpec, *, check_input: bool = True) -> Plan:
    return plan(spec, Request(check_input=check_input), Workspace(spec).state())


@pytest.mark.parametrize("stage", STAGES)
def test_a_late_write_is_noticed_and_repaired(volume: Volume, stage: Stage) -> None:
    write_late(volume.spec, CHUNKS[stage])

    assert main(["verify", str(volume.path), "--seams", "0"]) == 65
    planned = due(volume.spec)
    assert (planned.infer, planned.blend) == (((LAST,), ()) if stage == "infer" else ((), (LAST,))), "and nothing else"
    assert planned.why == ({LAST: "output"} if stage == "infer" else {})
    assert main(["run", str(volume.path), "--check-input", "--seams", "0", "--set", "exchange.donations=keep"]) == 0
    assert volume.contents() == volume.healthy
    assert main(["verify", str(volume.path), "--seams", "2", "--deep"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_believes_its_receipt_only_if_its_storage_chunks_are_there(volume: Volume, stage: Stage) -> None:
    """By itself, without a planner: as a task that was cleared does."""
    do = {"infer": inference_and_donate, "blend": receive_and_blend}[stage]
    assert do(Workspace(volume.spec), LAST).up_to_date
    harms: list[Callable[[], object]] = [
        lambda: write_late(volume.spec, CHUNKS[stage]),
        volume.chunk(CHUNKS[stage]).unlink,
    ]
    for harm in harms:
        harm()
        assert not do(Workspace(volume.spec), LAST).up_to_date
        assert do(Workspace(volume.spec), LAST).up_to_date
    assert volume.contents() == volume.healthy


def test_a_storage_chunk_in_two_compressions(volume: Volume) -> None:
    """Which of them a reader takes is up to the reader."""
    (volume.scale / f"{CORE}.br").write_bytes(volume.chunk(CORE).read_bytes())

    assert main(["verify", str(volume.path), "--seams", "0"]) == 65
    assert due(volume.spec).why == {LAST: "output"}


def test_a_layer_that_was_copied(volume: Volume) -> None:
    """Storage says something else of each file, and the voxels are the same: that is noted once."""
    for file in volume.scale.iterdir():
        os.utime(file)
    before = files_below(volume.folder)

    assert main(["plan", str(volume.path), "--check-input"]) == 0
    assert main(["verify", str(volume.path), "--seams", "0"]) == 0
    assert files_below(volume.folder) == before, "a question does not write"
    assert main(["run", str(volume.path), "--check-input", "--seams", "0", "--set", "exchange.donations=keep"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputLayer, "digest", pytest.fail)
        assert due(volume.spec) == Plan((), (), ALL), "no voxel is read again"
    write_late(volume.spec, CORE)
    assert due(volume.spec).infer == (LAST,), "what was noted is of that copy only"


def test_a_receipt_that_outlives_its_storage_chunks(volume: Volume) -> None:
    """An attempt of this spec ends after another spec has had the layer, and this one again."""
    receipt = volume.receipt("infer", LAST)
    assert main(["run", str(volume.path), "--set", "model.threads=2", "--overwrite", "--seams", "0"]) == 0
    write_late(volume.spec, CORE)  # as if that spec gave other voxels
    assert main(["prepare", str(volume.path), "--overwrite"]) == 0
    Exchange(volume.spec).put_receipt(receipt)

    assert due(volume.spec).infer == ALL


def test_attempts_that_have_written_the_same_at_the_same_time(volume: Volume) -> None:
    """Each receipt names the files as its own attempt has left them; the voxels are the same."""
    first = volume.receipt("infer", LAST)
    inference_and_donate(Workspace(volume.spec), LAST, why="forced")
    Exchange(volume.spec).put_receipt(first)

    assert len(list(volume.exchange.glob(f"receipts/infer/*/{first.box}%*.json"))) == 2
    assert due(volume.spec) == Plan((), (), ALL)
    write_late(volume.spec, CORE)
    assert due(volume.spec).infer == (LAST,)


def edited(key: str, value: object) -> Callable[[Path], None]:
    """Sets a key of a layer's info, or of its first scale."""

    def edit(layer: Path) -> None:
        info = json.loads((layer / "info").read_text())
        (info if key in info else info["scales"][0])[key] = value
        put_file(f"file://{layer}", "info", json.dumps(info).encode())

    return edit


@pytest.mark.parametrize("edit", [edited("data_type", "int8"), edited("resolution", [8, 8, 40])], ids=["dtype", "size"])
def test_an_info_that_gives_voxels_another_meaning(
    volume: Volume, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    """No storage chunk of the input has changed, but what is read from it."""
    edit(volume.folder / "input")
    assert due(load_spec(volume.path)).infer == ALL
    volume.restore()
    assert due(load_spec(volume.path)).infer == ()


@pytest.mark.parametrize(("age", "code"), [(0, 75), (3600, 65)], ids=["fresh", "old"])
def test_an_input_that_is_read_half(volume: Volume, age: int, code: int) -> None:
    """It may still be written to, which is worth another try; after an hour it is damaged."""
    (file,) = (volume.folder / "input").glob("*/0-16_0-16_0-8*")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    moment = file.stat().st_mtime - age
    for chunk in file.parent.iterdir():
        os.utime(chunk, (moment, moment))

    arguments = ["run", str(volume.path), "--force", "--bbox", "0", "0", "0", "1", "1", "1", "--seams", "0"]
    assert main(arguments) == code
