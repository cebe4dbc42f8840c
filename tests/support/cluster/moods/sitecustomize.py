"""Makes commands misbehave: imported by Python before the command, in pods whose PYTHONPATH has it.

``CHUNKFLOW_MOODS`` is JSON. For the name of a block's task, or of a step, it says what the first,
second, … process does instead of its work, such as ``{"infer.0_0_0": ["exit 75", "hang"]}``. Which
one is next is remembered below the storage address ``CHUNKFLOW_MOODS_URL``, any that the project
takes, with the credentials that it would find.

Every Python in the pod imports this at its start. So what only a process with a mood needs is
imported where it is needed.

- ``exit N``: end with that code
- ``kill N``: get that signal
- ``memory MB``: take so much memory, then hang
- ``disk MB``: fill so much of the node's disk, in the folder for temporary files, then hang
- ``hang``: do nothing for an hour
- ``count``: count aloud, half a second apart, until the file ``go-TASK`` is at that address; say
  how far, then do the work
- ``pause MODULE:CLASS.METHOD N``: work, but let no thread make call number N of that method, or a
  later one, before the file ``resume-TASK`` is at that address; ``paused-TASK`` is there from then
"""

import os
import sys
import time

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
    import json

    moods = json.loads(os.environ["CHUNKFLOW_MOODS"]).get(task, [])
    if not moods or (count := len(_noted(f"{task}-"))) >= len(moods):
        return None
    _note(f"{task}-{count}")
    return task, str(moods[count])


def _note(name: str) -> None:
    from chunkflow_core.storage.files import put_file

    put_file(os.environ["CHUNKFLOW_MOODS_URL"], name, b"")


def _noted(beginning: str) -> list[str]:
    """The files at the address whose names begin so."""
    from chunkflow_core.storage.files import open_files

    return list(open_files(os.environ["CHUNKFLOW_MOODS_URL"]).list(prefix=beginning))


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
        import tempfile

        with tempfile.NamedTemporaryFile(delete=False) as file:
            for _ in range(int(number)):
                file.write(os.urandom(2**20))
    if action == "pause":
        _pause(task, *number.split())
    elif action == "count":
        lines = 0
        while f"go-{task}" not in _noted(f"go-{task}"):
            print(f"counting {lines}", flush=True)
            lines += 1
            time.sleep(0.5)
        print(f"counted {lines}", flush=True)
    else:
        time.sleep(3600)


def _pause(task: str, where: str, number: str) -> None:
    import functools
    import importlib
    import threading

    module, _, path = where.partition(":")
    name, _, method = path.partition(".")
    owner = getattr(importlib.import_module(module), name)
    original, calls, turn = getattr(owner, method), [0], threading.Lock()

    @functools.wraps(original)
    def paused(*arguments: object, **keywords: object) -> object:
        with turn:
            calls[0] += 1
            if calls[0] >= int(number) and not _noted(f"resume-{task}"):
                print(f"paused before call {calls[0]} of {where}", flush=True)
                _note(f"paused-{task}")
                while not _noted(f"resume-{task}"):
                    time.sleep(0.2)
        return original(*arguments, **keywords)

    setattr(owner, method, paused)


if found := _mood():
    _behave(*found)
