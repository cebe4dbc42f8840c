"""The pods that do a volume's tasks, built from the ``runner`` section of its spec.

Pure: nothing here talks to a cluster.

Three say what a pod is like, the later before the earlier: the template (if there is one), the
``runner`` section, and what the task needs. What a template says of the pod as a whole (its
network, its service account's token, further containers and how they run) is its author's explicit
choice. What our own container is allowed is not: it is always as unprivileged as Pod Security's
profile ``restricted`` wants it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.spec.runner import OWN_LABELS, KubernetesRunner, PodResources, PodVolume
from operators.kubernetes.checks import problems
from operators.kubernetes.ends import BASE
from operators.kubernetes.placement import placement
from operators.kubernetes.template import read_template, split_containers, template_problems

Json = dict[str, Any]

COMMAND = ("python", "-m", "chunkflow_core.commands.first_process")
_LONGEST = 63
"""Characters of a DNS label, and of a label's value.

Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/
"""

# A block of half an hour is lost when its node is emptied to save money. Pods without a controller
# are taken for idle by some autoscalers, so each of the two is told.
# Sources: https://github.com/kubernetes/autoscaler/blob/master/cluster-autoscaler/FAQ.md
#          https://karpenter.sh/docs/concepts/disruption/#pod-level-controls
_UNDISTURBED = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}

# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
_UNPRIVILEGED = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
_NEVER_OURS = ("privileged", "procMount")

_HARMLESS = {
    "automountServiceAccountToken": False,  # a task needs nothing of the cluster's API
    "enableServiceLinks": False,  # a variable for every service of the namespace
}


def pod_manifest(
    runner: KubernetesRunner,
    *,
    folder: str,
    resources: PodResources,
    memory: int,
    name: str,
    labels: Mapping[str, str],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    avoided_nodes: Sequence[str] = (),
) -> Json:
    """The complete manifest of one pod; the same arguments give the same manifest.

    Args:
        runner: The spec's section, which ``check_runner`` has found good.
        folder: Folder of the spec, to which the template's path is relative.
        resources: What the pod needs (``runner.infer`` or ``runner.blend``).
        memory: Bytes, reserved and the limit: ``resources.memory``, or more after a pod was killed
            for memory.
        name: The pod's name.
        labels: Go before those of spec and template.
        arguments: Of the command, word by word; Kubernetes replaces nothing in them.
        environment: Variables of the task, taken literally too; they go before all others.
        avoided_nodes: Names of nodes that the pod gets only if there is no other.
    """
    template = read_template(runner, folder)
    old = template.get("metadata", {})
    # Where a pod is, is the runner section's to say: looked for elsewhere, it would count as gone.
    metadata: Json = {key: value for key, value in old.items() if key not in ("namespace", "generateName")}
    metadata["name"] = name
    if runner.namespace:
        metadata["namespace"] = runner.namespace
    metadata["labels"] = {**old.get("labels", {}), **runner.labels, **labels}
    metadata["annotations"] = {**_UNDISTURBED, **old.get("annotations", {}), **runner.annotations}

    spec: Json = template.get("spec", {})
    ours, others = split_containers(spec.get("containers", []))
    volumes, mounts = _volumes(runner.volumes)
    container = _container(ours, runner, resources, memory, arguments, environment, mounts)
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            **_HARMLESS,
            **spec,
            **_pod_settings(spec, runner, resources),
            **placement(spec, resources, avoided_nodes),
            **_unless_empty("volumes", _merged(spec.get("volumes", []), volumes, "name")),
            "containers": [container, *others],  # ours first: there Airflow's operator looks for it
        },
    }
    return deepcopy(manifest)  # the caller may change it: nothing of it is that of the next one


def check_runner(runner: KubernetesRunner, folder: str) -> None:
    """Check the Kubernetes objects that the user has written in the section, and its template.

    Made for being called whenever Airflow parses its DAG files: it imports the Kubernetes client
    only if there are such objects.

    Args:
        runner: The spec's section.
        folder: Folder of the spec, to which the template's path is relative.

    Raises:
        SpecError: Something is wrong with them; a line for each.
    """
    found: list[str] = []
    for stage, resources in (("infer", runner.infer), ("blend", runner.blend)):
        found += problems(resources.tolerations, "list[V1Toleration]", f"runner.{stage}.tolerations")
        if resources.affinity:
            found += problems(resources.affinity, "V1Affinity", f"runner.{stage}.affinity")
    if runner.pod_template is not None:
        found += template_problems(runner, folder)
    if found:
        raise SpecError("\n".join(found))


def pod_name(volume: str, stage: str, block: Vector | None, salt: str) -> str:
    """A readable name such as ``isbi-membrane-infer-0-1-2-3f9c2a1b``, made of these four only.

    It is a DNS label (lower-case letters, digits, dashes; at most 63), a long volume's name is cut.
    Others than these four give another name, even if they differ only in what a DNS label can't
    hold: that is what the end is for.
    """
    end = "-".join([stage, *map(str, block or ()), _digest(volume, stage, block, salt)])
    start = re.sub(r"[^a-z0-9]+", "-", volume.lower())[: _LONGEST - len(end) - 1].strip("-")
    return f"{start}-{end}" if start else end


def own_labels(volume: str, stage: str, block: Vector | None) -> dict[str, str]:
    """Labels of a volume's pods, or of those of one block; the same at every attempt."""
    labels = {
        "app.kubernetes.io/managed-by": "chunkflow",
        f"{OWN_LABELS}volume": _label_value(volume),
        f"{OWN_LABELS}stage": _label_value(stage),
    }
    return labels if block is None else {**labels, f"{OWN_LABELS}block": "_".join(map(str, block))}


# Our container.


def _container(
    template: Json,
    runner: KubernetesRunner,
    resources: PodResources,
    memory: int,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    mounts: list[Json],
) -> Json:
    kept = {k: v for k, v in template.items() if k not in ("restartPolicy", "restartPolicyRules", "envFrom")}
    env_from = template.get("envFrom", []) + [{"secretRef": {"name": secret}} for secret in runner.env_from]
    env = _merged(template.get("env", []), _variables(runner, resources, environment), "name")
    return {
        **kept,
        "name": BASE,
        "image": runner.image,
        **_unless_empty("imagePullPolicy", runner.image_pull_policy),
        "command": list(COMMAND),
        "args": [_literal(argument) for argument in arguments],
        **_unless_empty("env", env if resources.gpu else _merged([_NO_GPU], env, "name")),
        **_unless_empty("envFrom", env_from),
        "resources": _container_resources(template.get("resources", {}), resources, memory),
        **_unless_empty("volumeMounts", _merged(template.get("volumeMounts", []), mounts, "mountPath")),
        "securityContext": _container_security(template.get("securityContext", {}), runner),
        # the end of the log, when there was no time for a message: what a failed task shows
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


# Where the NVIDIA runtime is the default one, an image that sets this to "all" (as CUDA's do) would
# see all GPUs of its node, those of other pods included, without having asked for any. The template
# or the spec may say otherwise.
# Source:
# https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/docker-specialized.html
_NO_GPU = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}


def _variables(runner: KubernetesRunner, resources: PodResources, environment: Mapping[str, str]) -> list[Json]:
    # Without a CPU limit a pod sees all CPUs of its node, so it is told how many are its own.
    ours = {"CHUNKFLOW_CPUS": str(max(1, math.floor(resources.cpu)))} | dict(environment)
    users = [{"name": name, "value": value} for name, value in runner.env.items()]
    secrets = [  # these first: a value can only refer to variables before it
        {"name": name, "valueFrom": {"secretKeyRef": {"name": value.secret, "key": value.key}}}
        for name, value in runner.secret_env.items()
    ]
    return _merged(secrets + users, [{"name": name, "value": _literal(value)} for name, value in ours.items()], "name")


def _container_resources(template: Json, resources: PodResources, memory: int) -> Json:
    """Requests and limits; none of CPUs.

    A limit would throttle threads in mid-batch even where CPUs of the node are idle.

    Memory is different: what is used beyond the reservation is taken from neighbours that can't
    give it, so both are the same.
    """
    fixed = {"memory": f"{memory // 2**20}Mi"}
    if resources.ephemeral_storage:
        fixed["ephemeral-storage"] = resources.ephemeral_storage
    if resources.gpu:
        fixed[resources.gpu_resource] = str(resources.gpu)
    thousandths = max(1, round(resources.cpu * 1000))
    cpu = f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)
    return {
        **template,
        "requests": {**template.get("requests", {}), "cpu": cpu, **fixed},
        "limits": {**template.get("limits", {}), **fixed},
    }


def _container_security(template: Json, runner: KubernetesRunner) -> Json:
    # the container's user id would go before the pod's, where ours is
    dropped = (*_NEVER_OURS, "runAsUser") if runner.run_as_user else _NEVER_OURS
    return {**{key: value for key, value in template.items() if key not in dropped}, **_UNPRIVILEGED}


def _literal(text: str) -> str:
    """Have Kubernetes put no variables into a text: it takes ``$(NAME)`` for one.

    ``$$`` stands for ``$``.

    Source: https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/
    """
    return text.replace("$", "$$")


def _volumes(volumes: Iterable[PodVolume]) -> tuple[list[Json], list[Json]]:
    """Volumes of a pod and mounts of a container.

    Mounts of one source share its volume; memory is never shared.
    """
    found: list[Json] = []
    mounts: list[Json] = []
    for volume in volumes:
        source = _volume_source(volume)
        known = [] if volume.memory else [v["name"] for v in found if v == {"name": v["name"], **source}]
        name = known[0] if known else f"chunkflow-{len(found)}"
        if not known:
            found.append({"name": name, **source})
        mount: Json = {"name": name, "mountPath": volume.mount, **_unless_empty("subPath", volume.sub_path)}
        mounts.append({**mount, "readOnly": True} if volume.read_only else mount)
    return found, mounts


def _volume_source(volume: PodVolume) -> Json:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.host_path:
        return {"hostPath": {"path": volume.host_path}}
    if volume.secret:
        return {"secret": {"secretName": volume.secret}}
    if volume.config_map:
        return {"configMap": {"name": volume.config_map}}
    return {"emptyDir": {"medium": "Memory", "sizeLimit": volume.memory}}


# The pod around it.


def _pod_settings(template: Json, runner: KubernetesRunner, resources: PodResources) -> Json:
    context = {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        **template.get("securityContext", {}),
    }
    if runner.run_as_user:
        context["runAsUser"] = runner.run_as_user
    if runner.fs_group:
        # OnRootMismatch: else every pod starts with a walk over all files of a volume
        context |= {"fsGroup": runner.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    pull_secrets = [{"name": name} for name in runner.image_pull_secrets]
    return {
        "restartPolicy": "Never",  # whether another try is worth it is decided by how this one ended
        "terminationGracePeriodSeconds": runner.termination_grace,
        "securityContext": context,
        **_unless_empty("activeDeadlineSeconds", resources.deadline),
        **_unless_empty("priorityClassName", resources.priority_class),
        **_unless_empty("serviceAccountName", runner.service_account),
        **_unless_empty("imagePullSecrets", _merged(template.get("imagePullSecrets", []), pull_secrets, "name")),
    }


def _merged(first: Iterable[Json], second: Iterable[Json], key: str) -> list[Json]:
    """Both lists; what has the same ``key`` in both is as the second has it."""
    return list({element[key]: element for element in (*first, *second)}.values())


def _unless_empty(key: str, value: Any) -> Json:
    return {key: value} if value else {}


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def _label_value(text: str) -> str:
    """The text itself if it can be a label's value, else as much of it as can and a hash."""
    if len(text) <= _LONGEST and re.fullmatch(r"[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?", text, re.ASCII):
        return text
    start = re.sub(r"[^-\w.]+", "-", text, flags=re.ASCII)[: _LONGEST - 9].strip("-_.")
    return f"{start}-{_digest(text)}" if start else _digest(text)
