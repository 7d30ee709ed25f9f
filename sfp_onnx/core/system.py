"""The system below: messages, temporary files, memory, optional packages."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from errno import EDQUOT, EFBIG, ENOSPC
from functools import cache
from pathlib import Path
from typing import IO, Any

from .errors import OptionError, OutputError

log = logging.getLogger("sfp_onnx")
"""What a run says while it works: warnings, what it chose (info), and details (debug). The command line prints them."""


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said inside."""
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False


command_line: ContextVar[str] = ContextVar("sfp_onnx.command_line", default="(from Python)")
"""What was typed, for reports."""


# ---- temporary files and folders that go with the process, even after ``kill -9`` ------------------------------------

FULL = {ENOSPC, EDQUOT, EFBIG}

# The guard waits until the pipe from this process closes, which the system does when the process ends, and removes what was named there.
GUARD = """
import os, shutil, sys
for path in sys.stdin.buffer.read().split(b"\\0"):
    shutil.rmtree(path, ignore_errors=True)
    try:
        os.unlink(path)
    except OSError:
        pass
"""


@cache
def folder() -> Path:
    """The folder of this process, made when first asked for.

    Raises:
        OutputError: there is no writable temporary folder.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix="sfp_onnx-"))
    except OSError as error:
        raise no_room("temporary files", error) from error
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    goes_at_the_end(path)
    return path


@contextmanager
def temporary(what: str) -> Iterator[Path]:
    """A folder for ``what``, removed in the end.

    Raises:
        OutputError: there is no room.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder(), ignore_cleanup_errors=True) as place:
            yield Path(place)
    except Exception as error:  # libraries that write there raise whatever they do
        if is_full(error):
            raise no_room(what, error) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    return (isinstance(error, OSError) and error.errno in FULL) or os.strerror(ENOSPC) in str(error)


def no_room(what: str, error: BaseException) -> OutputError:
    """What to say where temporary files cannot be written."""
    place = tempfile.tempdir or os.environ.get("TMPDIR", "the temporary folder")
    with suppress(OSError):
        place = tempfile.gettempdir()
    return OutputError(f"{place}: no room for {what} ({getattr(error, 'strerror', None) or error}). Set TMPDIR to a folder with more room.")


def goes_at_the_end(path: Path) -> None:
    """Have a file or folder removed when this process ends, if it is there then."""
    pipe = _guard()
    with suppress(OSError, ValueError):  # the guard was ended from outside, or this process is just ending
        if pipe is not None:
            pipe.write(os.fsencode(path.absolute()) + b"\0")


@cache
def _guard() -> IO[bytes] | None:
    """The pipe to the guard; None if no second process can be started."""
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            bufsize=0, start_new_session=True,  # what kills the group of this process must spare it
        )  # fmt: skip
    except OSError:
        return None
    atexit.register(guard.communicate)  # which closes the pipe and waits
    return guard.stdin


# ---- how much memory there is ----------------------------------------------------------------------------------------

CGROUP = Path("/sys/fs/cgroup/memory.max")
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")


def available() -> int | None:
    """Bytes that can still be had on this machine or in this container; None if that is not known."""
    limits = []
    with suppress(OSError, ValueError):
        limits.append(int(CGROUP.read_text()))
    with suppress(OSError, ValueError, KeyError, IndexError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        limits.append(sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024)
    if not limits:
        with suppress(OSError, ValueError, AttributeError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def resident() -> int:
    """Bytes of its own that this process has in memory now (Linux; elsewhere 0, since that is not known)."""
    with suppress(OSError, ValueError, AttributeError):
        _, pages, shared, *_ = map(int, STATM.read_text().split())
        return (pages - shared) * int(os.sysconf("SC_PAGE_SIZE"))
    return 0


def bound() -> None:
    """Let this process ask for no more memory of its own than there is: then an allocation fails, with a message, instead of the
    system's killing some process. Mapped files do not count. Where the system has no such limit, nothing happens."""
    most = available()
    if most is None:
        return
    with suppress(ImportError, AttributeError, OSError, ValueError):  # Windows, systems without this limit, limits that are set
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([most, *known]), hard))


# ---- threads of numpy ------------------------------------------------------------------------------------------------


@cache
def _blas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """How many threads the linear algebra that comes with numpy uses, and what sets it; None where it is another."""
    import ctypes

    import numpy

    for path in (Path(numpy.__file__).parents[1] / "numpy.libs").glob("*openblas*"):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            return library.scipy_openblas_get_num_threads64_, library.scipy_openblas_set_num_threads64_
    return None


@contextmanager
def numpy_threads(count: int) -> Iterator[None]:
    """Let numpy multiply matrices with at most so many threads inside (where it can be told)."""
    known = _blas()
    before = known[0]() if known else 0
    if known:
        known[1](min(count, before))
    try:
        yield
    finally:
        if known:
            known[1](before)


# ---- what plug-ins do after a repair ---------------------------------------------------------------------------------

FINISHERS: dict[str, Callable[..., tuple[Any, Mapping[str, object], tuple[str, ...]]]] = {}
"""By the field of `RepairOptions` that asks for it: from the original, the repaired model, what was cut, data and options to a better
model, figures for the manifest, and notes."""
NEEDS: dict[str, Callable[[], object]] = {}
"""By the same field: what raises before any work if it cannot be done here."""


# ---- code from outside that only some features need ------------------------------------------------------------------

PACKAGES = {"PIL": "pillow"}  # modules of packages with other names


def version_of(package: str) -> str:
    """Version of an installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


INSTALLED = ("sfp_onnx", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "click")


def versions() -> dict[str, str]:
    """Versions of this package and what it runs on."""
    return {package: version_of(package) for package in INSTALLED}


def need(module: str, extra: str, feature: str) -> Any:
    """A module of an optional package.

    Raises:
        OptionError: it is not installed; how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module.partition(".")[0], module)
        raise OptionError(
            f"{feature} needs {package}, which is not installed: pip install {package} (it is the extra '{extra}': sfp_onnx[{extra}])"
        ) from error


def user_function(name: str, option: str) -> Callable[..., Any]:
    """The function ``module:function``; modules in the current folder are found. ``option`` is what messages begin with.

    Raises:
        OptionError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        why = f"cannot import '{attribute}' from '{module}': {type(error).__name__}: {error}"
        raise OptionError(f"{option}: cannot be imported: {why}") from error
    if not callable(function):
        raise OptionError(f"{option}: '{attribute}' is no function")
    return function
