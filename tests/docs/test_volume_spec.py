"""The page and the schema of the volume spec are what the models say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from docs import volume_spec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SCHEMA: dict[str, Any] = json.loads((DOCS / "volume-spec.schema.json").read_text())


def documented_specs() -> list[dict[str, Any]]:
    """The specs of README and demo, and the README's with each runner section of the page."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    texts = [text for text in blocks if "patch_size" in text]
    assert texts
    first = yaml.safe_load(texts[0])
    page = (DOCS / "volume-spec.md").read_text()
    runners = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(runner:.*?)```", page, re.DOTALL)]
    assert len(runners) == 2
    demo = yaml.safe_load((ROOT / "examples/demo.yaml").read_text())
    return [first, demo, *(first | runner for runner in runners), first | {"schedule": "@weekly"}]


def test_page_and_schema_are_what_the_script_writes() -> None:
    page = (DOCS / "volume-spec.md").read_text()
    assert volume_spec.page(page) == page, "run python docs/volume_spec.py"
    assert volume_spec.schema() == SCHEMA, "run python docs/volume_spec.py"
    assert page.count("| key | default | what |") == 2


def test_every_key_is_explained() -> None:
    parts = [("", SCHEMA), *SCHEMA["$defs"].items()]
    silent = [
        f"{name}.{key}" for name, part in parts for key, value in part["properties"].items() if not value["description"]
    ]
    assert set(silent) <= {"KeepDays.days"}


@pytest.mark.parametrize("content", documented_specs())
def test_documented_specs_fit_the_schema(content: dict[str, Any]) -> None:
    jsonschema.validate(content, SCHEMA)


@pytest.mark.parametrize(
    "change",
    [{"patchsize": [1, 2, 3]}, {"patch_size": [1, 2]}, {"model": {}}, {"runner": {"kind": "pods"}}, {"schedule": 3}],
)
def test_wrong_specs_do_not_fit_it(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(documented_specs()[0] | change, SCHEMA)
