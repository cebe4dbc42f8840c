"""Volumes that are processed again and again by a real Airflow.

Edits of the input, clocks, Assets, blocks that fail, notifications.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cloudvolume import CloudVolume
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.layers import NewLayer
from operators.service import ApiError
from tests.support.airflow.volumes import RUN_LIMIT, Volumes, change_database, files, until

pytestmark = pytest.mark.airflow

SHAPE = (12, 60, 20)
"""Five patches of 20 voxels along y, each its own block of 10 (the last one of 20): patch k reads y
10·k to 10·k + 20.
"""

FRAIL = """
import time
from pathlib import Path

class PatchInferencer:
    def __init__(self, weights):
        pass

    def __call__(self, patch):
        if patch.max() > 0.999:
            while Path(HOLD).exists():
                time.sleep(0.1)
            if Path(FLAG).exists():
                raise ValueError("this patch is beyond me")
        return patch
"""

RECORDER = """
import json

from airflow.sdk import BaseNotifier

class Recorder(BaseNotifier):
    template_fields = ("line",)

    def __init__(self, path, line):
        super().__init__()
        self.path, self.line = path, line

    def notify(self, context):
        with open(self.path, "a") as file:
            file.write(json.dumps({"line": self.line, "report": context["report"]}) + "\\n")

class Broken(Recorder):
    def notify(self, context):
        raise RuntimeError("out of order")
"""

LISTENER = """
import json

from airflow.sdk import Asset, dag, task

@dag(schedule=Asset("LAYER"))
def listener():
    @task
    def changed(triggering_asset_events=None):
        blocks = [b for events in triggering_asset_events.values() for e in events for b in e.extra["changed_blocks"]]
        with open("HEARD", "a") as file:
            file.write(json.dumps(blocks) + "\\n")

    changed()

listener()
"""


@pytest.fixture(scope="module")
def volumes(local_volumes: Callable[[str], Volumes]) -> Volumes:
    volumes = local_volumes("recurring")
    folder = volumes.folder
    noise = np.random.default_rng(0).integers(1, 255, (1, *SHAPE), dtype=np.uint8)
    noise[0, 0, 59, 0] = 255
    for name in ("noise", "clocked-input", "growing-input"):
        write_layer(folder / name, noise)
    frail = FRAIL.replace("FLAG", repr(str(folder / "flag"))).replace("HOLD", repr(str(folder / "hold")))
    (folder / "frail.py").write_text(frail)
    layer_address, heard = f"file://{folder}/frail/output", str(folder / "heard")
    (volumes.dags / "listener.py").write_text(LISTENER.replace("LAYER", layer_address).replace("HEARD", heard))
    (folder / "modules" / "recorder.py").write_text(RECORDER)
    arguments = {"path": str(folder / "notified"), "line": "{{ dag.dag_id }}: {{ report.state }}"}
    write_spec(folder, "frail", notify={"notifier": "recorder.Recorder", "arguments": arguments})
    volumes.known("frail", "listener")
    return volumes


def write_layer(path: Path, data: NDArray[np.uint8]) -> None:
    layer = NewLayer(f"file://{path}", data.shape[1:], dtype="uint8", resolution=(40, 4, 4), chunk=(12, 20, 20))
    layer.write(Box((0, 0, 0), data.shape[1:]), data)


def write_spec(folder: Path, name: str, **changes: Any) -> Path:
    spec = {
        "name": name,
        "input": {"path": f"file://{folder}/noise"},
        "output": {"path": f"file://{folder}/{name}/output"},
        "exchange": {"path": f"file://{folder}/{name}/exchange", "donations": "keep"},
        "model": {"engine": "pytorch", "path": str(folder / "frail.py")},
        "patch_size": [12, 20, 20],
        "patch_overlap": [0, 10, 0],
        "block_size": [12, 10, 20],
        "runner": {"kind": "local", "retries": 1, "retry_delay": 1},
    }
    path = folder / "volumes" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return path


def edit(folder: Path, first_y: int) -> None:
    """Change one storage chunk of the input where it lies."""
    (file,) = folder.glob(f"noise/*/0-20_{first_y}-{first_y + 20}_0-12*")
    content = file.read_bytes()
    opened = gzip.decompress(content) if file.suffix == ".gz" else content
    changed = bytes(255 - voxel or 1 for voxel in opened)
    file.write_bytes(gzip.compress(changed) if file.suffix == ".gz" else changed)


def lines(file: Path) -> list[Any]:
    """The lines of a file of JSON; none if it isn't there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def states(volumes: Volumes, run: str, *, name: str = "frail") -> dict[str, str]:
    return {task: instance["state"] for task, instance in volumes.tasks(name, run).items()}


def first_run(volumes: Volumes) -> str:
    return str(min(volumes.runs("frail"), key=lambda run: run["queued_at"])["dag_run_id"])


def one_machine(volumes: Volumes, place: str, *settings: str, name: str = "frail") -> dict[str, bytes]:
    """What the same spec gives without Airflow."""
    spec, output = volumes.folder / "volumes" / f"{name}.yaml", volumes.folder / place / "output"
    words = [word for setting in (f"output.path=file://{output}", *settings) for word in ("--set", setting)]
    assert main(["run", str(spec), *words]) == 0
    return files(output)


class TestOneVolume:
    """The life of one volume, in this order.

    A second run at once, a block that fails, the cure, an edit of the input, nothing to do, a lost
    chunk.
    """

    def test_a_second_run_at_once_gives_way(self, volumes: Volumes) -> None:
        """As when two schedulers start two runs at the same moment."""
        for name in ("hold", "flag"):
            (volumes.folder / name).touch()
        run = volumes.trigger("frail")
        until(lambda: volumes.now("frail", run, "infer.0_4_0")[0] == "running", RUN_LIMIT)
        second = volumes.trigger("frail")
        change_database(volumes.home, "UPDATE dag_run SET state = 'running' WHERE run_id = %s", second)

        assert volumes.wait("frail", second) == "failed"

        ended = states(volumes, second)
        assert {task for task, state in ended.items() if state != "upstream_failed"} == {"prepare", "summary"}
        told = volumes.log("frail", second, "summary", 1)
        assert f"prepare: run {run} of this volume is at work; nothing of this run has been started" in told
        assert states(volumes, run)["infer.0_4_0"] == "running"
        (volumes.folder / "hold").unlink()

    def test_a_block_that_fails_holds_only_what_depends_on_it(self, volumes: Volumes) -> None:
        run = first_run(volumes)

        assert volumes.wait("frail", run) == "failed"

        ended = states(volumes, run)
        assert {task for task, state in ended.items() if state == "failed"} == {"infer.0_4_0", "summary"}
        held = {"blend.0_4_0", "verify", "publish", "cleanup"}
        assert {task for task, state in ended.items() if state == "upstream_failed"} == held
        assert {state for task, state in ended.items() if "." in task} == {"failed", "upstream_failed", "success"}
        assert volumes.tasks("frail", run)["infer.0_4_0"]["try_number"] == 1, "a retry can't help"
        log = volumes.log("frail", run, "infer.0_4_0", 1)
        assert "the model failed with a batch of shape (1, 1, 12, 20, 20)" in log
        assert "this patch is beyond me" in log
        told = volumes.log("frail", run, "summary", 1)
        # blend.0_4_0 owns the frame, which is the overlap of its only lower neighbour: 12 × 10 ×
        # 20; infer the rest
        assert "1 block failed: 4,800 voxels of the output (33.3 % of the ROI) are not complete" in told
        assert "inference of block (0, 4, 0), z 0–12 y 40–60 x 0–20: data that can't be right (exit code 65" in told
        _, notice = lines(volumes.folder / "notified")
        assert notice["line"] == "frail: failure"
        assert notice["report"]["run"] == run
        assert "(0, 4, 0)" in notice["report"]["text"]

    def test_clearing_it_completes_the_run(self, volumes: Volumes) -> None:
        (volumes.folder / "flag").unlink()
        run = first_run(volumes)
        volumes.clear("frail", run, ["infer.0_4_0"])

        assert volumes.wait("frail", run) == "success"

        assert set(states(volumes, run).values()) == {"success"}
        assert files(volumes.folder / "frail" / "output") == one_machine(volumes, "whole")
        success = lines(volumes.folder / "notified")[-1]
        assert success["line"] == "frail: success"
        assert success["report"]["figures"]["inferred"] == 5
        assert Path(success["report"]["manifest"].removeprefix("file://")).is_file()
        assert "5 of 5 blocks inferred, 4 blended" in volumes.log("frail", run, "summary", 2)
        heard = until(lambda: lines(volumes.folder / "heard"), 60)
        assert heard == [[[0, y, 0] for y in range(5)]]

    def test_an_edit_is_followed_where_it_is_read(self, volumes: Volumes) -> None:
        edit(volumes.folder, 0)  # y 0–20: read by patch 0 (y 0–20) and patch 1 (y 10–30); they donate to blocks 1 and 2
        run = volumes.trigger("frail")

        assert volumes.wait("frail", run) == "success"

        ended = states(volumes, run)
        done = {task for task, state in ended.items() if state == "success" and "." in task}
        assert done == {"infer.0_0_0", "infer.0_1_0", "blend.0_1_0", "blend.0_2_0"}
        assert {state for task, state in ended.items() if "." not in task} == {"success"}
        skipped = [task for task in volumes.tasks("frail", run).values() if task["state"] == "skipped"]
        assert len(skipped) == 5
        assert {task["try_number"] for task in skipped} == {0}, "skipped without a process of their own"
        assert files(volumes.folder / "frail" / "output") == one_machine(volumes, "edited")
        # block 2 begins at y 20, and what the network gives there has not changed
        assert until(lambda: lines(volumes.folder / "heard")[1:], 60) == [[[0, 0, 0], [0, 1, 0]]]
        (event,) = [e for e in self.events(volumes) if e["extra"]["run"] == run]
        assert event["extra"]["bounding_box"] == {"start": [0, 0, 0], "stop": [12, 20, 20]}
        assert event["extra"]["output"] == f"file://{volumes.folder}/frail/output"
        assert {"manifest", "picture", "fingerprint"} < event["extra"].keys()

    def test_nothing_to_do_is_done_at_once(self, volumes: Volumes) -> None:
        output, events = volumes.folder / "frail" / "output", len(self.events(volumes))
        before, manifests = files(output), sorted(output.glob("runs/*"))
        run = volumes.trigger("frail")

        assert volumes.wait("frail", run) == "success"

        done = {task for task, state in states(volumes, run).items() if state == "success"}
        assert done == {"prepare", "select_blocks", "cleanup", "summary"}
        assert {state for task, state in states(volumes, run).items() if task not in done} == {"skipped"}
        (record,) = [r for r in volumes.runs("frail") if r["dag_run_id"] == run]
        assert seconds(record["end_date"]) - seconds(record["start_date"]) < 30
        assert "nothing was due: 5 blocks are up to date" in volumes.log("frail", run, "summary", 1)
        assert (files(output), sorted(output.glob("runs/*"))) == (before, manifests)
        assert len(self.events(volumes)) == events, "nothing has changed"
        notices = [notice["line"] for notice in lines(volumes.folder / "notified")]
        assert notices == ["frail: failure"] * 2 + ["frail: success"] * 3, "one for each end of a run"

    def test_a_lost_chunk_is_repaired(self, volumes: Volumes) -> None:
        """Of block 3, the frame (y 30–40) is all there is; of what it needs, donations are kept."""
        before = files(volumes.folder / "frail" / "output")
        (lost,) = (volumes.folder / "frail" / "output").glob("*/0-20_30-40_0-12*")
        lost.unlink()
        run = volumes.trigger("frail", only_repair=True)

        assert volumes.wait("frail", run) == "success"

        done = {task for task, state in states(volumes, run).items() if state == "success" and "." in task}
        assert done == {"blend.0_3_0"}
        assert files(volumes.folder / "frail" / "output") == before

    @staticmethod
    def events(volumes: Volumes) -> list[dict[str, Any]]:
        return list(volumes.client.pages("assets/events", "asset_events", source_dag_id="frail"))


def test_a_volume_grows_while_a_run_is_at_work(volumes: Volumes) -> None:
    """The run ends as it began, on the volume as it was.

    The next one does what has come and what borders on it.

    Blocks of two patches: three along y, and a fourth when the volume has grown.
    """
    (volumes.folder / "hold").touch()
    layer = f"file://{volumes.folder}/growing-input"
    write_spec(volumes.folder, "growing", input={"path": layer}, block_size=[12, 20, 20])
    volumes.known("growing")
    run = volumes.trigger("growing")
    until(lambda: volumes.now("growing", run, "infer.0_2_0")[0] == "running", RUN_LIMIT)

    old = np.asarray(CloudVolume(layer, progress=False)[:, :, :]).T
    new = np.random.default_rng(1).integers(1, 255, (1, 12, 20, 20), dtype=np.uint8)
    write_layer(volumes.folder / "growing-input", np.concatenate([old, new], axis=2))

    volumes.parsed(lambda: "infer.0_3_0" in task_ids(volumes, "growing"))
    (volumes.folder / "hold").unlink()
    assert volumes.wait("growing", run) == "success"
    ended = states(volumes, run, name="growing")
    assert ended.get("infer.0_3_0", "skipped") == "skipped"
    assert {ended[f"blend.0_{y}_0"] for y in (1, 2)} == {"success"}
    was = [f"{key}=[[0, 0, 0], {list(SHAPE)}]" for key in ("roi", "input.bounds")]
    assert files(volumes.folder / "growing" / "output") == one_machine(volumes, "was", *was, name="growing")

    run = volumes.trigger("growing")
    assert volumes.wait("growing", run) == "success"
    done = {task for task, state in states(volumes, run, name="growing").items() if state == "success" and "." in task}
    # block 1 and that before it neither read nor own anything past y 50
    assert done == {f"{stage}.0_{y}_0" for stage in ("infer", "blend") for y in (2, 3)}
    assert files(volumes.folder / "growing" / "output") == one_machine(volumes, "is", name="growing")


def test_clock_and_asset_start_runs_and_never_two_at_once(volumes: Volumes) -> None:
    """A tick and an update of the input fall due while a run is at work.

    A notifier that fails changes nothing.
    """
    layer = f"file://{volumes.folder}/clocked-input"
    write_spec(
        volumes.folder,
        "clocked",
        input={"path": layer},
        block_size=[12, 60, 20],
        schedule={"cron": "* * * * *", "timezone": "Europe/Zurich", "asset": "input"},
        notify={"notifier": "recorder.Broken", "arguments": {"path": "", "line": ""}, "on": ["success"]},
    )
    volumes.known("clocked")
    first = until(lambda: [run for run in runs(volumes) if run["state"] == "running"], 90)[0]
    with pytest.raises(ApiError, match="backfill"):
        dates = {"from_date": "2026-01-01T00:00:00Z", "to_date": "2026-01-01T00:02:00Z"}
        volumes.client.post("backfills", {"dag_id": "clocked", **dates})
    (asset,) = volumes.assets(layer)
    volumes.client.post("assets/events", {"asset_id": asset["id"], "extra": {}})
    manual = volumes.trigger("clocked")

    wanted = {"scheduled", "asset_triggered", "manual"}

    def done() -> list[dict[str, Any]]:
        found = [run for run in runs(volumes) if run["state"] == "success"]
        return found if wanted <= {run["run_type"] for run in found} else []

    succeeded = until(done, RUN_LIMIT)
    # The next run may have begun; Airflow begins no more tasks of it.
    volumes.client.patch("dags/clocked", {"is_paused": True})

    ended = sorted((seconds(run["start_date"]), seconds(run["end_date"])) for run in succeeded)
    assert len(ended) >= 3
    for (_, earlier), (later, _) in pairwise(ended):
        assert earlier <= later, "two runs at once"
    (waited,) = [run for run in succeeded if run["dag_run_id"] == manual]
    (one,) = [run for run in succeeded if run["dag_run_id"] == first["dag_run_id"]]
    assert seconds(waited["queued_at"]) < seconds(one["end_date"]), "it was due while another was at work"
    log = volumes.log("clocked", manual, "summary", 1)
    assert "nobody was notified: recorder.Broken: RuntimeError: out of order" in log


def task_ids(volumes: Volumes, name: str) -> set[str]:
    return {task["task_id"] for task in volumes.client.get(f"dags/{name}/tasks")["tasks"]}


def runs(volumes: Volumes) -> list[dict[str, Any]]:
    return volumes.runs("clocked")


def seconds(date: str) -> float:
    return datetime.fromisoformat(date).timestamp()
