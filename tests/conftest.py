"""What tests of all packages share.

It is a small real volume with its spec, and the commands as users call them.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from xdist.scheduler import LoadScopeScheduling

from chunkflow_core import variables
from chunkflow_core.__main__ import main
from tests.support.airflow.failure_summary import pytest_runtest_makereport, pytest_terminal_summary
from tests.support.airflow.local import SERVICES, local_volumes
from tests.support.harms import Volume
from tests.support.nursery import shared
from tests.support.volume import spec_content, write_layer

# Tests say what CPUs do, also on a machine with a GPU; those of a GPU run where this is set.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Ctrl-C is a signal here, and to all programs that tests start, also where a shell in the
# background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["local_volumes", "pytest_runtest_makereport", "pytest_terminal_summary"]
_ENDS_ITS_SERVICE = "tests/operators/service/test_service.py"
"""The file that comes last of its group, in whatever order files are named."""
_LONG = (
    "tests/chunkflow_core/storage/test_object_storage.py",
    "tests/chunkflow_core/storage/test_storage_failures.py",
    "tests/operators/test_warm.py",
    "tests/promises/test_histories.py",
)
"""Files without an Airflow that take longest.

Begun last, they would have the other processes wait for them.
"""
_EACH_APART = ("tests/promises/test_histories.py", "tests/promises/test_simulation.py")
"""Files whose tests share nothing, and take minutes each."""
SHARING_AN_AIRFLOW = {
    "local": ("tests/dags/test_airflow.py", "tests/dags/test_recurring.py", _ENDS_ITS_SERVICE),
    "pods": tuple(f"tests/dags/test_kubernetes{what}.py" for what in ("", "_partition", "_trouble")),
}
"""Files that share an Airflow, by what their session fixture gives them.

The fixtures are in ``tests/support/airflow/local.py`` and ``tests/dags/conftest.py``.
"""

Outcome = subprocess.CompletedProcess[str]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long, unless that or a real cluster is asked for.

    Files that start an Airflow come first: they take minutes, and in several processes the others
    fill the gaps.
    """
    if not {"long", "cluster"} & set(config.option.markexpr.split()):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    with_airflow = {item.path for item in items if item.get_closest_marker("airflow")}
    items.sort(
        key=lambda item: (
            item.path not in with_airflow,
            group(item.nodeid) if item.path in with_airflow else not item.nodeid.startswith(_LONG),
            item.nodeid.startswith(_ENDS_ITS_SERVICE),
        )
    )


def group(nodeid: str) -> str:
    """The tests that run in one process: those of a file, or of files that share an Airflow."""
    file = nodeid.partition("::")[0]
    if file in _EACH_APART:
        return nodeid
    return next((name for name, files in SHARING_AN_AIRFLOW.items() if file in files), file)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End a group's service with the last of its tests."""
    if nextitem is None or group(nextitem.nodeid) != group(item.nodeid):
        SERVICES.close()


def pytest_collectstart() -> None:
    """Collect no garbage while test files are imported.

    They import a million objects that stay: to look for garbage among them meanwhile takes longer
    than all else.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    """Never look for garbage among what was imported.

    There is hardly any, and each new client of a storage would look for it there.
    """
    gc.enable()
    gc.freeze()


class TogetherScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Hands groups to the processes."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TogetherScheduling:
    """Take the place of ``--dist``."""
    return TogetherScheduling(config, log)


@pytest.fixture(scope="module")
def finished_volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return Volume(tmp_path_factory.mktemp("volume"))


@pytest.fixture
def volume(finished_volume: Volume) -> Volume:
    """A finished volume, to be harmed; each test gets it as it was."""
    finished_volume.restore()
    return finished_volume


@pytest.fixture(autouse=True)
def nothing_to_conceal() -> Iterator[None]:
    """Lets each test begin as a process of its own does, which knows no variables yet."""
    known = variables._Known
    before = known.texts, known.pattern
    known.texts, known.pattern = {}, None
    yield
    known.texts, known.pattern = before


@pytest.fixture(scope="session")
def random_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of 20 × 48 × 40 random voxels, uint8; shared by all tests, not to be changed."""
    path = tmp_path_factory.mktemp("layers") / "random"
    write_layer(path)
    return path


@pytest.fixture
def make_spec(tmp_path: Path, random_layer: Path) -> Callable[..., Path]:
    """Writes a good spec of 2 × 2 × 2 blocks into ``tmp_path``.

    Keyword arguments replace keys (``model={…}`` as a whole). A keyword with the value ``...``
    removes the key.
    """

    def make(**changes: Any) -> Path:
        content = spec_content(random_layer, tmp_path) | {
            "output": {"path": f"file://{tmp_path}/output", "chunk_size": [6, 12, 12]}
        }
        path = tmp_path / "spec.yaml"
        kept = {key: value for key, value in (content | changes).items() if value is not ...}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return make


@pytest.fixture
def chunkflow(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a ``chunkflow-core`` command in this process; gives exit code and what it printed.

    Exit code 1 and a traceback are for the unforeseen, so no test may ever see them.
    """

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        texts = [str(argument) for argument in arguments]
        try:
            code = main(texts)
        except SystemExit as ending:  # argparse
            code = int(ending.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err, printed.err
        return subprocess.CompletedProcess(texts, code, printed.out, printed.err)

    return call


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs ``python ARGUMENTS`` as a process of its own, in an empty folder."""

    def call(*arguments: object) -> Outcome:
        command = [sys.executable, *map(str, arguments)]
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)

    return call


@pytest.fixture
def warm_python(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs ``python ARGUMENTS`` as a fork of a process that has imported the library.

    It is for tests that don't ask how a process starts.
    """

    def call(*arguments: object) -> Outcome:
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        return shared().run([sys.executable, *map(str, arguments)], os.environ, folder)

    return call
