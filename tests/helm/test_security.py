"""Nothing that a chart renders may give a pod or an account more power than it needs.

The check itself is tested, too. The rules for pods are those of the Pod Security Standard
"restricted", and no token of a service account.
Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Render

VALUES = Path(__file__).parent / "values"
Manifest = dict[str, Any]

HARMLESS_VOLUMES = {
    "configMap",
    "secret",
    "emptyDir",
    "persistentVolumeClaim",
    "projected",
    "downwardAPI",
    "ephemeral",
    "csi",
}
DANGEROUS_VERBS = {"*", "escalate", "bind", "impersonate", "deletecollection", "approve", "sign"}
DANGEROUS_RESOURCES = {
    *("*", "secrets", "nodes", "nodes/proxy", "serviceaccounts", "serviceaccounts/token"),
    *("pods/exec", "pods/attach", "pods/portforward", "pods/ephemeralcontainers", "pods/proxy", "services/proxy"),
}


def weaknesses(documents: list[Manifest]) -> list[str]:
    """What in rendered manifests is against the rules, each with where."""
    roles = {(d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents if d["kind"] == "Role"}
    found = []
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        found += [f"{where}: {problem}" for problem in _of_object(document, roles)]
        for pod in pod_specs(document):
            found += [f"{where}: {problem}" for problem in pod_weaknesses(pod)]
    return found


def pod_weaknesses(pod: Manifest, *, token: bool = False) -> Iterator[str]:
    """What in one pod's spec is against the rules.

    ``token`` says whether the pod may have a token of its service account.
    """
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} is set"
    if not token and pod.get("automountServiceAccountToken") is not False:
        yield "gets a token of its service account"
    for volume in pod.get("volumes") or []:
        yield from _of_volume(volume, token=token)
    context = pod.get("securityContext") or {}
    if context.get("sysctls"):
        yield "sysctls are set"
    for key in ("initContainers", "containers", "ephemeralContainers"):
        for container in pod.get(key) or []:
            for problem in _of_container(container, context):
                yield f"{container['name']}: {problem}"


def _of_volume(volume: Manifest, *, token: bool) -> Iterator[str]:
    for kind in set(volume) - {"name"} - HARMLESS_VOLUMES:
        yield f"volume {volume['name']} is of the kind {kind}"
    sources = (volume.get("projected") or {}).get("sources") or []
    if not token and any("serviceAccountToken" in source for source in sources):
        yield f"volume {volume['name']} holds a token of its service account"


def _of_container(container: Manifest, pod: Manifest) -> Iterator[str]:
    own = container.get("securityContext") or {}
    both = pod | own
    capabilities = own.get("capabilities") or {}
    rules = {
        "privileged": not own.get("privileged"),
        "privileges may be escalated": own.get("allowPrivilegeEscalation") is False,
        "capabilities are not all dropped": "ALL" in (capabilities.get("drop") or []),
        "capabilities are added": not capabilities.get("add"),
        "may run as root": both.get("runAsNonRoot") is True and both.get("runAsUser") != 0,
        "no seccomp profile": (both.get("seccompProfile") or {}).get("type") in ("RuntimeDefault", "Localhost"),
        "unmasked /proc": own.get("procMount", "Default") == "Default",
        "runs in the host's process": not (both.get("windowsOptions") or {}).get("hostProcess"),
        "a port of the host is taken": not any("hostPort" in port for port in container.get("ports") or []),
    }
    yield from (problem for problem, kept in rules.items() if not kept)


def _of_object(document: Manifest, roles: set[tuple[str | None, str]]) -> Iterator[str]:
    kind, namespace = document["kind"], document["metadata"].get("namespace")
    if kind in ("ClusterRole", "ClusterRoleBinding"):
        yield "reaches over all namespaces"
    if kind == "ServiceAccount" and document.get("automountServiceAccountToken") is not False:
        yield "its pods get a token"
    for rule in document.get("rules") or []:
        yield from _of_rule(rule)
    if "roleRef" in document:
        reference = document["roleRef"]
        if reference["kind"] != "Role" or (namespace, reference["name"]) not in roles:
            yield f"binds {reference['kind']} {reference['name']}, which is not one of this chart's roles"
        yield from (f"binds {s['kind']} {s['name']}" for s in document["subjects"] if s["kind"] != "ServiceAccount")


def _of_rule(rule: Manifest) -> Iterator[str]:
    for verb in DANGEROUS_VERBS & set(rule["verbs"]):
        yield f"grants the verb {verb}"
    for resource in DANGEROUS_RESOURCES & set(rule.get("resources") or []):
        yield f"grants {resource}"
    for group in {"*", "rbac.authorization.k8s.io"} & set(rule.get("apiGroups") or []):
        yield f"grants the API group {group}"
    if "nonResourceURLs" in rule:
        yield "grants URLs"


def pod_specs(node: Any) -> Iterator[Manifest]:
    """Pods' specs wherever they stand: in a Pod, a Deployment, a CronJob and so on."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield node
        for child in node.values():
            yield from pod_specs(child)
    elif isinstance(node, list):
        for child in node:
            yield from pod_specs(child)


@pytest.mark.parametrize("name", sorted(path.stem for path in VALUES.glob("*.yaml")))
def test_chart_has_no_weakness(render: Render, name: str) -> None:
    documents = render("--values", VALUES / f"{name}.yaml")
    assert sum(1 for document in documents for _ in pod_specs(document)) >= 1
    assert weaknesses(documents) == []


def _pod(change: Callable[[Manifest], Any]) -> Callable[[list[Manifest]], Any]:
    return lambda documents: change(next(d for d in documents if d["kind"] == "Pod")["spec"])


def _container(change: Callable[[Manifest], Any]) -> Callable[[list[Manifest]], Any]:
    return _pod(lambda pod: change(pod["containers"][0]))


def _context(**values: Any) -> Callable[[list[Manifest]], Any]:
    return _container(lambda container: container["securityContext"].update(values))


def _pod_context(**values: Any) -> Callable[[list[Manifest]], Any]:
    return _pod(lambda pod: pod["securityContext"].update(values))


def _volume(**source: Any) -> Callable[[list[Manifest]], Any]:
    return _pod(lambda pod: pod["volumes"].append({"name": "more", **source}))


def _rule(**rule: Any) -> Callable[[list[Manifest]], Any]:
    whole = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]} | rule
    return lambda documents: next(d for d in documents if d["kind"] == "Role")["rules"].append(whole)


def _binding(change: Callable[[Manifest], Any]) -> Callable[[list[Manifest]], Any]:
    return lambda documents: change(next(d for d in documents if d["kind"] == "RoleBinding"))


def _wrapped(documents: list[Manifest]) -> None:
    """A privileged pod deep in a CronJob."""
    pod = copy.deepcopy(next(d for d in documents if d["kind"] == "Pod")["spec"])
    pod["containers"][0]["securityContext"]["privileged"] = True
    job = {"spec": {"jobTemplate": {"spec": {"template": {"spec": pod}}}}}
    documents.append({"kind": "CronJob", "metadata": {"name": "job"}} | job)


def _init_container(documents: list[Manifest]) -> None:
    pod = next(d for d in documents if d["kind"] == "Pod")["spec"]
    pod["initContainers"] = [{"name": "first", "image": "busybox"}]


WEAKENINGS: dict[str, tuple[Callable[[list[Manifest]], Any], str]] = {
    "privileged": (_context(privileged=True), "privileged"),
    "escalation": (_context(allowPrivilegeEscalation=True), "privileges may be escalated"),
    "escalation by default": (
        _container(lambda c: c["securityContext"].pop("allowPrivilegeEscalation")),
        "privileges may be escalated",
    ),
    "no context": (_container(lambda c: c.pop("securityContext")), "capabilities are not all dropped"),
    "capabilities kept": (_context(capabilities={}), "capabilities are not all dropped"),
    "some dropped": (_context(capabilities={"drop": ["NET_RAW"]}), "capabilities are not all dropped"),
    "capability added": (_context(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}), "capabilities are added"),
    "root allowed": (_pod_context(runAsNonRoot=False), "may run as root"),
    "root not excluded": (_pod(lambda pod: pod["securityContext"].pop("runAsNonRoot")), "may run as root"),
    "root by number": (_pod_context(runAsUser=0), "may run as root"),
    "root in the container": (_context(runAsNonRoot=False), "may run as root"),
    "unconfined": (_pod_context(seccompProfile={"type": "Unconfined"}), "no seccomp profile"),
    "no seccomp": (_pod(lambda pod: pod["securityContext"].pop("seccompProfile")), "no seccomp profile"),
    "unconfined container": (_context(seccompProfile={"type": "Unconfined"}), "no seccomp profile"),
    "proc": (_context(procMount="Unmasked"), "unmasked /proc"),
    "host process": (_context(windowsOptions={"hostProcess": True}), "runs in the host's process"),
    "host port": (_container(lambda c: c.update(ports=[{"hostPort": 80}])), "a port of the host is taken"),
    "sysctls": (_pod_context(sysctls=[{"name": "kernel.shm_rmid_forced", "value": "0"}]), "sysctls are set"),
    "host network": (_pod(lambda pod: pod.update(hostNetwork=True)), "hostNetwork is set"),
    "host processes": (_pod(lambda pod: pod.update(hostPID=True)), "hostPID is set"),
    "host memory": (_pod(lambda pod: pod.update(hostIPC=True)), "hostIPC is set"),
    "host path": (_volume(hostPath={"path": "/"}), "is of the kind hostPath"),
    "NFS from the pod": (_volume(nfs={"server": "s", "path": "/"}), "is of the kind nfs"),
    "token": (_pod(lambda pod: pod.update(automountServiceAccountToken=True)), "gets a token"),
    "token by default": (_pod(lambda pod: pod.pop("automountServiceAccountToken")), "gets a token"),
    "token as a volume": (_volume(projected={"sources": [{"serviceAccountToken": {"path": "t"}}]}), "holds a token"),
    "account's token": (
        lambda documents: next(d for d in documents if d["kind"] == "ServiceAccount").pop(
            "automountServiceAccountToken"
        ),
        "its pods get a token",
    ),
    "init container": (_init_container, "first: privileges may be escalated"),
    "pod in a job": (_wrapped, "CronJob job: test: privileged"),
    "any verb": (_rule(verbs=["*"]), "grants the verb *"),
    "any resource": (_rule(resources=["*"]), "grants *"),
    "any group": (_rule(apiGroups=["*"]), "grants the API group *"),
    "secrets": (_rule(resources=["secrets"]), "grants secrets"),
    "exec": (_rule(resources=["pods/exec"], verbs=["create"]), "grants pods/exec"),
    "debugging": (_rule(resources=["pods/ephemeralcontainers"]), "grants pods/ephemeralcontainers"),
    "tokens": (_rule(resources=["serviceaccounts/token"]), "grants serviceaccounts/token"),
    "escalate": (_rule(verbs=["escalate"]), "grants the verb escalate"),
    "bind": (_rule(verbs=["bind"]), "grants the verb bind"),
    "impersonate": (_rule(resources=["users"], verbs=["impersonate"]), "grants the verb impersonate"),
    "all pods at once": (_rule(verbs=["deletecollection"]), "grants the verb deletecollection"),
    "roles": (_rule(apiGroups=["rbac.authorization.k8s.io"], resources=["roles"]), "grants the API group rbac"),
    "cluster-wide": (
        lambda documents: next(d for d in documents if d["kind"] == "Role").update(kind="ClusterRole"),
        "reaches over all namespaces",
    ),
    "administrator": (
        _binding(lambda b: b.update(roleRef={"kind": "ClusterRole", "name": "cluster-admin"})),
        "binds ClusterRole cluster-admin",
    ),
    "somebody else's role": (_binding(lambda b: b["roleRef"].update(name="other")), "binds Role other"),
    "everybody": (
        _binding(lambda b: b["subjects"].append({"kind": "Group", "name": "system:authenticated"})),
        "binds Group system:authenticated",
    ),
}


@pytest.fixture(scope="module")
def everything(render: Render) -> list[Manifest]:
    return render("--values", VALUES / "everything.yaml")


@pytest.mark.parametrize("name", WEAKENINGS)
def test_each_weakening_is_found(everything: list[Manifest], name: str) -> None:
    weaken, expected = WEAKENINGS[name]
    documents = copy.deepcopy(everything)
    weaken(documents)
    found = weaknesses(documents)
    assert any(expected in problem for problem in found), found
