"""Checkpoints as trainers leave them: the right weights, or a refusal that says what to do."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from chunkflow_core.engines.checkpoints import load_weights
from chunkflow_core.errors import ChunkflowError, MissingInputError, SpecError
from chunkflow_core.spec import VolumeSpec, load_spec
from tests.support.models.forms import NET, Net, pytorch, trained, write
from tests.support.models.loading import MakeSpec
from tests.support.random_examples import examples

State = Mapping[str, torch.Tensor]
Load = Callable[..., Net]


@pytest.fixture
def load(make_spec: MakeSpec, tmp_path: Path) -> Load:
    """Loads a checkpoint's content into a new network, by way of a file."""
    write(tmp_path, NET + "InstantiatedModel = Net()\n")
    path = make_spec(model=pytorch())

    def run(content: Any, *overrides: str, name: str = "weights.pt", old: bool = False) -> Net:
        file = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(content, file)
        else:
            torch.save(content, file, _use_new_zipfile_serialization=not old)
        network = Net()
        load_weights(load_spec(path, overrides), network, file)
        return network

    return run


def other_weights() -> dict[str, torch.Tensor]:
    """Weights that fit as well, and are others."""
    return {key: value + 1 for key, value in trained().state_dict().items()}


def prefixed(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def is_loaded(network: torch.nn.Module, state: State) -> bool:
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], value) for key, value in state.items())


SGD = torch.optim.SGD(trained().parameters(), momentum=0.9)
ADAM = torch.optim.Adam(trained().parameters())
for _parameter in ADAM.param_groups[0]["params"]:
    _parameter.grad = torch.ones_like(_parameter)
ADAM.step()

PREFIXES = ["module.", "_orig_mod.", "model.", "net.", "network.", "_fsdp_wrapped_module.", "generator."]
KEYS = ["state_dict", "model_state_dict", "network_weights", "model", "ema", "my-own key", "a.b", "0", "", "weight"]
COMPANIONS: dict[str, Any] = {
    "epoch": 3,
    "optimizer": ADAM.state_dict(),
    "optimizer_state": SGD.state_dict(),
    "loss": torch.tensor(0.5),
    "history": [1.0, 2.0],
    "config": {"name": "net", "channels": [1, 2]},
    "discriminator": torch.nn.Conv3d(1, 2, 5).state_dict(),
    "scaler": None,
    "smaller": torch.nn.Conv3d(1, 2, 1).state_dict(),
    "rng": torch.zeros(8, dtype=torch.uint8),
}


@st.composite
def wrapped(draw: st.DrawFn, state: State) -> Any:
    """Weights as some trainer might have left them."""
    prefix = "".join(draw(st.lists(st.sampled_from(PREFIXES), max_size=3)))
    content: Any = prefixed(prefix, state)
    if prefix and draw(st.booleans()):
        content["n_averaged"] = torch.tensor(4)
    for key in draw(st.lists(st.sampled_from([*KEYS, ...]), max_size=3)):
        if key is ...:
            content = [content]
            continue
        beside = draw(st.lists(st.sampled_from(sorted(COMPANIONS)), max_size=3))
        content = {**{name: COMPANIONS[name] for name in beside}, key: content}
    return content


@given(data=st.data(), old=st.booleans())
@examples(30)
def test_weights_are_found_however_they_are_wrapped(load: Load, data: st.DataObject, old: bool) -> None:
    state = trained().state_dict()
    assert is_loaded(load(data.draw(wrapped(state)), old=old), state)


@given(data=st.data())
@examples(30)
def test_of_two_that_fit_none_is_taken_unasked(load: Load, data: st.DataObject) -> None:
    one, other = trained().state_dict(), other_weights()
    first, second = data.draw(
        st.lists(st.sampled_from(["ema", "model", "best", "x", "y"]), min_size=2, max_size=2, unique=True)
    )
    content = {first: data.draw(wrapped(one)), "step": 1, second: data.draw(wrapped(other))}
    with pytest.raises(SpecError, match="holds 2 different sets of weights that fit the model") as caught:
        load(content)
    assert f'"{first}' in str(caught.value)
    assert f'"{second}' in str(caught.value)
    assert "model.weights_key: " in str(caught.value)
    assert is_loaded(load(content, f"model.weights_key={first}"), one)
    assert is_loaded(load(content, f"model.weights_key={second}"), other)


@given(data=st.data())
@examples(30)
def test_anything_else_is_refused_in_a_sentence(load: Load, data: st.DataObject) -> None:
    """What is changed so that it no longer fits is never loaded in part."""
    state = dict(trained().state_dict())
    key = data.draw(st.sampled_from([key for key in state if key != "norm.num_batches_tracked"]))
    harm = data.draw(st.sampled_from(["missing", "shape", "stranger", "renamed"]))
    if harm == "missing":
        del state[key]
    elif harm == "renamed":
        state[f"other_{key}"] = state.pop(key)
    elif harm == "shape":
        state[key] = torch.zeros(7, *state[key].shape)
    else:
        state["head.weight"] = torch.zeros(3)
    with pytest.raises(SpecError) as caught:
        load(data.draw(wrapped(state)))
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert "model.weights" in told
    assert "does not fit the model" in told
    assert "load_model(weights)" in told
    assert (key if harm != "stranger" else "head.weight") in told
    if harm == "shape":
        assert str(tuple(state[key].shape)) in told
        assert str(tuple(trained().state_dict()[key].shape)) in told


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.builds(torch.zeros, st.integers(0, 3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@given(content=JSON)
@examples(30)
def test_what_is_no_checkpoint_of_the_network_is_refused(load: Load, content: Any) -> None:
    with pytest.raises(ChunkflowError) as caught:
        load(content)
    assert "model.weights" in str(caught.value)


# ----------------------------------------------------------- members of the kind


def beside_a_loss(state: State) -> Any:
    return {"state_dict": prefixed("model.", state) | {"criterion.weight": torch.ones(2)}}


def parts_in_dicts_of_their_own(state: State) -> Any:
    return {
        "conv": {key.removeprefix("conv."): value for key, value in state.items() if key.startswith("conv.")},
        "norm": {key.removeprefix("norm."): value for key, value in state.items() if key.startswith("norm.")},
    }


def a_common_prefix_of_ones_own(state: State) -> Any:
    return prefixed("lightning.inner.", state)


def without_the_count(state: State) -> Any:
    return {key: value for key, value in state.items() if "num_batches" not in key}


def compiled_in_part(state: State) -> Any:
    return {key.replace("conv.", "conv._orig_mod."): value for key, value in state.items()}


def equal_twice(state: State) -> Any:
    return {"model": state, "ema": {key: value.clone() for key, value in state.items()}}


def nnunet(state: State) -> Any:
    """As ``nnUNetTrainer.save_checkpoint`` of nnU-Net 2 writes it, with NumPy's numbers."""
    return {
        "network_weights": state,
        "optimizer_state": SGD.state_dict(),
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.5)]]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {"plans": {"configurations": {}}, "configuration": "3d_fullres", "fold": 0, "dataset_json": {}},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def pytorch_connectomics(state: State) -> Any:
    """As its ``Trainer.save_checkpoint`` writes it, of a network in DataParallel."""
    return {
        "iteration": 100,
        "state_dict": prefixed("module.", state),
        "optimizer": ADAM.state_dict(),
        "lr_scheduler": {"last_epoch": 100, "_last_lr": [0.01]},
    }


def pytorch_3dunet(state: State) -> Any:
    """As its ``UNetTrainer._save_checkpoint`` writes it."""
    return {
        "num_epochs": 3,
        "num_iterations": 9,
        "model_state_dict": state,
        "best_eval_score": np.float64(0.25),
        "optimizer_state_dict": ADAM.state_dict(),
    }


def lightning(state: State) -> Any:
    """As PyTorch Lightning writes a module that has the network as ``model``, compiled."""
    return {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed("model._orig_mod.", state) | {"loss.pos_weight": torch.ones(1)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [ADAM.state_dict()],
        "hyper_parameters": {"lr": np.float32(0.1), "history": np.zeros(3)},
    }


def in_half_precision(state: State) -> Any:
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def several_stages(state: State) -> Any:
    return {"stages": [{"weights": torch.nn.Conv3d(2, 2, 3).state_dict()}, {"weights": state}]}


FORMS = [
    beside_a_loss,
    parts_in_dicts_of_their_own,
    a_common_prefix_of_ones_own,
    without_the_count,
    compiled_in_part,
    equal_twice,
    several_stages,
    nnunet,
    pytorch_connectomics,
    pytorch_3dunet,
    lightning,
]


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_trainers_write(load: Load, form: Callable[[State], Any]) -> None:
    state = dict(trained().state_dict())
    if form is without_the_count:
        state["norm.num_batches_tracked"] = torch.tensor(0)
    assert is_loaded(load(form(state)), state)


def test_half_precision_is_widened(load: Load) -> None:
    state = in_half_precision(trained().state_dict())
    assert is_loaded(load(state), {k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def test_averaged_model_of_pytorch(load: Load) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(trained())
    assert is_loaded(load(averaged.state_dict()), trained().state_dict())


@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors(load: Load, prefix: str) -> None:
    state = trained().state_dict()
    assert is_loaded(load(prefixed(prefix, state), name="weights.safetensors"), state)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", b"no such thing as that"])
def test_damaged_safetensors(load: Load, tmp_path: Path, content: bytes, make_spec: MakeSpec) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    spec = load_spec(make_spec(model=pytorch(weights="weights.safetensors")))
    with pytest.raises(MissingInputError, match=r"weights\.safetensors can't be read"):
        load_weights(spec, Net(), tmp_path / "weights.safetensors")


def test_a_part_of_a_larger_network_has_to_be_asked_for(load: Load) -> None:
    state = trained().state_dict()
    content = prefixed("encoder.", state) | {"head.weight": torch.ones(2)}
    with pytest.raises(SpecError, match=r'has head\.weight, .* model\.weights_key: "encoder"'):
        load(content)
    assert is_loaded(load(content, "model.weights_key=encoder"), state)


def test_bare_weights_beside_averaged_ones(load: Load) -> None:
    state, other = trained().state_dict(), other_weights()
    content = dict(state) | prefixed("ema.", other)
    with pytest.raises(SpecError, match=r'2 different sets .*: "", "ema"'):
        load(content)
    assert is_loaded(load(content, 'model.weights_key=""'), state)
    assert is_loaded(load(content, "model.weights_key=ema"), other)


def test_a_flat_key_and_a_nested_one_of_the_same_name(load: Load) -> None:
    state = dict(trained().state_dict())
    with pytest.raises(SpecError, match=r"holds two tensors a\.conv\.weight"):
        load({"a": state, "a.conv.weight": state["conv.weight"] + 1})


def test_a_key_that_leads_nowhere(load: Load) -> None:
    content = {"state_dict": trained().state_dict()}
    with pytest.raises(SpecError, match=r'model\.weights_key: .* has no weights "ema" .* expected "state_dict"'):
        load(content, "model.weights_key=ema")


def test_what_was_found_is_said_in_a_line(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load({"epoch": 1, "state_dict": prefixed("module.", trained().state_dict())})
    (line,) = [r.getMessage() for r in caplog.records if r.name.endswith("checkpoints")]
    assert "weights.pt: 7 tensors, state_dict.module. removed" in line


# ---------------------------------------------------------------- other networks


def into(spec: VolumeSpec, network: torch.nn.Module, content: Any, folder: Path) -> torch.nn.Module:
    torch.save(content, folder / "weights.pt")
    load_weights(spec, network, folder / "weights.pt")
    return network


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> VolumeSpec:
    write(tmp_path, NET)
    return load_spec(make_spec(model=pytorch()))


@pytest.mark.parametrize("saved", [lambda net: net, torch.nn.DataParallel, torch.nn.Sequential])
@pytest.mark.parametrize("own", [torch.nn.DataParallel, lambda net: torch.nn.ModuleDict({"model": net})])
def test_networks_that_are_wrapped_themselves(
    spec: VolumeSpec, tmp_path: Path, own: Callable[[Net], torch.nn.Module], saved: Callable[[Net], torch.nn.Module]
) -> None:
    network = own(Net())
    into(spec, network, saved(trained()).state_dict(), tmp_path)
    assert is_loaded(network, own(trained()).state_dict())


class Tied(torch.nn.Module):
    """A network with one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Conv3d(1, 1, 3), torch.nn.Conv3d(1, 1, 3)
        self.two.weight = self.one.weight


def test_a_tensor_that_the_network_has_twice(spec: VolumeSpec, tmp_path: Path) -> None:
    """Safetensors keeps it once."""
    torch.manual_seed(3)
    state = Tied().state_dict()
    network = into(spec, Tied(), {"w": {k: v for k, v in state.items() if k != "two.weight"}}, tmp_path)
    assert is_loaded(network, state)


class Renaming(Net):
    """A network that knows the names that its layers had before."""

    def _load_from_state_dict(self, state: Any, prefix: str, *arguments: Any) -> None:
        for key in list(state):
            state[key.replace("first.", "conv.").replace("second.", "norm.")] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *arguments)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"x": prefixed("module.", s)}])
def test_a_network_that_renames_keys(spec: VolumeSpec, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    state = trained().state_dict()
    old = {k.replace("conv.", "first.").replace("norm.", "second."): v for k, v in state.items()}
    assert is_loaded(into(spec, Renaming(), wrap(old), tmp_path), state)


def test_a_torchscript_network_given_as_weights(spec: VolumeSpec, tmp_path: Path) -> None:
    torch.jit.script(trained()).save(tmp_path / "weights.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(SpecError, match=r"is a TorchScript network .* give it as model\.path"):
        load_weights(spec, Net(), tmp_path / "weights.pt")


# ------------------------------------------------------------- classes of trainers


class Loader(dict[str, int]):
    """What a trainer pickles along."""

    def __reduce__(self) -> Any:
        return Loader, (), {"batch": 1}, iter(()), iter({"workers": 2}.items())


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that is there when a checkpoint is saved."""
    module = ModuleType("trainer_of_a_lab")
    monkeypatch.setitem(sys.modules, "trainer_of_a_lab", module)
    monkeypatch.setattr(Loader, "__module__", "trainer_of_a_lab")
    module.Loader = Loader  # type: ignore[attr-defined]
    return module


def test_objects_whose_class_is_not_installed(
    load: Load, trainer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: VolumeSpec
) -> None:
    state = trained().state_dict()
    for old in (False, True):
        monkeypatch.setitem(sys.modules, "trainer_of_a_lab", trainer)
        torch.save(
            {"model_state": state, "init": [Loader()]}, tmp_path / "w.pt", _use_new_zipfile_serialization=not old
        )
        monkeypatch.delitem(sys.modules, "trainer_of_a_lab")
        with pytest.raises(SpecError, match=r"object of trainer_of_a_lab\.Loader.* model\.trust: true"):
            load_weights(spec, Net(), tmp_path / "w.pt")
        trusting = spec.model_copy(update={"model": spec.model.model_copy(update={"trust": True})})
        network = Net()
        load_weights(trusting, network, tmp_path / "w.pt")
        assert is_loaded(network, state)


def test_a_whole_network_that_was_pickled(load: Load) -> None:
    with pytest.raises(SpecError, match=r"object of tests\.support\.models\.forms\.Net.* model\.trust"):
        load({"network": trained()})
    assert is_loaded(load({"network": trained()}, "model.trust=true"), trained().state_dict())


def test_arrays_in_place_of_tensors(load: Load) -> None:
    arrays = {key: value.numpy() for key, value in trained().state_dict().items() if value.ndim}
    network = load({"weights": arrays})
    assert all(torch.equal(network.state_dict()[key], torch.from_numpy(value)) for key, value in arrays.items())


# ----------------------------------------------------------------------- the spec


def test_the_key_is_in_the_fingerprint_where_it_is_set(make_spec: MakeSpec, tmp_path: Path) -> None:
    write(tmp_path, NET)
    (tmp_path / "weights.pt").write_bytes(b"")
    path = make_spec(model=pytorch())
    prints = [load_spec(path, o).fingerprint for o in ([], ["model.weights_key=null"], ["model.weights_key=ema"])]
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


@pytest.mark.parametrize("text", ["def load_model(weights): pass\n", "class PatchInferencer:\n    pass\n"])
def test_a_key_that_would_be_ignored(make_spec: MakeSpec, tmp_path: Path, text: str) -> None:
    from tests.support.models.loading import load as load_engine

    write(tmp_path, text)
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(SpecError, match=r"model\.weights_key: only for InstantiatedModel"):
        load_engine(make_spec(model=pytorch(weights_key="ema")))
    with pytest.raises(SpecError, match=r"weights_key: only with model\.weights"):
        load_spec(make_spec(model=pytorch(weights=..., weights_key="ema")))
