"""A failing run says in its last lines what to look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest
from tests.support.airflow.failure_summary import remember_logs

@pytest.fixture(scope="module")
def airflow(request):
    remember_logs(request, "/somewhere/logs")

def test_good(airflow):
    pass

def test_bad(airflow):
    text = "long " * 100
    assert text == "short"

@pytest.mark.skip(reason="many lines" * 100)
@pytest.mark.parametrize("number", range(30))
def test_skipped(number):
    pass
"""
HOOKS = "from tests.support.airflow.failure_summary import pytest_runtest_makereport, pytest_terminal_summary\n"
OTHER = """
import pytest
from tests.support.airflow.failure_summary import remember_logs

def test_without_airflow():
    raise ValueError("wrong\\nin several\\nlines\\nand\\nmore")

@pytest.fixture
def broken(request):
    remember_logs(request, "/elsewhere/logs")
    raise OSError("not that day")

def test_set_up(broken):
    pass
"""


def test_the_last_lines(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text(OTHER)
    root = Path(__file__).resolve().parents[2]
    # No more than it takes to start a second process: what is told there has to arrive here.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "xdist", "-p", "no:cacheprovider", "-n", "1"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(root / "setup.cfg"),
        "--rootdir",
        str(tmp_path),
        "-q",
        *plugins,
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    last = "\n".join(done.stdout.splitlines()[-20:])
    other = (
        "test_other.py::test_without_airflow\n    test_other.py:6\n    ValueError: wrong\n    in several\n    lines\n"
    )
    assert other.replace("test_other.py:6", f"{tmp_path}/test_other.py:6") in last
    assert "test_some.py::test_bad\n" in last and "AssertionError: assert 'long long" in last
    assert "test_other.py::test_set_up (setup)\n" in last and "    OSError: not that day\n" in last
    assert last.count("    Airflow's logs: /somewhere/logs") == 1
    assert last.count("/elsewhere/logs") == 1
    assert "2 failed, 1 passed, 30 skipped, 1 error in" in last and "many lines" not in last
