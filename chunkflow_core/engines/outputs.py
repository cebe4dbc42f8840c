"""What becomes of a network's output in every engine.

One of several outputs is taken, cut to the declared size, and activated; and of its channels those
that the spec names.
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
    if len(shape) != 2 + len(size) or not has_channels(shape[1], spec):
        return False
    return all(n >= m and (n - m) % 2 == 0 for n, m in zip(shape[2:], size, strict=True))


def has_channels(count: int, spec: VolumeSpec) -> bool:
    """Whether a network that gives so many channels may be the declared one."""
    known = _known_channels(spec)
    return count >= least_channels(spec) if known is None else count == known


def least_channels(spec: VolumeSpec) -> int:
    """The number of channels that the network gives, or the least that has all that are taken."""
    return _known_channels(spec) or 1 + max(spec.output.taken or (0,))


def _known_channels(spec: VolumeSpec) -> int | None:
    """The number of channels that the network has to give; None if it is not declared."""
    return spec.model.channels or (spec.output.summed_channels if spec.output.taken is None else None)


def _told_channels(spec: VolumeSpec) -> str:
    return f"{least_channels(spec)}{' or more' if _known_channels(spec) is None else ''}"


def _of_mapping(output: Mapping[Any, Any], spec: VolumeSpec) -> Any:
    wanted = spec.model.output
    if wanted is not None:
        if wanted not in output:
            raise DataError(f"model.output: {wanted} is not among the model's outputs {list(output)}")
        return output[wanted]
    fitting = [
        v
        for v in output.values()
        if getattr(v, "ndim", 0) == 2 + spec.model.dimensions and has_channels(v.shape[1], spec)
    ]
    if len(fitting) != 1:
        raise DataError(
            f"the model gives the outputs {list(output)}, of which {len(fitting)} have {_told_channels(spec)} "
            "channels; name the one to take in model.output"
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
    wanted = spec.model.output
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
    fitting = [index for index, (_, count) in enumerate(outputs) if count is None or has_channels(count, spec)]
    if len(outputs) > 1 and len(fitting) != 1:
        raise SpecError(
            f"the model gives the outputs {known}, of which {len(fitting)} have {_told_channels(spec)} channels; "
            "name the one to take in model.output"
        )
    return fitting[0] if fitting else 0


def cropped(output: Any, spec: VolumeSpec, batch: int) -> Any:
    """The centre of an output, of ``output_patch_size``, with all channels.

    Args:
        output: Array or tensor ``(batch, channels, z, y, x)``.
        spec: The volume.
        batch: Number of patches in the batch.

    Raises:
        DataError: The output does not have the declared shape.
    """
    size = spec.output_size
    if spec.model.dimensions == 2 and output.ndim == 4:
        output = output[:, :, None]
    with suppress(ValueError, IndexError):  # told in terms of the spec below
        output = crop_to(output, size)
    shape = tuple(output.shape)
    if len(shape) != 5 or (shape[0], *shape[2:]) != (batch, *size) or not has_channels(shape[1], spec):
        several = f"; {_AROUND}" if output.ndim > 5 else ""
        expected = ", ".join(map(str, (batch, _told_channels(spec), *size)))
        key = "model.channels" if spec.model.channels else "output.channels"
        raise UnfitPatchError(
            f"the model gave an output of shape {shape}, the spec says ({expected}) "
            f"(batch, {key}, z, y, x of output_patch_size){several}"
        )
    return output


def taken(output: Any, spec: VolumeSpec, stack: Any) -> Any:
    """Those channels of an output that the spec names, by a library's ``stack``; or all of them."""
    names = spec.output.taken
    return output if names is None else stack([output[:, channel] for channel in names], 1)


def finished(output: NDArray[Any], spec: VolumeSpec, batch: int) -> NDArray[np.float32]:
    """A numpy output cut to size and activated, with the channels that are taken.

    It is float32, contiguous, in memory of its own. Arguments and errors as :func:`cropped`.
    """
    output = cropped(output, spec, batch)
    if spec.model.activation == "softmax":
        return np.ascontiguousarray(taken(_softmax(output), spec, np.stack))
    result = np.array(taken(output, spec, np.stack), np.float32, order="C")
    if spec.model.activation == "sigmoid":
        with np.errstate(over="ignore"):  # the exponential of a large logit is infinite, and its reciprocal is 0
            np.exp(np.negative(result, out=result), out=result)
        result += 1
        np.reciprocal(result, out=result)
    return result


def _softmax(output: NDArray[Any]) -> NDArray[np.float32]:
    """The softmax over the channels of an output ``(batch, channels, z, y, x)``: float32.

    Infinite logits give NaN, but for -inf, which becomes 0 beside others.
    """
    result = np.array(output, np.float32, order="C")
    with np.errstate(invalid="ignore"):  # NaN is told of when the range is checked
        result -= result.max(axis=1, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=1, keepdims=True)
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
