"""What starts a process has it ended, and nothing that should live is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from operators import launch
from operators.service.processes import is_alive, send, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")

TIMEOUT = 20.0


def read_pid(path: Path) -> psutil.Process:
    """Wait for a process to write its id into a file."""
    assert wait_until(lambda: path.exists() and path.read_text().endswith("\n"), TIMEOUT), path
    return psutil.Process(int(path.read_text()))


def run_parent(script: str, folder: Path) -> subprocess.Popen[bytes]:
    """A Python process in its own session, running ``script`` with ``folder`` defined."""
    header = f"import os, signal, subprocess, sys, threading, time\nfolder = {str(folder)!r}\n"
    return subprocess.Popen([sys.executable, "-c", header + textwrap.dedent(script)], start_new_session=True)


@pytest.fixture
def cleanup() -> Iterator[list[psutil.Process]]:
    """Processes to kill whatever the test finds."""
    found: list[psutil.Process] = []
    yield found
    send(found, signal.SIGKILL)


@pytest.mark.parametrize("by_launcher", [True, False])
def test_command_ends_with_its_parent(by_launcher: bool, tmp_path: Path, cleanup: list[psutil.Process]) -> None:
    script = """
        from operators import launch
        argv = ["sh", "-c", f"echo $$ > {folder}/pid; exec sleep 600"]
        subprocess.Popen(launch.command(argv) if %r else argv)
        time.sleep(600)
    """
    parent = run_parent(script % by_launcher, tmp_path)
    child = read_pid(tmp_path / "pid")
    cleanup.append(child)
    parent.kill()
    parent.wait()
    # Without the launcher it lives on: the test can fail.
    assert wait_until(lambda: not is_alive(child), TIMEOUT if by_launcher else 1.0) == by_launcher


def test_signal_can_be_handled(tmp_path: Path, cleanup: list[psutil.Process]) -> None:
    script = """
        from operators import launch
        shell = f"trap 'touch {folder}/terminated; exit' TERM; echo $$ > {folder}/pid; while :; do sleep 0.1; done"
        subprocess.Popen(launch.command(["sh", "-c", shell], signal_name="TERM"))
        time.sleep(600)
    """
    parent = run_parent(script, tmp_path)
    child = read_pid(tmp_path / "pid")
    cleanup.append(child)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not is_alive(child), TIMEOUT)
    assert (tmp_path / "terminated").exists()


def test_command_whose_parent_is_dead_already_ends_at_once(tmp_path: Path) -> None:
    died_before = subprocess.Popen(["true"])
    died_before.wait()
    argv = [
        sys.executable,
        "-m",
        "operators.launch",
        "--parent",
        str(died_before.pid),
        "--",
        "touch",
        str(tmp_path / "ran"),
    ]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGTERM
    assert not (tmp_path / "ran").exists()


def test_launcher_becomes_the_command() -> None:
    # Python ignores SIGPIPE; if the command inherited that, bash would print it.
    process = subprocess.Popen(launch.command(["bash", "-c", "echo $$; trap -p PIPE; exit 7"]), stdout=subprocess.PIPE)
    output, _ = process.communicate()
    assert output.decode() == f"{process.pid}\n"
    assert process.returncode == 7


@pytest.mark.parametrize(("program", "code"), [("/no/such/program", 127), ("/", 126)])
def test_program_that_can_not_be_run(program: str, code: int) -> None:
    result = subprocess.run(launch.command([program]), capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert result.stderr.startswith(f"can't run {program}: ")
    assert "Traceback" not in result.stderr


def test_forks_end_with_their_parent_but_not_with_a_thread(tmp_path: Path, cleanup: list[psutil.Process]) -> None:
    script = """
        from operators import launch
        launch.tie_forks()
        def fork(name, then):
            if os.fork() == 0:
                then()
                with open(f"{folder}/{name}", "w") as file:
                    file.write(f"{os.getpid()}\\n")
                time.sleep(600)
        # A child, a grandchild, and one that a thread which ends at once has forked.
        fork("child", lambda: fork("grandchild", lambda: None))
        thread = threading.Thread(target=fork, args=("of_thread", lambda: None))
        thread.start()
        thread.join()
        open(f"{folder}/joined", "w").write(f"{os.getpid()}\\n")
        time.sleep(600)
    """
    parent = run_parent(script, tmp_path)
    read_pid(tmp_path / "joined")
    child, grandchild, of_thread = (read_pid(tmp_path / name) for name in ("child", "grandchild", "of_thread"))
    cleanup += [child, grandchild, of_thread]
    assert is_alive(of_thread) and is_alive(child) and is_alive(grandchild)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not is_alive(child) and not is_alive(grandchild), TIMEOUT)
    assert is_alive(of_thread)


def test_orphans_are_adopted(tmp_path: Path, cleanup: list[psutil.Process]) -> None:
    script = """
        from operators import launch
        launch.adopt_orphans()
        subprocess.run(["sh", "-c", f"sleep 600 & echo $! > {folder}/pid"])
        time.sleep(600)
    """
    parent = run_parent(script, tmp_path)
    orphan = read_pid(tmp_path / "pid")
    cleanup.append(orphan)
    try:
        assert wait_until(lambda: orphan.ppid() == parent.pid, TIMEOUT)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
