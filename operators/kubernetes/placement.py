"""On which nodes a pod may, and must, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkflow_core.spec.runner import PodResources
from operators.kubernetes.template import without_nulls

Json = dict[str, Any]

# Labels, and keys and values of the taints, of nodes that the cloud may take back.
_SPOT_NODES = (
    # https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
    ("cloud.google.com/gke-spot", "true"),
    # https://docs.aws.amazon.com/eks/latest/userguide/managed-node-groups.html
    ("eks.amazonaws.com/capacityType", "SPOT"),
    # https://karpenter.sh/docs/concepts/scheduling/
    ("karpenter.sh/capacity-type", "spot"),
    # https://learn.microsoft.com/azure/aks/spot-node-pool
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)


def placement(template: Json, resources: PodResources, avoided: Sequence[str] = ()) -> Json:
    """On which nodes the pod may, must, and had better not run.

    Args:
        template: The template's part of the pod's spec.
        resources: What the pod needs.
        avoided: Names of nodes that the pod gets only if there is no other.
    """
    tolerations = [*template.get("tolerations", []), *without_nulls(resources.tolerations)]
    if resources.gpu:
        vendor = resources.gpu_resource.partition("/")[0]
        tolerations.append({"key": f"{vendor}/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if resources.spot != "never":
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in _SPOT_NODES
        ]
    affinity = {**template.get("affinity", {}), **without_nulls(resources.affinity)}
    found = {
        "nodeSelector": {**template.get("nodeSelector", {}), **resources.node_selector},
        "tolerations": [t for n, t in enumerate(tolerations) if t not in tolerations[:n]],
        "affinity": _elsewhere(_on_spot_nodes(affinity) if resources.spot == "required" else affinity, avoided),
    }
    return {key: value for key, value in found.items() if value}


def _on_spot_nodes(affinity: Json) -> Json:
    """The affinity, and a spot node as well.

    Terms are alternatives, expressions within one have to hold together: "(a or b) and (c or d)" is
    the terms ac, ad, bc, bd.
    """
    spot = [{"key": key, "operator": "In", "values": [value]} for key, value in _SPOT_NODES]
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    node = affinity.get("nodeAffinity", {})
    given = node[required]["nodeSelectorTerms"] if required in node else None
    terms = [{}] if given is None else [t for t in given if any(t.values())]  # an empty one would fit no node
    both = [{**t, "matchExpressions": [*t.get("matchExpressions", []), s]} for t in terms for s in spot]
    return {**affinity, "nodeAffinity": {**node, required: {"nodeSelectorTerms": both}}}


def _elsewhere(affinity: Json, avoided: Sequence[str]) -> Json:
    """The affinity, and a preference for none of these nodes before all others."""
    if not avoided:
        return affinity
    # One requirement a node: a field takes one value.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in avoided]
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    node = affinity.get("nodeAffinity", {})
    term = {"weight": 100, "preference": {"matchFields": fields}}
    return {**affinity, "nodeAffinity": {**node, preferred: [*node.get(preferred, []), term]}}
