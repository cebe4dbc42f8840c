"""What changes while a stage is at work: the input, the mask, the model, other attempts, donors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.engines import load_engine
from chunkflow_core.errors import MissingInputError, SpecError, StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.planning.inputs import Inputs
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.stage import StageWork
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer
from chunkflow_core.storage.signatures import WrittenChunk
from tests.support.volume import SHAPE, output_of, write_volume

FIRST, LAST = (0, 0, 0), (1, 1, 1)
HALVING = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return (x / 2).expand(-1, 2, -1, -1, -1)

InstantiatedModel = Net()
"""


def overwrite(layer: Path, value: int, shape: tuple[int, int, int] = (8, 16, 16)) -> None:
    """Fill the first voxels of a layer with a value; ``shape`` is in z, y, x."""
    volume = CloudVolume(f"file://{layer}", progress=False)
    z, y, x = shape
    volume[:x, :y, :z] = np.full((x, y, z, 1), value, np.uint8)


def write_mask(layer: Path, inside: Box) -> None:
    data = np.zeros((1, *SHAPE), np.uint8)
    data[(slice(None), *inside.slices((0, 0, 0)))] = 1
    mask = NewLayer(f"file://{layer}", SHAPE, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 16, 16))
    mask.write(Box((0, 0, 0), SHAPE), data)


def fresh(path: Path, folder: Path) -> NDArray[Any]:
    """The output that a new run in other folders gives."""
    changes = [f"output.path=file://{folder}/fresh/output", f"exchange.path=file://{folder}/fresh/exchange"]
    assert main(["run", str(path), "--seams", "0", *(word for change in changes for word in ("--set", change))]) == 0
    spec = load_spec(path, changes)
    return Workspace(spec).output.read(spec.grid.roi)


def due(spec: VolumeSpec, *, force: bool = False, check_input: bool = False) -> Plan:
    return plan(spec, Request(force=force, check_input=check_input), Workspace(spec).state())


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    path = write_volume(tmp_path)
    assert main(["prepare", str(path)]) == 0
    return path


def test_a_mask_that_changes_while_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is read once, and what storage says of it is asked before and after."""
    write_mask(tmp_path / "mask", Box((0, 0, 0), (20, 8, 8)))
    path = write_volume(tmp_path, skip={"mask": {"path": f"file://{tmp_path}/mask"}})
    assert main(["prepare", str(path)]) == 0

    def edited_meanwhile(spec: VolumeSpec) -> Any:
        overwrite(tmp_path / "mask", 1, SHAPE)
        return load_engine(spec)

    monkeypatch.setattr("chunkflow_core.steps.workspace.load_engine", edited_meanwhile)
    with pytest.raises(StorageError, match="was changed while it was read"):
        inference_and_donate(Workspace(load_spec(path)), FIRST, run="first")
    monkeypatch.undo()
    assert main(["run", str(path), "--seams", "0"]) == 0

    np.testing.assert_array_equal(output_of(path), fresh(path, tmp_path))


def test_a_mask_that_changes_while_a_block_is_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mask(tmp_path / "mask", Box((0, 0, 0), SHAPE))
    path = write_volume(tmp_path, skip={"mask": {"path": f"file://{tmp_path}/mask"}})
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    for index in spec.grid.indices():
        inference_and_donate(Workspace(spec), index)
    get = Exchange.get_donations

    def edited_meanwhile(self: Exchange, wanted: Any) -> Any:
        overwrite(tmp_path / "mask", 0, SHAPE)
        return get(self, wanted)

    monkeypatch.setattr(Exchange, "get_donations", edited_meanwhile)
    receive_and_blend(Workspace(spec), LAST)
    monkeypatch.undo()
    block = spec.grid.block(LAST)
    assert all(Workspace(spec).output.read(box).any() for box in block.frame), "as the mask was that its receipt names"


def test_a_stage_that_can_not_begin_leaves_the_block_done(prepared: Path, tmp_path: Path) -> None:
    assert main(["run", str(prepared), "--seams", "0"]) == 0
    spec = load_spec(prepared)
    (scale,) = (folder for folder in (tmp_path / "input").iterdir() if folder.is_dir())
    scale.rename(tmp_path / "away")

    with pytest.raises(MissingInputError):
        inference_and_donate(Workspace(spec), (0, 0, 1), why="forced")

    (tmp_path / "away").rename(scale)
    assert not due(spec).infer


def test_a_donor_that_is_done_again_while_its_donations_are_read(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is worth another try; data that can't be right would fail the task for good."""
    spec = load_spec(prepared)
    for index in spec.grid.indices():
        inference_and_donate(Workspace(spec), index)
    get = Exchange.get_donations

    def after_the_donor(self: Exchange, wanted: Any) -> Any:
        monkeypatch.undo()
        overwrite(tmp_path / "input", 100, SHAPE)
        inference_and_donate(Workspace(spec), FIRST, why="forced")
        return get(self, wanted)

    monkeypatch.setattr(Exchange, "get_donations", after_the_donor)
    with pytest.raises(StorageError, match="a donor was done again"):
        receive_and_blend(Workspace(spec), LAST)
    assert receive_and_blend(Workspace(spec), LAST).receipt


def test_a_forced_run_that_is_done_again_looks_at_its_input(prepared: Path, tmp_path: Path) -> None:
    """A run that is cleared after an edit has the same name."""
    spec = load_spec(prepared, ["exchange.donations=keep"])
    for stage in (inference_and_donate, receive_and_blend):
        for index in spec.grid.indices():
            stage(Workspace(spec), index, run="one", why="forced")
    overwrite(tmp_path / "input", 200)

    again = due(spec, force=True, check_input=True)
    done = {index: inference_and_donate(Workspace(spec), index, run="one", why="forced") for index in again.infer}
    for index in again.blend:
        receive_and_blend(Workspace(spec), index, run="one", why="forced")

    assert not done[FIRST].up_to_date
    assert done[LAST].up_to_date
    np.testing.assert_array_equal(output_of(prepared), fresh(prepared, tmp_path))


Late = Callable[[VolumeSpec, Callable[[], None]], None]
"""Does an attempt, with something that happens meanwhile."""


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    """Has an attempt at the first block end after something else, its writes and receipt last."""

    def attempt(spec: VolumeSpec, meanwhile: Callable[[], None]) -> None:
        writes: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        receipts: list[tuple[Any, ...]] = []
        write, put = StageWork.write, Exchange.put_receipt

        def noted(*arguments: Any, **options: Any) -> dict[str, WrittenChunk]:
            writes.append((arguments, options))
            return write(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(StageWork, "write", noted)
            patch.setattr(Exchange, "put_receipt", lambda *a: receipts.append(a))
            inference_and_donate(Workspace(spec), FIRST, run="late", why="forced")
        meanwhile()
        for arguments, options in writes:
            write(*arguments, **options)
        for held in receipts:
            put(*held)

    return attempt


@pytest.mark.parametrize("value", range(4))  # which of the two names sorts last is a matter of hashes
def test_two_attempts_that_have_read_different_input(tmp_path: Path, late: Late, value: int) -> None:
    """The edit does not reach what was donated, so that the names of the receipts agree."""
    path = write_volume(tmp_path, block_size=[24, 48, 48])
    assert main(["run", str(path), "--seams", "0"]) == 0
    spec = load_spec(path)

    def edited_and_done() -> None:
        volume = CloudVolume(f"file://{tmp_path}/input", progress=False)
        volume[16:32, 16:32, 8:16] = np.full((16, 16, 8, 1), value, np.uint8)
        inference_and_donate(Workspace(spec), FIRST, run="other")

    late(spec, edited_and_done)
    assert len(list(tmp_path.glob("exchange/*/*/receipts/infer/*/0-*"))) == 2
    assert due(spec).infer == (FIRST,)
    assert main(["verify", str(path), "--seams", "0"]) == 65
    assert main(["run", str(path), "--seams", "0"]) == 0
    np.testing.assert_array_equal(output_of(path), fresh(path, tmp_path))


def test_a_model_that_is_replaced_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(HALVING)
    path = write_volume(tmp_path, model={"engine": "pytorch", "path": "net.py"})
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    assert spec.fingerprint
    (tmp_path / "net.py").write_text(HALVING.replace("x / 2", "x / 4"))

    with pytest.raises(SpecError, match="the files of the model have changed since the fingerprint"):
        inference_and_donate(Workspace(spec), FIRST)

    (tmp_path / "net.py").write_text(HALVING)
    assert inference_and_donate(Workspace(load_spec(path)), FIRST).receipt


def test_an_input_that_changes_and_changes_back(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is noted of an edit that was undone while it was looked at is not true of the edit."""
    assert main(["run", str(prepared), "--seams", "0"]) == 0
    spec = load_spec(prepared)
    (file,) = (tmp_path / "input").glob("*/0-16_0-16_0-8*")
    kept = file.read_bytes()
    overwrite(tmp_path / "input", 100)
    edited, times = file.read_bytes(), file.stat()
    content = Inputs.content

    def undone_meanwhile(self: Inputs, block: tuple[int, int, int]) -> str:
        file.write_bytes(kept)
        return content(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(Inputs, "content", undone_meanwhile)
        assert not plan(spec, Request(check_input=True), Workspace(spec).state(confirm=True)).infer

    file.write_bytes(edited)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert FIRST in due(spec, check_input=True).infer


@pytest.mark.parametrize("deletions", range(3))
def test_an_attempt_that_is_killed_while_it_takes_back_receipts_that_disagree(
    prepared: Path, tmp_path: Path, late: Late, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    """One left alone would vouch for storage chunks of which some are the other attempt's."""
    assert main(["run", str(prepared), "--seams", "0", "--set", "exchange.donations=keep"]) == 0
    spec = load_spec(prepared, ["exchange.donations=keep"])

    def edited_and_done() -> None:
        overwrite(tmp_path / "input", 100)
        inference_and_donate(Workspace(spec), FIRST, run="other", why="forced")

    late(spec, edited_and_done)
    assert Exchange(spec).receipt("infer", FIRST) is None
    unlink, left = Path.unlink, [deletions]

    def die(self: Path, *, missing_ok: bool = False) -> None:
        if "receipts" in self.parts and self.exists():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", die)
        Exchange(spec).retract("infer", FIRST)

    assert FIRST in due(spec).infer
    assert Exchange(spec).receipt("infer", FIRST) is None
    assert FIRST not in {receipt.block for receipt in Exchange(spec).receipts("infer").values()}
    assert main(["verify", str(prepared), "--seams", "0"]) == 65
    assert main(["run", str(prepared), "--repair", "--seams", "2"]) == 0
    assert not list(tmp_path.glob("exchange/*/*/receipts/*/*/*void*"))
    np.testing.assert_array_equal(output_of(prepared), fresh(prepared, tmp_path))
