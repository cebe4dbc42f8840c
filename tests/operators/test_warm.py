"""Commands that a warm parent forks are what commands are that start from nothing.

They end with whoever asked for them.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import operators
from operators import launch, warm
from operators.local import CommandRunner
from operators.service.processes import is_alive, wait_until
from tests.support.nursery import Nursery

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a warm parent needs Linux")

LIMIT = 120.0
WARM_UP = "chunkflow_core.steps.warm_up"

Start = Callable[..., "subprocess.Popen[bytes]"]
Module = Callable[[str], str]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a parent, as the supervisor does; its name is in its ``args``."""
    parents: list[subprocess.Popen[bytes]] = []

    def call(prefix: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[bytes]:
        name = f"chunkflow-test/{os.getpid()}/{random.getrandbits(64)}"
        command = launch.command([sys.executable, "-P", "-m", "operators.warm", name])
        parent = subprocess.Popen([*prefix, *command], env=os.environ | environment)
        parents.append(parent)
        assert wait_until(lambda: warm.answers(name), LIMIT)
        return parent

    yield call
    for parent in parents:
        parent.kill()
        parent.wait()


@pytest.fixture
def parent(start: Start, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """A parent that this process's tasks find."""
    started = start()
    monkeypatch.setenv(warm.VARIABLE, name_of(started))
    return started


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts programs that have imported, as a task's process has, what runs commands."""
    home = str(tmp_path_factory.mktemp("airflow"))
    nursery = Nursery(["operators.local"], AIRFLOW_HOME=home, _AIRFLOW__AS_LIBRARY="1")
    yield nursery
    nursery.close()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Writes a module that can be run from the working directory; its name."""
    monkeypatch.chdir(tmp_path)

    def call(text: str) -> str:
        name = f"module_{random.getrandbits(64)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return call


def name_of(parent: subprocess.Popen[bytes]) -> str:
    return str(parent.args[-1])  # type: ignore[index]


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    return CommandRunner(logging.getLogger(), environment).run(arguments)


def children(parent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(parent.pid).children()


FACTS = """
import json, os, resource, signal, sys, threading
print(json.dumps({
    "arguments": sys.argv, "title": open("/proc/self/cmdline").read().replace(chr(0), " ").strip(),
    "name": __name__, "path": sys.path, "environment": dict(os.environ), "folder": os.getcwd(),
    "umask": [line for line in open("/proc/self/status") if line.startswith("Umask")],
    "limits": {
        name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")
    },
    "cpus": sorted(os.sched_getaffinity(0)), "nice": os.nice(0),
    "own session and group": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "handlers": {str(number): str(signal.getsignal(number)) for number in (2, 3, 10, 13, 15, 17)},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:3], "how many": len(os.listdir("/proc/self/fd")),
    "input": sys.stdin.read(),
    "encodings": [sys.stdout.encoding, sys.stderr.encoding, sys.stdout.errors, sys.stderr.errors],
    "terminal": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "write through": [sys.stdout.write_through, sys.stderr.write_through], "threads": threading.active_count(),
    "standard": sys.stdout is sys.__stdout__, "python": [sys.executable, sys.prefix, sys.flags.dev_mode],
}))
"""


def test_it_is_what_a_process_is_that_starts_from_nothing(
    parent: subprocess.Popen[bytes], tasks: Nursery, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = module(FACTS)
    os.sched_setaffinity(0, before := os.sched_getaffinity(0))
    soft, hard = (64 << 30, 65 << 30)
    script = f"""
import logging, os, resource, sys
from operators.local import CommandRunner
os.umask(0o027)
os.sched_setaffinity(0, [{min(before)}])
resource.setrlimit(resource.RLIMIT_AS, ({soft}, {hard}))
code, output, _ = CommandRunner(logging.getLogger(), {{"MINE": "ä = %s"}}).run([{facts!r}, "one", "two words"])
sys.stdout.write(output)
sys.exit(code)
"""
    found = []
    for name in (name_of(parent), ""):
        monkeypatch.setenv(warm.VARIABLE, name)
        done = tasks.run([sys.executable, "-c", script], os.environ, Path.cwd())
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    one, other = found
    assert one["environment"].pop(warm.VARIABLE) == name_of(parent), "else nothing was compared"
    del other["environment"][warm.VARIABLE]
    # Folders that come from how Python itself was started, not from the command.
    paths = [facts.pop("path") for facts in found]
    assert paths[0][0] == paths[1][0] == str(Path.cwd())
    assert set(paths[1]) <= set(paths[0])
    assert one == other
    assert one["environment"]["MINE"] == "ä = %s"
    assert one["limits"]["RLIMIT_AS"] == [soft, hard]
    assert one["cpus"] == [min(before)]
    assert one["arguments"][1:] == ["one", "two words"]


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("print('fine')", 0, "fine"),
        ("import sys; sys.exit(66)", 66, "no output"),
        ("import sys; sys.exit(300)", 44, "no output"),
        ("raise SystemExit", 0, "no output"),
        ("import sys; sys.exit('in words')", 1, "in words"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, "no output"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, "no output"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, "no output"),
        ("import atexit; atexit.register(print, 'at the end')", 0, "at the end"),
        ("import threading; threading.Timer(0.1, print, ['a thread of its own']).start()", 0, "a thread of its own"),
        ("import os; os._exit(3)", 3, "no output"),
        ("import no_such_module", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); bytes(1 << 29)",
            1,
            "MemoryError",
        ),
    ],
)
def test_ends(parent: subprocess.Popen[bytes], module: Module, text: str, code: int, word: str) -> None:
    name = module(text)
    assert (run(name)[0], run(name)[2]) == (code, word)
    assert (run(name, **{warm.VARIABLE: ""})[0], run(name, **{warm.VARIABLE: ""})[2]) == (code, word), "from nothing"


def test_random_numbers_are_not_the_parents(parent: subprocess.Popen[bytes], module: Module) -> None:
    name = module("import random, uuid, numpy; print(random.random(), uuid.uuid4(), numpy.random.random())")
    runner = CommandRunner(logging.getLogger(), imports=[WARM_UP])
    values = [runner.run([name])[1].split() for _ in range(2)]
    assert len(values[0]) == 3
    assert not set(values[0]) & set(values[1])


def test_output_comes_at_once(parent: subprocess.Popen[bytes], module: Module, tmp_path: Path) -> None:
    name = module(
        "import os, sys, time\nprint('begun')\nprint('also here', file=sys.stderr)\n"
        "while not os.path.exists('go'): time.sleep(0.05)"
    )

    class Go(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.add(record.getMessage())
            if {"begun", "also here"} <= seen:
                (tmp_path / "go").touch()

    seen: set[str] = set()
    log = logging.getLogger(name)
    log.setLevel(logging.INFO)
    log.addHandler(Go())
    assert CommandRunner(log).run([name])[0] == 0


def test_many_at_once(parent: subprocess.Popen[bytes], module: Module) -> None:
    name = module("import sys; print(sys.argv[1], 'of many'); sys.exit(int(sys.argv[1]))")
    with ThreadPoolExecutor(20) as pool:
        outcomes = list(pool.map(lambda number: run(name, str(number)), range(60)))
    assert [(code, word) for code, _, word in outcomes] == [(n, f"{n} of many") for n in range(60)]
    assert not children(parent), "all were collected"


TASK = """
import logging, os, signal, sys
from operators.local import CommandRunner
runner = CommandRunner(logging.getLogger())
signal.signal(signal.SIGTERM, lambda *_: runner.kill())
print(runner.run(sys.argv[1:])[0])
"""
FAMILY = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "stubborn": signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
with open("new", "w") as file: file.write(f"{os.getpid()} {child.pid}")
os.rename("new", "family")
while True: time.sleep(0.05)
"""


class Task:
    """A task whose command has started a process."""

    def __init__(self, tasks: Nursery, name: str, folder: Path, how: str) -> None:
        self._output = folder / "output"
        with self._output.open("wb") as output:
            command = [sys.executable, "-c", TASK, name, how]
            self._process = tasks.start(command, os.environ, folder, output.fileno())
        assert wait_until((folder / "family").exists, LIMIT), self._output.read_text()
        self.family = [psutil.Process(int(pid)) for pid in (folder / "family").read_text().split()]
        """Both of the others."""

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def wait(self) -> None:
        self._process.wait(LIMIT)

    def code(self) -> str:
        """What it says at its end of how the command has ended."""
        self.wait()
        return self._output.read_text().splitlines()[-1]

    def wait_for_family(self) -> bool:
        return wait_until(lambda: not any(map(is_alive, self.family)), LIMIT)


@pytest.fixture
def begin(tasks: Nursery, module: Module, tmp_path: Path) -> Callable[[str], Task]:
    """Begins a task whose command is ``gentle`` or ``stubborn``."""
    return lambda how: Task(tasks, module(FAMILY), tmp_path, how)


def test_it_ends_with_the_task(parent: subprocess.Popen[bytes], begin: Callable[[str], Task]) -> None:
    task = begin("stubborn")
    assert children(parent) == task.family[:1]
    task.send(signal.SIGKILL)
    task.wait()
    assert task.wait_for_family()


@pytest.mark.parametrize(("how", "code"), [("gentle", "-15"), ("stubborn", "-9")])
def test_a_task_that_is_cancelled_ends_it(
    parent: subprocess.Popen[bytes], begin: Callable[[str], Task], how: str, code: str
) -> None:
    task = begin(how)
    task.send(signal.SIGTERM)
    assert task.code() == code
    assert task.wait_for_family()


def test_a_parent_that_dies_takes_it_along_and_others_start_from_nothing(
    parent: subprocess.Popen[bytes], begin: Callable[[str], Task], module: Module
) -> None:
    task = begin("stubborn")
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not is_alive(task.family[0]), LIMIT)
    task.family[1].kill()  # as it holds on to the output
    assert task.code() == "-9", "as whatever is killed, it is worth a retry"
    assert run(module("print('from nothing')"))[2] == "from nothing"


def test_a_parent_that_is_told_to_end_waits_for_its_children(
    parent: subprocess.Popen[bytes], module: Module, tmp_path: Path
) -> None:
    name = module(
        "import os, time\nopen('begun', 'w')\nwhile not os.path.exists('go'): time.sleep(0.05)\nprint('done')"
    )
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(run, name)
        assert wait_until((tmp_path / "begun").exists, LIMIT)
        parent.terminate()
        assert wait_until(lambda: not warm.answers(name_of(parent)), LIMIT)
        assert parent.poll() is None
        (tmp_path / "go").touch()
        assert outcome.result()[2] == "done"
    assert parent.wait(LIMIT) == 0


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project's packages, to be changed."""
    folder = tmp_path / "copy"
    for name in ("operators", "chunkflow_core"):
        shutil.copytree(Path(operators.__file__).parents[1] / name, folder / name)
    return folder


@pytest.mark.parametrize("change", ["edit", "new", "package"])
def test_changed_code_makes_another_parent(
    start: Start, copy: Path, change: str, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = start(PYTHONPATH=str(copy))
    monkeypatch.setenv(warm.VARIABLE, name_of(parent))
    name = module("import os; print(os.getppid())")
    assert run(name)[2] == str(parent.pid)
    changed = {
        "edit": "chunkflow_core/lattice/blocks.py",
        "new": "operators/new.py",
        "package": "package-1.0.dist-info",
    }[change]
    (copy / changed).open("a").close()
    if change == "edit":
        os.utime(copy / changed, ns=(1, 1))
    assert run(name)[2] != str(parent.pid), "started from nothing, with the new code"
    assert parent.wait(LIMIT) == 0, "the supervisor starts the next one"


def test_what_else_comes_into_a_folder_of_modules_changes_nothing(
    start: Start, copy: Path, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = start(PYTHONPATH=str(copy))
    monkeypatch.setenv(warm.VARIABLE, name_of(parent))
    name = module("import os; print(os.getppid())")
    for number in range(3):
        (copy / f"result-{number}.npy").touch()
        assert run(name)[2] == str(parent.pid)


def test_where_an_import_starts_a_thread_nothing_is_forked(
    start: Start, copy: Path, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    (copy / "chunkflow_core" / "threaded.py").write_text(text)
    parent = start(PYTHONPATH=str(copy))
    monkeypatch.setenv(warm.VARIABLE, name_of(parent))
    runner = CommandRunner(logging.getLogger(), imports=["chunkflow_core.threaded"])
    assert runner.run([module("import os; print(os.getppid())")])[2] != str(parent.pid)


def test_warming_up_leaves_no_thread_and_nothing_open(parent: subprocess.Popen[bytes], module: Module) -> None:
    process = psutil.Process(parent.pid)
    before = process.num_fds()
    imports = [WARM_UP, "chunkflow_core.engines.pytorch"]
    stages = "{'chunkflow_core.steps.infer', 'chunkflow_core.steps.blend'}"
    name = module(f"import sys; print('torch' in sys.modules, {stages} <= sys.modules.keys())")
    assert CommandRunner(logging.getLogger(), imports=imports).run([name])[2] == "True True"
    assert process.num_threads() == 1
    assert wait_until(lambda: process.num_fds() == before, LIMIT), "the connection goes last"


def test_imports_are_of_this_project_only(parent: subprocess.Popen[bytes], module: Module) -> None:
    name = module("import sys; print('antigravity' in sys.modules)")
    assert CommandRunner(logging.getLogger(), imports=["antigravity"]).run([name])[2] == "False"


@pytest.mark.skipif(os.geteuid() != 0, reason="to be somebody else takes root")
def test_nothing_is_taken_from_or_done_for_another_user(
    start: Start, module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = module("import os; print(os.getuid(), os.getppid())")
    rights = ("--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override", "--clear-groups")
    nobody = ("setpriv", "--reuid=nobody", *rights, "--")
    theirs, mine = start(nobody), start()
    monkeypatch.setenv(warm.VARIABLE, name_of(theirs))
    assert run(name)[2].split()[0] == "0"
    assert run(name)[2].split()[1] != str(theirs.pid)
    monkeypatch.setenv(warm.VARIABLE, name_of(mine))
    assert run(name)[2] == f"0 {mine.pid}"
    asked: Any = subprocess.run(
        [*nobody, sys.executable, "-c", TASK, name], capture_output=True, text=True, check=False
    )
    assert f"65534 {mine.pid}" not in asked.stdout and f"0 {mine.pid}" not in asked.stdout
    assert asked.stdout.splitlines()[-1] == "0", asked.stderr
