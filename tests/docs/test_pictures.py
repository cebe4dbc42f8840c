"""Pictures of the documentation that are drawn by a program are what it draws today."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.mark.parametrize("name", ["geometry", "affinities"])
def test_a_picture_is_what_its_script_draws(tmp_path: Path, name: str) -> None:
    script = shutil.copy(IMAGES / f"{name}.py", tmp_path)
    subprocess.run([sys.executable, script], check=True, timeout=60)

    drawn = (tmp_path / f"{name}.svg").read_text()
    assert drawn == (IMAGES / f"{name}.svg").read_text(), f"run docs/images/{name}.py"
    ElementTree.fromstring(drawn)
