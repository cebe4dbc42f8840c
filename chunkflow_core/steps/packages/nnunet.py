"""Folders of results of nnU-Net v2: ``plans.json``, ``dataset.json`` and a folder for each fold.

https://github.com/MIC-DKFZ/nnUNet
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from chunkflow_core.engines.checkpoint_files import plain_content
from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.steps.packages.package import Package, Section, content_of, dimensions_of, geometry, reading
from chunkflow_core.steps.packages.values import RAW, Normalisation, Values

_UNETS = {
    "PlainConvUNet": ("dynamic_network_architectures.architectures.unet.PlainConvUNet", "n_conv_per_stage"),
    "ResidualEncoderUNet": (
        "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet",
        "n_blocks_per_stage",
    ),
}
"""Class, and name of an argument of it, by what plans before nnU-Net 2.3 called it."""


def found(path: Path) -> Path | None:
    """The plans of a folder of results; None if it is none."""
    file = path / "plans.json" if path.is_dir() else path
    return file if file.name == "plans.json" and file.is_file() else None


def read(file: Path, weights: str | None) -> Package:
    """What the plans say; ``weights`` is a checkpoint's name, by default ``checkpoint_final.pth``.

    Errors are those of ``read_package``.
    """
    folder = file.parent
    checkpoints = _folds(folder, weights or "checkpoint_final.pth")
    plans, dataset = content_of(file), content_of(folder / "dataset.json")
    inside = plain_content(checkpoints[0])
    notes = []
    with reading(file, "results folder of nnU-Net"):
        name = _configuration_name(file, plans, inside)
        plan = _configuration(plans, name)
        if plans.get("transpose_forward", [0, 1, 2]) != [0, 1, 2]:
            raise SpecError(
                f"{file}: transpose_forward: {plans['transpose_forward']}: the network takes axes in another order "
                "than z, y, x; a .py file with pre_process and post_process can turn them"
            )
        if plan.get("previous_stage"):
            raise SpecError(f"{file}: {name} also takes the output of {plan['previous_stage']}; expected another one")
        channels, activation, count = _labels(dataset)
        patch = plan["patch_size"]
        network, arguments = _network(plan)
        model: Section = {
            "engine": "pytorch",
            "network": network,
            "arguments": {"input_channels": channels, "num_classes": count} | arguments | {"deep_supervision": False},
            "weights": [str(path) for path in checkpoints] if len(checkpoints) > 1 else str(checkpoints[0]),
            "activation": activation,
        } | dimensions_of(patch)
        if inside is None:
            model["trust"] = True
            notes.append("The checkpoints carry objects that can run code: trust them only if you know their origin.")
        elif sorted(inside.get("inference_allowed_mirroring_axes") or []) == [0, 1, 2]:
            model["augmentation"] = "flips"
            notes.append("augmentation: flips is nnU-Net's mirroring; each patch takes 8 times as long as with none.")
        notes.append(f"Trained at voxels of {plan.get('spacing')}, in the order of patch_size.")
        sections: Section = {"input": {"values": _values(file, plans, plan, channels)}, "model": model}
        sections["output"] = {"channels": count}
        return Package(f"nnU-Net {folder}, {name}", sections | geometry(patch), tuple(notes))


def _folds(folder: Path, name: str) -> list[Path]:
    """The checkpoint of each fold, by number; that of all the data only if there is no other."""
    there = [path for path in folder.glob(f"fold_*/{name}") if path.is_file()]
    numbered = [path for path in there if path.parent.name.removeprefix("fold_").isdigit()]
    if not there:
        raise MissingInputError(f"there is no {folder}/fold_*/{name}")
    return sorted(numbered, key=lambda path: int(path.parent.name.removeprefix("fold_"))) or there


def _configuration_name(file: Path, plans: Section, inside: Any) -> str:
    """The configuration that was trained: as the checkpoint says, or else the folder's name."""
    known = plans["configurations"]
    told = (inside or {}).get("init_args") or {}
    names = [told.get("configuration") if isinstance(told, dict) else None, file.parent.resolve().name.split("__")[-1]]
    for name in names:
        if name in known:
            return str(name)
    raise SpecError(
        f"{file}: which of its configurations ({', '.join(known)}) was trained can't be told: the folder's name has to "
        "end with it, as in nnUNetTrainer__nnUNetPlans__3d_fullres"
    )


def _configuration(plans: Section, name: str) -> Section:
    """A configuration, with what it inherits."""
    plan: Section = plans["configurations"][name]
    return _configuration(plans, plan["inherits_from"]) | plan if "inherits_from" in plan else plan


def _labels(dataset: Section) -> tuple[int, str, int]:
    """Number of input channels, activation, and number of output channels."""
    inputs = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    labels = {name: value for name, value in dataset["labels"].items() if name != "ignore"}
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):  # regions, which may overlap
        return len(inputs), "sigmoid", len([value for value in labels.values() if value not in (0, [0])])
    return len(inputs), "softmax", len(labels)


def _network(plan: Section) -> tuple[str, Section]:
    """Class of the network, and its arguments."""
    if "architecture" not in plan:
        return _network_of_old(plan)
    architecture = plan["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        if arguments.get(key) is not None:
            arguments[key] = {"import": arguments[key]}
    return architecture["network_class_name"], arguments


def _network_of_old(plan: Section) -> tuple[str, Section]:
    """As ``_network``, of plans before nnU-Net 2.3, which name numbers only."""
    name, convolutions = _UNETS[plan["UNet_class_name"]]
    stages, dimensions = len(plan["n_conv_per_stage_encoder"]), len(plan["patch_size"])
    widths = [min(plan["UNet_base_num_features"] * 2**i, plan["unet_max_num_features"]) for i in range(stages)]
    return name, {
        "n_stages": stages,
        "features_per_stage": widths,
        "conv_op": {"import": f"torch.nn.Conv{dimensions}d"},
        "kernel_sizes": plan["conv_kernel_sizes"],
        "strides": plan["pool_op_kernel_sizes"],
        convolutions: plan["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": plan["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": {"import": f"torch.nn.InstanceNorm{dimensions}d"},
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": {"import": "torch.nn.LeakyReLU"},
        "nonlin_kwargs": {"inplace": True},
    }


def _values(file: Path, plans: Section, plan: Section, channels: int) -> Values:
    """The normalisation, which has to be of one kind for all channels."""
    where = f"{file}: normalization_schemes"
    schemes = plan["normalization_schemes"]
    scheme = schemes[0]
    normalisation = Normalisation(where)
    if any(other != scheme for other in schemes):
        raise normalisation.unfit(f"another for each channel ({', '.join(schemes)})")
    if scheme == "ZScoreNormalization":
        masked = bool(plan.get("use_mask_for_norm", [False])[0])
        return {"mean": "measured", "std": "measured"} | ({} if masked else {"count_zeros": True})
    if scheme == "RescaleTo01Normalization":
        return {"percentiles": [0, 100], "count_zeros": True}
    if scheme == "RGBTo01Normalization":
        return {"mean": 0.0, "std": 255.0}
    if scheme == "CTNormalization":
        return _clipped(plans, channels, normalisation)
    if scheme == "NoNormalization":
        return RAW
    raise normalisation.unfit(scheme)


def _clipped(plans: Section, channels: int, normalisation: Normalisation) -> Values:
    """Voxels within percentiles of the training's foreground, by its mean and deviation."""
    key = "foreground_intensity_properties_per_channel"
    known = plans[key] if key in plans else plans["foreground_intensity_properties_by_modality"]
    measures = [known[str(channel)] for channel in range(channels)]
    means, stds = ([float(measure[name]) for measure in measures] for name in ("mean", "std"))
    bounds = {
        tuple((measure[f"percentile_{p}"] - mean) / std for p in ("00_5", "99_5"))
        for measure, mean, std in zip(measures, means, stds, strict=True)
    }
    if len(bounds) > 1 or not all(map(math.isfinite, next(iter(bounds)))):
        raise normalisation.unfit("clipping each channel to bounds of its own")
    normalisation.fixed(*((means, stds) if channels > 1 else (means[0], stds[0])))
    normalisation.clip(*next(iter(bounds)))
    return normalisation.values
