"""The code of docs/hand-over.md, each block run as it stands there, on a small volume."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from cloudvolume import CloudVolume
from numpy.typing import NDArray
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from tests.support.outputs import run
from tests.support.volume import spec_content, write_layer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/hand-over.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CODE = [text for language, text in FENCES if language == "python"]
COMMANDS = [line for language, text in FENCES if not language for line in text.splitlines()]
ELSEWHERE = {
    "dask": "dask[array]",
    "napari": "napari[all]",
    "waterz": "waterz",
    "mwatershed": "mwatershed",
    "cc3d": "connected-components-3d",
}
"""Modules that the page names and nothing here needs, and what installs them."""


def imported(code: str) -> set[str]:
    """The packages that a block imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))


RUN = [code for code in CODE if not imported(code) & ELSEWHERE.keys()]
READING = [code for code in RUN if "json" not in imported(code)]


def described(folder: Path, name: str, **output: Any) -> Path:
    """The spec of a volume whose output is three times its input, from 2, 4, 6 on."""
    content = spec_content(folder / "em", folder) | {
        "name": name.replace(".", "-"),
        "roi": [[2, 4, 6], [20, 48, 40]],
        "block_size": [24, 48, 48],
        "output": {"path": f"file://{folder}/{name}", "channels": 3, "chunk_size": [4, 8, 8]} | output,
        "exchange": {"path": f"file://{folder}/exchange-{name}"},
    }
    spec = folder / f"{name}.yaml"
    spec.write_text(yaml.safe_dump(content))
    return spec


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page has in ``/data``."""
    folder = tmp_path_factory.mktemp("data")
    write_layer(folder / "em")
    run(described(folder, "affinities"))
    run(described(folder, "plain", compression="none"))
    run(described(folder, "affinities.zarr", format="ome-zarr"))
    return folder


@pytest.fixture(scope="module")
def box(data: Path) -> NDArray[np.uint8]:
    """The box that all blocks read, czyx: that of the input, three times."""
    read = np.asarray(CloudVolume(f"file://{data}/em", progress=False)[6:38, 4:36, 2:18]).T
    return np.repeat(read, 3, axis=0)


def outcome(code: str, data: Path) -> dict[str, Any]:
    """The names that a block leaves."""
    names: dict[str, Any] = {}
    exec(compile(code.replace("/data/", f"{data}/"), "hand-over.md", "exec"), names)
    return names


@pytest.mark.parametrize("code", READING, ids=lambda code: code.splitlines()[-1])
def test_every_way_of_reading_gives_the_same_box(data: Path, box: NDArray[np.uint8], code: str) -> None:
    read = outcome(code, data)["affinities"]
    assert read.shape == box.shape
    if read.dtype == np.float32:
        assert read.flags.c_contiguous
        assert np.array_equal(read, box / np.float32(255))
    else:
        assert read.dtype == np.uint8
        assert np.array_equal(read, box)


def test_ome_zarr_says_where_it_begins(data: Path) -> None:
    (code,) = (code for code in READING if "coordinateTransformations" in code)
    names = outcome(code, data)
    assert names["size"].tolist() == [40, 4, 4]
    assert names["start"].tolist() == [2, 4, 6]


def test_tensorstore_misses_what_cloudvolume_compresses_on_a_disk(data: Path) -> None:
    (code,) = (code for code in READING if "/data/plain" in code)
    compressed = code.replace("/data/plain", "/data/affinities")
    with pytest.raises(ValueError, match="NOT_FOUND"):
        outcome(compressed, data)
    assert not outcome(compressed.replace("False", "True"), data)["affinities"].any()


def test_what_is_not_run_needs_what_is_not_installed() -> None:
    """All else is run, and what isn't says what to install."""
    assert {name for code in CODE if code not in RUN for name in imported(code)} >= ELSEWHERE.keys()
    pinned = (ROOT / "constraints.txt").read_text()
    for package in ELSEWHERE.values():
        assert re.search(rf'`pip install "?[^`]*{re.escape(package)}', PAGE), package
        assert not re.search(rf"^{package.partition('[')[0]}==", pinned, re.MULTILINE), package


@retry(retry=retry_if_exception_type(ConnectionError), stop=stop_after_delay(60), wait=wait_fixed(0.1), reraise=True)
def wait_until_listening(port: int) -> None:
    socket.create_connection(("localhost", port)).close()


def answer(address: str) -> tuple[Any, bytes]:
    """Headers and body that a server gives."""
    with urlopen(address) as response:
        return response.headers, response.read()


@pytest.fixture
def served(data: Path) -> Iterator[Callable[[str], str]]:
    """Starts the command of the page that serves a layer, at another port; gives its address."""
    processes = []

    def start(name: str) -> str:
        (command,) = (c for c in COMMANDS if f'/{name}"' in c)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        text = re.sub(r"port=\d+", f"port={port}", command).replace("/data/", f"{data}/")
        words = shlex.split(text)
        assert words[0] == "python"
        processes.append(subprocess.Popen([sys.executable, *words[1:]], stdout=subprocess.DEVNULL))
        wait_until_listening(port)
        return f"http://localhost:{port}"

    yield start
    for process in processes:
        process.terminate()
        process.wait()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "description", "chunk"),
    [("affinities", "info", "4_4_40/6-14_4-12_2-6"), ("affinities.zarr", "zarr.json", "0/c/0/0/0/0")],
)
def test_served_layers_are_what_neuroglancer_asks_for(
    data: Path, served: Callable[[str], str], name: str, description: str, chunk: str
) -> None:
    """The metadata, and storage chunks by the names that the format has, for any page."""
    address = served(name)
    headers, body = answer(f"{address}/{description}")
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert json.loads(body) == json.loads((data / name / description).read_text())
    headers, body = answer(f"{address}/{chunk}")
    assert headers["Access-Control-Allow-Origin"] == "*"
    if description == "info":
        assert len(body) == 3 * 4 * 8 * 8, "decompressed"
    else:
        assert body == (data / name / chunk).read_bytes()


def test_the_link_shows_what_is_served() -> None:
    (code,) = (code for code in RUN if "json" in imported(code))
    link: str = outcome(code, Path("/data"))["link"]
    (layer,) = json.loads(unquote(link.partition("#!")[2]))["layers"]
    (port,) = (p for c in COMMANDS for p in re.findall(r'/data/affinities", port=(\d+)', c))
    (other,) = (p for c in COMMANDS for p in re.findall(r'affinities.zarr", port=(\d+)', c))
    assert layer["source"] == f"precomputed://http://localhost:{port}"
    assert f"zarr://http://localhost:{other}" in code
    assert "void main()" in layer["shader"]


def test_coarser_scales_change_nothing_that_is_due(chunkflow: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """As Igneous makes them: scales in ``info``, their voxels, a line of provenance."""
    shutil.copytree(data / "em", tmp_path / "em")
    spec = described(tmp_path, "affinities")
    run(spec)
    layer = CloudVolume(f"file://{tmp_path}/affinities", progress=False)
    layer.add_scale((2, 2, 1))
    layer.commit_info()
    layer.provenance.processing.append({"by": "someone", "method": {"task": "DownsampleTask"}})
    layer.commit_provenance()
    coarse = CloudVolume(layer.cloudpath, mip=1, progress=False)
    coarse[:] = np.ones((*coarse.bounds.size3(), 3), np.uint8)

    assert chunkflow("verify", spec, "--deep").returncode == 0
    due = json.loads(chunkflow("plan", spec, "--json").stdout)
    assert not due["infer"] and not due["blend"]
    assert "0 blocks to infer, 0 to blend" in chunkflow("run", spec).stdout
    assert coarse[:].all(), "they stay"
