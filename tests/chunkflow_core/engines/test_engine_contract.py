"""What every engine owes, with a real model for each.

The same patch gives the same bits, and an output has the declared shape or is an error.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.gpu import claim
from chunkflow_core.engines.openvino import OpenVINO
from chunkflow_core.errors import DataError, MissingInputError, SpecError
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.model_files import made_once
from tests.support.nursery import Child, Nursery, shared

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]
Section = dict[str, Any]

PATCH = (8, 16, 16)
STREAMS = 3
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv3d(4, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x):
        output: torch.Tensor = self.second(torch.relu(self.first(x)))
        return output

InstantiatedModel = Net()
"""


class Net(torch.nn.Module):
    """The network of the text above; by its random weights it sees every direction differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv3d(4, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(torch.relu(self.first(x)))
        return output


def net() -> Net:
    torch.manual_seed(7)
    return Net().eval()


def patches(count: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(3).random((count, 1, *PATCH), np.float32)


def load(path: Path, *overrides: str) -> Engine:
    return load_engine(load_spec(path, overrides))


# ------------------------------------------------------------------ a model of every kind of engine


def python_file(folder: Path, **more: Any) -> Section:
    """The network as chunkflow takes it."""
    (folder / "model.py").write_text(NET)
    torch.save(net().state_dict(), folder / "weights.pt")
    return {"path": "model.py", "weights": "weights.pt", **more}


def onnx_file(folder: Path, network: torch.nn.Module | None = None, **more: Any) -> Section:
    example = torch.zeros(1, 1, *PATCH)
    torch.onnx.export(network or net(), (example,), str(folder / "model.onnx"), dynamo=False, input_names=["patch"])
    return {"path": "model.onnx", **more}


def openvino_file(folder: Path, **more: Any) -> Section:
    import openvino

    network = openvino.convert_model(net(), example_input=torch.zeros(1, 1, *PATCH))
    openvino.save_model(network, folder / "model.xml", compress_to_fp16=False)
    return {"path": "model.xml", **more}


# A net of pznet is an extension module beside its weights. This one is a convolution of 3 × 3 × 3
# with zeros around; as the real ones, it keeps its buffers from call to call, writes into the
# folder lib, and ends the process at a wrong size.
ZNET = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdio.h>
#include <string.h>

enum { Z = 8, Y = 16, X = 16, OUTPUTS = 2, SIZE = Z * Y * X };

typedef struct { PyObject_HEAD float kernel[OUTPUTS][27], bias[OUTPUTS], in[SIZE], out[OUTPUTS * SIZE]; } Net;

static int net_init(Net *self, PyObject *arguments, PyObject *unused) {
    const char *weights, *lib;
    char path[4096];
    if (!PyArg_ParseTuple(arguments, "ss", &weights, &lib)) return -1;
    snprintf(path, sizeof path, "%sconvolution.data", weights);
    FILE *file = fopen(path, "rb");
    if (!file) { PyErr_SetFromErrnoWithFilename(PyExc_OSError, path); return -1; }
    size_t read = fread(self->kernel, sizeof(float), OUTPUTS * 27, file)
        + fread(self->bias, sizeof(float), OUTPUTS, file);
    fclose(file);
    if (read != OUTPUTS * 28) { PyErr_SetString(PyExc_ValueError, "weights are short"); return -1; }
    snprintf(path, sizeof path, "%s/layer.so", lib);
    if (!(file = fopen(path, "wb"))) { PyErr_SetFromErrnoWithFilename(PyExc_OSError, path); return -1; }
    fclose(file);
    return 0;
}

static float at(const float *in, int z, int y, int x) {
    return z < 0 || z >= Z || y < 0 || y >= Y || x < 0 || x >= X ? 0 : in[(z * Y + y) * X + x];
}

static PyObject *net_forward(Net *self, PyObject *patch) {
    Py_buffer view;
    if (PyObject_GetBuffer(patch, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)) return NULL;
    if (strcmp(view.format, "f") || view.len != SIZE * sizeof(float)) { fprintf(stderr, "wrong size\n"); exit(1); }
    memcpy(self->in, view.buf, view.len);
    PyBuffer_Release(&view);
    for (int c = 0; c < OUTPUTS; c++)
        for (int z = 0; z < Z; z++) for (int y = 0; y < Y; y++) for (int x = 0; x < X; x++) {
            float sum = self->bias[c];
            for (int k = 0; k < 27; k++)
                sum += self->kernel[c][k] * at(self->in, z + k / 9 - 1, y + k / 3 % 3 - 1, x + k % 3 - 1);
            self->out[((c * Z + z) * Y + y) * X + x] = sum;
        }
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy) return NULL;
    PyObject *memory = PyMemoryView_FromMemory((char *)self->out, sizeof self->out, PyBUF_READ);
    PyObject *flat = PyObject_CallMethod(numpy, "frombuffer", "Os", memory, "float32");
    PyObject *shaped = flat ? PyObject_CallMethod(flat, "reshape", "iiiii", 1, OUTPUTS, Z, Y, X) : NULL;
    Py_XDECREF(flat); Py_XDECREF(memory); Py_DECREF(numpy);
    return shaped;
}

static PyObject *net_in_shape(Net *self, PyObject *unused) { return Py_BuildValue("[iiiii]", 1, 1, Z, Y, X); }

static PyMethodDef methods[] = {
    {"forward", (PyCFunction)net_forward, METH_O, ""},
    {"get_in_shape", (PyCFunction)net_in_shape, METH_NOARGS, ""}, {0}};
static PyTypeObject type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "znet.znet", .tp_basicsize = sizeof(Net), .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew, .tp_init = (initproc)net_init, .tp_methods = methods};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "znet", "", -1};

PyMODINIT_FUNC PyInit_znet(void) {
    PyObject *made = PyModule_Create(&module);
    return made && PyModule_AddType(made, &type) == 0 ? made : NULL;
}
"""

PZNET = """
import os, sys

class PZNet:
    def __init__(self, net_path, lib_path=None):
        lib_path = lib_path or os.path.join(net_path, "lib")
        os.makedirs(lib_path, exist_ok=True)
        sys.path.append(net_path)
        import znet
        self.net = znet.znet(os.path.join(net_path, "weights/"), lib_path)

    @property
    def in_shape(self):
        return self.net.get_in_shape()

    def forward(self, patch):
        return self.net.forward(patch)
"""

OLD_PZNET = """
from pznet.pznet import PZNet

class znet:
    def load_net(self, net_path, lib_path=None):
        self.net = PZNet(net_path, lib_path)

    def forward(self, patch):
        return self.net.forward(patch)
"""


def convolution() -> torch.nn.Conv3d:
    torch.manual_seed(11)
    return torch.nn.Conv3d(1, 2, 3, padding=1).eval()


IN_PYTHON = """
import numpy as np

VALUE = 1

class znet:
    def __init__(self, weights, layers):
        pass

    def forward(self, patch):
        return np.full((len(patch), 2, *patch.shape[2:]), VALUE, np.float32)
"""


@pytest.fixture(scope="session")
def znet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension module, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("znet")
    (folder / "znet.c").write_text(ZNET)
    include = sysconfig.get_paths()["include"]
    # the same sums as a convolution of PyTorch, up to rounding
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", f"-I{include}", "znet.c", "-o", "znet.so"], cwd=folder, check=True
    )
    return folder / "znet.so"


@pytest.fixture
def pznet_net(tmp_path: Path, znet: Path) -> Callable[..., Section]:
    """Makes the folder of a compiled net; gives the section ``model``, with more keys at will."""

    def make(name: str = "net", **more: Any) -> Section:
        folder = tmp_path / name
        (folder / "weights").mkdir(parents=True)
        shutil.copy(znet, folder)
        layer = convolution()
        assert layer.bias is not None
        numbers = [layer.weight.detach().numpy().ravel(), layer.bias.detach().numpy()]
        np.concatenate(numbers).astype(np.float32).tofile(folder / "weights" / "convolution.data")
        return {"engine": "pznet", "path": name, **more}

    return make


@pytest.fixture
def pznet_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs the package pznet, in this process and those it starts."""

    def install(package: str = "") -> None:
        folder = tmp_path / "site"
        (folder / "pznet").mkdir(parents=True)
        (folder / "pznet" / "__init__.py").write_text(package and "from pznet.old import znet\n")
        (folder / "pznet" / ("old.py" if package else "pznet.py")).write_text(package or PZNET)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("pznet", "znet")]:
            del sys.modules[name]

    forget()
    yield install
    forget()


@pytest.fixture(scope="module")
def with_torch() -> Iterator[Nursery]:
    """Forks processes that have imported PyTorch and OpenVINO, and computed nothing."""
    nursery = Nursery(["torch", *(f"chunkflow_core.engines.{name}" for name in ("openvino", "tracing", "pytorch"))])
    yield nursery
    nursery.close()


@dataclass(frozen=True)
class Case:
    """An engine with a model."""

    path: Path
    expected: NDArray[np.float32]
    """Outputs of ``patches()`` by PyTorch in float32."""
    tolerance: float


CASES: dict[str, Any] = {
    "identity": lambda folder: {"engine": "identity"},
    "pytorch": lambda folder: python_file(folder, engine="pytorch"),
    "pytorch bfloat16": lambda folder: python_file(folder, engine="pytorch", precision="bfloat16"),
    "pytorch two threads": lambda folder: python_file(folder, engine="pytorch", threads=2),
    "pytorch compiled": lambda folder: python_file(folder, engine="pytorch", compile=True),
    "openvino": lambda folder: python_file(folder, engine="openvino"),
    "openvino two threads": lambda folder: python_file(folder, engine="openvino", threads=2),
    "openvino bfloat16": lambda folder: python_file(folder, engine="openvino", precision="bfloat16"),
    "openvino xml": lambda folder: openvino_file(folder, engine="openvino"),
    "openvino onnx": lambda folder: onnx_file(folder, engine="openvino"),
    "onnx": lambda folder: onnx_file(folder, engine="onnx"),
    "pznet module": ...,
    "pznet package": ...,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds what another has converted."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def can(precision: str) -> bool:
    """Whether OpenVINO can compute in a precision here."""
    import openvino

    return precision in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture
def output(tmp_path: Path) -> Section:
    return {"path": f"file://{tmp_path}/output", "channels": 2, "chunk_size": [6, 12, 12], "range": [-64, 64]}


@pytest.fixture
def make_case(
    request: pytest.FixtureRequest,
    make_spec: MakeSpec,
    tmp_path: Path,
    output: Section,
    pznet_package: Callable[[str], None],
) -> Callable[[str], Case | None]:
    """Makes a case by its name; gives None if this machine can't run it."""

    def make(name: str) -> Case | None:
        if (name == "pytorch compiled" and COMPILER is None) or (name == "openvino bfloat16" and not can("BF16")):
            return None
        if name == "pznet package":
            pznet_package("")
        section = CASES[name]
        model = request.getfixturevalue("pznet_net")(name) if section is ... else section(tmp_path)
        batch = torch.from_numpy(patches())
        network = convolution() if section is ... else net()
        expected = batch.expand(-1, 2, -1, -1, -1) if name == "identity" else network(batch).detach()
        spec = make_spec(model={**model, "streams": STREAMS}, output=output)
        path = spec.rename(tmp_path / f"{name}.yaml")
        return Case(path, expected.numpy(), 3e-2 if "bfloat16" in name else 1e-5)

    return make


@pytest.fixture(scope="module")
def common_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What OpenVINO has converted once, for the tests that do not ask how."""
    return tmp_path_factory.mktemp("cache")


_IN_TURN = [pytest.param(name, marks=pytest.mark.long) if name == "pytorch compiled" else name for name in CASES]
"""To compile a network takes longer than all that is asked of it."""


@pytest.fixture(params=_IN_TURN)
def case(
    request: pytest.FixtureRequest,
    make_case: Callable[[str], Case | None],
    common_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Case:
    """Every engine in turn."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(common_cache))
    made = make_case(request.param)
    if made is None:
        pytest.skip("not on this machine: there is no C++ compiler, or its CPU does not compute in bfloat16")
    return made


def test_numbers_of_the_reference_and_the_declared_form(case: Case) -> None:
    engine, batch = load(case.path), patches()
    given = engine(batch)
    np.testing.assert_array_equal(batch, patches())
    assert given.dtype == np.float32
    assert given.flags.c_contiguous
    np.testing.assert_allclose(given, case.expected, atol=case.tolerance)
    assert given.std() > case.tolerance, "a constant would prove nothing"
    for axis in (2, 3, 4):
        mirrored = np.flip(engine(np.ascontiguousarray(np.flip(patches(), axis))), axis)
        is_blind = case.path.stem == "identity"
        assert is_blind or abs(mirrored - given).max() > 2 * case.tolerance, (
            "neither would a network without directions"
        )
    assert engine.batch_size == 1
    assert 1 <= engine.streams <= STREAMS
    assert all(isinstance(value, str | int | float) for value in engine.description.values())


def test_same_bits_at_any_place_and_whatever_else_was_run(case: Case) -> None:
    engine = load(case.path)
    first = engine(patches())
    kept = first.copy()
    engine(np.random.default_rng(5).random((2, 1, *PATCH), np.float32) * 3)
    engine(np.zeros((1, 1, *PATCH), np.float32))
    for shift in range(1, 3):
        np.testing.assert_array_equal(engine(np.roll(patches(), shift, axis=0)), np.roll(first, shift, axis=0))
    for index in range(3):
        np.testing.assert_array_equal(engine(patches()[index : index + 1])[0], first[index])
    np.testing.assert_array_equal(first, kept)  # the caller may keep it


def test_same_bits_from_several_threads_at_once(case: Case) -> None:
    engine = load(case.path)
    many = np.random.default_rng(9).random((24, 1, *PATCH), np.float32)
    alone = [engine(patch[None]) for patch in many]
    with ThreadPoolExecutor(engine.streams) as pool:
        together = list(pool.map(lambda patch: engine(patch[None]), many))
    np.testing.assert_array_equal(together, alone)


RUN = """
import sys, numpy as np
from chunkflow_core.engines import load_engine
from chunkflow_core.spec import load_spec
batch = np.random.default_rng(3).random((3, 1, 8, 16, 16), np.float32)
results = sys.argv[1]
np.savez(results, *(load_engine(load_spec(path))(batch) for path in sys.argv[2:]))
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(file: Path) -> list[NDArray[np.float32]]:
    with np.load(file) as archive:
        return list(archive.values())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_same_bits_in_other_processes(
    make_case: Callable[[str], Case | None], tmp_path: Path, with_torch: Nursery, compiled: bool
) -> None:
    """Two processes that start at once both convert the models, and give what this one gives."""
    names = [name for name in CASES if (name == "pytorch compiled") == compiled]
    cases = [case for case in map(make_case, names) if case]
    files = [tmp_path / "one.npz", tmp_path / "other.npz"]
    with (tmp_path / "said").open("w") as said:
        commands = [[sys.executable, "-c", RUN, str(file), *(str(case.path) for case in cases)] for file in files]
        for process in [with_torch.start(command, os.environ, tmp_path, said.fileno()) for command in commands]:
            assert process.wait(300) == 0, (tmp_path / "said").read_text()
    for case, one, other in zip(cases, *map(results, files), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=case.path.name)
        np.testing.assert_array_equal(load(case.path)(patches()), one, err_msg=case.path.name)


def test_output_that_is_not_of_the_declared_shape(case: Case) -> None:
    engine = load(case.path, "output.channels=3", "output.range=[-64,64]")
    if case.path.read_text().count("engine: identity"):
        return  # it has as many channels as are declared
    with pytest.raises(DataError) as caught:
        engine(patches(1))
    assert "(1, 2, 8, 16, 16)" in str(caught.value)
    assert "(1, 3, 8, 16, 16)" in str(caught.value)


def test_patch_of_another_size(case: Case) -> None:
    """A patch of another size never gives another number, nor ends the process."""
    if case.path.read_text().count("engine: pznet"):
        with pytest.raises(SpecError, match=r"compiled for patches of shape \(1, 1, 8, 16, 16\)"):
            load(case.path, "patch_size=[16,16,16]", "block_size=[42,84,84]", "output.chunk_size=[7,7,7]")
        return
    with pytest.raises(DataError, match=r"\(1, 1, 4, 16, 16\)|\(1, 2, 4, 16, 16\)|\(4, 16, 16\)"):
        load(case.path)(np.zeros((1, 1, 4, 16, 16), np.float32))


# -------------------------------------------------------------------------- what can't be used here

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from chunkflow_core.engines import load_engine
from chunkflow_core.commands.arguments import run_command
from chunkflow_core.spec import load_spec
sys.exit(run_command(lambda arguments: print(load_engine(load_spec(arguments[0]))), sys.argv[2:]))
"""


def refused_without(package: str, path: Path) -> str:
    process = start(HIDE, package, path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 78, said
    (line,) = said.splitlines()
    return line


@pytest.mark.parametrize(("engine", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_package_that_is_not_installed(
    make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, package: str
) -> None:
    path = make_spec(model=onnx_file(tmp_path, engine=engine), output=output)
    said = refused_without(package, path)
    assert f'pip install "chunkflow-airflow[{engine}]"' in said
    assert f"model.engine: {engine} needs the package {package}" in said


def test_a_net_in_python_runs_as_it_is(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A net is not run as compiled before, when the file has the same size and date as now."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "net" / "znet.py"
    (file.parent / "weights").mkdir(parents=True)
    file.write_text(IN_PYTHON)
    path = make_spec(model={"engine": "pznet", "path": "net"}, output=output)
    assert load(path)(patches()).max() == 1

    date = file.stat().st_mtime_ns
    file.write_text(IN_PYTHON.replace("VALUE = 1", "VALUE = 2"))
    os.utime(file, ns=(date, date))

    assert load(path)(patches()).max() == 2


def test_neither_pznet_nor_a_compiled_net(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    (tmp_path / "net").mkdir()
    path = make_spec(model={"engine": "pznet", "path": "net"}, output=output)
    said = refused_without("pznet", path)
    assert f"{tmp_path}/net has no module znet" in said
    assert "https://github.com/supersergiy/znnphi_interface" in said


def test_missing_files(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    for model in ({"engine": "pznet", "path": "net"}, {"engine": "onnx", "path": "model.onnx"}):
        with pytest.raises(MissingInputError, match=f"{tmp_path}/{model['path']} does not exist"):
            load(make_spec(model=model, output=output))


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_model(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(SpecError, match=r"model\.onnx can't be loaded by") as caught:
        load(make_spec(model={"engine": engine, "path": "model.onnx"}, output=output))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "pieces"),
    [
        ({"engine": "onnx", "path": "model.py"}, ["model.path: model.py", "onnx does not run such files"]),
        ({"engine": "pytorch", "path": "model.onnx"}, ["model.path: model.onnx", "pytorch does not run such files"]),
        ({"engine": "openvino", "path": "model.xml", "weights": "w.pt"}, ["model.weights: only for networks in a .py"]),
        ({"engine": "onnx", "path": "m.onnx", "batch_statistics": True}, ["model.batch_statistics: only for"]),
        ({"engine": "openvino", "path": "model.py", "compile": True}, ["model.compile: only for the engine pytorch"]),
        ({"engine": "openvino", "path": "model.py", "device": "cuda"}, ["model.device: cuda", "runs on CPUs"]),
        ({"engine": "pznet", "path": "net", "precision": "bfloat16"}, ["model.precision: bfloat16", "float32"]),
    ],
)
def test_settings_that_an_engine_would_ignore(make_spec: MakeSpec, model: Section, pieces: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(make_spec(model=model))
    for piece in pieces:
        assert piece in str(caught.value)


def test_precision_and_device_that_onnx_runtime_can_not_choose(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    path = make_spec(model=onnx_file(tmp_path, engine="onnx"), output=output)
    with pytest.raises(SpecError, match=r"model\.precision: bfloat16: the precision of an ONNX file is in the file"):
        load(path, "model.precision=bfloat16")
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match=r"model\.device: cuda, but ONNX Runtime has no GPU here"):
            load(path, "model.device=cuda")


def test_precision_that_the_cpu_can_not_compute_in(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=python_file(tmp_path, engine="openvino"), output=output)
    if can("FP16"):
        pytest.skip("this CPU computes in float16")
    with pytest.raises(SpecError, match=r"model\.precision: float16: this machine's CPU can't .* one of float32"):
        load(path, "model.precision=float16")


# ------------------------------------------------------------- one of several outputs; crop; logits


class Two(torch.nn.Module):
    """Two outputs, of which the second is the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.net(x)
        return y[:, :1], y


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_output_is_taken_by_index_by_name_and_by_channels(
    make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str
) -> None:
    example = torch.zeros(1, 1, *PATCH)
    torch.onnx.export(
        Two(), (example,), str(tmp_path / "two.onnx"), dynamo=False, output_names=["membrane", "affinity"]
    )
    path = make_spec(model={"engine": engine, "path": "two.onnx"}, output=output)
    wanted = net()(torch.from_numpy(patches())).detach().numpy()
    for override in ("model.output=1", "model.output=-1", "model.output=affinity", "model.output=null"):
        np.testing.assert_allclose(load(path, override)(patches()), wanted, atol=1e-5)
    one = load(path, "model.output=membrane", "output.channels=1")(patches())
    np.testing.assert_allclose(one, wanted[:, :1], atol=1e-5)
    for value, piece in [("2", "the model gives 2 outputs"), ("b", "b is not among the model's outputs ['membrane', ")]:
        with pytest.raises(SpecError) as caught:
            load(path, f"model.output={value}")
        assert piece in str(caught.value)
    with pytest.raises(SpecError, match="of which 0 have 3 channels; name the one to take"):
        load(path, "output.channels=3")


@pytest.mark.parametrize("engine", ["pytorch", "openvino", "onnx"])
def test_crop_and_sigmoid(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str) -> None:
    model = onnx_file(tmp_path) if engine == "onnx" else python_file(tmp_path)
    geometry = {"output_patch_size": [6, 14, 14], "patch_overlap": [0, 2, 2]}
    path = make_spec(**geometry, model={**model, "engine": engine, "activation": "sigmoid"}, output=output)
    far = patches() * 1000
    for batch in (patches(), far, -far):
        expected = torch.sigmoid(net()(torch.from_numpy(batch)))[:, :, 1:-1, 1:-1, 1:-1].detach().numpy()
        np.testing.assert_allclose(load(path)(batch), expected, atol=1e-4)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_network_with_two_inputs(make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str) -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    example = torch.zeros(1, 1, *PATCH)
    torch.onnx.export(Sum(), (example, example), str(tmp_path / "sum.onnx"), dynamo=False)
    with pytest.raises(SpecError, match="has 2 inputs, expected a network with one"):
        load(make_spec(model={"engine": engine, "path": "sum.onnx"}, output=output))


# --------------------------------------------------------------------------------- OpenVINO's cache


def test_a_conversion_is_kept_and_used_without_pytorch(
    make_spec: MakeSpec, tmp_path: Path, output: Section, own_cache: Path, with_torch: Nursery
) -> None:
    """Several processes at once leave one conversion, and no trace of a second."""
    path = make_spec(model=python_file(tmp_path, engine="openvino"), output=output)
    with (tmp_path / "said").open("w") as said:
        commands = [[sys.executable, "-c", RUN, f"{tmp_path}/{number}.npz", str(path)] for number in range(3)]
        for child in [with_torch.start(command, os.environ, tmp_path, said.fileno()) for command in commands]:
            assert child.wait() == 0, (tmp_path / "said").read_text()
    (kept,) = own_cache.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    program = RUN + "\nassert 'torch' not in sys.modules and 'model' not in sys.modules"
    process = start(program, tmp_path / "again.npz", path)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == before
    np.testing.assert_array_equal(results(tmp_path / "again.npz"), results(tmp_path / "0.npz"))


@pytest.mark.parametrize("change", ["weights", "model file", "patch", "batch_statistics"])
def test_what_makes_a_conversion_another_one(
    make_spec: MakeSpec, tmp_path: Path, output: Section, own_cache: Path, change: str
) -> None:
    path = make_spec(model=python_file(tmp_path, engine="openvino"), output=output)
    first, overrides = load(path)(patches()), []
    if change == "weights":
        torch.save({key: value * 2 for key, value in net().state_dict().items()}, tmp_path / "weights.pt")
    elif change == "model file":
        (tmp_path / "model.py").write_text(NET.replace("relu", "tanh"))
    elif change == "patch":
        overrides = ["patch_size=[8,16,32]", "block_size=[12,24,84]", "output.chunk_size=[6,12,12]"]
    else:
        overrides = ["model.batch_statistics=true"]
    engine = load(path, *overrides)
    if change in ("weights", "model file"):
        assert abs(engine(patches()) - first).max() > 0.1
    assert len(list(own_cache.iterdir())) == 2


def test_a_conversion_is_told_to_nobody(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    """OpenVINO would fork this process and send from there that a model was converted."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    engine = load(make_spec(model=python_file(tmp_path, engine="openvino"), output=output))
    assert isinstance(engine, OpenVINO)
    assert forks == []


def test_half_a_conversion_is_never_used(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "network.xml").write_text("<net>")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        made_once(tmp_path / "cache" / "digest", half)
    assert not list((tmp_path / "cache").iterdir())


def test_cache_that_can_not_be_written(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SpecError, match="can't be written: Not a directory; set CHUNKFLOW_CACHE"):
        load(make_spec(model=python_file(tmp_path, engine="openvino"), output=output))


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        (
            "def InstantiatedModel(x): return torch.cat([x, x], 1) if x.mean() > 0.3 else torch.zeros(1, 2, 8, 16, 16)",
            "other numbers",
        ),
        ("def InstantiatedModel(x): return torch.from_numpy(x.numpy() * 2)", "other numbers"),
        ("class PatchInferencer:\n def __init__(self, weights): pass\n", "can't convert a PatchInferencer"),
        ("def InstantiatedModel(x): return x @ x[:, :, :3]", "openvino can't convert model.py: RuntimeError"),
    ],
)
def test_model_that_can_not_be_converted(
    make_spec: MakeSpec, tmp_path: Path, output: Section, own_cache: Path, text: str, piece: str
) -> None:
    """A model is refused, too, if a conversion would silently give other numbers."""
    (tmp_path / "model.py").write_text(f"import torch\n{text}\n")
    path = make_spec(model={"engine": "openvino", "path": "model.py"}, output=output)
    with pytest.raises(SpecError, match=piece):
        load(path)
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_batch_statistics_are_converted(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    text = (
        "import torch\n"
        "InstantiatedModel = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.BatchNorm3d(2))"
    )
    (tmp_path / "model.py").write_text(text)
    path = make_spec(model={"engine": "openvino", "path": "model.py", "batch_statistics": True}, output=output)
    wanted = load(path, "model.engine=pytorch")(patches())
    np.testing.assert_allclose(load(path)(patches()), wanted, atol=1e-4)
    assert abs(load(path, "model.batch_statistics=false")(patches()) - wanted).max() > 0.1


# ------------------------------------------------------------------------------------------ PyTorch


THREADS = """
import os, sys, numpy as np
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from chunkflow_core.engines import load_engine
from chunkflow_core.spec import load_spec
engine, barrier = load_engine(load_spec(sys.argv[1])), Barrier(2)
batch = np.zeros((1, 1, 32, 64, 64), np.float32)

def run(_):
    barrier.wait()
    engine(batch)
    barrier.wait()

before = len(os.listdir("/proc/self/task"))
with ThreadPoolExecutor(2) as pool:
    list(pool.map(run, range(2)))
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_patch_is_run_in_the_declared_number_of_threads(
    make_spec: MakeSpec, tmp_path: Path, output: Section, with_torch: Nursery, threads: int
) -> None:
    """That holds in every thread that calls, not only in that which loaded the model."""
    (tmp_path / "model.py").write_text(NET)
    geometry = {"patch_size": [32, 64, 64], "block_size": [30, 60, 60]}
    model = {"engine": "pytorch", "path": "model.py", "threads": threads, "streams": 2}
    path = make_spec(model=model, output=output, **geometry)
    done = with_torch.run([sys.executable, "-c", THREADS, str(path)], os.environ, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * threads  # those that call, and the helpers of each


@pytest.mark.parametrize("body", ["x.view(-1).view_as(x) * 2", "x.mul_(2)", "x * self.scale.view(-1)[0]"])
def test_network_that_looks_at_memory_or_changes_its_input(
    make_spec: MakeSpec, tmp_path: Path, output: Section, body: str
) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        " def __init__(self): super().__init__(); self.scale = torch.nn.Parameter(torch.full((2, 2, 1, 1, 1), 2.))\n"
        f" def forward(self, x): x = torch.cat([x, x], 1); return {body}\nInstantiatedModel = Net()\n"
    )
    path = make_spec(model={"engine": "pytorch", "path": "model.py", "precision": "bfloat16"}, output=output)
    batch = patches()
    np.testing.assert_allclose(load(path)(batch), np.repeat(patches() * 2, 2, axis=1), rtol=1e-2)
    np.testing.assert_array_equal(batch, patches())


def test_forward_takes_and_gives_tensors(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    engine = load(make_spec(model=python_file(tmp_path, engine="pytorch"), output=output))
    given = engine.forward(torch.from_numpy(patches(1)).to(engine.device or "cpu"))
    assert given.is_contiguous()
    assert given.dtype == torch.float32
    np.testing.assert_array_equal(given.cpu().numpy(), engine(patches(1)))


def test_a_patch_inferencer_is_called_from_one_thread(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    text = "class PatchInferencer:\n def __init__(self, weights): pass\n def __call__(self, patch): return patch\n"
    (tmp_path / "model.py").write_text(text)
    path = make_spec(model={"engine": "pytorch", "path": "model.py", "streams": STREAMS}, output=output)
    assert load(path).streams == 1
    with pytest.raises(SpecError, match=r"model\.compile: only for InstantiatedModel"):
        load(path, "model.compile=true")


@needs_compiler
def test_a_network_is_compiled_once(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    """A network is compiled when it is loaded.

    Threads that run patches never compile, as they would all do it at once.
    """
    from torch._dynamo.utils import counters  # takes seconds to import

    path = make_spec(model=python_file(tmp_path, engine="pytorch", compile=True, streams=2), output=output)
    engine = load(path)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda patch: engine(patch[None]), patches(8)))
    assert counters["stats"]["unique_graphs"] == before
    np.testing.assert_array_equal(np.stack(outputs)[:, 0], engine(patches(8)))


def test_compiling_without_a_compiler(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch, with_torch: Nursery
) -> None:
    path = make_spec(model=python_file(tmp_path, engine="pytorch", compile=True), output=output)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # what was compiled before
    done = with_torch.run([sys.executable, "-c", HIDE, "nothing", str(path)], os.environ, tmp_path)
    assert done.returncode == 78, done.stderr
    assert "model.compile: the network can't be compiled" in done.stderr.splitlines()[-1]
    assert "needs a C++ compiler" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_keeps_data_on_the_device(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=python_file(tmp_path, engine="pytorch", batch_size=3), output=output)
    engine = load(path)
    assert engine.batch_size == 3
    assert engine.device is not None
    given = engine.forward(torch.from_numpy(patches()).to(engine.device))
    assert given.device == engine.device
    np.testing.assert_array_equal(given.cpu().numpy(), engine(patches()))
    np.testing.assert_allclose(engine(patches()), load(path, "model.device=cpu")(patches()), atol=1e-4)


# --------------------------------------------------------------------------------------------- GPUs

CLAIM = """
import sys, time
from chunkflow_core.engines.gpu import claim
print(claim(int(sys.argv[2]), sys.argv[1]), claim(int(sys.argv[2]), sys.argv[1]), flush=True)
time.sleep(600)
"""


def test_processes_spread_over_the_gpus_and_a_killed_one_frees_its_place(tmp_path: Path) -> None:
    processes: list[Child] = []

    def another() -> int:
        reading, writing = os.pipe()
        command = [sys.executable, "-c", CLAIM, str(tmp_path), "3"]
        processes.append(shared().start(command, os.environ, tmp_path, writing))
        os.close(writing)
        with os.fdopen(reading) as told:
            first, again = map(int, told.readline().split())
        assert first == again
        return first

    def kill(process: Child) -> None:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    try:
        assert [another() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
        kill(processes.pop(1))
        assert [another(), another()] == [1, 1]
    finally:
        for process in processes:
            kill(process)


def test_a_place_that_another_user_made(tmp_path: Path) -> None:
    """The file of a claim may be opened for reading only, which is enough to lock it."""
    file = tmp_path / "chunkflow-gpu-0-0"
    file.touch(mode=0o444)
    assert claim(1, tmp_path) == 0


# -------------------------------------------------------------------------------------------- PZNet


def test_digest_of_a_net_covers_its_files_but_not_what_loading_makes(
    make_spec: MakeSpec, output: Section, tmp_path: Path, pznet_net: Callable[..., Section]
) -> None:
    path = make_spec(model=pznet_net(), output=output)
    before = load_spec(path).fingerprint
    load(path)(patches(1))
    assert (tmp_path / "net" / "lib" / "layer.so").exists()
    assert load_spec(path).fingerprint == before
    weights = tmp_path / "net" / "weights" / "convolution.data"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert load_spec(path).fingerprint != before


def test_two_nets_in_one_process(
    make_spec: MakeSpec, output: Section, tmp_path: Path, pznet_net: Callable[..., Section]
) -> None:
    """Both modules have the name znet."""
    one, other = pznet_net("one"), pznet_net("other")
    weights = tmp_path / "other" / "weights" / "convolution.data"
    (np.fromfile(weights, np.float32) * 2).tofile(weights)
    engines = [load(make_spec(model=model, output=output)) for model in (one, other)]
    first, second = (engine(patches()) for engine in engines)
    np.testing.assert_allclose(second, first * 2, rtol=1e-5)


def test_the_package_of_the_time_before(
    make_spec: MakeSpec, output: Section, pznet_net: Callable[..., Section], pznet_package: Callable[[str], None]
) -> None:
    pznet_package(f"{PZNET}\n{OLD_PZNET.replace('from pznet.pznet import PZNet', '')}\ndel PZNet.in_shape")
    engine = load(make_spec(model=pznet_net(), output=output))
    expected = convolution()(torch.from_numpy(patches())).detach().numpy()
    np.testing.assert_allclose(engine(patches()), expected, atol=1e-5)


def test_a_net_without_its_weights(
    make_spec: MakeSpec, output: Section, tmp_path: Path, pznet_net: Callable[..., Section]
) -> None:
    path = make_spec(model=pznet_net(), output=output)
    (tmp_path / "net" / "weights" / "convolution.data").write_bytes(b"")
    with pytest.raises(SpecError, match=r"the net in .*/net can't be loaded: ValueError: weights are short"):
        load(path)


# ----------------------------------------------------------------------------- files beside a model


@pytest.mark.parametrize(("name", "companion"), [("model.xml", "model.bin"), ("model.onnx", "model.onnx.data")])
def test_weights_beside_a_compiled_model_count(make_spec: MakeSpec, tmp_path: Path, name: str, companion: str) -> None:
    for file in (name, companion, f"other-{companion}"):
        (tmp_path / file).write_text(file)
    path = make_spec(model={"engine": "openvino", "path": name})
    assert load_spec(path).model_files == [tmp_path / name, tmp_path / companion]
    before = load_spec(path).fingerprint
    (tmp_path / companion).write_text("changed")
    assert load_spec(path).fingerprint != before
