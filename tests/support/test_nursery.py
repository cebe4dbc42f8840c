"""A command that the nursery has forked is as one that was executed.

The command itself can't tell, and nobody can tell from what it does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes
import psutil
import pytest

from operators.service.processes import is_alive, wait_until
from tests.support.cluster.client import wait_for_log
from tests.support.cluster.double import Cluster
from tests.support.nursery import Nursery, module_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process file descriptors are Linux's")

COMMAND = ["python", "-m", "chunkflow_core.odd", "word"]
"""A module that the test writes; ``sitecustomize`` makes it one of the package's."""
LOGGED = ["python", "-m", "chunkflow_core.commands.first_process", "--", "chunkflow_core.odd", "word"]
LIMIT = 20.0


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def environment(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Environment in which ``COMMAND`` runs some code."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import chunkflow_core\nchunkflow_core.__path__.append({str(folder)!r})\n"
    )

    def make(code: str) -> dict[str, str]:
        (folder / "odd.py").write_text(code)
        python = f"{Path(sys.executable).parent}:{os.defpath}"
        repository = Path(__file__).resolve().parents[2]
        return {"PATH": python, "LANG": "C.UTF-8", "PYTHONPATH": f"{folder}:{repository}", "HOME": str(tmp_path)}

    return make


Outcome = tuple[int, str]


def forked(nursery: Nursery, argv: list[str], environment: Mapping[str, str], folder: Path) -> Outcome:
    """How a forked command ends, and what it prints."""
    reading, writing = os.pipe()
    child = nursery.start(argv, environment, folder, writing)
    os.close(writing)
    with os.fdopen(reading) as output:
        text = output.read()
    return child.wait(), text


def executed(argv: list[str], environment: Mapping[str, str], folder: Path) -> Outcome:
    """The same of an executed one."""
    done = subprocess.run(
        argv,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


LOOK = """
import os, signal, sys, tempfile
print(sorted(os.environ.items()), os.getcwd(), sys.orig_argv[1:], sys.argv, sys.path[:3], tempfile.gettempdir())
print(__name__, globals().get("__file__"), getattr(__spec__, "name", None))
print(sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors)
print(os.getsid(0) in (os.getpid(), os.getppid()), os.read(0, 1), os.fstat(1) == os.fstat(2))
print(sorted(int(descriptor) for descriptor in os.listdir("/proc/self/fd")))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
# Of the signals only those that programs use.
print([(key, int(status[key], 16) & 0x7FFFFFFF) for key in ("SigBlk", "SigIgn", "SigCgt")], status["Threads"])
"""
INTERLEAVED = """
import sys
for n in range(3):
    print("out", n)
    print("err", n, file=sys.stderr)
"""
LAST_WORDS = """
import atexit, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
print("no line's end", end="")
sys.exit(3)
"""
ENDS = {
    "done": "",
    "code": "import sys; sys.exit(75)",
    "text": "import sys; sys.exit('told')",
    "large": "import sys; sys.exit(300)",
    "at once": "import os; print('lost'); os._exit(9)",
    "killed": "import os; print('up', flush=True); os.kill(os.getpid(), 9)",
    "terminated": "import os; os.kill(os.getpid(), 15)",
    "last words": LAST_WORDS,
}


@pytest.mark.parametrize("how", ["module", "logged", "file", "program"])
def test_it_is_as_if_it_had_been_executed(
    nursery: Nursery, environment: Callable[[str], dict[str, str]], tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "cwd"
    folder.mkdir()
    codes = {"module": [LOOK, INTERLEAVED, *ENDS.values()], "logged": [LOOK, INTERLEAVED, ENDS["code"], ENDS["killed"]]}
    for code in codes.get(how, [LOOK, ENDS["code"]]):
        variables = environment(code)
        argv = {
            "module": COMMAND,
            "logged": LOGGED,
            "file": ["python", f"{tmp_path}/code/odd.py", "word"],
            "program": ["python", "-c", code, "word"],
        }[how]
        assert forked(nursery, argv, variables, folder) == executed(argv, variables, folder), code


def test_one_is_waited_for_no_longer_than_one_wants(nursery: Nursery, tmp_path: Path) -> None:
    with (tmp_path / "said").open("wb") as said:
        child = nursery.start(["python", "-c", "import time; time.sleep(600)"], {}, tmp_path, said.fileno())
    with pytest.raises(TimeoutError, match=f"process {child.pid} has not ended within 0.1 s"):
        child.wait(0.1)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(LIMIT) == -signal.SIGKILL


def test_an_error_is_told(nursery: Nursery, environment: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    code, text = forked(nursery, ["python", "-m", "chunkflow_core.nothing"], environment(""), tmp_path)
    assert code == 1 and "No module named chunkflow_core.nothing" in text
    code, text = forked(nursery, [*COMMAND[:2], "chunkflow_core", "plan", "nowhere"], environment(""), tmp_path)
    assert code == 78 and text.startswith("error: nowhere"), text
    code, text = forked(nursery, [*LOGGED[:4], "platform"], environment(""), tmp_path)
    assert code == 0 and text.startswith("Linux"), "what is not this project's is executed"
    assert not module_of(["sh", "-c", "true"]) and not module_of(["python", "-c", "pass"])
    code, text = forked(nursery, COMMAND, environment("1 / 0"), tmp_path)
    assert code == 1 and text.startswith("Traceback") and text.endswith("ZeroDivisionError: division by zero\n")
    code, text = forked(
        nursery, COMMAND, environment("import os, signal; os.kill(os.getpid(), signal.SIGINT)"), tmp_path
    )
    assert code == -signal.SIGINT and text.endswith("KeyboardInterrupt\n")


POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("bye"), sys.exit(7)))
print("up", flush=True)
time.sleep(60)
"""
FAMILY = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "60"])
print("child", os.getpid(), child.pid, flush=True)
time.sleep(60)
"""
EATER = "data = bytearray(300 << 20)\nfor i in range(0, len(data), 4096): data[i] = 1\nimport time\ntime.sleep(60)"


def test_in_a_pod(nursery: Nursery, environment: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    """Signals, exit codes, memory limits and the end of a session are those of other pods."""
    with Cluster(tmp_path / "kubeconfig", images=["i:1"], nursery=nursery) as cluster:
        core = kubernetes.client.CoreV1Api(kubernetes.config.new_client_from_config(str(cluster.kubeconfig)))

        def create(name: str, code: str, argv: list[str], **box: Any) -> None:
            env = [{"name": key, "value": value} for key, value in environment(code).items()]
            box = {"name": "base", "image": "i:1", "command": argv, "env": env} | box
            metadata = {"name": name}
            core.create_namespaced_pod(
                "default", {"metadata": metadata, "spec": {"restartPolicy": "Never", "containers": [box]}}
            )

        def end(name: str, until: str = "Failed") -> tuple[str, int]:
            state = cluster.wait(name, until)["status"]["containerStatuses"][0]["state"]["terminated"]
            return state["reason"], state["exitCode"]

        logged = [*LOGGED[:3], "--log", f"file://{tmp_path}/log", *LOGGED[3:]]
        for name, argv in (("direct", COMMAND), ("logged", logged)):
            create(name, POLITE, argv)
            wait_for_log(cluster, name, "up\n")
            cluster.delete_pod(name)
            assert end(name, "gone") == ("Error", 7) and cluster.log(name) == "up\nbye\n"
        create("family", FAMILY, LOGGED)
        cluster.wait("family", lambda _: cluster.log("family").endswith("\n"))
        family = [psutil.Process(int(pid)) for pid in cluster.log("family").split()[1:]]
        cluster.kill("family", signal.SIGKILL)
        assert end("family") == ("Error", 137) and not any(map(is_alive, family))
        create("eater", EATER, COMMAND, resources={"limits": {"memory": "400Mi"}})
        assert end("eater") == ("OOMKilled", 137)
    assert psutil.Process(nursery.pid).children() == []


@pytest.mark.parametrize("victim", ["maker", "nursery"])
def test_nothing_outlives_its_maker(environment: Callable[[str], dict[str, str]], tmp_path: Path, victim: str) -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.support.nursery import Nursery
nursery = Nursery([])
child = nursery.start({COMMAND!r}, {environment(FAMILY)!r}, Path({str(tmp_path)!r}), 1)
print("maker", os.getpid(), nursery.pid, flush=True)
print(child.wait(), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = sorted(process.stdout.readline().split() for _ in range(2))
    (child, grandchild), (maker, nursery) = [[psutil.Process(int(pid)) for pid in pids] for _, *pids in lines]
    {"maker": maker, "nursery": nursery}[victim].kill()
    # What the main process has started itself is left to the cluster's keeper when the nursery is
    # killed.
    tied = {maker, nursery, child} | ({grandchild} if victim == "maker" else set())
    try:
        assert wait_until(lambda: not any(map(is_alive, tied)), LIMIT), tied
    finally:
        if is_alive(grandchild):
            grandchild.kill()
        _, said = process.communicate()
    assert victim == "maker" or re.search("RuntimeError: the nursery is gone", said)
