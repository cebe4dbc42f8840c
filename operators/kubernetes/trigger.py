"""Watches pods from Airflow's triggerer, for tasks that have left their worker."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.triggers.base import TriggerEvent
from kubernetes_asyncio.client import ApiClient, CoreV1Api
from kubernetes_asyncio.client.exceptions import ApiException

from operators.kubernetes.ends import BASE, Limits, Look, examine, server_time, vanished

_REQUEST_TIMEOUT = 30.0
_AWAY = "out of reach"
_SETTLED = 5.0
"""Seconds before which no trigger fires.

The scheduler may hear only then that the worker has left the task; a task that is queued again by
that time it takes for one that has failed (apache/airflow#71580): a try is lost, and its record.
"""
_CLIENT_AGE = 600.0
"""Seconds after which a connection is made anew, with credentials read anew."""

log = logging.getLogger(__name__)


class PodTrigger(KubernetesPodTrigger):
    """Fires when a pod has ended, whichever way, or when it is time to try to launch one again.

    The event says little: the operator looks at the pod again. What it has to remember meanwhile is
    carried along. Deleting the pod of a task that a user cancels is inherited.
    """

    def __init__(
        self,
        *,
        pod_name: str,
        pod_namespace: str,
        kubernetes_conn_id: str,
        poll_interval: float,
        pending_timeout: float,
        start_timeout: float,
        api_timeout: float,
        termination_grace_period: int,
        delay: float | None = None,
        carried: dict[str, Any] | None = None,
    ) -> None:
        """Make the trigger.

        Args:
            pod_name: The pod; empty while there is none.
            pod_namespace: Where it is.
            kubernetes_conn_id: Connection to the cluster.
            poll_interval: Seconds between looks.
            pending_timeout: See ``operators.kubernetes.ends.Limits``.
            start_timeout: Likewise.
            api_timeout: Seconds without an answer of the cluster after which to give up.
            termination_grace_period: Seconds that the pod gets to end when a user cancels the task.
            delay: Fire after so many seconds, without looking at a pod.
            carried: Part of the event.
        """
        super().__init__(
            pod_name=pod_name,
            pod_namespace=pod_namespace,
            trigger_start_time=datetime.now(UTC),
            base_container_name=BASE,
            kubernetes_conn_id=kubernetes_conn_id,
            poll_interval=poll_interval,
            termination_grace_period=termination_grace_period,
        )
        self.limits = Limits(pending_timeout, start_timeout)
        self.api_timeout, self.delay, self.carried = api_timeout, delay, carried or {}

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and arguments, without credentials: the triggerer resolves the connection."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {
            "pod_name": self.pod_name,
            "pod_namespace": self.pod_namespace,
            "kubernetes_conn_id": self.kubernetes_conn_id,
            "poll_interval": self.poll_interval,
            "pending_timeout": self.limits.pending,
            "start_timeout": self.limits.start,
            "api_timeout": self.api_timeout,
            "termination_grace_period": self.termination_grace_period,
            "delay": self.delay,
            "carried": self.carried,
        }

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look at the pod until it has ended."""
        began = time.monotonic()
        if self.delay is not None:
            await asyncio.sleep(max(self.delay, _SETTLED))
            self._fired_event = True
            yield _event({"status": "launch", **self.carried})
            return
        status, message = await self._until_the_end()
        await asyncio.sleep(max(0.0, began + _SETTLED - time.monotonic()))
        self._fired_event = True
        event = {"status": status, "message": message, "name": self.pod_name, "namespace": self.pod_namespace}
        yield _event(event | self.carried)

    async def on_kill(self) -> None:
        """Delete the pod of a task that a user has cancelled, if there is one."""
        if self.pod_name:
            await super().on_kill()

    async def _until_the_end(self) -> tuple[str, str]:
        state, answered = "", time.monotonic()
        # Triggers start together when a triggerer does; their requests need not come together.
        await asyncio.sleep(random.uniform(0, self.poll_interval))
        while True:
            try:
                look = await self._look()
            except Exception as error:  # whatever it was, the pod goes on
                away = time.monotonic() - answered
                if state != _AWAY:  # said once, not for as long as it lasts
                    log.warning("can't look at pod %s: %s: %s", self.pod_name, type(error).__name__, error)
                state = _AWAY
                if away > self.api_timeout:
                    return "unreachable", f"no answer for {away:.0f} s: {type(error).__name__}: {error}"
            else:
                answered = time.monotonic()
                if look.state != state:
                    state = look.state
                    log.info("pod %s: %s", self.pod_name, state)
                if look.outcome:
                    return "ended", str(look.outcome)
            await asyncio.sleep(self.poll_interval)

    async def _look(self) -> Look:
        """What the pod's object says now."""
        client = await _Client.of(self.kubernetes_conn_id)
        try:
            response: Any = await CoreV1Api(client).read_namespaced_pod(
                self.pod_name, self.pod_namespace, _preload_content=False, _request_timeout=_REQUEST_TIMEOUT
            )
            # Parsed by hand: making the client's objects of it costs ten times as much.
            body = await response.read()
        except Exception as error:
            if isinstance(error, ApiException) and error.status == 404:
                return vanished(self.pod_name)
            await _Client.drop(self.kubernetes_conn_id, client)
            raise
        if response.status == 404:
            return vanished(self.pod_name)
        if response.status != 200:
            if response.status == 401:
                await _Client.drop(self.kubernetes_conn_id, client)
            raise RuntimeError(f"HTTP {response.status}: {body[:200]!r}")
        return examine(json.loads(body), self.limits, server_time(response.headers.get("Date")))


@dataclass
class _Client:
    """The connection that all triggers of a process share.

    Each of its own would cost a TLS context and a session.
    """

    manager: AbstractAsyncContextManager[ApiClient]
    client: ApiClient
    made: float

    @classmethod
    async def of(cls, connection: str | None) -> ApiClient:
        """The client for an Airflow connection."""
        lock = _locks.setdefault((connection, id(asyncio.get_running_loop())), asyncio.Lock())
        async with lock:
            shared = _clients.get(connection)
            if shared is None or time.monotonic() - shared.made > _CLIENT_AGE:
                manager = AsyncKubernetesHook(conn_id=connection).get_conn()
                _clients[connection] = cls(manager, await manager.__aenter__(), time.monotonic())
                if shared is not None:
                    asyncio.get_running_loop().call_later(_REQUEST_TIMEOUT, _close, shared)
            return _clients[connection].client

    @classmethod
    async def drop(cls, connection: str | None, client: ApiClient) -> None:
        """Have the next look make a new client, after this one did not work."""
        shared = _clients.get(connection)
        if shared is not None and shared.client is client:
            del _clients[connection]
            asyncio.get_running_loop().call_later(_REQUEST_TIMEOUT, _close, shared)


def _event(payload: dict[str, Any]) -> TriggerEvent:
    return TriggerEvent(payload)  # type: ignore[no-untyped-call]


def _close(shared: _Client) -> None:
    """Close a client once those that still use it have their answers."""
    task = asyncio.ensure_future(shared.manager.__aexit__(None, None, None))
    _closing.add(task)
    task.add_done_callback(_closing.discard)


_clients: dict[str | None, _Client] = {}
_locks: dict[tuple[str | None, int], asyncio.Lock] = {}
_closing: set[asyncio.Future[Any]] = set()
