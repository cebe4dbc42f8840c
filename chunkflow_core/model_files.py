"""Which files a model file can't do without: those that a Python file imports, weights beside, a net's whole folder."""

from __future__ import annotations

import ast
import glob
from pathlib import Path

MADE_BY_LOADING = ("lib", "__pycache__")
"""What arises in the folder of a net of pznet when it is loaded; ``lib`` holds its layers, compiled for the machine."""


def with_companions(path: Path) -> list[Path]:
    """A model file and the files that it can't do without; of a net of pznet, all that did not arise from loading it."""
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.is_file() and f.relative_to(path).parts[0] not in MADE_BY_LOADING)
    if path.suffix == ".py":
        return _with_imported_siblings(path)
    beside = {
        ".xml": [path.with_suffix(".bin")],
        ".onnx": sorted(path.parent.glob(f"{glob.escape(path.name)}[._]data*")),
    }
    return [path, *(file for file in beside.get(path.suffix.lower(), []) if file.is_file())]


def imported_names(file: Path) -> set[str]:
    """Names of the top-level modules and packages that a Python file imports; none if it can't be parsed."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return set()  # reported when the file is digested or loaded
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    return names


def _with_imported_siblings(path: Path) -> list[Path]:
    """A Python file and, recursively, the files beside it that it imports; sorted, each once."""
    found: set[Path] = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        for name in imported_names(file):
            base = path.parent / name
            todo += [p for p in [base.with_suffix(".py")] if p.is_file()]
            todo += sorted(base.rglob("*.py")) if base.is_dir() else []  # a package, with or without __init__.py
    return sorted(found)
