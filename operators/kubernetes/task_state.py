"""What a task remembers between its tries.

Airflow keeps it and shows it with the task; nobody but the user clears it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import Context

from operators.outcomes import Outcome

_KEPT_ENDS = 20
_AVOIDED = 10
"""How many nodes are avoided at most: a preference for none of them has to stay a short list."""
MEMORY, INTERRUPTIONS, ENDS = "memory_bytes", "interruptions", "pod_ends"


class TaskState:
    """Reads and writes Airflow's task state store.

    Nobody else does meanwhile, so each value is read once.
    """

    def __init__(self, context: Context) -> None:
        """The state of the context's task instance."""
        self._store: Any = context["task_state_store"]
        self._try = context["ti"].try_number
        self._known: dict[str, Any] = {}

    def _get(self, key: str, default: Any) -> Any:
        if key not in self._known:
            self._known[key] = self._store.get(key, default)
        return self._known[key]

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, value)
        self._known[key] = value

    @property
    def memory(self) -> int:
        """Bytes that a pod gets after others were killed for memory; 0 if none was."""
        return int(self._get(MEMORY, 0))

    @memory.setter
    def memory(self, value: int) -> None:
        self._set(MEMORY, value)

    @property
    def interruptions(self) -> int:
        """Pods of this try that the cluster took away."""
        stored = self._get(INTERRUPTIONS, {})
        return int(stored["count"]) if stored.get("try") == self._try else 0

    @interruptions.setter
    def interruptions(self, value: int) -> None:
        self._set(INTERRUPTIONS, {"try": self._try, "count": value})

    @property
    def ended_pods(self) -> set[str]:
        """Names of pods whose end is in the state already."""
        return {str(end["pod"]) for end in self._get(ENDS, [])}

    @property
    def bad_nodes(self) -> list[str]:
        """Names of nodes that pods of this task could not be started on, the last one last."""
        found = [str(end["bad_node"]) for end in self._get(ENDS, []) if end.get("bad_node")]
        return list(dict.fromkeys(reversed(found)))[:_AVOIDED][::-1]

    def add_end(self, pod: str, outcome: Outcome) -> None:
        """Append how a pod ended; the last of them are kept."""
        ends = self._get(ENDS, [])
        end = {
            "pod": pod,
            "kind": outcome.kind.name.lower(),
            "code": outcome.code,
            "message": outcome.message,
            "try": self._try,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        } | ({"bad_node": outcome.bad_node} if outcome.bad_node else {})
        self._set(ENDS, [*ends, end][-_KEPT_ENDS:])
