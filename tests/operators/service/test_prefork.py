"""Importing Airflow for its components, told to stop meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

# As the supervisor does it: a signal's own handler only notes that it came.
IMPORT = """
import os, signal, sys
from operators.service import prefork
prefork._MODULES = ("interrupted",)
signal.signal(signal.SIGINT, lambda *_: print("told to stop"))
sys.path.insert(0, "")
sys.path.insert(1, {folder!r})
print(prefork.Parent(dict(os.environ)).import_airflow({seconds}))
"""
# What C extensions do with whatever their imports raise.
INTERRUPTED = """
import os, signal, time
try:
    {happens}
    time.sleep(60)
except BaseException:
    raise ImportError("initialization failed") from None
"""


@pytest.mark.parametrize("seconds", [60, 0.5])
def test_an_import_that_makes_another_error_of_a_signal(
    python: Callable[..., CompletedProcess[str]], tmp_path: Path, seconds: float
) -> None:
    happens = "os.kill(os.getpid(), signal.SIGINT)" if seconds == 60 else "pass"
    (tmp_path / "interrupted.py").write_text(INTERRUPTED.format(happens=happens))

    outcome = python("-c", IMPORT.format(folder=str(tmp_path), seconds=seconds))

    if seconds == 60:
        assert (outcome.returncode, outcome.stdout) == (0, "told to stop\nFalse\n"), outcome.stderr
    else:
        assert "ServiceError: Airflow could not be imported within" in outcome.stderr


def test_an_import_that_fails_says_where(python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("raise ImportError('no such thing')\n")
    outcome = python("-c", IMPORT.format(folder=str(tmp_path), seconds=60))
    assert "ServiceError: Airflow can't be imported: ImportError: no such thing" in outcome.stderr
