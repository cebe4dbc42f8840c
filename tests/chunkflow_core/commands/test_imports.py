"""A stage's process imports what it uses and nothing else.

Every pod pays for imports anew, in seconds of CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chunkflow_core.__main__ import main
from tests.support.volume import write_volume

RUN = """
import json, runpy, sys
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        assert not ending.code, ending.code
    print(*sys.modules)
"""

CLIENTS = {"cloudvolume", "cloudfiles", "boto3", "botocore", "google.cloud", "requests", "urllib3", "gevent"}
"""Storage on servers, and layers that are not plain."""
COMPILER = {"torch._inductor", "torch._dynamo", "sympy"}
NEVER = {"airflow", "kubernetes", "matplotlib", "onnx", "onnxruntime", "openvino", "pandas", "scipy", "networkx"}

MODEL = """
import torch

class Twice(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, x], dim=1)

InstantiatedModel = Twice()
"""

SETTINGS = """
import torch, torch._inductor.config as config

print(torch.get_deterministic_debug_mode(), torch.are_deterministic_algorithms_enabled(), config.deterministic)
"""


def run(*commands: list[object], folder: Path | None = None) -> list[tuple[set[str], str]]:
    """Run commands to their ends, one after the other in a fresh process.

    For each, the modules that are imported then, and the last line that it has printed.
    """
    words = json.dumps([[*map(str, command)] for command in commands])
    done = subprocess.run([sys.executable, "-c", RUN, words], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ends = [number for number, line in enumerate(lines) if line.startswith("sys ")]
    assert len(ends) == len(commands), done.stdout
    return [(set(lines[end].split()), lines[end - 1]) for end in ends]


def volume(folder: Path, **changes: object) -> Path:
    """A prepared volume of the engine ``identity``, or another."""
    (folder / "model.py").write_text(MODEL)
    spec = write_volume(folder, **changes)
    assert main(["prepare", str(spec)]) == 0
    return spec


def stage(name: str, spec: Path, x: int, *options: str) -> list[object]:
    """A stage of block (0, 0, x)."""
    return [f"chunkflow_core.{name}", spec, "--block", 0, 0, x, *options]


def test_identity_and_blending_need_no_torch_and_on_a_disk_no_client(tmp_path: Path) -> None:
    spec = volume(tmp_path)
    infer = [stage("inference_and_donate", spec, x, "--check-input") for x in (1, 0)]
    for modules, _ in run(*infer, stage("receive_and_blend", spec, 1)):
        assert not modules & {"torch", *CLIENTS, *NEVER}


def test_other_commands(tmp_path: Path) -> None:
    spec = volume(tmp_path)
    commands = ("plan", "prepare", "verify --begun", "report", "cleanup")
    found = run(*(["chunkflow_core", *name.split()[:1], spec, *name.split()[1:]] for name in commands))
    assert {
        name: modules & {"torch", *CLIENTS, *NEVER} for name, (modules, _) in zip(commands, found, strict=True)
    } == {name: set() for name in commands}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_compiler_of_pytorch_is_imported_where_it_compiles(tmp_path: Path, compiled: bool) -> None:
    """All that is computed and compiled is deterministic.

    So is what a model compiles by itself later.
    """
    spec = volume(tmp_path, model={"engine": "pytorch", "path": "model.py", "compile": compiled})
    (tmp_path / "settings.py").write_text(SETTINGS)
    (modules, _), (_, settings) = run(stage("inference_and_donate", spec, 1), ["settings"], folder=tmp_path)
    assert "torch" in modules and not modules & CLIENTS
    if compiled:
        assert modules >= COMPILER  # with whatever they use
    else:
        assert not modules & {*COMPILER, *NEVER}
    assert settings == "2 True True"
