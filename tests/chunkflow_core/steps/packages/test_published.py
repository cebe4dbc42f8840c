"""Published models run as they are, by the lines that ``chunkflow-core model`` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from chunkflow_core.lattice.boxes import Box
from chunkflow_core.storage.layers import NewLayer
from tests.support.models import packages
from tests.support.models.libraries import LIBRARIES, installed
from tests.support.models.loading import PATCH
from tests.support.models.packages import PACKAGES, Published
from tests.support.volume import output_of

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

Command = Callable[..., Any]
SHAPE = (2 * PATCH[0], PATCH[1], 2 * PATCH[2])

QUICK = [
    packages.monai_checkpoint,
    packages.monai_ts_with_metadata,
    packages.bioimageio_4,
    packages.bioimageio_5_flat,
    packages.connectomics_1,
]
"""Of each kind one, nnU-Net's further below; the others take their turn in the long tests."""


@pytest.fixture(autouse=True)
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    with installed(tmp_path / "site", monkeypatch, *LIBRARIES):
        yield


def voxels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A volume without zeros and the largest value, which some normalisations treat apart."""
    return np.random.default_rng(7).integers(1, 255, SHAPE, dtype=np.uint8)


def lines_of(chunkflow: Command, *arguments: object) -> dict[str, Any]:
    """The sections that the command prints."""
    outcome = chunkflow("model", *arguments)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    sections: dict[str, Any] = yaml.safe_load(outcome.stdout)
    return sections


def write_spec(folder: Path, lines: dict[str, Any], changes: dict[str, Any]) -> Path:
    """A spec of the lines, for the volume above in one block of patches that do not overlap."""
    layer = NewLayer(f"file://{folder}/em", SHAPE, dtype="uint8", resolution=(40, 8, 8), chunk=SHAPE)
    layer.write(Box((0, 0, 0), SHAPE), voxels()[None])
    spec = {key: value for key, value in lines.items() if key != "output_patch_size"} | {
        "name": "published",
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_overlap": [0, 0, 0],
        "block_size": list(SHAPE),
    }
    own = {"input": {"path": f"file://{folder}/em"}, "output": {"path": f"file://{folder}/output", "dtype": "float32"}}
    for key, section in own.items():
        spec[key] = section | lines.get(key, {}) | changes.get(key, {})
    path = folder / "volume.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def check(chunkflow: Command, folder: Path, published: Published, lines: dict[str, Any] | None = None) -> None:
    """Check what comes of a package by its lines, or by those of a spec that are given."""
    lines = lines or lines_of(chunkflow, published.place, *published.arguments)
    path = write_spec(folder, lines, published.changes)
    outcome = chunkflow("run", path)
    assert outcome.returncode == 0, outcome.stderr
    patch = (1, *PATCH[1:]) if published.flat else PATCH
    assert lines["patch_size"] == list(patch)
    low, high = (lines["output"] | published.changes.get("output", {})).get("range", [0, 1])
    step = 2.0 ** (math.ceil(math.log2(max(-low, high))) - 23)
    expected = np.rint(published.expected(voxels(), patch).astype(np.float64) / step) * step
    np.testing.assert_array_equal(output_of(path), expected.astype(np.float32))
    assert expected.std() > 0.01, "a constant would prove nothing"


@pytest.mark.parametrize("make", QUICK)
def test_runs_as_it_is(chunkflow: Command, tmp_path: Path, make: Callable[[Path], Published]) -> None:
    """The output is the network's own to the bit, but for the grid that sums are on."""
    check(chunkflow, tmp_path, make(tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("make", [make for make in PACKAGES if make not in (*QUICK, packages.nnunet)])
def test_runs_as_it_is_in_other_forms(chunkflow: Command, tmp_path: Path, make: Callable[[Path], Published]) -> None:
    check(chunkflow, tmp_path, make(tmp_path))


def test_deepem_runs_as_it_is(chunkflow: Command, tmp_path: Path) -> None:
    model = {"engine": "pytorch", "path": "net.py", "weights": "model700000.chkpt"}
    lines = {"model": model, "output": {"channels": 3}, "patch_size": list(PATCH)}
    check(chunkflow, tmp_path, packages.deepem(tmp_path), lines)


# ------------------------------------------------------------------------------- what the lines say


def test_mirroring_and_regions_of_nnunet(chunkflow: Command, tmp_path: Path) -> None:
    labels = {"background": 0, "cell": [1, 2], "nucleus": 2, "ignore": 3}
    inside = {"inference_allowed_mirroring_axes": (0, 1, 2)}
    place = packages.results(tmp_path, packages.PLAN, folds=["0", "10", "2", "all"], labels=labels, **inside)
    lines = lines_of(chunkflow, place)
    assert lines["model"]["augmentation"] == "flips"
    assert (lines["model"]["activation"], lines["output"]) == ("sigmoid", {"channels": 2})
    folds = [Path(name).parent.name for name in lines["model"]["weights"]]
    assert folds == ["fold_0", "fold_2", "fold_10"]


def test_halo_of_a_package(chunkflow: Command, tmp_path: Path) -> None:
    """What the package says has to be cropped is no output."""
    lines = lines_of(chunkflow, packages.bioimageio_5(tmp_path).place)
    assert lines["output_patch_size"] == [4, 12, 12]
    assert lines["input"] == {"values": {"percentiles": [0, 100], "count_zeros": True}}


def test_references_of_a_bundle(chunkflow: Command, tmp_path: Path) -> None:
    """Transforms and the inferer may be elsewhere in the configuration."""
    config = packages.inference()
    config |= {"size": [16, 32, 32], "window": 0.25, "steps": config["preprocessing"]["transforms"]}
    config["preprocessing"] = {"_target_": "Compose", "transforms": "@steps"}
    config["inferer"] |= {"roi_size": "@size", "overlap": "@window"}
    lines = lines_of(chunkflow, packages.bundle(tmp_path, packages.small(), config, scripted=True))
    assert lines["input"]["values"] == {"mean": 32.0, "std": 128.0, "clip": [0.0, 1.0]}
    assert (lines["patch_size"], lines["patch_overlap"]) == ([16, 32, 32], [4, 8, 8])


def test_a_bundle_that_says_nothing_of_numbers(chunkflow: Command, tmp_path: Path) -> None:
    """Nothing is made up."""
    config = packages.inference()
    del config["preprocessing"]
    place = packages.bundle(tmp_path, packages.small(), config, scripted=True)
    assert "input" not in lines_of(chunkflow, place)
    assert "set input.values" in chunkflow("model", place).stdout


def test_weights_of_a_package_can_be_chosen(chunkflow: Command, tmp_path: Path) -> None:
    published = packages.bioimageio_4_torchscript(tmp_path)
    assert lines_of(chunkflow, published.place)["model"]["path"].endswith("weights-torchscript.pt")
    other = lines_of(chunkflow, published.place, "--weights", "pytorch_state_dict")["model"]
    assert (other["network"], other["weights"]) == ("Small", f"{published.place}/weights.pt")
    assert Path(other["path"]) == published.place / "small.py"
    outcome = chunkflow("model", published.place, "--weights", "keras_hdf5")
    assert (outcome.returncode, "--weights torchscript or pytorch_state_dict" in outcome.stderr) == (78, True)


# ------------------------------------------------------------------------------------- test tensors


@pytest.mark.parametrize(
    "make",
    [
        packages.bioimageio_5,
        pytest.param(packages.bioimageio_4_torchscript, marks=pytest.mark.long),
        pytest.param(packages.bioimageio_4_onnx, marks=pytest.mark.long),
        pytest.param(packages.bioimageio_5_flat, marks=pytest.mark.long),
    ],
)
def test_test_tensors_come_out_as_the_package_says(
    chunkflow: Command, tmp_path: Path, make: Callable[[Path], Published]
) -> None:
    outcome = chunkflow("model", make(tmp_path).place, "--test")
    assert outcome.returncode == 0, outcome.stderr
    assert "\n# test tensors: largest difference " in outcome.stdout
    assert "; 0 in a million" in outcome.stdout


def test_test_tensors_that_do_not_come_out(chunkflow: Command, tmp_path: Path) -> None:
    """Wrong by more than the package allows is an error; by as much as it allows, none."""
    place = packages.bioimageio_5(tmp_path).place
    expected = np.load(place / "test_output.npy")
    expected[0, 1, 3, 4, 5:8] += 0.01
    np.save(place / "test_output.npy", expected)
    outcome = chunkflow("model", place, "--test")
    assert outcome.returncode == 65
    assert "differ by more than 0.001 + 0.001 of the number, the package allows 100" in outcome.stderr
    rdf = yaml.safe_load((place / "rdf.yaml").read_text())
    rdf["config"] = {
        "bioimageio": {"reproducibility_tolerance": [{"absolute_tolerance": 0.02, "output_ids": ["cells"]}]}
    }
    (place / "rdf.yaml").write_text(yaml.safe_dump(rdf))
    assert chunkflow("model", place, "--test").returncode == 0


def test_a_package_without_test_tensors(chunkflow: Command, tmp_path: Path) -> None:
    outcome = chunkflow("model", packages.monai_torchscript(tmp_path).place, "--test")
    assert outcome.returncode == 64
    assert "--test: there are no test tensors" in outcome.stderr


# -------------------------------------------------------------------------------------- folds


def test_nnunet_runs_as_it_is(chunkflow: Command, tmp_path: Path) -> None:
    """The mean of the folds comes before the softmax; that of probabilities would be another."""
    published = packages.nnunet(tmp_path)
    check(chunkflow, tmp_path, published)
    of_each = [Published(published.place, [net], published.numbers, published.finish) for net in published.networks]
    mean = np.mean([one.expected(voxels(), PATCH) for one in of_each], axis=0)
    assert abs(mean - published.expected(voxels(), PATCH)).max() > 1e-4


def test_a_fold_that_is_trained_again_makes_another_volume(chunkflow: Command, tmp_path: Path) -> None:
    published = packages.nnunet(tmp_path)
    path = write_spec(tmp_path, lines_of(chunkflow, published.place), {})
    assert chunkflow("run", path).returncode == 0
    file = published.place / "fold_1" / "checkpoint_final.pth"
    torch.save({"network_weights": packages.unet(77).state_dict()}, file)
    outcome = chunkflow("run", path)
    assert outcome.returncode == 78
    assert "fold_1" in outcome.stderr
