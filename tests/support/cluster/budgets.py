"""Disruption budgets: what the API refuses to evict."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.cluster.objects import ApiError, Object, selects
from tests.support.cluster.pods import Pod


def check_eviction(pod: Pod, budgets: Iterable[Object], pods: Iterable[Pod]) -> None:
    """``ApiError``: a budget allows no eviction of this pod.

    Args:
        pod: The pod.
        budgets: All budgets of its namespace.
        pods: All pods of its namespace.
    """
    if pod.over or pod.phase == "Pending" or "deletionTimestamp" in pod.object["metadata"]:
        return
    over_it = [budget for budget in budgets if _is_over(budget, pod)]
    if len(over_it) > 1:
        raise ApiError(
            500, "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
        )
    for budget in over_it:
        healthy = sum(_is_over(budget, other) and _healthy(other) for other in pods)
        needed = budget["spec"].get("minAvailable")
        # All other budgets count on a controller that says how many pods there are to be; these
        # pods have none, and the real one then allows nothing.
        allowed = healthy - needed if isinstance(needed, int) else 0
        if allowed > 0 or (not _healthy(pod) and isinstance(needed, int) and 0 < needed <= healthy):
            continue
        refusal = ApiError(429, "Cannot evict pod as it would violate the pod's disruption budget.")
        why = f"needs {needed if isinstance(needed, int) else 0} healthy pods and has {healthy} currently"
        message = f"The disruption budget {budget['metadata']['name']} {why}"
        refusal.body["details"] = {"causes": [{"reason": "DisruptionBudget", "message": message}]}
        raise refusal


def _is_over(budget: Object, pod: Pod) -> bool:
    """Whether a budget is about a pod: an empty selector is about all, none about none."""
    selector = budget["spec"].get("selector")
    return selector is not None and selects(_as_text(selector), pod.labels)


def _as_text(selector: Object) -> str:
    """A selector of an object as requests have it."""
    parts = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for rule in selector.get("matchExpressions") or []:
        key, values = rule["key"], ",".join(rule.get("values") or [])
        forms = {
            "In": f"{key} in ({values})",
            "NotIn": f"{key} notin ({values})",
            "Exists": key,
            "DoesNotExist": f"!{key}",
        }
        parts.append(forms[rule["operator"]])
    return ",".join(parts)


def _healthy(pod: Pod) -> bool:
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod.object["status"].get("conditions") or [])
    return ready and "deletionTimestamp" not in pod.object["metadata"]
