"""Published models in the layouts that they come in, with small random weights.

A kind of package is a function that writes its files into a folder, as those who publish it do,
and gives what must come of it. Layouts are those of nnU-Net v2, of MONAI's bundle specification, of
bioimage.io's model descriptions 0.4 and 0.5, and of PyTorch Connectomics.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from tests.support.models.loading import PATCH
from tests.support.models.two_convolutions import onnx_file

Numbers = NDArray[np.float32]
Section = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A package on disk, and what it does."""

    place: Path
    """What ``chunkflow-core model`` is given."""
    networks: Sequence[torch.nn.Module]
    """Networks whose outputs are averaged."""
    numbers: Callable[[NDArray[np.uint8]], Numbers]
    """What the networks get for the voxels of the whole volume."""
    finish: Callable[[torch.Tensor], torch.Tensor]
    """What is done to the mean."""
    changes: Section = field(default_factory=dict)
    """Keys that a user adds to the lines: the range of logits, for instance."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the command."""
    flat: bool = False

    def expected(self, volume: NDArray[np.uint8], patch: tuple[int, int, int]) -> Numbers:
        """What has to come of a volume whose patches do not overlap, computed apart."""
        numbers = self.numbers(volume)
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            corners = np.ndindex(*(n // p for n, p in zip(volume.shape, patch, strict=True)))
            done = {corner: self._run(numbers[_slices(corner, patch)]) for corner in corners}
        finally:
            torch.set_num_threads(count)
        output = np.empty((len(next(iter(done.values()))), *volume.shape), np.float32)
        for corner, result in done.items():
            output[:, *_slices(corner, patch)] = result
        return output

    def _run(self, numbers: Numbers) -> Numbers:
        given = torch.from_numpy(np.ascontiguousarray(numbers))[None, None]
        given = given[:, :, 0] if self.flat else given
        with torch.inference_mode():
            outputs = [network.eval()(given) for network in self.networks]
            total = outputs[0]
            for other in outputs[1:]:
                total = total + other
            result = self.finish(total / len(outputs) if len(outputs) > 1 else total)[0]
        array: Numbers = (result[:, None] if self.flat else result).numpy()
        return array


def _slices(corner: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[slice, ...]:
    return tuple(slice(c * p, (c + 1) * p) for c, p in zip(corner, patch, strict=True))


def softmax(output: torch.Tensor) -> torch.Tensor:
    return torch.softmax(output, dim=1)


def same(output: torch.Tensor) -> torch.Tensor:
    return output


def normalised(mean: float, std: float) -> Callable[[NDArray[np.uint8]], Numbers]:
    return lambda volume: (volume.astype(np.float32) - np.float32(mean)) / np.float32(std)


def by_its_own(volume: NDArray[np.uint8]) -> Numbers:
    """By mean and deviation of all voxels."""
    values = volume.astype(np.float64)
    return normalised(float(values.mean()), float(values.std()))(volume)


def seeded(make: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """A network with random weights, and statistics that are far from those of a patch."""
    torch.manual_seed(seed)
    network = make()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            torch.nn.init.normal_(module.running_mean)
    return network


# ------------------------------------------------------------------------------------------ nnU-Net

PLAN: Section = {
    "patch_size": list(PATCH),
    "spacing": [40, 8, 8],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [2, 3, 4],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [1, 2, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    },
}
"""A configuration of ``plans.json``."""

INTENSITIES = {"mean": 120.0, "std": 40.0, "percentile_00_5": 60.0, "percentile_99_5": 200.0, "min": 0, "max": 255}


def results(
    folder: Path, plan: Section, *, folds: Sequence[str] = ("0", "1", "2"), labels: Section | None = None, **inside: Any
) -> Path:
    """A folder of results of nnU-Net v2, with a checkpoint in each fold."""
    place = folder / "Dataset001_EM" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    plans = {
        "dataset_name": "Dataset001_EM",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "configurations": {"2d": {"patch_size": [64, 64]}, "3d_base": plan, "3d_fullres": {"inherits_from": "3d_base"}},
        "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
    }
    dataset = {"channel_names": {"0": "EM"}, "labels": labels or {"background": 0, "cell": 1, "ignore": 2}}
    place.mkdir(parents=True)
    for fold in folds:
        path = place / f"fold_{fold}" / "checkpoint_final.pth"
        path.parent.mkdir()
        checkpoint = {
            "network_weights": unet(int(fold) if fold.isdigit() else 9, supervised=True).state_dict(),
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "params": [0]}]},
            "logging": {"mean_fg_dice": [np.float64(0.5)], "epoch_end_timestamps": [1.0]},
            "_best_ema": np.float64(0.7),
            "current_epoch": 1000,
            "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (),
        }
        torch.save(checkpoint | inside, path)
    (place / "plans.json").write_text(json.dumps(plans))
    (place / "dataset.json").write_text(json.dumps(dataset))
    return place


def unet(seed: int, classes: int = 2, *, supervised: bool = False) -> torch.nn.Module:
    module = import_module("dynamic_network_architectures.architectures.unet")
    arguments = PLAN["architecture"]["arch_kwargs"] | {
        "conv_op": torch.nn.Conv3d,
        "norm_op": torch.nn.InstanceNorm3d,
        "nonlin": torch.nn.LeakyReLU,
    }
    return seeded(
        lambda: module.PlainConvUNet(input_channels=1, num_classes=classes, deep_supervision=supervised, **arguments),
        seed,
    )


def deepem(folder: Path) -> Published:
    """As DeepEM and chunkflow have it: a Python file, and a ``.chkpt`` of its trainer's wrapper.

    It is no package: ``model.path`` and ``model.weights`` are these files, as they are.
    """
    network = small(out_channels=3)
    (folder / "net.py").write_text(
        SMALL
        + """
class InstantiatedModel(Small):
    def forward(self, x):
        return {"affinity": super().forward(x), "embedding": x}


InstantiatedModel = InstantiatedModel(1, 3)


def pre_process(patch):
    return torch.from_numpy(patch * 2 - 1)


def post_process(output):
    return torch.sigmoid(output["affinity"])
"""
    )
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"iter": 700000, "state_dict": state, "optimizer": {"state": {}}}, folder / "model700000.chkpt")

    def numbers(volume: NDArray[np.uint8]) -> Numbers:
        return normalised(0, 255)(volume) * np.float32(2) - np.float32(1)

    return Published(folder / "net.py", [network], numbers, torch.sigmoid)


def nnunet(folder: Path) -> Published:
    return Published(results(folder, PLAN), [unet(fold) for fold in range(3)], by_its_own, softmax)


def nnunet_of_all_data(folder: Path) -> Published:
    """Only ``fold_all``, with clipped intensities."""
    place = results(folder, PLAN | {"normalization_schemes": ["CTNormalization"]}, folds=["all"])

    def clipped(volume: NDArray[np.uint8]) -> Numbers:
        return normalised(120, 40)(volume).clip(np.float32(-1.5), np.float32(2.0))

    return Published(place, [unet(9)], clipped, softmax)


def nnunet_of_old_plans(folder: Path) -> Published:
    """Plans from before nnU-Net 2.3, which name no arguments."""
    kwargs = PLAN["architecture"]["arch_kwargs"]
    plan = {key: PLAN[key] for key in ("patch_size", "spacing", "use_mask_for_norm")} | {
        "normalization_schemes": ["NoNormalization"],
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 2,
        "unet_max_num_features": 4,
        "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }
    place = results(folder, plan, folds=[])

    def old() -> torch.nn.Module:
        module = import_module("dynamic_network_architectures.architectures.unet")
        ops = {"conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU}
        network: torch.nn.Module = module.PlainConvUNet(
            input_channels=1, num_classes=2, **(kwargs | ops | {"features_per_stage": [2, 4, 4]})
        )
        return network

    network = seeded(old, 5)
    path = place / "fold_0" / "checkpoint_final.pth"
    path.parent.mkdir()
    torch.save({"network_weights": network.state_dict(), "init_args": {"configuration": "3d_fullres"}}, path)
    return Published(place, [network], normalised(0, 1), softmax)


# -------------------------------------------------------------------------------------------- MONAI

METADATA: Section = {
    "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json",
    "version": "0.2.0",
    "monai_version": "1.3.0",
    "network_data_format": {
        "inputs": {
            "image": {
                "type": "image",
                "num_channels": 1,
                "spatial_shape": list(PATCH),
                "dtype": "float32",
                "value_range": [0, 1],
                "is_patch_data": True,
            }
        },
        "outputs": {
            "pred": {
                "type": "image",
                "num_channels": 2,
                "spatial_shape": list(PATCH),
                "value_range": [0, 1],
                "is_patch_data": True,
                "channel_def": {"0": "background", "1": "cell"},
            }
        },
    },
}


def inference(**changes: Any) -> Section:
    """``configs/inference.json`` of a bundle, with references and expressions in it."""
    content: Section = {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "widths": [4, 8],
        "network_def": {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 2,
            "channels": "@widths",
            "strides": "$[2]",
            "num_res_units": 2,
            "norm": "batch",
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": [40, 8, 8]},
                {
                    "_target_": "ScaleIntensityRanged",
                    "keys": "image",
                    "a_min": 32,
                    "a_max": 160,
                    "b_min": 0,
                    "b_max": 1,
                    "clip": True,
                },
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": list(PATCH), "sw_batch_size": 4, "overlap": 0.5},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            ],
        },
    }
    return content | changes


def bundle(folder: Path, network: torch.nn.Module, config: Section, *, scripted: bool) -> Path:
    """A folder with ``configs`` and ``models``."""
    place = folder / "em_segmentation"
    for name in ("configs", "models", "docs"):
        (place / name).mkdir(parents=True)
    (place / "configs" / "metadata.json").write_text(json.dumps(METADATA))
    (place / "configs" / "inference.json").write_text(json.dumps(config))
    if scripted:
        torch.jit.script(network.eval()).save(place / "models" / "model.ts")  # type: ignore[no-untyped-call]
    torch.save(network.state_dict(), place / "models" / "model.pt")
    return place


def monai_unet() -> torch.nn.Module:
    module = import_module("monai.networks.nets")
    return seeded(lambda: module.UNet(3, 1, 2, [4, 8], [2], num_res_units=2, norm="batch"), 4)


def window(volume: NDArray[np.uint8]) -> Numbers:
    return normalised(32, 128)(volume).clip(np.float32(0), np.float32(1))


def monai_checkpoint(folder: Path) -> Published:
    """``models/model.pt``, whose network is in the configuration."""
    network = monai_unet()
    return Published(bundle(folder, network, inference(), scripted=False), [network], window, softmax)


def monai_own_network(folder: Path) -> Published:
    """A network in the bundle's own ``scripts``."""
    place = folder / "em_segmentation" / "scripts"
    place.mkdir(parents=True)
    place.joinpath("net.py").write_text(SMALL)
    network = small()
    definition = {"_target_": "scripts.net.Small", "in_channels": 1, "out_channels": 2}
    return Published(
        bundle(folder, network, inference(network_def=definition), scripted=False), [network], window, softmax
    )


def monai_torchscript(folder: Path) -> Published:
    """``models/model.ts`` beside ``model.pt``: it needs no library."""
    network = small()
    return Published(bundle(folder, network, inference(), scripted=True), [network], window, softmax)


def monai_ts_with_metadata(folder: Path) -> Published:
    """One ``.ts`` file, with the texts inside that MONAI puts there, of a network for logits."""
    network, place = small(), folder / "model.ts"
    config = inference(postprocessing={"_target_": "Compose", "transforms": []})
    texts = {"metadata.json": json.dumps(METADATA), "inference.json": json.dumps(config)}
    torch.jit.script(network.eval()).save(place, _extra_files=texts)  # type: ignore[no-untyped-call]
    changes = {"output": {"range": [-8, 8]}}
    return Published(place, [network], window, same, changes)


# ------------------------------------------------------------------------------------- bioimage.io


class Small(torch.nn.Module):
    """A network of one convolution and a head, of two or three dimensions."""

    def __init__(self, in_channels: int = 1, out_channels: int = 2, dimensions: int = 3) -> None:
        super().__init__()
        kind = torch.nn.Conv3d if dimensions == 3 else torch.nn.Conv2d
        norm = torch.nn.BatchNorm3d if dimensions == 3 else torch.nn.BatchNorm2d
        self.conv = kind(in_channels, 3, 3, padding=1)
        self.norm = norm(3)
        self.head = kind(3, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(torch.nn.functional.elu(self.norm(self.conv(x))))
        return output


SMALL = f"import torch\n\n\n{inspect.getsource(Small)}"
"""The same network as a file."""


def small(**arguments: int) -> torch.nn.Module:
    return seeded(lambda: Small(**arguments), 6)


def package(folder: Path, content: Section, network: torch.nn.Module, published: Published) -> Published:
    """Write a package: its description, test tensors, and weights in several formats."""
    place = published.place
    place.mkdir(parents=True)
    patch = (1, *PATCH[1:]) if published.flat else PATCH
    voxels = np.random.default_rng(8).integers(1, 255, patch, dtype=np.uint8)
    given = voxels.astype(np.float32)[None, None]
    expected = published.expected(voxels, patch)[None]
    if published.flat:
        given, expected = given[:, :, 0], expected[:, :, 0]
    np.save(place / "test_input.npy", given)
    np.save(place / "test_output.npy", expected)
    torch.save(network.state_dict(), place / "weights.pt")
    torch.jit.script(network.eval()).save(place / "weights-torchscript.pt")  # type: ignore[no-untyped-call]
    (place / "small.py").write_text(SMALL)
    (place / "rdf.yaml").write_text(yaml.safe_dump({"type": "model", "name": "small", "license": "MIT"} | content))
    return published


def of_version_4(preprocessing: list[Section], postprocessing: list[Section], weights: Section, **more: Any) -> Section:
    """A description of the format 0.4, of a network of three dimensions."""
    shape = {"min": [1, 1, *PATCH], "step": [0, 0, 8, 16, 16]}
    output = {"reference_tensor": "raw", "scale": [1, 0, 1, 1, 1], "offset": [0, 1, 0, 0, 0]}
    common = {"axes": "bczyx", "data_type": "float32"}
    return {
        "format_version": "0.4.10",
        "inputs": [{"name": "raw", "shape": shape, "preprocessing": preprocessing} | common],
        "outputs": [{"name": "cells", "shape": output, "postprocessing": postprocessing} | common],
        "test_inputs": ["test_input.npy"],
        "test_outputs": ["test_output.npy"],
        "weights": weights,
    } | more


SIGMOID = [{"name": "sigmoid"}]
STATE_DICT = {
    "source": "weights.pt",
    "architecture": "small.py:Small",
    "kwargs": {"in_channels": 1, "out_channels": 2},
    "sha256": "0" * 64,
}


def bioimageio_4(folder: Path) -> Published:
    """Format 0.4: weights for an architecture in a file, normalised by its own mean."""
    network = small()
    steps = [{"name": "zero_mean_unit_variance", "kwargs": {"mode": "per_sample", "axes": "zyx", "eps": 1e-6}}]
    published = Published(folder / "package", [network], by_its_own, torch.sigmoid)
    return package(folder, of_version_4(steps, SIGMOID, {"pytorch_state_dict": STATE_DICT}), network, published)


def bioimageio_4_torchscript(folder: Path) -> Published:
    """Format 0.4: TorchScript beside a state_dict; scaled twice, and clipped; logits."""
    network = small()
    steps = [
        {"name": "scale_linear", "kwargs": {"gain": 0.5, "offset": -16.0, "axes": "zyx"}},
        {"name": "scale_linear", "kwargs": {"gain": 0.03125, "offset": 0.25, "axes": "zyx"}},
        {"name": "clip", "kwargs": {"min": -0.25, "max": 1.5}},
    ]

    def numbers(volume: NDArray[np.uint8]) -> Numbers:
        return normalised(16, 64)(volume).clip(np.float32(-0.25), np.float32(1.5))

    weights = {"pytorch_state_dict": STATE_DICT, "torchscript": {"source": "weights-torchscript.pt"}}
    published = Published(folder / "package", [network], numbers, same)
    return package(folder, of_version_4(steps, [], weights), network, published)


def bioimageio_4_onnx(folder: Path) -> Published:
    """Format 0.4: ONNX, whose numbers are not PyTorch's to the bit."""
    network, published = small(), Published(folder / "package", [small()], normalised(0, 1), torch.sigmoid)
    made = package(folder, of_version_4([], SIGMOID, {"onnx": {"source": "model.onnx"}}), network, published)
    onnx_file(published.place, network)
    return made


def bioimageio_4_library(folder: Path) -> Published:
    """Format 0.4: an architecture of a library, by its dotted name."""
    network = monai_unet()
    size = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
    arguments = size | {"num_res_units": 2, "norm": "batch"}
    entry = {"source": "weights.pt", "architecture": "monai.networks.nets.UNet", "kwargs": arguments}
    steps = [
        {"name": "zero_mean_unit_variance", "kwargs": {"mode": "fixed", "axes": "zyx", "mean": 128.0, "std": 32.0}}
    ]
    published = Published(folder / "package", [network], normalised(128, 32), torch.sigmoid)
    return package(folder, of_version_4(steps, SIGMOID, {"pytorch_state_dict": entry}), network, published)


def of_version_5(preprocessing: list[Section], architecture: Section, flat: bool, **config: Any) -> Section:
    """A description of the format 0.5."""
    sizes = list(zip("zyx", PATCH, strict=True))[1 if flat else 0 :]
    channel = {"type": "channel", "channel_names": ["raw"]}
    space: list[Section] = [{"type": "space", "id": axis, "size": {"min": n, "step": n}} for axis, n in sizes]
    result: list[Section] = [
        {"type": "space", "id": axis, "size": {"tensor_id": "raw", "axis_id": axis}, "halo": 2} for axis, _ in sizes
    ]
    output = {
        "id": "cells",
        "axes": [{"type": "batch"}, channel | {"channel_names": ["a", "b"]}, *result],
        "test_tensor": {"source": "test_output.npy", "sha256": "0" * 64},
        "postprocessing": [
            {"id": "softmax", "kwargs": {"axis": "channel"}},
            {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
        ],
    }
    return {
        "format_version": "0.5.4",
        "inputs": [
            {
                "id": "raw",
                "axes": [{"type": "batch"}, channel, *space],
                "test_tensor": {"source": "test_input.npy"},
                "preprocessing": [{"id": "ensure_dtype", "kwargs": {"dtype": "float32"}}, *preprocessing],
            }
        ],
        "outputs": [output],
        "weights": {
            "pytorch_state_dict": {"source": "weights.pt", "architecture": architecture, "pytorch_version": "2.6"}
        },
        "config": {"bioimageio": config},
    }


IN_A_FILE = {"source": "small.py", "callable": "Small", "kwargs": {"in_channels": 1, "out_channels": 2}}


def bioimageio_5(folder: Path) -> Published:
    """Format 0.5: an architecture in a file; percentiles; a halo."""
    network = small()
    steps = [{"id": "scale_range", "kwargs": {"axes": ["z", "y", "x"], "min_percentile": 0, "max_percentile": 100}}]

    def numbers(volume: NDArray[np.uint8]) -> Numbers:
        low, high = float(volume.min()), float(volume.max())
        return normalised(low, high - low)(volume)

    published = Published(folder / "package", [network], numbers, softmax)
    return package(folder, of_version_5(steps, IN_A_FILE, flat=False), network, published)


def bioimageio_5_flat(folder: Path) -> Published:
    """Format 0.5: a network of two dimensions."""
    network = small(dimensions=2)
    steps = [{"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": 100.0, "std": 50.0}}]
    architecture = IN_A_FILE | {"kwargs": {"in_channels": 1, "out_channels": 2, "dimensions": 2}}
    published = Published(folder / "package", [network], normalised(100, 50), softmax, flat=True)
    return package(folder, of_version_5(steps, architecture, flat=True), network, published)


def bioimageio_5_library(folder: Path) -> Published:
    """Format 0.5: a class that is imported from a library."""
    network = seeded(lambda: import_module("monai.networks.nets").BasicUNet(features=[4] * 6), 3)
    architecture = {"import_from": "monai.networks.nets", "callable": "BasicUNet", "kwargs": {"features": [4] * 6}}
    steps = [{"id": "scale_linear", "kwargs": {"gain": 0.0078125, "offset": -1.0}}]
    published = Published(folder / "package", [network], normalised(128, 128), softmax)
    return package(folder, of_version_5(steps, architecture, flat=False), network, published)


# ----------------------------------------------------------------------------- PyTorch Connectomics


def connectomics_1(folder: Path) -> Published:
    """Version 1: ``config.yaml`` beside a checkpoint of ``DataParallel``."""
    config = {
        "SYSTEM": {"NUM_GPUS": 4},
        "MODEL": {
            "ARCHITECTURE": "unet_3d",
            "IN_PLANES": 1,
            "OUT_PLANES": 3,
            "FILTERS": [4, 6],
            "INPUT_SIZE": list(PATCH),
            "OUTPUT_SIZE": list(PATCH),
            "TARGET_OPT": ["2"],
        },
        "INFERENCE": {"INPUT_SIZE": list(PATCH), "OUTPUT_ACT": ["sigmoid"], "SAMPLES_PER_BATCH": 4},
    }
    module = import_module("connectomics.model.arch")
    network = seeded(
        lambda: module.UNet3D(
            "residual", 1, 3, [4, 6], False, [False, False, False, True, True], "replicate", "elu", "bn", False
        ),
        2,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    state = torch.nn.DataParallel(network).state_dict()
    torch.save({"iteration": 100000, "state_dict": state, "lr_scheduler": {}}, folder / "checkpoint_100000.pth.tar")
    return Published(folder, [network], normalised(127.5, 127.5), torch.sigmoid)


def connectomics_2(folder: Path) -> Published:
    """Version 2: a configuration, and a checkpoint of PyTorch Lightning elsewhere."""
    config = {
        "system": {"num_gpus": 1, "seed": 42},
        "model": {
            "architecture": "monai_basic_unet3d",
            "input_size": list(PATCH),
            "output_size": list(PATCH),
            "in_channels": 1,
            "out_channels": 2,
            "monai": {"filters": [4, 8], "norm": "group", "num_groups": 2, "dropout": 0.1},
        },
        "data": {"batch_size": 2},
    }
    module = import_module("monai.networks.nets")
    norm = ["group", {"num_groups": 2}]
    network = seeded(lambda: module.BasicUNet(3, 1, 2, [4, 8, 8, 8, 8, 8], act="relu", norm=norm), 2)
    state = {f"model.model.{key}": value for key, value in network.state_dict().items()}
    state["loss_fn.weight"] = torch.ones(1)
    (folder / "runs").mkdir()
    torch.save({"epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": state}, folder / "runs" / "last.ckpt")
    (folder / "lucchi.yaml").write_text(yaml.safe_dump(config))
    changes = {"output": {"range": [-8, 8]}, "input": {"values": {"scale": "unit"}}}
    arguments = ("--weights", str(folder / "runs" / "last.ckpt"))
    return Published(folder / "lucchi.yaml", [network], normalised(0, 255), same, changes, arguments)


PACKAGES: list[Callable[[Path], Published]] = [
    nnunet,
    nnunet_of_all_data,
    nnunet_of_old_plans,
    monai_checkpoint,
    monai_own_network,
    monai_torchscript,
    monai_ts_with_metadata,
    bioimageio_4,
    bioimageio_4_torchscript,
    bioimageio_4_library,
    bioimageio_5,
    bioimageio_5_flat,
    bioimageio_5_library,
    connectomics_1,
    connectomics_2,
]
