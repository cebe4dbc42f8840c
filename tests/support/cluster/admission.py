"""What an object must be for the server to take it, and what the server adds to it."""

from __future__ import annotations

import copy
import re
import secrets
import string
import uuid
from collections.abc import Collection, Iterable
from typing import Any

import kubernetes_validate

from tests.support.cluster.objects import TOKEN_VOLUME, ApiError, Object, quantity, stamp

SCHEMA = "1.34"
"""The version of Kubernetes that says which types objects have."""
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_KNOWN_SHAPES: set[str] = set()


def admit(
    given: Object, namespace: str, *, now: float, accounts: Collection[str], priorities: Collection[str]
) -> Object:
    """The object as the server stores it, with all defaults.

    Args:
        given: The pod as a client sends it; left as it is.
        namespace: The namespace of the request's path.
        now: The pod's creation, in seconds since the epoch.
        accounts: Names of the service accounts there are.
        priorities: Names of the priority classes there are.

    Raises:
        ApiError: The server refuses the object; the text says why, as Kubernetes says it.
    """
    pod = _named(given, "Pod", "v1", namespace)
    metadata, spec = pod["metadata"], pod.get("spec") or {}
    _check_references(spec, metadata.get("name", ""), namespace, accounts, priorities)
    _refuse(pod, [*_metadata_errors(metadata), *_spec_errors(spec)])
    _stamp(metadata, now)
    metadata["generation"] = 1
    pod["spec"] = _with_defaults(spec)
    pod["status"] = {"phase": "Pending", "qosClass": _quality(spec["containers"][0]["resources"])}
    return pod


def admit_kept(given: Object, kind: str, api_version: str, namespace: str | None, *, now: float) -> Object:
    """An object that is no pod as the server stores it; arguments and errors as for :func:`admit`.

    ``namespace`` is None for what is in none.
    """
    item = _named(given, kind, api_version, namespace)
    _refuse(item, [*_metadata_errors(item["metadata"])])
    _stamp(item["metadata"], now)
    return item


def _named(given: Object, kind: str, api_version: str, namespace: str | None) -> Object:
    """A copy of an object of the right types, with the name and the namespace that it gets."""
    item: Object = {"kind": kind, "apiVersion": api_version} | _without_nulls(copy.deepcopy(given))
    if (item["kind"], item["apiVersion"]) != (kind, api_version):
        raise ApiError(400, f"the object provided is unrecognized (must be of type {kind})")
    _check_types(item)
    metadata = item.setdefault("metadata", {})
    if metadata.get("namespace", namespace) != namespace:
        raise ApiError(400, "the namespace of the provided object does not match the namespace sent on the request")
    if namespace:
        metadata["namespace"] = namespace
    if not metadata.get("name") and metadata.get("generateName"):
        letters = string.ascii_lowercase + string.digits
        metadata["name"] = metadata["generateName"] + "".join(secrets.choice(letters) for _ in range(5))
    return item


def _refuse(item: Object, errors: list[str]) -> None:
    if errors:
        kind, name = item["kind"], item["metadata"].get("name", "")
        joined = errors[0] if len(errors) == 1 else "[" + ", ".join(errors) + "]"
        raise ApiError(422, f'{kind} "{name}" is invalid: {joined}', name=name, kind=kind)


def _stamp(metadata: Object, now: float) -> None:
    for key in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields"):
        metadata.pop(key, None)
    metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": stamp(now), "resourceVersion": "0"}


def _check_types(item: Object) -> None:
    # Validation takes 12 ms, and the pods of one test are alike: only what has other keys or types
    # is looked at again.
    if (shape := repr((item["kind"], _shape(item)))) in _KNOWN_SHAPES:
        return
    try:
        kubernetes_validate.validate(item, SCHEMA)
    except kubernetes_validate.ValidationError as error:
        where, kind, version = ".".join(map(str, error.path)), item["kind"], item["apiVersion"].rpartition("/")[2]
        why = f'{kind} in version "{version}" cannot be handled as a {kind}: {where}: {error.message}'
        raise ApiError(400, why) from error
    _KNOWN_SHAPES.add(shape)


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(part) for key, part in value.items()}
    return [_shape(part) for part in value] if isinstance(value, list) else type(value).__name__


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _check_references(
    spec: Object, name: str, namespace: str, accounts: Collection[str], priorities: Collection[str]
) -> None:
    account = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
    if account not in accounts:
        why = f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found'
        raise ApiError(403, f'pods "{name}" is forbidden: {why}', name=name)
    priority = spec.get("priorityClassName")
    if priority and priority not in priorities:
        raise ApiError(403, f'pods "{name}" is forbidden: no PriorityClass with name {priority} was found', name=name)


def _metadata_errors(metadata: Object) -> Iterable[str]:
    name = metadata.get("name", "")
    if not name:
        yield "metadata.name: Required value: name or generateName is required"
    elif not _SUBDOMAIN.fullmatch(name) or len(name) > 253:
        yield (
            f'metadata.name: Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case '
            "alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character"
        )
    for kind in ("labels", "annotations"):
        for key, value in (metadata.get(kind) or {}).items():
            yield from _label_errors(kind, key, value)


def _spec_errors(spec: Object) -> Iterable[str]:
    if spec.get("restartPolicy") != "Never":
        policy = spec.get("restartPolicy", "Always")
        yield f'spec.restartPolicy: Unsupported value: "{policy}": this cluster is a test double: "Never" only'
    if spec.get("initContainers") or len(spec.get("containers") or []) != 1:
        yield "spec.containers: Invalid value: this cluster is a test double: exactly one container"
        return
    if (deadline := spec.get("activeDeadlineSeconds", 1)) < 1:
        yield f"spec.activeDeadlineSeconds: Invalid value: {deadline}: must be between 1 and 2147483647, inclusive"
    volumes = [volume.get("name", "") for volume in spec.get("volumes") or []]
    for index, volume in enumerate(volumes):
        if not _DNS_LABEL.fullmatch(volume):
            yield f'spec.volumes[{index}].name: Invalid value: "{volume}": a lowercase RFC 1123 label'
        if volume in volumes[:index]:
            yield f'spec.volumes[{index}].name: Duplicate value: "{volume}"'
    yield from _container_errors(spec["containers"][0], volumes)


def _label_errors(kind: str, key: str, value: str) -> Iterable[str]:
    prefix, _, last = key.rpartition("/")
    if not last or len(last) > 63 or not _LABEL_VALUE.fullmatch(last) or (prefix and not _SUBDOMAIN.fullmatch(prefix)):
        what = "name part must consist of alphanumeric characters, '-', '_' or '.'"
        yield f'metadata.{kind}: Invalid value: "{key}": {what}'
    if kind == "labels" and (len(value) > 63 or not _LABEL_VALUE.fullmatch(value)):
        yield (
            f'metadata.labels: Invalid value: "{value}": a valid label must be an empty string or consist of '
            "at most 63 alphanumeric characters, '-', '_' or '.'"
        )


def _container_errors(container: Object, volumes: list[str]) -> Iterable[str]:
    at = "spec.containers[0]"
    if not _DNS_LABEL.fullmatch(container.get("name", "")) or len(container["name"]) > 63:
        yield f'{at}.name: Invalid value: "{container.get("name", "")}": a lowercase RFC 1123 label'
    if not container.get("image"):
        yield f"{at}.image: Required value"
    if not container.get("command"):
        yield f"{at}.command: Required value: this cluster is a test double: images have no entry point"
    yield from _resource_errors(container.setdefault("resources", {}), f"{at}.resources")
    policy = container.get("terminationMessagePolicy", "File")
    if policy not in ("File", "FallbackToLogsOnError"):
        yield f'{at}.terminationMessagePolicy: Unsupported value: "{policy}"'
    yield from _reference_errors(container, volumes, at)


def _reference_errors(container: Object, volumes: list[str], at: str) -> Iterable[str]:
    for index, variable in enumerate(container.get("env") or []):
        if not variable.get("name") or "=" in variable["name"]:
            yield f'{at}.env[{index}].name: Invalid value: "{variable.get("name", "")}"'
        if variable.get("value") and variable.get("valueFrom"):
            yield f'{at}.env[{index}].valueFrom: Invalid value: "": may not be specified when `value` is not empty'
    paths = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
    for index, mount in enumerate(container.get("volumeMounts") or []):
        if mount["name"] not in volumes:
            yield f'{at}.volumeMounts[{index}].name: Not found: "{mount["name"]}"'
        if mount["mountPath"] in paths[:index]:
            yield f'{at}.volumeMounts[{index}].mountPath: Invalid value: "{mount["mountPath"]}": must be unique'


def _resource_errors(resources: Object, at: str) -> Iterable[str]:
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for kind, amounts in (("limits", limits), ("requests", requests)):
        for name, amount in amounts.items():
            try:
                number = quantity(amount)
            except ValueError:
                yield f'{at}.{kind}[{name}]: Invalid value: "{amount}": quantities must match the regular expression'
                return
            if number < 0 or ("/" in name and number != int(number)):
                yield f'{at}.{kind}[{name}]: Invalid value: "{amount}": must be a whole number, 0 or more'
    for name, amount in requests.items():
        if name in limits and quantity(amount) > quantity(limits[name]):
            limit = f"must be less than or equal to {name} limit of {limits[name]}"
            yield f'{at}.requests: Invalid value: "{amount}": {limit}'
        if "/" in name and quantity(limits.get(name, "-1")) != quantity(amount):
            limit = "Limit must be set for non overcommitable resources and equal to the request"
            yield f"{at}.limits: Required value: {limit} ({name})"


def _with_defaults(spec: Object) -> Object:
    """Fill in what the server fills in."""
    container = spec["containers"][0]
    resources = container["resources"]
    if "limits" in resources:
        resources["requests"] = resources["limits"] | (resources.get("requests") or {})
    latest = ":" not in container["image"].rpartition("/")[2] or container["image"].endswith(":latest")
    account = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
    container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    defaults: Object = {
        "dnsPolicy": "ClusterFirst",
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
        "priority": 0,
        "restartPolicy": "Never",
        "schedulerName": "default-scheduler",
        "securityContext": {},
        "serviceAccount": account,
        "serviceAccountName": account,
        "terminationGracePeriodSeconds": 30,
    }
    spec = defaults | spec
    if spec.get("automountServiceAccountToken", True):
        volume = f"{TOKEN_VOLUME}-{secrets.token_hex(3)[:5]}"
        source = {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}}
        projected = {"defaultMode": 420, "sources": [source]}
        mount = {"name": volume, "readOnly": True, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
        spec["volumes"] = [*spec.get("volumes", []), {"name": volume, "projected": projected}]
        container["volumeMounts"] = [*container.get("volumeMounts", []), mount]
    tolerations = list(spec.get("tolerations") or [])
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if not any(toleration.get("key") == key for toleration in tolerations):
            tolerations.append({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
    spec["tolerations"] = tolerations
    return spec


def _quality(resources: Object) -> str:
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    if all(name in limits and requests.get(name) == limits[name] for name in ("cpu", "memory")):
        return "Guaranteed"
    return "Burstable" if {"cpu", "memory"} & (set(requests) | set(limits)) else "BestEffort"
