"""Whose an output is: another model's is refused, overwritten or mixed, as asked for.

Nor is an output written to that another model has claimed during a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume

from chunkflow_core.__main__ import main
from chunkflow_core.errors import ChunkflowError, SpecError, StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.inference import reference
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps import provenance
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.cleanup import cleanup
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.output import open_output
from chunkflow_core.steps.prepare import Other, prepare
from chunkflow_core.steps.provenance import History
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import OutputLayer
from tests.support.outputs import OTHER, modes, prepared, run, steps
from tests.support.volume import files_below, output_of

MakeSpec = Callable[..., Path]


def write_a_voxel(spec: VolumeSpec) -> None:
    """Write a storage chunk, so that there is something to be replaced."""
    output = open_output(spec)
    chunk = next(output.expected_chunks(spec.grid.roi))
    output.write(chunk, np.zeros((spec.output.stored_channels, *chunk.shape), spec.output.dtype))


def test_an_empty_output_is_anybody_s(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Who corrects a spec after the first ``prepare`` need not say more."""
    path = make_spec()
    prepared(path)

    prepared(path, *OTHER)

    assert modes(tmp_path) == ["new", "new"]
    assert steps(tmp_path)[-1]["fingerprints"] == [load_spec(path, OTHER).fingerprint]


def test_output_of_another_fingerprint_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = make_spec()
    own, other = load_spec(path), load_spec(path, OTHER)
    prepared(path)
    write_a_voxel(own)
    before = files_below(tmp_path)

    with pytest.raises(SpecError) as refusal:
        prepare(Workspace(other))

    told = str(refusal.value)
    assert f"file://{tmp_path}/output is of fingerprint {own.fingerprint}" in told
    assert f"this spec is of {other.fingerprint}" in told
    differences = [line.strip() for line in told.splitlines() if ", now " in line]
    assert differences == ["input.padding: reflect, now edge", "model.threads: 1, now 2"]
    for way in ("output.path", "--overwrite", "other_model: overwrite", "--accept-mixture", "other_model: mixture"):
        assert way in told.splitlines()[-1]
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (("name=renamed", "schedule='@daily'", "model.streams=1", "output.compression=none"), None),
        (("model.device=cpu", "model.mixed_hardware=true"), None),
        (("skip.zeros=false",), "skip.zeros: true, now false"),
        (("model.output=1",), "model.output: not set, now 1"),
        (("model.dimensions=3", "input.values.scale=unit"), None),
        (("model.dimensions=2",), "model.dimensions: not set, now 2"),
        (("input.values.scale=raw",), "input.values.scale: not set, now raw"),
        (("model.options={a: {b: [1]}}",), "model.options.a.b: not set, now [1]"),
        (("output.range=[-1, 1]",), "output.range: [0.0, 1.0], now [-1.0, 1.0]"),
        (("roi=[[6, 0, 0], [20, 48, 40]]",), "start of the ROI: [0, 0, 0], now [6, 0, 0]"),
    ],
)
def test_differences(make_spec: MakeSpec, changes: tuple[str, ...], difference: str | None) -> None:
    """Differences that decide no number are none."""
    path = make_spec()
    same = prepared(path)
    other = load_spec(path, changes)
    assert History(other).differences() == ([difference] if difference else [])
    assert (other.fingerprint == same.fingerprint) == (difference is None)


def test_model_file_with_other_content_is_another_model(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def InstantiatedModel(x):\n    return x\n")
    path = make_spec(model={"engine": "pytorch", "path": "net.py"})
    before = provenance.digests(prepared(path))["net.py"]
    write_a_voxel(load_spec(path))

    (tmp_path / "net.py").write_text("def InstantiatedModel(x):\n    return 1 - x\n")

    after = provenance.digests(load_spec(path))["net.py"]
    with pytest.raises(SpecError, match=f"model file net.py: sha256 {before[:16]}…, now sha256 {after[:16]}…"):
        prepared(path)


def test_overwriting_and_going_back(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The receipts of a fingerprint are true only until another has claimed the output."""
    path = make_spec()
    run(path)
    first = output_of(path)

    other = prepared(path, "output.range=[0, 2]", other="overwrite")
    run(path, "output.range=[0, 2]")  # claimed once, it needs no flag
    assert abs(output_of(path).astype(int) - first // 2).max() <= 1

    with pytest.raises(SpecError, match=other.fingerprint):
        prepared(path)
    own = prepared(path, other="overwrite")
    run(path)
    np.testing.assert_array_equal(output_of(path), first)
    claims = [step for step in steps(tmp_path) if step["mode"] != "whole"]
    assert [(step["mode"], step["fingerprint"]) for step in claims] == [
        ("new", own.fingerprint),
        ("overwrite", other.fingerprint),
        ("overwrite", own.fingerprint),
    ]


def test_mixture(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The blocks that are asked for are the other model's, and only they.

    Provenance says of whom there are blocks.
    """
    path = make_spec()
    run(path)
    first = output_of(path)

    other = prepared(path, "output.range=[0, 2]", other="mixture")
    last = ["--bbox", "14", "26", "26", "20", "48", "40"]
    assert main(["run", str(path), "--set", "output.range=[0, 2]", "--seams", "0", *last]) == 0

    mixed = output_of(path)
    assert abs(mixed[:, 14:, 26:, 26:].astype(int) - first[:, 14:, 26:, 26:] // 2).max() <= 1
    step = steps(tmp_path)[-1]
    assert (step["mode"], step["run"]) == ("mixture", "by-hand")
    assert step["fingerprints"] == [load_spec(path).fingerprint, other.fingerprint]

    own = prepared(path, other="mixture")
    assert steps(tmp_path)[-1]["fingerprints"] == [other.fingerprint, own.fingerprint]


@pytest.mark.parametrize("other", ["overwrite", "mixture"])
def test_nothing_is_claimed_from_oneself(make_spec: MakeSpec, tmp_path: Path, other: Other) -> None:
    path = make_spec()
    run(path)
    before = files_below(tmp_path / "output")
    prepared(path, other=other)
    assert files_below(tmp_path / "output") == before
    assert list(tmp_path.rglob("receipts/infer/**/*.json"))


def test_of_two_that_prepare_at_a_time_one_has_the_layer(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One finds nobody's layer; the other one prepares from end to end; then the first goes on."""
    path = make_spec()
    own, other = load_spec(path), load_spec(path, OTHER)
    add = History.add

    def then_add(history: History, *arguments: Any) -> None:
        monkeypatch.undo()
        prepared(path, *OTHER)
        add(history, *arguments)

    monkeypatch.setattr(History, "add", then_add)
    with pytest.raises(StorageError, match=r"claims/00000001\.json has just been written by somebody else"):
        prepare(Workspace(own))

    assert [step["fingerprint"] for step in steps(tmp_path)] == [other.fingerprint]
    inference_and_donate(Workspace(other), (0, 0, 0))
    with pytest.raises(SpecError, match="is claimed for"):
        inference_and_donate(Workspace(own), (0, 0, 0))


def test_a_step_that_another_one_has_lost_is_told_again(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Provenance is one file: of two that write it at a time, the last one wins."""
    path = make_spec()
    prepared(path)
    file = tmp_path / "output" / "provenance"
    before = file.read_bytes()
    prepared(path, *OTHER, other="overwrite")
    file.write_bytes(before)
    prepared(path, other="overwrite")
    assert modes(tmp_path) == ["new", "overwrite", "overwrite"]


@pytest.mark.parametrize("layer_too", [True, False])
def test_a_layer_that_is_deleted_and_made_again(make_spec: MakeSpec, tmp_path: Path, *, layer_too: bool) -> None:
    """Its claims begin at 1 again, or go on: tasks from before neither write nor count."""
    path = make_spec()
    workspace = Workspace(prepared(path))
    late = inference_and_donate(workspace, (0, 0, 0)).receipt
    assert late is not None
    if layer_too:
        shutil.rmtree(tmp_path / "output")
    else:
        (tmp_path / "output" / "info").unlink()
    prepared(path)

    with pytest.raises(SpecError, match="has been taken anew for the same spec"):
        inference_and_donate(workspace, (0, 0, 1))
    workspace.exchange.put_receipt(late)

    assert [*Exchange(load_spec(path)).all_receipts()] == []
    shutil.rmtree(tmp_path / "output")
    with pytest.raises(ChunkflowError, match=r"does not say whose it is|there is no layer"):
        inference_and_donate(workspace, (0, 0, 1))


def test_a_layer_that_is_extended_meanwhile_stays_the_spec_s_own(make_spec: MakeSpec) -> None:
    path = make_spec()
    smaller = ("roi=[[0, 0, 0], [18, 48, 40]]",)
    at_work = Workspace(prepared(path, *smaller))
    inference_and_donate(at_work, (0, 0, 0))
    prepared(path)
    inference_and_donate(at_work, (0, 0, 1))
    assert Exchange(load_spec(path)).receipts("infer").keys() == {(0, 0, 0), (0, 0, 1)}


@pytest.mark.parametrize("writes", ["provenance", "reference"])
def test_a_claim_that_was_cut_short(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    """What counts changes in one step: with the claim."""
    path = make_spec()
    run(path)
    own, other = load_spec(path), prepared(path, *OTHER, other="overwrite")

    def outage(*_: object, **__: object) -> None:
        raise StorageError("out of reach")

    with monkeypatch.context() as storage:
        storage.setattr({"provenance": provenance, "reference": reference}[writes], "put_file", outage)
        with pytest.raises(StorageError, match="out of reach"):
            prepared(path, other="overwrite")
    assert History(own).fingerprint == (own if writes == "provenance" else other).fingerprint
    assert [*Exchange(own).all_receipts()] == []

    prepared(path, other="overwrite")

    assert History(own).fingerprint == own.fingerprint
    assert [*Exchange(own).all_receipts()] == []
    assert [step["fingerprint"] for step in steps(tmp_path)][-1] == own.fingerprint


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"processing": 5}', '{"processing": [{"method": {"task": "x"}, "by": "y"}, "z"]}']
)
def test_a_damaged_provenance(make_spec: MakeSpec, tmp_path: Path, text: str | None) -> None:
    """It decides nothing, and becomes one that CloudVolume takes, with all that has been done."""
    path = make_spec()
    run(path)
    prepared(path, *OTHER, other="mixture")
    file, before = tmp_path / "output" / "provenance", steps(tmp_path)
    file.unlink() if text is None else file.write_text(text)
    inference_and_donate(Workspace(load_spec(path, OTHER)), (0, 0, 0))
    prepared(path, *OTHER)
    assert [step for step in steps(tmp_path) if step["task"] != "x"] == before
    assert len([*Exchange(load_spec(path, OTHER)).all_receipts()]) == 1


def test_a_layer_of_an_earlier_version(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Only its provenance says whose it is: nothing counts as done, and others are refused."""
    path = make_spec()
    run(path)
    shutil.rmtree(tmp_path / "output" / "claims")
    with pytest.raises(SpecError, match=r"model\.threads: 1, now 2"):
        prepared(path, *OTHER)
    assert [*Exchange(load_spec(path)).all_receipts()] == []
    prepared(path)
    assert [*Exchange(load_spec(path)).all_receipts()] == []
    run(path)
    assert modes(tmp_path)[-1] == "new"


def test_what_others_have_written_to_provenance_is_kept(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = make_spec()
    prepared(path)
    volume = CloudVolume(f"file://{tmp_path}/output", progress=False)
    volume.provenance.owners = ["someone@example.org"]
    volume.provenance.processing.append({"method": {"task": "downsampling"}, "by": "someone"})
    volume.commit_provenance()

    prepared(path)  # whose it is has not changed
    prepared(path, *OTHER, other="overwrite")

    stored = CloudVolume(f"file://{tmp_path}/output", progress=False).provenance
    assert stored.owners == ["someone@example.org"]
    assert [step["method"]["task"] for step in stored.processing][1] == "downsampling"
    assert len(stored.processing) == 3


class TestClaimDuringARun:
    """An output that another model has claimed since is not written to.

    The two would replace each other's blocks for good.
    """

    def test_stages_of_the_earlier_spec_refuse(self, make_spec: MakeSpec, tmp_path: Path) -> None:
        path = make_spec(exchange={"path": f"file://{tmp_path}/exchange", "donations": "keep"})
        run(path)
        first = load_spec(path)
        second = prepared(path, *OTHER, other="overwrite")
        before, receipts = files_below(tmp_path / "output"), Workspace(first).exchange.receipts("infer").keys()

        for stage in (inference_and_donate, receive_and_blend):
            with pytest.raises(SpecError, match=rf"is claimed for fingerprint {second.fingerprint} \(since 20"):
                stage(Workspace(first), (1, 1, 1), why="forced")

        assert files_below(tmp_path / "output") == before
        assert Workspace(first).exchange.receipts("infer").keys() == receipts

    def test_a_task_that_begins_too_late_runs_no_patch(self, make_spec: MakeSpec) -> None:
        path = make_spec()
        first = prepared(path)
        prepared(path, *OTHER, other="overwrite")

        def patch_done() -> None:
            pytest.fail("a patch is run for nothing")

        with pytest.raises(SpecError, match="is claimed for fingerprint"):
            inference_and_donate(Workspace(first), (0, 0, 0), patch_done=patch_done)

    def test_a_block_at_work_writes_no_more(self, make_spec: MakeSpec, tmp_path: Path) -> None:
        path = make_spec()
        workspace = Workspace(prepared(path))

        with pytest.raises(SpecError, match="is claimed for fingerprint"):
            inference_and_donate(
                workspace, (0, 0, 0), patch_done=lambda: prepared(path, *OTHER, other="overwrite") and None
            )

        assert workspace.exchange.receipts("infer") == {}
        assert not (tmp_path / "output" / "4_4_40").exists()

    @pytest.mark.parametrize(
        ("stage", "owner", "last"), [("infer", Exchange, "keep_donations"), ("blend", OutputLayer, "write")]
    )
    def test_no_receipt_if_it_was_claimed_after_the_last_look(
        self, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, owner: type, last: str
    ) -> None:
        path = make_spec(exchange={"path": f"file://{tmp_path}/exchange", "donations": "keep"})
        run(path)
        workspace, original = Workspace(load_spec(path)), getattr(owner, last)

        def then_claimed(*arguments: object) -> object:
            result = original(*arguments)
            prepared(path, *OTHER, other="overwrite")
            return result

        with monkeypatch.context() as hooked:
            hooked.setattr(owner, last, then_claimed)
            with pytest.raises(SpecError, match="is claimed for fingerprint"):
                {"infer": inference_and_donate, "blend": receive_and_blend}[stage](workspace, (1, 1, 1), why="forced")

        assert workspace.exchange.receipt(stage, (1, 1, 1)) is None

    def test_a_claim_that_cannot_be_read(self, make_spec: MakeSpec, tmp_path: Path) -> None:
        path = make_spec()
        workspace = Workspace(prepared(path))
        inference_and_donate(workspace, (0, 0, 0))
        file = tmp_path / "output" / "claims" / "00000002.json"
        for part in (b"", b"{", b"[]"):
            file.write_bytes(part)
            with pytest.raises(StorageError, match=r"00000002\.json can't be read: it is being written"):
                inference_and_donate(workspace, (0, 0, 1))
        file.unlink()
        inference_and_donate(workspace, (0, 0, 1))

    def test_an_output_that_nobody_has_prepared(
        self, make_spec: MakeSpec, tmp_path: Path, chunkflow: Callable[..., Any]
    ) -> None:
        path = make_spec()
        prepared(path)
        shutil.rmtree(tmp_path / "output" / "claims")
        with pytest.raises(SpecError, match="does not say whose it is; run `chunkflow-core prepare SPEC` first"):
            inference_and_donate(Workspace(load_spec(path)), (0, 0, 0))
        assert chunkflow("prepare", path).returncode == 0
        inference_and_donate(Workspace(load_spec(path)), (0, 0, 0))


def test_cleaning_up_deletes_what_earlier_epochs_have_left(make_spec: MakeSpec, tmp_path: Path) -> None:
    """And nothing of the present one, nor of one that comes."""
    path = make_spec(exchange={"path": f"file://{tmp_path}/exchange", "donations": "keep"})
    late = Workspace(prepared(path))
    receipt = inference_and_donate(late, (0, 0, 0)).receipt
    assert receipt is not None
    prepared(path, *OTHER, other="overwrite")
    spec = prepared(path, other="overwrite")
    late.exchange.put_receipt(receipt)
    inference_and_donate(Workspace(spec), (0, 0, 0))
    above = tmp_path / "exchange" / spec.fingerprint
    (above / "0003-0123456789ab" / "receipts").mkdir(parents=True)
    (above / "0003-0123456789ab" / "receipts" / "a.json").touch()
    before = files_below(above)

    cleanup(spec)

    assert Exchange(spec).epoch.startswith("0002-")
    gone = before.keys() - files_below(above).keys()
    assert gone == {name for name in before if name.startswith(late.exchange.epoch)} != set()


def test_only_the_present_owner_s_cleaning_up_deletes_epochs(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = make_spec()
    run(path)
    prepared(path, *OTHER, other="overwrite")
    before = files_below(tmp_path)
    cleanup(load_spec(path))
    assert files_below(tmp_path) == before
