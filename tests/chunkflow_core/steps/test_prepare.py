"""What ``prepare`` does with an output that is there already.

The output is another model's, or one of a volume that has grown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume

from chunkflow_core.__main__ import main
from chunkflow_core.errors import DataError, SpecError, StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps import provenance
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.output import check_output, extend_output, open_output
from chunkflow_core.steps.prepare import Other, prepare
from chunkflow_core.steps.provenance import History
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer, OutputLayer
from tests.support.volume import files_below, output_of, spec_content

MakeSpec = Callable[..., Path]

OTHER = ("input.padding=edge", "model.threads=2")
"""What makes another fingerprint of a spec."""


def prepared(path: Path, *changes: str, other: Other = "refuse", once: bool = False) -> VolumeSpec:
    spec = load_spec(path, changes)
    prepare(Workspace(spec), run="by-hand", other=other, once=once)
    return spec


def run(path: Path, *changes: str) -> None:
    settings = [word for change in changes for word in ("--set", change)]
    assert main(["run", str(path), "--seams", "0", *settings]) == 0


def write_a_voxel(spec: VolumeSpec) -> None:
    """Write a storage chunk, so that there is something to be replaced."""
    output = open_output(spec)
    chunk = next(output.expected_chunks(spec.grid.roi))
    output.write(chunk, np.zeros((spec.output.channels, *chunk.shape), spec.output.dtype))


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the output's provenance says, once CloudVolume has found it valid."""
    stored = CloudVolume(f"file://{folder}/output", progress=False).provenance
    stored.validate()
    assert all(step["by"] for step in stored["processing"])
    return [step["method"] for step in stored["processing"]]


def modes(folder: Path) -> list[str]:
    return [step["mode"] for step in steps(folder)]


# ------------------------------------------------------------------------ another model, one output


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
        (("skip.zeros=false",), "skip.zeros: true, now false"),
        (("model.output=1",), "model.output: not set, now 1"),
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


def test_claim_that_was_cut_short_has_left_no_stale_receipt(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receipts go first.

    The other way round, those that another model's blocks have made untrue would be believed.
    """
    path = make_spec()
    run(path)
    other = prepared(path, *OTHER, other="overwrite")
    before = files_below(tmp_path / "output")

    def outage(*_: object, **__: object) -> None:
        raise StorageError("out of reach")

    with monkeypatch.context() as storage:
        storage.setattr(provenance, "put_file", outage)
        with pytest.raises(StorageError, match="out of reach"):
            prepared(path, other="overwrite")
    assert not list(tmp_path.rglob("receipts/*/**/*.json"))
    assert files_below(tmp_path / "output") == before
    with pytest.raises(SpecError, match=other.fingerprint):
        prepared(path)

    prepared(path, other="overwrite")
    assert History(load_spec(path)).fingerprint == load_spec(path).fingerprint


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"processing": 5}', '{"processing": [{"method": "x"}, "y"]}'])
def test_output_that_does_not_say_whose_it_is(make_spec: MakeSpec, tmp_path: Path, text: str | None) -> None:
    """Nothing counts as done, and the provenance becomes one that CloudVolume takes."""
    path = make_spec()
    run(path)
    file = tmp_path / "output" / "provenance"
    file.unlink() if text is None else file.write_text(text)
    prepared(path)
    assert not list(tmp_path.rglob("receipts/*/**/*.json"))
    method = json.loads(file.read_text())["processing"][-1]["method"]
    assert (method["mode"], method["fingerprint"]) == ("new", load_spec(path).fingerprint)
    CloudVolume(f"file://{tmp_path}/output", progress=False)


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


# ---------------------------------------------------------------------------------------- the model


WRONG = "def InstantiatedModel(x):\n    return x[..., :-1]\n"


def test_model_that_does_not_work_claims_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(WRONG)
    model = "model={engine: pytorch, path: net.py}"
    path = make_spec()
    with pytest.raises(DataError, match="the model gave an output of shape"):
        prepared(path, model)
    assert not (tmp_path / "output").exists()
    run(path)
    before = files_below(tmp_path)
    with pytest.raises(DataError, match="the model gave an output of shape"):
        prepared(path, model, other="overwrite")
    assert files_below(tmp_path) == before


def test_model_is_tried_once(
    make_spec: MakeSpec, tmp_path: Path, python: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that was tried is not even loaded, nor is PyTorch; but a changed one is."""
    (tmp_path / "net.py").write_text("print('loaded')\n\ndef InstantiatedModel(x):\n    return x\n")
    path = make_spec(model={"engine": "pytorch", "path": "net.py"})
    prepared(path, once=True)
    assert capsys.readouterr().out == "loaded\n"
    program = (
        "import sys; from chunkflow_core.spec import load_spec; from chunkflow_core.steps.workspace import Workspace;"
        "from chunkflow_core.steps.prepare import prepare;"
        f"trial = prepare(Workspace(load_spec({str(path)!r})), once=True);"
        "print(trial.seconds > 0, 'torch' in sys.modules)"
    )
    outcome = python("-c", program)
    assert outcome.stdout == "True False\n", outcome.stderr
    (tmp_path / "net.py").write_text(WRONG)
    with pytest.raises(DataError, match="the model gave an output of shape"):
        prepared(path, once=True, other="overwrite")


# ------------------------------------------------------------------------------------------- growth


def grow_input(layer: Path, shape: Vector) -> None:
    """Write the input layer anew: of another shape, with the same voxels where there were some."""
    data = np.random.default_rng(7).integers(0, 256, (1, 64, 64, 64), dtype=np.uint8)[
        :, : shape[0], : shape[1], : shape[2]
    ]
    new = NewLayer(f"file://{layer}", shape, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 16, 16))
    new.write(Box((0, 0, 0), shape), data)


def write_spec(folder: Path, shape: Vector, overlap: int) -> Path:
    folder.mkdir()
    grow_input(folder / "input", shape)
    path = folder / "spec.yaml"
    path.write_text(json.dumps(spec_content(folder / "input", folder) | {"patch_overlap": [overlap, 4, 4]}))
    return path


@pytest.mark.parametrize(
    ("before", "after", "overlap"),
    [
        ((44, 24, 24), (60, 24, 24), 2),  # along z, many blocks
        ((20, 47, 37), (26, 47, 37), 2),  # faces that cut storage chunks short and stay so
        ((14, 28, 26), (15, 40, 40), 2),  # along all axes, with blocks where there were none
        ((24, 24, 24), (27, 24, 24), 2),  # no storage chunk was cut short
        ((20, 16, 16), (30, 16, 16), 6),  # new patches reach into the last block but one
    ],
)
def test_grown_volume_is_what_a_fresh_run_would_write(
    tmp_path: Path, before: Vector, after: Vector, overlap: int
) -> None:
    """The outputs are equal by storage chunk; what is far from the old end is not done again."""
    path, fresh = write_spec(tmp_path / "grown", before, overlap), write_spec(tmp_path / "fresh", after, overlap)
    run(path)
    first = tmp_path / "grown/output/4_4_40/0-8_0-8_0-4.gz"
    written = first.stat().st_mtime_ns

    grow_input(tmp_path / "grown/input", after)
    run(path)
    run(fresh)

    chunks = files_below(tmp_path / "fresh/output/4_4_40")
    grown = files_below(tmp_path / "grown/output/4_4_40")
    assert grown.keys() == chunks.keys()
    assert grown == chunks
    infos = [json.loads((tmp_path / name / "output/info").read_text()) for name in ("grown", "fresh")]
    assert infos[0] == infos[1]
    assert [step["mode"] for step in steps(tmp_path / "grown")] == ["new", "extend"]
    assert steps(tmp_path / "grown")[-1]["roi"] == [[0, 0, 0], list(after)]
    if before == (44, 24, 24):
        assert first.stat().st_mtime_ns == written
    assert main(["verify", str(path), "--seams", "4"]) == 0


@pytest.mark.parametrize("padding", ["reflect", "edge", "constant"])
def test_input_that_grows_while_a_run_is_at_work(tmp_path: Path, padding: str, chunkflow: Callable[..., Any]) -> None:
    """The run is that of the volume as it was; the next does the rest.

    To this end, what ``prepare`` says is given to all that follows.
    """
    before, after = (14, 28, 26), (15, 40, 40)
    paths = [write_spec(tmp_path / name, shape, 2) for name, shape in (("it", before), ("was", before), ("is", after))]
    path, *others = paths
    of_padding = f"input.padding={padding}"
    for other in others:
        run(other, of_padding)
    found = json.loads(chunkflow("prepare", path, "--json", "--set", of_padding).stdout)
    settings = [of_padding, f"roi={found['roi']}", f"input.bounds={found['input_bounds']}"]
    (first, *rest) = load_spec(path, settings).grid.indices()
    inference_and_donate(Workspace(load_spec(path, settings)), first)

    grow_input(tmp_path / "it/input", after)

    for stage, blocks in ((inference_and_donate, rest), (receive_and_blend, [first, *rest])):
        for block in blocks:
            stage(Workspace(load_spec(path, settings)), block)
    assert files_below(tmp_path / "it/output/4_4_40") == files_below(tmp_path / "was/output/4_4_40")
    run(path, *settings)
    assert files_below(tmp_path / "it/output/4_4_40") == files_below(tmp_path / "was/output/4_4_40")
    run(path, of_padding)
    assert files_below(tmp_path / "it/output/4_4_40") == files_below(tmp_path / "is/output/4_4_40")


@pytest.mark.parametrize("fill_missing", [False, True])
def test_storage_chunks_at_the_old_end_get_other_names_while_a_block_reads(tmp_path: Path, fill_missing: bool) -> None:
    """Whoever has opened the layer before must not believe that a storage chunk is gone.

    Sections 40–44 are a file of their own until the layer grows.
    """
    path = write_spec(tmp_path / "it", (44, 24, 24), 2)
    spec = prepared(path, f"input.fill_missing={json.dumps(fill_missing)}")
    workspace, settings = Workspace(spec), [f"{key}={[[0, 0, 0], [44, 24, 24]]}" for key in ("roi", "input.bounds")]
    assert workspace.input.bounds.stop == (44, 24, 24)
    grow_input(tmp_path / "it/input", (60, 24, 24))
    for file in (tmp_path / "it/input").glob("*/*_40-44*"):
        file.unlink()

    with pytest.raises(StorageError, match=r"it had z 0–44 .*, now z 0–60 .*\. A retry reads it as it is now"):
        inference_and_donate(workspace, (3, 0, 0))

    assert workspace.exchange.receipts("infer") == {}
    again = load_spec(path, [*settings, f"input.fill_missing={json.dumps(fill_missing)}"])
    assert inference_and_donate(Workspace(again), (3, 0, 0)).receipt is not None


def test_bounds_that_the_input_does_not_have(make_spec: MakeSpec, chunkflow: Callable[..., Any]) -> None:
    outcome = chunkflow("prepare", make_spec(), "--set", "input.bounds=[[0, 0, 0], [20, 48, 41]]")
    assert outcome.returncode == 78
    assert "input.bounds: z 0–20 y 0–48 x 0–41 reach past the layer" in outcome.stderr
    assert "which has z 0–20 y 0–48 x 0–40; give a part of it" in outcome.stderr


def test_only_what_was_cut_short_is_deleted(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The ends at z 20 and x 40 cut storage chunks of 6 × 12 × 12 short, that at y 48 does not."""
    path = make_spec(roi=[[0, 0, 0], [14, 48, 40]])
    run(path)
    folder = tmp_path / "output" / "4_4_40"
    (folder / "notes.txt").write_text("not a storage chunk")
    before = set(files_below(folder))

    prepared(path, "roi=[[0, 0, 0], [16, 48, 40]]")

    gone = before - set(files_below(folder))
    assert gone == {name for name in before if name.endswith("_12-14.gz")}
    assert len(gone) == 16


def test_extension_that_was_cut_short_is_finished_by_the_next_prepare(make_spec: MakeSpec, tmp_path: Path) -> None:
    path, grown = make_spec(roi=[[0, 0, 0], [14, 48, 40]]), "roi=[[0, 0, 0], [16, 48, 40]]"
    run(path)
    folder, spec = tmp_path / "output" / "4_4_40", load_spec(path, [grown])

    extend_output(spec, check_output(spec, may_grow=True))  # killed here
    next(folder.glob("*_12-14.gz")).unlink()  # or after the first of those deletions

    prepared(path, grown)
    assert not list(folder.glob("*_12-14.gz"))
    assert modes(tmp_path) == ["new", "extend"]
    before = files_below(tmp_path / "output")
    prepared(path, grown)
    assert files_below(tmp_path / "output") == before


def test_claim_of_a_volume_that_has_grown(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Another model is refused before anything is extended; then both are one step."""
    path, grown = make_spec(roi=[[0, 0, 0], [14, 48, 40]]), "roi=[[0, 0, 0], [16, 48, 40]]"
    run(path)
    before = files_below(tmp_path)
    with pytest.raises(SpecError, match="--overwrite"):
        prepared(path, grown, *OTHER)
    assert files_below(tmp_path) == before

    prepared(path, grown, *OTHER, other="overwrite")
    assert modes(tmp_path) == ["new", "overwrite"]
    assert check_output(load_spec(path, [grown])).bounds == Box((0, 0, 0), (16, 48, 40))
    assert not list((tmp_path / "output" / "4_4_40").glob("*_12-14.gz"))


def test_other_keys_of_info_are_kept(make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_spec(roi=[[0, 0, 0], [14, 48, 40]])
    prepared(path)
    file = tmp_path / "output" / "info"
    info = json.loads(file.read_text())
    smaller = info["scales"][0] | {"key": "8_8_40", "resolution": [8, 8, 40], "size": [20, 24, 14]}
    info |= {"mesh": "mesh", "scales": [info["scales"][0] | {"hidden": True}, smaller]}
    file.write_text(json.dumps(info))

    with caplog.at_level(logging.WARNING):
        prepared(path, "roi=[[0, 0, 0], [16, 48, 40]]")

    assert "the 1 smaller scales" in caplog.text
    info["scales"][0]["size"] = [40, 48, 16]
    assert json.loads(file.read_text()) == info


@pytest.mark.parametrize(
    "roi",
    [
        [[0, 0, 0], [12, 48, 40]],  # less
        [[0, 0, 0], [16, 48, 36]],  # more along z, less along x
    ],
)
def test_layer_does_not_shrink(make_spec: MakeSpec, tmp_path: Path, roi: list[list[int]]) -> None:
    path = make_spec(roi=[[0, 0, 0], [14, 48, 40]])
    run(path)
    before = files_below(tmp_path)
    with pytest.raises(SpecError) as refusal:
        prepared(path, f"roi={roi}")
    assert "has bounds z 0–14 y 0–48 x 0–40, the spec says" in str(refusal.value)
    assert "set roi: [[0, 0, 0], [14, 48, 40]] to go on with it, give another path" in str(refusal.value)
    assert files_below(tmp_path) == before


def test_layer_does_not_move(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = make_spec(roi=[[6, 0, 0], [14, 48, 40]])
    prepared(path)
    with pytest.raises(SpecError, match="neither shrink nor move"):
        prepared(path, "roi=[[0, 0, 0], [14, 48, 40]]", other="overwrite")


def test_tasks_write_only_to_a_layer_of_their_own_size(make_spec: MakeSpec) -> None:
    """A task of an earlier version of the volume's DAG may not cut storage chunks short again.

    One of a later version has to wait.
    """
    path, grown = make_spec(roi=[[0, 0, 0], [14, 48, 40]]), ["roi=[[0, 0, 0], [16, 48, 40]]"]
    prepared(path)
    with pytest.raises(SpecError, match="The volume has grown: `prepare` extends the layer"):
        open_output(load_spec(path, grown))
    prepared(path, *grown)
    open_output(load_spec(path, grown))
    with pytest.raises(SpecError, match="a later run has extended it: start a new run instead of clearing tasks"):
        open_output(load_spec(path))


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

    def test_provenance_that_another_program_is_just_writing(self, make_spec: MakeSpec, tmp_path: Path) -> None:
        path = make_spec()
        spec = prepared(path)
        file = tmp_path / "output" / "provenance"
        whole = file.read_bytes()
        for part in (b"", whole[:100]):
            file.write_bytes(part)
            with pytest.raises(StorageError, match="it is being written, or damaged"):
                inference_and_donate(Workspace(spec), (0, 0, 0))
        file.write_bytes(whole)
        inference_and_donate(Workspace(spec), (0, 0, 0))

    def test_an_output_that_nobody_has_prepared(
        self, make_spec: MakeSpec, tmp_path: Path, chunkflow: Callable[..., Any]
    ) -> None:
        path = make_spec()
        prepared(path)
        (tmp_path / "output" / "provenance").unlink()
        with pytest.raises(SpecError, match="does not say whose it is; run `chunkflow-core prepare SPEC` first"):
            inference_and_donate(Workspace(load_spec(path)), (0, 0, 0))
        assert chunkflow("prepare", path).returncode == 0
        inference_and_donate(Workspace(load_spec(path)), (0, 0, 0))
