"""Calls to the cluster that a task makes, and what their failures mean."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from airflow.sdk.exceptions import AirflowException
from kubernetes.client import ApiException, CoreV1Api, V1DeleteOptions, V1Pod
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from operators.kubernetes.ends import server_time
from operators.outcomes import Kind, Outcome, Retry

Pod = dict[str, Any]
"""A pod as the API gives it, in camelCase."""

CHECKED = "already_checked"
"""Label of pods whose end a task has dealt with (the provider's name for it)."""

_CONFLICT, _NOT_FOUND, _UNAUTHORIZED, _FORBIDDEN = 409, 404, 401, 403
_QUOTA = ("exceeded quota", "Operation cannot be fulfilled on resourcequotas")
_RAW: dict[str, Any] = {"_preload_content": False, "_request_timeout": (10.0, 60.0)}
"""Answers as they come: making the client's objects of them takes long.

Seconds to connect, and to wait for an answer.
"""


class TryLaterError(Exception):
    """The cluster can't do it now."""

    def __init__(self, kind: Kind, message: str) -> None:
        """What is in the way, and the cluster's words."""
        super().__init__(message)
        self.kind = kind


class RefusedError(Exception):
    """The cluster will not do it."""

    def __init__(self, outcome: Outcome) -> None:
        """What that means for the task."""
        super().__init__(str(outcome))
        self.outcome = outcome


class PodApi:
    """What a task needs of the cluster's API.

    Every call raises :class:`TryLaterError` or :class:`RefusedError`.
    """

    def __init__(self, client: Callable[[], CoreV1Api], reset: Callable[[], None]) -> None:
        """Make the calls of a task.

        Args:
            client: Gives the API's client.
            reset: Has it made anew, with credentials read anew.
        """
        self._client, self._reset = client, reset
        self.now: datetime = server_time(None)
        """The cluster's clock at the last answer."""

    def find(self, namespace: str, selector: str) -> list[Pod]:
        """The pods with some labels, oldest first."""
        found = self._call(lambda api: api.list_namespaced_pod(namespace, label_selector=selector, **_RAW))
        pods: list[Pod] = json.loads(found)["items"]
        return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def get(self, name: str, namespace: str) -> Pod | None:
        """A pod; None if it is gone."""
        try:
            pod: Pod = json.loads(self._call(lambda api: api.read_namespaced_pod(name, namespace, **_RAW)))
        except _NotThereError:
            return None
        return pod

    def create(self, pod: V1Pod) -> None:
        """Create a pod.

        One of its name that is there already is taken for it: an answer may have been lost.
        """
        name, namespace = pod.metadata.name, pod.metadata.namespace
        try:
            self._call(lambda api: api.create_namespaced_pod(namespace, pod, **_RAW))
        except _ThereAlreadyError:
            found = (self.get(name, namespace) or {}).get("metadata", {})
            if not found or found.get("deletionTimestamp") or CHECKED in found.get("labels", {}):
                raise TryLaterError(Kind.REJECTED, f"a former pod {name} is still being deleted") from None

    def delete(self, name: str, namespace: str, grace: int | None = None) -> None:
        """Delete a pod, if it is there. ``grace`` in seconds; default: the pod's own."""
        options = V1DeleteOptions(grace_period_seconds=grace)
        with contextlib.suppress(_NotThereError):
            self._call(lambda api: api.delete_namespaced_pod(name, namespace, body=options, **_RAW))

    def check_off(self, name: str, namespace: str) -> None:
        """Label a pod, if it is there, as one whose end has been dealt with."""
        body = {"metadata": {"labels": {CHECKED: "True"}}}
        with contextlib.suppress(_NotThereError):
            self._call(lambda api: api.patch_namespaced_pod(name, namespace, body, **_RAW))

    def events(self, name: str, namespace: str) -> list[dict[str, Any]]:
        """What the cluster has noted about a pod, also about one that is gone; oldest first."""
        selector = f"involvedObject.name={name}"
        found = self._call(lambda api: api.list_namespaced_event(namespace, field_selector=selector, **_RAW))
        events: list[dict[str, Any]] = json.loads(found)["items"]
        return sorted(events, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))

    def log(self, name: str, namespace: str, container: str) -> bytes | None:
        """A container's log, each line with its time; None if there is none (yet, or any more)."""
        try:
            return self._call(
                lambda api: api.read_namespaced_pod_log(name, namespace, container=container, timestamps=True, **_RAW)
            )
        except RefusedError:  # not there, or the container waits to start; what is wrong, the pod's object says
            return None

    def _call(self, call: Callable[[CoreV1Api], Any]) -> bytes:
        """The whole answer of a call."""
        try:
            response = call(_failing_at_once(self._client()))
            content: bytes = response.data  # read here: it, too, can be cut off
            self.now = server_time(response.headers.get("Date"))
        except ApiException as error:
            raise self._meaning(error) from error
        except (HTTPError, OSError) as error:
            raise TryLaterError(Kind.UNREACHABLE, f"{type(error).__name__}: {error}") from error
        except (ConfigException, AirflowException) as error:
            message = f"{error}; check the Airflow connection that runner.connection names"
            raise RefusedError(Outcome(Kind.REJECTED, Retry.NEVER, message)) from error
        return content

    def _meaning(self, error: ApiException) -> Exception:
        body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
        try:
            message = str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            message = body or str(error.reason)
        if any(text in message for text in _QUOTA):
            return TryLaterError(Kind.REJECTED, message)
        if error.status == _NOT_FOUND:
            return _NotThereError(Outcome(Kind.REJECTED, Retry.NEVER, message))
        if error.status == _CONFLICT:
            return _ThereAlreadyError(Outcome(Kind.REJECTED, Retry.COUNTED, message))
        if error.status == _UNAUTHORIZED:
            self._reset()
        if not error.status or error.status in (_UNAUTHORIZED, 408, 429) or error.status >= 500:
            return TryLaterError(Kind.UNREACHABLE, f"HTTP {error.status}: {message}")
        not_allowed = error.status == _FORBIDDEN and " cannot " in message
        advice = "; see docs/kubernetes.md for what Airflow's service account must be allowed" * not_allowed
        return RefusedError(Outcome(Kind.REJECTED, Retry.NEVER, f"HTTP {error.status}: {message}{advice}"))


def _failing_at_once(api: CoreV1Api) -> CoreV1Api:
    """Have a client report trouble instead of trying three times more, with a warning each time.

    When to try again is the task's to decide, and to say.
    """
    api.api_client.rest_client.pool_manager.connection_pool_kw["retries"] = False
    return api


class _NotThereError(RefusedError):
    pass


class _ThereAlreadyError(RefusedError):
    pass
