"""Print the pins for what has to be installed beside an Airflow that is there already.

    python airflow_constraints.py constraints.txt

The installed packages keep the versions that Airflow's makers have tested together, unless a
requirement forces one to move; packages that are not there yet come in the versions of
``constraints.txt``; Airflow itself stays.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions, version
from pathlib import Path


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(file: str) -> None:
    """Print to standard output."""
    installed = {_normal(distribution.name) for distribution in distributions()}
    print(f"apache-airflow=={version('apache-airflow')}")
    for line in Path(file).read_text().splitlines():
        name, pinned, _ = line.partition("==")
        if pinned and not line.startswith("#") and _normal(name) not in installed:
            print(line)


if __name__ == "__main__":
    main(sys.argv[1])
