"""What each mistake in a spec, or in a change of a command line, is told."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import load_spec
from tests.support.volume import PYTORCH

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]


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
    "unknown dtype": ({"output": {"path": "file:///o", "dtype": "int8"}}, ["output.dtype", "int8", "float32"]),
    "range reversed": ({"output": {"path": "file:///o", "range": [1, 0]}}, ["output.range", "[1, 0]", "low < high"]),
    "range empty": ({"output": {"path": "file:///o", "range": [1, 1]}}, ["output.range", "low < high"]),
    "range not a number": ({"output": {"path": "file:///o", "range": [float("nan"), 1]}}, ["output.range", "finite"]),
    "range infinite": ({"output": {"path": "file:///o", "range": [0, float("inf")]}}, ["output.range", "finite"]),
    "range beyond float32": (
        {"output": {"path": "file:///o", "range": [0, 1e39]}},
        ["output.range", "1e+39", "float32"],
    ),
    "range of which sums end float32": (
        {"output": {"path": "file:///o", "range": [-1.1 * 2.0**126, 0]}},
        ["output.range", "-2^126 to 2^126"],
    ),
    "range beyond float64": ({"output": {"path": "file:///o", "range": [0, 10**400]}}, ["output.range", "2^126"]),
    "range too narrow": ({"output": {"path": "file:///o", "range": [0, 1e-33]}}, ["output.range", "1e-33", "2^-100"]),
    "range of one float32": ({"output": {"path": "file:///o", "range": [1, 1 + 1e-9]}}, ["output.range", "differ"]),
    "range of one value": ({"output": {"path": "file:///o", "range": [1]}}, ["output.range", "[1]", "[low, high]"]),
    "range of texts": (
        {"output": {"path": "file:///o", "range": ["0", "1"]}},
        ["output.range", '["0", "1"]', "numbers"],
    ),
    "file that is not beside the model in storage": (
        {"model": {"engine": "pytorch", "path": "s3://bucket/nets/m.py", "files": ["s3://bucket/gain.json"]}},
        ["model.files", "s3://bucket/gain.json", "such as s3://bucket/nets/name"],
    ),
    "file above the model in storage": (
        {"model": {"engine": "pytorch", "path": "s3://bucket/nets/m.py", "files": ["s3://bucket/nets/../gain.json"]}},
        ["model.files", "s3://bucket/nets/../gain.json", "such as s3://bucket/nets/name"],
    ),
    "file on a disk of a model in storage": (
        {"model": {"engine": "pytorch", "path": "s3://bucket/m.py", "files": ["gain.json"]}},
        ["model.files", "gain.json", "such as s3://bucket/name"],
    ),
    "file in storage of a model on a disk": (
        {"model": {**PYTORCH, "files": ["s3://bucket/gain.json"]}},
        ["model.files", "s3://bucket/gain.json", "expected a path"],
    ),
    "file of a net in storage, which is a folder": (
        {"model": {"engine": "pznet", "path": "s3://bucket/net", "files": ["s3://bucket/gain.json"]}},
        ["model.files", "whole folder"],
    ),
    "file of no name": ({"model": {**PYTORCH, "files": ["a\0b"]}}, ["model.files", "without the character"]),
    "one file that is no list": ({"model": {**PYTORCH, "files": "gain.json"}}, ["model.files", "gain.json", "list"]),
    "identity with files": ({"model": {"engine": "identity", "files": ["x"]}}, ["model.path", "files", "identity"]),
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
    "date among the model's options": (
        {"model": {"engine": "identity", "options": {"since": datetime.date(2020, 1, 1)}}},
        ["model.options", "2020-01-01", "in quotes"],
    ),
    "bytes deep among the model's options": (
        {"model": {"engine": "identity", "options": {"a": [1, {"b": b"x"}]}}},
        ["model.options", "bytes", "in quotes"],
    ),
    "date as a key": (
        {"patch_size": {datetime.date(2020, 1, 1): 8}},
        ["patch_size", "2020, 1, 1", "three integers"],
    ),
    "variable not set": (
        {"input": {"path": "file:///${CHUNKFLOW_TEST_NOT_SET}"}},
        ["input.path", "CHUNKFLOW_TEST_NOT_SET", "not set"],
    ),
    "path without protocol": ({"input": {"path": "/data/em"}}, ["input.path", "/data/em", "file:///"]),
    "path with one slash": ({"exchange": {"path": "file:/data/ex"}}, ["exchange.path", "file:/data/ex", "file:///"]),
    "relative path": ({"output": {"path": "file://data/out"}}, ["output.path", "file://data/out", "file:///"]),
    "character of no path": (
        {"input": {"path": "file:///data\0/em"}},
        ["input.path", r"file:///data\u0000/em", r"without the character \0"],
    ),
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


def bomb(first: str, line: str) -> str:
    """Ten lines, each of which names the one before nine times."""
    lines = [f"x{i}: &x{i} {line.format(', '.join([f'*x{i - 1}'] * 9))}" for i in range(1, 10)]
    return "\n".join([f"x0: &x0 {first}", *lines, ""])


@pytest.mark.parametrize(
    ("first", "line"),
    [("[1, 1]", "[{}]"), ("{a: 1, b: 2}", "{{<<: [{}]}}"), ("text", "{{a: [{}]}}")],
    ids=["lists", "merge keys", "texts"],
)
def test_aliases_that_stand_for_gigabytes(tmp_path: Path, chunkflow: Command, first: str, line: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb(first, line))
    check_told(chunkflow("plan", path), path, "aliases", "1000000 characters")


def test_aliases_of_a_set_that_stand_for_gigabytes(make_spec: MakeSpec) -> None:
    levels = [f"&x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(SpecError, match=r"--set model\.options: with its aliases"):
        load_spec(make_spec(), [f"model.options={{a: [&x0 [1, 1], {', '.join(levels)}]}}"])


def test_variables_that_stand_for_gigabytes(
    make_spec: MakeSpec, chunkflow: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKFLOW_TEST_LONG", "x" * 100_000)
    path = make_spec(model={"engine": "identity", "options": {"a": ["${CHUNKFLOW_TEST_LONG}" * 6, {"b": 6}]}})
    assert len(load_spec(path).model.options["a"][0]) == 600_000
    path = make_spec(model={"engine": "identity", "options": {"a": [{"b": "${CHUNKFLOW_TEST_LONG}" * 6}] * 2}})
    check_told(chunkflow("plan", path), path, "environment variables", "1000000 characters")


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


@pytest.mark.parametrize("start", [2**53, 2**63, 10**30, -(10**30)])
def test_a_region_too_far_away(make_spec: MakeSpec, chunkflow: Command, start: int) -> None:
    corners = [[start, 0, 0], [start + 20, 48, 40]]
    for key in ("roi", "input.bounds"):
        outcome = chunkflow("plan", make_spec(), "--set", f"{key}={corners}")
        assert outcome.returncode == 78
        assert key in outcome.stderr
        assert "within 2^53" in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize("value", [2**40, 2**63, 10**30, -(10**30)])
@pytest.mark.parametrize(
    "key",
    [
        "roi=[[0, 0, 0], [20, 48, {}]]",
        "roi=[[{}, 0, 0], [20, 48, 40]]",
        "input.bounds=[[0, 0, {}], [20, 48, 40]]",
        "input.prefetch={}",
        "patch_size=[8, 16, {}]",
        "output_patch_size=[8, 16, {}]",
        "patch_overlap=[2, 4, {}]",
        "block_size=[12, 24, {}]",
        "output.chunk_size=[6, {}, 12]",
        "output.channels={}",
        "model.threads={}",
        "model.streams={}",
        "model.batch_size={}",
    ],
)
def test_integers_that_are_too_large(make_spec: MakeSpec, chunkflow: Command, key: str, value: int) -> None:
    outcome = chunkflow("plan", make_spec(), "--set", key.format(value))
    assert outcome.returncode == 78, outcome
    assert len(outcome.stderr.splitlines()) == 1
    told = key.partition("=")[0].removeprefix("output_")  # what does not fit the patch is told of the patch
    assert told in outcome.stderr or "block_size" in outcome.stderr


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
