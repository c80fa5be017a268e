"""A proxy in front of a store, which delays, cuts, stalls and refuses as a test wants."""

import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ERRORS = {
    "503": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    "403": b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>",
    "400": b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>",
}


class Proxy:
    """Passes GET and HEAD on to a server.

    Args:
        endpoint: The server.

    Attributes:
        endpoint: Its own.
        rule: What to do with a request, by its path: an error of ``ERRORS``, ``cut`` in mid-object, ``stall`` for as
            long as the proxy lives, or ``""``, to pass it on.
        delay: Seconds before each answer.
        paths: All paths that were requested.
    """

    def __init__(self, endpoint: str) -> None:
        self.rule: Callable[[str], str] = lambda path: ""
        self.delay = 0.0
        self.paths: list[str] = []
        self._closed = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                with suppress(OSError):
                    proxy._answer(self, urlsplit(endpoint).netloc)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.request_queue_size = 128
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler, server: str) -> None:
        self.paths.append(handler.path)
        what = "vanish" if self._closed.is_set() else self.rule(handler.path)
        if what == "stall":
            self._closed.wait()
        if what in ("stall", "vanish"):
            handler.close_connection = True
            return
        time.sleep(self.delay)
        if what in ERRORS:
            return self._send(handler, int(what), {}, ERRORS[what])
        with closing(HTTPConnection(server)) as upstream:
            upstream.request(handler.command, handler.path, headers=_without(handler.headers, "host", "connection"))
            found = upstream.getresponse()
            body = found.read()
        self._send(handler, found.status, dict(found.getheaders()), body, len(body) // 2 if what == "cut" else None)

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, cut: int | None = None
    ) -> None:
        handler.send_response(status)
        headers = _without(headers, "transfer-encoding", "content-length", "connection", "date", "server")
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:cut])
        if cut is not None:
            handler.close_connection = True

    def close(self) -> None:
        """Vanish: connections are closed, and new ones refused."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()


def _without(headers: Any, *names: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in names}
