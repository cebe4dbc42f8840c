"""The cluster's API over HTTP, and the faults that it is to have.

It answers what Kubernetes' clients, Airflow's provider and kubectl ask for.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiohttp import web

from tests.support.cluster.admission import admit
from tests.support.cluster.budgets import check_eviction
from tests.support.cluster.containers import Line
from tests.support.cluster.discovery import BUDGETS, DISCOVERY, EVENTS, NAMESPACES, PODS, RESOURCES, Resource
from tests.support.cluster.kept import Kept
from tests.support.cluster.kubelet import Kubelet
from tests.support.cluster.objects import ApiError, Object, field_selects, selects
from tests.support.cluster.pods import Pod
from tests.support.cluster.store import Change

_LOOK_SECONDS = 1.0
_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v1(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<part>.+))?)?/?"
)
_WAITING_WORDS = {
    "ErrImagePull": "image can't be pulled",
    "ImagePullBackOff": "trying and failing to pull image",
}


@dataclass(frozen=True)
class Request:
    """A request to the API."""

    method: str
    path: str
    query: dict[str, str]
    time: float
    """Seconds since the epoch."""


@dataclass
class Fault:
    """What is to go wrong with requests; made by ``Cluster.add_fault``."""

    method: str
    path: re.Pattern[str]
    left: int
    """How many requests the fault is still going to hit."""
    status: int | None = None
    delay: float | None = None
    cut: bool = False
    lost_response: bool = False


@dataclass
class Api:
    """The API server.

    ``kept`` has all objects beside pods and events, ``priorities`` are the names of the priority
    classes there are; ``quota`` has the name and the number of pods, by namespace.
    """

    kubelet: Kubelet
    kept: Kept
    token: str
    priorities: Collection[str]
    quota: dict[str, tuple[str, int]]
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    _runner: web.AppRunner | None = None
    _server: asyncio.Server | None = None
    _held: socket.socket | None = None
    """A socket that keeps the port for this server while nobody listens."""

    # The server

    async def start(self) -> None:
        """Take a port, and listen."""
        app = web.Application(middlewares=[self._around])
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self._held = _bound(self.port)
        self.port = self._held.getsockname()[1]
        await self.listen()

    async def listen(self) -> None:
        """Accept connections from now on."""
        assert self._runner is not None
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                self._runner.server,  # type: ignore[arg-type]
                sock=_bound(self.port),
                ssl=self.tls,
            )

    def leave(self) -> None:
        """Refuse new connections, and cut those there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    async def stop(self) -> None:
        """End the server, and give its port back."""
        self.leave()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._held is not None:
            self._held.close()

    @web.middleware
    async def _around(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests.append(Request(request.method, request.path, dict(request.query), time.time()))
        try:
            fault = self._fault(request)
            if fault is not None and fault.delay is not None:
                await asyncio.sleep(fault.delay)
            if fault is not None and fault.cut:
                return _cut(request)
            if fault is not None and fault.status is not None:
                raise ApiError(fault.status, f"injected: {request.method} {request.path}")
            if request.path != "/version" and request.headers.get("Authorization") != f"Bearer {self.token}":
                raise ApiError(401, "Unauthorized")
            response = await handler(request)
            return _cut(request) if fault is not None and fault.lost_response else response
        except ApiError as error:
            return _error(error)
        except ConnectionError:
            return _cut(request)
        except Exception as error:
            self.kubelet.failures.append(error)
            return _error(ApiError(500, f"the test double failed: {error!r}"))

    def _fault(self, request: web.Request) -> Fault | None:
        for fault in self.faults:
            if fault.left > 0 and fault.method in ("*", request.method) and fault.path.search(request.path):
                fault.left -= 1
                return fault
        return None

    # What is asked for

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET" and (found := DISCOVERY.get(request.path.rstrip("/"))) is not None:
            return web.json_response(found)
        path = _PATH.fullmatch(request.path)
        resource = RESOURCES.get(path["plural"]) if path else None
        if path is None or resource is None or resource.group != (path["group"] or ""):
            raise _no_such_resource()
        namespace, name = path["namespace"], path["name"]
        if namespace is not None:
            self.kept.check_namespace(namespace)
        if name is None:
            return await self._collection(request, resource, namespace)
        if resource is EVENTS or resource.namespaced != (namespace is not None):
            raise _no_such_resource()
        if resource is PODS:
            return await self._pod(request, namespace, name, path["part"] or "")
        return await self._single(request, resource, namespace, name)

    async def _collection(self, request: web.Request, resource: Resource, namespace: str | None) -> web.StreamResponse:
        one_place = namespace is not None or not resource.namespaced
        match request.method:
            case "GET" if _true(request.query.get("watch")):
                return await self._watch(request, resource, namespace)
            case "GET":
                return _list(resource, self.kubelet.store.version, self._texts(request, resource, namespace))
            case "POST" if one_place and resource is not EVENTS:
                body = await _body(request)
                if not isinstance(body, dict):
                    raise ApiError(400, f"the object provided is not of type {resource.kind}")
                if resource is PODS:
                    return self._create(body, namespace or "")
                return web.json_response(self.kept.create(resource, body, namespace), status=201)
            case "DELETE" if namespace is not None and resource is not EVENTS:
                return self._delete_all(request, resource, namespace, await _body(request))
        raise _not_allowed()

    def _delete_all(self, request: web.Request, resource: Resource, namespace: str, options: Any) -> web.Response:
        if resource is PODS:
            chosen = list(self._pods(request, namespace))
            for pod in chosen:
                self.kubelet.delete(pod, _grace(request, options))
            return _list(PODS, self.kubelet.store.version, (pod.text_object for pod in chosen))
        items = list(self._items(request, resource, namespace))
        for item in items:
            self.kept.delete(resource, namespace, item["metadata"]["name"])
        return _list(resource, self.kubelet.store.version, map(json.dumps, items))

    async def _single(
        self, request: web.Request, resource: Resource, namespace: str | None, name: str
    ) -> web.StreamResponse:
        body = await _body(request)
        item = self.kept.get(resource, namespace, name)
        match request.method:
            case "GET":
                return web.json_response(item)
            case "DELETE":
                _check_precondition(body, item)
                self.kept.delete(resource, namespace, name)
                if resource is NAMESPACES:
                    return web.json_response(item)
                about = {"name": name, "kind": resource.plural, "uid": item["metadata"]["uid"]}
                return web.json_response(_success(200) | {"details": about})
        raise _not_allowed()

    async def _pod(self, request: web.Request, namespace: str, name: str, part: str) -> web.StreamResponse:
        body = await _body(request)
        # Only now: it may have gone while the body came.
        pod = self.kubelet.store.pods.get((namespace, name))
        if pod is None:
            raise ApiError(404, f'pods "{name}" not found', name=name)
        match request.method, part:
            case "GET", "" | "status":
                pass
            case "GET", "log":
                return await self._log(request, pod)
            case "PATCH", "":
                if request.content_type == "application/json-patch+json" or not isinstance(body, dict):
                    raise ApiError(415, "this cluster is a test double: merge patches only")
                self.kubelet.patch(pod, body)
            case "DELETE", "":
                _check_precondition(body, pod.object)
                self.kubelet.delete(pod, _grace(request, body))
            case "POST", "eviction":
                return self._evict(request, pod, body)
            case _:
                raise _not_allowed()
        return web.Response(text=pod.text_object, content_type="application/json")

    def _evict(self, request: web.Request, pod: Pod, body: Object) -> web.Response:
        beside = [other for other in self.kubelet.store.pods.values() if other.namespace == pod.namespace]
        check_eviction(pod, self.kept.items(BUDGETS, pod.namespace), beside)
        grace = _grace(request, body.get("deleteOptions") or {})
        self.kubelet.disrupt(pod, "EvictionByEvictionAPI", "Eviction API: evicting", grace)
        return web.json_response(_success(201), status=201)

    def _create(self, body: Object, namespace: str) -> web.Response:
        if not isinstance(body.get("spec"), dict):
            raise ApiError(400, "the object provided is not a pod")
        self.kept.check_namespace(namespace, PODS.plural, (body.get("metadata") or {}).get("name", ""))
        accounts = self.kept.accounts(namespace)
        item = admit(body, namespace, now=time.time(), accounts=accounts, priorities=self.priorities)
        if namespace in self.quota:
            name, limit = self.quota[namespace]
            used = sum(pod.namespace == namespace and not pod.over for pod in self.kubelet.store.pods.values())
            if used >= limit:
                pod = item["metadata"]["name"]
                why = f"exceeded quota: {name}, requested: pods=1, used: pods={used}, limited: pods={limit}"
                raise ApiError(403, f'pods "{pod}" is forbidden: {why}', name=pod)
        text = self.kubelet.add(item).text_object
        return web.Response(text=text, status=201, content_type="application/json")

    def _pods(self, request: web.Request, namespace: str | None) -> Iterator[Pod]:
        labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
        for pod in list(self.kubelet.store.pods.values()):
            inside = namespace in (None, pod.namespace)
            if inside and selects(labels, pod.labels) and field_selects(fields, pod.object):
                yield pod

    def _items(self, request: web.Request, resource: Resource, namespace: str | None) -> Iterator[Object]:
        labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
        for item in self.kept.items(resource, namespace):
            if selects(labels, item["metadata"].get("labels") or {}) and field_selects(fields, item):
                yield item

    def _texts(self, request: web.Request, resource: Resource, namespace: str | None) -> Iterator[str]:
        if resource is PODS:
            yield from (pod.text_object for pod in self._pods(request, namespace))
            return
        if resource is not EVENTS:
            yield from map(json.dumps, self._items(request, resource, namespace))
            return
        fields = request.query.get("fieldSelector", "")
        events = self.kubelet.store.events
        about = re.search(r"involvedObject\.name==?([^,]+)", fields)
        # The one pod's, not a look at all: a cluster has many pods.
        keys = [(namespace, about[1])] if about and namespace else list(events)
        for key in keys:
            for event in events.get(key, {}).values():
                if namespace in (None, key[0]) and field_selects(fields, event):
                    yield json.dumps(event)

    # Watches

    async def _watch(self, request: web.Request, resource: Resource, namespace: str | None) -> web.StreamResponse:
        store, query = self.kubelet.store, request.query
        changes: asyncio.Queue[Change] = asyncio.Queue()
        version = query.get("resourceVersion") or "0"
        at = store.version
        first = [f'{{"type":"ADDED","object":{text}}}' for text in self._texts(request, resource, namespace)]
        if _true(query.get("sendInitialEvents")):
            metadata = {"resourceVersion": str(at), "annotations": {"k8s.io/initial-events-end": "true"}}
            bookmark = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
            first.append(json.dumps({"type": "BOOKMARK", "object": bookmark}))
        elif version != "0":
            first = []
            for change in store.history:
                if change.version > int(version):
                    changes.put_nowait(change)
        store.watchers.add(changes)
        response = await _stream(request, "application/json")
        ends = time.monotonic() + float(query.get("timeoutSeconds", 1800))
        try:
            for text in first:
                await response.write(text.encode() + b"\n")
            while (left := ends - time.monotonic()) > 0 and request.transport is not None:
                try:
                    change = await asyncio.wait_for(changes.get(), min(left, _LOOK_SECONDS))
                except TimeoutError:
                    continue
                if self._concerns(change, request, resource, namespace):
                    line = f'{{"type":"{change.kind}","object":{change.text}}}\n'
                    await response.write(line.encode())
            await response.write_eof()
        finally:
            store.watchers.discard(changes)
        return response

    def _concerns(self, change: Change, request: web.Request, resource: Resource, namespace: str | None) -> bool:
        if change.collection != resource.plural:
            return False
        item = json.loads(change.text)
        labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
        return (
            namespace in (None, item["metadata"].get("namespace"))
            and selects(labels, item["metadata"].get("labels") or {})
            and field_selects(fields, item)
        )

    # Logs

    async def _log(self, request: web.Request, pod: Pod) -> web.StreamResponse:
        await self._reach_node(request, pod)
        self._check_log(request, pod)
        query = request.query
        if pod.node is None:
            return web.Response(status=204)
        lines = list(pod.log.since(0))
        at, cuts = pod.log.end, pod.log.cuts
        if "tailLines" in query:
            lines = lines[max(len(lines) - int(_number(query["tailLines"])), 0) :]
        oldest = 0.0
        if "sinceSeconds" in query:
            oldest = (time.time() - _number(query["sinceSeconds"])) * 1e9
        elif "sinceTime" in query:
            oldest = datetime.fromisoformat(query["sinceTime"]).timestamp() * 1e9
        lines = [line for line in lines if line.nanoseconds >= oldest]
        stamped = _true(query.get("timestamps"))
        response = await _stream(request, "text/plain")
        await _write(response, lines, stamped)
        while _true(query.get("follow")) and not (pod.log.closed and pod.log.end == at):
            await pod.log.more(at, _LOOK_SECONDS)
            if request.transport is None:
                return response
            if self.kubelet.places[pod.node].lost and pod.log.cuts == cuts:
                await asyncio.sleep(_LOOK_SECONDS)  # the connection hangs
                continue
            if pod.log.cuts != cuts:
                return _cut(request)
            lines, at = list(pod.log.since(at)), pod.log.end
            await _write(response, lines, stamped)
        await response.write_eof()
        return response

    async def _reach_node(self, request: web.Request, pod: Pod) -> None:
        place = self.kubelet.places.get(pod.node or "")
        if place is None or place.kubelet.is_set():
            return
        why = "connect: connection refused"
        if place.lost:
            await asyncio.sleep(self.kubelet.timing.lost_log)
            why = "i/o timeout"
        address = f"{place.address}:10250"
        options = f"?{request.query_string}" if request.query_string else ""
        url = f"https://{address}/containerLogs/{pod.namespace}/{pod.name}/{pod.box['name']}{options}"
        raise ApiError(500, f'Get "{url}": dial tcp {address}: {why}')

    def _check_log(self, request: web.Request, pod: Pod) -> None:
        box = pod.box["name"]
        container = request.query.get("container", box)
        if container != box:
            raise ApiError(400, f"container {container} is not valid for pod {pod.name}")
        statuses = pod.object["status"].get("containerStatuses")
        if pod.over and not statuses:
            raise ApiError(400, f'container "{container}" in pod "{pod.name}" is not available')
        if statuses and (end := statuses[0]["state"].get("terminated")) and "containerID" not in end:
            raise ApiError(400, f'container "{container}" in pod "{pod.name}" is terminated')
        if pod.no_log and pod.over:
            raise ApiError(500, pod.no_log)
        if _true(request.query.get("previous")):
            raise ApiError(400, f'previous terminated container "{container}" in pod "{pod.name}" not found')
        if statuses and (waiting := statuses[0]["state"].get("waiting")):
            why = _WAITING_WORDS.get(waiting["reason"], waiting["reason"])
            raise ApiError(400, f'container "{container}" in pod "{pod.name}" is waiting to start: {why}')


def _bound(port: int) -> socket.socket:
    # With this option two sockets may have one port as long as only one of them listens.
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    return found


def _true(text: str | None) -> bool:
    return text in ("1", "t", "T", "true", "True", "TRUE")


def _cut(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _error(error: ApiError) -> web.Response:
    # A budget says no time: without it clients don't try again by themselves.
    headers = {"Retry-After": "1"} if error.code == 429 and "causes" not in error.body["details"] else {}
    return web.json_response(error.body, status=error.code, headers=headers)


def _not_allowed() -> ApiError:
    return ApiError(405, "the server does not allow this method on the requested resource")


def _no_such_resource() -> ApiError:
    return ApiError(404, "the server could not find the requested resource")


def _success(code: int) -> Object:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": code}


def _check_precondition(options: Object, item: Object) -> None:
    wanted = (options.get("preconditions") or {}).get("uid")
    if wanted not in (None, uid := item["metadata"]["uid"]):
        raise ApiError(409, f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}")


def _list(resource: Resource, version: int, items: Iterable[str]) -> web.Response:
    kind, metadata = f"{resource.kind}List", json.dumps({"resourceVersion": str(version)})
    begin = f'{{"kind":"{kind}","apiVersion":"{resource.api_version}","metadata":{metadata},"items":['
    return web.Response(text=f"{begin}{','.join(items)}]}}", content_type="application/json")


async def _body(request: web.Request) -> Any:
    if not (text := await request.read()):
        return {}
    if request.content_type == "application/vnd.kubernetes.protobuf":
        raise ApiError(415, "this cluster is a test double: it takes JSON only (kubectl sends it with create -f)")
    try:
        return json.loads(text) or {}
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error


def _grace(request: web.Request, options: Object) -> float | None:
    given = request.query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
    return None if given is None else _number(given)


def _number(text: Any) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ApiError(400, f"strconv.ParseInt: parsing {text!r}: invalid syntax") from error


async def _stream(request: web.Request, content_type: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response


async def _write(response: web.StreamResponse, lines: list[Line], stamped: bool) -> None:
    if data := b"".join(line.stamped if stamped else line.text for line in lines):
        await response.write(data)
