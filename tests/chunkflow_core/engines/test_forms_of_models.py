"""One contract for every form of model.

That is what the network gives, in evaluation mode unless batch statistics are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import SpecError
from chunkflow_core.spec import load_spec
from tests.support.models.forms import (
    FORMS,
    NET,
    Net,
    bare_state,
    exported,
    list_of_logits,
    patch_inferencer,
    patch_inferencer_with_mask,
    pytorch,
    torchscript,
    trained,
    write,
)
from tests.support.models.loading import BATCH, PATCH, MakeSpec, Section, load, patches

from .conftest import check_refused

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # models of this form are around


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
    make_spec: MakeSpec, tmp_path: Path, output: Section, form: Callable[[Path, Net], Section]
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
    make_spec: MakeSpec, tmp_path: Path, output: Section, form: Callable[[Path, Net], Section]
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
    make_spec: MakeSpec, tmp_path: Path, output: Section, form: Callable[[Path, Net], Section]
) -> None:
    net = trained()
    path = make_spec(model=form(tmp_path, net) | {"activation": "sigmoid"}, output=output)
    expected = torch.sigmoid(net(torch.from_numpy(patches()))).detach().numpy()
    np.testing.assert_allclose(load(path)(patches()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [[8, 16, 16], [4, 8, 10]], ids=["whole", "cropped"])
@pytest.mark.parametrize("channels", [1, 3])
def test_identity_repeats_its_input(make_spec: MakeSpec, output: Section, size: list[int], channels: int) -> None:
    geometry = {"output_patch_size": size, "patch_overlap": [1, 2, 2], "block_size": [21, 84, 56]}
    fitting = {"channels": channels, "chunk_size": [3, 2, 4] if size[0] == 4 else [7, 14, 14], "range": [0, 1]}
    path = make_spec(**geometry, model={"engine": "identity", "batch_size": BATCH}, output=output | fitting)
    given = check_contract(load(path), path, patches())
    low = [(p - s) // 2 for p, s in zip(PATCH, size, strict=True)]
    z, y, x = (slice(a, a + s) for a, s in zip(low, size, strict=True))
    for channel in range(channels):
        np.testing.assert_array_equal(given[:, channel], patches()[:, 0, z, y, x])


@pytest.mark.parametrize("padding", [1, 0], ids=["model gives the whole patch", "model of valid convolutions"])
def test_smaller_output_patch_is_the_centre(make_spec: MakeSpec, tmp_path: Path, output: Section, padding: int) -> None:
    net = trained(padding)
    model = bare_state(tmp_path, net)
    write(tmp_path, NET + f"InstantiatedModel = Net({padding})\n")
    path = make_spec(model=model, output=output, output_patch_size=[6, 14, 14], patch_overlap=[0, 2, 2])
    given = check_contract(load(path), path, patches())
    whole = trained(1)
    whole.load_state_dict(net.state_dict())
    expected = whole(torch.from_numpy(patches())).detach().numpy()[:, :, 1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- batch statistics


def test_batch_statistics_normalises_by_the_patch_and_keeps_what_is_stored(
    make_spec: MakeSpec, tmp_path: Path, output: Section
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


def test_batch_statistics_of_instance_norm(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
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
    make_spec: MakeSpec, tmp_path: Path, output: Section, form: Callable[[Path, Net], Section]
) -> None:
    """If the key was silently ignored, numbers would be others than those asked for."""
    path = make_spec(model=form(tmp_path, trained()) | {"batch_size": 1, "batch_statistics": True}, output=output)
    with pytest.raises(SpecError, match=r"model\.batch_statistics: only for"):
        load(path)


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


# -------------------------------------------------------------------- files beside a compiled model


def test_weights_beside_a_compiled_model_count(make_spec: MakeSpec, tmp_path: Path) -> None:
    for file in ("model.xml", "model.bin", "other-model.bin"):
        (tmp_path / file).write_text(file)
    path = make_spec(model={"engine": "openvino", "path": "model.xml"})
    assert load_spec(path).model_files == [tmp_path / "model.xml", tmp_path / "model.bin"]
    before = load_spec(path).fingerprint
    (tmp_path / "model.bin").write_text("changed")
    assert load_spec(path).fingerprint != before


def test_weights_beside_a_compiled_model_are_not_ignored(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    model = torchscript(tmp_path, trained()) | {"weights": "weights.pt"}
    torch.save(trained().state_dict(), tmp_path / "weights.pt")
    check_refused(make_spec(model=model, output=output), SpecError, "model.weights", "has its weights inside")
