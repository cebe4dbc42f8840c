"""What a command prints, kept in bounds, and its copy in storage.

Storage clients are imported by the thread that needs them.
"""

from __future__ import annotations

import os
import threading

from chunkflow_core.errors import ChunkflowError
from chunkflow_core.storage.addresses import plain, safe_name

HEAD = 256 * 2**10
TAIL = 8 * 2**20
"""Bytes that are kept of a log's beginning (``HEAD``) and of its end (``TAIL``)."""

KILLED_FOR_MEMORY = "out of memory: the kernel has killed a process of this container at its limit"
"""What the log's last line says then, whichever process it was."""


def log_url(exchange_path: str, dag_id: str, run_id: str, pod_name: str) -> str:
    """Address of the copy of a pod's log, in the exchange."""
    folder = plain(exchange_path)
    return f"{folder}/logs/{safe_name(dag_id)}/{safe_name(run_id)}/{safe_name(pod_name)}.log"


def read_log(url: str) -> str | None:
    """The copy of a log; None if there is none.

    Raises:
        StorageError: The storage does not answer.
    """
    from chunkflow_core.storage.files import open_files, storage_errors

    folder, _, name = url.rpartition("/")
    with storage_errors(f"reading {url}"):
        content: bytes | None = open_files(folder).get(name)
    return None if content is None else content.decode(errors="replace")


class Output:
    """What the command prints: handed on to standard output, and kept.

    The middle of a long log is not kept.
    """

    def __init__(self) -> None:
        """Begin with nothing printed."""
        self._head, self._tail, self._size = bytearray(), bytearray(), 0
        self._kept, self._printing = threading.Lock(), threading.Lock()
        self._messages: list[bytes] = []
        self._in_line = False
        self._readable = True

    def write(self, data: bytes) -> None:
        """Hand bytes on to standard output, and keep them."""
        with self._printing:
            self._write(data)
            if not self._in_line:
                self._write_messages()

    def say(self, message: str, *, now: bool = False) -> None:
        """Print a line of this process's own.

        It waits for the end of the command's present line, unless ``now`` says that this will never
        come.
        """
        with self._printing:
            self._messages.append(f"{message}\n".encode())
            if now and self._in_line:
                self._write(b"\n")
            if not self._in_line:
                self._write_messages()

    @property
    def size(self) -> int:
        """Number of bytes printed so far."""
        return self._size

    def content(self) -> tuple[int, bytes]:
        """The ``size``, and what is kept, with a note on what is left out."""
        with self._kept:
            left_out = self._size - len(self._head) - len(self._tail)
            note = f"\n[{left_out} bytes of the log are left out here]\n".encode() if left_out else b""
            return self._size, b"".join([self._head, note, self._tail])

    def _write_messages(self) -> None:
        while self._messages:
            self._write(self._messages.pop(0))

    def _write(self, data: bytes) -> None:
        self._in_line = not data.endswith(b"\n")
        with self._kept:
            room = HEAD - len(self._head)
            self._head += data[:room]
            self._tail += data[room:]
            del self._tail[: max(0, len(self._tail) - TAIL)]
            self._size += len(data)
        rest = memoryview(data)
        while rest and self._readable:
            try:
                rest = rest[os.write(1, rest) :]
            except OSError:  # nobody reads it any more; the command must not suffer from that
                self._readable = False


class Copy(threading.Thread):
    """Keeps the copy in storage up to date."""

    def __init__(self, output: Output, url: str, interval: float) -> None:
        """Make a thread, to be started.

        Args:
            output: What the command prints.
            url: Storage address of the copy.
            interval: Least number of seconds between two uploads.
        """
        super().__init__(name="log", daemon=True)
        self._output, self._url, self._interval = output, url, interval
        self._wake, self._last = threading.Event(), False
        self._trouble = False

    def run(self) -> None:
        """Upload until told to finish."""
        uploaded = -1
        while True:
            self._wake.clear()
            last = self._last
            if self._output.size != uploaded:
                size, content = self._output.content()
                if self._put(content):
                    uploaded = size
            if last:
                return
            self._wake.wait(self._interval)

    def hurry(self) -> None:
        """Upload at once what there is."""
        self._wake.set()

    def finish(self, patience: float) -> None:
        """Upload the rest, for at most ``patience`` seconds."""
        self._last = True
        self._wake.set()
        self.join(patience)
        if self.is_alive():
            self._output.say(
                f"warning: {self._url}: the end of this log is not in the copy: no answer in {patience:g} s"
            )

    def _put(self, content: bytes) -> bool:
        from chunkflow_core.storage.files import put_file

        folder, _, name = self._url.rpartition("/")
        try:
            put_file(folder, name, content)
        except Exception as error:  # whatever it is, the command goes on
            if not self._trouble:
                told = str(error) if isinstance(error, ChunkflowError) else f"{type(error).__name__}: {error}"
                self._output.say(f"warning: {self._url}: this log can't be copied: {told}")
            self._trouble = True
            return False
        self._trouble = False
        return True
