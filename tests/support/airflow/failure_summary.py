"""The last lines of a run of the tests: what failed, why, and where the logs of its Airflow are.

A fixture that starts an Airflow calls ``remember_logs(request, folder)``. The folder is then named
for each test that fails while it could use the fixture, whatever process it ran in. ``conftest.py``
gives the hooks to pytest.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_FOLDERS = pytest.StashKey[list[Path]]()
_SECTION = "Airflow's logs"
_LINES = 3
"""How many lines of the reason of a failure are told."""
_WIDTH = 200
"""How much of each of those lines is told, in characters."""
_FAILURES = 8
"""How many failures are told with their reasons.

In a run that breaks everything more would only push the first ones away.
"""


def remember_logs(request: pytest.FixtureRequest, folder: Path) -> None:
    """Have ``folder`` named when a test fails that is in the scope of this fixture."""
    request.node.stash.setdefault(_FOLDERS, []).append(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the folders in the report, which travels between processes."""
    report = yield
    folders = [folder for node in item.listchain() for folder in node.stash.get(_FOLDERS, [])]
    if report.failed and folders:
        report.sections.append((_SECTION, "\n".join(map(str, folders))))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write the last lines, if anything has failed."""
    failed = [*terminalreporter.getreports("failed"), *terminalreporter.getreports("error")]
    if not failed:
        return
    terminalreporter.section("what failed, and why")
    for report in failed[:_FAILURES]:
        terminalreporter.line(f"{report.nodeid}{_moment(report)}")
        for line in _reason(report):
            terminalreporter.line(f"    {line[:_WIDTH]}")
        for name, folders in report.sections:
            if name == _SECTION:
                terminalreporter.line(f"    {_SECTION}: {folders}")
    if len(failed) > _FAILURES:
        terminalreporter.line(f"and {len(failed) - _FAILURES} more")


def _moment(report: Any) -> str:
    when = getattr(report, "when", "call")
    return "" if when == "call" else f" ({when})"


def _reason(report: Any) -> list[str]:
    """Where a test failed, and the beginning of the message.

    Of a report that is only a text, the end of the text.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return [line for line in report.longreprtext.splitlines() if line.strip()][-_LINES:]
    message = [line for line in crash.message.splitlines() if line.strip()]
    return [f"{crash.path}:{crash.lineno}", *message[:_LINES]]
