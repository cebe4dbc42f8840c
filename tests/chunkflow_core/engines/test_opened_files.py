"""Files that a model opens by itself: named by its format, or opened by its code."""

from __future__ import annotations

import importlib
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from chunkflow_core.engines.native_opens import NativeOpens
from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.external_data import _MESSAGES, external_data
from tests.support.models.forms import write
from tests.support.models.loading import MakeSpec, Section, load, patches
from tests.support.models.two_convolutions import onnx_file
from tests.support.volume import write_layer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of exporters

Command = Callable[..., Any]


def fingerprint(path: Path, *overrides: str) -> str:
    return load_spec(path, overrides).fingerprint


# -------------------------------------------------------------------------------------------- ONNX


def with_external_data(folder: Path, location: str | None = None) -> Section:
    """The network with its tensors in one file, or each in one of its own; ``model.onnx``."""
    section = onnx_file(folder)
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=location is not None,
        location=location,
        size_threshold=0,
    )
    return section


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("location", ["model.onnx.data", "weights", None])
def test_external_data_is_part_of_the_model(
    make_spec: MakeSpec, tmp_path: Path, output: Section, engine: str, location: str | None
) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    section = with_external_data(folder, location) | {"path": "net/model.onnx"}
    path = make_spec(model={"engine": engine, **section}, output=output)
    named = sorted(file for file in folder.iterdir() if file.name != "model.onnx")
    assert len(named) == (1 if location else 4)
    assert load_spec(path).model_files == [folder / "model.onnx", *named]
    (folder / "stranger.data").write_bytes(b"")
    before, given = fingerprint(path), load(path)(patches())
    for file in named:
        content = np.frombuffer(file.read_bytes(), np.float32)
        file.write_bytes((content * 2).tobytes())
        assert fingerprint(path) != before
        assert not np.array_equal(load(path)(patches()), given), "the engine reads another file"
        file.write_bytes(content.tobytes())
    assert fingerprint(path) == before


def test_external_data_that_is_missing(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    path = make_spec(model={"engine": "onnx", **with_external_data(tmp_path, "weights")})
    (tmp_path / "weights").unlink()
    outcome = chunkflow("prepare", path)
    assert outcome.returncode == 66
    assert f"there is no {tmp_path}/weights, where model.onnx says that it has tensors" in outcome.stderr


@pytest.mark.parametrize("location", ["../weights", "/weights", "parts/../../weights", "", "."])
def test_external_data_may_not_leave_the_folder(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, location: str
) -> None:
    section = with_external_data(tmp_path, "weights")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    outcome = chunkflow("prepare", make_spec(model={"engine": "onnx", **section}))
    assert outcome.returncode == 78
    assert f"has tensors in {location!r}, expected a file in its own folder" in outcome.stderr


def external(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=name)
    return tensor


def test_external_data_wherever_a_tensor_can_be(tmp_path: Path) -> None:
    inner = onnx.GraphProto(initializer=[external("in a branch")])
    branch = onnx.AttributeProto(name="then", type=onnx.AttributeProto.GRAPH, g=inner)
    graph = onnx.GraphProto(initializer=[external("plain"), TensorProto(float_data=[1.0] * 9)])
    graph.node.append(onnx.NodeProto(op_type="If", attribute=[branch]))
    graph.node.append(helper.make_node("Constant", [], ["x"], value=external("constant")))
    graph.sparse_initializer.add(values=external("values"), indices=external("indices"))
    model = helper.make_model(graph)
    model.functions.add(node=[helper.make_node("Constant", [], ["y"], value=external("in a function"))])
    model.training_info.add(algorithm=onnx.GraphProto(initializer=[external("of training")]))
    inside = external("loaded")
    inside.data_location = TensorProto.DEFAULT
    graph.initializer.append(inside)
    (tmp_path / "all.onnx").write_bytes(model.SerializeToString())
    expected = {"plain", "in a branch", "constant", "values", "indices", "in a function", "of training"}
    assert external_data(tmp_path / "all.onnx", "all.onnx") == expected


def test_every_message_that_can_hold_a_tensor_is_searched() -> None:
    """The table of the library is what the format's own description says."""
    inside: dict[str, dict[int, str]] = {}
    todo: list[Any] = [onnx.ModelProto.DESCRIPTOR]
    while todo:
        message = todo.pop()
        parts = {field.number: field.message_type for field in message.fields if field.message_type is not None}
        inside[message.name] = {number: kind.name for number, kind in parts.items()}
        todo += [kind for kind in parts.values() if kind.name not in inside]
    holding = {"TensorProto"}
    for _ in inside:
        holding |= {name for name, parts in inside.items() if not holding.isdisjoint(parts.values())}
    holding -= {"TensorProto"}
    expected = {name: {n: k for n, k in inside[name].items() if k in holding | {"TensorProto"}} for name in holding}
    assert expected == _MESSAGES


@pytest.mark.parametrize("content", [b"\x0a", b"\x0a\x7f\x00", b"\xff" * 11, b"\x0b", b"no protobuf"])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(SpecError, match="is not an ONNX file, or it is damaged"):
        external_data(tmp_path / "model.onnx", "model.onnx")


# ------------------------------------------------------------------------------------------ Python

NETWORK = """
import ctypes, importlib, json, os, sqlite3, sys
from pathlib import Path

import numpy
import torch

HERE = Path(__file__).parent

def gain():
    return {gain}

class Network(torch.nn.Module):
    def forward(self, x):
        return x.expand(-1, 2, -1, -1, -1) * {use}

GAIN = {load}
InstantiatedModel = Network()
"""
GAINS = {
    "json": ("gain.json", "json.loads((HERE / 'gain.json').read_text())"),
    "numpy": ("gain.npy", "float(numpy.load(HERE / 'gain.npy'))"),
    "torch": ("gain.pt", "float(torch.load(HERE / 'gain.pt'))"),
    "bytes": ("gain.raw", "float(os.read(os.open(os.fsencode(HERE / 'gain.raw'), os.O_RDONLY), 9))"),
    "map": ("gain.npy", "float(numpy.load(HERE / 'gain.npy', mmap_mode='r')[()])"),
    "sqlite": ("gain.db", "sqlite3.connect(HERE / 'gain.db').execute('SELECT * FROM gain').fetchone()[0]"),
    "module": ("parts/gain.py", "(sys.path.append(str(HERE / 'parts')), importlib.import_module('ga' + 'in').GAIN)[1]"),
}
"""A file with a number, and how a network reads it."""


NATIVE_GAINS = {
    "torchscript": ("gain.ts", "torch.jit.load(str(HERE / 'gain.ts'))(torch.zeros(1)).item()"),
    "hdf5": ("gain.h5", "float(__import__('h5py').File(HERE / 'gain.h5')['gain'][()])"),
    "safetensors": (
        "gain.safetensors",
        "__import__('safetensors.torch').torch.load_file(HERE / 'gain.safetensors')['gain'].item()",
    ),
    "onnx": (
        "gain.onnx",
        "__import__('onnxruntime').InferenceSession(HERE / 'gain.onnx').run(None, {})[0].item()",
    ),
    "from_file": ("gain.f32", "torch.from_file(str(HERE / 'gain.f32'), size=1).item()"),
    "opencv-like": (
        "gain.raw",
        "(lambda c, b: (c.read(c.open(os.fsencode(HERE / 'gain.raw'), 0), b, 9), float(b.value))[1])"
        "(ctypes.CDLL(None), ctypes.create_string_buffer(9))",
    ),
}
"""Files that are opened without Python."""
COMMAND_GAINS = {
    "list": ("gain.raw", "float(__import__('subprocess').check_output(['cat', HERE / 'gain.raw']))"),
    "shell": ("gain.raw", "float(__import__('subprocess').check_output(f'cat {HERE}/gain.raw', shell=True))"),
    "popen": ("gain.raw", "float(os.popen(f'cat {HERE}/gain.raw').read())"),
    "spawn": ("gain.raw", "1 + 0 * os.posix_spawn('/bin/cat', ['cat', str(HERE / 'gain.raw')], {})"),
}
"""Files that a command opens, which the network starts."""


def write_gain(file: Path, value: float) -> None:
    """Write a number in the form that the file's name says."""
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if file.suffix == ".npy":
        np.save(file, np.array(value))
    elif file.suffix == ".ts":
        torch.jit.trace(torch.nn.Threshold(1, value), torch.zeros(1)).save(str(file))  # type: ignore[no-untyped-call]
    elif file.suffix == ".h5":
        with h5py.File(file, "w") as opened:
            opened["gain"] = value
    elif file.suffix == ".safetensors":
        save_file({"gain": torch.tensor(value)}, file)
    elif file.suffix == ".onnx":
        tensor = helper.make_tensor("gain", TensorProto.FLOAT, [1], [value])
        node = helper.make_node("Constant", [], ["y"], value=tensor)
        graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    elif file.suffix == ".f32":
        np.array([value], np.float32).tofile(file)
    elif file.suffix == ".pt":
        torch.save(torch.tensor(value), file)
    elif file.suffix == ".db":
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE gain (value REAL)")
            database.execute("INSERT INTO gain VALUES (?)", (value,))
        database.close()
    else:
        file.write_text(f"GAIN = {value}" if file.suffix == ".py" else json.dumps(value))


def network(folder: Path, gain: str, when: str = "loading") -> Section:
    """Write a network that multiplies by a number, read when it is loaded or when it runs."""
    load, use = ("gain()", "GAIN") if when == "loading" else ("None", "gain()")
    write(folder, NETWORK.format(gain=gain, load=load, use=use))
    return {"engine": "pytorch", "path": f"{folder.name}/model.py"}


@pytest.mark.parametrize("when", ["loading", "running"])
@pytest.mark.parametrize("kind", GAINS)
def test_files_that_a_network_opens_have_to_be_listed(
    make_spec: MakeSpec, tmp_path: Path, output: Section, chunkflow: Command, kind: str, when: str
) -> None:
    name, gain = GAINS[kind]
    file = tmp_path / "net" / name
    path = make_spec(model=network(tmp_path / "net", gain, when), output=output)
    write_gain(file, 0.5)
    outcome = chunkflow("prepare", path)
    assert outcome.returncode == 78
    assert f"{file}, which is not among the files that make the model" in outcome.stderr
    assert f'Add to the spec: model.files: ["net/{name}"]' in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not (tmp_path / "output").exists()

    listed = f"model.files=[net/{name}]"
    assert chunkflow("prepare", path, "--set", listed).returncode == 0
    before, given = fingerprint(path, listed), load(path, listed)(patches())
    write_gain(file, 0.25)
    assert fingerprint(path, listed) != before
    np.testing.assert_array_equal(load(path, listed)(patches()) * 2, given)


@pytest.fixture
def kernel(tmp_path: Path) -> None:
    """Skips where the kernel tells nothing."""
    native = NativeOpens([tmp_path])
    native.close()
    if not native.is_told:
        pytest.skip("the kernel, or this container, does not let processes watch what they open (fanotify)")


@pytest.mark.parametrize("when", ["loading", "running"])
@pytest.mark.parametrize("kind", NATIVE_GAINS)
def test_files_that_are_opened_without_python(
    make_spec: MakeSpec, tmp_path: Path, output: Section, chunkflow: Command, kernel: None, kind: str, when: str
) -> None:
    name, gain = NATIVE_GAINS[kind]
    path = make_spec(model=network(tmp_path / "net", gain, when), output=output)
    write_gain(tmp_path / "net" / name, 0.5)
    check_has_to_be_listed(chunkflow, path, name)


@pytest.mark.parametrize("when", ["loading", "running"])
@pytest.mark.parametrize("kind", COMMAND_GAINS)
def test_files_that_commands_open(
    make_spec: MakeSpec, tmp_path: Path, output: Section, chunkflow: Command, kind: str, when: str
) -> None:
    name, gain = COMMAND_GAINS[kind]
    path = make_spec(model=network(tmp_path / "net", gain, when), output=output)
    write_gain(tmp_path / "net" / name, 0.5)
    check_has_to_be_listed(chunkflow, path, name)


def check_has_to_be_listed(chunkflow: Command, path: Path, name: str) -> None:
    """Check that a file is refused until it is listed, and then not, nor one that is not opened."""
    (path.parent / "net" / "stranger").write_text("1")
    outcome = chunkflow("prepare", path)
    assert outcome.returncode == 78, outcome.stderr
    assert f'Add to the spec: model.files: ["net/{name}"]' in outcome.stderr
    assert chunkflow("prepare", path, "--set", f"model.files=[net/{name}]").returncode == 0


def test_what_a_network_writes_without_python_is_not_read(
    make_spec: MakeSpec, tmp_path: Path, output: Section, kernel: None
) -> None:
    log = "__import__('h5py').File(HERE / 'log.h5', 'w').close() or 1"
    path = make_spec(model=network(tmp_path / "net", log), output=output)
    load(path)(patches())
    assert (tmp_path / "net" / "log.h5").is_file()


def test_a_network_that_does_without_the_file_is_refused_all_the_same(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    """It would be another network than the one that its author has run."""
    path = make_spec(model=network(tmp_path / "net", "None"), output=output)
    write(
        tmp_path / "net",
        "try:\n    GAIN = open(__file__[:-8] + 'gain').read()\nexcept Exception:\n    GAIN = 1\n"
        + NETWORK.format(gain=1, load=1, use=1),
    )
    write_gain(tmp_path / "net" / "gain", 0.5)
    with pytest.raises(SpecError, match=r'model\.files: \["net/gain"\]'):
        load(path)


def test_a_file_that_is_not_there_is_told_with_the_key(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    path = make_spec(model=network(tmp_path / "net", GAINS["json"][1]), output=output)
    with pytest.raises(SpecError, match=r"gain\.json.* has to stand in model\.files"):
        load(path)


def test_openvino_converts_again_what_a_listed_file_has_changed(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    name, gain = GAINS["json"]
    path = make_spec(model=network(tmp_path / "net", gain) | {"engine": "openvino"}, output=output)
    write_gain(tmp_path / "net" / name, 0.5)
    with pytest.raises(SpecError, match=r"model\.files"):
        load(path)
    listed = f"model.files=[net/{name}]"
    given = load(path, listed)(patches())
    write_gain(tmp_path / "net" / name, 0.25)
    np.testing.assert_allclose(load(path, listed)(patches()) * 2, given)


def test_globs(make_spec: MakeSpec, tmp_path: Path, output: Section, model_folders: Path) -> None:
    spec = load_spec(make_spec(model={"engine": "pytorch", "path": "net/model.py"}, output=output))
    names = {
        "net/*.json": ["net/a.json", "net/b.json"],
        "net/**": ["net/.hidden", "net/a.json", "net/b.json", "net/parts/[c].json"],
        "**/*c*.json": ["net/parts/[c].json"],
        "net/parts/[c].json": ["net/parts/[c].json"],
        "other/../net/a.json": ["other/../net/a.json"],
        f"{model_folders}/?.json": [f"{model_folders}/a.json", f"{model_folders}/b.json"],
    }
    for name, files in names.items():
        listed = load_spec(tmp_path / "spec.yaml", [f"model.files={json.dumps([name])}"])
        assert listed.model_files == [*spec.model_files, *(tmp_path / file for file in files)], name
        assert listed.fingerprint != spec.fingerprint
    prints = [
        load_spec(tmp_path / "spec.yaml", [f"model.files={json.dumps(list(files))}"]).fingerprint
        for files in (["net/?.json"], ["net/a.json", "net/b.json"], ["net/a.json", "net/*.json"])
    ]
    assert len(set(prints)) == 1, "what is in the files counts, not how they are named"
    for name in ("net/nothing", "net/*.npz", "net/parts", "net/__pycache__/*"):
        with pytest.raises(MissingInputError, match=r"model\.files: .*: there is no such file"):
            _ = load_spec(tmp_path / "spec.yaml", [f"model.files={json.dumps([name])}"]).model_files


@pytest.fixture
def model_folders(tmp_path: Path) -> Path:
    """The folder of a network, with files of many names beside and below."""
    folder = tmp_path / "net"
    for name in ("model.py", "a.json", "b.json", ".hidden", "parts/[c].json", "__pycache__/d.pyc", "../other/e"):
        write(folder, "1", name)
    return folder


def test_what_else_is_opened_is_not_the_networks(
    make_spec: MakeSpec, tmp_path: Path, output: Section, chunkflow: Command
) -> None:
    """Layers may lie below the model's folder, and so may anything that this process reads."""
    text = "(Path(__file__).parent / 'log').write_text('1') and importlib.import_module('wave') and "
    text += "open(HERE / '.cache' / 'x').read() and 1"
    section = network(tmp_path / "net", text, "running")
    write(tmp_path / "net", "1", ".cache/x")
    write(tmp_path / "net", "1", "stranger")
    write_layer(tmp_path / "net" / "input")
    places = {key: {"path": f"file://{tmp_path}/net/{key}"} for key in ("input", "exchange")}
    path = make_spec(model=section, output=output | {"path": f"file://{tmp_path}/net/output"}, **places)
    assert chunkflow("run", path, "--seams", "0").returncode == 0
    opened = []
    thread = threading.Thread(target=lambda: opened.append((tmp_path / "net" / "stranger").read_text()))
    thread.start()
    thread.join()
    assert opened == [(tmp_path / "net" / "stranger").read_text()]
    assert importlib.import_module("wave")
