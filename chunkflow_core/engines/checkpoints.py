"""Finds a network's weights in a checkpoint, however its trainer has wrapped them.

Trainers put weights under a key of their own (``state_dict``, ``network_weights``, ``ema``, …),
beside optimizers and whatever else, and wrappers of the network put prefixes before its keys
(``module.``, ``_orig_mod.``, ``model.``, …). No list of such names would ever be complete. So all
tensors of the checkpoint get a dotted name, the path to them, and a set of weights is a prefix of
those names below which each key of the network has a tensor of its shape.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkflow_core.engines.checkpoint_files import read_checkpoint
from chunkflow_core.engines.failures import told
from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec

log = logging.getLogger(__name__)

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of keys that stand for no layer, but for what PyTorch has put around one."""

_WHOLES = _WRAPPERS | {
    *("model", "net", "network", "unet", "generator", "student", "teacher"),
    *("ema", "ema_model", "model_ema", "averaged_model", "swa_model"),
}
"""Names that trainers give to a whole network, beside whose weights there may be others."""

_OPTIONAL = "num_batches_tracked"
"""A count of the training, which older checkpoints lack, and inference does not need."""

_EXTRA = "_extra_state"
"""Last part of the key of what a module keeps that is no tensor."""


@dataclass(frozen=True)
class _Leaf:
    """A tensor in a checkpoint."""

    value: Any
    container: str
    """Dotted path to the dict that it is in, with a dot at its end; empty for the file's own."""
    versions: Mapping[str, Any]
    """What PyTorch notes in that dict of the modules that its keys are of."""


@dataclass(frozen=True)
class Weights:
    """Tensors for each key of a network, that begin with one prefix in the checkpoint."""

    prefix: str
    """What comes before the network's keys, with a dot at its end."""
    keys: Mapping[str, str]
    """Name in the checkpoint of each key of the network."""
    naming: int = 0
    """Number of parts that the network's own keys have before what follows the prefix."""

    @property
    def name(self) -> str:
        """The prefix as ``model.weights_key`` has it."""
        return self.prefix[:-1]


def load_weights(spec: VolumeSpec, network: Any, file: Path) -> None:
    """Load the spec's checkpoint into a network, and say in the log where in it the weights were.

    Raises:
        SpecError: It does not fit the network, or several different weights in it do.
        MissingInputError: The file can't be read.
    """
    if not isinstance(network, torch.nn.Module):
        raise SpecError(
            f"model.weights: {spec.model.title} gives a {type(network).__name__}, into which no weights can be loaded; "
            "a function load_model(weights) in it can load them in its own way"
        )
    leaves = _leaves(read_checkpoint(spec, file), file)
    _Checkpoint(spec, network, file, leaves).load()


class _Checkpoint:
    """The tensors of a file, held against a network."""

    def __init__(self, spec: VolumeSpec, network: torch.nn.Module, file: Path, leaves: Mapping[str, _Leaf]) -> None:
        self._spec, self._network, self._file, self._leaves = spec, network, file, leaves
        self._state = dict(network.state_dict())
        self._own = {key: value for key, value in self._state.items() if not key.endswith(_EXTRA)}
        self._storages = {key: _storage(value) for key, value in self._own.items()}
        self._wanted = spec.model.weights_key

    def load(self) -> None:
        if not self._leaves:
            raise SpecError(
                f"model.weights: {self._file} holds no tensors with names, expected a state_dict, bare or in a dict"
            )
        candidates = [
            weights for level, names in enumerate(self._namings()) for weights in _found(names, self._leaves, level)
        ]
        if fitting := [weights for weights in candidates if self._fits(weights)]:
            self._load(self._chosen(fitting))
        elif not self._loaded_by_itself():
            raise self._misfit(candidates)

    def _namings(self) -> Iterator[dict[str, str]]:
        """The network's keys by the names that a checkpoint may have for them.

        First without wrappers that are part of the network, then without the name of a whole that
        all keys begin with.
        """
        names = {_unwrapped(key): key for key in self._own}
        if len(names) < len(self._own):
            names = {key: key for key in self._own}
        while True:
            yield names
            first = {name.partition(".")[0] for name in names}
            if len(first) != 1 or first.isdisjoint(_WHOLES) or any("." not in name for name in names):
                return
            names = {name.partition(".")[2]: key for name, key in names.items()}

    def _fits(self, weights: Weights) -> bool:
        """Whether there is a tensor of the right shape for each key."""
        return not self._missing(weights) and not self._misshapen(weights)

    def _missing(self, weights: Weights) -> list[str]:
        rest = [key for key in self._own if key not in weights.keys and not key.endswith(_OPTIONAL)]
        there = {self._storages[key] for key in weights.keys} if rest else set()
        return [key for key in rest if self._storages[key] not in there]

    def _misshapen(self, weights: Weights) -> list[str]:
        return [key for key, name in weights.keys.items() if self._shapes(key, name) is not None]

    def _shapes(self, key: str, name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The shapes in the checkpoint and in the network, if they differ."""
        own = self._own[key]
        if torch.nn.parameter.is_lazy(own):
            return None
        shapes = tuple(self._leaves[name].value.shape), tuple(own.shape)
        return shapes if shapes[0] != shapes[1] else None

    def _chosen(self, fitting: Sequence[Weights]) -> Weights:
        """The weights that are meant, of those that fit; ``SpecError`` if that is not clear."""
        used = {name for weights in fitting for name in weights.keys.values()}
        if self._wanted is not None:
            fitting = self._named(fitting, self._wanted)
        different = self._different(fitting)
        if len(different) > 1:
            raise self._several([weights.name for weights in different])
        strangers = [self._strangers(weights, used) for weights in fitting]
        rank = [(bool(rest), w.naming, -len(w.prefix)) for w, rest in zip(fitting, strangers, strict=True)]
        best = rank.index(min(rank))
        if strangers[best]:
            raise self._too_much(fitting[best], strangers[best])
        return fitting[best]

    def _named(self, fitting: Sequence[Weights], wanted: str) -> list[Weights]:
        """Those of a name, or below it."""
        named = [weights for weights in fitting if _is_below(weights.name, wanted)]
        if not named:
            others = " or ".join(json.dumps(weights.name) for weights in self._different(fitting))
            raise SpecError(
                f"model.weights_key: {self._file} has no weights {json.dumps(wanted)} that fit the model, expected "
                f"{others}"
            )
        exact = [weights for weights in named if weights.name == wanted]
        return exact if exact and len(self._different(named)) > 1 else named

    def _several(self, names: Sequence[str]) -> SpecError:
        return SpecError(
            f"model.weights: {self._file} holds {len(names)} different sets of weights that fit the model: "
            f"{', '.join(map(json.dumps, names))}. Say which one to take: model.weights_key: {json.dumps(names[0])}"
        )

    def _strangers(self, weights: Weights, used: set[str]) -> list[str]:
        """Tensors of which the network should know, as they are among its own.

        Those are in a dict with its tensors and begin with the prefix; or with none, if that may be
        the name of a part of a larger network.
        """
        containers = {self._leaves[name].container for name in weights.keys.values()}
        rest = [name for name, leaf in self._leaves.items() if leaf.container in containers and name not in used]
        inners = [weights.prefix.removeprefix(c) for c in containers if weights.prefix.startswith(c)]
        inner = max(inners, key=len, default="")
        is_whole = self._wanted is not None or _WHOLES.issuperset(inner.split(".")[:-1])
        return [name for name in rest if name.startswith(weights.prefix) or not is_whole]

    def _different(self, fitting: Sequence[Weights]) -> list[Weights]:
        """The first of each set of equal weights."""
        kept: list[Weights] = []
        for weights in fitting:
            if not any(self._are_equal(weights, other) for other in kept):
                kept.append(weights)
        return kept

    def _are_equal(self, one: Weights, other: Weights) -> bool:
        return all(
            _is_same(self._leaves[name].value, self._leaves[other.keys[key]].value)
            for key, name in one.keys.items()
            if key in other.keys
        )

    def _load(self, weights: Weights) -> None:
        try:
            self._network.load_state_dict(self._state_of(weights))
        except RuntimeError as error:
            raise SpecError(f"model.weights: {self._file} does not fit the model: {told(error, self._spec)}") from error
        rest = len(self._leaves) - len(weights.keys)
        log.info(
            "weights %s: %d tensors%s%s",
            self._file,
            len(weights.keys),
            f", {weights.prefix} removed from the names that they have there" if weights.prefix else "",
            f"; {rest} others are not used" if rest else "",
        )

    def _state_of(self, weights: Weights) -> OrderedDict[str, Any]:
        """A ``state_dict`` of the network, with what PyTorch has noted in the checkpoint's."""
        state = OrderedDict((key, self._leaves[name].value) for key, name in weights.keys.items())
        for key in self._own:  # tensors that the network has twice, and the checkpoint once
            twins = [] if key in state else [k for k in weights.keys if self._storages[k] == self._storages[key]]
            if twins:
                state[key] = state[twins[0]]
        for key in self._state.keys() - self._own.keys():
            if (extra := self._leaves.get(f"{weights.prefix}{_unwrapped(key)}")) is not None:
                state[key] = extra.value
        leaf = self._leaves[next(iter(weights.keys.values()))]
        within = weights.prefix.removeprefix(leaf.container)
        versions = {
            name.removeprefix(within): version
            for name, version in leaf.versions.items()
            if f"{name}.".startswith(within)
        }
        if versions and weights.prefix.startswith(leaf.container):
            state._metadata = versions  # type: ignore[attr-defined]
        return state

    def _loaded_by_itself(self) -> bool:
        """Whether the network can load one of the dicts; it may rename keys as it does."""
        able = [prefix for prefix in self._states() if self._loads(prefix)]
        if len(able) > 1:
            raise self._several([prefix[:-1] for prefix in able])
        if able:
            self._network.load_state_dict(self._below(able[0]))
            log.info("weights %s: %s, loaded by the network itself", self._file, able[0][:-1] or "all of it")
        return bool(able)

    def _states(self) -> list[str]:
        """Prefixes of what may be a whole ``state_dict``: the dicts, without names of wholes."""
        containers = dict.fromkeys(leaf.container for leaf in self._leaves.values())
        found = []
        for prefix in containers:
            if any(part.isdigit() for part in prefix.split(".")):  # of an optimizer
                continue
            while len(first := {key.partition(".")[0] for key in self._below(prefix)}) == 1 and first <= _WHOLES:
                prefix = f"{prefix}{first.pop()}."
            if self._wanted is None or _is_below(prefix[:-1], self._wanted):
                found.append(prefix)
        return found

    def _below(self, prefix: str) -> OrderedDict[str, Any]:
        """The tensors of one dict, without a prefix of their names."""
        state: OrderedDict[str, Any] = OrderedDict()
        for name, leaf in self._leaves.items():
            if name.startswith(prefix) and prefix.startswith(leaf.container):
                state[name.removeprefix(prefix)] = leaf.value
                if prefix == leaf.container:
                    state._metadata = dict(leaf.versions)  # type: ignore[attr-defined]
        return state

    def _loads(self, prefix: str) -> bool:
        try:
            copy.deepcopy(self._network).load_state_dict(self._below(prefix))
        except Exception:  # told in terms of the closest
            return False
        return True

    # --------------------------------------------------------------------------- what does not fit

    def _misfit(self, candidates: Sequence[Weights]) -> SpecError:
        """Why nothing fits, by the closest."""
        wanted = self._wanted
        candidates = [w for w in candidates if wanted is None or _is_below(w.name, wanted)]
        if not candidates:
            where = "" if wanted is None else f" below model.weights_key {wanted!r}"
            return self._unfit(
                f"it has none of the network's {len(self._own)} keys{where}, such as {next(iter(self._own), '')}, but "
                f"{_few(list(self._leaves))}"
            )
        closest = max(candidates, key=lambda w: (len(w.keys) - len(self._misshapen(w)), len(w.keys)))
        missing, misshapen = self._missing(closest), self._misshapen(closest)
        if not missing:
            key = misshapen[0]
            shapes = self._shapes(key, closest.keys[key])
            assert shapes is not None
            more = f" (and {len(misshapen) - 1} more)" if len(misshapen) > 1 else ""
            return self._unfit(f"{closest.keys[key]} has the shape {shapes[0]}, the network's {key} {shapes[1]}{more}")
        unknown = self._strangers(closest, set(closest.keys.values()))
        more = f" and has {_few(unknown)}, which the network has not" if unknown else ""
        return self._unfit(f"the closest in it, {closest.name or 'its own keys'}, lacks {_few(missing)}{more}")

    def _too_much(self, weights: Weights, strangers: Sequence[str]) -> SpecError:
        inside = [name for name in strangers if name.startswith(weights.prefix)]
        way = f"; or, if these are the weights, model.weights_key: {json.dumps(weights.name)}" if not inside else ""
        return self._unfit(f"it has {_few(strangers)}, which the network has not", way)

    def _unfit(self, why: str, way: str = "") -> SpecError:
        return SpecError(
            f"model.weights: {self._file} does not fit the model: {why}. A function load_model(weights) in "
            f"{self._spec.model.title} can load it in its own way{way}"
        )


def _leaves(content: Any, file: Path) -> dict[str, _Leaf]:
    """All tensors of a checkpoint, by their dotted names."""
    found: dict[str, _Leaf] = {}
    seen: dict[int, Any] = {}  # with the objects, so that no other gets the id of one
    todo: list[tuple[str, Any]] = [("", content)]
    while todo:
        place, value = todo.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, torch.nn.Module):
            value = value.state_dict()
        versions = getattr(value, "_metadata", None) or {}
        inner = []
        for key, part in _items(value):
            name = f"{place}{key}"
            if isinstance(part, np.ndarray) and part.dtype.kind in "fiub":
                part = torch.from_numpy(part)
            if isinstance(part, torch.Tensor) or name.endswith(_EXTRA):
                if name in found:
                    raise SpecError(f"model.weights: {file} holds two tensors {name}, one of them in a dict of its own")
                if isinstance(value, Mapping):  # what has no name fits no key
                    found[name] = _Leaf(part, place, versions)
            elif isinstance(part, Mapping | list | tuple | torch.nn.Module):
                inner.append((f"{name}.", part))
        todo += reversed(inner)
    return found


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()


def _found(names: Mapping[str, str], leaves: Mapping[str, _Leaf], naming: int) -> list[Weights]:
    """The prefixes below which there are tensors for keys of the network.

    Args:
        names: The network's keys, by the names that they may have in the checkpoint.
        leaves: The tensors of the checkpoint.
        naming: Number of parts that are left out of the names.
    """
    found: dict[str, dict[str, str]] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf.value, torch.Tensor):
            continue
        parts = name.split(".")
        for cut in range(len(parts)):
            rest = ".".join(parts[cut:])
            own = names.get(rest)
            key = own or names.get(_unwrapped(rest))
            if key is None:
                continue
            keys = found.setdefault("".join(f"{part}." for part in parts[:cut]), {})
            keys[key] = name if own else keys.get(key, name)
    return [Weights(prefix, keys, naming) for prefix, keys in found.items()]


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _storage(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two keys of a network have in common if they are the same tensor."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.data_ptr() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.shape, tensor.stride())


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _is_below(name: str, wanted: str) -> bool:
    return name == wanted or wanted == "" or name.startswith(f"{wanted}.")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
