"""Processes that decode: how many, how their batches come to the main process, and how they end."""

import multiprocessing
import os
import re
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from featx.data.batch import Batch
from featx.errors import BadValueError, UserError, first_line, log, size_in_words
from featx.process.lightning import end_at_an_unsent_batch

PATIENCE = 10.0  # seconds in which a forked worker has to begin
SHM = "/dev/shm"  # where Linux has shared memory and semaphores; Docker gives it 64 MB


def choose(num_workers: Literal["auto"] | int, cores: int, batches: int) -> int:
    """Return how many processes decode, 0 where this one has to, for which a warning gives the reason.

    Args:
        num_workers: How many were asked for.
        cores: That this process may use.
        batches: That it has to read.

    Raises:
        BadValueError: Some were asked for, and none may be started.
    """
    # As many as cores, beside as many threads of a network on the CPU: what has work takes a core, and none is
    # idle when images, or the network, are waited for. Fewer workers waited more, and nicer ones starved as soon as
    # another program ran.
    workers = min(cores, max(1, batches)) if num_workers == "auto" else num_workers
    if multiprocessing.current_process().daemon:  # as in a multiprocessing.Pool: it may not start any
        if num_workers not in ("auto", 0):
            raise BadValueError(
                f"--data.num_workers {workers}: this is a daemonic process, as multiprocessing.Pool and some task "
                "queues start\nthem, which cannot start others. Expected auto or 0: it decodes the images itself."
            )
        return 0
    if num_workers == "auto" and threading.current_thread() is not threading.main_thread():
        return 0  # a fork would have the locks that other threads hold, and nobody to release them
    try:
        _ = [multiprocessing.Lock() for _ in range(4 * workers + 8 if workers else 0)]  # as their queues need
    except (OSError, ImportError) as err:
        reason = getattr(err, "strerror", None) or first_line(err)
        log.warning("no data workers: they need semaphores in %s (%s). Images are decoded slower", SHM, reason)
        return 0
    return workers


class _Worker(ForkProcess):
    """A forked process that is forked again where it does not begin.

    A thread of torch's that asks for the GIL at the moment of a fork leaves the child with a lock of Python 3.11's that
    nobody releases, and the main process would wait for its batches: https://github.com/python/cpython/issues/112275.
    """

    _begun: int  # its end of a pipe

    def run(self) -> None:
        os.write(self._begun, b"1")
        super().run()

    @staticmethod
    def _Popen(process: Any) -> Any:
        for _ in range(3):
            begun, process._begun = os.pipe()
            try:
                child = ForkProcess._Popen(process)
            finally:
                os.close(process._begun)
            ready, *_ = select.select([begun], [], [], PATIENCE)
            os.close(begun)
            if ready:  # it has begun, or has ended, which is found elsewhere
                return child
            child.kill()
            child.wait()
        raise RuntimeError("DataLoader worker exited: three times it did not begin")


class Context(ForkContext):
    """Forks workers, and sees to it that they begin."""

    Process = _Worker


def start(worker: int) -> None:
    """Prepare a worker: what fails in it ends it, and is reported by the main process alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, until the process ends
    threading.excepthook = lambda thread: os._exit(1)
    end_at_an_unsent_batch()


def send(collate: Callable[[Any], Batch], samples: Any) -> Batch | UserError:
    """Return a batch whose images are in shared memory where there is room, else are pickled with their values.

    The DataLoader would do it in a thread of its queue, and where that fails the main process waits forever:
    https://github.com/pytorch/pytorch/issues/5040
    """
    if isinstance(samples, UserError):
        return samples
    batch = collate(samples)
    return batch._replace(groups=[(rows, share(images)) for rows, images in batch.groups])


def share(images: Tensor) -> Any:
    """Return images in shared memory, or where that does not take them, as they go through the queue's pipe."""
    try:
        size = shutil.disk_usage(SHM) if os.path.isdir(SHM) else None
        if size and size.free < 2 * images.nbytes:  # others need some, too, and several workers may look at once
            return _InPipe(images, f"{size_in_words(size.total)} in {SHM}")
        return images.share_memory_()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as err:
        for name in re.findall(r"</(torch_\w+)>", str(err)):  # torch leaves the file that it could not fill
            Path(SHM, name).unlink(missing_ok=True)
        return _InPipe(images, first_line(err).split(": ")[-1])


class _InPipe:
    """Images, ``(..., 3, H, W) uint8``, that a pickle holds with their values; loaded, they are a Tensor."""

    def __init__(self, images: Tensor, why: str) -> None:
        self._reduced = _from_pipe, (images.movedim(-3, -1).numpy(), why)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def _from_pipe(values: Any, why: str) -> Tensor:
    _report_pipe(why)
    return torch.from_numpy(values).movedim(-1, -3)


@cache
def _report_pipe(why: str) -> None:
    log.warning(
        "shared memory is too small for the batches in flight (%s): some go through a pipe, which is slower. "
        "In a container docker run --shm-size 2g gives more",
        why,
    )
