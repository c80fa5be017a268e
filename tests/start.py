"""Processes in which featx is imported already: a fork of one that has imported it, and started in no time.

Each has its own signals, streams, folder, environment and exit status. What is decided earlier, by the interpreter or
by an import, it shares with all others: PYTHON... in the environment, ranks, the cores it may use, a stream that is
closed. A test of these starts Python itself.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

FEATX = "import runpy; runpy.run_module('featx', run_name='__main__', alter_sys=True)"  # as python -m featx


class Process:
    """A process as ``subprocess.Popen`` starts them, in a session of its own.

    Args:
        args: Its arguments.
        cwd: Its folder.
        env: Its environment.
        stderr: Where its stderr goes, instead of to ``self.stderr``.
        code: What it runs, as ``python -c`` does.
    """

    def __init__(
        self, args: tuple[object, ...], cwd: Path, env: Mapping[str, str], stderr: int | None = None, code: str = FEATX
    ) -> None:
        request = {"args": list(map(str, args)), "cwd": str(cwd), "env": dict(env), "code": code}
        self.args, self.returncode = request["args"], None
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self._reports, reports_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with open(os.devnull) as null, reports_end:
            fds = [null.fileno(), out_end, err_end if stderr is None else stderr, reports_end.fileno()]
            socket.send_fds(_parent(), [json.dumps(request).encode()], fds)
        os.close(out_end)
        os.close(err_end)
        self.pid = int(self._reports.recv(20))

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        return self.wait(0)

    def wait(self, timeout: float = 600) -> int | None:
        """Return the exit status when it has ended, or None after so many seconds."""
        if self.returncode is None and select.select([self._reports], [], [], timeout)[0]:
            self.returncode = int(self._reports.recv(20))
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait until its streams are closed and it has ended, and return what is left to read of stdout and stderr."""
        with self.stdout, self.stderr, self._reports, ThreadPoolExecutor() as threads:
            try:
                out, err = threads.map(lambda stream: stream.read(), (self.stdout, self.stderr), timeout=timeout)
            except TimeoutError:
                self.kill()
                raise
            self.wait()
        return out, err

    def kill(self) -> None:
        """Kill it, if it runs, with all that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


@cache
def _parent() -> socket.socket:
    """Start the process whose forks the others are, and return the socket on which it takes requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONWARNINGS": ""}
    env["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads, and a fork has none but the one that forks
    with theirs:
        process = subprocess.Popen([sys.executable, __file__], stdin=theirs, env=env)

    @atexit.register
    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)
        process.wait()

    return ours


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, and another one that waits for it and reports its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while (received := socket.recv_fds(requests, 1 << 20, 4))[0]:
        request, (*streams, reports), *_ = received
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if not (pid := os.fork()):
                os.close(reports)
                become(streams, **json.loads(request))
            for stream in streams:
                os.close(stream)
            os.write(reports, b"%d" % pid)
            os.write(reports, b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for fd in (*streams, reports):
            os.close(fd)


def become(streams: list[int], args: list[str], cwd: str, env: dict[str, str], code: str) -> None:
    """Run the code in this process, and end it."""
    status = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.path[0], sys.argv = cwd, ["-c", *args]
        exec(code, {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    from featx.process.start import import_fast

    for command in ("predict", "images", "layers", "verify"):
        import_fast(f"featx.commands.{command}")
    assert sys.platform != "linux" or os.listdir("/proc/self/task") == [str(os.getpid())]
    with socket.socket(fileno=0) as requests:
        serve(requests)
