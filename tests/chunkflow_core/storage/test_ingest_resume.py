"""An ingest that was killed goes on where it was, if the same is asked for again; else anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from cloudvolume import CloudVolume
from numpy.typing import NDArray
from PIL import Image

from chunkflow_core.errors import DataError, StorageError
from chunkflow_core.storage.clients import located
from chunkflow_core.storage.ingest import store
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.progress import PROGRESS, read_progress
from chunkflow_core.storage.ingest.sources import open_stack
from chunkflow_core.storage.ingest.stack import Stack
from chunkflow_core.storage.layers import layer_exists, layer_files
from tests.support.flat_files import write_nrrd
from tests.support.power_loss import Disk, recorded

DATA = np.random.default_rng(9).integers(0, 65536, (22, 9, 12), np.uint16)
CHUNK = (4, 8, 8)
Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def slabs_of_one_storage_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "HELD_BYTES", 1)


class Stopped(Stack):
    """A stack that raises something when a section is read; it counts those that were read."""

    def __init__(self, stack: Stack, at: int, error: BaseException) -> None:
        super().__init__(stack.name, stack.shape, stack.dtype)
        self.files = stack.files
        self._stack, self._at, self._error = stack, at, error
        self.count = 0

    def read(self, start: int, stop: int) -> NDArray[Any]:
        if start <= self._at < stop:
            raise self._error
        self.count += stop - start
        return self._stack.read(start, stop)


def run(layer: str, source: Path, at: int = -1, error: BaseException | None = None, **options: Any) -> tuple[int, int]:
    """Ingest; sections that were there already, and sections that were read."""
    stack = Stopped(open_stack(str(source), Choice()), at, error or KeyboardInterrupt())
    arguments: dict[str, Any] = {"resolution": (40, 4, 4), "chunk": CHUNK} | options
    return store.ingest(stack, layer, **arguments), stack.count


def stop(layer: str, source: Path, at: int, error: BaseException | None = None, **options: Any) -> None:
    """Ingest until a section is to be read."""
    expected = error or KeyboardInterrupt()
    with pytest.raises(type(expected)):
        run(layer, source, at, expected, **options)


def check(layer: str, data: NDArray[Any]) -> None:
    """Check that the layer is there, and nothing else."""
    volume = CloudVolume(layer, progress=False)
    np.testing.assert_array_equal(np.asarray(volume[:, :, :])[..., 0].T, data)
    folder = Path(layer.removeprefix("file://"))
    key = volume.info["scales"][0]["key"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([key, "info", "provenance"])
    z, y, x = (-(-n // c) for n, c in zip(data.shape, volume.chunk_size[::-1], strict=True))
    assert len(list((folder / key).iterdir())) == z * y * x


def write_source(folder: Path, kind: str) -> Path:
    match kind:
        case "npy":
            np.save(folder / "a.npy", DATA)
        case "tif":
            tifffile.imwrite(folder / "a.tif", DATA, photometric="minisblack", compression="zlib")
        case "h5":
            with h5py.File(folder / "a.h5", "w") as file:
                file["raw"] = DATA
        case "nrrd":
            write_nrrd(folder / "a.nrrd", DATA, encoding="gzip")
        case "nhdr":
            write_nrrd(folder / "a.nhdr", DATA, files="LIST")
        case _:
            (folder / "a").mkdir()
            for z, section in enumerate(DATA):
                Image.fromarray(section).save(folder / "a" / f"{z}.png")
            return folder / "a"
    return folder / f"a.{kind}"


@pytest.mark.parametrize("kind", ["npy", "tif", "h5", "nrrd", "nhdr", "folder"])
@pytest.mark.parametrize("at", [0, 5, 21])
def test_it_goes_on(tmp_path: Path, kind: str, at: int) -> None:
    source, layer = write_source(tmp_path, kind), f"file://{tmp_path}/layer"
    stop(layer, source, at)
    assert not (tmp_path / "layer" / "info").exists()
    done = at - at % CHUNK[0]
    assert run(layer, source) == (done, len(DATA) - done)
    check(layer, DATA)


def test_it_goes_on_many_times(tmp_path: Path) -> None:
    source, layer = write_source(tmp_path, "folder"), f"file://{tmp_path}/layer"
    for at in (3, 3, 9, 14, 20):
        stop(layer, source, at, StorageError("full") if at == 9 else None)
    assert run(layer, source) == (20, 2)
    check(layer, DATA)


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": (40, 4, 5)},
        {"resolution": (40, 4, 4.0001)},
        {"chunk": (2, 8, 8)},
        {"chunk": (4, 8, 16)},
        {"offset": (4, 0, 0)},
        {"compression": "zstd"},
        {"compression": "none"},
        {"options": {"channel": 1}},
    ],
    ids=str,
)
def test_other_options_begin_anew(tmp_path: Path, options: dict[str, Any]) -> None:
    source, layer = write_source(tmp_path, "npy"), f"file://{tmp_path}/layer"
    stop(layer, source, 13)
    assert run(layer, source, **options) == (0, len(DATA))
    check(layer, DATA)


def changes() -> dict[str, Callable[[Path], object]]:
    def touch(file: Path) -> None:
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    def lengthen(file: Path) -> None:
        status = file.stat()
        file.write_bytes(file.read_bytes() + b"\0")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    return {
        "size": lambda folder: lengthen(folder / "7.png"),
        "time": lambda folder: touch(folder / "7.png"),
        "content": lambda folder: Image.fromarray(DATA[3]).save(folder / "2.png", compress_level=0),
        "one more": lambda folder: shutil.copy2(folder / "21.png", folder / "22.png"),
        "one less": lambda folder: (folder / "21.png").unlink(),
        "names": lambda folder: [(folder / f"{z}.png").rename(folder / f"s{z}.png") for z in range(len(DATA))],
    }


@pytest.mark.parametrize("change", changes())
def test_a_changed_source_begins_anew(tmp_path: Path, change: str) -> None:
    source, layer = write_source(tmp_path, "folder"), f"file://{tmp_path}/layer"
    stop(layer, source, 13)
    changes()[change](source)
    expected = open_stack(str(source), Choice()).read(0, {"one more": 23, "one less": 21}.get(change, 22))
    assert run(layer, source) == (0, len(expected))
    check(layer, expected)


def harms() -> dict[str, Callable[[Path], object]]:
    def say(folder: Path, **words: Any) -> None:
        (folder / PROGRESS).write_text(json.dumps(json.loads((folder / PROGRESS).read_text()) | words))

    return {
        "chunk lost": lambda folder: next((folder / "4_4_40").iterdir()).unlink(),
        "chunks lost": lambda folder: shutil.rmtree(folder / "4_4_40"),
        "progress empty": lambda folder: (folder / PROGRESS).write_bytes(b""),
        "progress cut": lambda folder: (folder / PROGRESS).write_bytes((folder / PROGRESS).read_bytes()[:-9]),
        "progress of a list": lambda folder: (folder / PROGRESS).write_text("[1]"),
        "more than was written": lambda folder: say(folder, sections=16),
        "no whole chunks": lambda folder: say(folder, sections=11),
        "more than there is": lambda folder: say(folder, sections=24),
        "a text": lambda folder: say(folder, sections="8"),
        "something unknown": lambda folder: say(folder, more=1),
    }


@pytest.mark.parametrize("harm", harms())
def test_what_was_written_and_is_not_there_is_written_again(tmp_path: Path, harm: str) -> None:
    source, layer = write_source(tmp_path, "npy"), f"file://{tmp_path}/layer"
    stop(layer, source, 13)
    harms()[harm](tmp_path / "layer")
    assert run(layer, source) == (0, len(DATA))
    check(layer, DATA)


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    source, layer = write_source(tmp_path, "npy"), f"file://{tmp_path}/layer"
    stop(layer, source, 13)
    for folder in (tmp_path / "layer", tmp_path / "layer" / "4_4_40"):
        (folder / ".0123456789abcdef.partial").write_bytes(b"half")
    (tmp_path / "layer" / "4_4_40" / "0-8_0-8_12-16.gz").write_bytes(b"of the slab that was not whole")
    assert run(layer, source)[0] == 12
    check(layer, DATA)


def test_a_source_whose_files_are_not_known_begins_anew(tmp_path: Path) -> None:
    """A virtual dataset has its voxels in other files, which may change."""
    write_source(tmp_path, "h5")
    layout = h5py.VirtualLayout(DATA.shape, DATA.dtype)
    layout[:] = h5py.VirtualSource("a.h5", "raw", DATA.shape)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_virtual_dataset("raw", layout)
    layer = f"file://{tmp_path}/layer"
    stop(layer, tmp_path / "b.h5", 13)
    assert not (tmp_path / "layer").exists()
    assert run(layer, tmp_path / "b.h5") == (0, len(DATA))
    check(layer, DATA)


@pytest.mark.parametrize("error", [DataError("damaged"), ValueError("unforeseen")])
def test_nothing_is_left_where_a_repetition_would_not_help(tmp_path: Path, error: Exception) -> None:
    source, layer = write_source(tmp_path, "npy"), f"file://{tmp_path}/layer"
    stop(layer, source, 13, error)
    assert not (tmp_path / "layer").exists()


def test_a_layer_that_is_replaced_is_gone_while_it_is_made(tmp_path: Path) -> None:
    source, layer = write_source(tmp_path, "npy"), f"file://{tmp_path}/layer"
    run(layer, source)
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "b.npy", DATA[::-1])
    stop(layer, tmp_path / "more" / "b.npy", 13, overwrite=True)
    assert not (tmp_path / "layer" / "info").exists()
    progress = read_progress(layer)
    assert progress is not None and progress.sections == 12
    assert run(layer, tmp_path / "more" / "b.npy", overwrite=True)[0] == 12
    check(layer, DATA[::-1])
    assert run(layer, source, overwrite=True)[0] == 0
    check(layer, DATA)


@pytest.mark.parametrize("method", ["gzip", "br", "zstd", "none"])
def test_compression(tmp_path: Path, chunkflow: Command, method: str) -> None:
    source, layer = write_source(tmp_path, "npy"), f"file://{tmp_path}/layer"
    arguments = ["ingest", source, layer, "--voxel-size", 40, 4, 4, "--chunk-size", *CHUNK]
    outcome = chunkflow(*arguments, *(["--compression", method] if method != "gzip" else []))
    assert outcome.returncode == 0, outcome.stderr
    check(layer, DATA)
    endings = {file.suffix for file in (tmp_path / "layer" / "4_4_40").iterdir()}
    plain = {f"-{n}" for n in range(30)}
    assert endings == {{"gzip": ".gz", "br": ".br", "zstd": ".zstd"}.get(method, "")} or endings <= plain


KILLED = """
import os, sys
from chunkflow_core.storage.clients import located
from chunkflow_core.storage.ingest import store
from chunkflow_core.storage import layers
store.HELD_BYTES = 1
left = int(sys.argv.pop(1))
write = layers.put_file
def put_file(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return write(*arguments, **options)
layers.put_file = put_file
from chunkflow_core.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_killed_at_any_write_and_repeated(tmp_path: Path) -> None:
    """The process is killed again and again, each time a few writes later than it had begun."""
    source, layer = write_source(tmp_path, "folder"), f"file://{tmp_path}/layer"
    command = ["ingest", str(source), layer, "--voxel-size", "40", "4", "4", "--chunk-size", *map(str, CHUNK)]
    sections = []
    for writes in (0, 3, 6, 9, 5, 13, 7, 100):
        outcome = subprocess.run(
            [sys.executable, "-c", KILLED, str(writes), *command], capture_output=True, text=True, check=False
        )
        if outcome.returncode != -signal.SIGKILL:
            break
        progress = read_progress(layer)
        sections.append(progress.sections if progress else 0)
        assert not (tmp_path / "layer" / "info").exists()
    assert outcome.returncode == 0, outcome.stderr
    assert (
        sections == sorted(sections) and sections[-1] > 8 and f"went on from section {sections[-1]}" in outcome.stdout
    )
    check(layer, DATA)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_it_goes_on_in_object_stores(tmp_path: Path, use: Callable[[str], Any], kind: str) -> None:
    source, layer = write_source(tmp_path, "npy"), f"{use(kind).root}/ingested"
    stop(layer, source, 13)
    assert not layer_exists(layer)
    assert run(layer, source) == (12, 10)
    found = np.asarray(CloudVolume(**located(layer), progress=False)[:, :, :])[..., 0].T
    np.testing.assert_array_equal(found, DATA)
    assert not layer_files(layer).get(PROGRESS)


def check_after_power_losses(tmp_path: Path, steps: slice) -> None:
    """Replace a layer, lose the power at some steps, and look at what is left; then go on."""
    np.save(tmp_path / "old.npy", DATA[::-1])
    source, layer = write_source(tmp_path, "npy"), f"file://{tmp_path}/layer"
    run(layer, tmp_path / "old.npy")
    with recorded(tmp_path / "layer") as recording, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rmdir", os.listdir)  # a recording has no folders that go; they are made again at once
        run(layer, source, overwrite=True)
    disk, random, went_on = Disk(recording), Random(1), set()
    places = set(range(len(recording.steps))[steps])
    for number, step in enumerate(recording.steps):
        disk.apply(step)
        if number not in places:
            continue
        disk.draw(random)
        if layer_exists(layer):  # whichever it is, it is whole
            found = np.asarray(CloudVolume(layer, progress=False)[:, :, :])[..., 0].T
            assert np.array_equal(found, DATA[::-1]) or np.array_equal(found, DATA), number
        went_on.add(run(layer, source, overwrite=True)[0])
        check(layer, DATA)
    assert len(went_on) > 2


def test_power_losses(tmp_path: Path) -> None:
    check_after_power_losses(tmp_path, slice(3, None, 17))


@pytest.mark.long
def test_power_losses_at_every_step(tmp_path: Path) -> None:
    check_after_power_losses(tmp_path, slice(None))
