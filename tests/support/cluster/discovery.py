"""What the API says that there is, as kubectl asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.cluster.objects import Object

VERSION = {
    "major": "1",
    "minor": "34",
    "gitVersion": "v1.34.0",
    "gitCommit": "0" * 40,
    "gitTreeState": "clean",
    "buildDate": "2025-08-27T10:00:00Z",
    "goVersion": "go1.24.6",
    "compiler": "gc",
    "platform": "linux/amd64",
}
_KEPT_VERBS = ("create", "delete", "deletecollection", "get", "list", "watch")


@dataclass(frozen=True)
class Resource:
    """A kind of objects."""

    plural: str
    """How paths name it."""
    kind: str
    group: str = ""
    """The group of APIs; empty: the core one."""
    namespaced: bool = True
    short: tuple[str, ...] = ()
    """How kubectl may name it."""
    verbs: tuple[str, ...] = _KEPT_VERBS

    @property
    def api_version(self) -> str:
        """What objects have as ``apiVersion``."""
        return f"{self.group}/v1".lstrip("/")

    @property
    def long_name(self) -> str:
        """How errors name it."""
        return f"{self.plural}.{self.group}".rstrip(".")


PODS = Resource("pods", "Pod", short=("po",), verbs=(*_KEPT_VERBS, "patch"))
EVENTS = Resource("events", "Event", short=("ev",), verbs=("get", "list", "watch"))
NAMESPACES = Resource("namespaces", "Namespace", namespaced=False, short=("ns",))
SECRETS = Resource("secrets", "Secret")
CONFIG_MAPS = Resource("configmaps", "ConfigMap", short=("cm",))
ACCOUNTS = Resource("serviceaccounts", "ServiceAccount", short=("sa",))
BUDGETS = Resource("poddisruptionbudgets", "PodDisruptionBudget", group="policy", short=("pdb",))
RESOURCES = {
    resource.plural: resource for resource in (PODS, EVENTS, NAMESPACES, SECRETS, CONFIG_MAPS, ACCOUNTS, BUDGETS)
}
"""All there are, by the name that paths have."""


def _listed(resource: Resource) -> Object:
    return {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": list(resource.verbs),
        "shortNames": list(resource.short),
        "categories": ["all"] if resource is PODS else [],
    }


def _list_of(group: str, *more: Object) -> Object:
    own = [_listed(resource) for resource in RESOURCES.values() if resource.group == group]
    version = f"{group}/v1".lstrip("/")
    return {"kind": "APIResourceList", "groupVersion": version, "resources": [*own, *more]}


def _part(name: str, kind: str, verb: str) -> Object:
    return {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": [verb]}


_POLICY = {"groupVersion": "policy/v1", "version": "v1"}
DISCOVERY: dict[str, Object] = {
    "/version": VERSION,
    "/api": {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": "policy", "versions": [_POLICY], "preferredVersion": _POLICY}],
    },
    "/api/v1": _list_of(
        "",
        _part("pods/log", "Pod", "get"),
        {**_part("pods/eviction", "Eviction", "create"), "group": "policy", "version": "v1"},
    ),
    "/apis/policy/v1": _list_of("policy"),
}
"""Answers by path."""
