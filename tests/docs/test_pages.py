"""What the pages name exists: files, linked pages and headings, commands, flags, exit codes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkflow_core.__main__ import parser
from chunkflow_core.errors import EXIT_CODES
from chunkflow_core.spec import load_spec

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "*/README.md", "*/*/README.md", "*/*/*/README.md")
    for page in ROOT.glob(pattern)
    if not page.relative_to(ROOT).parts[0].startswith(".")
)
MAPS = [ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md"]
FOLDERS = ("bench", "chunkflow_core", "dags", "docker", "docs", "examples", "helm", "operators", "tests")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"[\w.-]+/[\w./-]*|\w+\.py")


def name_of(page: Path) -> str:
    """How a page is called in the names of tests."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What links can say after ``#``, by GitHub's rule: small letters, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_in_full_exist(page: Path) -> None:
    for path in _CODE.findall(prose(page)):
        if path.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and _PATH.fullmatch(path) and "NAME" not in path:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", MAPS, ids=name_of)
def test_every_path_in_a_table_exists(page: Path) -> None:
    """A table may name paths from a folder on that the text before it names."""
    found = 0
    for text, table in re.findall(r"((?:^(?!\|).*\n)+)((?:^\|.*\n)+)", prose(page), re.MULTILINE):
        folders = [ROOT, *(ROOT / code for code in _CODE.findall(text) if (ROOT / code).is_dir())]
        for path in _CODE.findall(table):
            if _PATH.fullmatch(path):
                found += 1
                assert any((folder / path).exists() for folder in folders), path
    assert found >= 9


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    linked = {(index.parent / link).resolve() for link in _LINK.findall(index.read_text())}
    assert {page for page in (ROOT / "docs").glob("*.md") if page != index} <= linked


COMMANDS = (ROOT / "docs/commands.md").read_text().partition("## Exit codes")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of ``chunkflow-core``'s commands, by name."""
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def rows_of_commands() -> Iterator[tuple[str, str]]:
    """Name and row of each command of ``chunkflow-core`` in the table."""
    for row in COMMANDS[0].splitlines():
        if found := re.match(r"\| `chunkflow-core (\w+)", row):
            yield found[1], row


def test_the_table_has_every_command_and_no_flag_that_there_is_not() -> None:
    known = subcommands()
    assert {name for name, _ in rows_of_commands()} == set(known)
    for name, row in rows_of_commands():
        flags = {flag for code in _CODE.findall(row) for flag in re.findall(r"--[a-z-]+", code)}
        assert flags <= set(known[name]._option_string_actions), name


def test_the_table_has_every_exit_code_of_an_error() -> None:
    listed = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", COMMANDS[2], re.MULTILINE) for code in row.split(",")
    }
    assert EXIT_CODES.keys() <= listed


def test_the_spec_of_the_readme_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^ *```yaml\n(.*?)^ *```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    file = tmp_path / "volume.yaml"
    file.write_text("\n".join(line.removeprefix("   ") for line in text.splitlines()))
    spec = load_spec(file)
    assert spec.name == "isbi-membrane"
    assert spec.grid.shape == (2, 3, 3)
