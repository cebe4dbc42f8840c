"""A model for specs that name one."""

from __future__ import annotations

from pathlib import Path

import pytest


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
