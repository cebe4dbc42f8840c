"""Keeps the API server answering while SQLite, which takes one writer at a time, has others wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

_THREADS = 500
"""Requests that may wait for SQLite at once: with all threads taken (by default 40), the writer they wait for could not end."""


def wait_in_threads() -> None:
    """Have requests that write to the database wait for it in threads only. To be called before the API's routes are made.

    Airflow 3.3 commits the entries of its action log on the event loop (``airflow.api_fastapi.logging.decorators``). While one
    waits there for the writer before it, that one's commit, which needs the loop, can't come: nothing is answered until SQLite
    gives up. So does the clearing up of revoked tokens (``airflow.models.revoked_token``), first after two days; it is left
    out, there is a row for each time that somebody has logged out.
    """
    from airflow.api_fastapi.logging import decorators
    from airflow.models.revoked_token import RevokedToken

    original = decorators.action_logging

    def action_logging(event: str | None = None) -> Callable[..., Any]:
        log_action = original(event)
        return _in_thread(log_action) if iscoroutinefunction(log_action) else log_action

    decorators.action_logging = action_logging
    RevokedToken._last_cleanup_time = math.inf


def _in_thread(dependency: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
    """A dependency of FastAPI's, run in a thread, that awaits nothing but the request's body."""

    @wraps(dependency)
    async def run(request: Request, **others: Any) -> None:
        current_default_thread_limiter().total_tokens = _THREADS
        await request.body()  # kept by the request: from here on no awaiting takes time
        await run_in_threadpool(_run, dependency(request=request, **others))

    return run


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("Airflow's action_logging awaits more than the request's body")
