"""A donation that is missing or wrong stops receive-and-blend, which then has written nothing."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.exchange import donations
from chunkflow_core.exchange.codec import compress, decompress
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.inference_and_donate import main as infer
from chunkflow_core.lattice.blocks import Donation
from chunkflow_core.receive_and_blend import main as blend
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from tests.support.volume import files_below, output_of, write_volume

RECEIVER = (1, 1, 1)
DONOR = (0, 1, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A volume whose blocks have donated and not been blended."""
    spec = write_volume(tmp_path)
    assert main(["prepare", str(spec)]) == 0
    for index in load_spec(spec).grid.indices():
        assert infer([str(spec), "--block", *map(str, index)]) == 0
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> NDArray[Any]:
    """Output of such a volume to which no harm is done."""
    spec = write_volume(tmp_path_factory.mktemp("undisturbed"))
    assert main(["run", str(spec), "--seams", "0"]) == 0
    return output_of(spec)


def one_donation(spec: VolumeSpec) -> tuple[Donation, Path]:
    """A donation of DONOR for RECEIVER, and its file."""
    donation, folder = spec.grid.donations(DONOR, RECEIVER)[0], Path(Exchange(spec).path.removeprefix("file://"))
    return donation, folder / "donations" / "0_0_0" / spec.grid.block(DONOR).name / donation.key


def flip_a_bit(spec: VolumeSpec) -> None:
    _, file = one_donation(spec)
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)


def truncate(spec: VolumeSpec) -> None:
    _, file = one_donation(spec)
    file.write_bytes(file.read_bytes()[:-100])


def empty(spec: VolumeSpec) -> None:
    one_donation(spec)[1].write_bytes(b"")


def remove(spec: VolumeSpec) -> None:
    one_donation(spec)[1].unlink()


def of_another_fingerprint(spec: VolumeSpec) -> None:
    """An intact donation of the right box, but of another model or geometry."""
    donation, file = one_donation(spec)
    sums = compress(np.ones((2, *donation.box.shape), np.float32))
    file.write_bytes(donations.pack(donation, sums, 2, "0123456789abcdef")[0])


def of_an_earlier_inference(spec: VolumeSpec) -> None:
    """An intact donation of this fingerprint and box, but of other sums than the receipt knows."""
    donation, file = one_donation(spec)
    sums = compress(np.ones((2, *donation.box.shape), np.float32))
    file.write_bytes(donations.pack(donation, sums, 2, spec.fingerprint)[0])


def of_another_box(spec: VolumeSpec) -> None:
    """The file of another donation under this one's name."""
    other = spec.grid.donations((1, 0, 1), RECEIVER)[0]
    _, file = one_donation(spec)
    shutil.copy(file.parents[1] / "1_0_1" / other.key, file)


def of_another_block_with_its_receipt(spec: VolumeSpec) -> None:
    """Even the donor's receipt vouches for the wrong file."""
    of_another_box(spec)
    donation, _ = one_donation(spec)
    exchange = Exchange(spec)
    receipt = exchange.receipt("infer", DONOR)
    other = exchange.receipt("infer", (1, 0, 1))
    assert receipt is not None and other is not None
    checksum = {entry.key: entry.checksum for entry in other.donations}
    wrong = spec.grid.donations((1, 0, 1), RECEIVER)[0].key
    entries = tuple(
        type(entry)(entry.key, entry.receiver, checksum[wrong], entry.bytes) if entry.key == donation.key else entry
        for entry in receipt.donations
    )
    exchange.retract("infer", DONOR)
    exchange.put_receipt(replace(receipt, donations=entries))


def receipt_file(spec: VolumeSpec) -> Path:
    """The file of the donor's receipt of inference."""
    folder = Path(Exchange(spec).path.removeprefix("file://")) / "receipts" / "infer" / "0_0_0"
    return next(folder.glob(f"{spec.grid.block(DONOR).box.key}%*.json"))


def receipt_missing(spec: VolumeSpec) -> None:
    receipt_file(spec).unlink()


def receipt_altered(spec: VolumeSpec) -> None:
    file = receipt_file(spec)
    record = json.loads(file.read_text())
    record["receipt"]["donations"] = []
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by the next run"])
@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (flip_a_bit, 65),
        (truncate, 65),
        (empty, 65),
        (of_another_fingerprint, 65),
        (of_an_earlier_inference, 65),
        (of_another_box, 65),
        (of_another_block_with_its_receipt, 65),
        (remove, 66),
        (receipt_missing, 66),
        (receipt_altered, 66),
    ],
)
def test_wrong_donation(
    folder: Path,
    undisturbed: NDArray[Any],
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[VolumeSpec], None],
    code: int,
    *,
    by_hand: bool,
) -> None:
    path = folder / "spec.yaml"
    spec = load_spec(path)
    harm(spec)
    before = files_below(folder / "output")
    capsys.readouterr()

    assert blend([str(path), "--block", *map(str, RECEIVER)]) == code

    message = capsys.readouterr().err
    assert str(DONOR) in message
    assert "inference_and_donate SPEC --block 0 1 1 --force" in message
    assert "Traceback" not in message
    assert files_below(folder / "output") == before, "nothing may be written"
    assert not list((folder / "exchange").rglob("receipts/blend/*/*"))

    if by_hand:
        assert infer([str(path), "--block", *map(str, DONOR), "--force"]) == 0, "the remedy it names"
        for index in spec.grid.indices():
            assert blend([str(path), "--block", *map(str, index)]) == 0
    else:
        run = ["run", str(path), "--seams", "0"]
        if harm is receipt_altered:  # a plan goes by names: that one of them lies is for an audit to find
            assert main([*run, "--repair"]) == 0
        assert main(run) == 0, "the next run mends it, too"
    np.testing.assert_array_equal(output_of(path), undisturbed)


def test_what_was_donated_before_the_input_grew_is_not_blended(tmp_path: Path) -> None:
    """The donations have the same names, but were padded where there are voxels now."""
    roi = [[0, 0, 0], [15, 48, 40]]
    path = write_volume(tmp_path, roi=roi, input={"path": f"file://{tmp_path}/input", "bounds": roi})
    assert main(["prepare", str(path)]) == 0
    before, now = load_spec(path), load_spec(path, ["input.bounds=[[0, 0, 0], [20, 48, 40]]"])
    receiver = (1, 0, 0)
    for donor in before.grid.donors(receiver):
        inference_and_donate(Workspace(before), donor)

    assert [d.key for d in now.grid.donations(receiver, receiver)] == [
        d.key for d in before.grid.donations(receiver, receiver)
    ]
    with pytest.raises(MissingInputError, match=r"block \(1, 0, 0\) has not donated yet"):
        receive_and_blend(Workspace(now), receiver)

    receive_and_blend(Workspace(before), receiver)


def test_what_has_been_blended_still_counts_if_it_can_not_be_done_again(folder: Path) -> None:
    path = str(folder / "spec.yaml")
    spec, block = load_spec(path), ["--block", *map(str, RECEIVER)]
    assert blend([path, *block]) == 0
    done = Exchange(spec).receipt("blend", RECEIVER)
    remove(spec)

    assert blend([path, *block, "--force"]) == 66

    assert done is not None
    assert Exchange(spec).receipt("blend", RECEIVER) == done, "nothing was written"


def test_a_retry_in_the_same_run_donates_again_what_was_damaged(folder: Path) -> None:
    """A run donates twice where both tasks of an Airflow run are cleared."""
    path = str(folder / "spec.yaml")
    block = ["--block", *map(str, DONOR), "--force", "--run", "same"]
    assert infer([path, *block]) == 0
    donation, file = one_donation(load_spec(path))
    intact, done = file.read_bytes(), file.stat().st_mtime_ns
    assert infer([path, *block]) == 0
    assert file.stat().st_mtime_ns == done, "up to date"

    truncate(load_spec(path))
    assert infer([path, *block]) == 0

    assert file.read_bytes() == intact, donation


def test_zero_donations_are_not_stored(tmp_path: Path) -> None:
    path = write_volume(
        tmp_path,
        input={"path": f"file://{tmp_path}/input", "fill_missing": "all"},
        exchange={"path": f"file://{tmp_path}/exchange", "donations": "keep"},
    )
    shutil.rmtree(next(p for p in (tmp_path / "input").iterdir() if p.is_dir()))

    assert main(["run", str(path)]) == 0

    assert not list((tmp_path / "exchange").rglob("donations/*/*/*"))
    assert not output_of(path).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (16, 64, 128)])  # less and more than a stretch
def test_codec_gives_back_the_bits(shape: tuple[int, int, int]) -> None:
    sums = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    sums[0, 0, 0, 0] = -0.0

    again = decompress(compress(sums), 2, shape)

    assert again.tobytes() == sums.tobytes()


def test_what_is_not_of_the_size_of_its_box_is_refused_before_it_takes_memory() -> None:
    sums = np.ones((2, 4, 8, 8), np.float32)
    content = zstandard.decompress(compress(sums))
    wrong = {
        "larger": zstandard.compress(content + bytes(4)),
        "smaller": zstandard.compress(content[:-4]),
        "a gigabyte": zstandard.compress(bytes(1 << 30)),
        "no size said": zstandard.ZstdCompressor(write_content_size=False).compress(content),
        "something after it": compress(sums) + b"more",
        "cut off": compress(sums)[:-4],
        "of another kind": b"nothing of the kind",
    }
    tracemalloc.start()
    try:
        for what, payload in wrong.items():
            with pytest.raises(DataError, match="a donation "):
                decompress(payload, 2, (4, 8, 8))
            assert tracemalloc.get_traced_memory()[1] < 2**20, what
    finally:
        tracemalloc.stop()
