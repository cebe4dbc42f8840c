"""What becomes of a network's output in every engine.

One of several outputs is taken, cut to the declared size, and activated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import crop_to
from chunkflow_core.errors import DataError, SpecError
from chunkflow_core.spec import VolumeSpec

_AROUND = "a function post_process(output) in the model file can return the part that is meant"


class UnfitPatchError(DataError):
    """The network fails with patches of the spec's size, or gives others than the spec says."""


def select(output: Any, spec: VolumeSpec) -> Any:
    """The array or tensor that ``model.output`` names, from a list or dict, or a single one.

    Raises:
        DataError: There is none of this index or key, or it is no array.
    """
    wanted = spec.model.output
    if isinstance(output, Mapping):
        output = _of_mapping(output, spec)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        index = 0 if wanted is None else wanted
        if not isinstance(index, int) or not -len(output) <= index < len(output):
            raise DataError(f"model.output: {wanted}, but the model gives a list of {len(output)} outputs")
        if wanted is None:
            _check_first(output, spec)
        output = output[index]
    elif wanted not in (None, 0):
        raise DataError(f"model.output: {wanted}, but the model gives a single output")
    if not (hasattr(output, "shape") and hasattr(output, "ndim")):
        raise DataError(
            f"the model gave a {type(output).__name__}, expected a tensor (or a list or dict of them); {_AROUND}"
        )
    return output


def _check_first(outputs: Sequence[Any], spec: VolumeSpec) -> None:
    """Refuse to take the first of several outputs if it does not fit, and others do."""
    fitting = [index for index, output in enumerate(outputs) if _fits(output, spec)]
    if len(outputs) > 1 and fitting and fitting[0] != 0:
        shapes = [tuple(getattr(output, "shape", ())) or type(output).__name__ for output in outputs]
        raise DataError(
            f"the model gives a list of {len(outputs)} outputs {shapes}, the first of which is not of the declared "
            f"shape; name the one to take, such as model.output: {fitting[0]}"
        )


def _fits(output: Any, spec: VolumeSpec) -> bool:
    """Whether an output may be the declared one, and larger by a margin."""
    shape = tuple(getattr(output, "shape", ()))
    size = spec.output_size[3 - spec.model.dimensions :]
    if len(shape) != 2 + len(size) or shape[1] != spec.output.channels:
        return False
    return all(n >= m and (n - m) % 2 == 0 for n, m in zip(shape[2:], size, strict=True))


def _of_mapping(output: Mapping[Any, Any], spec: VolumeSpec) -> Any:
    wanted, channels = spec.model.output, spec.output.channels
    if wanted is not None:
        if wanted not in output:
            raise DataError(f"model.output: {wanted} is not among the model's outputs {list(output)}")
        return output[wanted]
    fitting = [
        v for v in output.values() if getattr(v, "ndim", 0) == 2 + spec.model.dimensions and v.shape[1] == channels
    ]
    if len(fitting) != 1:
        raise DataError(
            f"the model gives the outputs {list(output)}, of which {len(fitting)} have {channels} channels; "
            "name the one to take in model.output"
        )
    return fitting[0]


def choose(outputs: Sequence[tuple[Collection[str], int | None]], spec: VolumeSpec) -> int:
    """The index of the output to take, of those of a compiled network.

    Args:
        outputs: Names of each output, and its number of channels as far as the file says it.
        spec: Its ``model.output`` is a name or an index; without it, the only output with the
            declared channels is taken.

    Raises:
        SpecError: There is no such output, or several would do.
    """
    wanted, channels = spec.model.output, spec.output.channels
    if isinstance(wanted, int):
        if not -len(outputs) <= wanted < len(outputs):
            raise SpecError(f"model.output: {wanted}, but the model gives {len(outputs)} outputs")
        return wanted % len(outputs)
    known = [next(iter(sorted(names)), "?") for names, _ in outputs]
    if wanted is not None:
        named = [index for index, (names, _) in enumerate(outputs) if wanted in names]
        if not named:
            raise SpecError(f"model.output: {wanted} is not among the model's outputs {known}")
        return named[0]
    fitting = [index for index, (_, count) in enumerate(outputs) if count in (None, channels)]
    if len(outputs) > 1 and len(fitting) != 1:
        raise SpecError(
            f"the model gives the outputs {known}, of which {len(fitting)} have {channels} channels; "
            "name the one to take in model.output"
        )
    return fitting[0] if fitting else 0


def cropped(output: Any, spec: VolumeSpec, batch: int) -> Any:
    """The centre of an output, of ``output_patch_size``.

    Args:
        output: Array or tensor ``(batch, channels, z, y, x)``.
        spec: The volume.
        batch: Number of patches in the batch.

    Raises:
        DataError: The output does not have the declared shape.
    """
    expected = (batch, spec.output.channels, *spec.output_size)
    if spec.model.dimensions == 2 and output.ndim == 4:
        output = output[:, :, None]
    with suppress(ValueError, IndexError):  # told in terms of the spec below
        output = crop_to(output, spec.output_size)
    if tuple(output.shape) != expected:
        several = f"; {_AROUND}" if output.ndim > len(expected) else ""
        raise UnfitPatchError(
            f"the model gave an output of shape {tuple(output.shape)}, the spec says {expected} "
            f"(batch, output.channels, z, y, x of output_patch_size){several}"
        )
    return output


def finished(output: NDArray[Any], spec: VolumeSpec, batch: int) -> NDArray[np.float32]:
    """A numpy output cut to size and activated: float32, contiguous, in memory of its own.

    Arguments and errors as :func:`cropped`.
    """
    result = np.array(cropped(output, spec, batch), np.float32, order="C")
    if spec.model.activation == "sigmoid":
        with np.errstate(over="ignore"):  # the exponential of a large logit is infinite, and its reciprocal is 0
            np.exp(np.negative(result, out=result), out=result)
        result += 1
        np.reciprocal(result, out=result)
    return result


def each_by_itself(run: Any, patches: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run the patches of a batch one at a time, so that no number depends on how many there are."""
    if len(patches) == 1:
        only: NDArray[np.float32] = run(patches)
        return only
    return np.concatenate([run(patches[i : i + 1]) for i in range(len(patches))])


def failed(error: str, shape: tuple[int, ...]) -> DataError:
    """The error for a network that fails with a batch of some shape."""
    return UnfitPatchError(
        f"the model failed with a batch of shape {tuple(shape)} (batch, input channels, z, y, x of patch_size): {error}"
    )
