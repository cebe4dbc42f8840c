"""Pictures of the documentation that are drawn by a program are what it draws today."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def test_geometry_is_what_its_script_draws(tmp_path: Path) -> None:
    script = shutil.copy(IMAGES / "geometry.py", tmp_path)
    subprocess.run([sys.executable, script], check=True, timeout=60)

    drawn = (tmp_path / "geometry.svg").read_text()
    assert drawn == (IMAGES / "geometry.svg").read_text(), "run docs/images/geometry.py"
    ElementTree.fromstring(drawn)
