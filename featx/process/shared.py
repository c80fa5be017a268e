"""What belongs to the whole process and featx has to change for a while: its threads agree, and set it back."""

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a process forked while another thread holds the lock would wait for it for ever
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class Shared:
    """A change that lasts while at least one thread is within it: the first makes it, the last sets it back.

    Args:
        change: Returns the context that changes something and sets it back.
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
def ignored(modules: str, *categories: type[Warning]) -> Iterator[None]:
    """Ignore warnings of these categories from modules whose names begin with the pattern ``modules``.

    ``warnings.catch_warnings`` would set back the filters of all threads, those that others have added too:
    https://docs.python.org/3/library/warnings.html#warnings.catch_warnings.
    """
    pattern = re.compile(modules)
    filters = [("ignore", None, category, pattern, 0) for category in categories]
    warnings.filters[:0] = filters  # type: ignore[index]
    try:
        yield
    finally:
        for added in filters:
            with suppress(ValueError):  # others have set back the filters of before
                warnings.filters.remove(added)  # type: ignore[attr-defined]


def one_core() -> None:
    """Let this thread compute alone, and threads that are started later as many at once as before.

    ``torch.set_num_threads`` holds for the thread that calls it and for all that begin after it.
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
    """Let this thread compute alone for a while.

    In a process that was forked from one that has computed, OpenMP waits for threads that are not there:
    https://gcc.gnu.org/bugzilla/show_bug.cgi?id=58378. One thread alone does not ask for them.
    """
    import torch

    before = torch.get_num_threads()
    one_core()
    try:
        yield
    finally:
        torch.set_num_threads(before)
