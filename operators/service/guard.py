"""The two processes above a service's components: guard, and supervisor below it.

Both adopt the orphans below them, so either can be killed and the other one ends the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from operators import launch
from operators.service import processes
from operators.service.component import how_ended
from operators.service.logs import note
from operators.service.prefork import STOP_SIGNALS
from operators.service.state import ServiceError
from operators.service.supervisor import REST_GRACE, TICK, Options, Supervisor


def run(options: Options) -> int:
    """Run a service in this process and one below it, until a signal to stop; an exit code.

    The signals are SIGINT, SIGTERM and SIGHUP.
    """
    guard = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # Signals wait until there are handlers for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child = os.fork()
    if child == 0:
        os._exit(_supervise(options, guard))
    return _guard(options, child)


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _supervise(options: Options, guard: int) -> int:
    """The child's part of :func:`run`."""
    try:
        # Ctrl-C goes to the guard, which passes it on.
        os.setpgid(0, 0)
        launch.adopt_orphans()
        launch.end_with_parent(signal.SIGTERM, guard)
        supervisor = Supervisor(options, guard)
        _handle_stop_signals(lambda *_: supervisor.stop())
        supervisor.run()
    except ServiceError as error:
        note(str(error))
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


def _guard(options: Options, child: int) -> int:
    """The parent's part of :func:`run`: pass on signals, end what a killed child leaves."""
    received: list[int] = []
    _handle_stop_signals(lambda number, _: received.append(number))
    launch.adopt_orphans()
    watched = options.watched
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if watched is not None and not watched.alive:
            note("the process that this service was to end with has ended")
            received.append(signal.SIGTERM)
            watched = None
        while received:
            os.kill(child, received.pop())
        processes.reap({child})
        time.sleep(TICK)
    code = os.waitstatus_to_exitcode(ended[1])
    if code < 0:
        note(f"the supervisor {how_ended(code)}; ending what it started")
    processes.end_children(REST_GRACE)
    options.home.state.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code
