"""Files beside a model's: each model gets its own, as they are now, and Python stays as it was."""

from __future__ import annotations

import inspect
import os
import py_compile
import sys
from pathlib import Path

import pytest
import torch

from chunkflow_core.errors import SpecError
from tests.support.models.forms import pytorch, write
from tests.support.models.loading import MakeSpec, Section, load, patches


def test_two_models_do_not_get_each_others_siblings(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    engines = []
    for value in (1, 2):
        folder = f"number{value}"
        write(tmp_path / folder, f"VALUE = {value}\n", "constants.py")
        write(tmp_path / folder, f"VALUE = {value * 10}\n", "package/inner.py")
        write(
            tmp_path / folder,
            """
            import constants
            from package import inner

            def InstantiatedModel(x):
                return (x * 0 + constants.VALUE + inner.VALUE).expand(-1, 2, -1, -1, -1)
            """,
        )
        path = make_spec(model=pytorch(weights=..., path=f"{folder}/model.py"), output=output)
        engines.append(load(path))
    assert [engine(patches()).max() for engine in engines] == [11, 22]


ADDING = """
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "pytorch-unet")]
import constants
from package import inner
from space import inner as other
from unet import layers

VALUE = 1

def InstantiatedModel(x):
    return (x * 0 + VALUE + constants.VALUE + inner.VALUE + other.VALUE + layers.VALUE).expand(-1, 2, -1, -1, -1)
"""
PARTS = ("constants.py", "package/__init__.py", "package/inner.py", "space/inner.py", "pytorch-unet/unet/layers.py")


@pytest.mark.parametrize("edited", ["model.py", *(part for part in PARTS if "init" not in part)])
@pytest.mark.parametrize("place", ["folder", "link"])
def test_what_runs_is_what_the_files_hold(
    make_spec: MakeSpec,
    tmp_path: Path,
    output: Section,
    monkeypatch: pytest.MonkeyPatch,
    edited: str,
    place: str,
) -> None:
    """What Python has compiled before is not run, when a file has the same size and date as now."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = tmp_path / "folder"
    for name in PARTS:
        write(folder, "VALUE = 1\n", name)
    write(folder, ADDING)
    (tmp_path / "link").symlink_to(folder)
    model = pytorch(weights=..., path=f"{place}/model.py", files=[f"{place}/pytorch-unet/**"])
    path = make_spec(model=model, output=output)
    assert load(path)(patches()).max() == 5

    file = folder / edited
    date = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("VALUE = 1", "VALUE = 5"))
    os.utime(file, ns=(date, date))

    assert load(path)(patches()).max() == 9
    assert not list(tmp_path.rglob("__pycache__")), "nothing is left in a user's folder"


def test_what_is_there_in_compiled_form_only_can_be_imported(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    write(tmp_path, "VALUE = 3\n", "hidden.py")
    py_compile.compile(str(tmp_path / "hidden.py"), cfile=str(tmp_path / "hidden.pyc"))
    (tmp_path / "hidden.py").unlink()
    write(
        tmp_path, "import hidden\ndef InstantiatedModel(x): return (x * 0 + hidden.VALUE).expand(-1, 2, -1, -1, -1)\n"
    )
    model = pytorch(weights=..., files=["hidden.pyc"])
    assert load(make_spec(model=model, output=output))(patches()).max() == 3


def test_a_model_leaves_functions_of_no_file_their_source(make_spec: MakeSpec, tmp_path: Path, output: Section) -> None:
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    write(tmp_path, "def InstantiatedModel(x): return x.expand(-1, 2, -1, -1, -1)\n")
    load(make_spec(model=pytorch(weights=...), output=output))
    assert "relu" in inspect.getsource(graph.forward)


def test_a_sibling_missing_in_one_folder_is_not_taken_from_another_model(
    make_spec: MakeSpec, tmp_path: Path, output: Section
) -> None:
    for folder in ("complete", "incomplete"):
        write(tmp_path / folder, "import only_here\ndef InstantiatedModel(x): return x\n")
    write(tmp_path / "complete", "", "only_here.py")
    load(make_spec(model=pytorch(weights=..., path="complete/model.py"), output=output))
    with pytest.raises(SpecError, match="No module named 'only_here'"):
        load(make_spec(model=pytorch(weights=..., path="incomplete/model.py"), output=output))
