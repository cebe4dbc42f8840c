"""What a task costs beside its patches: starts of its command, cold and warm, and a whole run of the demo in the one-machine Airflow.

    python bench/starts.py                                # this checkout
    git worktree add /tmp/before COMMIT
    python bench/starts.py --against /tmp/before          # and another one, in turn with it, by the same Python packages

*Cold* is the command as pods and command lines start it, *warm* what a parent that the service keeps forks (``operators.warm``). CPU
seconds are those of the process less the forward passes; the volume is tiny. *Run of the demo* is the DAG run alone, from its start
to its end; *CPU a task* is all that the service's processes take meanwhile, less the forward passes, by the run's tasks. *Start of the
service* is until all of its components work, in an empty home, with the CPU seconds that it takes, and the memory of its processes then, in
which what several share counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]

RECEIPTS = """
def receipts(exchange):
    files = list(exchange.glob("*/receipts/**/*.json"))
    assert files
    return [json.loads(file.read_text())["receipt"] for file in files]
"""
"""Part of programs that also run with code of before, whose modules lie elsewhere: files and commands stay."""

COLD = """
import json, os, resource, subprocess, sys, time
from pathlib import Path
import numpy as np, yaml
from chunkflow_core.__main__ import main
folder, tree = Path(sys.argv[1]), Path(sys.argv[2])
shape = (16, 96, 96)
np.save(folder / "em.npy", np.random.default_rng(0).integers(0, 255, shape, np.uint8))
sizes = ["--voxel-size", "50", "4", "4", "--chunk-size", "16", "48", "48"]
assert main(["ingest", str(folder / "em.npy"), f"file://{folder}/em", *sizes]) == 0
unet = {"engine": "pytorch", "path": str(tree / "examples/unet/model.py"), "weights": str(tree / "examples/unet/model.pt")}
models = {"identity": {"engine": "identity"}, "pytorch": unet}
for name, model in ((name, models[name]) for name in sys.argv[3:]):
    spec = {
        "name": name, "input": {"path": f"file://{folder}/em"}, "output": {"path": f"file://{folder}/{name}", "channels": 1},
        "exchange": {"path": f"file://{folder}/{name}-exchange", "donations": "keep"}, "model": model,
        "patch_size": [16, 48, 48], "patch_overlap": [0, 16, 16], "block_size": [16, 32, 32],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    assert main(["run", str(folder / f"{name}.yaml")]) == 0
forward = {}
for name in sys.argv[3:]:
    done = [receipt for receipt in receipts(folder / f"{name}-exchange") if receipt["block"] == [0, 1, 1]]
    forward[name] = sum(receipt["facts"]["seconds"].get("forward", 0) for receipt in done if receipt["patches"])
print(json.dumps(forward))
"""

WARM = """
import json, logging, os, subprocess, sys, time
import psutil
from operators import warm
from operators.local import LocalRunner
name = f"chunkflow-bench/{os.getpid()}"
parent = subprocess.Popen([sys.executable, "-P", "-m", "operators.warm", name])
while not warm.answers(name):
    time.sleep(0.05)
os.environ[warm.VARIABLE] = name
imports, *arguments = sys.argv[1:]
runner = LocalRunner(logging.getLogger(), imports=imports.split(","))
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
text = (examples / "demo.yaml").read_text().replace("${CHUNKFLOW_DEMO}", str(folder)).replace("${CHUNKFLOW_EXAMPLES}", str(examples))
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
with start(folder / "home", environment={"CHUNKFLOW_VOLUMES": str(spec.parent)}, with_parent=True) as service, Client(service) as client:
    up = time.perf_counter() - began
    root = psutil.Process(service.pid)
    starting, memory = cpu(root), sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])
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
    """Run a script with a checkout's packages; the last line of its output, from JSON."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cold(tree: Path, arguments: list[str]) -> float:
    """CPU seconds of a command."""
    script = (
        "import json, resource, subprocess, sys; subprocess.run([sys.executable, '-P', '-m', *sys.argv[1:]], check=True, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); u = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps(u.ru_utime + u.ru_stime))"
    )
    return float(python(tree, script, *arguments))


def measure(tree: Path, folder: Path, options: argparse.Namespace, bar: tqdm[None]) -> dict[str, str]:
    """All figures of a checkout, by row."""
    folder.mkdir()
    specs = sorted({COMMANDS[name][0] for name in options.rows})
    forward, figures = python(tree, RECEIPTS + COLD, folder, tree, *specs), defaultdict(list)
    bar.update()
    alone = median(
        cold(tree, ["timeit", "-n1", "-r1", "-s", "import gc; gc.enable()", "import torch"])
        for _ in range(options.rounds)
    )
    rows = {"`import torch` alone, to know the machine by": f"{alone:.2f} s CPU"}
    for name in options.rows:
        spec, module = COMMANDS[name]
        arguments = [module, f"{folder}/{spec}.yaml", "--block", "0", "1", "1", "--force"]
        beside = forward[spec] if module.endswith("donate") else 0.0
        for _ in range(options.rounds):
            figures[name].append(cold(tree, arguments) - beside)
        rows[f"{name}, cold"] = f"{median(figures[name]):.2f} s CPU"
        if (tree / "operators" / "warm.py").exists():
            engine = ",chunkflow_core.engines.pytorch" if spec == "pytorch" else ""
            used, wall = python(tree, WARM, f"chunkflow_core.warm_up{engine}", *arguments)
            rows[f"{name}, warm"] = f"{used - beside:.2f} s CPU, {wall:.2f} s"
        bar.update()
    if not options.no_demo:
        up, starting, memory, wall, task = python(tree, RECEIPTS + DEMO, folder, tree)
        rows["start of the service"] = f"{up:.0f} s, {starting:.0f} s CPU, {memory:.0f} MB"
        rows["run of the demo, 8 blocks"], rows["CPU a task of it"] = f"{wall:.0f} s", f"{task:.2f} s CPU"
    bar.update()
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=5, help="of each cold start (default: 5)")
    parser.add_argument("--rows", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="commands (default: all)")
    parser.add_argument("--no-demo", action="store_true", help="leave out the runs of the demo")
    options = parser.parse_args()
    trees = {"this": HERE} | ({"before": options.against.resolve()} if options.against else {})
    with (
        tempfile.TemporaryDirectory(prefix="starts-") as folder,
        tqdm(total=(2 + len(options.rows)) * len(trees), unit="step") as bar,
    ):
        columns = {name: measure(tree, Path(folder) / name, options, bar) for name, tree in trees.items()}
    names = list(dict.fromkeys(row for rows in columns.values() for row in rows))
    print(f"\n|  | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name in names:
        print(f"| {name} | {' | '.join(rows.get(name, '–') for rows in columns.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
