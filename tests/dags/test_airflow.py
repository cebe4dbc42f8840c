"""Volumes through a real Airflow.

Scheduler, API server, LocalExecutor, and the stage commands as processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
import yaml
from cloudvolume import CloudVolume

from chunkflow_core.__main__ import main
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer
from operators.service import ApiError
from tests.support.airflow.volumes import RUN_LIMIT, Volumes, files, until, write_own_dag
from tests.support.volume import spec_content, write_layer

pytestmark = pytest.mark.airflow

ROOT = Path(__file__).resolve().parents[2]
EM = Path(os.environ.get("CHUNKFLOW_EM_DATA", ROOT.parent / "shared" / "em"))
UNET = ROOT / "examples" / "unet"
NEVER_ENDING_IN_ONE_BLOCK = """
import time

class PatchInferencer:
    def __init__(self, weights):
        pass

    def __call__(self, patch):
        if patch.max() > 0.999:
            time.sleep(3600)
        return patch
"""


def stage_processes(spec: Path) -> list[psutil.Process]:
    """Running inference commands of a spec."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "chunkflow_core.inference_and_donate" in line and str(spec) in line and "operators.launch" not in line:
            found.append(process)
    return found


def write_spec(folder: Path, name: str, data: Path, **changes: Any) -> Path:
    spec = {
        "name": name,
        "input": {"path": f"file://{data}"},
        "output": {"path": f"file://{folder}/{name}/output", "chunk_size": [6, 48, 48]},
        "exchange": {"path": f"file://{folder}/{name}/exchange"},
        "patch_size": [8, 64, 64],
        "patch_overlap": [2, 16, 16],
        "block_size": [6, 96, 96],
        "runner": {"kind": "local", "retry_delay": 1},
    }
    path = folder / "volumes" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return path


@pytest.fixture(scope="module")
def volumes(local_volumes: Callable[[str], Volumes]) -> Volumes:
    volumes = local_volumes("airflow")
    folder = volumes.folder
    if EM.is_dir():
        stack = tifffile.imread(EM / "isbi2012_image.tif")[:9, :160, :160]
        NewLayer(f"file://{folder}/em", stack.shape, dtype="uint8", resolution=(50, 4, 4), chunk=(8, 64, 64)).write(
            Box((0, 0, 0), stack.shape), stack[None]
        )
        unet = {"engine": "pytorch", "path": str(UNET / "model.py"), "weights": str(UNET / "model.pt")}
        exchange = {"path": f"file://{folder}/em/exchange", "donations": "keep"}
        write_spec(folder, "em", folder / "em", model=unet, exchange=exchange)
    shape = (12, 60, 20)
    noise = np.random.default_rng(0).integers(1, 255, (1, *shape), dtype=np.uint8)
    noise[0, 0, 59, 0] = 255
    NewLayer(f"file://{folder}/noise", shape, dtype="uint8", resolution=(40, 4, 4), chunk=(12, 20, 20)).write(
        Box((0, 0, 0), shape), noise
    )
    small = {"patch_size": [12, 20, 20], "patch_overlap": [0, 10, 0], "block_size": [12, 10, 20]}
    (folder / "endless.py").write_text(NEVER_ENDING_IN_ONE_BLOCK)
    output = {"path": f"file://{folder}/endless/output"}
    model = {"engine": "pytorch", "path": str(folder / "endless.py")}
    write_spec(folder, "endless", folder / "noise", output=output, model=model, **small)
    (folder / "volumes" / "broken.yaml").write_text("name: broken\ninput: {path: nowhere}\n")
    volumes.known("endless")
    return volumes


def test_a_broken_spec_is_an_import_error_that_names_file_and_key(volumes: Volumes) -> None:
    file = "chunkflow_spec_errors.py"
    errors = volumes.parsed(lambda: volumes.client.get("importErrors")["import_errors"], file)
    assert [error["filename"] for error in errors] == [file]
    assert (
        f'{volumes.folder}/volumes/broken.yaml: input.path: "nowhere": expected a storage path'
        in errors[0]["stack_trace"]
    )
    assert not volumes.client.get("dags/endless")["has_import_errors"]


@pytest.mark.em
@pytest.mark.long
@pytest.mark.skipif(not EM.is_dir(), reason=f"no electron microscopy in {EM}; set CHUNKFLOW_EM_DATA")
class TestRealStack:
    """One stack, one network, every way of running it."""

    def test_one_answer(self, volumes: Volumes) -> None:
        """The DAG, with a process killed, and the command give the same bytes.

        However the command cuts, and however many processes it has.
        """
        spec = volumes.folder / "volumes" / "em.yaml"
        run = volumes.trigger("em")
        victim = until(lambda: stage_processes(spec), RUN_LIMIT)[0]
        arguments = victim.info["cmdline"]
        block = "_".join(arguments[arguments.index("--block") + 1 :][:3])
        victim.kill()

        assert volumes.wait("em", run) == "success"

        tasks = volumes.tasks("em", run)
        assert {task["state"] for task in tasks.values()} == {"success"}
        assert {name: task["try_number"] for name, task in tasks.items() if task["try_number"] > 1} == {
            f"infer.{block}": 2
        }
        assert "killed (memory, eviction) (exit code 137, worth a retry)" in volumes.log("em", run, f"infer.{block}", 1)
        answer = files(volumes.folder / "em" / "output")
        assert len(answer) == 2 * 4 * 4
        for variant, settings in {
            "one": ["--workers", "1"],
            "two": ["--workers", "2"],
            "small": ["--workers", "2", "--set", "block_size=[6, 48, 48]"],
            "large": ["--workers", "2", "--set", "block_size=[12, 144, 144]"],
        }.items():
            place = [f"output.path=file://{volumes.folder}/{variant}/output"]
            assert main(["run", str(spec), *settings, "--set", *place, "--seams", "1"]) == 0
            assert files(volumes.folder / variant / "output") == answer, variant
        other = ["output.chunk_size=[3, 24, 32]", f"output.path=file://{volumes.folder}/other/output"]
        overrides = [word for text in other for word in ("--set", text)]
        assert main(["run", str(spec), "--workers", "2", *overrides]) == 0
        np.testing.assert_array_equal(whole(spec, other), whole(spec, []))

    def test_again_does_nothing(self, volumes: Volumes) -> None:
        before = files(volumes.folder / "em" / "output")
        run = volumes.trigger("em")

        assert volumes.wait("em", run) == "success"

        states = {name: task["state"] for name, task in volumes.tasks("em", run).items()}
        done = {name for name, state in states.items() if state == "success"}
        assert done == {"prepare", "select_blocks", "cleanup", "summary"}
        assert {state for name, state in states.items() if name not in done} == {"skipped"}
        assert files(volumes.folder / "em" / "output") == before

    def test_forcing_a_part(self, volumes: Volumes) -> None:
        """The last block again; the donations of its neighbours are still there."""
        before = files(volumes.folder / "em" / "output")
        run = volumes.trigger("em", force=True, z_start=8, y_start=159, x_start=159)

        assert volumes.wait("em", run) == "success"

        done = {name for name, task in volumes.tasks("em", run).items() if task["state"] == "success" and "." in name}
        assert done == {"infer.1_1_1", "blend.1_1_1"}
        assert files(volumes.folder / "em" / "output") == before

    def test_an_edit_of_one_storage_chunk(self, volumes: Volumes) -> None:
        """The edit is of z 0–8, y and x 128–160.

        Patches of the low blocks end at 112 in y and x, those of the high ones begin at 96.
        """
        spec = volumes.folder / "volumes" / "em.yaml"
        layer = CloudVolume(f"file://{volumes.folder}/em", progress=False)
        layer[128:160, 128:160, 0:8] = 255 - np.asarray(layer[128:160, 128:160, 0:8])
        run = volumes.trigger("em")

        assert volumes.wait("em", run) == "success"

        tasks = volumes.tasks("em", run)
        done = {name for name, task in tasks.items() if task["state"] == "success" and "." in name}
        assert done == {"infer.0_1_1", "infer.1_1_1", "blend.0_1_1", "blend.1_1_1"}
        assert {
            (task["state"], task["try_number"]) for name, task in tasks.items() if "." in name and name not in done
        } == {("skipped", 0)}
        fresh = ["--workers", "2", "--set", f"output.path=file://{volumes.folder}/edited/output", "--seams", "0"]
        assert main(["run", str(spec), *fresh]) == 0
        assert files(volumes.folder / "em" / "output") == files(volumes.folder / "edited" / "output")
        again = volumes.trigger("em")
        assert volumes.wait("em", again) == "success"
        assert seconds(volumes, again) < seconds(volumes, run), "nothing is computed"
        assert {t["state"] for name, t in volumes.tasks("em", again).items() if "." in name} == {"skipped"}

    def test_the_form_refuses_what_is_outside(self, volumes: Volumes) -> None:
        with pytest.raises(ApiError, match="161"):
            volumes.trigger("em", x_stop=161)
        run = volumes.trigger("em", x_start=100, x_stop=100)
        assert volumes.wait("em", run) == "failed"
        tasks = volumes.tasks("em", run)
        assert {state for name, task in tasks.items() if (state := task["state"]) != "upstream_failed"} == {"failed"}
        assert "prepare: bounding box: x start 100 is not below x stop 100" in volumes.log("em", run, "summary", 1)


def test_marking_a_task_ends_its_process(volumes: Volumes) -> None:
    spec = volumes.folder / "volumes" / "endless.yaml"
    run = volumes.trigger("endless")
    until(lambda: stage_processes(spec), RUN_LIMIT)

    volumes.client.patch(f"dags/endless/dagRuns/{run}", {"state": "failed"})

    until(lambda: not stage_processes(spec), 60)


def test_a_dag_of_ones_own(volumes: Volumes) -> None:
    """The DAG of the docs does two blocks as one machine would; and nothing, once they are done."""
    write_layer(volumes.folder / "wide", (20, 48, 40))
    spec = volumes.dags / "membrane.yaml"
    content = spec_content(volumes.folder / "wide", volumes.folder / "own")
    spec.write_text(yaml.safe_dump(content | {"roi": [[0, 0, 0], [12, 24, 40]]}))
    assert load_spec(spec).grid.shape == (1, 1, 2)
    write_own_dag(volumes.dags)
    volumes.known("two_blocks")
    run = volumes.trigger("two_blocks")

    assert volumes.wait("two_blocks", run) == "success"

    tasks = volumes.tasks("two_blocks", run)
    assert {name: task["operator_name"] for name, task in tasks.items()} == {
        "prepare": "prepare",
        "infer_0": "infer",
        "infer_1": "infer",
        "blend_1": "blend",
    }
    assert tasks["infer_1"]["rendered_fields"] == {"spec": str(spec), "block": [0, 0, 1]}
    done = files(volumes.folder / "own" / "output")
    assert main(["run", str(spec), "--set", f"output.path=file://{volumes.folder}/alone/output"]) == 0
    assert done == files(volumes.folder / "alone" / "output")
    again = volumes.trigger("two_blocks")
    assert volumes.wait("two_blocks", again) == "success"
    assert "is up to date" in volumes.log("two_blocks", again, "infer_1", 1)


def seconds(volumes: Volumes, run: str) -> float:
    """How long a run of the real stack took."""
    (record,) = [each for each in volumes.runs("em") if each["dag_run_id"] == run]
    start, end = (datetime.fromisoformat(record[name]) for name in ("start_date", "end_date"))
    return (end - start).total_seconds()


def whole(spec: Path, overrides: list[str]) -> np.ndarray:
    """The whole output."""
    loaded = load_spec(spec, overrides)
    return Workspace(loaded).output.read(loaded.grid.roi)
