"""Try the Airflow image: DAGs appear, though there is no torch and no cloud-volume.

    docker run --rm -i IMAGE python - < docker/smoke_airflow.py

An argument: the folder with the DAG files, instead of Airflow's own.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from importlib.metadata import packages_distributions
from pathlib import Path

SPEC = """
name: smoke
input: {path: "file://FOLDER/input"}
output: {path: "file://FOLDER/output", channels: 1, dtype: uint8, chunk_size: [4, 8, 8]}
exchange: {path: "file://FOLDER/exchange"}
roi: [[0, 0, 0], [20, 48, 40]]
patch_size: [8, 16, 16]
patch_overlap: [2, 4, 4]
block_size: [12, 24, 24]
model: {engine: identity}
runner: {kind: kubernetes, image: "example.org/chunkflow-worker:1"}
"""
INFO = """{"type": "image", "data_type": "uint8", "num_channels": 1, "scales": [{"key": "4_4_40", "size": [40, 48, 20],
"resolution": [4, 4, 40], "voxel_offset": [0, 0, 0], "chunk_sizes": [[16, 16, 8]], "encoding": "raw"}]}"""
LEFT_OUT = {"torch", "cloudvolume", "numba", "matplotlib", "openvino", "onnxruntime"}


def main() -> None:
    """Parse the DAG files with one spec of our own, which is to run in pods."""
    if os.getuid() == 0 and "--root" not in sys.argv:
        raise SystemExit("the image runs as root")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "input").mkdir()
        Path(folder, "input", "info").write_text(INFO)
        Path(folder, "smoke.yaml").write_text(SPEC.replace("FOLDER", folder))
        os.environ |= {"CHUNKFLOW_VOLUMES": folder, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
        logging.disable(logging.INFO)
        parse()


def parse() -> None:
    """Leave with a message unless the DAG files make the DAG."""
    from airflow.configuration import conf
    from airflow.dag_processing.dagbag import DagBag

    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    bag = DagBag(folders[0] if folders else conf.get("core", "dags_folder"), safe_mode=False)
    if bag.import_errors:
        raise SystemExit("\n".join(f"{file}: {error}" for file, error in bag.import_errors.items()))
    if "smoke" not in bag.dags:
        raise SystemExit(f"expected the DAG smoke among those of the files, got {sorted(bag.dags)}")
    imported = LEFT_OUT & set(sys.modules)
    if imported:
        raise SystemExit(f"parsing DAGs imports {', '.join(sorted(imported))}")
    heavy = sorted(LEFT_OUT & set(packages_distributions()))
    print(
        f"ok: user {os.getuid()}, {len(bag.dags['smoke'].task_ids)} tasks; "
        f"installed though not needed: {heavy or 'none'}"
    )


if __name__ == "__main__":
    main()
