"""Settings of the whole process that featx changes for a while; its threads share the change and restore it."""

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child forked while another thread holds the lock would wait for it forever
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class Shared:
    """A change that lasts while at least one thread is inside: the first makes it, the last undoes it.

    Args:
        change: Returns the context manager that makes and undoes the change.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change = change
        self._threads = 0
        self._made: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        with LOCK:
            if self._made is None:
                self._made = self._change()
                self._made.__enter__()
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with LOCK:
            self._threads -= 1
            if not self._threads and self._made is not None:
                made, self._made = self._made, None
                made.__exit__(None, None, None)


@contextmanager
def ignored(modules: str, *categories: type[Warning], message: str = "") -> Iterator[None]:
    """Ignore warnings of these categories from modules whose names begin with the pattern ``modules``.

    With a message, only those whose text begins with this pattern are ignored.

    ``warnings.catch_warnings`` restores the filters of all threads and drops those that others added meanwhile:
    https://docs.python.org/3/library/warnings.html#warnings.catch_warnings.
    """
    pattern = re.compile(modules)
    text = re.compile(message) if message else None
    filters = [("ignore", text, category, pattern, 0) for category in categories]
    warnings.filters[:0] = filters  # type: ignore[index]
    try:
        yield
    finally:
        for added in filters:
            with suppress(ValueError):  # another thread has restored older filters
                warnings.filters.remove(added)  # type: ignore[attr-defined]


def one_core() -> None:
    """Limit this thread's computing to one core; threads started later keep the earlier number.

    ``torch.set_num_threads`` applies to the calling thread and to all threads started after it.
    """
    import torch

    with LOCK:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        later = threading.Thread(target=torch.set_num_threads, args=(before,))
        later.start()
        later.join()


@contextmanager
def on_one_core() -> Iterator[None]:
    """Limit this thread's computing to one core for a while.

    In a process forked from one that has computed, OpenMP waits for threads that do not exist in the child:
    https://gcc.gnu.org/bugzilla/show_bug.cgi?id=58378. A single thread does not need them.
    """
    import torch

    before = torch.get_num_threads()
    one_core()
    try:
        yield
    finally:
        torch.set_num_threads(before)
