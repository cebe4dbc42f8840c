"""Subcommands of ``chunkflow-core`` that help to make a spec.

They read published models, find an engine for the model, and make input from image stacks.
"""

from __future__ import annotations

import argparse
import json
import math
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tqdm import tqdm

from chunkflow_core.commands.arguments import Add, add_spec_arguments, not_negative, positive, spec_of, tolerance
from chunkflow_core.errors import DataError, UsageError
from chunkflow_core.storage.addresses import check_address, layer_format
from chunkflow_core.variables import conceal

if TYPE_CHECKING:
    from chunkflow_core.steps.packages.package import Package
    from chunkflow_core.storage.ingest.stack import Stack


def add_commands(add: Add) -> None:
    """Add the subcommands of this module to the command line."""
    _add_model(add)
    _add_compile(add)
    _add_ingest(add)


def _add_model(add: Add) -> None:
    parser = add("model", model, "Print the lines of a spec that run a published model as it is.")
    parser.add_argument(
        "package",
        metavar="PACKAGE",
        help="folder of a bioimage.io package, of a MONAI bundle, or of results of nnU-Net; a .ts file with MONAI's "
        "metadata; configuration of PyTorch Connectomics. Paths in the lines begin as PACKAGE does",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="which of its weights to take: format (bioimage.io), file in models (MONAI), file in each fold (nnU-Net), "
        "checkpoint (PyTorch Connectomics). Default: those that need no library, else the ones of the last epoch",
    )
    parser.add_argument(
        "--test",
        action="store_true",
        help="run the package's test tensors (bioimage.io), and compare with what it says has to come out",
    )


def model(options: argparse.Namespace) -> None:
    """Print the lines of a spec for a package, or try it on its test tensors."""
    from chunkflow_core.steps.packages import read_package

    package = read_package(options.package, options.weights)
    print(package.lines)
    if options.test:
        _test(package)


def _test(package: Package) -> None:
    if package.tests is None:
        raise UsageError("--test: there are no test tensors that the lines above would give; run it without")
    from chunkflow_core.steps.packages.trial import try_package

    tests = package.tests
    with TemporaryDirectory() as folder:
        outcome = try_package(package, tests, Path(folder))
    told = (
        f"test tensors: largest difference {outcome.difference:.2g}; {outcome.mismatches:g} in a million differ by "
        f"more than {tests.absolute:g} + {tests.relative:g} of the number, the package allows {tests.mismatches:g}"
    )
    if not outcome.is_within:
        raise DataError(told)
    print(f"# {told}")


def _add_compile(add: Add) -> None:
    parser = add("compile", compile, "Convert the model for its engine, and time every engine that can run it here.")
    add_spec_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default=1e-5,
        metavar="D",
        help="largest difference to the reference, PyTorch in float32, that an output value may have (default: 1e-5)",
    )
    parser.add_argument(
        "--patches", type=positive, default=4, metavar="N", help="patches of the input layer to run (default: 4)"
    )
    parser.add_argument(
        "--engines",
        type=_engines,
        default="pytorch,openvino,onnx",
        metavar="NAMES",
        help="engines to try, of pytorch,openvino,onnx (default: all that take the model)",
    )


def compile(options: argparse.Namespace) -> None:
    """Convert the model, and time every engine that can run it."""
    spec = spec_of(options)
    from chunkflow_core.steps import compile

    candidates = compile.settings(spec, options.engines)
    patches = compile.sample(spec, options.patches)
    with tqdm(total=compile.steps(candidates), unit="step", desc="compile", disable=None) as bar:
        measurements = compile.measure(spec, candidates, patches, bar.update)
    best, reference = compile.fastest(measurements, options.tolerance), candidates[0]
    print(conceal("\n".join(compile.table(measurements, best))))
    print(f"\n► the fastest within {options.tolerance:g} of {reference.engine} {reference.precision}; in the spec:\n")
    print(compile.spec_lines(best.setting))


def _add_ingest(add: Add) -> None:
    parser = add(
        "ingest",
        ingest,
        "Store a TIFF stack, folder of images, HDF5 dataset, npy, NRRD, MRC or NIfTI file as a precomputed layer. "
        "Repeated after it was killed, it goes on.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="stack.tif, folder of images, file.h5:dataset, stack.npy, stack.nrrd, stack.nhdr, stack.mrc, stack.nii or "
        "stack.nii.gz; zyx, or x fastest",
    )
    parser.add_argument("layer", type=_layer, metavar="LAYER", help='layer to make, such as "file:///data/em"')
    parser.set_defaults(refuse=parser.error)
    parser.add_argument(
        "--voxel-size",
        type=_voxel_size,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="in nm, such as 40 4 4; may be left out where the header of NRRD, MRC or NIfTI says it",
    )
    parser.add_argument(
        "--chunk-size",
        type=positive,
        nargs=3,
        default=[16, 128, 128],
        metavar=("Z", "Y", "X"),
        help="default: 16 128 128",
    )
    parser.add_argument(
        "--offset", type=int, nargs=3, default=[0, 0, 0], metavar=("Z", "Y", "X"), help="of the first voxel"
    )
    parser.add_argument(
        "--compression",
        choices=("gzip", "br", "zstd", "none"),
        default="gzip",
        help="compression of storage chunks (default: gzip)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a layer that is there")
    _add_choice(parser)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose from a source that is not simply one stack."""
    parser.add_argument(
        "--series", type=not_negative, metavar="N", help="series to take of a TIFF file that holds several, from 0"
    )
    parser.add_argument(
        "--level",
        type=not_negative,
        default=0,
        metavar="N",
        help="level to take of a pyramid in a TIFF file (default: 0, the full resolution)",
    )
    parser.add_argument(
        "--channel", type=not_negative, metavar="N", help="channel, colour or sample to take, where there are several"
    )
    parser.add_argument("--time", type=not_negative, metavar="N", help="point in time to take, where there are several")
    parser.add_argument(
        "--axes",
        type=_axes,
        metavar="AXES",
        help="axes of the source in their order, such as CZYX, of the letters Z Y X C T (channels, time): for arrays "
        "of more than three, or instead of what the file says of them",
    )
    parser.add_argument(
        "--gaps",
        choices=("error", "repeat", "blank"),
        default="error",
        help="what stands for sections that a folder's numbers leave out: nothing, the section before, or zeros; "
        "blank also takes parts of a file that were never written as they are read (default: error)",
    )
    parser.add_argument(
        "--step",
        type=positive,
        default=1,
        metavar="N",
        help="difference of the numbers of one file of a folder and the next (default: 1)",
    )


def ingest(options: argparse.Namespace) -> None:
    """Store an image stack as a precomputed layer."""
    from chunkflow_core.lattice.boxes import vector
    from chunkflow_core.storage.ingest.axes import Choice
    from chunkflow_core.storage.ingest.sources import open_stack, says_voxel_size
    from chunkflow_core.storage.ingest.store import ingest

    if options.voxel_size is None and not says_voxel_size(options.source):
        options.refuse(f"the following arguments are required for {options.source}: --voxel-size")
    names = ("series", "level", "channel", "time", "axes", "gaps", "step")
    choice = {name: getattr(options, name) for name in names}
    stack = open_stack(options.source, Choice(**choice))
    with closing(stack), tqdm(total=stack.shape[0], unit="section", desc="ingest", disable=None) as bar:
        done = ingest(
            stack,
            options.layer,
            resolution=_resolution(stack, options.voxel_size),
            chunk=vector(options.chunk_size),
            offset=vector(options.offset),
            compression=options.compression,
            overwrite=options.overwrite,
            options=choice,
            planes_done=bar.update,
        )
    if done:
        print(f"went on from section {done}, where an earlier ingest of the same source had ended")
    print(f"{options.layer}: {' × '.join(map(str, stack.shape))} voxels (zyx), {stack.dtype}")
    for note, text in stack.notes.items():
        print(f"{note.replace('_', ' ')}: {text if isinstance(text, str) else json.dumps(text)}")


def _resolution(stack: Stack, given: list[float] | None) -> tuple[float, ...]:
    """Voxel size in nm, zyx: what the user says, else what the source says, which is noted."""
    if given is not None:
        return tuple(given)
    if stack.voxel_size is None:
        raise UsageError(
            f"{stack.name}: its header does not say how large voxels are in a known unit; give --voxel-size"
        )
    stack.notes["voxel_size"] = f"{' × '.join(map(str, stack.voxel_size))} nm (zyx), from the header"
    return stack.voxel_size


def _engines(text: str) -> list[str]:
    names, known = text.split(","), ("pytorch", "openvino", "onnx")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{text}: expected some of {','.join(known)}")
    return names


def _axes(text: str) -> str:
    from chunkflow_core.storage.ingest.axes import axes_letters

    try:
        return axes_letters(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def _voxel_size(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected nanometres, more than 0")
    return int(value) if value.is_integer() else value


def _layer(text: str) -> str:
    try:
        check_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    if layer_format(text) != "precomputed":
        raise argparse.ArgumentTypeError(f"{text}: a precomputed layer is written, expected its address alone")
    return text
