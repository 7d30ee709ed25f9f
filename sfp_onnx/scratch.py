"""A folder for temporary files that goes with the process, however it ends: even after ``kill -9`` nothing stays behind."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

# The guard waits until the pipe from this process closes, which the system does when the process ends, and removes the folder.
GUARD = "import shutil, sys; sys.stdin.buffer.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


@cache
def folder() -> Path:
    """The folder of this process, made when first asked for.

    Raises:
        OSError: there is no writable temporary folder.
    """
    path = tempfile.mkdtemp(prefix="sfp_onnx-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD, path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # what kills the group of this process must spare it
        )  # fmt: skip
    except OSError:
        return Path(path)  # no second process can be started: `atexit` has to do

    def dismiss() -> None:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()

    atexit.register(dismiss)
    return Path(path)
