"""A pod as its node sees it: its record, its environment and its mounts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cluster.containers import Container, Log
from tests.support.cluster.objects import SLEEP, TOKEN_VOLUME, Object, quantity

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][\w.-]*)\)")
_SCRATCH = ("/tmp", "/dev/shm")


@dataclass(eq=False)
class Pod:
    """A pod that there is, or was. Times are in seconds since the epoch."""

    object: Object
    """The object as the API gives it."""
    log: Log
    started: float | None = None
    """When its main process started."""
    ended: float | None = None
    """When its main process ended."""
    gone: bool = False
    """Whether the object is deleted."""
    container: Container | None = None
    node: str | None = None
    text_object: str = ""
    """The object as last changed, as JSON."""
    life: asyncio.Task[None] | None = None
    ending: Object = field(default_factory=dict)
    """What the status is to say of the pod's end beside the exit code."""
    out_of_memory: bool = False
    no_log: str | None = None
    """Why the node has no log of the pod any more; None while it has."""
    cut_off: bool = False
    """Whether the pod was on a node when that lost its power."""
    out_of_sight: bool = False
    """Whether the node will not find the container when it looks for its end."""
    sandbox: bool = False
    """Whether the pod has what its container is started in."""
    told_to_end: bool = False
    """Whether the kubelet ends the pod: its status then tells of the end in one step."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing runs in the pod any more and its phase says so."""
    released: bool = False
    mounted: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The pod's name."""
        return str(self.object["metadata"]["name"])

    @property
    def folder_name(self) -> str:
        """Name of the folder that has the pod's own folders."""
        return f"{self.name}-{self.object['metadata']['uid'][:8]}"

    @property
    def namespace(self) -> str:
        """The pod's namespace."""
        return str(self.object["metadata"]["namespace"])

    @property
    def labels(self) -> dict[str, str]:
        """The pod's labels, by key."""
        return dict(self.object["metadata"].get("labels") or {})

    @property
    def text(self) -> str:
        """The pod's log, as far as it is kept."""
        return self.log.text

    @property
    def spec(self) -> Object:
        """The pod's spec."""
        return dict(self.object["spec"])

    @property
    def box(self) -> Object:
        """The spec of the pod's only container."""
        return dict(self.object["spec"]["containers"][0])

    @property
    def phase(self) -> str:
        """The pod's phase, such as ``Running``."""
        return str(self.object["status"]["phase"])

    @property
    def over(self) -> bool:
        """Whether the phase is Succeeded or Failed."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def sleep(self) -> float | None:
        """Seconds for which the pod is only simulated; None: it really runs."""
        seconds = (self.object["metadata"].get("annotations") or {}).get(SLEEP)
        return None if seconds is None else float(seconds)

    def copy(self) -> Object:
        """A copy of the object as last changed."""
        return dict(json.loads(self.text_object))


@dataclass
class Contents:
    """What pods refer to, each by (namespace, name)."""

    secrets: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    config_maps: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    claims: dict[tuple[str, str], Path] = field(default_factory=dict)

    def secret(self, namespace: str, name: str) -> dict[str, bytes]:
        """The content of a secret. ``NotReady``: there is none of that name."""
        if (namespace, name) not in self.secrets:
            raise NotReady(f'secret "{name}" not found')
        return self.secrets[namespace, name]

    def config_map(self, namespace: str, name: str) -> dict[str, bytes]:
        """The content of a config map. ``NotReady``: there is none of that name."""
        if (namespace, name) not in self.config_maps:
            raise NotReady(f'configmap "{name}" not found')
        return self.config_maps[namespace, name]


class NotReady(Exception):
    """What a pod needs isn't there, or not yet. Its text is the kubelet's."""


def environment_of(pod: Pod, contents: Contents, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of the container. ``NotReady``: something that it refers to is missing."""
    found = dict(base)
    for source in pod.box.get("envFrom") or []:
        reference, read = _source(source, contents, "Ref")
        with _optional(reference):
            for key, value in read(pod.namespace, reference["name"]).items():
                found[source.get("prefix", "") + key] = value.decode()
    for variable in pod.box.get("env") or []:
        if "valueFrom" not in variable:
            found[variable["name"]] = expanded(variable.get("value", ""), found)
            continue
        reference = variable["valueFrom"].get("secretKeyRef") or variable["valueFrom"].get("configMapKeyRef") or {}
        with _optional(reference):
            found[variable["name"]] = _value_from(variable["valueFrom"], pod, contents)
    return found


@contextlib.contextmanager
def _optional(reference: Object) -> Iterator[None]:
    try:
        yield
    except NotReady:
        if not reference.get("optional"):
            raise


def _source(source: Object, contents: Contents, ending: str) -> tuple[Object, Callable[[str, str], dict[str, bytes]]]:
    if reference := source.get(f"secret{ending}"):
        return reference, contents.secret
    return source[f"configMap{ending}"], contents.config_map


def _value_from(source: Object, pod: Pod, contents: Contents) -> str:
    if reference := source.get("fieldRef"):
        return _field(pod.object, reference["fieldPath"])
    if reference := source.get("resourceFieldRef"):
        kind, _, name = reference["resource"].partition(".")
        amount = (pod.box["resources"].get(kind) or {}).get(name, "0")
        return str(math.ceil(quantity(amount) / (quantity(reference.get("divisor", "1")) or 1)))
    reference, read = _source(source, contents, "KeyRef")
    data = read(pod.namespace, reference["name"])
    if reference["key"] not in data:
        kind = "Secret" if "secretKeyRef" in source else "ConfigMap"
        raise NotReady(f"couldn't find key {reference['key']} in {kind} {pod.namespace}/{reference['name']}")
    return data[reference["key"]].decode()


def _field(item: Object, path: str) -> str:
    if keyed := re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path):
        return str((item["metadata"].get(keyed[1]) or {}).get(keyed[2], ""))
    found: Any = item
    for key in path.split("."):
        found = found.get(key, "")
    return str(found)


def expanded(text: str, values: Mapping[str, str]) -> str:
    """``text`` with ``$(NAME)`` replaced where NAME is known, and ``$$`` by one dollar sign."""

    def replacement(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else values.get(found[1], found[0])

    return _REFERENCE.sub(replacement, text)


def mount(pod: Pod, contents: Contents, root: Path, in_use: dict[Path, int]) -> str | None:
    """Do the pod's mounts; why the container can't be made, or None.

    ``in_use`` counts pods by path: there is one file system for all, so several may mount the same
    secret. ``NotReady``: something that is to be mounted is missing.
    """
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
    for mounted in pod.box.get("volumeMounts") or []:
        volume, path = volumes[mounted["name"]], Path(mounted["mountPath"])
        if mounted["name"].startswith(TOKEN_VOLUME) or ("emptyDir" in volume and str(path) in _SCRATCH):
            continue
        if "secret" in volume or "configMap" in volume:
            if problem := _mount_files(pod, volume, path, contents, root, in_use):
                return problem
            continue
        if problem := _in_place(pod, volume, path, contents):
            return f"{problem} (volume {volume['name']!r}; this cluster is a test double without mount namespaces)"
    return None


def _in_place(pod: Pod, volume: Object, path: Path, contents: Contents) -> str | None:
    if "hostPath" in volume:
        source = Path(volume["hostPath"]["path"])
        if "Create" in volume["hostPath"].get("type", ""):
            source.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            raise _not_mounted(volume, f"hostPath type check failed: {source} does not exist")
    elif "persistentVolumeClaim" in volume:
        source = contents.claims[pod.namespace, volume["persistentVolumeClaim"]["claimName"]]
    else:
        return f"can't mount {sorted(set(volume) - {'name'})} at {path}"
    return None if source == path else f"{source} must be mounted at its own path, not at {path}"


def _mount_files(
    pod: Pod, volume: Object, path: Path, contents: Contents, root: Path, in_use: dict[Path, int]
) -> str | None:
    if root not in path.parents:
        return f"secrets and config maps must be mounted below {root}, not at {path}"
    kind = "secret" if "secret" in volume else "configMap"
    source = volume[kind]
    data: dict[str, bytes] = {}
    with _optional(source):
        read = contents.secret if kind == "secret" else contents.config_map
        try:
            data = read(pod.namespace, source["secretName" if kind == "secret" else "name"])
        except NotReady as missing:
            raise _not_mounted(volume, str(missing)) from missing
    items = source.get("items") or [{"key": key, "path": key} for key in data]
    path.mkdir(parents=True, exist_ok=True)
    for item in items:
        if item["key"] not in data:
            raise _not_mounted(volume, f"references non-existent {kind} key: {item['key']}")
        file = path / item["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another pod may be reading it there: replaced as a whole.
        new = file.with_name(f".{file.name}.new")
        new.write_bytes(data[item["key"]])
        new.chmod(source.get("defaultMode", 0o644))
        new.replace(file)
    pod.mounted.append(path)
    in_use[path] = in_use.get(path, 0) + 1
    return None


def _not_mounted(volume: Object, why: str) -> NotReady:
    return NotReady(f'MountVolume.SetUp failed for volume "{volume["name"]}" : {why}')


def unmount(pod: Pod, in_use: dict[Path, int]) -> None:
    """Remove the secrets and config maps that no pod needs any more."""
    for path in pod.mounted:
        in_use[path] -= 1
        if not in_use[path]:
            shutil.rmtree(path, ignore_errors=True)
    pod.mounted.clear()
