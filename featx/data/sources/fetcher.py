"""The process that talks to an object store for ``store.py``; no other process imports obstore.

A store that is made in a child of a process that has used obstore hangs forever, and data workers are forked. Therefore
each process that reads starts this program, which ends when the other end of its connection is closed.
"""

import hashlib
import os
import queue
import random
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

REQUESTS = 64  # in flight at once
BYTES = 128 << 20  # of objects that are in flight, or that nobody has taken yet
# In seconds; obstore's own limit of 30 for a whole request would never let a large object through a slow line.
TIMEOUTS = {"CONNECT_TIMEOUT": "10s", "READ_TIMEOUT": "30s", "TIMEOUT": "1day"}
QUIET = 5.0  # seconds of failing before it is reported
UNANSWERED = 10.0  # seconds without any answer to the first request of all: nothing may be there
LISTINGS = 5  # that are begun, where one breaks off
MOST_BACKOFF = 10.0  # seconds between two attempts

AGAIN = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "ServerBusy")
NO_CREDENTIALS, NO_PATH = "NoCredentials", "NoPath"  # codes of ours
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
REFUSED_TO_ALL = (  # credentials that do not hold (any more), not one object's permissions
    "AuthenticationFailed", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed",
    "SignatureDoesNotMatch", "TokenRefreshRequired",
)  # fmt: skip
PLAIN_DENIALS = ("", "AccessDenied", "AuthorizationPermissionMismatch")


class Answer(NamedTuple):
    """What became of a request, or of a part of it: ``data``, ``fault``, ``refused``, ``failed``, ``names`` ..."""

    kind: str
    value: Any = None


class Trouble(NamedTuple):
    """An error of a store.

    Attributes:
        status: The HTTP status, 0 if there was no answer.
        code: The store's own word, such as ``SlowDown``, or "".
        words: What to say of it, in one line, without anything secret.
    """

    status: int
    code: str
    words: str

    @property
    def may_pass(self) -> bool:
        """Whether the same request may work later."""
        passes = self.status in (0, 408, 425, 429) or self.status >= 500
        return (passes and self.status not in (501, 505)) or self.code in AGAIN

    def as_answer(self) -> Answer:
        """Return the answer to the first request of all: a failure of the store, or the user's mistake."""
        failed = self.may_pass and self.code != NO_CREDENTIALS
        return Answer("failed", self.words) if failed else Answer("refused", tuple(self))


def explain(err: BaseException) -> Trouble:
    """Find out from an exception of obstore, whose type says little, what the store said."""
    text, _, debug = str(err).partition("\n\nDebug source:")
    found = re.search(r"status code: (\d+)([^:\n]*)", text)
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    if found:
        said = ": ".join(one[1].strip(" .") for one in (code, message) if one)
        words = f"{found[1]}{found[2]}{f', {said}' if said else ''}"
    else:
        inner = re.findall(r'message: "([^"]*)"|source: (TimedOut)|kind: (Timeout)', debug)
        reason = next(("timed out" if timeout or kind else message for message, timeout, kind in inner[::-1]), "")
        words = (reason or text.split(" - ")[-1]) if isinstance(err, Exception) else "obstore failed"
    status, name = int(found[1]) if found else 0, code[1] if code else ""
    if "redirect" in text.lower():
        status, words = 301, "the bucket is in another region: set AWS_REGION"
    elif "169.254.169.254" in text or "metadata.google" in text:  # where machines ask for theirs, and may have to wait
        status, name, words = 0, NO_CREDENTIALS, "no credentials"
    elif type(err).__name__ == "InvalidPathError":
        status, name, words = 400, NO_PATH, text
    elif not found and (isinstance(err, ValueError) or type(err).__name__ == "NotSupportedError"):
        status, words = 400, text
    return Trouble(status, name, without_secrets(" ".join(words.split())[:300]).rstrip("."))


def without_secrets(text: str) -> str:
    """Return text without the parts of URLs that give access: their queries, and the users in them."""
    return re.sub(r"(https?://)(?:[^\s/]*@)?([^\s?]*)(?:\?\S*)?", r"\1\2", text)


def stamp(meta: Any) -> int:
    """Return what changes with an object's content, from its ETag where it has one, as 32 bits."""
    tag = (meta["e_tag"] or "").removeprefix("W/").strip('"') or str(int(meta["last_modified"].timestamp()))
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=4).digest())


def _attempt(call: Callable[[], Any]) -> Any:
    """Return what a call of obstore returns, or its Trouble."""
    from obstore.exceptions import BaseError

    try:
        return call()
    except (BaseError, FileNotFoundError, ValueError) as err:
        return explain(err)
    except BaseException as err:
        if type(err).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        return explain(err)


class Store:
    """A bucket, and what is asked of it; each answer is yielded when it is known.

    Args:
        url: The bucket, as ``s3://bucket``.
        prefix: What is below it that matters, as ``photos``, or "".
        shown: What messages call it.
        retry_seconds: How long a request that fails is made again.
        reports: Whether to report that it fails.
    """

    def __init__(self, url: str, prefix: str, shown: str, retry_seconds: float, reports: bool) -> None:
        from obstore.store import HTTPStore, from_url

        self.prefix = prefix
        self.shown = shown
        self.retry_seconds = retry_seconds
        self.reports = reports
        pages: Any = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_seconds)}
        if url.startswith("http"):  # whatever the host is, such as that of a bucket
            options: Any = {"allow_http": True} | {name.lower(): value for name, value in TIMEOUTS.items()}
            self.store: Any = HTTPStore(url, client_options=options, retry_config={"max_retries": 0})
        else:
            self.store = from_url(url, retry_config={"max_retries": 0})
            self.lister: Any = from_url(url, retry_config=pages)  # a listing cannot go on where it broke off
        self.threads = ThreadPoolExecutor(REQUESTS)
        self.lock = threading.Lock()

    def list(self) -> Iterator[Answer]:
        """Yield the names below the prefix, with sizes and stamps, in the store's order, many at a time."""
        start = len(self.prefix) + 1 if self.prefix else 0
        found = self._persist(self._first, min(UNANSWERED, self.retry_seconds))
        for _ in range(LISTINGS):
            if isinstance(found, Trouble):
                break
            yield Answer("names", None)  # from the start
            pages = self.lister.list(prefix=self.prefix or None, chunk_size=1000)
            while found := _attempt(lambda: next(pages, None)):  # noqa: B023, called at once
                if isinstance(found, Trouble):
                    break
                yield Answer("names", [(one["path"][start:], one["size"], stamp(one)) for one in found])
            if not found:
                return
            if found.may_pass:
                found = None
        assert isinstance(found, Trouble)
        yield found.as_answer()

    def is_empty(self) -> Iterator[Answer]:
        """Yield whether there is nothing below the prefix."""
        first = self._persist(self._first)
        yield Answer("failed", first.words) if isinstance(first, Trouble) else Answer("empty", not first)

    def read(self, wanted: Iterable[tuple[str, int, int]]) -> Iterator[Answer]:
        """Yield the contents of objects in their order, fetched together.

        Args:
            wanted: Their names below the prefix, sizes and stamps, as they were listed.
        """
        ahead: deque[tuple[Any, int]] = deque()
        held = 0
        for name, size, listed in wanted:
            while ahead and (len(ahead) == REQUESTS or held + size > BYTES):
                future, freed = ahead.popleft()
                yield future.result()
                held -= freed
            ahead.append((self.threads.submit(self._get, name, listed), size))
            held += size
        for future, _ in ahead:
            yield future.result()

    def open(self, name: str) -> Iterator[Answer]:
        """Yield the size and the stamp of an object; a URL may be signed for no other request than this."""
        found = self._persist(partial(self._request, name, (0, 1)), min(UNANSWERED, self.retry_seconds))
        if isinstance(found, Trouble):
            yield found.as_answer()
        else:
            yield Answer("opened", (found[0]["size"], stamp(found[0])))

    def ranges(self, name: str, listed: int, wanted: Iterable[tuple[int, int]]) -> Iterator[Answer]:
        """Yield parts of an object, fetched together; each is the begin and the end of a range."""
        for future in [self.threads.submit(self._get, name, listed, one) for one in wanted]:
            yield future.result()

    def _request(self, name: str, part: tuple[int, int] | None) -> Any:
        path = "/".join(filter(None, (self.prefix, name)))
        found = self.store.get(path, options={"range": part} if part else None)
        return found.meta, found.bytes()

    def _get(self, name: str, listed: int, part: tuple[int, int] | None = None) -> Answer:
        found = self._persist(partial(self._request, name, part))
        if not isinstance(found, Trouble):
            about, data = found
            return Answer("data", data) if stamp(about) == listed else Answer("fault", "changed since the listing")
        if found.status == 404 and found.code not in NO_BUCKET:
            return Answer("fault", "gone since the listing")
        may_list = found.status == 403 and found.code not in REFUSED_TO_ALL and self._persist(self._first)
        if may_list and not isinstance(may_list, Trouble):  # so it is about this object alone
            return Answer("denied", "" if found.code in PLAIN_DENIALS else found.words)
        return Answer("failed", found.words)

    def _first(self) -> Any:
        return next(self.store.list(prefix=self.prefix or None, chunk_size=1), [])

    def _persist(self, call: Callable[[], Any], unanswered: float | None = None) -> Any:
        """Return what a call returns, or its Trouble if that does not pass in time.

        Args:
            call: Makes a request.
            unanswered: How many seconds no answer at all may last; None: as long as any other trouble.
        """
        begun = 0.0
        for attempt in count():
            result = _attempt(call)
            if not isinstance(result, Trouble):
                return result
            now = time.monotonic()
            begun = begun or now
            limit = self.retry_seconds if result.status or unanswered is None else unanswered
            is_mistake = unanswered is not None and result.code == NO_CREDENTIALS
            if not result.may_pass or is_mistake or now - begun >= limit:
                return result
            if now - begun > QUIET:
                self._report(result)
            pause = min(0.1 * 2 ** min(attempt, 9), MOST_BACKOFF) * random.uniform(0.5, 1)
            time.sleep(max(0.0, min(pause, begun + limit - now)))
        raise AssertionError

    def _report(self, trouble: Trouble) -> None:
        with self.lock:
            if self.reports:
                sys.stderr.write(f"featx: warning: {self.shown}: {trouble.words}. Trying again …\n")
                sys.stderr.flush()
            self.reports = False


def serve(connection: Connection, requests: "queue.SimpleQueue[Any]") -> None:
    """Answer requests in their order, each until the next one is there."""
    try:
        _, *about = requests.get()
        store = _attempt(lambda: Store(*about))
        while True:
            number, method, *args = requests.get()
            refused = [Answer("refused", tuple(store))] if isinstance(store, Trouble) else None
            for kind, value in refused or getattr(store, method)(*args):
                connection.send((number, kind, None if kind == "data" else value))
                if kind == "data":
                    connection.send_bytes(value)
                if kind == "failed":
                    os._exit(0)  # other requests are made of the same store
                if not requests.empty():  # nobody wants the rest
                    break
            connection.send((number, "end", None))
    except OSError:  # nobody is there any more
        os._exit(0)
    except BaseException:
        connection.send((0, "bug", traceback.format_exc()))
        os._exit(1)


def main() -> None:
    """Take requests from the connection whose number is on the command line, until it is closed."""
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = connection.recv()
    for maker in ("AWS", "AZURE", "GOOGLE"):
        for name, value in TIMEOUTS.items():
            os.environ.setdefault(f"{maker}_{name}", value)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=serve, args=(connection, requests), daemon=True).start()
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main()
