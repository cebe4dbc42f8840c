"""The trial of the model that ``prepare`` makes before it changes anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkflow_core.errors import DataError
from tests.support.outputs import prepared, run
from tests.support.volume import files_below

MakeSpec = Callable[..., Path]

WRONG = "def InstantiatedModel(x):\n    return x[..., :-1]\n"


def test_model_that_does_not_work_claims_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(WRONG)
    model = "model={engine: pytorch, path: net.py}"
    path = make_spec()
    with pytest.raises(DataError, match="the model gave an output of shape"):
        prepared(path, model)
    assert not (tmp_path / "output").exists()
    run(path)
    before = files_below(tmp_path)
    with pytest.raises(DataError, match="the model gave an output of shape"):
        prepared(path, model, other="overwrite")
    assert files_below(tmp_path) == before


def test_model_is_tried_once(
    make_spec: MakeSpec, tmp_path: Path, python: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that was tried is not even loaded, nor is PyTorch; but a changed one is."""
    (tmp_path / "net.py").write_text("print('loaded')\n\ndef InstantiatedModel(x):\n    return x\n")
    path = make_spec(model={"engine": "pytorch", "path": "net.py"})
    prepared(path, once=True)
    assert capsys.readouterr().out == "loaded\n"
    program = (
        "import sys; from chunkflow_core.spec import load_spec; from chunkflow_core.steps.workspace import Workspace;"
        "from chunkflow_core.steps.prepare import prepare;"
        f"trial = prepare(Workspace(load_spec({str(path)!r})), once=True);"
        "print(trial.seconds > 0, 'torch' in sys.modules)"
    )
    outcome = python("-c", program)
    assert outcome.stdout == "True False\n", outcome.stderr
    (tmp_path / "net.py").write_text(WRONG)
    with pytest.raises(DataError, match="the model gave an output of shape"):
        prepared(path, once=True, other="overwrite")
