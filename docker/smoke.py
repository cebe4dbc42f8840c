"""Try the worker's image: a tiny volume through two engines, from input to verified output.

    docker run --rm -i --read-only --tmpfs /tmp IMAGE python - < docker/smoke.py

Only ``/tmp`` need be writable. Arguments: other engines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import yaml
from cloudvolume import CloudVolume

ENGINES = [argument for argument in sys.argv[1:] if argument != "--root"] or ["pytorch", "openvino"]
COMMAND = Path(sys.executable).with_name("chunkflow-core")


def main() -> None:
    """Make a volume, run it, compare."""
    if os.getuid() == 0 and "--root" not in sys.argv:
        raise SystemExit("the image runs as root")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = np.random.default_rng(1).integers(0, 256, (40, 48, 20, 1), dtype=np.uint8)
        CloudVolume.from_numpy(data, f"file://{folder}/input", resolution=(4, 4, 40), chunk_size=(16, 16, 8))
        (folder / "model.py").write_text("import torch\n\nInstantiatedModel = torch.nn.Identity()\n")
        spec = {
            "name": "smoke",
            "input": {"path": f"file://{folder}/input"},
            "exchange": {"path": f"file://{folder}/exchange"},
            "patch_size": [8, 16, 16],
            "patch_overlap": [2, 4, 4],
            "block_size": [12, 24, 24],
        }
        for engine in ENGINES:
            layer = f"file://{folder}/{engine}"
            spec["output"] = {"path": layer, "channels": 1, "dtype": "uint8", "chunk_size": [4, 8, 8]}
            spec["model"] = {"engine": engine, "path": "model.py"}
            file = folder / f"{engine}.yaml"
            file.write_text(yaml.safe_dump(spec))
            subprocess.run([COMMAND, "run", file], check=True)
            if not np.array_equal(CloudVolume(layer, progress=False)[:], data):
                raise SystemExit(f"{engine}: the identity of the volume is another volume")
    print(f"ok: user {os.getuid()}, output as expected of {', '.join(ENGINES)}; ONNX Runtime {onnxruntime.__version__}")


if __name__ == "__main__":
    main()
