"""The commands that docs/models.md gives for published models, each run as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkflow_core.spec import parse_spec
from tests.support.models import packages
from tests.support.models.libraries import LIBRARIES, installed

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

PAGE = Path(__file__).parents[2] / "docs/models.md"
PARTS = re.findall(
    r"^### (.*?)\n(.*?)(?=^##)", PAGE.read_text().partition("## Published models")[2], re.DOTALL | re.MULTILINE
)
COMMANDS = {
    name: [
        line for block in re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    for name, text in PARTS
}


def _connectomics(folder: Path) -> None:
    (folder / "outputs/mito").mkdir(parents=True)
    packages.connectomics_1(folder / "outputs/mito")


def _monai(folder: Path) -> None:
    (folder / "nets").mkdir()
    shutil.move(packages.monai_torchscript(folder).place, folder / "nets/spleen_ct_segmentation")
    shutil.move(packages.monai_ts_with_metadata(folder).place, folder / "nets/spleen.ts")


def _bioimageio(folder: Path) -> None:
    shutil.make_archive(str(folder / "boundaries"), "zip", packages.bioimageio_5(folder).place)


def _nnunet(folder: Path) -> None:
    (folder / "nnUNet_results").mkdir()
    packages.results(folder / "nnUNet_results", packages.PLAN, folds="01234")


PLACES: dict[str, Callable[[Path], None]] = {
    "PyTorch Connectomics": _connectomics,
    "Bundles of MONAI": _monai,
    "Packages of bioimage.io": _bioimageio,
    "Results of nnU-Net": _nnunet,
}
"""What puts a package where the page has it, by the heading."""


@pytest.fixture(autouse=True)
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with installed(tmp_path / "site", monkeypatch, *LIBRARIES):
        yield


def test_every_kind_has_its_commands() -> None:
    assert {name for name, commands in COMMANDS.items() if commands} == set(PLACES)


@pytest.mark.parametrize("name", PLACES)
def test_commands_print_lines_of_a_spec(chunkflow: Callable[..., Any], tmp_path: Path, name: str) -> None:
    PLACES[name](tmp_path)
    for command in COMMANDS[name]:
        words = shlex.split(command)
        if words[0] == "unzip":
            shutil.unpack_archive(words[-1], words[2])
            continue
        outcome = chunkflow(*words[1:])
        assert (words[0], outcome.returncode, outcome.stderr) == ("chunkflow-core", 0, "")
        lines = yaml.safe_load(outcome.stdout)
        patch = lines.get("output_patch_size", lines["patch_size"])
        whole = {
            "name": "published",
            "input": {"path": "file:///em"} | lines.get("input", {}),
            "exchange": {"path": "file:///exchange"},
            "output": {"path": "file:///output"} | lines["output"],
            "block_size": [20 * (n - o) for n, o in zip(patch, lines["patch_overlap"], strict=True)],
        }
        spec = parse_spec(lines | whole, source=command, folder=str(tmp_path))
        assert spec.model_files, "the lines name files that are there"
