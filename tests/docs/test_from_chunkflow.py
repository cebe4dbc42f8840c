"""The keys that docs/from-chunkflow.md names, and its example: a command, and the spec for it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.layers import NewLayer
from tests.support.models import packages
from tests.support.outputs import run
from tests.support.volume import output_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/from-chunkflow.md").read_text()
(SPEC,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SECTIONS = json.loads((ROOT / "docs/volume-spec.schema.json").read_text())["properties"]
(COMMANDS,) = re.findall(r"^```\n(chunkflow .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILL, WORK = (shlex.split(command) for command in COMMANDS.replace("\\\n", "").splitlines())
OPERATORS = {
    "generate-tasks",
    "fetch-task-from-sqs",
    "load-precomputed",
    "skip-all-zero",
    "inference",
    "mask",
    "save-precomputed",
    "delete-task-in-queue",
}


def options(words: list[str], operator: str) -> dict[str, list[Any]]:
    """The options of an operator in a command of chunkflow, each with its values."""
    found: dict[str, list[Any]] = {}
    for word in takewhile(lambda word: word not in OPERATORS, words[words.index(operator) + 1 :]):
        if word.startswith("--"):
            found[word] = []
        else:
            list(found.values())[-1].append(int(word) if word.isdigit() else word)
    return found


def leaves(content: Any, key: str = "") -> Iterator[str]:
    """The keys of a YAML section, with dots."""
    if isinstance(content, dict):
        for name, below in content.items():
            yield from leaves(below, f"{key}.{name}" if key else name)
    else:
        yield key


def keys_named() -> set[str]:
    """All keys of ours that code in the page names: `a.b`, or `a.b: {c: …}`."""
    codes = {
        code for line in PAGE.partition("## An example")[0].splitlines() for code in re.findall(r"`([^`]+)`", line)
    }
    found: set[str] = set()
    for code in codes:
        key, _, value = code.partition(": ")
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key) and key.partition(".")[0] in SECTIONS and ("." in key or value):
            content = yaml.safe_load(value.replace("…", "x")) if value else None
            found |= {key} if not isinstance(content, dict) else set(leaves(content, key))
    return found


def known_keys() -> set[str]:
    """The keys in the tables of the page about the spec, and the sections that they are in."""
    text = (ROOT / "docs/volume-spec.md").read_text()
    keys = [key.split(".") for key in re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)]
    return {".".join(key[:depth]) for key in keys for depth in range(1, len(key) + 1)}


def test_every_key_that_the_page_names_is_one() -> None:
    named = keys_named()
    assert len(named) > 25
    assert named <= known_keys()


def test_command_and_spec_have_the_same_sizes() -> None:
    spec, network = yaml.safe_load(SPEC), options(WORK, "inference")
    chunks = options(FILL, "generate-tasks")
    assert network["--input-patch-size"] == spec["patch_size"]
    assert network["--output-patch-overlap"] == spec["patch_overlap"]
    assert network["--num-output-channels"] == [spec["output"]["channels"]]
    assert network["--framework"] == [spec["model"]["engine"]]
    assert network["--convnet-model"] == [spec["model"]["path"]]
    assert network["--convnet-weight-path"] == [spec["model"]["weights"]]
    assert [chunks["--roi-start"], chunks["--roi-stop"]] == spec["roi"]
    assert options(WORK, "load-precomputed")["--volume-path"] == [spec["input"]["path"]]
    assert options(WORK, "mask")["--volume-path"] == [spec["skip"]["mask"]["path"]]
    assert options(WORK, "save-precomputed")["--volume-path"] == [spec["output"]["path"]]


def test_the_margins_of_the_command_are_what_the_page_says() -> None:
    """Its patches fit its chunk with the margins, and so much of their work is cropped."""
    spec, network = yaml.safe_load(SPEC), options(WORK, "inference")
    chunk = options(FILL, "generate-tasks")["--chunk-size"]
    margin = options(WORK, "load-precomputed")["--expand-margin-size"]
    patches = network["--patch-num"]
    strides = [p - o for p, o in zip(spec["patch_size"], spec["patch_overlap"], strict=True)]
    covered = [n * s + o for n, s, o in zip(patches, strides, spec["patch_overlap"], strict=True)]
    assert covered == [c + 2 * m for c, m in zip(chunk, margin, strict=True)]
    owned = [n * s for n, s in zip(patches, strides, strict=True)]
    assert owned == spec["block_size"]
    (told,) = re.findall(r"margins were (\d+) % of", PAGE)
    assert round(100 * (1 - prod(chunk) / prod(owned))) == int(told)


def bump(size: int) -> NDArray[np.float64]:
    """The weight of a patch along an axis, as chunkflow's `wu` has it."""
    x = 2 * np.arange(1, size + 1) / (size + 1) - 1
    return np.exp(-1 / (1 - x * x))


def blended(image: NDArray[np.uint8], patch: Vector, overlap: Vector, network: torch.nn.Module) -> NDArray[np.float64]:
    """All patches of an image that they fit, weighted by bumps, over the sum of the weights."""
    z, y, x = (bump(size) for size in patch)
    weight = z[:, None, None] * y[:, None] * x
    sums, weights = np.zeros((3, *image.shape)), np.zeros(image.shape)
    steps = [range(0, n - o, p - o) for n, p, o in zip(image.shape, patch, overlap, strict=True)]
    for corner in np.stack(np.meshgrid(*steps), -1).reshape(-1, 3):
        place = tuple(slice(a, a + n) for a, n in zip(corner, patch, strict=True))
        given = torch.from_numpy(image[place].astype(np.float32) / np.float32(255) * 2 - 1)[None, None]
        with torch.no_grad():
            sums[(slice(None), *place)] += torch.sigmoid(network(given))[0].numpy() * weight
        weights[place] += weight
    return sums / weights


@pytest.mark.long
def test_the_spec_does_what_the_command_does(tmp_path: Path) -> None:
    """Each block is one of 2 × 2 × 2 patches; the model is as chunkflow takes it."""
    shape, grain = (36, 448, 448), 16
    image = np.random.default_rng(3).integers(1, 256, (1, *shape), dtype=np.uint8)
    inside = np.ones((1, shape[0], shape[1] // grain, shape[2] // grain), np.uint8)
    inside[..., :20, :3] = 0
    for name, data, size in (("em", image, (40, 4, 4)), ("tissue", inside, (40, 4 * grain, 4 * grain))):
        layer = NewLayer(
            f"file://{tmp_path}/{name}", data.shape[1:], dtype="uint8", resolution=size, chunk=(36, 64, 64)
        )
        layer.write(Box((0, 0, 0), data.shape[1:]), data)
    (tmp_path / "nets").mkdir()
    network = packages.deepem(tmp_path / "nets").networks[0].eval()
    content = yaml.safe_load(SPEC.replace("gs://lab", f"file://{tmp_path}"))
    path = tmp_path / "affinities.yaml"
    path.write_text(yaml.safe_dump(content | {"roi": [[0, 0, 0], list(shape)], "block_size": [16, 192, 192]}))

    run(path)
    spec = load_spec(path)
    expected = blended(image[0], spec.patch_size, spec.patch_overlap, network)
    mask = inside.repeat(grain, axis=2).repeat(grain, axis=3)
    written = output_of(path)
    assert np.allclose(written, expected * mask, atol=1e-6)
    assert not written[:, mask[0] == 0].any()
    assert 0 < mask.mean() < 1
