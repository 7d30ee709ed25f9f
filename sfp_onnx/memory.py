"""How much memory there is, and a bound, so that a model or an archive with absurd sizes ends in an error and not in a dead machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CGROUP = Path("/sys/fs/cgroup/memory.max")
MEMINFO = Path("/proc/meminfo")


def available() -> int | None:
    """Bytes that can still be had on this machine or in this container; None if that is not known."""
    found = []
    with suppress(OSError, ValueError):
        found.append(int(CGROUP.read_text()))
    with suppress(OSError, ValueError, KeyError, IndexError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        found.append(sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024)
    if not found:
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def bound() -> None:
    """Let this process ask for no more memory of its own than there is: then an allocation fails, with a message, instead of the
    system's killing some process. Mapped files do not count. Where the system has no such limit, nothing happens."""
    found = available()
    if resource is None or found is None or not hasattr(resource, "RLIMIT_DATA"):
        return
    with suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        known = [own for own in (soft, hard) if own != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([found, *known]), hard))
