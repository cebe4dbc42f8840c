"""``make lint`` keeps the rooms of the packages apart.

It refuses an import of what stands above, a circle of imports, and a module that has no place yet.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_import_upwards_a_circle_and_a_module_without_a_place_are_refused(tmp_path: Path) -> None:
    for package in ("chunkflow_core", "operators"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    with (tmp_path / "chunkflow_core/lattice/boxes.py").open("a") as module:
        module.write("import chunkflow_core.spec.yaml_text\n")
    with (tmp_path / "chunkflow_core/storage/digests.py").open("a") as module:
        module.write("import chunkflow_core.storage.signatures\n")
    (tmp_path / "chunkflow_core/homeless.py").touch()

    linter = Path(sys.executable).parent / "lint-imports"
    outcome = subprocess.run([linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert outcome.returncode == 1, outcome.stderr
    assert "chunkflow_core.lattice.boxes -> chunkflow_core.spec.yaml_text" in outcome.stdout
    assert "No circles, neither of folders nor of modules in one BROKEN" in outcome.stdout
    assert "chunkflow_core.homeless" in outcome.stdout
