"""The cluster's pure part: what a pod object must be, what the server adds to it, and which node it fits on."""

from __future__ import annotations

import functools
import ipaddress
import math
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from kubernetes.utils.quantity import parse_quantity

Object = dict[str, Any]
Resources = dict[str, float]

GPU = "nvidia.com/gpu"
SLEEP = "double/sleep"

_IMAGE = re.compile(
    r"([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_LABELS_SELECTED = re.compile(
    r"\s*(?:(?P<absent>!\s*[^\s,!=()]+)"
    r"|(?P<set>[^\s,!=()]+)\s+(?P<operator>in|notin)\s*\((?P<values>[^)]*)\)"
    r"|(?P<key>[^\s,!=()]+)\s*(?:(?P<equality>==?|!=)\s*(?P<value>[^\s,()]*))?)\s*(?:,|$)"
)
_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "AlreadyExists",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class ApiError(Exception):
    """An answer of the API that says no."""

    def __init__(self, code: int, message: str, *, name: str = "", kind: str = "pods") -> None:
        super().__init__(message)
        self.code = code
        self.body: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": _REASONS.get(code, "Unknown"),
            "details": {"name": name, "kind": kind} if name else {},
            "code": code,
        }


@dataclass(frozen=True)
class Node:
    """A simulated machine; every pod really runs on this one. ``taints``: as the API has them."""

    name: str
    cpu: str = "1000"
    memory: str = "4Ti"
    gpus: int = 16
    pods: int = 2000
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Mapping[str, str], ...] = ()

    @functools.cached_property
    def room(self) -> Resources:
        """What pods can ask for, in all."""
        amounts = {"cpu": self.cpu, "memory": self.memory, GPU: self.gpus, "pods": self.pods}
        return {name: float(parse_quantity(amount)) for name, amount in amounts.items()}

    @property
    def all_labels(self) -> dict[str, str]:
        """With those that every node has."""
        return {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", **self.labels}


def quantity(text: object) -> float:
    """An amount such as ``500m`` or ``2Gi`` as a number."""
    return float(parse_quantity(text))


def stamp(seconds: float) -> str:
    """A time as objects have it: UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def good_image(name: str) -> bool:
    """Whether the name of an image can be one."""
    return _IMAGE.fullmatch(name) is not None


def self_signed(folder: Path) -> tuple[bytes, ssl.SSLContext]:
    """A new certificate for 127.0.0.1, as text, and the server's side of it; kubectl sends tokens by TLS only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    folder.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (chain := folder / "server.pem").write_bytes(certificate + private)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    return certificate, context


# Selectors


def selects(selector: str, labels: Mapping[str, str]) -> bool:
    """Whether a label selector (``a=b,c!=d,!e,f,g in (h,i)``) selects; ApiError 400 if it can't be read."""
    at, chosen = 0, True
    while at < len(selector):
        part = _LABELS_SELECTED.match(selector, at)
        if part is None:
            raise ApiError(400, f"unable to parse requirement: {selector[at:]!r}")
        chosen, at = chosen and _holds(part, labels), part.end()
    return chosen


def _holds(part: re.Match[str], labels: Mapping[str, str]) -> bool:
    if part["absent"]:
        return part["absent"][1:].strip() not in labels
    if part["set"]:
        values = {value.strip() for value in part["values"].split(",")}
        return (labels.get(part["set"]) in values) == (part["operator"] == "in")
    if part["equality"] is None:
        return part["key"] in labels
    return (labels.get(part["key"]) == part["value"]) == (part["equality"] != "!=")


def field_selects(selector: str, item: Object) -> bool:
    """Whether a field selector (``metadata.name=a,status.phase!=b``) selects."""
    for part in filter(None, selector.split(",")):
        path, unequal, value = re.fullmatch(r"([^!=]+)(!?)==?(.*)", part).groups()  # type: ignore[union-attr]
        found: Any = item
        for key in path.split("."):
            found = (found or {}).get(key)
        if ((found or "") == value) == bool(unequal):
            return False
    return True


def merged(target: Any, patch: Any) -> Any:
    """A merge patch applied: null removes, maps are merged, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


# Scheduling


def requests_of(pod: Object) -> Resources:
    """What the pod takes of its node."""
    requests = pod["spec"]["containers"][0]["resources"].get("requests") or {}
    return {name: quantity(amount) for name, amount in requests.items()} | {"pods": 1.0}


def unfit(pod: Object, node: Node, taints: Iterable[Mapping[str, str]], used: Resources) -> tuple[list[str], bool]:
    """Why the pod can't be on the node (nothing: it can), and whether it is only for lack of room."""
    spec = pod["spec"]
    for taint in taints:
        if taint["effect"] != "PreferNoSchedule" and not _tolerated(taint, spec["tolerations"]):
            return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"], False
    labels = node.all_labels
    selector = spec.get("nodeSelector") or {}
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    terms = (affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms")
    if any(labels.get(key) != value for key, value in selector.items()) or (
        terms and not any(_term_matches(term, labels) for term in terms)
    ):
        return ["node(s) didn't match Pod's node affinity/selector"], False
    room = node.room
    lacking = [
        "Too many pods" if name == "pods" else f"Insufficient {name}"
        for name, amount in requests_of(pod).items()
        if used.get(name, 0.0) + amount > room.get(name, math.inf if name == "ephemeral-storage" else 0.0) + 1e-9
    ]
    return lacking, True


def _tolerated(taint: Mapping[str, str], tolerations: list[Object]) -> bool:
    return any(
        toleration.get("effect") in (None, "", taint["effect"])
        and toleration.get("key") in (None, "", taint["key"])
        and (toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", ""))
        for toleration in tolerations
    )


def _term_matches(term: Object, labels: Mapping[str, str]) -> bool:
    return bool(term.get("matchExpressions")) and all(_expression(part, labels) for part in term["matchExpressions"])


def _expression(part: Object, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(part["key"]), part.get("values") or []
    match part["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case _:
            return value is not None and int(value) < int(values[0])


def no_place(reasons: list[list[str]], lack_of_room: int) -> str:
    """The scheduler's words, from the reasons of each node."""
    nodes = len(reasons)
    counts: dict[str, int] = {}
    for reason in (reason for of_node in reasons for reason in of_node):
        counts[reason] = counts.get(reason, 0) + 1
    why = ", ".join(sorted(f"{count} {reason}" for reason, count in counts.items()))
    helpless = nodes - lack_of_room
    preemption = [f"{lack_of_room} No preemption victims found for incoming pod"] if lack_of_room else []
    preemption += [f"{helpless} Preemption is not helpful for scheduling"] if helpless else []
    available = f"0/{nodes} nodes are available: "
    return f"{available}{why}. preemption: {available}{', '.join(preemption)}."
