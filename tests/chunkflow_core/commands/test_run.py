"""A volume's life by commands, from ``run`` to ``cleanup``: what is done, and when again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from numpy.typing import NDArray

from chunkflow_core import inference_and_donate, receive_and_blend
from chunkflow_core.__main__ import main
from tests.support.volume import BLOCKS, files_of

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]


def output_of(folder: Path) -> NDArray[np.uint8]:
    return np.asarray(CloudVolume(f"file://{folder}/output", progress=False)[:, :, :])[..., 0].T


def input_of(layer: Path) -> NDArray[np.uint8]:
    return np.asarray(CloudVolume(f"file://{layer}", progress=False)[:, :, :])[..., 0].T


def test_a_volume_from_run_to_cleanup(
    make_spec: MakeSpec, tmp_path: Path, random_layer: Path, chunkflow: Command
) -> None:
    spec = make_spec()
    first = chunkflow("run", spec)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "small: 8 blocks to infer, 7 to blend, 0 up to date"
    verified = r"verified: 8 blocks, 64 storage chunks, 2 windows computed again \(seed \d+\): 0 findings"
    assert re.fullmatch(verified, lines[1])
    assert lines[2] == f"output: file://{tmp_path}/output"
    assert (
        abs(output_of(tmp_path).astype(int) - input_of(random_layer)).max() <= 1
    )  # the weights of a voxel sum up to 1
    assert not list(tmp_path.glob("exchange/*/*/donations/*/*/*")), "cleaned up"
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
    kept = list(tmp_path.glob("exchange/*/*/donations/*/*/*"))
    assert kept
    assert "0 donations deleted" in chunkflow("cleanup", spec, "--set", "exchange.donations=keep").stdout
    assert f"{len(kept)} donations deleted" in chunkflow("cleanup", spec).stdout
    assert not list(tmp_path.glob("exchange/*/*/donations/*/*/*"))
    assert "8 up to date" in chunkflow("run", spec).stdout


@pytest.mark.parametrize("provenance", [None, "", "{", "[]", '{"processing": 5}', '{"processing": [{"method": "x"}]}'])
def test_output_layer_with_another_provenance(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, provenance: str | None
) -> None:
    """It is written by others too, so it decides nothing, and is made right."""
    spec = make_spec()
    assert chunkflow("run", spec, "--seams", 0).returncode == 0
    path = tmp_path / "output" / "provenance"
    path.unlink() if provenance is None else path.write_text(provenance)
    outcome = chunkflow("prepare", spec)
    assert outcome.returncode == 0, outcome.stderr
    assert len(json.loads(chunkflow("plan", spec, "--json").stdout)["infer"]) == 0
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
