"""The home of a single-machine Airflow: its files, its secrets, its settings.

All settings are written to ``airflow.cfg``, so that ``AIRFLOW_HOME=<home> airflow dags list`` sees
what the service sees. They come in two kinds. The *private* ones make the service what it is (where
it listens, its keys): ``AIRFLOW__…`` variables of the environment, which may be meant for another
Airflow, don't touch them. The others are *tuning*, and such variables override them, as in any
Airflow; so does ``AIRFLOW__DATABASE__SQL_ALCHEMY_CONN``, for a database of one's own.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import io
import json
import os
import secrets
import sys
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from operators import warm

HOST = "127.0.0.1"
USERNAME = "admin"
DATABASE_USER = "airflow"

SUPERVISED = "CHUNKFLOW_AIRFLOW_SUPERVISED"
"""Environment variable of everything that a service runs: its home."""

_PRIVATE_MODE = 0o600
_DEFAULT_MAX_ACTIVE_TASKS = 16
_DEFAULT_POOL_SLOTS = 128

_CFG_HEADER = """\
# Written by chunkflow-airflow at each start: what you change here is lost then.
# AIRFLOW__<SECTION>__<KEY> variables given to `chunkflow-airflow up` override what is not needed to keep it private.

"""

_LOCAL_SETTINGS = '''\
"""Written by chunkflow-airflow at each start; what it calls says what for."""

import gc
import os
import sys

# A component makes hundreds of thousands of objects that stay while it starts: looking again and again for garbage
# among them is a tenth of its start.
gc.set_threshold(50_000)
if "CHUNKFLOW_AIRFLOW_SUPERVISED" in os.environ:
    from operators.launch import tie_forks

    tie_forks()
    if {"scheduler", "dag-processor"} & set(sys.argv):
        from operators.service.preload import preload

        preload()

__all__ = []
'''

# Unset by us, but any of these in the environment would make our Airflow another one than the one
# we supervise.
_FOREIGN = (
    ("api", "ssl_cert"),
    ("api", "ssl_key"),
    ("api_auth", "jwt_private_key_path"),
    ("api_auth", "trusted_jwks_url"),
    ("core", "multi_team"),
    ("core", "simple_auth_manager_all_admins"),
    ("dag_processor", "dag_bundle_config_list"),
    ("logging", "remote_logging"),
)

_CONNECTION = ("database", "sql_alchemy_conn")

Settings = dict[str, dict[str, str]]

API_PATIENCE = {
    "execution_api_retries": "70",
    "execution_api_retry_wait_min": "2",
    "execution_api_retry_wait_max": "4",
}
"""Section ``workers``: each request of a task waits 2 to 4½ minutes for an API server that refuses
connections, instead of failing.

That is longer than the supervisor leaves one that hangs, and shorter than
``task_instance_heartbeat_timeout``, after which the scheduler takes the task for dead. Airflow's
own settings (5 attempts) wait 4 to 15 s, less than a start takes on a busy machine.
"""


@dataclass(frozen=True, slots=True)
class Home:
    """The directory that holds everything of one service."""

    path: Path

    @property
    def state(self) -> Path:
        """What the running service says about itself."""
        return self.path / "service.json"

    @property
    def lock(self) -> Path:
        """Locked (flock) while a service runs here."""
        return self.path / "service.lock"

    @property
    def passwords(self) -> Path:
        """JSON object: user name → password."""
        return self.path / "passwords.json"

    @property
    def database(self) -> Path:
        """The data folder of Airflow's PostgreSQL."""
        return self.path / "postgres"

    @property
    def keys(self) -> Path:
        """JSON object: the keys that were made once for this home."""
        return self.path / "keys.json"

    @property
    def migrated(self) -> Path:
        """The Airflow version that the database was last migrated to, and which one that was."""
        return self.path / "migrated"

    @property
    def last_port(self) -> Path:
        """The port that was chosen last."""
        return self.path / "port"

    def log(self, component: str) -> Path:
        """The log file of a component, of the migration, or of the supervisor itself."""
        return self.path / "logs" / f"{component}.log"


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner may read, in one step."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _PRIVATE_MODE), "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def prepare_home(home: Home) -> None:
    """Make the directories, keys and password of a home that lacks them. Raises ``OSError``."""
    home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in ("logs", "config"):
        (home.path / folder).mkdir(exist_ok=True)
    # Fernet wants 32 bytes in base64; HS512, which signs Airflow's tokens, at least 64 bytes.
    fernet = urlsafe_b64encode(secrets.token_bytes(32)).decode()
    new = {
        "fernet": fernet,
        "jwt": secrets.token_hex(64),
        "api": secrets.token_hex(32),
        "database": secrets.token_hex(32),
    }
    keys = read_keys(home) if home.keys.exists() else {}
    if new.keys() - keys.keys():
        write_private(home.keys, json.dumps(new | keys, indent=2) + "\n")
    if not home.passwords.exists():
        write_private(home.passwords, json.dumps({USERNAME: secrets.token_urlsafe(16)}) + "\n")
    for path in (home.keys, home.passwords):
        path.chmod(_PRIVATE_MODE)


def read_keys(home: Home) -> dict[str, str]:
    """The keys that were made once for this home: ``fernet``, ``jwt``, ``api``, ``database``."""
    keys: dict[str, str] = json.loads(home.keys.read_text())
    return keys


def own_database(environment: Mapping[str, str]) -> bool:
    """Whether the service is to bring its own database: the environment names no other one."""
    return not _variables([_CONNECTION]) & environment.keys()


def private_settings(
    home: Home,
    dags: Path,
    port: int,
    database_port: int | None,
    parallelism: int | None,
    environment: Mapping[str, str],
) -> Settings:
    """The settings that only the service decides.

    Args:
        home: Where the keys are.
        dags: The folder with the DAG files.
        port: The API server's.
        database_port: That of the service's own database; ``None`` if ``environment`` names another
            one.
        parallelism: ``None`` leaves it to the environment.
        environment: What the service was started with.
    """
    url = f"http://{HOST}:{port}"
    keys = read_keys(home)
    core = {
        "auth_manager": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
        "dags_folder": str(dags),
        "execution_api_server_url": f"{url}/execution/",
        "executor": "LocalExecutor",
        "fernet_key": keys["fernet"],
        "simple_auth_manager_passwords_file": str(home.passwords),
        "simple_auth_manager_users": f"{USERNAME}:admin",
    }
    if parallelism is not None:
        core["parallelism"] = str(parallelism)
    return {
        "core": core,
        "database": _connection_of(environment)
        if database_port is None
        else _connections(keys["database"], database_port),
        "logging": {
            "base_log_folder": str(home.path / "logs"),
            "logging_config_class": "operators.service.task_logs.LOGGING_CONFIG",
        },
        "api": {"base_url": url, "host": HOST, "port": str(port), "secret_key": keys["api"], "workers": "1"},
        "api_auth": {"jwt_secret": keys["jwt"]},
    }


def _connection_of(environment: Mapping[str, str]) -> dict[str, str]:
    section, key = _CONNECTION
    value = environment.get(f"AIRFLOW__{section}__{key}".upper())
    return {} if value is None else {key: value}  # else it comes from a command or a backend of secrets


def _connections(password: str, port: int) -> dict[str, str]:
    address = f"{DATABASE_USER}:{password}@{HOST}:{port}/postgres"
    return {
        "sql_alchemy_conn": f"postgresql+psycopg2://{address}",
        "sql_alchemy_conn_async": f"postgresql+asyncpg://{address}",
        "sql_alchemy_connect_args": "operators.service.connection.ARGUMENTS",
    }


def tuning_settings(parallelism: int | None) -> Settings:
    """The settings that the environment may change.

    Args:
        parallelism: How many tasks run at once; twice the number of cores if not given.
    """
    parallelism = parallelism or 2 * (os.cpu_count() or 1)
    core = {
        "dagbag_import_timeout": "120",
        "dags_are_paused_at_creation": "False",
        "default_pool_task_slot_count": str(max(_DEFAULT_POOL_SLOTS, parallelism)),
        # The default looks the name up in the DNS, which can take long on a laptop.
        "hostname_callable": "socket.gethostname",
        "load_examples": "False",
        "max_active_tasks_per_dag": str(max(_DEFAULT_MAX_ACTIVE_TASKS, parallelism)),
        "parallelism": str(parallelism),
    }
    if sys.platform == "linux":
        # Forked workers share the scheduler's memory, and end with it (operators.launch.tie_forks).
        core["mp_start_method"] = "fork"
    return {
        "core": core,
        "database": {
            "load_default_connections": "False",
            # A full pool would be waited for on the API server's event loop, which what would free
            # it needs.
            "sql_alchemy_max_overflow": "-1",
        },
        "logging": {"colored_console_log": "False"},
        "api": {"instance_name": "chunkflow"},
        "workers": API_PATIENCE
        | {
            "execution_api_timeout": "60",
            # A worker often notices the end of a task only at the next heartbeat. Short tasks wait
            # for that most of their time at the default of 5 s; some eight heartbeats a second from
            # all workers cost little.
            "min_heartbeat_interval": str(min(5, max(1, parallelism // 8))),
        },
        # Tasks of a scheduler that was killed died with it: find them in half a minute, not in
        # five.
        "scheduler": {"orphaned_tasks_check_interval": "30"},
        # Seconds until a new or changed file in the DAGs folder is seen, without parsing all the
        # time.
        "dag_processor": {
            "dag_file_processor_timeout": "180",
            "min_file_process_interval": "30",
            "refresh_interval": "30",
        },
    }


def write_settings(home: Home, private: Settings, tuning: Settings) -> None:
    """Write ``airflow.cfg`` and ``config/airflow_local_settings.py``."""
    parser = configparser.ConfigParser(interpolation=None)
    for settings in (private, tuning):
        for section, values in settings.items():
            if not parser.has_section(section):
                parser.add_section(section)
            for key, value in values.items():
                # Airflow interpolates.
                parser.set(section, key, value.replace("%", "%%"))
    text = io.StringIO()
    parser.write(text)
    write_private(home.path / "airflow.cfg", _CFG_HEADER + text.getvalue())
    (home.path / "config" / "airflow_local_settings.py").write_text(_LOCAL_SETTINGS)


def _variables(keys: Iterable[tuple[str, str]]) -> set[str]:
    """The environment variables that would set these keys."""
    names = {f"AIRFLOW__{section.upper()}__{key.upper()}" for section, key in keys}
    return {name + suffix for name in names for suffix in ("", "_CMD", "_SECRET")}


def warm_parent_name(home: Home) -> str | None:
    """Name of the parent from which tasks start warm, one a home (``operators.warm``).

    ``None`` where that is not possible.
    """
    if sys.platform != "linux":
        return None
    return f"chunkflow/{hashlib.sha256(str(home.path).encode()).hexdigest()[:32]}"


def component_environment(home: Home, private: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """What the components run with: ``environment`` less what would make them another Airflow."""
    locked = _variables([*_FOREIGN, *((section, key) for section, values in private.items() for key in values)])
    result = {name: value for name, value in environment.items() if name not in locked and name != "AIRFLOW_CONFIG"}
    # Tasks talk to the API server; a proxy must not come between.
    no_proxy = ",".join(filter(None, (environment.get("NO_PROXY") or environment.get("no_proxy"), HOST)))
    return result | {
        "AIRFLOW_HOME": str(home.path),
        SUPERVISED: str(home.path),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PYTHONUNBUFFERED": "1",
        **({} if (warm_parent := warm_parent_name(home)) is None else {warm.VARIABLE: warm_parent}),
    }


def database_mark(environment: Mapping[str, str], version: str) -> str:
    """What a database that is migrated to a version of Airflow is known by, without its secrets."""
    given = "".join(f"{name}={environment.get(name, '')}\n" for name in sorted(_variables([_CONNECTION])))
    return f"{version} {'own' if own_database(environment) else hashlib.sha256(given.encode()).hexdigest()}"


def is_migrated(home: Home, mark: str) -> bool:
    """Whether the database that this mark is of was migrated."""
    with contextlib.suppress(OSError):
        return home.migrated.read_text() == mark
    return False
