"""What the cluster's other modules share: nodes, quantities, times, selectors, patches, errors."""

from __future__ import annotations

import base64
import functools
import ipaddress
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from kubernetes.utils.quantity import parse_quantity

Object = dict[str, Any]
Resources = dict[str, float]

GPU = "nvidia.com/gpu"
"""Resource of which a node has whole ones."""
SLEEP = "double/sleep"
"""Annotation of pods that are only simulated, for so many seconds."""
TOKEN_VOLUME = "kube-api-access"
"""How the name begins of the volume that the server adds to each pod, with the account's token."""

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
    """An answer of the API that is an error: its HTTP status, and a Status object as body."""

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
    """A simulated machine; the pods on it really run on this one.

    ``cpu`` and ``memory`` are quantities such as ``500m`` and ``2Gi``, ``gpus`` and ``pods`` are
    numbers, ``taints`` are as the API has them.
    """

    name: str
    cpu: str = "1000"
    memory: str = "4Ti"
    gpus: int = 16
    pods: int = 2000
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Mapping[str, str], ...] = ()

    @functools.cached_property
    def room(self) -> Resources:
        """What all pods on the node together can ask for, by name of the resource."""
        amounts = {"cpu": self.cpu, "memory": self.memory, GPU: self.gpus, "pods": self.pods}
        return {name: float(parse_quantity(amount)) for name, amount in amounts.items()}

    @property
    def all_labels(self) -> dict[str, str]:
        """The node's labels, with those that every node has."""
        return {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", **self.labels}


def quantity(text: object) -> float:
    """An amount such as ``500m`` or ``2Gi`` as a number."""
    return float(parse_quantity(text))


def stamp(seconds: float) -> str:
    """Seconds since the epoch as objects have a time: UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def self_signed(folder: Path) -> tuple[bytes, ssl.SSLContext]:
    """A new certificate for 127.0.0.1 (PEM), and the server's side of it.

    Kubectl sends tokens by TLS only.
    """
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


def write_kubeconfig(file: Path, url: str, token: str, certificate: bytes) -> None:
    """Write a kubeconfig for an API at an address, with a bearer token."""
    name, authority = "double", base64.b64encode(certificate).decode()
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": {"server": url, "certificate-authority-data": authority}}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    file.chmod(0o600)


# Selectors


def selects(selector: str, labels: Mapping[str, str]) -> bool:
    """Whether a label selector, such as ``a=b,c!=d,!e,f,g in (h,i)``, selects these labels.

    ``ApiError`` 400: the selector can't be read.
    """
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
    """Whether a field selector, such as ``metadata.name=a,status.phase!=b``, selects an object."""
    for part in filter(None, selector.split(",")):
        path, unequal, value = re.fullmatch(r"([^!=]+)(!?)==?(.*)", part).groups()  # type: ignore[union-attr]
        found: Any = item
        for key in path.split("."):
            found = (found or {}).get(key)
        if ((found or "") == value) == bool(unequal):
            return False
    return True


def merged(target: Any, patch: Any) -> Any:
    """``target`` after a merge patch: null removes, maps are merged, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
