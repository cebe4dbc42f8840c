"""One contract for every engine and every form of model.

What is told about models that can't be used is tested, too.
"""

from __future__ import annotations

import inspect
import os
import pickle
import py_compile
import sys
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.pytorch import PyTorch
from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, SpecError
from chunkflow_core.inference_and_donate import main as infer
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.prepare import make_output

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # models of this form are around

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]

BATCH = 3
PATCH = (8, 16, 16)

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, padding=1):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=padding)
        self.norm = torch.nn.BatchNorm3d(2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        output: torch.Tensor = self.dropout(self.norm(self.conv(x)))
        return output
"""


class Net(torch.nn.Module):
    """The network of the text above."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=padding)
        self.norm = torch.nn.BatchNorm3d(2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.dropout(self.norm(self.conv(x)))
        return output


def trained(padding: int = 1) -> Net:
    """A network whose stored statistics are far from those of a random patch."""
    torch.manual_seed(5)
    net = Net(padding)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    net.norm.running_mean = torch.tensor([0.5, -0.25])
    net.norm.running_var = torch.tensor([2.0, 3.0])
    return net.eval()


def write(folder: Path, text: str, name: str = "model.py") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def pytorch(**more: Any) -> dict[str, Any]:
    """The model's section of a spec."""
    section = {"engine": "pytorch", "path": "model.py", "weights": "weights.pt", "batch_size": BATCH}
    return {k: v for k, v in (section | more).items() if v is not ...}


def patches(count: int = BATCH, size: tuple[int, ...] = PATCH) -> NDArray[np.float32]:
    return np.random.default_rng(3).random((count, 1, *size), np.float32)


def load(path: Path, *overrides: str) -> Engine:
    return load_engine(load_spec(path, overrides))


# ------------------------------------------------------------------ forms of models, all of one net


def bare_state(folder: Path, net: Net) -> dict[str, Any]:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, NET + "InstantiatedModel = Net()\n")
    return pytorch()


def nested_state(folder: Path, net: Net) -> dict[str, Any]:
    torch.save({"epoch": 7, "state_dict": net.state_dict()}, folder / "weights.pt")
    write(folder, NET + "InstantiatedModel = Net()\n")
    return pytorch()


def data_parallel_state(folder: Path, net: Net) -> dict[str, Any]:
    """Weights saved from ``torch.nn.DataParallel``: every key has the prefix ``module.``."""
    torch.save(torch.nn.DataParallel(net).state_dict(), folder / "weights.pt")
    write(folder, NET + "InstantiatedModel = Net()\n")
    return pytorch()


def load_model(folder: Path, net: Net) -> dict[str, Any]:
    torch.save({"mine": net.state_dict()}, folder / "weights.pt")
    write(
        folder,
        NET
        + """
def load_model(checkpoint):
    net = Net().train()
    net.load_state_dict(torch.load(checkpoint, map_location="cpu")["mine"])
    return net
""",
    )
    return pytorch()


def with_pre_and_post_process(folder: Path, net: Net) -> dict[str, Any]:
    """Functions around the network, as chunkflow has them: a numpy batch comes in.

    Here sign and order are turned around twice.
    """
    torch.save(net.state_dict(), folder / "weights.pt")
    write(
        folder,
        NET
        + """
class Turned(Net):
    def forward(self, x):
        return [super().forward(-x), None]

InstantiatedModel = Turned()

def pre_process(patch):
    assert type(patch).__name__ == "ndarray" and patch.dtype == "float32" and patch.ndim == 5
    return torch.from_numpy(-patch)

def post_process(output):
    return output[0]
""",
    )
    return pytorch()


def list_of_logits(folder: Path, net: Net) -> dict[str, Any]:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(
        folder,
        NET
        + "class L(Net):\n def forward(self, x): y = super().forward(x); return [y, y * 2]\nInstantiatedModel = L()",
    )
    return pytorch()


def second_of_a_list(folder: Path, net: Net) -> dict[str, Any]:
    list_of_logits(folder, net)
    write(
        folder,
        NET + "class L(Net):\n def forward(self, x): y = super().forward(x); return y * 2, y\nInstantiatedModel = L()",
    )
    return pytorch(output=1)


def only_fitting_of_a_dict(folder: Path, net: Net) -> dict[str, Any]:
    torch.save(net.state_dict(), folder / "weights.pt")
    text = "{'embedding': torch.zeros(3, 24, 8, 16, 16), 'affinity': y, 'loss': 0.5, 'scales': [y]}"
    write(
        folder,
        NET + f"class D(Net):\n def forward(self, x): y = super().forward(x); return {text}\nInstantiatedModel = D()",
    )
    return pytorch()


def named_of_a_dict(folder: Path, net: Net) -> dict[str, Any]:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(
        folder,
        NET
        + (
            "class D(Net):\n def forward(self, x): y = super().forward(x); return {'a': -y, 'b': y}\n"
            "InstantiatedModel = D()"
        ),
    )
    return pytorch(output="b")


INFERENCER = (
    NET
    + """
import numpy as np

class PatchInferencer:
    def __init__(self, weights{parameter}):
        self.net = Net().eval()
        self.net.load_state_dict(torch.load(weights))
        self.mask = {mask}

    def __call__(self, patch):
        assert isinstance(patch, np.ndarray)
        with torch.no_grad():
            return self.net(torch.from_numpy(patch)).numpy() * self.mask
"""
)


def patch_inferencer(folder: Path, net: Net) -> dict[str, Any]:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, INFERENCER.format(parameter="", mask="1"))
    return pytorch()


def patch_inferencer_with_mask(folder: Path, net: Net) -> dict[str, Any]:
    """An inferencer that multiplies by the mask, as chunkflow's do.

    It has to get ones: blended twice would be the worst of bugs.
    """
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, INFERENCER.format(parameter=", output_patch_mask", mask="output_patch_mask"))
    return pytorch()


def siblings(folder: Path, net: Net) -> dict[str, Any]:
    torch.save(net.state_dict(), folder / "weights.pt")
    write(folder, NET, "layers.py")
    write(folder, "from .deep import make\n", "parts/__init__.py")
    write(folder, "from layers import Net\ndef make(): return Net()\n", "parts/deep.py")
    write(folder, "import parts\nfrom spaces import one\nInstantiatedModel = parts.make() if one.x else None\n")
    write(folder, "x = 1\n", "spaces/one.py")  # a package without __init__.py
    return pytorch()


def torchscript(folder: Path, net: Net) -> dict[str, Any]:
    torch.jit.script(net).save(folder / "model.pt")  # type: ignore[no-untyped-call]
    return pytorch(path="model.pt", weights=...)


def exported(folder: Path, net: Net) -> dict[str, Any]:
    program = torch.export.export(net, (torch.zeros(1, 1, *PATCH),))
    torch.export.save(program, folder / "model.pt2")
    return pytorch(path="model.pt2", weights=...)


FORMS = [
    bare_state,
    data_parallel_state,
    nested_state,
    load_model,
    with_pre_and_post_process,
    list_of_logits,
    second_of_a_list,
    only_fitting_of_a_dict,
    named_of_a_dict,
    patch_inferencer,
    patch_inferencer_with_mask,
    siblings,
    torchscript,
    exported,
]


@pytest.fixture
def output(tmp_path: Path) -> dict[str, Any]:
    """The output section for two channels of logits."""
    return {"path": f"file://{tmp_path}/output", "channels": 2, "chunk_size": [6, 12, 12], "range": [-64, 64]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has converted."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))


def check_contract(engine: Engine, spec_path: Path, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Check what every engine owes, and give its output.

    That is shape, dtype, memory order, its input untouched, and bits that only depend on the patch.
    """
    spec = load_spec(spec_path)
    before = batch.copy()
    output = engine(batch)
    np.testing.assert_array_equal(batch, before)
    assert output.shape == (len(batch), spec.output.channels, *spec.output_size)
    assert output.dtype == np.float32
    assert output.flags.c_contiguous
    np.testing.assert_array_equal(engine(batch), output)
    for shift in range(1, len(batch)):
        np.testing.assert_array_equal(engine(np.roll(batch, shift, axis=0)), np.roll(output, shift, axis=0))
    filled_up = batch.copy()
    filled_up[1:] = 0
    np.testing.assert_array_equal(engine(filled_up)[0], output[0])
    assert all(isinstance(value, str | int | float) for value in engine.description.values())
    return output


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_the_network_gives(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], form: Callable[[Path, Net], dict[str, Any]]
) -> None:
    """Networks run in evaluation mode: dropout off, stored statistics used."""
    net = trained()
    path = make_spec(model=form(tmp_path, net), output=output)
    given = check_contract(load(path), path, patches())
    expected = net(torch.from_numpy(patches())).detach().numpy()
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
    assert given.std() > 0.1, "a constant would prove nothing"


CONVERTIBLE = [form for form in FORMS if form not in (patch_inferencer, patch_inferencer_with_mask)]


@pytest.mark.parametrize("form", CONVERTIBLE)
def test_every_form_that_openvino_can_convert(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], form: Callable[[Path, Net], dict[str, Any]]
) -> None:
    """A model is converted the first time; the second time it comes from the cache."""
    net = trained()
    path = make_spec(model=form(tmp_path, net) | {"engine": "openvino"}, output=output)
    expected = net(torch.from_numpy(patches())).detach().numpy()
    for _ in range(2):
        given = check_contract(load(path), path, patches())
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [list_of_logits, patch_inferencer, torchscript])
def test_sigmoid_is_applied_to_logits(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], form: Callable[[Path, Net], dict[str, Any]]
) -> None:
    net = trained()
    path = make_spec(model=form(tmp_path, net) | {"activation": "sigmoid"}, output=output)
    expected = torch.sigmoid(net(torch.from_numpy(patches()))).detach().numpy()
    np.testing.assert_allclose(load(path)(patches()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [[8, 16, 16], [4, 8, 10]], ids=["whole", "cropped"])
@pytest.mark.parametrize("channels", [1, 3])
def test_identity_repeats_its_input(
    make_spec: MakeSpec, output: dict[str, Any], size: list[int], channels: int
) -> None:
    geometry = {"output_patch_size": size, "patch_overlap": [1, 2, 2], "block_size": [21, 84, 56]}
    fitting = {"channels": channels, "chunk_size": [3, 2, 4] if size[0] == 4 else [7, 14, 14], "range": [0, 1]}
    path = make_spec(**geometry, model={"engine": "identity", "batch_size": BATCH}, output=output | fitting)
    given = check_contract(load(path), path, patches())
    low = [(p - s) // 2 for p, s in zip(PATCH, size, strict=True)]
    z, y, x = (slice(a, a + s) for a, s in zip(low, size, strict=True))
    for channel in range(channels):
        np.testing.assert_array_equal(given[:, channel], patches()[:, 0, z, y, x])


@pytest.mark.parametrize("padding", [1, 0], ids=["model gives the whole patch", "model of valid convolutions"])
def test_smaller_output_patch_is_the_centre(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], padding: int
) -> None:
    net = trained(padding)
    model = bare_state(tmp_path, net)
    write(tmp_path, NET + f"InstantiatedModel = Net({padding})\n")
    path = make_spec(model=model, output=output, output_patch_size=[6, 14, 14], patch_overlap=[0, 2, 2])
    given = check_contract(load(path), path, patches())
    whole = trained(1)
    whole.load_state_dict(net.state_dict())
    expected = whole(torch.from_numpy(patches())).detach().numpy()[:, :, 1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def test_another_process_gives_the_same_bits(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], python: Command
) -> None:
    """PyTorch also draws the random parameters of a network without a checkpoint alike."""
    write(tmp_path, NET + "InstantiatedModel = Net()\n")
    path = make_spec(model=pytorch(weights=..., threads=2), output=output)
    program = """
import sys, numpy as np
from chunkflow_core.engines import load_engine
from chunkflow_core.spec import load_spec
batch = np.random.default_rng(3).random((3, 1, 8, 16, 16), np.float32)
np.save(sys.argv[2], load_engine(load_spec(sys.argv[1]))(batch))
"""
    outcome = python("-c", program, path, tmp_path / "there.npy")
    assert outcome.returncode == 0, outcome.stderr
    torch.rand(7)  # this process has drawn other random numbers before
    np.testing.assert_array_equal(load(path)(patches()), np.load(tmp_path / "there.npy"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_used_and_near(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], precision: str
) -> None:
    net = trained()
    path = make_spec(model=bare_state(tmp_path, net) | {"activation": "sigmoid"}, output=output)
    exact, low = load(path)(patches()), load(path, f"model.precision={precision}")(patches())
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, exact, atol=2e-2)
    assert not np.array_equal(low, exact), "it was computed in float32"


# --------------------------------------------------------------------------------- batch statistics


def test_batch_statistics_normalises_by_the_patch_and_keeps_what_is_stored(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]
) -> None:
    net = trained()
    path = make_spec(model=bare_state(tmp_path, net) | {"batch_size": 1, "batch_statistics": True}, output=output)
    engine = load(path)
    given = engine(patches(1))
    reference = trained()
    reference.norm.train()
    np.testing.assert_allclose(given, reference(torch.from_numpy(patches(1))).detach().numpy(), rtol=1e-4, atol=1e-4)
    # what is stored must not drift: the same patch has the same bits after others
    engine(patches(1) * 7 - 3)
    np.testing.assert_array_equal(engine(patches(1)), given)
    network: Any = engine._network  # type: ignore[attr-defined]
    stored = network.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(stored[name], value), name
    assert not network.dropout.training


def test_batch_statistics_of_instance_norm(make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]) -> None:
    write(
        tmp_path,
        """
        import torch
        norm = torch.nn.InstanceNorm3d(1, track_running_stats=True)
        norm.running_mean.fill_(100)
        InstantiatedModel = torch.nn.Sequential(norm, torch.nn.Conv3d(1, 2, 1))
        """,
    )
    path = make_spec(model=pytorch(weights=..., batch_size=1), output=output)
    assert abs(load(path)(patches(1))).max() > 10
    assert abs(load(path, "model.batch_statistics=true")(patches(1))).max() < 10


@pytest.mark.parametrize("form", [patch_inferencer, torchscript, exported])
def test_batch_statistics_where_the_mode_can_not_be_set(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], form: Callable[[Path, Net], dict[str, Any]]
) -> None:
    """If the key was silently ignored, numbers would be others than those asked for."""
    path = make_spec(model=form(tmp_path, trained()) | {"batch_size": 1, "batch_statistics": True}, output=output)
    with pytest.raises(SpecError, match=r"model\.batch_statistics: only for"):
        load(path)


# ------------------------------------------------------------------------------- two in one process


def test_two_models_do_not_get_each_others_siblings(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]
) -> None:
    engines = []
    for value in (1, 2):
        folder = f"number{value}"
        write(tmp_path / folder, f"VALUE = {value}\n", "constants.py")
        write(tmp_path / folder, f"VALUE = {value * 10}\n", "package/inner.py")
        write(
            tmp_path / folder,
            """
            import constants
            from package import inner

            def InstantiatedModel(x):
                return (x * 0 + constants.VALUE + inner.VALUE).expand(-1, 2, -1, -1, -1)
            """,
        )
        path = make_spec(model=pytorch(weights=..., path=f"{folder}/model.py"), output=output)
        engines.append(load(path))
    assert [engine(patches()).max() for engine in engines] == [11, 22]


ADDING = """
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "pytorch-unet")]
import constants
from package import inner
from space import inner as other
from unet import layers

VALUE = 1

def InstantiatedModel(x):
    return (x * 0 + VALUE + constants.VALUE + inner.VALUE + other.VALUE + layers.VALUE).expand(-1, 2, -1, -1, -1)
"""
PARTS = ("constants.py", "package/__init__.py", "package/inner.py", "space/inner.py", "pytorch-unet/unet/layers.py")


@pytest.mark.parametrize("edited", ["model.py", *(part for part in PARTS if "init" not in part)])
@pytest.mark.parametrize("place", ["folder", "link"])
def test_what_runs_is_what_the_files_hold(
    make_spec: MakeSpec,
    tmp_path: Path,
    output: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    edited: str,
    place: str,
) -> None:
    """What Python has compiled before is not run, when a file has the same size and date as now."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = tmp_path / "folder"
    for name in PARTS:
        write(folder, "VALUE = 1\n", name)
    write(folder, ADDING)
    (tmp_path / "link").symlink_to(folder)
    path = make_spec(model=pytorch(weights=..., path=f"{place}/model.py"), output=output)
    assert load(path)(patches()).max() == 5

    file = folder / edited
    date = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("VALUE = 1", "VALUE = 5"))
    os.utime(file, ns=(date, date))

    assert load(path)(patches()).max() == 9
    assert not list(tmp_path.rglob("__pycache__")), "nothing is left in a user's folder"


def test_what_is_there_in_compiled_form_only_can_be_imported(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]
) -> None:
    write(tmp_path, "VALUE = 3\n", "hidden.py")
    py_compile.compile(str(tmp_path / "hidden.py"), cfile=str(tmp_path / "hidden.pyc"))
    (tmp_path / "hidden.py").unlink()
    write(
        tmp_path, "import hidden\ndef InstantiatedModel(x): return (x * 0 + hidden.VALUE).expand(-1, 2, -1, -1, -1)\n"
    )
    assert load(make_spec(model=pytorch(weights=...), output=output))(patches()).max() == 3


def test_a_model_leaves_functions_of_no_file_their_source(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]
) -> None:
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    write(tmp_path, "def InstantiatedModel(x): return x.expand(-1, 2, -1, -1, -1)\n")
    load(make_spec(model=pytorch(weights=...), output=output))
    assert "relu" in inspect.getsource(graph.forward)


def test_a_sibling_missing_in_one_folder_is_not_taken_from_another_model(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]
) -> None:
    for folder in ("complete", "incomplete"):
        write(tmp_path / folder, "import only_here\ndef InstantiatedModel(x): return x\n")
    write(tmp_path / "complete", "", "only_here.py")
    load(make_spec(model=pytorch(weights=..., path="complete/model.py"), output=output))
    with pytest.raises(SpecError, match="No module named 'only_here'"):
        load(make_spec(model=pytorch(weights=..., path="incomplete/model.py"), output=output))


# -------------------------------------------------------------------- outputs that are not declared


def model_of(body: str) -> str:
    """A model file whose network is one expression of the batch ``x``."""
    return f"import torch, numpy\ndef InstantiatedModel(x):\n    return {body}\n"


@pytest.mark.parametrize(
    ("body", "pieces"),
    [
        ("x", ["(1, 1, 8, 16, 16)", "(1, 2, 8, 16, 16)", "output.channels"]),
        ("torch.cat([x, x, x], 1)", ["(1, 3, 8, 16, 16)", "(1, 2, 8, 16, 16)"]),
        ("torch.cat([x, x], 1)[:, :, :6]", ["(1, 2, 6, 16, 16)", "(1, 2, 8, 16, 16)", "output_patch_size"]),
        ("torch.cat([x, x], 1)[:0]", ["(0, 2, 8, 16, 16)", "(1, 2, 8, 16, 16)"]),
        ("x[:, 0]", ["(1, 8, 16, 16)", "(1, 2, 8, 16, 16)"]),
        ("torch.cat([x, x], 1).mean()", ["()", "(1, 2, 8, 16, 16)"]),
        ("None", ["NoneType", "expected a tensor"]),
        ("'probabilities'", ["expected a tensor"]),
        ("[]", ["a list of 0 outputs"]),
        ("[None, x]", ["NoneType"]),
        ("{'a': x, 'b': x}", ["['a', 'b']", "0 have 2 channels", "model.output"]),
        ("{'a': torch.cat([x, x], 1), 'b': torch.cat([x, x], 1)}", ["2 have 2 channels", "model.output"]),
        ("x @ x[:, :, :3]", ["the model failed", "(1, 1, 8, 16, 16)", "RuntimeError", "model.py, line 3"]),
        ("torch.nn.functional.conv3d(x, torch.ones(2, 4, 1, 1, 1))", ["the model failed", "4 channels"]),
        ("undefined(x)", ["the model failed", "NameError", "undefined", "model.py, line 3"]),
    ],
)
def test_output_that_was_not_declared(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], body: str, pieces: list[str]
) -> None:
    write(tmp_path, model_of(body))
    engine = load(make_spec(model=pytorch(weights=...), output=output))
    with pytest.raises(DataError) as caught:
        engine(patches(1))
    assert len(str(caught.value).splitlines()) == 1
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("body", "wanted", "piece"),
    [
        ("[x, x]", "2", "2, but the model gives a list of 2 outputs"),
        ("[x, x]", "first", "first, but the model gives a list of 2 outputs"),
        ("{'a': x}", "b", "b is not among the model's outputs ['a']"),
        ("torch.cat([x, x], 1)", "1", "1, but the model gives a single output"),
    ],
)
def test_output_that_the_model_does_not_give(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], body: str, wanted: str, piece: str
) -> None:
    write(tmp_path, model_of(body))
    engine = load(make_spec(model=pytorch(weights=...), output=output), f"model.output={wanted}")
    with pytest.raises(DataError) as caught:
        engine(patches(1))
    assert piece in str(caught.value)


def test_exported_program_of_another_batch_size(make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]) -> None:
    program = torch.export.export(trained(), (torch.zeros(BATCH, 1, *PATCH),))
    torch.export.save(program, tmp_path / "model.pt2")
    path = make_spec(model=pytorch(path="model.pt2", weights=...), output=output)
    with pytest.raises(DataError, match=r"the model failed with a batch of shape \(1, 1, 8, 16, 16\)"):
        load(path)(patches(1))


# ------------------------------------------------------------------------ models that can't be used


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def check_refused(path: Path, kind: type[ChunkflowError] | tuple[type[ChunkflowError], ...], *pieces: str) -> None:
    with pytest.raises(kind) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000
    for piece in pieces:
        assert piece in str(caught.value)


def test_checkpoint_that_runs_code_is_refused_unless_trusted(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]
) -> None:
    model = bare_state(tmp_path, trained())
    proof = tmp_path / "ran"
    torch.save({"state_dict": trained().state_dict(), "harmful": Harmful(proof)}, tmp_path / "weights.pt")
    path = make_spec(model=model, output=output)
    check_refused(path, SpecError, "model.weights", "weights.pt", "run code", "model.trust: true")
    assert not proof.exists()
    load(path, "model.trust=true")
    assert proof.exists()


def test_missing_weights_and_missing_model(make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()), output=output)
    (tmp_path / "weights.pt").unlink()
    check_refused(path, MissingInputError, f"{tmp_path}/weights.pt does not exist")
    (tmp_path / "model.py").unlink()
    check_refused(path, MissingInputError, f"{tmp_path}/model.py does not exist")


@pytest.mark.parametrize(
    ("damage", "kind", "piece"),
    [
        (lambda data: data[: len(data) // 2], MissingInputError, "truncated"),
        (lambda data: b"", MissingInputError, "truncated"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", SpecError, "damaged"),
        (lambda data: pickle.dumps([1, 2, 3], protocol=2), (SpecError, MissingInputError), "weights.pt"),
    ],
    ids=["truncated", "empty", "a git-lfs pointer", "a list"],
)
@pytest.mark.parametrize("trust", ["true", "false"])
def test_damaged_checkpoint(
    make_spec: MakeSpec,
    tmp_path: Path,
    output: dict[str, Any],
    damage: Callable[[bytes], bytes],
    kind: type[ChunkflowError] | tuple[type[ChunkflowError], ...],
    piece: str,
    trust: str,
) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()) | {"trust": trust == "true"}, output=output)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(damage(weights.read_bytes()))
    check_refused(path, kind, "model.weights", str(weights), piece)


def test_checkpoint_of_another_network(make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()), output=output)
    torch.save(torch.nn.Conv3d(1, 2, 5).state_dict(), tmp_path / "weights.pt")
    check_refused(path, SpecError, "model.weights", "does not fit the model", "conv.weight")
    torch.save({"state_dict": 5}, tmp_path / "weights.pt")
    check_refused(path, SpecError, "model.weights", "int", "expected a state_dict")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("def f(:\n", ["SyntaxError", "line 1"]),
        ("import torch\n\nraise ValueError('not today')\n", ["ValueError: not today", "model.py, line 3"]),
        ("import no_such_module\n", ["No module named 'no_such_module'"]),
        ("import sys\nsys.exit(0)\n", ["SystemExit"]),
        ("x = 1\n", ["defines none of InstantiatedModel, load_model and PatchInferencer"]),
        (NET + "InstantiatedModel = Net\n", ["Net", "expected an instance of a network"]),
        ("InstantiatedModel = 5\n", ["gives 5 as its model"]),
        ("def load_model(checkpoint): return None\n", ["gives None as its model"]),
        ("def load_model(checkpoint): return open('/nix/weights')\n", ["FileNotFoundError", "/nix/weights"]),
        ("class PatchInferencer:\n    pass\n", ["TypeError"]),
    ],
)
def test_model_file_that_can_not_be_used(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], text: str, pieces: list[str]
) -> None:
    write(tmp_path, text)
    path = make_spec(model=pytorch(weights=...), output=output)
    check_refused(path, SpecError, "model.path", f"{tmp_path}/model.py", *pieces)


@pytest.mark.parametrize("name", ["model.pt", "model.pt2"])
def test_checkpoint_given_as_the_model(make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], name: str) -> None:
    torch.save(trained().state_dict(), tmp_path / name)
    path = make_spec(model=pytorch(path=name, weights=...), output=output)
    check_refused(path, SpecError, "model.path", str(tmp_path / name))


def test_weights_beside_a_compiled_model_are_not_ignored(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]
) -> None:
    model = torchscript(tmp_path, trained()) | {"weights": "weights.pt"}
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    check_refused(make_spec(model=model, output=output), SpecError, "model.weights", "has its weights inside")


@pytest.mark.parametrize(
    "setting",
    [
        'torch.backends.fp32_precision = "tf32"',
        'torch.set_float32_matmul_precision("medium")',
        "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cudnn.benchmark = True",
        "torch.use_deterministic_algorithms(False)",
    ],
)
def test_settings_of_a_model_file_decide_no_number(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], setting: str
) -> None:
    """Published model files set these for all of PyTorch, to train faster."""
    write(tmp_path, f"{NET}\n{setting}\nInstantiatedModel = Net()\n")
    load(make_spec(model=pytorch(weights=...), output=output))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled() and import_module("torch._inductor.config").deterministic


def test_a_pre_process_for_cpus_does_on_any_device(
    make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inferencers of chunkflow return a tensor that they have moved to a GPU, or have not."""
    engine = load(make_spec(model=with_pre_and_post_process(tmp_path, trained()), output=output))
    assert isinstance(engine, PyTorch)
    monkeypatch.setattr(engine, "_device", torch.device("meta"))
    assert engine._prepared(torch.zeros(1, 1, *PATCH)).device == torch.device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(make_spec: MakeSpec, tmp_path: Path, output: dict[str, Any]) -> None:
    path = make_spec(model=bare_state(tmp_path, trained()) | {"device": "cuda"}, output=output)
    check_refused(path, SpecError, "model.device", "cuda")


# ----------------------------------------------------------------------- values that can't be right


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("torch.where(x > 0.999, torch.nan, x)", "NaN or infinity"),
        ("torch.where(x > 0.999, torch.inf, x)", "NaN or infinity"),
        ("torch.where(x > 0.999, -torch.inf, x)", "NaN or infinity"),
        ("x * 1.5", "values from 0 to 1.5"),
        ("x - 0.5", "values from -0.5 to 0.5"),
    ],
)
def test_values_outside_the_declared_range_end_the_stage_without_a_receipt(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, capsys: pytest.CaptureFixture[str], body: str, what: str
) -> None:
    write(tmp_path, model_of(body))
    path = make_spec(model=pytorch(weights=..., batch_size=2))
    make_output(load_spec(path))
    assert infer([str(path), "--block", "1", "0", "1"]) == 65
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    told = printed.splitlines()[-1]
    assert what in told
    assert "lattice position (2, 0, 2) (z 12–20 y 0–16 x 24–40)" in told
    assert "output.range [0, 1]" in told
    assert not list(tmp_path.rglob("receipts/*/*/*.json"))
    # the same from the command that is meant to find it before a GPU is paid for
    if "x -" in body or "x *" in body:
        assert chunkflow("prepare", path).returncode == 65


def test_the_range_itself_is_inside(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    write(tmp_path, model_of("(x > 0.5).float()"))
    path = make_spec(model=pytorch(weights=...))
    assert chunkflow("prepare", path).returncode == 0
    assert infer([str(path), "--block", "0", "0", "0"]) == 0
    assert list(tmp_path.rglob("receipts/infer/*/*.json"))


def test_float_layer_in_grey_values_is_found_by_prepare(
    make_spec: MakeSpec, chunkflow: Command, tmp_path: Path
) -> None:
    """Integer layers are scaled to [0, 1], float layers are taken as they are.

    Floats of 0–255 would be a common mistake.
    """
    np.save(tmp_path / "stack.npy", np.full((20, 48, 40), 200, np.float32))
    layer = f"file://{tmp_path}/float"
    assert chunkflow("ingest", tmp_path / "stack.npy", layer, "--voxel-size", 40, 4, 4).returncode == 0
    outcome = chunkflow("prepare", make_spec(input={"path": layer}))
    assert outcome.returncode == 65
    assert "200" in outcome.stderr
    assert "output.range" in outcome.stderr
