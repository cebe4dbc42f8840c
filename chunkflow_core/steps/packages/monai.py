"""Bundles of MONAI: a folder with ``configs`` and ``models``, or TorchScript with metadata inside.

https://docs.monai.io/en/stable/mb_specification.html
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from chunkflow_core.engines.checkpoint_files import is_torchscript
from chunkflow_core.errors import SpecError
from chunkflow_core.steps.packages.package import (
    Package,
    Section,
    chosen,
    content_of,
    dimensions_of,
    geometry,
    parsed,
    reading,
)
from chunkflow_core.steps.packages.values import Normalisation

_SUFFIXES = (".ts", ".pt", ".pth")
_SPECIAL = ("_target_", "_desc_", "_requires_", "_disabled_", "_mode_", "_imports_", "_log_")
"""Keys of a component that are no arguments."""
_REFERENCE = re.compile(r"@[\w.]+(?:(?:::|#)[\w.]+)*")
_DEEPEST = 100
"""Number of references to references that are followed."""
_ELSEWHERE = ("LoadImaged", "EnsureChannelFirstd", "AddChanneld", "EnsureTyped", "ToTensord", "CastToTyped", "Lambdad")
"""Transforms that bring voxels into memory."""


def found(path: Path) -> Path | None:
    """The metadata of a folder, or a TorchScript file that has them inside; None if it is none."""
    if path.is_dir():
        folder = path.parent if path.name == "configs" else path
        file = folder / "configs" / "metadata.json"
        return file if file.is_file() else None
    return path if path.suffix in _SUFFIXES and "metadata.json" in _inside(path) else None


def read(file: Path, weights: str | None) -> Package:
    """What a bundle says; ``weights`` is the name of one of its files in ``models``.

    Errors are those of ``read_package``.
    """
    if file.suffix in _SUFFIXES:
        texts = _inside(file)
        metadata = parsed(texts["metadata.json"], file)
        name = next((name for name in texts if name.startswith("inference.")), None)
        return _package(file, metadata, parsed(texts[name], file) if name else {}, lambda _: file)
    folder = file.parent.parent
    configs = [path for path in sorted(file.parent.glob("inference.*")) if path.suffix in (".json", ".yaml", ".yml")]
    models = [path for path in sorted((folder / "models").glob("model*")) if path.suffix in _SUFFIXES]
    kinds = {path.name: path for suffix in _SUFFIXES for path in models if path.suffix == suffix}
    config = content_of(configs[0]) if configs else {}
    return _package(file, content_of(file), config, lambda source: kinds[chosen(kinds, weights, source)])


def _inside(file: Path) -> dict[str, bytes]:
    """The texts that are beside the code in a TorchScript file, by name."""
    try:
        with ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.count("/") == 2 and "/extra/" in name]
            return {name.rpartition("/")[2]: archive.read(name) for name in names}
    except (BadZipFile, OSError):
        return {}


def _package(file: Path, metadata: Section, config: Section, weights: Callable[[Path], Path]) -> Package:
    notes: list[str] = []
    model_file = weights(file)
    with reading(file, "MONAI bundle"):
        formats = metadata["network_data_format"]
        (output, *more) = formats["outputs"].values()
        patch = _patch(config, formats)
        sections: Section = {}
        if "preprocessing" in config:
            sections["input"] = {"values": _values(file, _transforms(config, "preprocessing"), notes)}
        else:
            notes.append("The bundle does not say which numbers the network gets: set input.values.")
        if is_torchscript(model_file):
            model: Section = {"engine": "pytorch", "path": str(model_file)}
        else:
            model = _with_network(file, config, model_file)
        channels = model.get("arguments", {}).get("out_channels", output["num_channels"])
        after = _transforms(config, "postprocessing")
        activations = [t for t in after if t["_target_"].endswith("Activationsd")]
        for name in ("sigmoid", "softmax"):
            if activations and activations[0].get(name):
                model["activation"] = name
        if "activation" not in model:
            notes.append("The bundle names no activation: set output.range to the range of the network's numbers.")
        if more:
            notes.append(f"The network has {len(more) + 1} outputs; model.output chooses one.")
        sections |= {"model": model, "output": {"channels": channels}}
        if patch is None:
            notes.append("The bundle leaves the size of patches open.")
        else:
            model |= dimensions_of(patch)
            overlap = _inferer(config).get("overlap")
            sections |= geometry(patch, overlap=overlap if isinstance(overlap, int | float) else 0.25)
        notes.append("Sizes are in the order of the bundle's arrays; MONAI reads NIfTI files as x, y, z.")
    return Package(f"MONAI bundle {file.parent.parent if file.suffix == '.json' else file}", sections, tuple(notes))


def _with_network(file: Path, config: Section, weights: Path) -> Section:
    """The keys for a checkpoint, with the network of the configuration."""
    definition = next((config[key] for key in ("network_def", "network") if isinstance(config.get(key), dict)), None)
    if definition is None:
        raise SpecError(
            f"{file}: {weights.name} needs the network, and there is no network_def in configs/inference.json; the "
            ".ts file of the bundle, if there is one, has its network inside"
        )
    arguments = {
        key: _plain(file, value, config, f"network_def.{key}")
        for key, value in definition.items()
        if key not in _SPECIAL
    }
    model: Section = {"engine": "pytorch"} | _target(file, definition["_target_"])
    return model | {"arguments": arguments, "weights": str(weights)}


def _target(file: Path, target: str) -> Section:
    """The keys for a component: one of MONAI, of a library, or of the bundle's own files."""
    if "." not in target:
        return {"network": f"monai.networks.nets.{target}"}
    module, _, name = target.rpartition(".")
    own = file.parent.parent.joinpath(*module.split(".")).with_suffix(".py")
    return {"path": str(own), "network": name} if own.is_file() else {"network": target}


def _plain(file: Path, value: Any, config: Section, key: str) -> Any:
    """An argument without references; ``SpecError`` for what only MONAI can work out."""
    if isinstance(value, list):
        return [_plain(file, part, config, key) for part in value]
    if isinstance(value, dict) and "_target_" not in value:
        return {name: _plain(file, part, config, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, str) and _REFERENCE.fullmatch(value):
        return _plain(file, _referred(config, value), config, key)
    if isinstance(value, str) and value.startswith("$"):
        try:
            return ast.literal_eval(value[1:].strip())
        except (ValueError, SyntaxError):
            pass
    elif not isinstance(value, dict):
        return value
    raise SpecError(
        f"{file.parent / 'inference.json'}: {key}: {value}: expected a value, or a reference to one. Write what it "
        "stands for into a copy of the configuration, or a .py file with InstantiatedModel"
    )


def _referred(config: Section, value: Any) -> Any:
    """What a reference such as ``@network_def::channels`` leads to; another value as it is."""
    seen = 0
    while isinstance(value, str) and _REFERENCE.fullmatch(value) and seen < _DEEPEST:
        seen, parts = seen + 1, re.split("::|#", value[1:])
        value = config
        for part in parts:
            value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _transforms(config: Section, name: str) -> list[Section]:
    """The transforms of a step, in order; ``ValueError`` if only MONAI can work them out."""
    found = _referred(config, config.get(name, []))
    listed = _referred(config, found.get("transforms", [])) if isinstance(found, dict) else found
    transforms = [_referred(config, t) for t in listed] if isinstance(listed, list) else [listed]
    for transform in transforms:
        if not isinstance(transform, dict):
            raise ValueError(f"{name}: {transform}: expected a list of transforms, or a reference to one")
    return [t for t in transforms if t.get("_disabled_") is not True]


def _inferer(config: Section) -> Section:
    """The arguments of the inferer; none if MONAI has to work it out."""
    found = _referred(config, config.get("inferer"))
    return {key: _referred(config, value) for key, value in found.items()} if isinstance(found, dict) else {}


def _patch(config: Section, formats: Section) -> list[int] | None:
    """Size of a patch, as the inferer or else the metadata say; None if they leave it open."""
    (given, *more) = formats["inputs"].values()
    if more:
        raise ValueError(f"the network takes {len(more) + 1} inputs, expected one")
    for size in (_inferer(config).get("roi_size"), given["spatial_shape"]):
        if isinstance(size, list) and size and all(isinstance(n, int) and n > 0 for n in size):
            return size
    return None


def _values(file: Path, transforms: list[Section], notes: list[str]) -> Section:
    """``input.values`` for transforms; those that move voxels are noted."""
    values = Normalisation(f"{file}: preprocessing")
    for transform in transforms:
        name = transform["_target_"].rpartition(".")[2]
        if name in _INTENSITY:
            _INTENSITY[name](values, transform)
        elif name.startswith(("Orientation", "Spacing", "Crop", "Resize", "Pad", "Divisible")):
            notes.append(f"The bundle also does {name}{_told(transform)}: bring the layer so, if it is not.")
        elif name not in _ELSEWHERE:
            raise values.unfit(name)
    return values.values


def _told(transform: Section) -> str:
    facts = {key: value for key, value in transform.items() if key in ("pixdim", "axcodes", "spatial_size", "k")}
    return f" ({', '.join(f'{key} {value}' for key, value in facts.items())})" if facts else ""


def _scale_range(values: Normalisation, transform: Section) -> None:
    low, high = transform["a_min"], transform["a_max"]
    start, stop = transform.get("b_min"), transform.get("b_max")
    if start is None or stop is None:
        start, stop = 0.0, 1.0
    gain = (stop - start) / (high - low)
    values.linear(gain, start - low * gain, "ScaleIntensityRanged")
    if transform.get("clip"):
        values.clip(start, stop)


def _percentiles(values: Normalisation, transform: Section) -> None:
    _check_unit(values, transform, "b_min", "b_max")
    if transform.get("relative"):
        raise values.unfit("relative percentiles")
    values.measured({"percentiles": [transform["lower"], transform["upper"]], "count_zeros": True}, "percentiles")
    if transform.get("clip"):
        values.clip(0, 1)


def _scale(values: Normalisation, transform: Section) -> None:
    if transform.get("factor") is not None:
        raise values.unfit("ScaleIntensityd by a factor")
    _check_unit(values, transform, "minv", "maxv")
    values.measured({"percentiles": [0, 100], "count_zeros": True}, "ScaleIntensityd")


def _check_unit(values: Normalisation, transform: Section, low: str, high: str) -> None:
    if (transform.get(low, 0.0), transform.get(high, 1.0)) != (0, 1):
        raise values.unfit(f"measured numbers with {low} and {high} other than 0 and 1")


def _normalize(values: Normalisation, transform: Section) -> None:
    if transform.get("subtrahend") is not None and transform.get("divisor") is not None:
        values.fixed(transform["subtrahend"], transform["divisor"])
        return
    zeros = {} if transform.get("nonzero") else {"count_zeros": True}
    values.measured({"mean": "measured", "std": "measured"} | zeros, "NormalizeIntensityd")


_INTENSITY: dict[str, Callable[[Normalisation, Section], None]] = {
    "ScaleIntensityRanged": _scale_range,
    "ScaleIntensityRangePercentilesd": _percentiles,
    "ScaleIntensityd": _scale,
    "NormalizeIntensityd": _normalize,
}
