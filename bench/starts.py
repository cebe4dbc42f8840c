"""What a task costs beside its patches: starts, cold and warm, and a run of the demo.

    python -m bench.starts --no-demo --rounds 1      # a look
    python -m bench.starts                           # this checkout
    git worktree add /tmp/before COMMIT
    python -m bench.starts --against /tmp/before     # and another one, by the same Python packages

*Cold* is the command as pods and command lines start it, *warm* what a parent that the service
keeps forks (``operators.warm``). CPU seconds are those of the process less the forward passes; the
volume is tiny. *Run of the demo* is the DAG run alone, from its start to its end; *CPU a task* is
all that the service's processes take meanwhile, less the forward passes, by the run's tasks. *Start
of the service* is until all of its components work, in an empty home, with the CPU seconds that it
takes, and the memory of its processes then, in which what several share counts once. Needs
the extra ``airflow``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from bench.common import ROOT, command_line, table

RECEIPTS = """
def receipts(exchange):
    files = list(exchange.rglob("receipts/**/*.json"))
    assert files
    return [json.loads(file.read_text())["receipt"] for file in files]
"""
"""Head of the programs below. Other checkouts run them too: they read files, whose names stay."""

COLD = """
import importlib.metadata, json, sys
from pathlib import Path
import numpy as np, yaml
found = importlib.metadata.entry_points  # those of the library are of the checkout that is installed
importlib.metadata.entry_points = lambda **of: () if of.get("group") == "chunkflow_core.commands" else found(**of)
from chunkflow_core.__main__ import main
folder, tree = Path(sys.argv[1]), Path(sys.argv[2])
shape = (16, 96, 96)
np.save(folder / "em.npy", np.random.default_rng(0).integers(0, 255, shape, np.uint8))
sizes = ["--voxel-size", "50", "4", "4", "--chunk-size", "16", "48", "48"]
assert main(["ingest", str(folder / "em.npy"), f"file://{folder}/em", *sizes]) == 0
unet = tree / "examples" / "unet"
models = {
    "identity": {"engine": "identity"},
    "pytorch": {"engine": "pytorch", "path": str(unet / "model.py"), "weights": str(unet / "model.pt")},
}
for name, model in ((name, models[name]) for name in sys.argv[3:]):
    spec = {
        "name": name,
        "input": {"path": f"file://{folder}/em"},
        "output": {"path": f"file://{folder}/{name}", "channels": 1},
        "exchange": {"path": f"file://{folder}/{name}-exchange", "donations": "keep"},
        "patch_size": [16, 48, 48],
        "patch_overlap": [0, 16, 16],
        "block_size": [16, 32, 32],
        "model": model,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    assert main(["run", str(folder / f"{name}.yaml")]) == 0
forward = {}
for name in sys.argv[3:]:
    done = [receipt for receipt in receipts(folder / f"{name}-exchange") if receipt["block"] == [0, 1, 1]]
    forward[name] = sum(receipt["facts"]["seconds"].get("forward", 0) for receipt in done if receipt["patches"])
print(json.dumps(forward))
"""

CPU_SECONDS = """
import json, resource, subprocess, sys
command = [sys.executable, "-P", "-m", *sys.argv[1:]]
subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps(usage.ru_utime + usage.ru_stime))
"""

WARM = """
import json, logging, os, subprocess, sys, time
import psutil
from operators import local, warm
Runner = getattr(local, "CommandRunner", None) or local.LocalRunner  # its name in older checkouts
name = f"chunkflow-bench/{os.getpid()}"
parent = subprocess.Popen([sys.executable, "-P", "-m", "operators.warm", name])
while not warm.answers(name):
    time.sleep(0.05)
os.environ[warm.VARIABLE] = name
imports, *arguments = sys.argv[1:]
runner = Runner(logging.getLogger(), imports=imports.split(","))
def cpu():
    times = psutil.Process(parent.pid).cpu_times()
    return times.user + times.system + times.children_user + times.children_system
assert runner.run(arguments)[0] == 0
before, began = cpu(), time.perf_counter()
for _ in range(5):
    assert runner.run(arguments)[0] == 0
print(json.dumps([(cpu() - before) / 5, (time.perf_counter() - began) / 5]))
parent.kill()
"""

DEMO = """
import json, sys, time
from datetime import datetime
from pathlib import Path
import psutil, yaml
sys.path.insert(0, sys.argv[2] + "/examples")
from sample_volume import write_sample
from operators.service import Client, start
folder, examples = Path(sys.argv[1]).resolve(), Path(sys.argv[2]) / "examples"
import demo
write_sample(f"file://{folder}/data/em", demo.SAMPLE_SHAPE)
text = (examples / "demo.yaml").read_text()
text = text.replace("${CHUNKFLOW_DEMO}", str(folder)).replace("${CHUNKFLOW_EXAMPLES}", str(examples))
spec = folder / "volumes" / "demo.yaml"
spec.parent.mkdir()
spec.write_text(text)
def cpu(root):
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.Error:
            pass
    return total
began = time.perf_counter()
environment = {"CHUNKFLOW_VOLUMES": str(spec.parent)}
with start(folder / "home", environment=environment, with_parent=True) as service, Client(service) as client:
    up = time.perf_counter() - began
    root = psutil.Process(service.pid)
    starting = cpu(root)
    memory = sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])
    while "demo" not in {row["dag_id"] for row in client.pages("dags", "dags")}:
        time.sleep(0.2)
    before = cpu(root)
    run = client.post("dags/demo/dagRuns", {"logical_date": None, "conf": {}})["dag_run_id"]
    while (found := client.get(f"dags/demo/dagRuns/{run}"))["state"] not in ("success", "failed"):
        time.sleep(0.2)
    assert found["state"] == "success"
    used = cpu(root) - before
    tasks = len(list(client.pages(f"dags/demo/dagRuns/{run}/taskInstances", "task_instances")))
forward = sum(receipt["facts"]["seconds"].get("forward", 0) for receipt in receipts(folder / "data" / "exchange"))
first, last = (datetime.fromisoformat(found[key]) for key in ("start_date", "end_date"))
print(json.dumps([up, starting, memory / 1e6, (last - first).total_seconds(), (used - forward) / tasks]))
"""

COMMANDS = {
    "infer, pytorch": ("pytorch", "chunkflow_core.inference_and_donate"),
    "infer, identity": ("identity", "chunkflow_core.inference_and_donate"),
    "blend": ("identity", "chunkflow_core.receive_and_blend"),
}


def python(tree: Path, script: str, *arguments: object) -> Any:
    """Run a script with a checkout's packages; give the last line of its output, from JSON.

    Raises:
        RuntimeError: It fails.
    """
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cold(tree: Path, arguments: list[str]) -> float:
    """Run ``python -m ARGUMENTS`` with a checkout's packages; give its CPU seconds."""
    return float(python(tree, CPU_SECONDS, *arguments))


def warm(tree: Path, spec: str, arguments: list[str]) -> tuple[float, float] | None:
    """Run a command as a fork of a parent that has its imports.

    Returns:
        CPU and wall seconds; None if a checkout has no such parent.
    """
    modules = ("chunkflow_core.steps.warm_up", "chunkflow_core.warm_up")  # here, and in older checkouts
    module = next((name for name in modules if (tree / f"{name.replace('.', '/')}.py").exists()), None)
    if module is None:
        return None
    engine = ",chunkflow_core.engines.pytorch" if spec == "pytorch" else ""
    cpu, wall = python(tree, WARM, module + engine, *arguments)
    return cpu, wall


def command_rows(tree: Path, folder: Path, names: Sequence[str], rounds: int, bar: tqdm[Any]) -> dict[str, str]:
    """Time a checkout's commands.

    Args:
        tree: Root of the checkout.
        folder: Where specs and layers are made.
        names: Of the commands, of ``COMMANDS``.
        rounds: How often each is started cold.
        bar: Moved on once at the start and once a command.

    Returns:
        Figures as text, by row of the table.
    """
    folder.mkdir()
    forward = python(tree, RECEIPTS + COLD, folder, tree, *sorted({COMMANDS[name][0] for name in names}))
    bar.update()
    torch = ["timeit", "-n1", "-r1", "-s", "import gc; gc.enable()", "import torch"]
    alone = median(cold(tree, torch) for _ in range(rounds))
    rows = {"`import torch` alone, to know the machine by": f"{alone:.2f} s CPU"}
    for name in names:
        spec, module = COMMANDS[name]
        arguments = [module, f"{folder}/{spec}.yaml", "--block", "0", "1", "1", "--force"]
        passes = forward[spec] if module.endswith("donate") else 0.0
        rows[f"{name}, cold"] = f"{median(cold(tree, arguments) for _ in range(rounds)) - passes:.2f} s CPU"
        if (figures := warm(tree, spec, arguments)) is not None:
            rows[f"{name}, warm"] = f"{figures[0] - passes:.2f} s CPU, {figures[1]:.2f} s"
        bar.update()
    return rows


def demo_rows(tree: Path, folder: Path) -> dict[str, str]:
    """Run a checkout's demo in a folder; give figures as text, by row of the table."""
    up, starting, memory, wall, task = python(tree, RECEIPTS + DEMO, folder, tree)
    return {
        "start of the service": f"{up:.0f} s, {starting:.0f} s CPU, {memory:.0f} MB",
        "run of the demo, 8 blocks": f"{wall:.0f} s",
        "CPU a task of it": f"{task:.2f} s CPU",
    }


def main() -> int:
    """Measure and print."""
    parser = command_line("starts", __doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=5, help="of each cold start (default: 5)")
    parser.add_argument("--rows", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="commands (default: all)")
    parser.add_argument("--no-demo", action="store_true", help="leave out the runs of the demo")
    options = parser.parse_args()
    trees = {"this": ROOT} | ({"before": options.against.resolve()} if options.against else {})
    columns: dict[str, dict[str, str]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="starts-") as folder,
        tqdm(total=(2 + len(options.rows)) * len(trees), unit="step") as bar,
    ):
        for name, tree in trees.items():
            columns[name] = command_rows(tree, Path(folder) / name, options.rows, options.rounds, bar)
            columns[name] |= {} if options.no_demo else demo_rows(tree, Path(folder) / name)
            bar.update()
    names = dict.fromkeys(row for rows in columns.values() for row in rows)
    lines = [[name, *(rows.get(name, "–") for rows in columns.values())] for name in names]
    print("\n" + table(["", *columns], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
