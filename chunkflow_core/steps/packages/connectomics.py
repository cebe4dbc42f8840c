"""Configurations of PyTorch Connectomics, whose checkpoints lie beside them or elsewhere.

https://github.com/PytorchConnectomics/pytorch_connectomics. Those of version 1 have the sections
MODEL, DATASET and INFERENCE; those of version 2, which trains with PyTorch Lightning, ``model``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chunkflow_core.errors import SpecError
from chunkflow_core.steps.packages.package import Package, Section, content_of, dimensions_of, geometry, reading

_CLASSES = {
    "unet_3d": "UNet3D",
    "unet_2d": "UNet2D",
    "unet_plus_3d": "UNetPlus3D",
    "unet_plus_2d": "UNetPlus2D",
}
"""Classes of version 1 that take no further arguments, by their names in a configuration."""

_ARGUMENTS: dict[str, tuple[str, str, Any]] = {
    "block_type": ("MODEL", "BLOCK_TYPE", "residual"),
    "in_channel": ("MODEL", "IN_PLANES", 1),
    "out_channel": ("MODEL", "OUT_PLANES", 1),
    "filters": ("MODEL", "FILTERS", [28, 36, 48, 64, 80]),
    "is_isotropic": ("DATASET", "IS_ISOTROPIC", False),
    "isotropy": ("MODEL", "ISOTROPY", [False, False, False, True, True]),
    "pad_mode": ("MODEL", "PAD_MODE", "replicate"),
    "act_mode": ("MODEL", "ACT_MODE", "elu"),
    "norm_mode": ("MODEL", "NORM_MODE", "bn"),
    "pooling": ("MODEL", "POOLING_LAYER", False),
}
"""Section, key and default of each argument of those classes."""

_WEIGHTS = "CHECKPOINT"


def found(path: Path) -> Path | None:
    """The configuration in a folder, or the file itself if it is one."""
    names = ("config.yaml", "config.yml")
    files = [path / name for name in names] if path.is_dir() else [path]
    for file in files:
        if file.suffix in (".yaml", ".yml") and file.is_file():
            content = content_of(file)
            if isinstance(content.get("MODEL", content.get("model")), dict):
                return file
    return None


def read(file: Path, weights: str | None) -> Package:
    """What a configuration says; ``weights`` is a checkpoint, by default the only one beside it.

    Errors are those of ``read_package``.
    """
    beside = sorted(p for pattern in ("*.pth.tar", "*.pth", "*.ckpt") for p in file.parent.glob(pattern))
    notes = []
    if weights is None and len(beside) == 1:
        weights = str(beside[0])
    elif weights is None:
        known = f" ({', '.join(path.name for path in beside)})" if beside else ""
        notes.append(f"Write the checkpoint to take{known} in place of {_WEIGHTS}, or give it with --weights.")
    content = content_of(file)
    with reading(file, "configuration of PyTorch Connectomics"):
        sections = _of_version_1(file, content) if "MODEL" in content else _of_version_2(file, content["model"])
        sections["model"]["weights"] = weights or _WEIGHTS
    if "MODEL" in content:
        notes.append("mean and std are for integers of 8 bits; for others they grow with the largest value.")
    else:
        notes.append("Normalisation and activation are the trainer's: input.values, model.activation, output.range.")
    return Package(f"PyTorch Connectomics {file}", sections, tuple(notes))


def _of_version_1(file: Path, content: Section) -> Section:
    def value(section: str, key: str, default: Any) -> Any:
        given = content.get(section, {}).get(key)
        return default if given is None else given

    architecture = value("MODEL", "ARCHITECTURE", "unet_3d")
    if architecture not in _CLASSES:
        raise SpecError(
            f"{file}: MODEL.ARCHITECTURE: {architecture}: expected {', '.join(_CLASSES)}; for another, write a .py "
            "file with InstantiatedModel = build_model(…)"
        )
    mean, std = value("DATASET", "MEAN", 0.5), value("DATASET", "STD", 0.5)
    patch = value("INFERENCE", "INPUT_SIZE", value("MODEL", "INPUT_SIZE", [8, 256, 256]))
    output = value("INFERENCE", "OUTPUT_SIZE", value("MODEL", "OUTPUT_SIZE", patch))
    (activation,) = dict.fromkeys(value("INFERENCE", "OUTPUT_ACT", ["sigmoid"]))
    if activation not in ("none", "sigmoid", "softmax"):
        raise SpecError(f"{file}: INFERENCE.OUTPUT_ACT: {activation}: expected none, sigmoid or softmax")
    arguments = {name: value(*place) for name, place in _ARGUMENTS.items()}
    flat = architecture.endswith("2d")
    return {
        "input": {"values": {"mean": 255.0 * mean, "std": 255.0 * std}},
        "model": {
            "engine": "pytorch",
            "network": f"connectomics.model.arch.{_CLASSES[architecture]}",
            "arguments": arguments,
            "activation": activation,
        }
        | ({"dimensions": 2} if flat else {}),
        "output": {"channels": arguments["out_channel"]},
        **geometry(patch, output=output),
    }


def _of_version_2(file: Path, model: Section) -> Section:
    builders = {"monai_basic_unet3d": _basic_unet, "monai_unet": _unet}
    architecture = model.get("architecture") or model["arch"]["type"]
    if architecture not in builders:
        raise SpecError(
            f"{file}: model.architecture: {architecture}: expected {' or '.join(builders)}; for another, write a .py "
            "file with InstantiatedModel that builds it"
        )
    settings = model | model.get("monai", {})
    patch = model["input_size"]
    network, arguments = builders[architecture](settings)
    norm = settings.get("norm", "batch")
    channels = {"in_channels": model.get("in_channels", 1), "out_channels": model.get("out_channels", 1)}
    arguments = (
        {"spatial_dims": len(patch)}
        | channels
        | arguments
        | {
            "norm": ["group", {"num_groups": settings.get("num_groups", 8)}] if norm == "group" else norm,
            "dropout": settings.get("dropout", 0.0),
        }
    )
    return {
        "model": {"engine": "pytorch", "network": network, "arguments": arguments} | dimensions_of(patch),
        "output": {"channels": channels["out_channels"]},
        **geometry(patch, output=model.get("output_size")),
    }


def _basic_unet(settings: Section) -> tuple[str, Section]:
    filters = list(settings.get("filters", [32, 64, 128, 256, 512, 1024]))
    return "monai.networks.nets.BasicUNet", {
        "features": (filters + filters[-1:] * 6)[:6],
        "act": settings.get("activation", "relu"),
        "upsample": settings.get("upsample_mode", "deconv"),
    }


def _unet(settings: Section) -> tuple[str, Section]:
    filters = list(settings.get("filters", [32, 64, 128, 256, 512]))
    if settings.get("upsample_mode", "deconv") != "deconv":
        raise ValueError(f"upsample_mode: {settings['upsample_mode']}: expected deconv")
    return "monai.networks.nets.UNet", {
        "channels": filters,
        "strides": [2] * (len(filters) - 1),
        "num_res_units": settings.get("num_res_units", 2),
        "kernel_size": settings.get("kernel_size", 3),
    }
