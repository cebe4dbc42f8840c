"""Makes commands misbehave: imported by Python before the command, in pods whose PYTHONPATH has it.

``CHUNKFLOW_MOODS`` is JSON. For the name of a block's task, or of a step, it says what the first,
second, … process does instead of its work, such as ``{"infer.0_0_0": ["exit 75", "hang"]}``. Which
one is next is remembered below the storage address ``CHUNKFLOW_MOODS_URL``.

- ``exit N``: end with that code
- ``kill N``: get that signal
- ``memory MB``: take so much memory, then hang
- ``disk MB``: fill so much of the node's disk, then hang
- ``hang``: do nothing for an hour
- ``count``: count aloud, half a second apart, until the file ``go-TASK`` is at that address; say
  how far, then do the work
"""

import json
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloudfiles import CloudFiles

_STAGES = {"chunkflow_core.inference_and_donate": "infer", "chunkflow_core.receive_and_blend": "blend"}


def _mood() -> tuple[str, str] | None:
    """The task that this process runs, and its mood; None: it is to work."""
    words = sys.orig_argv
    if "-m" not in words:
        return None
    module, *arguments = words[words.index("-m") + 1 :]
    if stage := _STAGES.get(module):
        task = f"{stage}.{'_'.join(arguments[arguments.index('--block') + 1 :][:3])}"
    elif module == "chunkflow_core":
        task = next(word for word in arguments if not word.startswith("-"))
    else:
        return None
    moods = json.loads(os.environ["CHUNKFLOW_MOODS"]).get(task, [])
    if not moods:
        return None
    files = _files()
    count = len(list(files.list(prefix=f"{task}-")))
    if count >= len(moods):
        return None
    files.put(f"{task}-{count}", b"")
    return task, str(moods[count])


def _files() -> "CloudFiles":
    from cloudfiles import CloudFiles

    return CloudFiles(os.environ["CHUNKFLOW_MOODS_URL"], progress=False)


def _behave(task: str, mood: str) -> None:
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
        files, lines = _files(), 0
        while not files.exists(f"go-{task}"):
            print(f"counting {lines}", flush=True)
            lines += 1
            time.sleep(0.5)
        print(f"counted {lines}", flush=True)
    else:
        time.sleep(3600)


if found := _mood():
    _behave(*found)
