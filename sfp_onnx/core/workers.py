"""One call for many items in other processes, threads or machines: whatever `concurrent.futures` calls an executor does it."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from multiprocessing import active_children, get_context
from typing import Any

from .errors import OptionError, SfpError
from .system import need

PR_SET_PDEATHSIG = 1
ORPHANED = 4  # exit code
PATIENCE = 10  # seconds until a scheduler must have answered


def die_with(parent: int) -> None:
    """End when the parent does, however that ends (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(ORPHANED)


def _begin(parent: int) -> None:
    """What a worker does first. Ctrl-C is for the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "fork"):
        die_with(parent)


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """So many processes of the standard library, which are ended where the block is left by an error or by Ctrl-C. They are started
    afresh (no fork: onnxruntime has threads), so that a script which gets here needs ``if __name__ == "__main__":``."""
    others = set(active_children())
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        for child in set(active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """The workers of a Dask scheduler. They need this package, and paths that they can read.

    Raises:
        OptionError: `distributed` is not installed, or no scheduler answers.
    """
    dask = need("distributed", "dask", "--dask")
    try:
        client = dask.Client(address, timeout=PATIENCE)
    except Exception as error:  # whatever a wrong address or a scheduler of another version raises
        raise OptionError(
            f"--dask {address}: no scheduler answers there ({error or type(error).__name__}). Start one with `dask scheduler` and workers "
            "with `dask worker ADDRESS`; give the address that it prints, such as tcp://192.168.0.5:8786"
        ) from error
    with client:
        yield client.get_executor()


def each(
    call: Callable[[Any], Any], items: Sequence[Any], executor: Executor | int | None = None, advance: Callable[[int], object] = bool
) -> list[Any]:
    """What ``call`` gives for every item, or the exception that it raised, in the order of the items.

    Args:
        executor: what does it; a number: so many processes; None: this thread, one after the other. A call that was lost because a
            worker was ended is tried once more, alone in a process of its own, where it can harm no other.
        advance: told of every item that is done.

    Raises:
        OptionError: ``call`` cannot be sent to processes.
    """
    found: dict[int, Any] = {}

    def gather(futures: Mapping[Future[Any], int], last: bool = False) -> None:
        try:
            for future in as_completed(futures):
                outcome = _outcome(future)
                if last or not isinstance(outcome, BrokenExecutor):
                    found[futures[future]] = outcome
                    advance(1)
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    if executor is None:
        for number, item in enumerate(items):
            gather({_sent(None, call, item): number})
        return list(found.values())
    size = executor if isinstance(executor, int) else 1
    if isinstance(executor, int):
        _check_sendable(call, executor)
    with processes(executor) if isinstance(executor, int) else nullcontext(executor) as pool:
        gather({_sent(pool, call, item): number for number, item in enumerate(items)})
    lost = [number for number in range(len(items)) if number not in found]
    for start in range(0, len(lost), size):
        with ExitStack() as alone:
            gather({_sent(alone.enter_context(processes(1)), call, items[number]): number for number in lost[start : start + size]}, True)
    return [found[number] for number in range(len(items))]


def _sent(pool: Any, call: Callable[[Any], Any], item: Any) -> Future[Any]:
    """A call that is on its way, or done."""
    try:
        if pool is not None:
            return pool.submit(call, item)  # type: ignore[no-any-return]
        done: Future[Any] = Future()
        done.set_result(call(item))
    except Exception as error:  # that of one item, or of a pool that is broken
        done = Future()
        done.set_exception(error)
    return done


def _outcome(future: Future[Any]) -> Any:
    try:
        error = future.exception()
    except CancelledError as cancelled:
        return cancelled
    return future.result() if error is None else error


def _check_sendable(call: Callable[[Any], Any], count: int) -> None:
    if count < 1:
        raise OptionError(f"workers: {count}: expected a number of processes, at least 1")
    try:
        pickle.dumps(call)
    except Exception as error:  # whatever objects raise that cannot be pickled
        raise OptionError(f"workers: model and data cannot be sent to other processes ({error}). Give them as paths.") from error


def reason(error: BaseException) -> str:
    """Why an item failed, for people."""
    if isinstance(error, BrokenExecutor):
        return "the process that worked on it ended, and again when tried alone (killed, out of memory, or a crash)"
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}"
    return str(error) if isinstance(error, SfpError) else f"internal error: {type(error).__name__}: {error}"
