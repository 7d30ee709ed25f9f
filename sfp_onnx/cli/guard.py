"""The command line in a process of its own. If onnxruntime brings that down, as it can with damaged models, there is still an error.

The process is made by fork, before onnxruntime is loaded: that starts threads, which do not survive it (see `runtime`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
PATIENCE = 0.5  # seconds in which a child that got Ctrl-C itself may end
PR_SET_PDEATHSIG = 1
EXIT_CODE = 4


def guarded_run(run: Callable[[], None]) -> None:
    """Call ``run`` in a child process and end as it ended; a crash becomes a message and exit code 4. Without fork: just call it."""
    if not hasattr(os, "fork"):
        run()
        return
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        run()
        return
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, frame: _pass_on(child, number))
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    number = signal.Signals(os.WTERMSIG(status))
    if number.name in CRASHES:
        what = (signal.strsignal(number) or number.name).lower()
        print(
            f"Error: onnxruntime or onnx crashed ({what}). The model or the data are damaged, or this is a bug there; "
            "`python -X faulthandler -m sfp_onnx ...` shows where. Nothing was written that is not whole.",
            file=sys.stderr,
        )
        sys.exit(EXIT_CODE)
    signal.signal(number, signal.SIG_DFL) if number is not signal.SIGKILL else None
    os.kill(parent, number)


def _die_with(parent: int) -> None:
    """End when the parent does, however that ends (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_CODE)


def _pass_on(child: int, number: int) -> None:
    """A signal for both: Ctrl-C reaches the child by itself, unless it was sent to the parent alone."""
    if number == signal.SIGINT:
        time.sleep(PATIENCE)
    with suppress(ProcessLookupError, ChildProcessError):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(child, number)
