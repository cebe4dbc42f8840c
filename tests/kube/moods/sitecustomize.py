"""Makes stage commands misbehave: Python runs this before the command, in a pod that has the folder on its PYTHONPATH.

``CHUNKFLOW_MOODS`` is JSON: for a task's name what its first, second, … process does instead of its work, such as
``{"infer.0_0_0": ["exit 75", "hang"]}``. Which one is next is remembered below the storage address ``CHUNKFLOW_MOODS_URL``.

- ``exit N``: end with that code
- ``kill N``: get that signal
- ``memory MB``: take so much memory, then hang
- ``disk MB``: fill so much of the node's disk, then hang
- ``hang``: do nothing for an hour
- ``count N``: say so N times, half a second apart, then do the work
"""

import json
import os
import pathlib
import sys
import time

_STAGES = {"chunkflow_core.inference_and_donate": "infer", "chunkflow_core.receive_and_blend": "blend"}


def _mood() -> str | None:
    words = sys.orig_argv
    if "-m" not in words:
        return None
    stage = _STAGES.get(words[words.index("-m") + 1])
    if not stage:
        return None
    block = words[words.index("--block") + 1 :][:3]
    task = f"{stage}.{'_'.join(block)}"
    moods = json.loads(os.environ["CHUNKFLOW_MOODS"]).get(task, [])
    if not moods:
        return None
    from cloudfiles import CloudFiles

    files = CloudFiles(os.environ["CHUNKFLOW_MOODS_URL"], progress=False)
    count = len(list(files.list(prefix=f"{task}-")))
    if count >= len(moods):
        return None
    files.put(f"{task}-{count}", b"")
    return str(moods[count])


def _behave(mood: str) -> None:
    print(f"mood: {mood}", flush=True)
    action, _, number = mood.partition(" ")
    if action == "exit":
        print(f"error: injected {number}", flush=True)
        os._exit(int(number))
    if action == "kill":
        os.kill(os.getpid(), int(number))
    if action == "memory":
        kept = [b"\x01" * 2**20 for _ in range(int(number))]
        time.sleep(len(kept))
    if action == "disk":
        with pathlib.Path("/tmp/filled").open("wb") as file:
            for _ in range(int(number)):
                file.write(os.urandom(2**20))
    if action == "count":
        for line in range(int(number)):
            print(f"counting {line}", flush=True)
            time.sleep(0.5)
    else:
        time.sleep(3600)


if found := _mood():
    _behave(found)
