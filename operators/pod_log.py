"""A pod's log, line by line, each once."""

from __future__ import annotations

from kubernetes.client import CoreV1Api

from operators.pod_ends import BASE

_TIMESTAMP_DIGITS = len("2026-01-01T00:00:00.000000000Z")


class PodLog:
    """Reads a pod's log again and again, and gives what is new.

    Lines are told apart by the nanosecond at which the container runtime wrote them, so that it does not matter when they are
    read, nor that the kubelet drops old ones.
    """

    def __init__(self, name: str, namespace: str) -> None:
        """Begin with the first line of the pod's log."""
        self.name, self.namespace = name, namespace
        self._last, self._at_last = "", 0
        self.lines: list[str] = []
        """All lines so far, without their times."""

    def read(self, api: CoreV1Api) -> list[str]:
        """The lines since the last reading. Errors as the client raises them, also 404 for a pod that is gone."""
        response = api.read_namespaced_pod_log(
            self.name, self.namespace, container=BASE, timestamps=True, _preload_content=False
        )
        new = self._new(response.data.decode(errors="backslashreplace").splitlines())
        self.lines += new
        return new

    def _new(self, lines: list[str]) -> list[str]:
        known, new = self._at_last, []
        for line in lines:
            time, _, text = line.partition(" ")
            time = time.removesuffix("Z").ljust(_TIMESTAMP_DIGITS, "0")  # some runtimes leave out the last zeros
            if time < self._last:
                continue
            if time == self._last:
                if known:
                    known -= 1
                    continue
                self._at_last += 1
            else:
                self._last, self._at_last = time, 1
                known = 0
            new.append(text)
        return new
