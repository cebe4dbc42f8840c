"""Objects that the cluster keeps and shows, beside pods and their events.

They are namespaces, secrets, config maps, service accounts and disruption budgets.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Iterator, Mapping

from tests.support.cluster.admission import admit_kept
from tests.support.cluster.discovery import ACCOUNTS, CONFIG_MAPS, NAMESPACES, RESOURCES, SECRETS, Resource
from tests.support.cluster.kubelet import Kubelet
from tests.support.cluster.objects import ApiError, Object, stamp

_NOTHING: Mapping[str, bytes] = {}
_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_FOR_EVER = ("default", "kube-system", "kube-public", "kube-node-lease")


class Kept:
    """All these objects.

    What pods refer to, they find in the kubelet's ``contents``: it is kept there too.
    """

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet, self._store = kubelet, kubelet.store
        self._objects: dict[tuple[str, str, str], Object] = {}
        """By resource, namespace (empty: none) and name."""
        self._pods_refer_to = {
            SECRETS.plural: kubelet.contents.secrets,
            CONFIG_MAPS.plural: kubelet.contents.config_maps,
        }

    @property
    def namespaces(self) -> list[str]:
        """Names of the namespaces there are."""
        return [item["metadata"]["name"] for item in self.items(NAMESPACES, None)]

    def accounts(self, namespace: str) -> set[str]:
        """Names of the service accounts that a namespace has."""
        return {item["metadata"]["name"] for item in self.items(ACCOUNTS, namespace)}

    def items(self, resource: Resource, namespace: str | None) -> Iterator[Object]:
        """The objects of a resource, of one namespace or (None) of all."""
        for (plural, inside, _), item in list(self._objects.items()):
            if plural == resource.plural and namespace in (None, inside):
                yield item

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """The object of that name; ``ApiError`` 404: there is none."""
        if found := self._objects.get((resource.plural, namespace or "", name)):
            return found
        raise ApiError(404, f'{resource.long_name} "{name}" not found', name=name, kind=resource.plural)

    def check_namespace(self, namespace: str, kind: str = "", name: str = "") -> None:
        """``ApiError``: there is no such namespace, or it goes and takes no new object.

        ``kind`` and ``name`` are those of the new object; empty: there is none.
        """
        item = self.get(NAMESPACES, None, namespace)
        if kind and item["status"]["phase"] == "Terminating":
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise ApiError(403, f'{kind} "{name}" is forbidden: {why}', name=name, kind=kind)

    def create(self, resource: Resource, given: Object, namespace: str | None) -> Object:
        """Take an object that a client sends; it as it is kept. ``ApiError``: it can't be."""
        item = admit_kept(given, resource.kind, resource.api_version, namespace, now=time.time())
        name = item["metadata"]["name"]
        if namespace:
            self.check_namespace(namespace, resource.plural, name)
        if (resource.plural, namespace or "", name) in self._objects:
            raise ApiError(409, f'{resource.long_name} "{name}" already exists', name=name, kind=resource.plural)
        if resource in (SECRETS, CONFIG_MAPS):
            _fill(item)
        self._put(resource, item)
        if resource is NAMESPACES:
            _begin(item)
            self._kubelet.spawn(self._add_default_account(name))
        return item

    def add(self, resource: Resource, namespace: str | None, name: str, data: Mapping[str, bytes] = _NOTHING) -> None:
        """Add or replace an object that a test names; a secret or a config map with ``data``."""
        given = {"metadata": {"name": name}} | _stored(resource, data)
        item = admit_kept(given, resource.kind, resource.api_version, namespace, now=time.time())
        if resource is NAMESPACES:
            _begin(item)
        self._put(resource, item)

    def _put(self, resource: Resource, item: Object) -> None:
        namespace, name = item["metadata"].get("namespace", ""), item["metadata"]["name"]
        key = (resource.plural, namespace, name)
        change = "MODIFIED" if key in self._objects else "ADDED"
        self._objects[key] = item
        if (contents := self._pods_refer_to.get(resource.plural)) is not None:
            contents[namespace, name] = _content(resource, item)
        self._store.note(resource.plural, change, item)

    async def _add_default_account(self, namespace: str) -> None:
        await asyncio.sleep(self._kubelet.timing.schedule)
        if namespace in self.namespaces:
            self.add(ACCOUNTS, namespace, "default")

    def delete(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """Delete an object and give it as it last was; a namespace takes a while to go."""
        item = self.get(resource, namespace, name)
        if resource is NAMESPACES:
            self._delete_namespace(item)
        else:
            self._remove(resource, namespace or "", name)
        return item

    def _remove(self, resource: Resource, namespace: str, name: str) -> None:
        item = self._objects.pop((resource.plural, namespace, name))
        if (contents := self._pods_refer_to.get(resource.plural)) is not None:
            del contents[namespace, name]
        self._store.note(resource.plural, "DELETED", item)

    def _delete_namespace(self, item: Object) -> None:
        metadata, name = item["metadata"], item["metadata"]["name"]
        if name in _FOR_EVER:
            why = "this namespace may not be deleted"
            raise ApiError(403, f'namespaces "{name}" is forbidden: {why}', name=name, kind=NAMESPACES.plural)
        if "deletionTimestamp" not in metadata:
            metadata["deletionTimestamp"] = stamp(time.time())
            item["status"]["phase"] = "Terminating"
            self._store.note(NAMESPACES.plural, "MODIFIED", item)
            self._kubelet.spawn(self._empty(name))

    async def _empty(self, namespace: str) -> None:
        """End all that is in a namespace, and then the namespace."""
        for plural, inside, name in list(self._objects):
            if inside == namespace:
                self._remove(RESOURCES[plural], namespace, name)
        for pod in [pod for pod in self._store.pods.values() if pod.namespace == namespace]:
            self._kubelet.delete(pod)
        while any(inside == namespace for inside, _ in self._store.pods):
            await asyncio.sleep(self._kubelet.timing.linger)
        for key in [key for key in self._store.events if key[0] == namespace]:
            del self._store.events[key]
        self._remove(NAMESPACES, "", namespace)


def _begin(namespace: Object) -> None:
    labels = namespace["metadata"].setdefault("labels", {})
    labels["kubernetes.io/metadata.name"] = namespace["metadata"]["name"]
    namespace |= {"spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}


def _fill(item: Object) -> None:
    """Bring a secret or a config map into the form in which it is kept."""
    kind, name = item["kind"], item["metadata"]["name"]
    coded = "data" if kind == "Secret" else "binaryData"
    for key, value in (item.get(coded) or {}).items():
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error as error:
            why = f'{coded}["{key}"]: illegal base64 data'
            raise ApiError(400, f'{kind} in version "v1" cannot be handled as a {kind}: {why}') from error
    if kind == "Secret":
        item.setdefault("type", "Opaque")
        plain = item.pop("stringData", None) or {}
        item["data"] = (item.get("data") or {}) | {key: _coded(value.encode()) for key, value in plain.items()}
    for part in ("data", "binaryData"):
        for key in item.get(part) or {}:
            if not _KEY.fullmatch(key):
                why = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
                raise ApiError(422, f'{kind} "{name}" is invalid: {part}[{key}]: Invalid value: "{key}": {why}')


def _stored(resource: Resource, data: Mapping[str, bytes]) -> Object:
    """The part of a secret or a config map that has its content."""
    if resource is SECRETS:
        return {"type": "Opaque", "data": {key: _coded(value) for key, value in data.items()}}
    if resource is not CONFIG_MAPS:
        return {}
    plain, binary = {}, {}
    for key, value in data.items():
        try:
            plain[key] = value.decode()
        except UnicodeDecodeError:
            binary[key] = _coded(value)
    return {"data": plain} | ({"binaryData": binary} if binary else {})


def _content(resource: Resource, item: Object) -> dict[str, bytes]:
    """What pods get of a secret or a config map."""
    data = item.get("data") or {}
    if resource is SECRETS:
        return {key: base64.b64decode(value) for key, value in data.items()}
    binary = {key: base64.b64decode(value) for key, value in (item.get("binaryData") or {}).items()}
    return {key: value.encode() for key, value in data.items()} | binary


def _coded(value: bytes) -> str:
    return base64.b64encode(value).decode()
