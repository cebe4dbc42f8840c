"""What is to happen to a pod at a moment of its life."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.cluster.pods import Pod

MOMENTS = ("created", "scheduled", "running", "ended", "finished", "deleting", "gone")
"""The moments of a pod's life that a rule can name."""
Match = Callable[[dict[str, Any]], bool] | Mapping[str, str] | str | None
"""Which pods: a function of the object, labels, a regular expression in the name; None: all."""
LOG_CONTAINS = "log contains "
"""How ``when`` of a rule begins that waits for a line of the log; the text in that line follows."""


@dataclass(eq=False)
class Rule:
    """An action on pods at a moment of their lives; made by ``Cluster.add_rule``."""

    when: str
    action: Callable[[str], Any]
    match: Callable[[Pod], bool]
    times: int
    pods: list[str] = field(default_factory=list)
    """Names of the pods that the rule has acted on."""
    done: set[str] = field(default_factory=set)
    """Uids of the pods that the rule has acted on."""

    def is_about(self, moment: str, line: str) -> bool:
        """Whether the rule waits for this moment, which is "log" for a new line of the log."""
        if moment == "log":
            return self.when.startswith(LOG_CONTAINS) and self.when.removeprefix(LOG_CONTAINS) in line
        return self.when == moment


def matcher(match: Match) -> Callable[[Pod], bool]:
    """Whether a rule's ``match`` is about a pod."""
    if match is None:
        return lambda pod: True
    if isinstance(match, str):
        return lambda pod: re.search(match, pod.name) is not None
    if callable(match):
        return lambda pod: match(pod.object)
    return lambda pod: match.items() <= pod.labels.items()


class Rules:
    """All rules of a cluster. What an action raises is added to ``failures``."""

    def __init__(self, failures: list[BaseException]) -> None:
        self._rules: list[Rule] = []
        self._failures = failures

    def add(self, rule: Rule) -> None:
        """Have the rule act from now on."""
        self._rules.append(rule)

    def wrote(self, pod: Pod, line: bytes) -> None:
        """Act on a line that the pod has written."""
        if any(rule.when.startswith(LOG_CONTAINS) for rule in self._rules):
            self.fire("log", pod, line.decode(errors="replace"))

    def fire(self, moment: str, pod: Pod, line: str = "") -> None:
        """Act on a moment of the pod's life."""
        for rule in list(self._rules):
            uid = pod.object["metadata"]["uid"]
            if len(rule.pods) >= rule.times or uid in rule.done:
                continue
            if rule.is_about(moment, line) and rule.match(pod):
                rule.pods.append(pod.name)
                rule.done.add(uid)
                # Not here: the change that this moment is part of has to be complete first.
                asyncio.get_running_loop().call_soon(self._act, rule, pod.name)

    def _act(self, rule: Rule, name: str) -> None:
        try:
            rule.action(name)
        except Exception as error:
            self._failures.append(error)
