"""A pod's log, line by line, each once."""

from __future__ import annotations

import re

from operators.kubernetes.api import PodApi
from operators.kubernetes.ends import BASE

_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:]+(\.\d+)?(Z|[+-]\d\d:\d\d)")
_DIGITS = len("2026-01-01T00:00:00.000000000")
_LOST = b"unable to retrieve container logs"
"""What kubelets give as the log, with HTTP 200, once the container is gone."""


class PodLog:
    """Reads a pod's log again and again, and gives what is new.

    Lines are told apart by the nanosecond at which the container runtime wrote them, so that it
    does not matter when they are read, nor that the kubelet drops old ones.
    """

    def __init__(self, name: str, namespace: str) -> None:
        """Begin with the first line of the pod's log."""
        self.name, self.namespace = name, namespace
        self._last, self._at_last = "", 0
        self.lines: list[str] = []
        """All lines so far, without their times."""

    def read(self, api: PodApi) -> list[str] | None:
        """The lines since the last reading; None if the log is not there.

        Errors as those of ``PodApi``.
        """
        content = api.log(self.name, self.namespace, BASE)
        if content is None or content.startswith(_LOST):
            return None
        new = self._new(content.decode(errors="backslashreplace").split("\n"))
        self.lines += new
        return new

    def _new(self, lines: list[str]) -> list[str]:
        known, new = self._at_last, []
        for line in lines:
            first, _, text = line.partition(" ")
            if not _TIME.fullmatch(first):
                continue  # the end of the last line, or the kubelet's own words
            time = first.removesuffix("Z")[:_DIGITS].ljust(_DIGITS, "0")  # some runtimes leave out the last zeros
            if time < self._last:
                continue
            if time == self._last:
                if known:
                    known -= 1
                    continue
                self._at_last += 1
            else:
                self._last, self._at_last, known = time, 1, 0
            new.append(text)
        return new
