"""How a run ends early: Ctrl-C, SIGTERM, or the loss of one of its processes."""

import _thread
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

TWICE = 0.3  # seconds: timeout(1) sends one signal twice, to a process and to its group
PATIENCE = 15.0  # seconds that an interrupted process has to end by itself
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SLURM may send SIGUSR1 before it requeues a job
NOTICES = (10.0, 30.0)  # seconds until the first report of waiting for other processes, and between later ones

INTERRUPTED = "featx: interrupted. Run the same command again to continue."


class Stopped(BaseException):
    """A signal ended the run, or another of its processes was lost; only ``main`` catches this.

    Args:
        exit_status: 128 plus the signal's number, or the exit status of the lost process.
    """

    def __init__(self, exit_status: int) -> None:
        super().__init__(exit_status)
        self.exit_status = exit_status

    @property
    def by_signal(self) -> bool:
        """Whether the user or a scheduler ended the run."""
        return self.exit_status > 128


_verdict: int | None = None  # the exit status due to a signal or to another process's end


def listen() -> None:
    """Make Ctrl-C, SIGTERM and, under SLURM, SIGUSR1 raise Stopped; a second signal ends the process at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a parent that waits for others passes on a blocked mask
    for number in SIGNALS if "SLURM_JOB_ID" in os.environ else SIGNALS[:2]:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and a shell's background jobs ignore signals
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    global _verdict
    begun = time.monotonic()

    def end_at_once(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > begun + TWICE:
            os._exit(128 + number)

    for other in SIGNALS[:2]:
        signal.signal(other, end_at_once)
    if _verdict is None:
        _verdict = _status(number)
    end_at_the_latest(PATIENCE, _verdict)
    raise Stopped(_verdict)


def _status(number: int) -> int:
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


def end_at_the_latest(seconds: float, status: int) -> None:
    """End the process after this many seconds, whatever it is doing."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


class Watch:
    """Watches the other processes of a run, and ends this one when one of them is lost.

    Lightning checks every 5 s and then kills rank 0 with SIGKILL. Here every process waits for a message from rank 0,
    and rank 0 for one from each of the others. When a process dies, the system closes its connections, so the other
    side knows at once, on one machine or several.

    Args:
        report_error: Shows a message.
    """

    def __init__(self, report_error: Callable[[str], None]) -> None:
        self._report_error = report_error
        self._group: Any = None
        self._others: Sequence[int] = ()
        self._threads: list[threading.Thread] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._running = threading.Event()

    def children(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Remember the processes that this one has started; one that dies before all are connected ends the run."""
        self._children = processes

    def wait_for_others(self, machines: int, place: str, report: Callable[[str], None]) -> None:
        """Until the processes are connected, report now and then which are missing, and end at a signal.

        Python's signal handlers do not run while torch waits for the others, but a signal's number is written to the
        wakeup file descriptor at once: https://github.com/pytorch/pytorch/issues/63802

        Args:
            machines: Number of machines of the run.
            place: Host and port where the processes meet.
            report: Shows a line.
        """
        missing = f"{'1' if machines == 2 else f'up to {machines - 1}'} of {machines} machines"
        missing = missing if machines > 1 else "the other processes"
        arrived, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in this thread: torch would print 25 lines

        def look() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            first, later = NOTICES
            due = time.monotonic() + first
            while not self._running.is_set():
                self._end_with_children()
                if select.select([arrived], [], [], 0.3)[0]:
                    number = os.read(arrived, 1)[0]
                    if number in SIGNALS:
                        self._end_while_waiting(number, arrived)
                elif time.monotonic() >= due:
                    report(f"waiting for {missing} at {place}")
                    due += later

        threading.Thread(target=look, daemon=True).start()

    def _end_with_children(self) -> None:
        for number, process in enumerate(self._children, 1):
            if process.poll():
                if process.returncode < 0:
                    self._report_error(f"the process of rank {number} was lost (signal {-process.returncode})")
                end_processes(self._children)
                sys.stderr.flush()
                os._exit(max(1, process.returncode))

    def _end_while_waiting(self, number: int, arrived: int) -> None:
        """End the process at a signal that its main thread cannot handle; a second signal ends it at once."""
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        hurry = select.select([arrived], [], [], 1 if first else 2)[0]
        if _verdict is not None or self._running.is_set():
            return
        if first:
            with suppress(OSError):
                os.write(2, f"{INTERRUPTED}\n".encode())
        end_processes(self._children, 0 if hurry else PATIENCE)
        os._exit(_status(number))

    def connect(self, rank: int, size: int) -> None:
        """Begin to watch, now that the processes are connected."""
        if self._running.is_set():  # predict was called again
            return
        self._running.set()
        if size == 1:
            return
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        import torch.distributed as dist

        self._others = range(1, size) if rank == 0 else (0,)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._threads = [threading.Thread(target=self._listen, args=(other,), daemon=True) for other in self._others]
        for thread in self._threads:
            thread.start()

    def _listen(self, other: int) -> None:
        global _verdict
        import torch
        import torch.distributed as dist

        status = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(status, src=other, group=self._group)
        except RuntimeError:  # the connection was closed without a message
            if self._group is None or _verdict is not None:
                return
            self._report_error(f"the process of rank {other} was lost")
            status.fill_(1)
        if int(status) and self._group is not None and _verdict is None:
            _verdict = int(status)
            _thread.interrupt_main(signal.SIGTERM)

    def leave(self, status: int) -> None:
        """Send the others this process's exit status; 0 means that it is done."""
        group, self._group = self._group, None
        if group is None:
            return
        import torch
        import torch.distributed as dist

        for other in self._others:
            with suppress(RuntimeError):  # that one is gone already
                dist.send(torch.tensor([status]), dst=other, group=group)
        if status == 0:
            for thread in self._threads:
                thread.join(PATIENCE)  # until the other side has sent its 0


def leave_at_once(status: int) -> NoReturn:
    """End this process and its data workers without waiting for its threads.

    Python's normal exit would take a second, and abort in a thread that still listens to another process.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a closed pipe, a full disk
            status = status or 1
    os._exit(status)


def verdict() -> int | None:
    """Return the exit status due to a signal or to another process's end, or None."""
    return _verdict


def end_processes(processes: list[subprocess.Popen[bytes]], seconds: float = PATIENCE) -> None:
    """Terminate processes, wait for them, and kill those that remain."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
