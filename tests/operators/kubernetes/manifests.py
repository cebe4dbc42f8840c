"""Manifests for tests: runner sections, a template, and what is asked of a pod."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chunkflow_core.spec.runner import KubernetesRunner
from operators.kubernetes.manifest import own_labels, pod_manifest

Json = dict[str, Any]

KUBERNETES_VERSION = "1.34"
GI = 2**30

SPOT = {
    ("cloud.google.com/gke-spot", "true"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("karpenter.sh/capacity-type", "spot"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
}
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
ZONE_A = {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"]}
BIG = {"key": "lab/memory", "operator": "Gt", "values": ["512"]}

TEMPLATE = """
apiVersion: v1
kind: Pod
metadata:
  name: theirs
  creationTimestamp: null
  labels: {team: em, example.org/both: template, chunkflow/stage: theirs}
  annotations: {example.org/note: "1", example.org/both: template}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 7
  nodeSelector: {disk: ssd, pool: template}
  tolerations: [{key: lab, operator: Exists}]
  imagePullSecrets: [{name: registry}, {name: both}]
  priorityClassName: theirs
  volumes:
  - {name: scratch, emptyDir: {sizeLimit: 1Gi}}
  initContainers:
  - {name: warm, image: "lab/warm:1", restartPolicy: Always}
  containers:
  - {name: proxy, image: "lab/proxy:1"}
  - name: base
    image: theirs
    workingDir: /scratch
    env:
    - {name: LEVEL, value: template}
    - {name: ZONE, value: b}
    - {name: HOST, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
    envFrom: [{configMapRef: {name: theirs}}]
    volumeMounts: [{name: scratch, mountPath: /scratch}, {name: scratch, mountPath: /data}]
    resources: {requests: {cpu: 9, memory: 9Gi}, limits: {cpu: 12}}
    ports: [{containerPort: 80}]
status: {}
"""


def make_runner(**section: Any) -> KubernetesRunner:
    return KubernetesRunner.model_validate({"kind": "kubernetes", "image": "lab/worker:1", **section})


def build(runner: KubernetesRunner, folder: Path | str = ".", stage: str = "infer", **changes: Any) -> Json:
    """The manifest of a pod of this stage, with 16 GiB of memory."""
    arguments: Json = {
        "folder": str(folder),
        "resources": getattr(runner, stage),
        "memory": 16 * GI,
        "name": "small-infer-0-1-2-0a1b2c3d",
        "labels": own_labels("small", stage, (0, 1, 2)),
        "arguments": ["--", "chunkflow_core.inference_and_donate", "--block", "0,1,2"],
        "environment": {"CHUNKFLOW_SPEC_JSON": "{}"},
    }
    return pod_manifest(runner, **arguments | changes)


def base_of(manifest: Json) -> Json:
    found: Json = manifest["spec"]["containers"][0]
    return found


def variables(manifest: Json) -> Json:
    env = base_of(manifest)["env"]
    assert len({entry["name"] for entry in env}) == len(env)
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in env}


def tolerates(manifest: Json, key: str, value: str = "", effect: str = "NoSchedule") -> bool:
    """Whether the pod tolerates a taint, by Kubernetes' rule.

    https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/
    """
    return any(
        t.get("key") == key
        and t.get("effect") in (None, effect)
        and (t.get("operator") == "Exists" or t.get("value", "") == value)
        for t in manifest["spec"].get("tolerations", [])
    )


def fits(manifest: Json, node: dict[str, str]) -> bool:
    """Whether a node with these labels is one that the pod's required node affinity allows."""
    required = manifest["spec"].get("affinity", {}).get("nodeAffinity", {}).get(REQUIRED)
    operators = {
        "In": lambda have, values: have in values,
        "Gt": lambda have, values: have is not None and int(have) > int(values[0]),
    }
    return required is None or any(
        bool(term.get("matchExpressions"))
        and all(operators[e["operator"]](node.get(e["key"]), e["values"]) for e in term["matchExpressions"])
        for term in required["nodeSelectorTerms"]
    )


def check_restricted(manifest: Json) -> None:
    """Check that our container is within the profile *restricted*.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    security = base_of(manifest)["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"privileged", "procMount"} & set(security)


# -- what the API will say

SECTIONS: dict[str, Json] = {
    "least": {},
    "no GPU": {"infer": {"gpu": 0, "cpu": 0.25}},
    "other GPU": {"infer": {"gpu": 2, "gpu_resource": "amd.com/gpu"}},
    "spot allowed": {"infer": {"spot": "allowed"}},
    "spot required": {"infer": {"spot": "required"}},
    "placed": {
        "infer": {
            "node_selector": {"pool": "gpu"},
            "tolerations": [{"key": "lab", "operator": "Exists", "tolerationSeconds": 60, "effect": "NoExecute"}],
            "affinity": {
                "nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [ZONE_A]}]}},
                "podAntiAffinity": {REQUIRED: [{"topologyKey": "zone", "labelSelector": {"matchLabels": {"a": "b"}}}]},
            },
            "spot": "required",
            "priority_class": "low",
            "deadline": 7200,
            "ephemeral_storage": "20Gi",
            "cpu": 7.5,
        }
    },
    "all of the runner": {
        "image_pull_policy": "IfNotPresent",
        "image_pull_secrets": ["registry"],
        "namespace": "em",
        "termination_grace": 60,
        "service_account": "worker",
        "run_as_user": 1000,
        "fs_group": 2000,
        "volumes": [
            {"mount": "/data", "claim": "em", "sub_path": "raw", "read_only": True},
            {"mount": "/models", "claim": "em"},
            {"mount": "/host", "host_path": "/mnt"},
            {"mount": "/secrets", "secret": "cloud"},
            {"mount": "/config", "config_map": "settings"},
            {"mount": "/dev/shm", "memory": "1Gi"},
            {"mount": "/tmp", "memory": "1Gi"},
        ],
        "env": {"A": "1", "B": "$(A)"},
        "secret_env": {"TOKEN": {"secret": "api", "key": "token"}},
        "env_from": ["cloud", "more"],
        "labels": {"example.org/team": "em"},
        "annotations": {"example.org/note": "x"},
    },
    "template": {"pod_template": "pod.yaml"},
    "template and section": {
        "pod_template": "pod.yaml",
        "volumes": [{"mount": "/data", "claim": "em"}],
        "env": {"LEVEL": "section"},
        "infer": {"spot": "required", "ephemeral_storage": "1Gi"},
        "run_as_user": 5,
    },
}
