"""Shares: how jobs that come and go divide the batches of a run, by files that they create in its output folder.

A job creates ``job-000017`` exclusively: the number is its session, the file's mtime its heartbeat. A share is claimed
by creating ``000003-of-000064.1``; when the job of that claim is lost, ``….2`` claims it next. No job changes or
removes a file of another, and times are compared only among files, so that clocks may differ. Claims save work and
guard nothing: a job that was taken for lost goes on writing to its own parts, with the same rows.
"""

import json
import os
import platform
import random
import re
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from featx.errors import log
from featx.writer import disk
from featx.writer.records import Json

NAME = "shares"
chance = random.SystemRandom()  # a seed would make all jobs try the same shares
BEAT = 20.0  # seconds between heartbeats, and between looks at those of others
LOST = 180.0  # seconds without one: clients of NFS may see one another's files a minute late
SECONDS = 300.0  # of work in a share of --data.shard auto
FEWEST = 64  # shares of --data.shard auto, so that the last ones end at about the same time
GUESSES = 4  # shares that a job tries to claim before it looks again which are free
LOOKED_AT = 16  # claims at a time, whether they are lost: a thousand jobs that wait look at all of them
INFO_BYTES = 400  # of a job's file, which is written in place
LIST, JOIN, PLAN = "list", "join", "plan.json"  # what else is claimed; what all jobs agree on
PUBLISHED = r"(plan|auto)\.json|images-\w+\.gz"
OWN = re.compile(rf"\.?(job-\d+|(list|join|\d+-of-\d+)\.(\d+|done)|({PUBLISHED})(\.\d+\.new)?)(\.new)?")


class Claim(NamedTuple):
    """A claim that this job has made.

    Attributes:
        what: What is claimed: a share, the list of images, or the join.
        generation: How many jobs have claimed it, this one included.
        before: The jobs that claimed it before and were lost.
    """

    what: str
    generation: int
    before: tuple[int, ...]


class Heartbeat:
    """A job's file, which shows the others every ``BEAT`` seconds that it is alive, and what it has done so far.

    Args:
        progress: Returns what ``featx status`` shows of this job: images and faults.

    Attributes:
        path: The file.
        gone: Whether it was missing.
    """

    def __init__(self, progress: Callable[[], Json]) -> None:
        self.path = Path()
        self.gone = False
        self._progress = progress
        self._begun = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="featx-heartbeat", daemon=True)

    def start(self, path: Path) -> None:
        """Begin to beat in a file with the content of ``info``."""
        self.path = path
        self._thread.start()

    def stop(self, wait: bool = True) -> bool:
        """Beat no more, from this call's end if it waits, and return whether it was beating."""
        self._stop.set()
        was_alive = self._thread.is_alive()
        if was_alive and wait:
            self._thread.join()
        return was_alive

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            self.now()

    def now(self) -> float:
        """Beat, and return the time of that by the clock of the file system; 0 if it failed."""
        try:
            file = os.open(self.path, os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            self.gone = True
            return 0.0
        except OSError:  # the next one may get through
            return 0.0
        try:
            os.pwrite(file, self.info(), 0)
            os.utime(file)  # without a time: a network file system takes its server's
            return os.fstat(file).st_mtime
        except OSError:  # EIO and ESTALE pass: https://github.com/tox-dev/filelock/pull/562
            return 0.0
        finally:
            with suppress(OSError):
                os.close(file)

    def info(self) -> bytes:
        """Return what is known of this job, as JSON."""
        info = {"host": platform.node(), "process": os.getpid(), **self._progress()}
        info["seconds"] = round(time.monotonic() - self._begun, 1)
        return json.dumps(info).encode().ljust(INFO_BYTES)


class Shares:
    """One job's view of the shares of a run.

    Args:
        folder: The hidden folder of the output folder.
        shard: ``3/64`` or ``auto``.
        progress: Returns what ``featx status`` shows of this job: images and faults.

    Attributes:
        job: This job's number, which is its session.
        own: The number of this job's share; 0 for auto.
        of: The number of shares; 0 until ``auto`` knows it.
        heartbeat: Of this job.
    """

    def __init__(self, folder: Path, shard: str, progress: Callable[[], Json] = dict) -> None:
        self.folder = folder / NAME
        self.own, self.of = (0, 0) if shard == "auto" else tuple(map(int, shard.split("/")))
        self.job = 0
        self.heartbeat = Heartbeat(progress)
        self._gone = False
        self._jobs: dict[tuple[str, int], int] = {}  # of claims, which never change
        self._held: set[str] = set()
        self._free: list[int] = []  # shares that nobody had at the last look
        self._listing = 0  # the generation of this job's claim of the list

    @property
    def gone(self) -> bool:
        """Whether the folder was removed, because the run is finished."""
        return self._gone or self.heartbeat.gone

    def enter(self, session: int) -> None:
        """Create this job's file, with a number from ``session`` on that no other has, and begin its heartbeat."""
        with disk.reporting(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        taken = [int(name[4:]) for name in self._names() if re.fullmatch(r"job-\d+", name)]
        number, tries = max([session, *(number + 1 for number in taken)]), 0
        while not self._create(f"job-{number:06}", self.heartbeat.info()):
            tries += 1
            number += chance.randint(1, 4 * tries)
            self.folder.mkdir(parents=True, exist_ok=True)  # another job has removed it
        self.job, self._gone = number, False
        self.heartbeat.start(self.folder / f"job-{number:06}")

    def leave(self) -> None:
        """End the heartbeat; what this job has claimed and not done is free at once."""
        if not self.heartbeat.stop():
            return
        with suppress(OSError):
            if (self.folder / PLAN).exists():
                os.utime(self.heartbeat.path, (0, 0))
            else:  # there was nothing to do, or a mistake
                for path in (self.folder / f"{LIST}.{self._listing}", self.heartbeat.path):
                    path.unlink(missing_ok=True)
                self.folder.rmdir()

    def _names(self) -> list[str]:
        """Return the names of all files; after a file of this job's own was created there, NFS caches none of them."""
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            self._gone = True
            return []

    def _create(self, name: str, data: bytes, sync: bool = False) -> bool:
        """Create a file, and return whether no other job has done so before."""
        try:
            file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        except FileNotFoundError:
            self._gone = True
            return False
        except OSError as err:
            with disk.reporting(self.folder / name):
                raise err
        with disk.reporting(self.folder / name), os.fdopen(file, "wb") as opened:
            opened.write(data)
            opened.flush()
            if sync:
                os.fsync(file)
        return True

    def publish(self, name: str, data: bytes) -> bool:
        """Create a file that no other job ever sees in part, and return whether it is this job's.

        A second name for a whole file is exclusive and atomic; on a file system without hard links, only atomic.
        """
        fresh = self.folder / f"{name}.{self.job:06}.new"
        if not self._create(fresh.name, data, sync=True):
            return False
        try:
            os.link(fresh, self.folder / name)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return False
        except OSError:  # no hard links here
            if (self.folder / name).exists():
                return False
            disk.rename(fresh, self.folder / name)
        finally:
            disk.remove(fresh)
        return True

    def read(self, name: str) -> Json | None:
        """Return what ``publish`` has written as JSON, or None if it is not there."""
        try:
            return dict(json.loads((self.folder / name).read_bytes()))
        except OSError as err:
            if err.errno not in disk.GONE:
                raise
            return None

    def look(self) -> tuple[set[int], dict[str, int]]:
        """Return the shares that are done, and the latest generation of every claim."""
        done, claims = set[int](), dict[str, int]()
        for name in self._names():
            what, _, end = name.rpartition(".")
            if end == "done" and what.endswith(f"-of-{self.of:06}"):
                done.add(int(what[:6]))
            elif end.isdigit():
                claims[what] = max(claims.get(what, 0), int(end))
        return done, claims

    def name(self, share: int) -> str:
        """Return what a share is called in the names of files."""
        return f"{share:06}-of-{self.of:06}"

    def claim(self, what: str, latest: int | None = None, now: float | None = None) -> Claim | None:
        """Claim something that nobody has, or that lost jobs had; return None if a job has it.

        Args:
            what: A share, by ``name``; ``LIST`` or ``JOIN``.
            latest: The latest generation of its claim, if known.
            now: The time of a heartbeat, if just given.
        """
        latest = self.look()[1].get(what, 0) if latest is None else latest
        if latest and self._is_own(what, latest):
            latest -= 1
        else:
            free = not latest or self.is_lost(what, latest, now)
            if not free or not self._create(f"{what}.{latest + 1}", b"%d" % self.job):
                return None
        self._held.add(what)
        return Claim(what, latest + 1, self._jobs_of(what, latest + 1))

    def _is_own(self, what: str, generation: int) -> bool:
        """Whether a claim is this job's, and no share in work; NFS may create a file and then say that it was there."""
        return (what not in self._held or what in (LIST, JOIN)) and self._job_of(what, generation) == self.job

    def _jobs_of(self, what: str, end: int) -> tuple[int, ...]:
        return tuple(self._job_of(what, generation) for generation in range(1, end))

    def _job_of(self, what: str, generation: int) -> int:
        """Return the number of the job that made a claim, 0 if it was killed before it wrote that."""
        key = what, generation
        if key not in self._jobs:
            with suppress(OSError, ValueError):
                self._jobs[key] = int((self.folder / f"{what}.{generation}").read_text())
        return self._jobs.get(key, 0)

    def is_lost(self, what: str, generation: int, now: float | None = None) -> bool:
        """Whether the job that made a claim has given no heartbeat for so long that it is taken for lost."""
        now = self.heartbeat.now() if now is None else now
        for name in (f"job-{self._job_of(what, generation):06}", f"{what}.{generation}"):
            with suppress(OSError), (self.folder / name).open("rb") as file:  # opened, NFS looks at the file anew
                return now - os.fstat(file.fileno()).st_mtime > LOST
        return False

    def holder(self, what: str, generation: int) -> str:
        """Return who made a claim, for a message."""
        info = self._read_info(self._job_of(what, generation))
        return f"process {info.get('process', '?')} on {info.get('host', 'another machine')}"

    def _read_info(self, job: int) -> Json:
        try:
            return dict(json.loads((self.folder / f"job-{job:06}").read_bytes()))
        except (OSError, ValueError):
            return {}

    def take(self) -> tuple[int, Claim] | None:
        """Claim any share that is not done and that no job has, and return it; None if there is none at present."""
        for _ in range(GUESSES):  # most are still free, and a list of many names takes a network file system long
            if self._free and (claim := self.claim(self.name(share := self._free.pop()), 0)):
                return share, claim
        done, claims = self.look()
        left = [share for share in range(1, self.of + 1) if share not in done]
        chance.shuffle(left)  # jobs that look at the same time try different ones
        # The share with the short batch comes last, since it ends a job's pass.
        self._free = [share for share in left if self.name(share) not in claims]
        self._free.sort(key=lambda share: share != self.of)
        while self._free:
            if claim := self.claim(self.name(share := self._free.pop()), 0):
                return share, claim
        now = self.heartbeat.now()
        for share in [share for share in left if self.name(share) in claims][:LOOKED_AT]:
            if claim := self.claim(self.name(share), claims[self.name(share)], now):
                return share, claim
        return None

    def is_any_free(self) -> bool:
        """Whether ``take`` would find a share."""
        done, claims = self.look()
        left, now = [self.name(share) for share in range(1, self.of + 1) if share not in done], self.heartbeat.now()
        return any(what not in claims for what in left) or any(
            self._is_own(what, claims[what]) or self.is_lost(what, claims[what], now)
            for what in chance.sample(left, min(LOOKED_AT, len(left)))
        )

    def finish(self, share: int, info: Json) -> None:
        """Mark a share as done: all of its rows are on disk."""
        self._create(f"{self.name(share)}.done", json.dumps(info).encode())

    def left(self) -> int:
        """Return the number of shares that are not done."""
        return self.of - len(self.look()[0])

    def batches(self, share: int, total: int) -> range:
        """Return a share's batches, of so many in all."""
        size, more = divmod(total, self.of)  # the first ones are longer by one
        start = (share - 1) * size + min(share - 1, more)
        return range(start, start + size + (share <= more))

    def remove(self) -> None:
        """Remove the folder, as the run is finished."""
        self._gone = True
        self.heartbeat.stop(wait=False)
        remove(self.folder)

    def wait_for_plan(self) -> Json | None:
        """Return the plan when there is one, or None if this job is to make it."""
        noted = False
        while (plan := self.read(PLAN)) is None and not self.gone:
            if claim := self.claim(LIST):
                self._listing = claim.generation
                return None
            if not noted:
                noted = True
                who = self.holder(LIST, self.look()[1].get(LIST, 1))
                log.info("waiting for the list of images, which %s makes", who)
            time.sleep(BEAT / 20)
        return plan


def report(hidden: Path) -> Json | None:
    """Return how many shares of a run are done and which jobs work on others; None without jobs."""
    seen, now = Shares(hidden, "auto"), disk.now(hidden)
    names = seen._names()
    if PLAN not in names:
        return None
    numbers = [int(name.split(".")[0].split("-of-")[1]) for name in names if "-of-" in name]
    seen.of = max(numbers, default=0)
    done, claims = seen.look()
    work = []
    for what, generation in sorted(claims.items()):
        if "-of-" not in what or int(what[:6]) in done:
            continue
        job = seen._job_of(what, generation)
        with suppress(OSError):
            age = now - (seen.folder / f"job-{job:06}").stat().st_mtime
            info = seen._read_info(job)
            rate = round(info.get("images", 0) / info["seconds"], 1) if info.get("seconds") else None
            if age <= LOST:
                work.append({"share": int(what[:6]), "host": info.get("host"), "process": info.get("process"),
                             "heartbeat_seconds_ago": round(max(0.0, age)), "images_per_second": rate})  # fmt: skip
    return {"of": seen.of, "done": len(done), "in_work": work, "left": seen.of - len(done) - len(work)}


def remove(folder: Path) -> None:
    """Remove the files of jobs, the plan first, without which the others mean nothing; and then their folder."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder), key=lambda name: name != PLAN):
            if OWN.fullmatch(name):
                disk.remove(folder / name)
    with suppress(OSError):  # a late job has created a file
        folder.rmdir()


def remove_finished(hidden: Path, layers: Collection[str]) -> None:
    """Remove the folder of jobs that computed only some layers, which are finished."""
    with suppress(OSError, ValueError):
        plan = json.loads((hidden / NAME / PLAN).read_bytes())
        if plan["layers"].keys() <= set(layers):
            remove(hidden / NAME)
