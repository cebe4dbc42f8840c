"""What runs as a container's first process keeps exit code, output and log, come what may.

The exit code is the command's, the output is whole, and the log is in storage.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from chunkflow_core.commands.log_copy import HEAD, KILLED_FOR_MEMORY, TAIL, Output, log_url, read_log
from tests.support.object_storage import BUCKET, s3_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pods run Linux")

TIMEOUT = 30.0
LOG = "logs/pod.log"

Popen = subprocess.Popen[bytes]
Start = Callable[..., Popen]


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition; fail if it does not come true."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the first process of a container, whose command is the given script.

    The script is the module ``child``. What is left of it is killed at the end.
    """
    (tmp_path / "work").mkdir()
    started: list[Popen] = []
    with_this = {"CHUNKFLOW_TEST": str(tmp_path)}

    def call(script: str, *arguments: object, options: tuple[object, ...] = (), **popen: object) -> Popen:
        header = "import os, signal, subprocess, sys, time\n"
        (tmp_path / "work" / "child.py").write_text(header + textwrap.dedent(script))
        command = [sys.executable, "-m", "chunkflow_core.commands.first_process", *options, "--", "child", *arguments]
        settings = {"stdout": subprocess.PIPE, "cwd": tmp_path / "work", "env": os.environ | with_this} | popen
        started.append(subprocess.Popen([*map(str, command)], **settings))  # type: ignore[call-overload]
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    for left in psutil.process_iter():
        try:
            if left.environ().get("CHUNKFLOW_TEST") == str(tmp_path):
                left.kill()
        except psutil.Error:
            continue


def outcome(process: Popen) -> tuple[int, bytes]:
    """Exit code and output of a process that is waited for."""
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def copied(folder: Path) -> tuple[str, ...]:
    """Options for a copy of the log below the folder."""
    return ("--log", f"file://{folder}/{LOG}")


# --------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize("with_copy", [True, False])
@pytest.mark.parametrize("code", [0, 1, 65, 75])
def test_exit_code_is_the_commands(start: Start, tmp_path: Path, code: int, with_copy: bool) -> None:
    options = copied(tmp_path) if with_copy else ()
    process = start("print(sys.argv[1:]); sys.exit(int(sys.argv[1]))", code, "--log", "--", "-h", options=options)
    shown = f"['{code}', '--log', '--', '-h']\n".encode()
    assert outcome(process) == (code, shown)
    if with_copy:
        assert (tmp_path / LOG).read_bytes() == shown


@pytest.mark.parametrize("with_copy", [True, False])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_death_by_a_signal_is_said_last(start: Start, tmp_path: Path, number: signal.Signals, with_copy: bool) -> None:
    options = copied(tmp_path) if with_copy else ()
    process = start(
        "os.write(1, b'half a line'); os.kill(os.getpid(), int(sys.argv[1]))", number.value, options=options
    )
    code, output = outcome(process)
    message = f"error: killed by signal {number.value} ({number.name})\n".encode()
    assert code == 128 + number
    assert output == (b"half a line\n" + message if with_copy else b"half a line" + message)
    if with_copy:
        assert (tmp_path / LOG).read_bytes() == output


CGROUP_2 = "low 0\nhigh 0\nmax 7\noom {n}\noom_kill {n}\noom_group_kill 0\n"
CGROUP_1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {n}\n"
KILLS_ITSELF = "os.kill(os.getpid(), signal.SIGKILL)"
CHILD_IS_KILLED = """
child = subprocess.Popen(["sleep", "60"])
child.kill()
print("error: a helper ended with", child.wait(), flush=True)
sys.exit(1)
"""


@pytest.mark.parametrize("counted", [CGROUP_2, CGROUP_1], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (KILLS_ITSELF, 137, f"error: killed by signal 9 (SIGKILL): {KILLED_FOR_MEMORY}\n"),
        (CHILD_IS_KILLED, 1, f"error: a helper ended with -9\n{KILLED_FOR_MEMORY}\n"),
        ("sys.exit(0)", 0, ""),
    ],
    ids=["the command", "a child of it", "neither"],
)
def test_the_kernels_count_of_those_killed_for_memory(
    tmp_path: Path, counted: str, script: str, code: int, said: str
) -> None:
    """The kernel counts each kill in a file of the container, before the process is gone."""
    count = tmp_path / "count"
    (tmp_path / "work").mkdir()
    count.write_text(counted.format(n=2))
    kernel = f"open({str(count)!r}, 'w').write({counted.format(n=3)!r})\n"
    header = "import os, signal, subprocess, sys\n"
    (tmp_path / "work" / "child.py").write_text(header + kernel + script)
    program = "import os, sys; from chunkflow_core.commands import first_process as f; "
    program += f"f._KILLS = ('/none', {str(count)!r}); os._exit(f.main(['--log', 'file://{tmp_path}/{LOG}', 'child']))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
    assert (tmp_path / LOG).read_text() == said


def test_wrong_usage_and_help(start: Start) -> None:
    for arguments, code in {("--nonsense",): 64, (): 64, ("-h",): 0}.items():
        command = [sys.executable, "-m", "chunkflow_core.commands.first_process", *arguments]
        assert subprocess.run(command, capture_output=True, check=False).returncode == code


def test_it_starts_fast(tmp_path: Path) -> None:
    # Counted, not timed: a busy machine must not matter. Storage clients bring more than a
    # thousand modules.
    script = (
        "import sys; bare = len(sys.modules); import chunkflow_core.commands.first_process; "
        "print(len(sys.modules) - bare)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 80


# ------------------------------------------------------------------------------------------ signals

HANDLES = """
    def handle(number, frame):
        print("asked", number)
        open("asked", "a").write("x")
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    print("ready")
    while not os.path.exists("end"):
        time.sleep(0.02)
    sys.exit(7)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_is_asked_once_and_gets_its_time(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start(HANDLES, options=(*copied(tmp_path), "--interval", "600"))
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    wait_until((tmp_path / "work" / "asked").exists)
    process.send_signal(number)
    # The copy is brought up to date when the pod is asked to end: who knows whether there will be
    # another chance.
    wait_until(lambda: "ready" in (read_log(f"file://{tmp_path}/{LOG}") or ""))
    assert process.poll() is None
    (tmp_path / "work" / "end").touch()
    assert outcome(process) == (7, f"asked {number.value}\n".encode())
    assert (tmp_path / LOG).read_text() == f"ready\nasked {number.value}\n"
    assert (tmp_path / "work" / "asked").read_text() == "x"


def test_a_command_that_does_not_handle_sigterm_ends(start: Start, tmp_path: Path) -> None:
    process = start("print('ready'); time.sleep(600)", options=copied(tmp_path))
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.terminate()
    assert outcome(process) == (128 + signal.SIGTERM, b"error: killed by signal 15 (SIGTERM)\n")
    assert (tmp_path / LOG).read_text() == "ready\nerror: killed by signal 15 (SIGTERM)\n"


def test_a_pod_killed_at_the_end_of_its_grace_has_left_its_log(start: Start, tmp_path: Path) -> None:
    script = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("before")
        while not os.path.exists("later"):
            time.sleep(0.02)
        print("after")
        time.sleep(600)
    """
    process, url = start(script, options=(*copied(tmp_path), "--interval", "0.2")), f"file://{tmp_path}/{LOG}"
    wait_until(lambda: read_log(url) == "before\n")
    process.terminate()
    (tmp_path / "work" / "later").touch()
    wait_until(lambda: read_log(url) == "before\nafter\n")
    process.kill()
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert read_log(url) == "before\nafter\n"


def test_orphans_are_reaped(start: Start, tmp_path: Path) -> None:
    script = """
        # each of these shells ends at once, and what it leaves behind becomes an orphan
        for number in range(5):
            subprocess.run(["sh", "-c", "while [ ! -e go ]; do sleep 0.02; done & echo $! >> pids"])
        print("ready")
        while not os.path.exists("end"):
            time.sleep(0.02)
    """
    process = start(script, options=copied(tmp_path))
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    orphans = [psutil.Process(int(line)) for line in (tmp_path / "work" / "pids").read_text().split()]
    assert [orphan.ppid() for orphan in orphans] == 5 * [process.pid]
    (tmp_path / "work" / "go").touch()
    wait_until(lambda: not any(orphan.is_running() for orphan in orphans))  # a zombie counts as running
    (tmp_path / "work" / "end").touch()
    assert outcome(process) == (0, b"")


def test_as_the_first_process_of_a_pid_namespace(start: Start, tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are not allowed here")
    shell = (
        f"echo $$ > pid; exec {sys.executable} -m chunkflow_core.commands.first_process "
        f"--log file://{tmp_path}/{LOG} -- child"
    )
    (tmp_path / "work" / "child.py").write_text(
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: exit(9))\n"
        "subprocess.run(['sh', '-c', 'sleep 0.05 & echo $! > orphan'])\n"
        "while os.path.exists('/proc/' + open('orphan').read().strip()): time.sleep(0.02)\n"
        "print('parent', os.getppid())\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([*unshare, "sh", "-c", shell], stdout=subprocess.PIPE, cwd=tmp_path / "work") as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"parent 1\n"
            assert (tmp_path / "work" / "pid").read_text() == "1\n"
            (first,) = psutil.Process(process.pid).children()
            first.terminate()
            assert process.wait(TIMEOUT) == 9
        finally:
            process.kill()
    assert (tmp_path / LOG).read_text() == "parent 1\n"


# ------------------------------------------------------------------------------------------- output


def test_output_is_complete_in_order_and_once(start: Start, tmp_path: Path) -> None:
    script = r"""
        for number in range(10_000):
            print("line", number, file=sys.stderr if number % 3 else sys.stdout)
        os.write(1, b"\xff\xfe not UTF-8 \x00\r 10 %\r 20 %\n")
        sys.stdout.write("x" * 2**20)
        sys.stdout.write("\nlast, without an end")
    """
    expected = b"".join(f"line {number}\n".encode() for number in range(10_000))
    expected += b"\xff\xfe not UTF-8 \x00\r 10 %\r 20 %\n" + b"x" * 2**20 + b"\nlast, without an end"
    code, output = outcome(start(script, options=copied(tmp_path)))
    assert (code, output == expected) == (0, True)
    assert (tmp_path / LOG).read_bytes() == expected


def test_lines_come_as_they_are_printed(start: Start, tmp_path: Path) -> None:
    process = start(
        "print('asks:', end=' '); sys.stdin.read(1); print('thanks')", stdin=subprocess.PIPE, options=copied(tmp_path)
    )
    assert process.stdout is not None and process.stdout.read(6) == b"asks: "  # while the command waits
    output, _ = process.communicate(b"x", timeout=TIMEOUT)
    assert output == b"thanks\n"


def test_what_the_command_leaves_running_does_not_hold_the_end(start: Start, tmp_path: Path) -> None:
    script = """
        subprocess.Popen(["sh", "-c", "echo left $$; exec sleep 600"])
        endless = subprocess.Popen(["sh", "-c", "while :; do echo endless; done"], stdin=subprocess.DEVNULL)
        time.sleep(0.1)
        os.write(1, f"done {time.time()}{os.linesep}".encode())  # in one piece: the endless one writes between two
        os._exit(3)
    """
    process = start(script, options=copied(tmp_path), stdout=(tmp_path / "output").open("wb"))
    assert process.wait(TIMEOUT) == 3
    ended = time.time()
    lines = (tmp_path / "output").read_text().splitlines()
    (done,) = [float(line.split()[1]) for line in lines if line.startswith("done")]
    assert sum(line.startswith("left") for line in lines) == 1
    assert ended - done < 10, "the import of storage clients included, on a busy machine"


def test_a_slow_reader_gets_all_of_it(start: Start, tmp_path: Path) -> None:
    process = start("print('y' * 100_000); open('done', 'w').close()", options=copied(tmp_path))
    wait_until((tmp_path / "work" / "done").exists)
    wait_until(lambda: not psutil.Process(process.pid).children())
    assert outcome(process) == (0, b"y" * 100_000 + b"\n")


def test_a_reader_that_goes_away_changes_nothing(start: Start, tmp_path: Path) -> None:
    script = """
        print("first")
        while not os.path.exists("gone"):
            time.sleep(0.02)
        for number in range(1000):
            print(number)
        sys.exit(5)
    """
    process = start(script, options=copied(tmp_path))
    assert process.stdout is not None and process.stdout.readline() == b"first\n"
    process.stdout.close()
    (tmp_path / "work" / "gone").touch()
    assert process.wait(TIMEOUT) == 5
    assert (tmp_path / LOG).read_text() == "first\n" + "".join(f"{number}\n" for number in range(1000))


def test_on_a_terminal_it_only_runs(start: Start, tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    script = "print(sys.stdout.isatty(), sys.stderr.isatty()); sys.exit(4)"
    process = start(script, options=copied(tmp_path), stdin=terminal, stdout=terminal, stderr=terminal)
    assert process.wait(TIMEOUT) == 4
    assert os.read(ours, 1000) == b"True True\r\n"
    os.close(ours)
    os.close(terminal)
    assert not (tmp_path / LOG).exists()


# ----------------------------------------------------------------------------------------- the copy


def test_of_a_long_log_the_middle_is_left_out(start: Start, tmp_path: Path) -> None:
    count = (HEAD + TAIL) // 8 + 1000
    script = f"sys.stdout.buffer.write(b''.join(b'%07d\\n' % number for number in range({count})))"
    code, output = outcome(start(script, options=copied(tmp_path)))
    whole = b"".join(b"%07d\n" % number for number in range(count))
    assert (code, output == whole) == (0, True)
    note = b"\n[8000 bytes of the log are left out here]\n"
    assert (tmp_path / LOG).read_bytes() == whole[:HEAD] + note + whole[-TAIL:]


def test_memory_is_bounded_however_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = TAIL // 10  # a tenth of the lines says as much
    monkeypatch.setattr("chunkflow_core.commands.log_copy.TAIL", tail)
    output = Output()
    silent = os.open(os.devnull, os.O_WRONLY)
    saved = os.dup(1)
    os.dup2(silent, 1)
    try:
        tracemalloc.start()
        for _ in range(60_000):
            output.write(b"x" * 80 + b"\n")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(silent)
    assert output.size == 60_000 * 81
    assert peak < 3 * tail < output.size
    assert len(output.content()[1]) < HEAD + tail + 100


def test_a_log_that_can_not_be_written_is_told_once_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    process = start("print('done'); sys.exit(65)", options=copied(tmp_path))  # tried twice, at start and end
    code, output = outcome(process)
    warning = f"warning: file://{tmp_path}/{LOG}: this log can't be copied: writing file://{tmp_path}/logs/pod.log: "
    lines = sorted(output.decode().splitlines())
    assert (code, len(lines), lines[0]) == (65, 2, "done")
    assert lines[1].startswith(warning)


def test_a_line_of_the_command_is_never_broken(capfd: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.write(b'{"result":')
    output.say("warning: trouble")
    output.write(b" 1")
    output.write(b"}\n")
    output.write(b"half")
    output.say("error: killed", now=True)
    expected = '{"result": 1}\nwarning: trouble\nhalf\nerror: killed\n'
    assert capfd.readouterr().out == expected
    assert output.content() == (len(expected), expected.encode())


@pytest.fixture
def s3_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys for any S3."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")


def test_storage_that_never_answers_does_not_hold_the_end(start: Start, s3_keys: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"s3://http://127.0.0.1:{silent.getsockname()[1]}/bucket/pod.log"
        script = "sys.stdin.read(1); print('done', time.time()); sys.exit(75)"
        process = start(script, options=("--log", url, "--patience", "1"), stdin=subprocess.PIPE)
        connection, _ = silent.accept()  # it has begun to upload
        output, _ = process.communicate(b"x", timeout=TIMEOUT)
        connection.close()
    ended = time.time()
    done, warning = output.decode().splitlines()
    assert process.returncode == 75
    assert warning == f"warning: {url}: the end of this log is not in the copy: no answer in 1 s"
    assert ended - float(done.split()[1]) < 5


def test_object_storage(start: Start, tmp_path: Path, s3_keys: None) -> None:
    with s3_server(tmp_path) as server:
        url = log_url(f"s3://{server}/{BUCKET}/exchange/", "volume", "manual__2026-01-01T00:00:00+00:00", "pod-1")
        assert read_log(url) is None
        code, output = outcome(start("print('é'); os.write(1, b'\\xff\\n'); sys.exit(2)", options=("--log", url)))
        assert (code, output) == (2, b"\xc3\xa9\n\xff\n")
        assert read_log(url) == "é\n\N{REPLACEMENT CHARACTER}\n"


def test_where_the_copy_is() -> None:
    url = log_url(
        "precomputed://gs://bucket/exchange/", "em.small_1", "manual__2026-11-22T15:00:00+00:00", "em-infer-0"
    )
    assert url == "gs://bucket/exchange/logs/em.small_1/manual__2026-11-22T15-00-00-00-00.8299936f/em-infer-0.log"


def test_runs_do_not_share_a_folder_and_none_is_elsewhere() -> None:
    runs = [
        "a:b",
        "a+b",
        "a-b",
        "a/b",
        "a b",
        "..",
        ".",
        "-",
        "--",
        "x" * 250,
        "x" * 249 + "y",
        "é",
        "../../etc",
        "%2e",
    ]
    urls = [log_url("file:///e", "dag", run, "pod") for run in runs]
    assert len(set(urls)) == len(runs)
    for url in urls:
        start, name = url.removeprefix("file:///e/logs/dag/"), url.rpartition("/")[2]
        assert (name, start.count("/")) == ("pod.log", 1)
        assert not start.startswith(".") and len(start) < 150
        assert all(letter.isascii() and (letter.isalnum() or letter in "._-/") for letter in start)


def test_a_copy_can_be_read_where_airflow_runs(tmp_path: Path) -> None:
    """Where Airflow runs, neither CloudVolume nor PyTorch is installed.

    That may not hide what is wrong with the storage, either.
    """
    (tmp_path / "pod.log").write_text("said\n")
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('cloudvolume', 'torch', 'numba'))\n"  # None: can't be imported
        "from chunkflow_core.errors import ChunkflowError\n"
        "from chunkflow_core.commands.log_copy import read_log\n"
        f"print(read_log('file://{tmp_path}/pod.log'))\n"
        f"print(read_log('file://{tmp_path}/none.log'))\n"
        "try: read_log('s3://http://127.0.0.1:9/bucket/logs/pod.log')\n"
        "except ChunkflowError as error: print(type(error).__name__)\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CHUNKFLOW_STORAGE_PATIENCE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["said", "None", "SpecError"], "no credentials"
