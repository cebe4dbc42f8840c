"""What a running service says about itself, in its home's ``service.json``; the lock beside it."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from chunkflow_core.errors import ChunkflowError
from operators.service.processes import Identity
from operators.service.settings import USERNAME, Home, write_private


class ServiceError(ChunkflowError):
    """The service did not start, did not end, or does not do what was asked.

    The message says what to do.
    """


class AlreadyRunning(ServiceError):
    """A service runs in this home already (EX_TEMPFAIL)."""

    exit_code = 75


@dataclass(frozen=True, slots=True)
class State:
    """The content of ``service.json``."""

    phase: str
    """``starting``, ``ready`` or ``stopping``."""
    guard: Identity
    """The outermost process, which ends last."""
    supervisor: Identity
    """The process that looks after the components."""
    url: str
    port: int
    dags: str
    """The folder with the DAG files."""
    password_file: str
    username: str = USERNAME
    components: Mapping[str, Identity] = field(default_factory=dict)
    """The running components by name."""

    @property
    def alive(self) -> bool:
        """Whether the service that wrote this still runs."""
        return self.guard.alive or self.supervisor.alive

    def update(self, **changes: Any) -> State:
        """A copy with these fields changed."""
        return replace(self, **changes)

    def write(self, home: Home) -> None:
        """Replace ``service.json``."""
        document = asdict(self)
        guard = document.pop("guard")
        write_private(home.state, json.dumps({**guard, **document}, indent=2) + "\n")

    @classmethod
    def read(cls, home: Home) -> State | None:
        """The state of the service that runs in this home, ``None`` if none does.

        What a dead one has left does not count.
        """
        try:
            document = json.loads(home.state.read_text())
            guard = Identity(document.pop("pid"), document.pop("created"))
            supervisor = Identity(**document.pop("supervisor"))
            components = {name: Identity(**value) for name, value in document.pop("components").items()}
            state = cls(guard=guard, supervisor=supervisor, components=components, **document)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return state if state.alive else None


def lock(home: Home) -> int | None:
    """Take the home for this process and the children it forks.

    Returns a file descriptor, or ``None`` if it is taken.

    The lock goes when the last of them has ended, however that happens.
    """
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def ready_line(state: State) -> str:
    """One line: where the service is and how to log in. The password itself only on a terminal."""
    password = f"the password in {state.password_file}"
    if sys.stdout.isatty():
        password = f"password {read_password(Path(state.password_file), state.username)}"
    return f"Airflow is up at {state.url} (log in as {state.username} with {password})"


def read_password(path: Path, username: str = USERNAME) -> str:
    """The password of a user. Raises :class:`ServiceError` if the file doesn't tell."""
    try:
        return str(json.loads(path.read_text())[username])
    except (OSError, ValueError, KeyError) as error:
        raise ServiceError(f"no password for {username} in {path} ({error}); remove the file and start again") from None
