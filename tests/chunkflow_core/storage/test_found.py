"""Where a layer is, and whether any of it is there: redirects, wrong addresses, web servers."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from cloudvolume.exceptions import RedirectError

from chunkflow_core.errors import MissingInputError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.info_file import find_info
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import open_layer
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.presence import nothing_there
from chunkflow_core.storage.signatures import LayerSignatures
from tests.support.volume import SHAPE, write_layer, write_volume
from tests.support.web import serving

Command = Callable[..., Any]
KEY = "4_4_40"
ALL = Box((0, 0, 0), SHAPE)


def redirect(folder: Path, target: object, **more: object) -> str:
    """Write an ``info`` that redirects; its address."""
    folder.mkdir(exist_ok=True)
    (folder / "info").write_text(json.dumps({"redirect": target, **more}))
    return f"file://{folder}"


@pytest.mark.parametrize("hops", [1, 2, 8, 9, 10, 11])
def test_as_many_redirects_are_followed_as_by_cloudvolume(tmp_path: Path, hops: int) -> None:
    write_layer(tmp_path / "layer0")
    for i in range(1, hops + 1):
        redirect(tmp_path / f"layer{i}", f"precomputed://file://{tmp_path}/layer{i - 1}/")
    path = f"file://{tmp_path}/layer{hops}"
    try:
        expected = np.asarray(CloudVolume(path, progress=False)[:, :, :]).T
    except RedirectError:
        with pytest.raises(MissingInputError, match="redirects more than 9 times"):
            read_scale(path, 0)
        assert hops > 9
        return
    scale = read_scale(path, 0)
    np.testing.assert_array_equal(open_layer(scale.address, scale).read(ALL), expected)


def test_a_redirect_counts_more_than_what_else_is_in_the_file(tmp_path: Path, chunkflow: Command) -> None:
    path, old = write_volume(tmp_path), tmp_path / "old"
    info = json.loads((tmp_path / "input" / "info").read_text())
    address = redirect(old, f"file://{tmp_path}/input", **{**info, "scales": []})
    assert chunkflow("run", path, "--set", f"input.path={address}").returncode == 0
    moved = Workspace(load_spec(path, [f"input.path={address}"]))
    direct = Workspace(load_spec(path))
    assert moved.inputs.signature((0, 0, 0)) == direct.inputs.signature((0, 0, 0)) != ""
    first = moved.exchange.receipt("infer", (0, 0, 0))
    assert first is not None and moved.inputs.unchanged(first)

    write_layer(tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / KEY)
    shutil.copytree(tmp_path / "input" / KEY, tmp_path / "other" / KEY)
    chunk = tmp_path / "other" / KEY / "0-16_0-16_0-8.gz"
    chunk.write_bytes(gzip.compress(bytes(8 * 16 * 16)))
    redirect(old, f"file://{tmp_path}/other")
    again = Workspace(load_spec(path, [f"input.path={address}"]))
    assert not again.inputs.unchanged(first), "it leads to other voxels now"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("file://{}/one", "None"),
        ("file://{}/two", "leads in a circle"),
        ("file://{}/nowhere", "there is no layer here"),
        ("../layer", "expected a storage path"),
        ("graphene://https://example.org/em", "expected a storage path"),
        (["file://{}/layer"], "expected a storage path"),
        (True, "expected a storage path"),
    ],
)
def test_redirects_that_lead_nowhere(tmp_path: Path, chunkflow: Command, target: object, told: str) -> None:
    path = write_volume(tmp_path)
    one = tmp_path / "one"
    redirect(one, target.format(tmp_path) if isinstance(target, str) else target)
    redirect(tmp_path / "two", f"file://{one}")
    outcome = chunkflow("plan", path, "--set", f"input.path=file://{one}")
    assert outcome.returncode == 66
    assert told in outcome.stderr or told == "None"
    assert f"file://{one}" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize("target", ["", None, "itself"])
def test_no_redirect(tmp_path: Path, target: str | None) -> None:
    write_layer(tmp_path)
    info = json.loads((tmp_path / "info").read_text())
    path = redirect(tmp_path, f"precomputed://file://{tmp_path}/" if target == "itself" else target, **info)
    assert find_info(path)[0] == path
    assert CloudVolume(path, progress=False).bounds.size3().tolist() == [*reversed(SHAPE)]


def test_input_and_output_may_not_meet_by_a_redirect(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    assert chunkflow("prepare", path).returncode == 0
    address = redirect(tmp_path / "old", f"file://{tmp_path}/output/")
    outcome = chunkflow("prepare", path, "--set", f"input.path={address}")
    assert outcome.returncode in (66, 78)
    info = json.loads((tmp_path / "output" / "info").read_text())
    redirect(tmp_path / "output", f"file://{tmp_path}/input", **info)
    outcome = chunkflow("prepare", path)
    assert outcome.returncode == 78
    assert f"redirects to file://{tmp_path}/input" in outcome.stderr


def empty(folder: Path) -> None:
    """Leave the folder, without a file."""
    for file in (folder / KEY).iterdir():
        file.unlink()


def cut_to_nothing(folder: Path) -> None:
    for file in (folder / KEY).iterdir():
        file.with_suffix("").touch()
        file.unlink()


def elsewhere(folder: Path) -> None:
    """Only where no patch of the ROI reads."""
    for file in (folder / KEY).iterdir():
        if "16-20" not in file.name:
            file.unlink()


def renamed(folder: Path) -> None:
    (folder / KEY).rename(folder / "em")


def in_folders(folder: Path) -> None:
    for file in (folder / KEY).iterdir():
        (folder / KEY / file.name.replace("_", "/")).parent.mkdir(parents=True, exist_ok=True)
        file.rename(folder / KEY / file.name.replace("_", "/"))


ROI = ["--set", "roi=[[0, 0, 0], [12, 48, 40]]"]


@pytest.mark.parametrize("section", ["input", "skip.mask"])
@pytest.mark.parametrize("harm", [empty, cut_to_nothing, elsewhere, renamed, in_folders])
def test_a_layer_of_which_nothing_is_there(
    tmp_path: Path, chunkflow: Command, harm: Callable[[Path], None], section: str
) -> None:
    path = write_volume(tmp_path)
    write_layer(tmp_path / "mask")
    settings = [*ROI, "--set", f"skip.mask.path=file://{tmp_path}/mask"]
    harm(tmp_path / section.removeprefix("skip."))
    for value in ("false", "true"):
        outcome = chunkflow("prepare", path, *settings, "--set", f"{section}.fill_missing={value}")
        assert outcome.returncode == 66
        assert f"{section}.path: file://{tmp_path}/" in outcome.stderr
        assert ("fill_missing: all" in outcome.stderr) == (value == "true")
        assert "fill_missing: true" not in outcome.stderr
        assert not (tmp_path / "output").exists()
    outcome = chunkflow("prepare", path, *settings, "--set", f"{section}.fill_missing=all")
    assert outcome.returncode == 0, outcome.stderr


def test_one_storage_chunk_is_enough(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    for file in (tmp_path / "input" / KEY).iterdir():
        if file.name != "16-32_32-48_8-16.gz":
            file.unlink()
    assert chunkflow("prepare", path, "--set", "input.fill_missing=true").returncode == 0
    outcome = chunkflow("run", path)
    assert outcome.returncode == 66
    assert "set input.fill_missing: true" in outcome.stderr


def test_all_is_read_as_true(tmp_path: Path) -> None:
    path = write_volume(tmp_path)
    mask = ["skip.mask.path=file:///mask"]
    some, every, none = (
        load_spec(path, [*mask, f"input.fill_missing={value}", f"skip.mask.fill_missing={value}"]).fingerprint
        for value in ("true", "all", "false")
    )
    assert some == every != none


@pytest.mark.parametrize("value", ["some", "1", "null", "[all]", "'true'"])
def test_no_other_value(tmp_path: Path, chunkflow: Command, value: str) -> None:
    outcome = chunkflow("plan", write_volume(tmp_path), "--set", f"input.fill_missing={value}")
    assert outcome.returncode == 78
    assert "input.fill_missing: " in outcome.stderr and "expected true, false or all" in outcome.stderr


def test_other_scales_are_told(tmp_path: Path) -> None:
    write_layer(tmp_path)
    info = json.loads((tmp_path / "info").read_text())
    info["scales"].append({**info["scales"][0], "key": "8_8_40", "resolution": [8, 8, 40]})
    (tmp_path / "info").write_text(json.dumps(info))
    path = f"file://{tmp_path}"
    found = nothing_there(path, read_scale(path, 1), 1, ALL)
    assert "none of the 27 storage chunks of mip 1 (folder 8_8_40)" in found.text
    assert "There are some of mip 0." in found.text
    assert nothing_there(path, read_scale(path, 0), 0, ALL).text == ""


class _Web(SimpleHTTPRequestHandler):
    """Python's own web server, in several moods; counts requests for storage chunks."""

    protocol_version = "HTTP/1.1"
    mood = ""
    asked: list[str]

    def handle(self) -> None:
        with suppress(ConnectionError):  # who only asks whether a file is there hangs up
            super().handle()

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def do_HEAD(self) -> None:
        if self.mood == "no HEAD":
            self.send_error(405)
        elif self.mood == "HEAD forbidden" and KEY in self.path:
            self.send_error(403)
        else:
            self._answer(super().do_HEAD)

    def _answer(self, otherwise: Callable[[], None]) -> None:
        if KEY in self.path:
            self.asked.append(self.path)
        there = Path(self.translate_path(self.path)).exists()
        if self.mood == "moved" and not self.path.startswith("/new"):
            self.send_response(301)
            self.send_header("Location", f"/new{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.mood == "page" and not there:
            content = b"<!doctype html><title>Not found</title>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content * (self.command == "GET"))
        elif self.mood == "S3" and not there:
            self.send_error(403)
        else:
            otherwise()

    def translate_path(self, path: str) -> str:
        file = super().translate_path(path.removeprefix("/new"))
        return f"{file}.gz" if self.mood == "gzip_static" and Path(f"{file}.gz").exists() else file

    def end_headers(self) -> None:
        if self.mood == "gzip_static" and KEY in self.path and ".gz" not in self.path:
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def plain_files(folder: Path) -> None:
    """Decompress all storage chunks."""
    for file in (folder / KEY).iterdir():
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()


def web(folder: Path, mood: str) -> type[_Web]:
    return type("Web", (_Web,), {"mood": mood, "asked": []})


@pytest.mark.parametrize("mood", ["", "no HEAD", "HEAD forbidden", "moved", "S3", "page", "gzip_static"])
def test_layers_on_web_servers(tmp_path: Path, mood: str) -> None:
    write_layer(tmp_path)
    expected = open_layer(f"file://{tmp_path}", read_scale(f"file://{tmp_path}", 0)).read(ALL)
    if mood != "gzip_static":
        plain_files(tmp_path)
    handler = web(tmp_path, mood)
    with serving(partial(handler, directory=str(tmp_path))) as path:
        scale = read_scale(path, 0)
        assert nothing_there(path, scale, 0, ALL).text == ""
        assert len(handler.asked) <= 2, "one request, and where it leads"
        np.testing.assert_array_equal(open_layer(path, scale).read(ALL), expected)
        digest = LayerSignatures(path, scale).digest(ALL)
        assert (digest == "") == (mood in ("no HEAD", "HEAD forbidden"))


@pytest.mark.parametrize("mood", ["", "no HEAD", "HEAD forbidden", "S3"])
def test_compressed_files_that_a_web_server_does_not_serve(tmp_path: Path, chunkflow: Command, mood: str) -> None:
    path = write_volume(tmp_path)
    handler = web(tmp_path, mood)
    with serving(partial(handler, directory=str(tmp_path))) as address:
        for value in ("false", "true"):
            outcome = chunkflow(
                "prepare", path, "--set", f"input.path={address}/input", "--set", f"input.fill_missing={value}"
            )
            assert outcome.returncode == 66
            assert "Content-Encoding: gzip" in outcome.stderr
            assert f"{address}/input" in outcome.stderr


def test_pages_in_place_of_storage_chunks(tmp_path: Path, chunkflow: Command) -> None:
    path = write_volume(tmp_path)
    handler = web(tmp_path, "page")
    with serving(partial(handler, directory=str(tmp_path))) as address:
        outcome = chunkflow("prepare", path, "--set", f"input.path={address}/input")
        assert outcome.returncode == 65
        assert f"storage chunk {KEY}/" in outcome.stderr and "looks like a web page" in outcome.stderr
        outcome = chunkflow("prepare", path, "--set", f"input.path={address}/nothing")
        assert outcome.returncode == 66
        assert "It is a web page" in outcome.stderr


@pytest.mark.parametrize("kind", ["file", pytest.param("http", marks=pytest.mark.long)])
def test_a_layer_too_large_to_ask_for_all_of_it(tmp_path: Path, kind: str) -> None:
    """It costs few requests, where there is something and where not."""
    scale = _huge(tmp_path)
    handler = web(tmp_path, "")
    with serving(partial(handler, directory=str(tmp_path))) as address:
        path = f"file://{tmp_path}" if kind == "file" else address
        absence = nothing_there(path, scale, 0, scale.bounds)
        assert absence.text
        assert absence.is_sure == (kind == "file"), "a disk has a listing"
        assert len(handler.asked) < 2200
        (tmp_path / KEY / "64-128_0-64_64-128").write_bytes(b"1")
        found = nothing_there(path, scale, 0, Box((60, 0, 60), (70, 10, 70)))
        assert found.text == ""
        if kind == "file":
            assert nothing_there(path, scale, 0, scale.bounds).text == ""


def _huge(folder: Path) -> LayerScale:
    write_layer(folder)
    empty(folder)
    info = json.loads((folder / "info").read_text())
    info["scales"][0].update(size=[64 * 500] * 3, chunk_sizes=[[64, 64, 64]])
    (folder / "info").write_text(json.dumps(info))
    return read_scale(f"file://{folder}", 0)
