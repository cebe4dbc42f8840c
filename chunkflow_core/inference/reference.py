"""Reference patches: does this machine give the bits of the one that prepared the volume?

Another kind of processor, a GPU instead of a CPU, or another version of a library can give other
last bits, and nothing in the fingerprint tells of them. So ``prepare`` runs a few synthetic
patches, and stores digests of what the network gives. Each process that runs patches does so with
one of them before its first block, and compares.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import DataError, SpecError
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.inference.patches import Patches
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.digests import checksum
from chunkflow_core.storage.files import open_files, put_file, storage_errors

log = logging.getLogger(__name__)

_NAME = "reference.json"
_FACT = "other_bits"
"""Name of what receipts say of it."""
_EDGES = (1, 4, 16)
"""Size of the coarse grains of each reference patch, in voxels along each axis."""
_COARSE = 3
"""Weight of the coarse grains; that of the fine ones, a voxel each, is 1."""
_HIGHEST = 2**16 - 1

_X86_FEATURES = ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
_ARM_FEATURES = ("asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm")
_CPU_FEATURES = (*_X86_FEATURES, *_ARM_FEATURES)
"""Features of processors, in Linux's words, by which libraries choose their loops."""
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
"""Environment variables by which libraries are told to compute otherwise."""


@dataclass(frozen=True)
class Reference:
    """What a network gives for the reference patches, and on what machine."""

    digests: tuple[str, ...]
    """Digest of each patch's raw output."""
    environment: dict[str, str]
    """What may decide a network's last bits: processor, device, versions."""
    host: str
    time: str
    """When it was made, in ISO 8601, UTC."""

    def differences(self, environment: Mapping[str, str]) -> list[str]:
        """What differs in another environment, a line each, with the value here and there."""
        return [
            f"{key}: {self.environment.get(key, 'not set')}, now {environment.get(key, 'not set')}"
            for key in dict.fromkeys([*self.environment, *environment])
            if self.environment.get(key) != environment.get(key)
        ] or ["nothing that is on record"]


class ReferencePatches:
    """The reference of a fingerprint, and how this process's engine compares with it."""

    def __init__(self, spec: VolumeSpec, path: str, load: Callable[[], Engine]) -> None:
        """Read and run nothing yet.

        Args:
            spec: The volume.
            path: Address of the fingerprint's folder in the exchange.
            load: Gives the engine, whatever it gives for the reference patches.
        """
        self._spec, self._path, self._patches = spec, path, Patches(spec, load)
        self._compared = False
        self._reference: Reference | None = None
        self.differences: list[str] = []
        """What differs here from the machine of the reference, if the bits do; else empty."""

    @property
    def runs(self) -> list[Callable[[], str]]:
        """What runs each of the reference patches, and returns the digest of its output."""
        return [partial(self._given, number) for number in range(len(_EDGES))]

    def here(self, digests: Sequence[str]) -> Reference:
        """The reference that this machine gives, from what all of ``runs`` have returned."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return Reference(tuple(digests), _environment(self._patches.engine), socket.gethostname(), time)

    def stored(self) -> Reference | None:
        """The reference that ``prepare`` has stored; None if there is none.

        Raises:
            DataError: There is a file that is none.
            StorageError: The storage does not answer.
        """
        with storage_errors(f"reading {self._path}/{_NAME}"):
            content = open_files(self._path).get(_NAME)
        if content is None:
            return None
        try:
            fields: dict[str, Any] = json.loads(content)
            return Reference(**{**fields, "digests": tuple(fields["digests"])})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._path}/{_NAME} is damaged: delete it, and run `prepare` again") from error

    def store(self, here: Reference) -> None:
        """Store what this machine gives as the reference."""
        put_file(self._path, _NAME, json.dumps(asdict(here), indent=1).encode())
        self._take(here, lambda _: True)

    def compare(self, here: Reference) -> None:
        """Compare what this machine gives for all reference patches with the stored reference."""
        self._take(self.stored(), lambda reference: here.digests == reference.digests)

    def check(self) -> None:
        """Check that this machine gives the bits of the reference.

        One of its patches is run, unless this process has compared already. Without a reference, as
        in an exchange of an earlier version, there is nothing to compare with until the next
        ``prepare``, and nothing is refused.

        Raises:
            SpecError: It gives others, and the spec does not say that this may be.
        """
        if not self.is_other_machine:
            return
        what, lines = self.told, "\n  ".join(["What differs:", *self.differences])
        if self._spec.model.mixed_hardware:
            log.warning("%s. model.mixed_hardware: true lets it go on. %s", what, lines)
            return
        raise SpecError(
            f"{what}, and blocks of both would not fit together bit for bit. {lines}\n  "
            "Ways out: the same kind of machine, and the same versions, as there; or model.mixed_hardware: true, with "
            "which this is only a warning; or here `chunkflow-core prepare SPEC --overwrite` (in Airflow: "
            "other_model: overwrite in the trigger form), which discards what is done, and takes this machine's bits "
            "for the reference"
        )

    @property
    def is_other_machine(self) -> bool:
        """Whether this machine gives other bits than the reference has; False if there is none."""
        if not self._compared:
            self._take(self.stored(), self._gives)
            if self._reference is None:
                log.warning("%s has no reference patches: whether this machine gives other bits is unknown", self._path)
        return bool(self.differences)

    @property
    def told(self) -> str:
        """That this machine gives other bits than that of the reference, for a message."""
        assert self._reference is not None
        return (
            f"this machine gives other bits than the one that has prepared the volume ({self._reference.host}, "
            f"{self._reference.time})"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a receipt says of it: what differs, if the bits do."""
        return {_FACT: self.differences} if self.differences else {}

    def _take(self, reference: Reference | None, same: Callable[[Reference], bool]) -> None:
        differs = reference is not None and not same(reference)
        self.differences = reference.differences(_environment(self._patches.engine)) if reference and differs else []
        self._reference, self._compared = reference, True

    def _gives(self, reference: Reference) -> bool:
        """Whether the engine gives the reference's bits for one of its patches.

        Which one is left to chance: what one process overlooks, another one may see.

        Raises:
            SpecError: The engine gives other bits each time.
        """
        number = secrets.randbelow(len(_EDGES))
        _ = self._patches.engine  # in this thread, which others wait for while they load theirs
        with ThreadPoolExecutor(1) as pool:  # a thread that ends, as networks keep memory for each that has called
            given = pool.submit(self._given, number).result()
            if given == reference.digests[number]:
                return True
            again = pool.submit(self._given, number).result()
        if again != given:
            raise SpecError(
                f"model.path: {self._spec.model.path} gives other bits each time for the same patch, so that no block "
                "can be done again as it was: it leaves something to chance, or remembers earlier patches"
            )
        return False

    def _given(self, number: int) -> str:
        patch = reference_patch(number, self._spec.input_scale.channels, self._spec.patch_size)
        given = self._patches.given.sample(patch)
        return checksum(np.ascontiguousarray(self._patches.forward(given)).tobytes())


def has_other_bits(receipt: Receipt) -> bool:
    """Whether a receipt is of a machine that gives other bits than the reference has."""
    return _FACT in receipt.facts


def reference_patch(number: int, channels: int, size: Vector) -> NDArray[np.float32]:
    """A reference patch: float32 ``(channels, z, y, x)``, values from 0 to 1.

    It is noise, in fine and in coarse grains, and the same on every machine: nothing of the input,
    which may be edited, and no generator of a library's own, whose next version may give another.
    """
    edge = _EDGES[number]
    coarse = _noise(f"coarse {number}", (channels, *(-(-length // edge) for length in size)))
    for axis in (1, 2, 3):
        coarse = coarse.repeat(edge, axis=axis)
    z, y, x = size
    grains = _COARSE * coarse[:, :z, :y, :x] + _noise(f"fine {number}", (channels, *size))
    return grains.astype(np.float32) / np.float32((_COARSE + 1) * _HIGHEST)  # exact, but for the rounding at the end


def _noise(name: str, shape: Sequence[int]) -> NDArray[np.uint32]:
    """Integers from 0 to 2¹⁶ − 1, the same in any version of anything."""
    stream = hashlib.shake_256(name.encode()).digest(2 * int(np.prod(shape)))
    return np.frombuffer(stream, "<u2").reshape(shape).astype(np.uint32)


def _environment(engine: Engine) -> dict[str, str]:
    """What may decide a network's last bits here, by name."""
    model, features = _processor()
    facts = {
        **engine.description,
        "processor": model,
        "processor's features": features,
        "numpy": np.__version__,
        "chunkflow": _version(),
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return {key: str(value) for key, value in facts.items()}


def _processor() -> tuple[str, str]:
    """The processor's model, and those of its features that count."""
    known: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            known.setdefault(key.strip(), value.strip())
    features = set(known.get("flags", known.get("Features", "")).split())
    model = known.get("model name") or platform.processor() or platform.machine()
    return model, " ".join(feature for feature in _CPU_FEATURES if feature in features)


def _version() -> str:
    try:
        return version("chunkflow-airflow")
    except PackageNotFoundError:  # run from its sources
        return "unknown"
