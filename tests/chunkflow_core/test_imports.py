"""A stage's process imports what it uses and nothing else: every pod pays for it anew, in seconds of CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from volume import write_volume

from chunkflow_core.__main__ import main

RUN = """
import runpy, sys
module, *arguments = sys.argv[1:]
sys.argv = [module, *arguments]
try:
    runpy.run_module(module, run_name="__main__")
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


def run(module: str, *arguments: object) -> set[str]:
    """Run a command to its end in a fresh process; the modules that it has imported."""
    command = [sys.executable, "-c", RUN, module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def volume(folder: Path, **changes: object) -> Path:
    """A prepared volume of the engine ``identity``, or another."""
    (folder / "model.py").write_text(MODEL)
    spec = write_volume(folder, **changes)
    assert main(["prepare", str(spec)]) == 0
    return spec


def stage(name: str, spec: Path, *options: str) -> set[str]:
    """Run a stage of block (0, 0, 1)."""
    return run(f"chunkflow_core.{name}", spec, "--block", 0, 0, 1, *options)


def test_identity_and_blending_need_no_torch_and_on_a_disk_no_client(tmp_path: Path) -> None:
    spec = volume(tmp_path)

    assert not stage("inference_and_donate", spec, "--check-input") & {"torch", *CLIENTS, *NEVER}
    run("chunkflow_core.inference_and_donate", spec, "--block", 0, 0, 0)
    assert not stage("receive_and_blend", spec) & {"torch", *CLIENTS, *NEVER}


@pytest.mark.parametrize("command", ["plan", "prepare", "verify --begun", "report", "cleanup"])
def test_other_commands(tmp_path: Path, command: str) -> None:
    name, *options = command.split()
    spec = volume(tmp_path)
    assert not run("chunkflow_core", name, spec, *options) & {"torch", *CLIENTS, *NEVER}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_compiler_of_pytorch_is_imported_where_it_compiles(tmp_path: Path, compiled: bool) -> None:
    spec = volume(tmp_path, model={"engine": "pytorch", "path": "model.py", "compile": compiled})
    modules = stage("inference_and_donate", spec)
    assert "torch" in modules and not modules & CLIENTS
    if compiled:
        assert modules >= COMPILER  # with whatever they use
    else:
        assert not modules & {*COMPILER, *NEVER}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_all_that_is_computed_and_compiled_is_deterministic(tmp_path: Path, compiled: bool) -> None:
    """Also what a model compiles by itself later."""
    (tmp_path / "model.py").write_text(MODEL)
    spec = write_volume(tmp_path, model={"engine": "pytorch", "path": "model.py", "compile": compiled})
    text = (
        "import sys, torch; from chunkflow_core.engines import load_engine; from chunkflow_core.spec import load_spec\n"
        "load_engine(load_spec(sys.argv[1]))\n"
        "import torch._inductor.config as config\n"
        "print(torch.get_deterministic_debug_mode(), torch.are_deterministic_algorithms_enabled(), config.deterministic)"
    )
    done = subprocess.run([sys.executable, "-c", text, spec], capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 True True\n", done.stderr
