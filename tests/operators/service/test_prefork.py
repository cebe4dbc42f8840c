"""Importing Airflow for its components, told to stop meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

Python = Callable[..., CompletedProcess[str]]

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


def test_an_import_that_makes_another_error_of_a_signal(python: Python, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED.format(happens="os.kill(os.getpid(), signal.SIGINT)"))
    outcome = python("-c", IMPORT.format(folder=str(tmp_path), seconds=60))
    assert (outcome.returncode, outcome.stdout) == (0, "told to stop\nFalse\n"), outcome.stderr


def test_an_import_that_makes_another_error_of_its_end(python: Python, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED.format(happens="pass"))
    outcome = python("-c", IMPORT.format(folder=str(tmp_path), seconds=0.5))
    assert "ServiceError: Airflow could not be imported within" in outcome.stderr


def test_an_import_that_fails_says_where(python: Python, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("raise ImportError('no such thing')\n")
    outcome = python("-c", IMPORT.format(folder=str(tmp_path), seconds=60))
    assert "ServiceError: Airflow can't be imported: ImportError: no such thing" in outcome.stderr
