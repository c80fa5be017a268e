"""Jobs without a network: 50 processes, or as many as asked for, that claim, journal and join shares of made-up rows.

``python tests/writer/jobs.py OUT_DIR --shares 1000 --processes 50`` prints how long that takes; docs/machines.md says
what it means. Under ``strace -f -y`` it shows the operations on the folder.
"""

import argparse
import hashlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from featx.writer import shares
from featx.writer.folder import LayerState
from featx.writer.job import Job, is_finished
from featx.writer.join import finish
from featx.writer.journal import Entry, Part

IDENTITY = {"shard_rows": None, "batch_size": 2, "names": "basename", "header": False, "dtype": "float32"}


class Images:
    """Two made-up images per batch."""

    def __init__(self, batches: int) -> None:
        self.names = [f"{number:06}.png" for number in range(2 * batches)]
        self.sizes = self.stamps = np.zeros(2 * batches, np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        return hashlib.sha256("".join(self.names).encode()).hexdigest()

    digest_of_names = digest


def work(out: Path, batches: int) -> None:
    """Take shares until all are done, as a FeatureWriter does, and join them if they were the last."""
    images = Images(batches)
    state = LayerState(out, "fc7", 4, ["csv"], IDENTITY, images, {})
    states = {"fc7": state}
    job = Job(out / ".featx", "auto", 0, dict)
    data = SimpleNamespace(images=images, files=None, batch_size=2, dir="photos", restore=lambda rows: list(rows))
    job.enter(data)
    job.agree(states, states, data, ["csv"], "none", False)
    again = True
    while again and not is_finished(states):
        session, left = job.begin(states, data, lambda fault: True, None)
        part, stem = None, ""
        for batch in job.deal(session, left, 0, 1):
            if stem != (stem := job.part(batch)):
                if part is not None:
                    part.sync()
                    part.close()
                job.mark_done(batch)
                part = Part(state.folder, stem, state.digest, {"csv": b""})
            rows = b"".join(b"%b,0.5,1.5,2.5,%d.0\n" % (name.encode(), batch) for name in images.names[2 * batch :][:2])
            part.add(Entry(batch, 2, 4, (0, 0, 0), {}, "none", [], {}, {}), {"csv": rows})
        if part is not None:
            part.sync()
            part.close()
        job.mark_done()
        what = job.conclude(states)
        if what == "join":
            begun = time.monotonic()
            finish(state, job.missing(states, batches)["fc7"], {}, {}, f"{session:06}-joined", copy=True)
            job.shares.remove()
            print(f"joined in {time.monotonic() - begun:.1f} s", flush=True)
        again = what == "again"
    job.shares.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--shares", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=50)
    options = parser.parse_args()
    shares.FEWEST = options.shares
    begun, jobs = time.monotonic(), []
    for _ in range(options.processes):
        if not (pid := os.fork()):
            work(options.out_dir, 2 * options.shares)
            os._exit(0)
        jobs.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in jobs)
    print(f"{options.shares} shares, {options.processes} processes: {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
