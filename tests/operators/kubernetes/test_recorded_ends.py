"""How pods ended that a real cluster has shown, from the first look to the last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import pytest

from operators.kubernetes.ends import Limits, Look, examine
from operators.outcomes import Kind, Retry
from tests.support.cluster.recorded import SCENARIOS, Shown, recorded

LIMITS = Limits(pending=3600, start=600)
GARBLED = "env:CHUNKFLOW_SPEC: the spec is cut off or garbled"


@dataclass(frozen=True)
class Expected:
    """How the last pod of a scenario is judged."""

    kind: Kind
    retry: Retry
    message: str
    """Part of it."""
    code: int | None = None
    after: float = 0.0
    """Seconds that have to pass after what was last shown."""
    bad_node: str = ""
    first: str = ""
    """Part of the message of a pod that came before."""


AT_ONCE, COUNTED, NEVER = Retry.AT_ONCE, Retry.COUNTED, Retry.NEVER
PULL, WAIT = 601.0, 3601.0
CHECK_IMAGE = "; check runner.image and runner.image_pull_secrets"
FAILED_TO_PULL = "failed to pull and unpack image"

ENDS: dict[str, Expected | None] = {
    "badcommand": Expected(Kind.IMAGE, NEVER, f"no such file or directory: unknown{CHECK_IMAGE}", 128),
    "containerdkilled": Expected(Kind.WRONG_SPEC, NEVER, GARBLED, 78),
    "deadline": Expected(Kind.DEADLINE, COUNTED, "longer than the specified deadline; give a longer deadline"),
    "delete": Expected(Kind.DELETED, AT_ONCE, "somebody or something deleted the pod while it ran", 143),
    "deletenow": None,
    "disk": Expected(Kind.EVICTED, AT_ONCE, "total limit of containers 200Mi; raise ephemeral_storage"),
    "drain": Expected(Kind.EVICTED, AT_ONCE, "Eviction API: evicting"),
    "exit0": Expected(Kind.DONE, COUNTED, "done", 0, first=GARBLED),
    "exit1": Expected(Kind.ERROR, COUNTED, "injected 1", 1, first=GARBLED),
    "exit65": Expected(Kind.WRONG_DATA, NEVER, "injected 65", 65, first=GARBLED),
    "exit75": Expected(Kind.STORAGE, COUNTED, "injected 75", 75, first=GARBLED),
    "image-badname": Expected(Kind.IMAGE, NEVER, f"repository name (CPU) must be lowercase{CHECK_IMAGE}"),
    "image-broken": Expected(Kind.IMAGE, COUNTED, f"500 Internal Server Error{CHECK_IMAGE}", after=PULL),
    "image-denied": Expected(Kind.IMAGE, COUNTED, f"403 Forbidden{CHECK_IMAGE}", after=PULL),
    "image-dns": Expected(Kind.IMAGE, COUNTED, f"no such host{CHECK_IMAGE}", after=PULL),
    "image-hub": Expected(Kind.IMAGE, COUNTED, "lookup registry-1.docker.io", after=PULL),
    "image-never": Expected(Kind.IMAGE, NEVER, "is not present with pull policy of Never"),
    "image-nothere": Expected(Kind.IMAGE, NEVER, f"127.0.0.1:5001/notfound:1: not found{CHECK_IMAGE}"),
    "image-private": Expected(Kind.IMAGE, COUNTED, "insufficient_scope: authorization failed", after=PULL),
    "image-refused": Expected(Kind.IMAGE, COUNTED, f"connection refused{CHECK_IMAGE}", after=PULL),
    "kill9": Expected(Kind.KILLED, COUNTED, "killed by signal 9 (SIGKILL)", 137),
    "kubeletkilled": Expected(Kind.WRONG_SPEC, NEVER, GARBLED, 78),
    "kubeletkilledend": Expected(Kind.STORAGE, COUNTED, "injected 75", 75),
    "kubeletkilledend2": Expected(Kind.WRONG_SPEC, NEVER, GARBLED, 78),
    "losedeleted": None,
    "loselong": Expected(Kind.NODE_LOST, AT_ONCE, "Taint manager: deleting due to NoExecute taint", after=70),
    "loseshort": Expected(Kind.NOT_STARTED, COUNTED, 'error mounting "cgroup" to rootfs', 128, bad_node="node4"),
    "mempressure": Expected(Kind.EVICTED, AT_ONCE, "The node was low on resource: memory"),
    "mempressure2": None,
    "noclaim": Expected(Kind.CONFIGURATION, NEVER, "there is no claim nowhere", after=PULL),
    "nodeaffinity": Expected(Kind.EVICTED, AT_ONCE, "Predicate NodeAffinity failed", bad_node="node1"),
    "noenvfrom": Expected(Kind.CONFIGURATION, NEVER, 'secret "nowhere" not found; check the Secrets', after=PULL),
    "nonode": Expected(Kind.NO_NODE, COUNTED, "3 node(s) didn't match Pod's node affinity/selector", after=WAIT),
    "nosecretenv": Expected(Kind.CONFIGURATION, NEVER, 'secret "nowhere" not found; check the Secrets', after=PULL),
    "nosecretvolume": Expected(Kind.NOT_STARTED, COUNTED, "ContainerCreating", after=PULL, bad_node="node3"),
    "oom": Expected(Kind.OUT_OF_MEMORY, Retry.MORE_MEMORY, "killed at the memory limit of 700Mi", 137),
    "outofcpu": Expected(Kind.EVICTED, AT_ONCE, "enough resource: cpu, requested: 64000", bad_node="node1"),
    "preempt": Expected(Kind.PREEMPTED, AT_ONCE, "preempting to accommodate a higher priority pod"),
    "preemptor": None,
    "rootimage": Expected(Kind.CONFIGURATION, NEVER, "image will run as root", after=PULL),
    "runckill": Expected(Kind.KILLED, COUNTED, "mood: hang", 137),
    "shutdown": Expected(Kind.NODE_SHUTDOWN, AT_ONCE, "imminent node shutdown"),
    "shutdownterm": Expected(Kind.NODE_SHUTDOWN, AT_ONCE, "imminent node shutdown"),
    "slowdelete": Expected(Kind.DELETED, AT_ONCE, "somebody or something deleted the pod while it ran", 143),
    "toobig": Expected(Kind.NO_NODE, COUNTED, "3 Insufficient cpu", after=WAIT),
    "wrongkey": Expected(Kind.CONFIGURATION, NEVER, "couldn't find key nokey in Secret", after=PULL),
}
"""How each scenario ends; None: it was last shown at work, and then gone."""


def look_at(shown: Shown, after: float = 0.0) -> Look:
    return examine(shown.pod, LIMITS, shown.at + timedelta(seconds=after))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_end_of_every_recorded_pod(scenario: str) -> None:
    *before, last = recorded(scenario)
    expected = ENDS[scenario]
    if expected is None:
        assert look_at(last[-1]).state == "running"
        return

    if expected.after:
        assert examine(last[-1].pod, LIMITS, last[0].at + timedelta(seconds=expected.after - 15)).outcome is None
    outcome = look_at(last[-1], expected.after or 60).outcome

    assert outcome is not None
    assert (outcome.kind, outcome.retry, outcome.code) == (expected.kind, expected.retry, expected.code)
    assert expected.message in outcome.message
    assert outcome.bad_node == expected.bad_node
    if expected.first:
        first = look_at(before[0][-1], 60).outcome
        assert first is not None
        assert expected.first in first.message


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_end_is_told_that_is_not_the_last_one(scenario: str) -> None:
    """Whenever somebody looks: an end that was seen once is acted upon."""
    for pod in recorded(scenario):
        told = [look_at(shown).outcome for shown in pod]
        ends = {(end.kind, end.retry) for end in told if end}
        last = look_at(pod[-1], 60).outcome
        assert not ends or (last and ends == {(last.kind, last.retry)}), told


def test_all_recordings_are_judged() -> None:
    assert sorted(ENDS) == SCENARIOS
