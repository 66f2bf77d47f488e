"""Which threads TVM's kernels run on: as many as a library wants, inside of the processors that this process may use.

TVM keeps a pool of threads for every thread that calls it, and does not end it when that thread ends. So only the main
thread calls it itself. The calls of all other threads go to a few runners, which live as long as the process: a server
that starts a thread for every request does not collect pools. TVM would also bind the threads, and the caller itself,
to processors of its choice, even to some that are forbidden to the process; TVM_BIND_THREADS=0 leaves that to Linux.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_here = threading.local()  # .threads: what TVM's pool of this thread is set to
_runners: ThreadPoolExecutor | None = None
_forked = False  # this process is a copy, in which the main thread's pool has lost its threads
_lock = threading.Lock()


def allowed() -> int:
    """How many processors this thread may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int) -> None:
    """How many threads TVM's kernels use from now on when this thread calls them, if so many processors are allowed."""
    import tvm_ffi

    threads = min(threads, allowed())
    if getattr(_here, "threads", None) == threads:
        return
    # TVM reads the pool's size once, when it starts it (by default half the cores); later it can only be reduced.
    os.environ["TVM_NUM_THREADS"] = str(max(allowed(), int(os.environ.get("TVM_NUM_THREADS", 0))))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
    _here.threads = threads


def call(function: Callable, threads: int, *arguments):
    """function(*arguments), whose kernels use `threads` threads: on this thread, or on a runner that it waits for."""

    def run():
        set_threads(threads)
        return function(*arguments)

    if threads == 1:  # such a library was compiled without parallel loops, and starts no pool
        return function(*arguments)
    if threading.current_thread() is threading.main_thread() and not _forked:
        return run()
    return _executor().submit(run).result()


def _executor() -> ThreadPoolExecutor:
    global _runners
    with _lock:
        if _runners is None:
            _runners = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="deploy")
        return _runners


def _after_fork() -> None:
    global _runners, _forked, _here, _lock
    _runners, _forked, _here, _lock = None, True, threading.local(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
