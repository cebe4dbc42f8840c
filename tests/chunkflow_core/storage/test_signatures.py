"""Whether storage chunks have changed: by what disks, object stores and web servers say of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from cloudfiles.interfaces import reset_connection_pools

from chunkflow_core.errors import SpecError, StorageError
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.storage.clients import PATIENCE_VARIABLE, open_files
from chunkflow_core.storage.files import put_file
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layers import NewLayer
from chunkflow_core.storage.listing import servers as listing_servers
from chunkflow_core.storage.signatures import LayerSignatures
from chunkflow_core.storage.uploads import s3_signature
from tests.support.object_storage import BUCKET, Fault, Proxy, gcs_server, proxy_before, s3_server
from tests.support.web import serving

KEY = "4_4_40"
START = (-4, 10, -30)
"""Start of the layer, zyx."""
CHUNK = (4, 8, 8)
SHAPE = (10, 28, 28)
"""3 × 4 × 4 storage chunks, of which the last ones are cut off."""
STOP = (6, 38, -2)
ALL = Box(START, STOP)


def chunk(z: int, y: int, x: int) -> Box:
    """A storage chunk, by its position."""
    start = tuple(a + c * i for a, c, i in zip(START, CHUNK, (z, y, x), strict=True))
    stop = tuple(min(a + c, b) for a, c, b in zip(start, CHUNK, STOP, strict=True))
    return Box(start, stop)  # type: ignore[arg-type]


CHUNKS = [chunk(z, y, x) for z in range(3) for y in range(4) for x in range(4)]
BLOCKS = [
    Box((z - 2, y - 3, x - 3), (z + 8, y + 19, x + 19))
    for z in range(START[0], STOP[0], 6)
    for y in range(START[1], STOP[1], 16)
    for x in range(START[2], STOP[2], 16)
]
"""Boxes that overlap, and reach past the layer."""


def write_layer(path: str, *, shape: Vector = SHAPE) -> None:
    """Write a layer of random voxels."""
    layer = NewLayer(path, shape, dtype="uint8", resolution=(40, 4, 4), chunk=CHUNK, offset=START)
    data = np.random.default_rng(1).integers(0, 256, (1, *shape), dtype=np.uint8)
    layer.write(Box(START, tuple(a + n for a, n in zip(START, shape, strict=True))), data)  # type: ignore[arg-type]


def opened(path: str) -> LayerSignatures:
    """The layer as another process would see it."""
    return LayerSignatures(path, read_scale(path, 0))


def digests(path: str, boxes: list[Box]) -> list[str]:
    """Digests of boxes, after all have been loaded."""
    layer = opened(path)
    layer.load(boxes)
    return [layer.digest(box) for box in boxes]


def changed(path: str, before: list[str]) -> set[Box]:
    """The storage chunks whose digest is another one than before."""
    return {box for box, old, new in zip(CHUNKS, before, digests(path, CHUNKS), strict=True) if old != new}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A layer on a disk, of files that are an hour old."""
    write_layer(f"file://{tmp_path}/layer")
    for file in (tmp_path / "layer" / KEY).iterdir():
        old = file.stat().st_mtime_ns - 3600 * 10**9
        os.utime(file, ns=(old, old))
    return tmp_path / "layer"


def file_of(folder: Path, box: Box) -> Path:
    """The file of a storage chunk."""
    (found,) = (folder / KEY).glob(f"{box.key}*")
    return found


def test_what_a_change_touches(folder: Path) -> None:
    path = f"file://{folder}"
    before, blocks = digests(path, CHUNKS), digests(path, BLOCKS)
    assert len({*before}) == len(CHUNKS)  # names count
    assert all(len(digest) == 13 and digest.isalnum() and digest == digest.lower() for digest in before + blocks)
    assert changed(path, before) == set()

    box = chunk(1, 2, 3)
    file = file_of(folder, box)
    content = file.read_bytes()
    with file.open("r+b") as target:  # in place, of the same size
        target.write(bytes([content[0] ^ 1]))
    assert changed(path, before) == {box}
    differ = [a != b for a, b in zip(blocks, digests(path, BLOCKS), strict=True)]
    assert differ == [bool(block & box) for block in BLOCKS]
    assert 0 < sum(differ) < len(BLOCKS)


@pytest.mark.parametrize("touching", [True, False])
def test_time_and_size_of_a_file(folder: Path, touching: bool) -> None:
    path, box = f"file://{folder}", chunk(0, 0, 0)
    before = digests(path, CHUNKS)
    file = file_of(folder, box)
    status = file.stat()
    if touching:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        file.write_bytes(file.read_bytes() + b"x")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert changed(path, before) == {box}


def test_files_that_come_and_go(folder: Path) -> None:
    path, box = f"file://{folder}", chunk(2, 3, 3)
    before = digests(path, CHUNKS)
    file = file_of(folder, box)
    away = file.rename(folder / "away")
    assert changed(path, before) == {box}
    without = digests(path, CHUNKS)
    assert without == digests(path, CHUNKS) and "" not in without
    away.rename(file)
    assert changed(path, before) == set()

    status = file.stat()
    packed = file.rename(file.with_suffix(".gz" if file.suffix != ".gz" else ""))  # as if compressed in another way
    assert packed.stat().st_mtime_ns == status.st_mtime_ns
    assert changed(path, before) == {box}
    file.write_bytes(b"both")
    both = digests(path, CHUNKS)
    packed.unlink()
    assert changed(path, both) == {box}


def test_every_file_counts(folder: Path) -> None:
    path = f"file://{folder}"
    layer, files = digests(path, [ALL]), list((folder / KEY).iterdir())
    assert len(files) == len(CHUNKS)
    for file in files:
        away = file.rename(folder / "away")
        assert digests(path, [ALL]) != layer
        away.rename(file)
    for foreign in ("notes.txt", f".{'0' * 32}.partial", f"{chunk(0, 0, 0).key}.bak", "0-8_0-8"):
        (folder / KEY / foreign).touch()
    assert digests(path, [ALL]) == layer


def test_boxes_past_the_layer(folder: Path) -> None:
    layer = opened(f"file://{folder}")
    assert layer.digest(Box((-99, -99, -99), (99, 99, 99))) == layer.digest(ALL)
    corner = chunk(0, 0, 0)
    assert layer.digest(Box((-99, -99, -99), corner.stop)) == layer.digest(corner)
    assert layer.digest(Box(START, (-3, 11, -29))) == layer.digest(corner)  # a part of it
    assert layer.digest(Box(START, (1, 11, -29))) != layer.digest(corner)
    nowhere = layer.digest(Box((50, 0, 0), (60, 9, 9)))
    assert nowhere and nowhere == layer.digest(Box((0, 0, 0), (0, 0, 0)))


def test_one_by_one_or_all_at_once(folder: Path) -> None:
    path = f"file://{folder}"
    at_once = digests(path, BLOCKS + CHUNKS)
    assert [opened(path).digest(box) for box in BLOCKS + CHUNKS] == at_once
    layer = opened(path)
    layer.load(BLOCKS[:3])
    assert [layer.digest(box) for box in BLOCKS + CHUNKS] == at_once


def test_what_is_loaded_is_not_asked_for_again(folder: Path) -> None:
    layer = opened(f"file://{folder}")
    before = [layer.digest(box) for box in BLOCKS]
    for file in (folder / KEY).iterdir():
        file.unlink()
    (folder / KEY).rmdir()
    assert [layer.digest(box) for box in BLOCKS] == before
    gone = opened(f"file://{folder}")
    assert all(gone.digest(block) not in ("", old) for block, old in zip(BLOCKS, before, strict=True))


def test_a_layer_that_grows(folder: Path) -> None:
    path = f"file://{folder}"
    before = digests(path, CHUNKS)
    scale = read_scale(path, 0)
    larger = replace(scale, bounds=Box(START, (20, *STOP[1:])))
    layer = LayerSignatures(path, larger)
    after = [layer.digest(box) for box in CHUNKS]
    cut_off = {box for box in CHUNKS if box.stop[0] == STOP[0]}  # they have other names now
    assert {box for box, old, new in zip(CHUNKS, before, after, strict=True) if old != new} == cut_off


@pytest.mark.parametrize("path", ["graphene://https://example.org/em", "boss://a/b/c"])
def test_places_that_cannot_tell(path: str, folder: Path) -> None:
    layer = LayerSignatures(path, read_scale(f"file://{folder}", 0))
    layer.load([ALL])
    assert layer.digest(ALL) == ""


def test_sharded_scales(folder: Path) -> None:
    scale = read_scale(f"file://{folder}", 0)
    sharded = replace(scale, encoding="sharded")
    assert LayerSignatures(f"file://{folder}", sharded).digest(ALL) == ""


Use = Callable[[str], tuple[Proxy, str]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Proxy]]:
    """Proxies before the servers, by protocol."""
    logs = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        urls = {"s3": stack.enter_context(s3_server(logs)), "gs": stack.enter_context(gcs_server(logs))}
        yield {kind: stack.enter_context(proxy_before(url)) for kind, url in urls.items()}


@pytest.fixture
def use(servers: dict[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Gives the proxy before the server of a protocol, and the address of a layer there.

    An answer has 10 objects at most.
    """

    def choose(kind: str) -> tuple[Proxy, str]:
        proxy = servers[kind]
        proxy.clear()
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", servers["gs"].url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setattr(listing_servers, "_PAGE", 10)
        reset_connection_pools()
        path = f"gs://{BUCKET}" if kind == "gs" else f"s3://{proxy.url}/{BUCKET}"
        path = f"{path}/{tmp_path.name}/layer"
        write_layer(path)
        proxy.clear()
        return proxy, path

    yield choose
    for proxy in servers.values():
        proxy.clear()


def asked(proxy: Proxy) -> tuple[int, int]:
    """How many listings there were since the last time, and how many questions for one object.

    What was asked for ``info`` does not count.
    """
    requests = [request for request in proxy.requests if not re.search(r"^GET .*layer(/|%2F)info", request)]
    proxy.clear()
    listings = [request for request in requests if re.match(r"GET .*(list-type=2|/o\?)", request)]
    one = [request for request in requests if re.match(rf"(HEAD|GET) [^?]*{KEY}", request)]
    assert len(listings) + len(one) == len(requests), requests
    return len(listings), len(one)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_requests_to_a_bucket(use: Use, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, path = use(kind)
    pages = {"s3": 2, "gs": 1}[kind]  # the emulator of GCS does not cut its answers

    whole = digests(path, [ALL, *CHUNKS])
    assert asked(proxy) == (4 * pages, 0)  # by ranges in x: 12 of each
    column = [Box.around([chunk(1, y, x), chunk(2, y, x)]) for y, x in ((0, 0), (3, 1))]
    columns = digests(path, column)
    assert asked(proxy) == (2, 0)
    one = [opened(path).digest(box) for box in CHUNKS[:7]]
    assert asked(proxy) == (0, 7)
    mixed = digests(path, [chunk(0, 0, 0), column[1], Box.around([chunk(0, 0, 3), chunk(2, 3, 3)])])
    assert asked(proxy) == (1 + pages, 1)

    monkeypatch.setattr(listing_servers, "_PAGE", 1)  # then each is asked for
    assert digests(path, [ALL, *CHUNKS]) == whole
    assert asked(proxy) == (0, len(CHUNKS))
    assert one == whole[1:8] and mixed[0] == whole[1]
    assert digests(path, column) == columns and mixed[1] == columns[1]
    assert asked(proxy) == (0, 4)

    layer = opened(path)
    layer.load([ALL])
    asked(proxy)
    assert [layer.digest(box) for box in CHUNKS] == whole[1:]
    assert asked(proxy) == (0, 0)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_changes_in_a_bucket(use: Use, kind: str) -> None:
    _, path = use(kind)
    before = digests(path, CHUNKS)
    box = chunk(2, 2, 2)
    name = f"{KEY}/{box.key}"
    content = open_files(path).get(name, raw=True)

    put_file(path, name, content, compression="gzip")
    assert changed(path, before) == set()
    put_file(path, name, bytes([content[0] ^ 1]) + content[1:], compression="gzip")
    assert changed(path, before) == {box}
    assert opened(path).digest(box) == digests(path, [box, ALL])[0]
    open_files(path).delete(name)
    put_file(path, f"{KEY}/{box.key}.bak", content)
    put_file(path, f"{KEY}/{box.key}/{box.key}", content)
    assert changed(path, before) == {box}
    assert opened(path).digest(box) == digests(path, [box, ALL])[0] != before[CHUNKS.index(box)]
    put_file(path, name, content, compression="gzip")
    assert changed(path, before) == set()


@pytest.mark.parametrize(("kind", "listing"), [("s3", "list-type=2"), ("gs", r"/o\?")])
def test_a_bucket_that_may_not_be_listed(use: Use, kind: str, listing: str) -> None:
    proxy, path = use(kind)
    open_files(path).delete(f"{KEY}/{chunk(1, 1, 1).key}")
    proxy.clear()
    whole = digests(path, [ALL, *CHUNKS])
    asked(proxy)
    proxy.faults.append(Fault("refuse", listing, status=403))
    layer = opened(path)
    layer.load([chunk(0, 0, 0), Box.around(CHUNKS[:20])])
    layer.load([ALL])
    refused = proxy.faults[0].done
    assert asked(proxy) == (0, len(CHUNKS)) and 1 <= refused <= 4  # once
    assert [layer.digest(box) for box in [ALL, *CHUNKS]] == whole


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_buckets_that_fail(use: Use, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, path = use(kind)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # boto's own
    reset_connection_pools()
    whole = digests(path, [ALL, chunk(0, 0, 0)])
    proxy.faults.append(Fault("refuse", "_", every=3, status=503, times=2))
    assert digests(path, [ALL, chunk(0, 0, 0)]) == whole
    assert opened(path).digest(chunk(0, 0, 0)) == whole[1]

    layer = opened(path)
    proxy.faults[:] = [Fault("refuse", status=403)]
    for box in (ALL, chunk(0, 0, 0)):
        with pytest.raises(SpecError, match=r"asking .*/layer which storage chunks there are: .*credentials"):
            layer.digest(box)
    if kind == "s3":  # Google's client goes on for two minutes of its own
        monkeypatch.setenv(PATIENCE_VARIABLE, "0.1")
        proxy.faults[:] = [Fault("refuse", status=503)]
        for box in (ALL, chunk(0, 0, 0)):
            with pytest.raises(StorageError, match="reachable"):
                layer.digest(box)
    proxy.clear()
    assert [layer.digest(ALL), layer.digest(chunk(0, 0, 0))] == whole


class _Pages(BaseHTTPRequestHandler):
    """Cuts GCS's answers to listings, as the emulator does not."""

    upstream = ""

    def do_GET(self) -> None:
        with urlopen(f"{self.upstream}{self.path}", timeout=30) as response:
            content = response.read()
        query = parse_qs(urlsplit(self.path).query)
        if "maxResults" in query:
            objects = json.loads(content).get("items", [])
            first, last = (int(query.get(key, ["0"])[0]) for key in ("pageToken", "maxResults"))
            last += first
            rest = {"nextPageToken": str(last)} if last < len(objects) else {}
            content = json.dumps({"items": objects[first:last], **rest}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def test_long_listings_of_gcs(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, path = use("gs")
    whole = digests(path, [ALL, *CHUNKS])
    with serving(type("Handler", (_Pages,), {"upstream": proxy.url})) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        reset_connection_pools()
        proxy.clear()
        assert digests(path, [ALL, *CHUNKS]) == whole
        assert asked(proxy) == (4 * 2, 0)
    reset_connection_pools()


class _Web(SimpleHTTPRequestHandler):
    """Python's own web server, which says when a file was changed."""

    protocol_version = "HTTP/1.1"
    mode = ""
    heads = 0

    def do_HEAD(self) -> None:
        type(self).heads += 1
        if self.mode == "no HEAD":
            self.send_error(501)
        elif self.mode == "elsewhere" and not self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"/moved{self.path}")
            self.end_headers()
        else:
            super().do_HEAD()

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/moved"))

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Last-Modified" and self.mode == "tag":
            size = Path(self.translate_path(self.path)).stat().st_size
            weak = "W/" if self.heads % 2 else ""  # as if another server behind the same name had compressed it
            super().send_header("ETag", f'{weak}"{self.headers["Accept-Encoding"]} {size}"')
        elif keyword != "Last-Modified" or self.mode != "nothing":
            super().send_header(keyword, value)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def web(folder: Path, mode: str = "") -> Iterator[tuple[type[_Web], str]]:
    """A web server of a folder, and its address."""
    handler = type("Handler", (_Web,), {"mode": mode})
    with serving(partial(handler, directory=str(folder))) as url:
        yield handler, url


def raw_names(folder: Path) -> None:
    """Give the files names without extensions, as a web server has them."""
    for file in (folder / KEY).iterdir():
        file.rename(file.with_suffix(""))


@pytest.mark.parametrize("mode", ["", "elsewhere"])
def test_a_web_server(folder: Path, mode: str) -> None:
    raw_names(folder)
    with web(folder, mode) as (handler, url):
        before = digests(url, CHUNKS)
        assert handler.heads == len(CHUNKS) * (2 if mode else 1)
        assert "" not in before and len({*before}) == len(CHUNKS)
        assert [opened(f"precomputed://{url}/").digest(box) for box in CHUNKS[:3]] == before[:3]
        boxes = [chunk(0, 1, 2), chunk(2, 3, 3), chunk(1, 2, 0)]
        later, larger, gone = (file_of(folder, box) for box in boxes)
        os.utime(later, (0, later.stat().st_mtime + 1))
        status = larger.stat()
        larger.write_bytes(larger.read_bytes() + b"x")
        os.utime(larger, ns=(status.st_atime_ns, status.st_mtime_ns))
        gone.unlink()
        assert changed(url, before) == set(boxes)


def test_a_web_server_with_tags(folder: Path) -> None:
    raw_names(folder)
    with web(folder, "tag") as (_, url):
        before = digests(url, CHUNKS)
        assert opened(url).digest(CHUNKS[0]) == opened(url).digest(CHUNKS[0]) == before[0]
        box, touched = chunk(0, 1, 2), file_of(folder, chunk(0, 0, 0))
        file_of(folder, box).write_bytes(b"other")
        os.utime(touched, (0, 0))
        assert changed(url, before) == {box}


@pytest.mark.parametrize("mode", ["nothing", "no HEAD"])
def test_a_web_server_that_cannot_tell(folder: Path, mode: str) -> None:
    raw_names(folder)
    with web(folder, mode) as (handler, url):
        layer = opened(url)
        layer.load(BLOCKS)
        few = handler.heads
        assert layer.digest(ALL) == layer.digest(chunk(0, 0, 0)) == ""
        assert handler.heads == few <= len(CHUNKS)


def test_objects_without_a_tag_of_their_own() -> None:
    first, second = (datetime(2026, 1, 1, 0, 0, second, 400000, tzinfo=UTC) for second in (0, 1))
    signature = s3_signature
    assert signature('"1-"', 5) == "", "nothing is known of it when it is written"
    assert signature('"1-"', 5, first) != signature('"1-"', 5, second)
    assert signature('"1-"', 5, first) == signature('"1-"', 5, first.replace(microsecond=0))  # a HEAD has whole seconds
    assert signature('"ab-2"', 5, first) == signature("ab-2", 5, second)
