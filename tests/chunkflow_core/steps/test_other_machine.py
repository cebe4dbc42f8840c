"""Another kind of machine gives other bits: nothing of it gets among the blocks of the first one.

The other machine is a variable on which the network's last bits depend; in one test it is another
instruction set.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from chunkflow_core.audit.audit import repair
from chunkflow_core.engines.identity import Identity
from chunkflow_core.errors import DataError, SpecError, StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.inference import reference
from chunkflow_core.inference.reference import reference_patch
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import prepare
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.digests import checksum
from chunkflow_core.storage.files import put_file
from tests.support.outputs import modes, prepared, run
from tests.support.volume import files_below

Outcome = subprocess.CompletedProcess[str]
MakeSpec = Callable[..., Path]

FIRST, LAST = (0, 0, 0), (1, 1, 1)
NET = """
import os
import torch

print("loaded")

class Net(torch.nn.Module):
    def forward(self, x):
        return x * (1 - 2**-20 if "OTHER_MACHINE" in os.environ else 1)

InstantiatedModel = Net()
"""
CHANCE = NET.replace("x * (", "(int.from_bytes(os.urandom(3)) / 2**24) * x * (")
CONVOLUTIONS = """
import torch
from torch.nn import *
torch.manual_seed(0)
InstantiatedModel = Sequential(
    Conv3d(1, 8, 3, padding=1), ReLU(), Conv3d(8, 8, 3, padding=1), GroupNorm(1, 8), ELU(),
    Conv3d(8, 8, 2, 2), ConvTranspose3d(8, 8, 2, 2), Conv3d(8, 1, 1), Sigmoid(),
)
"""
NOT_COMPARED = "windows are not compared: this machine gives other bits than the one that has prepared the volume"
MIXED = "model.mixed_hardware=true"


@pytest.fixture
def path(make_spec: MakeSpec, tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    output = {"path": f"file://{tmp_path}/output", "chunk_size": [6, 12, 12], "dtype": "float32"}
    return make_spec(model={"engine": "pytorch", "path": "net.py"}, output=output)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Goes to the other machine, where one setting is on record, too."""

    def go() -> None:
        monkeypatch.setenv("OTHER_MACHINE", "1")
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")

    return go


def inferred(path: Path, block: tuple[int, int, int], *changes: str) -> dict[str, Any]:
    """Facts of the receipt of a block, inferred as a process does it."""
    receipt = inference_and_donate(Workspace(load_spec(path, changes)), block).receipt
    assert receipt is not None
    return receipt.facts


def stored(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("exchange/*/*/reference.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_another_instruction_set(path: Path, tmp_path: Path) -> None:
    """In processes of their own, as an instruction set is chosen when libraries are loaded."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this machine has no instruction set that gives other bits than AVX2")
    (tmp_path / "net.py").write_text(CONVOLUTIONS)
    content = yaml.safe_load(path.read_text())
    content["model"]["precision"] = "bfloat16"
    path.write_text(yaml.safe_dump(content))
    older = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

    def call(*words: object, **machine: str) -> Outcome:
        command = [sys.executable, "-m", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **machine})

    block = ("chunkflow_core.inference_and_donate", path, "--block", 0, 0, 1)
    assert call("chunkflow_core", "prepare", path).returncode == 0

    for refused in (call(*block, **older), call("chunkflow_core", "prepare", path, **older)):
        assert refused.returncode == 78
        lines = [line.strip() for line in refused.stderr.splitlines()]
        assert "instruction set: AVX512, now AVX2" in lines
        assert "ONEDNN_MAX_CPU_ISA: not set, now AVX2" in lines
    assert call(*block).returncode == 0
    assert call("chunkflow_core", "prepare", path, "--overwrite", **older).returncode == 0
    assert "up to date" not in call(*block, **older).stdout
    assert call("chunkflow_core", "prepare", path).returncode == 78


def test_what_is_done_elsewhere_is_refused(
    path: Path, tmp_path: Path, elsewhere: Callable[[], None], chunkflow: Callable[..., Outcome]
) -> None:
    prepared(path)
    elsewhere()
    before = files_below(tmp_path / "output")

    with pytest.raises(SpecError) as refusal:
        inferred(path, FIRST)
    told = [refusal.value] + [chunkflow(command, path).stderr for command in ("prepare", "run")]

    for text in map(str, told):
        first, *lines = [line.strip() for line in text.splitlines() if "WARNING" not in line]
        assert "this machine gives other bits than the one that has prepared the volume" in first
        assert lines[0] == "NVIDIA_TF32_OVERRIDE: not set, now 1"
        for way in ("same kind of machine", "model.mixed_hardware: true", "--overwrite", "other_model: overwrite"):
            assert way in lines[1]
    assert chunkflow("prepare", path).returncode == 78
    assert files_below(tmp_path / "output") == before
    assert not list(tmp_path.glob("exchange/*/*/receipts/*/*/*"))


def test_what_is_on_no_record_is_refused_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(path)
    monkeypatch.setenv("OTHER_MACHINE", "1")
    with pytest.raises(SpecError, match=r"What differs:\n  nothing that is on record\n"):
        inferred(path, FIRST)


def test_the_same_machine_may_say_other_things_of_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits count, not what is on record."""
    prepared(path)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert "other_bits" not in inferred(path, FIRST)


def test_a_block_that_is_up_to_date_loads_nothing(
    path: Path, elsewhere: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(path)
    inferred(path, FIRST)
    elsewhere()
    capsys.readouterr()

    inferred(path, FIRST)

    assert "loaded" not in capsys.readouterr().out


def test_mixed_hardware_goes_on_and_says_so(
    path: Path, elsewhere: Callable[[], None], caplog: pytest.LogCaptureFixture, chunkflow: Callable[..., Outcome]
) -> None:
    prepared(path)
    assert "other_bits" not in inferred(path, FIRST)
    elsewhere()

    facts = inferred(path, LAST, MIXED)

    assert facts["other_bits"] == ["NVIDIA_TF32_OVERRIDE: not set, now 1"]
    assert "model.mixed_hardware: true lets it go on" in caplog.text
    assert chunkflow("run", path, "--set", MIXED, "--seams", 4).returncode == 0
    verified = chunkflow("verify", path, "--set", MIXED, "--seams", 4)
    assert (verified.returncode, "0 windows computed again: 0 findings" in verified.stdout) == (0, True)
    assert NOT_COMPARED in caplog.text


def test_windows_with_patches_of_another_machine_are_not_compared(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chunkflow: Callable[..., Outcome]
) -> None:
    """Also where this is the machine of the reference; but what is wrong by itself is found."""
    prepared(path)
    monkeypatch.setenv("OTHER_MACHINE", "1")
    inferred(path, FIRST, MIXED)
    monkeypatch.undo()
    run(path)
    near, far = ["--bbox", 0, 0, 0, 12, 24, 24], ["--bbox", 18, 40, 36, 20, 48, 40]
    part = ["--seams", 1, "--set", MIXED]

    assert chunkflow("verify", path, *near, *part).returncode == 0
    assert "some of its patches were run on a machine that gives other bits" in caplog.text
    assert chunkflow("verify", path, *near, "--seams", 1).returncode == 65, "this spec does not allow it"

    inference_and_donate(Workspace(load_spec(path)), FIRST, why="forced")
    run(path)
    workspace = Workspace(load_spec(path))
    whole = workspace.spec.grid.roi
    workspace.output.write(whole, np.nextafter(workspace.output.read(whole), np.float32(2)))
    assert chunkflow("verify", path, *far, *part).returncode == 65


def test_verify_elsewhere_says_what_it_can_not_tell(
    path: Path, tmp_path: Path, elsewhere: Callable[[], None], chunkflow: Callable[..., Outcome]
) -> None:
    run(path)
    before = files_below(tmp_path)
    elsewhere()

    told = chunkflow("verify", path, "--seams", 4)
    assert told.returncode == 65
    assert "0 windows computed again: 1 findings" in told.stdout
    first, second = told.stderr.strip().splitlines()
    assert first.endswith("is as its receipts say, but no voxel was computed again:")
    assert NOT_COMPARED in second
    assert "NVIDIA_TF32_OVERRIDE: not set, now 1" in second
    assert not any(word in told.stderr for word in ("not right", "wrong", "repair"))

    (finding,) = json.loads(chunkflow("verify", path, "--json").stdout.splitlines()[-1])["findings"]
    assert (finding["kind"], finding["block"]) == ("not compared", None)
    assert chunkflow("verify", path, "--seams", 0, "--deep").returncode == 0
    assert repair(Workspace(load_spec(path)), seams=4) == frozenset()
    after = files_below(tmp_path)
    assert {name: content for name, content in after.items() if not name.endswith("repair.json")} == before


def test_what_is_damaged_is_told_first(
    path: Path, tmp_path: Path, elsewhere: Callable[[], None], chunkflow: Callable[..., Outcome]
) -> None:
    run(path)
    next(tmp_path.glob("output/*/*_*_*")).unlink()
    elsewhere()
    told = chunkflow("verify", path).stderr
    assert "is not right:" in told.splitlines()[0]
    assert "is missing" in told.splitlines()[1]
    assert NOT_COMPARED in told
    assert "run SPEC --repair" in told


def test_overwriting_takes_the_other_machine_for_the_reference(
    path: Path, tmp_path: Path, elsewhere: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    prepared(path)
    first = stored(tmp_path)["digests"]
    at_work = Workspace(load_spec(path))
    inference_and_donate(at_work, FIRST)
    prepared(path, other="overwrite")
    assert (modes(tmp_path), len(list(tmp_path.glob("exchange/*/*/receipts/infer/*/*")))) == (["new"], 1), (
        "it is the same"
    )
    elsewhere()

    prepared(path, other="overwrite", once=True)

    assert "1 receipts are discarded" in caplog.text
    assert not set(stored(tmp_path)["digests"]) & set(first)
    assert modes(tmp_path) == ["new", "overwrite"]
    with pytest.raises(SpecError, match="has been taken anew for the same spec"):
        inference_and_donate(at_work, LAST)
    assert not list(tmp_path.glob("exchange/*/*/receipts/infer/*/*"))
    assert "other_bits" not in inferred(path, FIRST)


def test_a_new_output_takes_any_machine(path: Path, tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    """What a reference was for is gone with the output."""
    prepared(path)
    first = stored(tmp_path)["digests"]
    (tmp_path / "output").rename(tmp_path / "gone")
    elsewhere()

    prepared(path, once=True)

    assert not set(stored(tmp_path)["digests"]) & set(first)


def test_of_two_machines_that_prepare_at_a_time_one_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one prepares from end to end while this one is about to claim the output."""

    def then_another(place: str, name: str, content: bytes) -> None:
        put_file(place, name, content)
        monkeypatch.undo()
        monkeypatch.setenv("OTHER_MACHINE", "1")
        prepared(path)
        monkeypatch.undo()

    monkeypatch.setattr(reference, "put_file", then_another)
    with pytest.raises(StorageError, match="has just been written by somebody else"):
        prepared(path)
    with pytest.raises(SpecError, match="this machine gives other bits"):
        prepared(path)


def test_what_the_first_machine_ends_later_counts_for_nothing(path: Path, elsewhere: Callable[[], None]) -> None:
    """A stage there has looked at the claim, and writes its receipt after that was replaced."""
    prepared(path)
    workspace = Workspace(load_spec(path))
    late = inference_and_donate(workspace, FIRST).receipt
    assert late is not None
    elsewhere()
    spec = prepared(path, other="overwrite")

    workspace.exchange.put_receipt(late)

    assert workspace.exchange.receipt("infer", FIRST) == late, "where nobody looks any more"
    assert Exchange(spec).receipt("infer", FIRST) is None


def test_a_process_runs_one_patch_more_and_prepare_none_again(make_spec: MakeSpec) -> None:
    path = make_spec()

    class Counting(Identity):
        passes = 0

        def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
            self.passes += 1
            return super().__call__(patches)

    spec = load_spec(path, ["model.streams=1"])
    engine = Counting(spec)
    same = Workspace(spec, engine)
    prepare(same)
    assert engine.passes == 3 + 1
    assert same.engine is engine
    assert engine.passes == 3 + 1
    another = Workspace(spec, engine)
    assert (another.engine, another.engine) == (engine, engine)
    assert engine.passes == 3 + 1 + 1


def test_a_network_that_gives_other_bits_each_time(path: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CHANCE)
    prepared(path)
    with pytest.raises(SpecError, match="gives other bits each time for the same patch"):
        inferred(path, FIRST)


def test_an_exchange_without_a_reference(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an earlier version has left it: what was begun goes on, and the next prepare makes one."""
    prepared(path)
    (file,) = tmp_path.glob("exchange/*/*/reference.json")
    file.unlink()
    caplog.set_level(logging.WARNING)

    inferred(path, FIRST)

    assert "whether this machine gives other bits is unknown" in caplog.text
    assert not file.exists()
    prepared(path, once=True)
    assert file.exists()
    assert list(tmp_path.glob("exchange/*/*/receipts/infer/*/*")), "nothing is discarded"


def test_a_damaged_reference_is_not_passed_over(path: Path, tmp_path: Path) -> None:
    prepared(path)
    (file,) = tmp_path.glob("exchange/*/*/reference.json")
    for content in (file.read_bytes()[:40], b"[]", b"{}"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"reference\.json is damaged"):
            inferred(path, FIRST)


def test_reference_patches_are_the_same_for_ever() -> None:
    patches = [reference_patch(number, 2, (5, 17, 18)) for number in range(3)]
    assert [checksum(patch.tobytes()) for patch in patches] == [
        "8c0110a0a41725eb888b678b097230ae",
        "d9faf1d7c2ee01b2fb602cfb4db69df8",
        "328b14007e059b4ce5b7207cccf88d93",
    ]
    for patch in patches:
        assert patch.shape == (2, 5, 17, 18)
        assert patch.dtype == np.float32
        assert patch.min() >= 0 and patch.max() <= 1 and np.ptp(patch) > 0.5
