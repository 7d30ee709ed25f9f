"""Writing files so that they are there whole or not at all, whatever ends the program.

Contents go to files without a name (where the system has them: Linux's O_TMPFILE), so that a killed program leaves nothing behind; they
get their names when all is written. Files that belong together get them under a lock of their folder, so that of two runs that write
to the same names at the same time one wins as a whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DESCRIPTORS = Path("/proc/self/fd")


@dataclass
class _File:
    """A file that is being written; ``temporary`` is its name until then (None: it has none)."""

    path: Path
    stream: IO[bytes]
    temporary: str | None

    def settle(self) -> None:
        """Bring the contents to the disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def step_up(self) -> None:
        """Take a temporary name, if there is an older file of the final one."""
        if self.temporary is None and os.path.lexists(self.path):
            hidden = tempfile.mktemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent)
            self.temporary = hidden if self._link(hidden) else self._copy()

    def appear(self) -> None:
        """Take the final name."""
        if self.temporary is None and not self._link(self.path):
            self.temporary = self._copy()
        self.stream.close()
        if self.temporary is not None:
            os.replace(self.temporary, self.path)
            self.temporary = None

    def _link(self, name: str | Path) -> bool:
        """Give a nameless file a name that is not taken; whether that worked."""
        number = self.stream.fileno()
        with suppress(OSError):
            os.link(f"{DESCRIPTORS}/{number}", name, src_dir_fd=number, follow_symlinks=True)  # a number makes Python call linkat,
            return True  # which can follow the link to the file
        return False

    def _copy(self) -> str:
        """The contents under a temporary name, where the file system cannot name nameless files."""
        stream, name = _named(self.path)
        with stream, open(f"{DESCRIPTORS}/{self.stream.fileno()}", "rb") as source:
            shutil.copyfileobj(source, stream)
            stream.flush()
            os.fsync(stream.fileno())
        return name

    def drop(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            self.stream.close()
        if self.temporary is not None and os.path.exists(self.temporary):
            os.unlink(self.temporary)


def _named(path: Path) -> tuple[IO[bytes], str]:
    """A file with a temporary name, open to whom a new file would be."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    return os.fdopen(handle, "wb"), temporary


def _open(path: Path) -> _File:
    if hasattr(os, "O_TMPFILE") and DESCRIPTORS.is_dir():
        with suppress(OSError):  # a file system without nameless files
            return _File(path, os.fdopen(os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb"), None)
    return _File(path, *_named(path))


# ---- several files ---------------------------------------------------------------------------------------------------


@dataclass
class _Writing:
    """Files that will appear together, in this order."""

    files: list[_File] = field(default_factory=list)


_CURRENT: ContextVar[_Writing | None] = ContextVar("sfp_onnx.writing", default=None)


@contextmanager
def together() -> Iterator[None]:
    """All files that are written inside appear at its end, or none of them if it fails (also if a later one cannot be written).

    Older files of their names (but the first) are removed just before, so that none ever stands beside files of another run: write
    first what the others belong to.

    Raises:
        OutputError: a file cannot take its name.
    """
    if _CURRENT.get() is not None:
        yield
        return
    writing = _Writing()
    token = _CURRENT.set(writing)
    try:
        yield
        _appear(writing.files)
    finally:
        _CURRENT.reset(token)
        for file in writing.files:
            file.drop()


def _appear(files: list[_File]) -> None:
    with ExitStack() as stack:
        for folder in sorted({file.path.parent.resolve() for file in files}):
            stack.enter_context(_locked(folder))
        for file in files:
            with _said(file.path):
                file.step_up()
        for file in reversed(files[1:]):
            with _said(file.path):
                file.path.unlink(missing_ok=True)
        for file in files:
            with _said(file.path):
                file.appear()


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for other runs that name files in a folder (an advisory lock; where there is none, nothing)."""
    handle = None
    if fcntl is not None:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def atomic(*paths: Path) -> Iterator[list[IO[bytes]]]:
    """Write files that appear together: ``with atomic(path) as (stream,)``. Inside `together`, they appear at its end."""
    with together():
        writing = _CURRENT.get()
        assert writing is not None
        opened: list[_File] = []
        try:
            for path in paths:
                opened.append(_open(path))
            yield [file.stream for file in opened]
            for file in opened:
                file.settle()
        except BaseException:
            for file in opened:
                file.drop()
            raise
        writing.files += opened
