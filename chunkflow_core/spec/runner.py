"""What runs the tasks of a volume's DAG: the ``runner`` section of the spec.

Only the shape is checked here; what a cluster makes of it is the operators' to know. Imported
whenever Airflow parses its DAG files, so it stays light.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Json = dict[str, Any]
"""A Kubernetes object as it would stand in a manifest."""

_UNITS = {"": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate(("k" if base == 1000 else "K", "M", "G", "T", "P"), start=1)
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(k|Ki|[MGTP]i?)?", re.ASCII)
_VARIABLE_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# names of objects, keys and values of labels:
# https://kubernetes.io/docs/concepts/overview/working-with-objects/names/
_DOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_WORD = r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"({_DOMAIN}/)?{_WORD}", re.ASCII)
_RESERVED = ("CHUNKFLOW_SPEC", "CHUNKFLOW_CPUS")
OWN_LABELS = "chunkflow/"
"""Prefix of the labels that this project gives to pods."""


def parse_memory(quantity: str) -> int:
    """Bytes of a quantity such as ``16Gi`` or ``500M``; ``ValueError`` if it is none.

    Source: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
    """
    match = _QUANTITY.fullmatch(quantity)
    size = int(Decimal(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 2**20:
        raise ValueError('expected an amount such as "16Gi" or "500M", at least "1Mi"')
    return size


def _memory(value: Any) -> Any:
    parse_memory(value if isinstance(value, str) else "")
    return value


def _matching(pattern: str, expected: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"expected {expected}")
        return value

    return BeforeValidator(check)


def _folder(value: Any) -> Any:
    ok = isinstance(value, str) and value.startswith("/") and ".." not in value.split("/") and ":" not in value
    if not ok or value.endswith("/"):
        raise ValueError('expected an absolute path such as "/data", without .. or : in it or / at its end')
    return value


def _sub_path(value: Any) -> Any:
    if not isinstance(value, str) or not value or value.startswith("/") or ".." in value.split("/"):
        raise ValueError('expected a path within the volume such as "em/raw", without .. in it')
    return value


def _annotations(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("expected keys and values")
    for key, text in value.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"expected keys such as example.org/team, got {key}")
        if not isinstance(text, str):
            raise ValueError(f"expected texts as values, in quotes; got {key}: {text!r}")
    return value


def _labels(value: Any) -> Any:
    for key, text in _annotations(value).items():
        if text and not re.fullmatch(_WORD, text, re.ASCII):
            raise ValueError(f"expected values of up to 63 letters, digits, - _ . in between; got {key}: {text!r}")
    return value


def _pod_labels(value: Any) -> Any:
    for key in _labels(value):
        if key.startswith(OWN_LABELS):
            raise ValueError(f"expected keys that don't begin with {OWN_LABELS}, got {key}")
    return value


def _variables(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("expected names and values")
    for name in value:
        if not isinstance(name, str) or not _VARIABLE_NAME.fullmatch(name) or name.startswith(_RESERVED):
            raise ValueError(f"expected names of environment variables, other than {', '.join(_RESERVED)}; got {name}")
    return value


def _text_variables(value: Any) -> Any:
    for name, text in _variables(value).items():
        if not isinstance(text, str):
            raise ValueError(f"expected texts as values, in quotes; got {name}: {text!r}")
    return value


Memory = Annotated[str, BeforeValidator(_memory)]
Name = Annotated[
    str,
    _matching(rf"(?=.{{1,253}}\Z){_DOMAIN}", "up to 253 lower-case letters, digits, dashes and dots"),
]
Namespace = Annotated[
    str, _matching(r"(?=.{1,63}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?", "up to 63 lower-case letters, digits and dashes")
]
Image = Annotated[
    str,
    _matching(r"[a-z0-9]+([._:/@-]+[A-Za-z0-9]+)*", 'a container image such as "example.org/lab/chunkflow-worker:1.0"'),
]
SecretKeyName = Annotated[
    str, _matching(r"[-\w.]{1,253}", "a key of the Secret: letters, digits, dots, dashes and underscores")
]
Resource = Annotated[str, _matching(rf"{_DOMAIN}/{_WORD}", 'a resource of nodes such as "nvidia.com/gpu"')]
Folder = Annotated[str, BeforeValidator(_folder)]
Labels = Annotated[dict[str, str], BeforeValidator(_labels)]
Text = Annotated[str, Field(min_length=1)]
Spot = Literal["never", "allowed", "required"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Runner(_Section):
    parallel: int | None = Field(None, ge=1)
    """Number of blocks at a time at most.

    Processes share the worker's CPUs out among so many, so set it to 1 if each block is to have
    all. Pods are bounded by ``runner.pool``, which has to include deferred tasks. Default: 16.
    """
    pool: Text = "default_pool"
    """Airflow pool of the inference tasks. It must exist, or they wait for ever."""
    retries: int = Field(3, ge=0)
    """Number of times that a failed task is tried again."""
    retry_delay: float = Field(30.0, ge=0)
    """Seconds before the first retry; doubles with each."""


class LocalRunner(_Runner):
    """Tasks are processes on the Airflow worker."""

    kind: Annotated[Literal["local"], _matching("local", "local or kubernetes")] = "local"
    """What does the tasks of the DAG: ``local`` are processes on the Airflow worker, ``kubernetes``
    are pods.
    """

    @model_validator(mode="before")
    @classmethod
    def _nothing_of_pods(cls, value: Any) -> Any:
        """Refuse keys of pods, by one message, where only ``kind`` is missing or misspelt."""
        of_pods = [key for key in value if key in KubernetesRunner.model_fields] if isinstance(value, dict) else []
        if first := next((key for key in of_pods if key not in cls.model_fields), None):
            raise ValueError(f"kind: {value.get('kind', 'local')}: expected kubernetes, as {first} is for pods")
        return value


class SecretKey(_Section):
    """One value of a Kubernetes Secret."""

    secret: Name
    """Name of the Secret."""
    key: SecretKeyName
    """Key of the value within it."""


class PodVolume(_Section):
    """A folder that pods see.

    Exactly one of ``claim``, ``host_path``, ``secret``, ``config_map`` and ``memory`` is given.
    """

    mount: Folder
    """Absolute path where pods see the folder."""
    claim: Name | None = None
    """Name of a PersistentVolumeClaim."""
    host_path: Folder | None = None
    """A folder of the node."""
    secret: Name | None = None
    """Name of a Secret, each key a file: CloudVolume's credentials, for instance."""
    config_map: Name | None = None
    """Name of a ConfigMap, each key a file."""
    memory: Memory | None = None
    """Size of an empty folder in memory, ``/dev/shm`` for instance.

    It counts towards the pod's memory.
    """
    sub_path: Annotated[str, BeforeValidator(_sub_path)] | None = None
    """Part of the volume that pods see, relative to its root."""
    read_only: bool = False
    """Whether pods can't write to it."""

    @model_validator(mode="after")
    def _one_source(self) -> PodVolume:
        sources = ("claim", "host_path", "secret", "config_map", "memory")
        if sum(getattr(self, source) is not None for source in sources) != 1:
            raise ValueError(f"mount: {self.mount}: expected exactly one of {', '.join(sources)}")
        return self


class PodResources(_Section):
    """What the pods of a stage need, and which nodes they may run on."""

    cpu: float = Field(1.0, gt=0)
    """Number of CPUs that are reserved, and that the task uses; there is no limit."""
    memory: Memory = "2Gi"
    """Memory that is reserved, and the limit.

    ``Ki``, ``Mi``, ``Gi``, ``Ti`` count in 1024s, ``k``, ``M``, ``G``, ``T`` in 1000s.
    """
    memory_max: Memory | None = None
    """How far ``memory`` grows when pods are killed for memory. Default: 4 × ``memory``."""
    gpu: int = Field(0, ge=0)
    """Number of GPUs of a pod. For inference on CPUs: ``gpu: 0``."""
    gpu_resource: Resource = "nvidia.com/gpu"
    """What the cluster calls its GPUs."""
    ephemeral_storage: Memory | None = None
    """Disk of the node: reserved, and the limit."""
    node_selector: Labels = {}
    """Labels that nodes must have."""
    tolerations: list[Json] = []
    """Tolerations as in a pod's manifest. GPU pods tolerate the taint ``nvidia.com/gpu``."""
    affinity: Json = {}
    """Affinity as in a pod's manifest."""
    spot: Spot = "never"
    """Nodes that the cloud may take back: ``allowed`` tolerates their taints, ``required`` takes no
    others; known are those of GKE, EKS, Karpenter and AKS. ``never`` tolerates nothing, but where
    such nodes have no taint (EKS, Karpenter: by default) only a selector or an affinity keeps pods
    off them.
    """
    priority_class: Name | None = None
    """PriorityClass of the pods."""
    deadline: int | None = Field(None, ge=1)
    """Seconds after which a pod is ended, and the block retried; pulling the image counts."""

    @model_validator(mode="after")
    def _memory_order(self) -> PodResources:
        if self.memory_max is not None and parse_memory(self.memory_max) < parse_memory(self.memory):
            raise ValueError(f"memory_max: {self.memory_max} is less than memory: {self.memory}")
        return self

    @property
    def largest_memory(self) -> int:
        """Bytes that ``memory`` may grow to."""
        return parse_memory(self.memory_max) if self.memory_max else 4 * parse_memory(self.memory)


class InferResources(PodResources):
    """Needs of inference pods: other defaults, also where a spec says only some of them."""

    cpu: float = Field(4.0, gt=0)
    memory: Memory = "16Gi"
    gpu: int = Field(1, ge=0)


class KubernetesRunner(_Runner):
    """Tasks are pods of a Kubernetes cluster."""

    kind: Literal["kubernetes"]
    """``kubernetes``: tasks are pods."""
    image: Image
    """Container image with this project in it."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled: ``Always``, ``IfNotPresent``, ``Never``. Default: the cluster's."""
    image_pull_secrets: list[Name] = []
    """Names of Secrets for the registry."""
    namespace: Namespace | None = None
    """Namespace of the pods. Default: the connection's, or the worker's."""
    connection: Text = "kubernetes_default"
    """Airflow connection to the cluster."""
    deferrable: bool = True
    """Whether tasks of blocks leave their worker while a pod runs, and the triggerer watches it;
    the other steps do after 15 s. Otherwise each task holds a worker's slot.
    """
    poll_interval: float = Field(15.0, gt=0)
    """Seconds between looks at a pod."""
    infer: InferResources = InferResources()
    """Pods of inference, and of ``prepare`` and ``verify``, which run the model too."""
    blend: PodResources = PodResources()
    """Pods of blending, and of the other steps; the same keys."""
    memory_growth: float = Field(2.0, gt=1)
    """Factor of the memory of a retry after a pod was killed for memory."""
    interruptions: int = Field(20, ge=0)
    """Number of a task's pods that may be evicted, preempted or lost before that counts as a failed
    try.
    """
    pending_timeout: float = Field(7 * 86400.0, gt=0)
    """Seconds that a pod may wait for a node, or for quota: a week, as waiting for others is no
    failure.
    """
    start_timeout: float = Field(600.0, gt=0)
    """Seconds that a pod with a node may take to start: pulling the image, mounting volumes."""
    api_timeout: float = Field(1800.0, gt=0)
    """Seconds that the cluster's API may be out of reach."""
    termination_grace: int = Field(30, ge=0)
    """Seconds between asking a pod to end and killing it."""
    service_account: Name | None = None
    """ServiceAccount of the pods; its token is not mounted. Default: the namespace's."""
    run_as_user: int | None = Field(None, ge=1)
    """User id of the pods' processes, not 0. Default: the image's."""
    fs_group: int | None = Field(None, ge=1)
    """Id of the group that owns mounted volumes."""
    volumes: list[PodVolume] = []
    """Folders that pods see: each with ``mount`` and one of ``claim``, ``secret``, ``config_map``,
    ``host_path``, ``memory``.
    """
    env: Annotated[dict[str, str], BeforeValidator(_text_variables)] = {}
    """Environment variables; ``$(NAME)`` in a value is that of an earlier one, or of one with a
    Secret's value; ``$$`` is ``$``.
    """
    secret_env: Annotated[dict[str, SecretKey], BeforeValidator(_variables)] = {}
    """Environment variables with values of Secrets: ``NAME: {secret: …, key: …}``."""
    env_from: list[Name] = []
    """Secrets whose keys all become environment variables."""
    labels: Annotated[dict[str, str], BeforeValidator(_pod_labels)] = {}
    """Labels of every pod.

    Ours are ``chunkflow/volume``, ``chunkflow/stage``, ``chunkflow/block`` (``z_y_x``).
    """
    annotations: Annotated[dict[str, str], BeforeValidator(_annotations)] = {}
    """Annotations of every pod."""
    pod_template: Text | None = None
    """Manifest to start from, relative to the spec's folder.

    A ``.yaml`` file there would count as a spec: call it ``.yml``.
    """

    @field_validator("volumes")
    @classmethod
    def _one_volume_a_mount(cls, volumes: list[PodVolume]) -> list[PodVolume]:
        mounts = [volume.mount for volume in volumes]
        for mount in mounts:
            if mounts.count(mount) > 1:
                raise ValueError(f"{mount} is the mount of two volumes")
        return volumes

    @model_validator(mode="after")
    def _one_value_a_variable(self) -> KubernetesRunner:
        if twice := sorted(self.env.keys() & self.secret_env.keys()):
            raise ValueError(f"secret_env: {', '.join(twice)}: expected variables that env doesn't set")
        return self

    @model_validator(mode="after")
    def _pods_are_bounded_by_a_pool(self) -> KubernetesRunner:
        if self.parallel is not None and self.deferrable:
            raise ValueError(
                f"parallel: {self.parallel}: Airflow does not count tasks that have left their worker; make a pool "
                "that includes deferred tasks (airflow pools set NAME SLOTS TEXT --include-deferred) and name it as "
                "runner.pool"
            )
        return self


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "kubernetes" if kind == "kubernetes" else "local"


RunnerSpec = Annotated[
    Annotated[LocalRunner, Tag("local")] | Annotated[KubernetesRunner, Tag("kubernetes")], Discriminator(_kind)
]
RUNNERS: dict[str, type[BaseModel]] = {"local": LocalRunner, "kubernetes": KubernetesRunner}
