"""The audit finds what is wrong, and only that."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from chunkflow_core.__main__ import main
from chunkflow_core.audit import seams
from chunkflow_core.audit.audit import repair, verify
from chunkflow_core.audit.findings import Audit, Finding, advice
from chunkflow_core.audit.seams import windows
from chunkflow_core.audit.stored import StoredAudit
from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from tests.support.harms import (
    CORE,
    HARMS,
    LAST,
    Harm,
    Volume,
    core_chunk_lost,
    core_voxel_flipped,
    stray_chunks,
    write_wrong,
)
from tests.support.volume import write_volume


def found(volume: Volume, **options: object) -> list[Finding]:
    return verify(Workspace(volume.spec), seed=0, **options).findings  # type: ignore[arg-type]


@pytest.mark.parametrize("harm", HARMS, ids=str)
def test_a_harm_is_found(volume: Volume, harm: Harm) -> None:
    harm.do(volume)

    findings = found(volume, seams=harm.seams, deep=harm.deep)

    assert {finding.kind for finding in findings} == harm.kinds
    assert any(harm.told in str(finding) for finding in findings), findings
    assert Audit(findings=findings).to_do_again == harm.blocks
    if harm.deep:
        assert found(volume, seams=0) == [], "without reading, there is nothing to see"


def test_each_stray_chunk_is_found(volume: Volume) -> None:
    before = volume.written()
    stray_chunks(volume)

    assert {finding.subject for finding in found(volume, seams=0)} == volume.written().keys() - before.keys()
    part = {finding.subject for finding in found(volume, seams=0, box=Box((0, 0, 0), (1, 1, 1)))}
    assert part == {"0-16_0-16_0-8", "0-8_0-8_0-3", "00-8_0-8_0-4"}, "only what touches the part"


def test_all_is_well_with_donations_and_without(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    audit = verify(Workspace(volume.spec), seams=8, deep=True, step_done=lambda: steps.append(1))
    assert (audit.findings, audit.blocks, audit.storage_chunks, audit.seams) == ([], 8, 150, 8)
    assert len(steps) == 16

    assert main(["cleanup", str(volume.path)]) == 0
    assert not list(volume.exchange.rglob("donations/*/*/*"))
    capsys.readouterr()
    assert main(["verify", str(volume.path), "--seams", "8", "--deep"]) == 0
    assert re.search(
        r"8 blocks, 150 storage chunks, 8 windows computed again \(seed \d+\): 0 findings", capsys.readouterr().out
    )


def test_what_is_told(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    core_chunk_lost(volume)
    part = ["--bbox", "18", "40", "36", "20", "48", "40"]

    assert main(["verify", str(volume.path), "--seams", "0"]) == 65

    told = capsys.readouterr().err
    assert f"block (1, 1, 1): the storage chunk {CORE} is missing" in told
    assert told.count("is missing") == 1
    assert "`chunkflow-core run SPEC --repair` (in Airflow: trigger the volume with only repair)" in told
    assert main(["verify", str(volume.path), "--seams", "0", *part]) == 65
    told = capsys.readouterr().err
    assert "`chunkflow-core run SPEC --repair --bbox 18 40 36 20 48 40` (in Airflow: " in told
    assert "with only repair and this bounding box)" in told
    assert main(["verify", str(volume.path), "--seams", "0", "--bbox", "0", "0", "0", "12", "24", "24"]) == 0
    capsys.readouterr()
    assert main(["verify", str(volume.path), "--seams", "0", "--json"]) == 65
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    message = f"the storage chunk {CORE} is missing"
    assert finding == {"kind": "missing chunk", "block": [1, 1, 1], "subject": CORE, "message": message}


def test_what_can_not_be_decompressed_does_not_end_the_audit(volume: Volume) -> None:
    """Seams that can't be read are findings, too, though no storage chunk has been looked into."""
    for file in volume.scale.iterdir():
        data, times = bytearray(file.read_bytes()), file.stat()
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as by a medium that fails

    findings = found(volume, seams=2)

    assert findings
    assert {finding.kind for finding in findings} == {"seam"}
    assert all("can't be read" in finding.message for finding in findings)
    assert len(found(volume, seams=0, deep=True)) == 150


def test_a_seam_that_is_wrong(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of every voxel around the face between the two layers of blocks is wrong.

    Any window there must see it.
    """
    write_wrong(volume.spec, Box((8, 0, 0), (16, 48, 40)))

    assert main(["verify", str(volume.path), "--seams", "12", "--seed", "0"]) == 65
    assert "at the seam" in capsys.readouterr().err


def test_half_of_the_windows_are_where_there_is_something_new(volume: Volume) -> None:
    workspace = Workspace(volume.spec)
    for run, block in (("second", LAST), ("third", (0, 0, 1))):
        inference_and_donate(workspace, block, run=run, why="forced")
        receive_and_blend(workspace, block, run=run, why="forced")
    stored = StoredAudit(workspace, list(volume.spec.grid.indices()), Audit(), deep=False, mixed=False)
    stored.run(lambda: None)

    def touching(run: str, number: int, seed: int) -> list[tuple[int, int, int]]:
        return [
            block
            for window in windows(workspace, stored, number, run, seed)
            for block in volume.spec.grid.blocks_touching(window)
        ]

    for seed in range(20):
        assert touching("second", 5, seed).count(LAST) >= 3
        assert touching("", 2, seed).count((0, 0, 1)) >= 1, "what was done last"


def test_every_audit_looks_elsewhere(
    volume: Volume, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    for given in ([], [], ["--seed", "7"]):
        assert main(["verify", str(volume.path), "--seams", "2", "--json", *given]) == 0
        seeds.append(json.loads(capsys.readouterr().out)["seed"])
    assert seeds[0] != seeds[1], "drawn anew"
    assert seeds[2] == 7

    def drawn(seed: int, count: int) -> list[Box]:
        return list(windows(workspace, stored, count, "", seed))

    workspace = Workspace(volume.spec)
    stored = StoredAudit(workspace, list(volume.spec.grid.indices()), Audit(), deep=False, mixed=False)
    stored.run(lambda: None)
    assert drawn(7, 4) == drawn(7, 4) != drawn(8, 4)
    looked_at = {block for window in drawn(7, 40) for block in volume.spec.grid.blocks_touching(window)}
    assert looked_at == set(volume.spec.grid.indices())
    # A window of one voxel is where it was put.
    monkeypatch.setattr(seams, "WINDOW", (1, 1, 1))
    at_seam = [any(at in (0, 12, 24) and at for at in window.start) for window in drawn(7, 40)]
    assert 20 < sum(at_seam) < 40, "mostly at seams, but not only"


def test_a_volume_of_one_block_has_windows_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_volume(tmp_path, roi=[[0, 0, 0], [12, 24, 24]]))
    assert main(["run", path, "--seams", "0"]) == 0
    spec = load_spec(path)
    write_wrong(spec, spec.grid.roi)

    assert main(["verify", path, "--seams", "1"]) == 65
    assert "differ from a fresh computation" in capsys.readouterr().err


def test_what_is_not_done_is_told_apart_from_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_volume(tmp_path))
    part = ["--bbox", "0", "0", "30", "1", "1", "31"]
    assert main(["run", path, *part, "--seams", "4"]) == 0
    assert main(["verify", path, *part, "--deep"]) == 0
    capsys.readouterr()

    assert main(["verify", path]) == 65
    told = capsys.readouterr().err
    assert "6 of 8 blocks are not done yet: `chunkflow-core run SPEC` does them; nothing else is wrong" in told
    assert "missing" not in told and "repair" not in told
    assert main(["verify", path, "--seams", "0", "--json"]) == 65
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["kind"] for finding in findings} == {"not done"}

    next(tmp_path.glob("output/*/24-32_0-8_0-4*")).unlink()
    assert main(["verify", path, "--seams", "0"]) == 65
    told = capsys.readouterr().err
    assert "24-32_0-8_0-4 is missing" in told
    assert "run SPEC --repair" in told
    assert "6 of 8 blocks are not done yet" in told
    assert Audit(findings=verify(Workspace(load_spec(path)), seams=0).findings).to_do_again == {(0, 0, 1)}


def test_a_part_is_audited_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a part's neighbours hold, of another model or nothing at all, is not its affair."""
    spec = str(write_volume(tmp_path))
    last = ["--bbox", "18", "40", "36", "20", "48", "40"]
    assert main(["run", spec, "--seams", "0"]) == 0
    other = ["--set", "input.padding=edge", "--set", "model.threads=2", "--accept-mixture"]
    assert main(["run", spec, *last, "--seams", "20", *other]) == 0
    assert re.search(
        r"1 blocks, 12 storage chunks, 20 windows computed again \(seed \d+\): 0 findings", capsys.readouterr().out
    )
    mixture = load_spec(spec, ["input.padding=edge", "model.threads=2"])
    rest = verify(Workspace(mixture), seams=0).findings
    assert {finding.kind for finding in rest} == {"not done"}, "those of the other model are no harm to be repaired"


def test_blocks_are_audited_alone(volume: Volume) -> None:
    core_voxel_flipped(volume)

    assert found(volume, blocks=[(0, 0, 0), (0, 0, 1)], deep=True) == []
    assert [finding.block for finding in found(volume, blocks=[LAST], deep=True, seams=0)] == [LAST]
    assert found(volume, blocks=[], deep=True) == []


def test_another_spec_has_written_since(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(volume.path), "--set", "input.padding=edge", "--overwrite"]) == 0

    assert main(["verify", str(volume.path), "--seams", "0"]) == 65
    told = capsys.readouterr().err
    assert "another spec" in told
    assert "`chunkflow-core run SPEC` tells what differs" in told
    assert "repair" not in told
    before = volume.contents()
    with pytest.raises(SpecError, match="is claimed for fingerprint"):
        repair(Workspace(volume.spec))
    assert volume.contents() == before


def test_only_so_much_is_told(volume: Volume) -> None:
    findings = [Finding("stray chunk", None, str(i), f"stray {i}") for i in range(30)]
    findings.append(Finding("missing chunk", LAST, CORE, "is missing"))

    told = advice(Audit(blocks=8, findings=findings), volume.spec)

    assert told.splitlines()[1] == "  block (1, 1, 1): is missing"
    assert told.count("stray") == 19
    assert "… and 11 more" in told


def test_a_grown_volume(tmp_path: Path) -> None:
    """What was right before and has to be done again since is not complete.

    Once it is done, nothing is left over.
    """
    path = write_volume(tmp_path, roi=[[0, 0, 0], [16, 48, 40]], exchange=_kept(tmp_path))
    assert main(["run", str(path)]) == 0
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"roi": [[0, 0, 0], [20, 48, 40]]}))
    assert main(["prepare", str(path)]) == 0
    spec = load_spec(path)
    upper = {index for index in spec.grid.indices() if index[0] == 1}

    findings = verify(Workspace(spec), seams=4, deep=True).findings

    assert {finding.kind for finding in findings} == {"incomplete"}
    assert {finding.block for finding in findings} == upper
    assert main(["run", str(path), "--repair", "--seams", "4"]) == 0
    assert verify(Workspace(spec), seams=8, deep=True).findings == []


def _kept(folder: Path) -> dict[str, str]:
    return {"path": f"file://{folder}/exchange", "donations": "keep"}
