"""A client of the REST API of a running service."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from operators.service.service import Service
from operators.service.state import ServiceError

_API = "/api/v2/"
_PAGE_ROWS = 100
# An expired token, and one that was signed with other keys.
_TOKEN_REFUSED = (401, 403)
_TIMEOUT_SECONDS = 60.0


class ApiError(ServiceError):
    """The API refused a request; the message is its own."""

    def __init__(self, message: str, status_code: int) -> None:
        """Tell the API's ``message`` and the HTTP status."""
        super().__init__(message)
        self.status_code = status_code
        """The HTTP status."""


class Client:
    """Talks to the API server of a service as its user. Close it, or use it as a context manager.

    Paths are relative to ``/api/v2/`` (``dags/my_dag/dagRuns``), or absolute (``/my-plugin/…``).
    All methods raise :class:`ApiError` if the API says no, and :class:`ServiceError` if it can't be
    reached.
    """

    def __init__(self, service: Service, timeout: float = _TIMEOUT_SECONDS) -> None:
        """``timeout``: how long to wait for an answer, in seconds."""
        self._service = service
        # The service listens on the loopback interface: no proxy, whatever the environment says.
        self._http = httpx.Client(base_url=service.url, timeout=timeout, trust_env=False)
        self._token: str | None = None

    def __enter__(self) -> Self:
        """Use the client as a context manager, which closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        """The JSON answer to a GET; ``params`` become the query."""
        return self._request("GET", path, params=params)

    def post(self, path: str, json: Any) -> Any:
        """The JSON answer to a POST of a JSON body."""
        return self._request("POST", path, json=json)

    def patch(self, path: str, json: Any) -> Any:
        """The JSON answer to a PATCH with a JSON body."""
        return self._request("PATCH", path, json=json)

    def pages(self, path: str, key: str, **params: Any) -> Iterator[Any]:
        """All rows of a list, over all of its pages.

        Args:
            path: As for all methods.
            key: Names the list in the answer (``task_instances``).
            params: The query.
        """
        offset = 0
        while True:
            page = self.get(path, **params, limit=_PAGE_ROWS, offset=offset)
            rows = page[key]
            yield from rows
            offset += len(rows)
            if not rows or offset >= page["total_entries"]:
                return

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        url = path if path.startswith("/") else _API + path
        response = self._send(method, url, **arguments)
        if response.status_code in _TOKEN_REFUSED:
            self._token = None
            response = self._send(method, url, **arguments)
        if response.is_error:
            raise ApiError(f"{method} {url}: {_message(response)}", response.status_code)
        return response.json() if response.content else None

    def _send(self, method: str, url: str, **arguments: Any) -> httpx.Response:
        try:
            if self._token is None:
                self._token = self._log_in()
            return self._http.request(method, url, headers={"Authorization": f"Bearer {self._token}"}, **arguments)
        except httpx.HTTPError as error:
            raise ServiceError(
                f"{self._service.url} does not answer ({error}); see `chunkflow-airflow status` and the logs in "
                f"{self._service.home / 'logs'}"
            ) from error

    def _log_in(self) -> str:
        credentials = {"username": self._service.username, "password": self._service.password}
        response = self._http.post("/auth/token", json=credentials)
        if response.is_error:
            raise ApiError(f"can't log in as {self._service.username}: {_message(response)}", response.status_code)
        return str(response.json()["access_token"])


def _message(response: httpx.Response) -> str:
    """What the API says is wrong, in one line."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = response.text
    if isinstance(detail, list):
        # One entry for each invalid field.
        detail = "; ".join(f"{'.'.join(map(str, entry.get('loc', ())))}: {entry.get('msg')}" for entry in detail)
    return f"{detail or response.reason_phrase} (HTTP {response.status_code})"
