"""Good specs as users write them, and changes of a command line: what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.spec.schedule import ScheduleSpec

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]


def test_defaults_are_those_of_the_documentation(make_spec: MakeSpec) -> None:
    spec = load_spec(make_spec())
    assert spec.grid.roi == Box((0, 0, 0), (20, 48, 40)), "without roi the whole input layer"
    assert (spec.input.mip, spec.input.padding, spec.input.fill_missing) == (0, "reflect", False)
    assert (spec.output.dtype, spec.output.channels, spec.output.range) == ("uint8", 1, (0.0, 1.0))
    assert (spec.model.batch_size, spec.model.precision, spec.model.trust) == (1, "float32", False)
    assert (spec.runner.kind, spec.schedule, spec.exchange.donations) == ("local", None, "delete")
    assert spec.output_size == spec.patch_size
    assert spec.halo == (0, 0, 0)


def test_roi_and_smaller_output_patch_decide_grid_and_halo(make_spec: MakeSpec) -> None:
    spec = load_spec(
        make_spec(roi=[[2, 4, 8], [18, 44, 40]], patch_size=[12, 20, 16], output_patch_size=[8, 16, 16], name="a.b-c_1")
    )
    assert spec.grid.roi == Box((2, 4, 8), (18, 44, 40))
    assert spec.grid.patch == (8, 16, 16)
    assert spec.halo == (2, 2, 0)


def test_merge_keys(make_spec: MakeSpec) -> None:
    path = make_spec()
    path.write_text(f"{path.read_text()}\nrunner:\n  <<: &common {{kind: local, retries: 2}}\n  retries: 3\n")
    assert load_spec(path).runner.retries == 3


def test_aliases(make_spec: MakeSpec) -> None:
    options = "&a {start: *s, same: [*s, *s]}"
    spec = load_spec(make_spec(), [f"model.options={{first: &s [6, 12, 12], again: {options}, more: [*a, *a]}}"])
    corner = [6, 12, 12]
    again = {"start": corner, "same": [corner, corner]}
    assert spec.model.options == {"first": corner, "again": again, "more": [again, again]}


def test_bytes_of_a_command_line_that_are_no_text(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match="name"):
        load_spec(make_spec(), ["name=\udcff"])


@pytest.mark.parametrize(
    ("block", "overlap", "chunk"),
    [
        ([12, 24, 24], [2, 4, 4], (12, 24, 24)),  # smaller than the target: one storage chunk a block
        ([112, 1152, 1152], [4, 64, 64], (28, 128, 128)),  # the divisors nearest to 32 × 128 × 128
        ([1, 1009, 100], [0, 0, 0], (1, 1009, 100)),  # a prime has no better divisor
    ],
)
def test_default_storage_chunk_divides_the_block(
    make_spec: MakeSpec, tmp_path: Path, block: list[int], overlap: list[int], chunk: tuple[int, ...]
) -> None:
    patch = [32, 256, 256] if block[0] == 112 else [b + o for b, o in zip(block, overlap, strict=True)]
    output = {"path": f"file://{tmp_path}/output"}
    spec = load_spec(make_spec(output=output, block_size=block, patch_overlap=overlap, patch_size=patch))
    assert spec.storage_chunk == chunk


def test_an_absurdly_large_block_is_not_searched_for_divisors_one_by_one(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = load_spec(make_spec(output={"path": f"file://{tmp_path}/output"}, block_size=[12, 24, 12 * 10**9]))
    assert spec.storage_chunk[2] in (120, 125, 128)


def test_environment_variables_are_replaced_wherever_texts_stand(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKFLOW_TEST_DATA", "/data/em")
    monkeypatch.setenv("CHUNKFLOW_TEST_KIND", "ident")
    spec = load_spec(
        make_spec(input={"path": "file://${CHUNKFLOW_TEST_DATA}/raw"}, model={"engine": "${CHUNKFLOW_TEST_KIND}ity"})
    )
    assert spec.input.path == "file:///data/em/raw"
    assert spec.model.engine == "identity"


def test_set_replaces_and_creates_keys_with_values_in_yaml(make_spec: MakeSpec) -> None:
    path = make_spec()
    path.write_text(path.read_text() + "runner:\n")  # a section whose keys are all commented out
    spec = load_spec(
        path,
        [
            "model.batch_size=3",
            "block_size=[12, 24, 36]",
            "runner.retries=0",
            "model.options.depth.of=[1, two]",
            "output.range=[-1, 0.5]",
            "schedule=@daily",
            "name=a-b",
            "roi=[[0, 0, 0], [6, 12, 12]]",
            "input.fill_missing=true",
        ],
    )
    assert spec.model.batch_size == 3
    assert spec.block_size == (12, 24, 36)
    assert spec.runner.retries == 0
    assert spec.model.options == {"depth": {"of": [1, "two"]}}
    assert spec.output.range == (-1, 0.5)
    assert (spec.schedule, spec.name, spec.input.fill_missing) == (ScheduleSpec(cron="@daily"), "a-b", True)
    assert spec.grid.roi.shape == (6, 12, 12)


def test_the_last_of_several_set_wins_and_variables_in_it_are_replaced(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKFLOW_TEST_NAME", "from-env")
    assert load_spec(make_spec(), ["name=one", "name=${CHUNKFLOW_TEST_NAME}"]).name == "from-env"


@pytest.mark.parametrize("cron", ["@daily", "*/5 * * * *", "0 3 * * 1"])
def test_set_takes_cron_expressions_without_quotes(make_spec: MakeSpec, cron: str) -> None:
    assert load_spec(make_spec(), [f"schedule={cron}"]).schedule == ScheduleSpec(cron=cron)


def test_paths_of_the_model_are_relative_to_the_spec(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.py").write_text("")
    path = make_spec(model={"engine": "pytorch", "path": "model.py"})
    monkeypatch.chdir("/")
    assert load_spec(path).model_files == [tmp_path / "model.py"]
    monkeypatch.chdir(tmp_path)
    assert load_spec("spec.yaml").model_files == [tmp_path / "model.py"]


def test_reading_a_spec_and_its_layer_imports_nothing_heavy(make_spec: MakeSpec, python: Command) -> None:
    """Airflow reads specs for every DAG file, again and again."""
    program = """
import sys
from chunkflow_core.spec import load_spec
spec = load_spec(sys.argv[1])
print(
    spec.fingerprint,
    spec.grid.shape,
    sorted({"torch", "cloudvolume", "cloudfiles", "numba", "zstandard"} & set(sys.modules)),
)
"""
    path = make_spec()
    outcome = python("-c", program, path)
    assert outcome.stdout == f"{load_spec(path).fingerprint} (2, 2, 2) []\n", outcome.stderr
