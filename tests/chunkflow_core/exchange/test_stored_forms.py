"""What is stored for good keeps its form.

A change here voids the receipts of every volume that is at work. If such a change is meant,
``CHANGELOG.md`` says so, and these texts change with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core.exchange import donations
from chunkflow_core.exchange.receipts import DonationEntry, Receipt, unpack
from chunkflow_core.lattice.blocks import Donation
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.storage.layers import NewLayer
from chunkflow_core.storage.signatures import WrittenChunk

MODEL = "class PatchInferencer: pass\n"
COMMON: dict[str, Any] = {
    "name": "golden",
    "input": {"path": "file://~/em", "mip": 0},
    "output": {"path": "file://~/out", "channels": 1, "dtype": "uint8", "chunk_size": [4, 4, 4]},
    "exchange": {"path": "file://~/exchange"},
    "patch_size": [8, 12, 12],
    "patch_overlap": [2, 4, 4],
    "block_size": [12, 16, 16],
    "model": {"engine": "identity"},
}
SPECS: dict[str, tuple[dict[str, Any], str, dict[tuple[int, int, int], str]]] = {
    "identity": ({}, "23cdc8cfb8091108", {(0, 0, 0): "6upnt3iwge2oo", (1, 1, 1): "aw3icrzm62tfk"}),
    "network": (
        {
            "output": {"path": "file://~/out", "channels": 3, "dtype": "float32", "chunk_size": [4, 4, 4]},
            "model": {"engine": "pytorch", "path": "~/model.py", "outputs": "affinity", "augmentation": "flips"},
            "skip": {"zeros": True},
        },
        "30c9235a3b6e33d0",
        {(0, 0, 0): "7qxwubrcw7ph6", (1, 2, 2): "wo6sn7lr23ow6"},
    ),
    "part": (
        {"roi": [[2, 3, 5], [30, 40, 60]], "output_patch_size": [6, 10, 10], "block_size": [12, 24, 24]},
        "7027394c3bb81ec2",
        {(0, 0, 0): "jkrirqjz6eeum", (1, 1, 2): "2icqmiirj7k5e"},
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with an input layer and a model.

    By it, addresses are the same wherever the tests run.
    """
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        NewLayer("file://~/em", (33, 48, 64), dtype="uint8", resolution=(40, 4, 4), chunk=(8, 16, 16))
        (folder / "model.py").write_text(MODEL)
        yield folder


def spec_of(changes: dict[str, Any], home: Path) -> VolumeSpec:
    return parse_spec(COMMON | changes, source="golden", folder=str(home))


@pytest.mark.parametrize("name", SPECS)
def test_fingerprints_and_digests_of_blocks(home: Path, name: str) -> None:
    changes, fingerprint, digests = SPECS[name]
    spec = spec_of(changes, home)
    assert spec.fingerprint == fingerprint
    assert {index: spec.block_digest(index) for index in digests} == digests


RECEIPT = Receipt(
    stage="infer",
    block=(1, 0, 2),
    box="32-48_0-16_12-24",
    fingerprint="23cdc8cfb8091108",
    geometry="6upnt3iwge2oo",
    run="run-1",
    patches=18,
    skipped={"zeros": 2},
    donations=(
        DonationEntry("32-48_0-16_12-24%48-52_0-16_12-16", (1, 0, 3), "abc", 120),
        DonationEntry("32-48_0-16_12-24%32-36_0-16_12-16", (1, 0, 2), None, 0),
    ),
    signature="sig",
    content="con",
    mask="",
    written={"36-48_0-16_12-16": WrittenChunk("dig", 2**63)},
    stored="sto",
    changes=("run-1",),
    facts={"wall": 1.5},
)


def test_a_receipt_is_a_file_of_this_name_and_content() -> None:
    assert RECEIPT.name == "32-48_0-16_12-24%6upnt3iwge2oo%sto%sig%bim7bhdxpln6i.0_q55lcv7iymxhi.1______.json"
    assert (
        hashlib.sha256(RECEIPT.pack()).hexdigest() == "a1b3f1ddc379944e91278bbfda41a79d177ec7e45f0a8c66a396066343fcfb9f"
    )
    assert unpack(RECEIPT.pack(), RECEIPT.fingerprint) == RECEIPT


def test_a_donation_is_a_file_of_this_content() -> None:
    donation = Donation((0, 0, 0), (0, 0, 1), Box((0, 0, 16), (2, 8, 20)), "0-16_0-16_0-12%16-20_0-8_0-2")
    data, checksum = donations.pack(donation, b"sums", 1, "23cdc8cfb8091108")
    assert (hashlib.sha256(data).hexdigest(), checksum) == (
        "4d6adf4d05fc71353fa9581c7229f11f959e55ec191baae39ec9555341df3577",
        "dc41e113d64d7f9a61747e808a5f75eb",
    )
    assert donations.unpack(data, donation, 1, "23cdc8cfb8091108", checksum) == b"sums"
