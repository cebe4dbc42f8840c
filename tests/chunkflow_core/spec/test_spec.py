"""The volume spec as users write it.

The tests say what is read, what decides the fingerprint, and what each mistake is told.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import load_spec
from chunkflow_core.spec.schedule import ScheduleSpec

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]

PYTORCH = {"engine": "pytorch", "path": "model.py", "weights": "weights.pt"}


# --------------------------------------------------------------------------------------- good specs


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


# -------------------------------------------------------------------------------------- fingerprint


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model of several files; the fingerprint reads them, nothing runs them."""
    (tmp_path / "model.py").write_text("import layers\nfrom blocks.residual import Block\nimport numpy\n")
    (tmp_path / "layers.py").write_text("from helper import x\n")
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "residual.py").write_text("Block = 1\n")
    (tmp_path / "stranger.py").write_text("nobody = 'imports me'\n")
    (tmp_path / "weights.pt").write_bytes(b"weights")
    return tmp_path


def fingerprint(path: Path, *overrides: str) -> str:
    return load_spec(path, overrides).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "patch_size=[8, 16, 18]",
        "output_patch_size=[8, 16, 14]",
        "patch_overlap=[2, 4, 6]",
        "block_size=[12, 24, 240]",
        "output.range=[0, 2]",
        "output.dtype=float32",
        "output.channels=2",
        "output.chunk_size=[6, 12, 2]",
        "output.path=file:///elsewhere",
        "input.padding=edge",
        "input.fill_missing=true",
        "roi=[[2, 0, 0], [20, 48, 40]]",
        "model.batch_size=2",
        "model.precision=bfloat16",
        "model.threads=2",
        "model.activation=sigmoid",
        "model.batch_statistics=true",
        "model.output=1",
        "model.options.x=1",
    ],
)
def test_what_decides_numbers_changes_the_fingerprint(make_spec: MakeSpec, model_folder: Path, override: str) -> None:
    path = make_spec(model=PYTORCH)
    large = ["block_size=[12, 24, 840]", "output.chunk_size=[6, 12, 1]"]  # fits all of these patches and overlaps
    assert fingerprint(path, *large) != fingerprint(path, *large, override)


@pytest.mark.parametrize("name", ["model.py", "layers.py", "helper.py", "blocks/residual.py", "weights.pt"])
def test_every_file_that_makes_the_model_is_in_the_fingerprint(
    make_spec: MakeSpec, model_folder: Path, name: str
) -> None:
    path = make_spec(model=PYTORCH)
    before = fingerprint(path)
    with (model_folder / name).open("ab") as file:
        file.write(b"# changed\n")
    assert fingerprint(path) != before


def test_input_mip_changes_the_fingerprint(make_spec: MakeSpec, tmp_path: Path, random_layer: Path) -> None:
    shutil.copytree(random_layer, tmp_path / "input")
    info = json.loads((tmp_path / "input" / "info").read_text())
    info["scales"] *= 2
    (tmp_path / "input" / "info").write_text(json.dumps(info))
    path = make_spec(input={"path": f"file://{tmp_path}/input"})
    assert fingerprint(path) != fingerprint(path, "input.mip=1")


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "schedule=@daily",
        "runner.retries=9",
        "runner.parallel=2",
        "exchange.donations=keep",
        "output.compression=none",
        "model.device=cpu",
        "roi=[[0, 0, 0], [12, 48, 40]]",  # the end: a growing volume keeps its finished blocks
        "input.bounds=[[0, 0, 0], [20, 48, 39]]",  # likewise
        "output.range=[0, 1]",  # the default in other digits
    ],
)
def test_what_decides_no_number_leaves_the_fingerprint(make_spec: MakeSpec, model_folder: Path, override: str) -> None:
    path = make_spec(model=PYTORCH)
    assert fingerprint(path) == fingerprint(path, override)


def test_names_and_places_of_model_files_leave_the_fingerprint(
    make_spec: MakeSpec, model_folder: Path, tmp_path: Path
) -> None:
    path = make_spec(model=PYTORCH)
    before = fingerprint(path)
    (model_folder / "stranger.py").write_text("changed")
    (model_folder / "weights.pt").rename(model_folder / "renamed.pt")
    assert fingerprint(path, "model.weights=renamed.pt") == before
    moved = tmp_path / "moved"
    shutil.copytree(model_folder, moved, ignore=shutil.ignore_patterns("moved"))
    assert fingerprint(moved / "spec.yaml", "model.weights=renamed.pt") == before


# ---------------------------------------------------------------------------------------- bad specs

BAD: dict[str, tuple[dict[Any, Any], list[str]]] = {
    # case: (keys of the spec, what the message has to say beside the file's name)
    "unknown key": ({"patchsize": [8, 16, 16]}, ["patchsize", "unknown key", "did you mean patch_size?"]),
    "unknown key, nothing near": ({"zebra": 1}, ["zebra", "unknown key", "patch_size"]),
    "unknown nested key": (
        {"model": {"engine": "identity", "batchsize": 4}},
        ["model.batchsize", "did you mean batch_size?"],
    ),
    "internal key": ({"folder": "/"}, ["folder", "unknown key"]),
    "number as a key": ({1: 2}, ["1", "keys should be strings"]),
    "missing key": ({"patch_size": ...}, ["patch_size", "missing"]),
    "missing nested key": ({"model": {}}, ["model.engine", "missing"]),
    "empty section": ({"model": None}, ["model", "null", "expected a section", "engine"]),
    "value for a section": ({"input": "file:///data/em"}, ["input", "file:///data/em", "expected a section", "path"]),
    "section for a value": ({"patch_size": {"z": 8}}, ["patch_size", '{"z": 8}', "three integers", "z, y, x"]),
    "text for an integer": ({"model": {"engine": "identity", "batch_size": "4"}}, ["batch_size", '"4"', "integer"]),
    "boolean for an integer": ({"model": {"engine": "identity", "threads": True}}, ["model.threads", "true"]),
    "fraction for an integer": ({"model": {"engine": "identity", "threads": 1.5}}, ["model.threads", "1.5", "integer"]),
    "integer for a boolean": ({"model": {"engine": "identity", "trust": 1}}, ["model.trust", "boolean"]),
    "two numbers": ({"patch_size": [8, 16]}, ["patch_size", "[8, 16]", "three integers", "z, y, x"]),
    "one number": ({"block_size": 64}, ["block_size", "64", "three integers"]),
    "numbers in a text": ({"patch_size": "8 16 16"}, ["patch_size", "8 16 16", "three integers"]),
    "fractions in a size": ({"patch_size": [8.0, 16, 16]}, ["patch_size", "8.0", "three integers"]),
    "boolean in a size": ({"patch_size": [True, 16, 16]}, ["patch_size", "true", "three integers"]),
    "negative size": ({"block_size": [-12, 24, 24]}, ["block_size", "-12", ">= 1"]),
    "size of zero": ({"patch_size": [8, 0, 16]}, ["patch_size", "[8, 0, 16]", ">= 1"]),
    "batch of zero": (
        {"model": {"engine": "identity", "batch_size": 0}},
        ["batch_size", "0", "greater than or equal to 1"],
    ),
    "overlap is the patch": ({"patch_overlap": [8, 4, 4]}, ["patch_overlap", "8 along z", "expected 0 to 7"]),
    "overlap beyond the patch": ({"patch_overlap": [2, 40, 4]}, ["patch_overlap", "40 along y", "expected 0 to 15"]),
    "negative overlap": ({"patch_overlap": [2, 4, -4]}, ["patch_overlap", "-4 along x"]),
    "patch too long": (
        {"patch_size": [8, 16, 4096], "block_size": [12, 24, 4092]},
        ["patch_size", "4096 along x", "at most 2048"],
    ),
    "output patch larger": (
        {"output_patch_size": [8, 16, 18]},
        ["output_patch_size", "18 along x", "at most patch_size 16"],
    ),
    "odd difference of patches": (
        {"output_patch_size": [7, 16, 16]},
        ["output_patch_size", "7 along z", "even number"],
    ),
    "unknown dtype": ({"output": {"path": "file:///o", "dtype": "uint16"}}, ["output.dtype", "uint16", "float32"]),
    "range reversed": ({"output": {"path": "file:///o", "range": [1, 0]}}, ["output.range", "[1, 0]", "low < high"]),
    "range empty": ({"output": {"path": "file:///o", "range": [1, 1]}}, ["output.range", "low < high"]),
    "range not a number": ({"output": {"path": "file:///o", "range": [float("nan"), 1]}}, ["output.range", "finite"]),
    "range infinite": ({"output": {"path": "file:///o", "range": [0, float("inf")]}}, ["output.range", "finite"]),
    "range of one value": ({"output": {"path": "file:///o", "range": [1]}}, ["output.range", "[1]", "[low, high]"]),
    "range of texts": (
        {"output": {"path": "file:///o", "range": ["0", "1"]}},
        ["output.range", '["0", "1"]', "numbers"],
    ),
    "unknown engine": ({"model": {"engine": "pytroch"}}, ["model.engine", "pytroch", "'pytorch'"]),
    "pytorch without a file": ({"model": {"engine": "pytorch"}}, ["model.path", "missing", "pytorch"]),
    "identity with a file": ({"model": {"engine": "identity", "path": "m.py"}}, ["model.path", "identity"]),
    "batch statistics of two": (
        {"model": {**PYTORCH, "batch_statistics": True, "batch_size": 2}},
        ["model.batch_size", "batch_statistics", "must be 1"],
    ),
    "unknown precision": (
        {"model": {"engine": "identity", "precision": "fp16"}},
        ["model.precision", "fp16", "'float16'"],
    ),
    "unknown output of the model": ({"model": {"engine": "identity", "output": [1]}}, ["model.output", "[1]", "index"]),
    "variable not set": (
        {"input": {"path": "file:///${CHUNKFLOW_TEST_NOT_SET}"}},
        ["input.path", "CHUNKFLOW_TEST_NOT_SET", "not set"],
    ),
    "path without protocol": ({"input": {"path": "/data/em"}}, ["input.path", "/data/em", "file:///"]),
    "path with one slash": ({"exchange": {"path": "file:/data/ex"}}, ["exchange.path", "file:/data/ex", "file:///"]),
    "relative path": ({"output": {"path": "file://data/out"}}, ["output.path", "file://data/out", "file:///"]),
    "unknown protocol": ({"input": {"path": "zarr://data/em"}}, ["input.path", "zarr://data/em"]),
    "output onto the input": (
        {"input": {"path": "file:///d/em"}, "output": {"path": "file:///d/em/"}},
        ["output.path", "file:///d/em/", "input.path too"],
    ),
    "exchange onto the output, spelled otherwise": (
        {"output": {"path": "precomputed://file:///d//o"}, "exchange": {"path": "file:///d/./o"}},
        ["output.path", "exchange.path too"],
    ),
    "bounds of no depth": (
        {"input": {"path": "file:///em", "bounds": [[4, 0, 0], [4, 48, 40]]}},
        ["input.bounds", "[[4, 0, 0], [4, 48, 40]]", "start < stop"],
    ),
    "roi of no depth": ({"roi": [[4, 0, 0], [4, 48, 40]]}, ["roi", "[[4, 0, 0], [4, 48, 40]]", "start < stop"]),
    "roi reversed": ({"roi": [[0, 40, 0], [20, 4, 40]]}, ["roi", "start < stop"]),
    "roi of two axes": ({"roi": [[0, 0], [48, 40]]}, ["roi", "three integers"]),
    "roi of six numbers": ({"roi": [0, 0, 0, 20, 48, 40]}, ["roi", "two corners"]),
    "name with a space": ({"name": "my volume"}, ["name", '"my volume"', "letters, digits"]),
    "name with a slash": ({"name": "../x"}, ["name", "../x", "letters, digits"]),
    "name not ASCII": ({"name": "größe"}, ["name", "größe", "letters, digits"]),
    "empty name": ({"name": ""}, ["name", '""']),
    "negative mip": ({"input": {"path": "file:///em", "mip": -1}}, ["input.mip", "-1"]),
    "unknown padding": (
        {"input": {"path": "file:///em", "padding": "mirror"}},
        ["input.padding", "mirror", "'reflect'"],
    ),
    "unknown compression": (
        {"output": {"path": "file:///o", "compression": "lz4"}},
        ["output.compression", "lz4", "'gzip'"],
    ),
    "negative retries": ({"runner": {"retries": -1}}, ["runner.retries", "-1"]),
}


def check_told(outcome: Any, path: Path, *pieces: str) -> None:
    """Check that the command ended with EX_CONFIG and one line, on standard error only.

    The line says where and what.
    """
    assert outcome.returncode == 78, outcome.stderr
    assert outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
    assert outcome.stderr.startswith(f"error: {path}: ")
    for piece in pieces:
        assert piece in outcome.stderr


@pytest.mark.parametrize("case", BAD)
def test_bad_spec_is_told_in_one_line(make_spec: MakeSpec, chunkflow: Command, case: str) -> None:
    changes, pieces = BAD[case]
    path = make_spec()
    content = yaml.safe_load(path.read_text()) | changes  # here, as some of the keys are no strings
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}, allow_unicode=True))
    check_told(chunkflow("plan", path), path, *pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("name: [small", ["not valid YAML", "line 1"]),
        ("name: small\n\tinput: x\n", ["not valid YAML", "line 2"]),
        ("name: small\nname: large\n", ["not valid YAML", "line 2", "'name' stands twice"]),
        ("model:\n  engine: identity\n  engine: pytorch\n", ["line 3", "'engine' stands twice"]),
        ("? [1, 2]\n: 3\n", ["not valid YAML", "can't be a key"]),
        ("name: !!python/object/apply:os.system ['touch /tmp/x']\n", ["not valid YAML", "os.system"]),
        ("name: one\n---\nname: two\n", ["not valid YAML", "single document"]),
        ("name: \x01\n", ["not valid YAML"]),
        ("name: " + "[" * 40_000, ["nested too deep"]),
        ("[" * 5_000 + "]" * 5_000, ["nested too deep"]),
        ("&a [*a]", ["not valid YAML", "recursive"]),
        ("", ["expected keys and values"]),
        ("hello", ["expected keys and values", "hello"]),
        ("- 1\n- 2\n", ["expected keys and values", "[1, 2]"]),
    ],
)
def test_what_is_no_spec_at_all(tmp_path: Path, chunkflow: Command, text: str, pieces: list[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    check_told(chunkflow("plan", path), path, *pieces)


def test_bytes_that_are_no_text(tmp_path: Path, chunkflow: Command) -> None:
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    check_told(chunkflow("plan", path), path, "not valid YAML", "utf-8")


def test_missing_file_and_folder_instead_of_file(tmp_path: Path, chunkflow: Command) -> None:
    check_told(chunkflow("plan", tmp_path / "nix.yaml"), tmp_path / "nix.yaml", "No such file")
    check_told(chunkflow("plan", tmp_path), tmp_path, "cannot read", "directory")


def test_several_mistakes_are_told_at_once(make_spec: MakeSpec, chunkflow: Command) -> None:
    path = make_spec(name=5, patch_size=[8], model={"engine": "magic"})
    outcome = chunkflow("plan", path)
    assert outcome.returncode == 78
    assert [line.split(": ")[-3] for line in outcome.stderr.splitlines()] == ["name", "patch_size", "model.engine"]


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        ("model.threads", ["model.threads", "key=value"]),
        ("=3", ["=3", "key=value"]),
        ("name.first=x", ["name is a value", "no keys below it"]),
        ("model.engine.kind.x=1", ["engine is a value"]),
        ("patch_size=[8, 16", ["patch_size=[8, 16", "not valid YAML"]),
        ("model={engine: identity, engine: x}", ["'engine' stands twice"]),
        ("model.thread=2", ["model.thread", "did you mean threads?"]),
        ("patch_size=8,16,16", ["patch_size", "8,16,16", "three integers"]),
        ("roi.0=3", ["roi", "two corners"]),
        ("model.threads=", ["model.threads", "null", "integer"]),
        ("model..threads=2", ["model.", "unknown key"]),
        ("name=${CHUNKFLOW_TEST_NOT_SET}", ["name", "CHUNKFLOW_TEST_NOT_SET", "not set"]),
    ],
)
def test_bad_set_is_told(make_spec: MakeSpec, chunkflow: Command, override: str, pieces: list[str]) -> None:
    outcome = chunkflow("plan", make_spec(), "--set", override)
    assert outcome.returncode == 78
    assert len(outcome.stderr.splitlines()) == 1
    assert all(piece in outcome.stderr for piece in pieces), outcome.stderr


@pytest.mark.parametrize(
    ("block", "overlap", "chunk"),
    [
        (25, 4, None),  # no multiple of the stride 12
        (1, 4, None),
        (24, 4, 16),  # no multiple of the storage chunk
        (23, 4, 7),
        (3, 15, None),  # a multiple of the stride 1, but less than the overlap
        (12, 13, 5),
    ],
)
def test_the_nearest_blocks_that_a_message_names_are_good(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, block: int, overlap: int, chunk: int | None
) -> None:
    output = {"path": f"file://{tmp_path}/output"} | ({"chunk_size": [6, chunk, 12]} if chunk else {})
    path = make_spec(output=output, patch_overlap=[2, overlap, 4], block_size=[12, block, 24])
    outcome = chunkflow("plan", path)
    check_told(outcome, path, "block_size", f"{block} along y", f"stride {16 - overlap}")
    nearest = [int(number) for number in re.findall(r"\d+", outcome.stderr.partition("nearest: ")[2])]
    assert 1 <= len(nearest) <= 2
    step = 1 if chunk is None else chunk
    good = [b for b in range(1, 1000) if b % (16 - overlap) == 0 and b % step == 0 and b >= overlap]
    below, above = [b for b in good if b < block], [b for b in good if b > block]
    assert nearest == [*below[-1:], above[0]]
    for candidate in nearest:
        assert chunkflow("plan", path, "--set", f"block_size=[12, {candidate}, 24]").returncode == 0


def test_spec_error_in_a_process_of_its_own(make_spec: MakeSpec, python: Command) -> None:
    """Exit code and message of the stage command are tried once as an Airflow task sees them."""
    path = make_spec(patch_overlap=[8, 4, 4])
    outcome = python("-m", "chunkflow_core.inference_and_donate", path, "--block", 0, 0, 0)
    check_told(outcome, path, "patch_overlap", "8 along z")


def test_parse_errors_can_be_caught(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match=r"spec\.yaml: name: "):
        load_spec(make_spec(name="a b"))


# ------------------------------------------------------------------- good specs of things not there


def test_missing_input_layer(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{tmp_path}/nix"}))
    assert outcome.returncode == 66
    assert f"file://{tmp_path}/nix: there is no layer here" in outcome.stderr


def test_input_layer_below_a_regular_file(make_spec: MakeSpec, tmp_path: Path, chunkflow: Command) -> None:
    (tmp_path / "file").write_text("")
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{tmp_path}/file/em"}))
    assert outcome.returncode == 66
    assert "there is no layer here" in outcome.stderr


def test_mip_that_does_not_exist(make_spec: MakeSpec, random_layer: Path, chunkflow: Command) -> None:
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{random_layer}", "mip": 3}))
    assert outcome.returncode == 66
    assert "mip 3 does not exist; the layer has mips 0 to 0" in outcome.stderr


@pytest.mark.parametrize(
    ("info", "piece"),
    [
        ("{", "not JSON"),
        ("\x00\x01", "not JSON"),
        ("[]", "lists no scales"),
        ("{}", "lists no scales"),
        ('{"scales": [{"size": [4, 4, 4]}]}', "mip 0 can't be understood"),
        ('{"scales": [{"size": [4, 4], "resolution": [1, 1, 1], "chunk_sizes": [[1, 1, 1]]}]}', "mip 0 can't"),
        ('{"scales": [7]}', "mip 0 can't be understood"),
    ],
)
def test_info_that_is_not_of_a_layer(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, info: str, piece: str
) -> None:
    (tmp_path / "em").mkdir()
    (tmp_path / "em" / "info").write_text(info)
    outcome = chunkflow("plan", make_spec(input={"path": f"file://{tmp_path}/em"}))
    assert outcome.returncode == 66
    assert f"file://{tmp_path}/em" in outcome.stderr
    assert piece in outcome.stderr


@pytest.mark.parametrize(
    "roi", [[[20, 0, 0], [40, 48, 40]], [[0, 0, 0], [20, 49, 40]], [[-1, 0, 0], [20, 48, 40]]], ids=str
)
def test_roi_past_the_input_layer(make_spec: MakeSpec, chunkflow: Command, roi: list[list[int]]) -> None:
    outcome = chunkflow("prepare", make_spec(roi=roi))
    assert outcome.returncode == 78
    assert "roi: " in outcome.stderr
    assert "reaches past the input layer" in outcome.stderr
    assert "z 0–20 y 0–48 x 0–40" in outcome.stderr


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dtype": "float32", "chunk_size": [6, 12, 12]}, "has dtype uint8, the spec says float32"),
        ({"chunk_size": [12, 24, 24]}, "has chunk_size (6, 12, 12), the spec says (12, 24, 24)"),
        ({"channels": 2, "chunk_size": [6, 12, 12]}, "has channels 1, the spec says 2"),
    ],
)
def test_output_layer_of_another_kind_is_never_overwritten(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, changes: dict[str, Any], what: str
) -> None:
    assert chunkflow("prepare", make_spec()).returncode == 0
    info = (tmp_path / "output" / "info").read_bytes()
    outcome = chunkflow("prepare", make_spec(output={"path": f"file://{tmp_path}/output"} | changes))
    assert outcome.returncode == 78
    assert "output.path" in outcome.stderr
    assert what in outcome.stderr
    assert (tmp_path / "output" / "info").read_bytes() == info


@pytest.mark.parametrize(
    ("change", "what"),
    [({"encoding": "jpeg"}, "encoding jpeg"), ({"sharding": {"@type": "neuroglancer_uint64_sharded_v1"}}, "sharded")],
)
def test_output_layer_that_is_not_raw_is_refused(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, change: dict[str, Any], what: str
) -> None:
    assert chunkflow("prepare", make_spec()).returncode == 0
    file = tmp_path / "output" / "info"
    info = json.loads(file.read_text())
    info["scales"][0] |= change
    file.write_text(json.dumps(info))
    outcome = chunkflow("prepare", make_spec())
    assert outcome.returncode == 78
    assert what in outcome.stderr
    assert "only raw is written" in outcome.stderr


def test_output_layer_of_another_roi(make_spec: MakeSpec, chunkflow: Command) -> None:
    assert chunkflow("prepare", make_spec()).returncode == 0
    outcome = chunkflow("prepare", make_spec(), "--set", "roi=[[0, 0, 0], [12, 48, 40]]")
    assert outcome.returncode == 78
    assert "has bounds z 0–20" in outcome.stderr


@pytest.mark.parametrize("place", ["exchange", "output"])
def test_place_that_can_not_be_written_is_worth_a_retry(
    make_spec: MakeSpec, tmp_path: Path, chunkflow: Command, place: str
) -> None:
    """Tests run as root, who may write anywhere but below a regular file."""
    (tmp_path / "file").write_text("")
    outcome = chunkflow("prepare", make_spec(), "--set", f"{place}.path=file://{tmp_path}/file/below")
    assert outcome.returncode == 75, outcome.stderr
    assert f"{tmp_path}/file/below" in outcome.stderr


@pytest.mark.parametrize("key", ["path", "weights"])
def test_missing_model_file(make_spec: MakeSpec, model_folder: Path, chunkflow: Command, key: str) -> None:
    outcome = chunkflow("plan", make_spec(model={**PYTORCH, key: "nix.py"}))
    assert outcome.returncode == 66
    assert f"{model_folder}{os.sep}nix.py does not exist" in outcome.stderr
