"""Rows -> parts: a thread that formats what was computed, writes it, and syncs as often as that costs little."""

import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from featx.data.batch import Batch
from featx.errors import UserError
from featx.writer.folder import LayerState
from featx.writer.formats import row_name
from featx.writer.journal import Entry, Part

WAITING = 4  # batches that may wait for the disk, besides those that are computed; then the network waits
SHARE = 1 / 10  # of the time goes to syncs at most, as long as they are not LONGEST apart
LONGEST = 10.0  # seconds


class RowStream:
    """Takes batches of rows from the main thread and brings them to disk; begins with its first batch.

    Args:
        states: Of each layer what its folder holds, and so which parts there are to be.
        stem: What the names of this process's parts begin with.
        device: What computes the rows, as the journal calls it.
        on_gpu: Whether it is a GPU, for which the thread waits.
        first: The first batch's number.
        computing: Batches that may still be computed while they wait here.

    Attributes:
        computed: Images so far.
        stages: Seconds for text, for the disk and, where a GPU computes, waited for the network.
    """

    def __init__(
        self, states: Mapping[str, LayerState], stem: str, device: str, on_gpu: bool, first: int, computing: int
    ) -> None:
        self.computed = 0
        self.stages: dict[str, float] = defaultdict(float)
        self._states = states
        self._stem = stem
        self._device = device
        self._on_gpu = on_gpu
        self._parts: dict[str, Part] = {}  # of the shard that is being written
        self._shard = -1
        self._finished: dict[Path, str] = {}  # SHA-256 of the parts before
        self._failure: BaseException | None = None
        self._queue: queue.Queue[tuple[Batch, Mapping[str, Tensor]] | None] = queue.Queue(WAITING + computing)
        self._turn_to(first)
        self._thread = threading.Thread(target=self._write_all, name="featx-writer", daemon=True)
        self._thread.start()

    def put(self, batch: Batch, features: Mapping[str, Tensor]) -> None:
        """Hand over a batch with its rows, ``(B, D) float32`` of each layer; wait while too many wait.

        Raises:
            BaseException: What the thread ended with.
        """
        while self._failure is None:
            with suppress(queue.Full):
                return self._queue.put((batch, features), timeout=1)
        raise self._failure

    def end(self, seconds: float | None = None) -> None:
        """Wait until all is on disk, or for so many seconds, however the thread ends."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=seconds)
            except queue.Full:
                return
            self._thread.join(seconds)

    def finish(self) -> None:
        """Wait until all is on disk.

        Raises:
            BaseException: What the thread ended with.
        """
        while self._thread.is_alive():
            self.end(1)
        if self._failure is not None:
            raise self._failure

    def digests(self) -> dict[Path, str]:
        """Return the SHA-256 of each part's files, as they were written."""
        found = dict(self._finished)
        for part in self._parts.values():
            found |= part.digests()
        return found

    def close(self) -> None:
        """Close the parts, without a sync."""
        for part in self._parts.values():
            part.close()
        self._parts = {}

    def _write_all(self) -> None:
        try:
            last, cost, waiting = time.monotonic(), 0.0, False
            while True:
                due = last + min(cost / SHARE, LONGEST)
                with suppress(queue.Empty):
                    item = self._queue.get(timeout=max(0.0, due - time.monotonic()) if waiting else None)
                    if item is None:
                        break
                    self._write(*item)
                    waiting = True
                if time.monotonic() >= due:
                    begin = time.monotonic()
                    self._sync()
                    last = time.monotonic()
                    cost, waiting = last - begin, False
            self._sync()
        except BaseException as err:  # the main thread raises it
            self._failure = err

    def _sync(self) -> None:
        begin = time.monotonic()
        for part in self._parts.values():
            part.sync()
        self.stages["disk"] += time.monotonic() - begin

    def _turn_to(self, batch: int) -> None:
        """Begin the parts of the shard that a batch belongs to, with those before brought to disk."""
        shard = next(iter(self._states.values())).shard_of(batch)
        if shard != self._shard:
            self._sync()
            self._finished = self.digests()
            self.close()
            self._shard = shard
            for layer, state in self._states.items():
                one = state.shards[shard]
                self._parts[layer] = Part(state.folder, self._stem + one.label, state.digest, state.heads(one))

    def _write(self, batch: Batch, features: Mapping[str, Tensor]) -> None:
        begin = time.monotonic()
        rows = {layer: values.cpu().numpy() for layer, values in features.items()}
        if self._on_gpu:
            self.stages["network"] += time.monotonic() - begin
        self._turn_to(batch.number)
        for layer, state in self._states.items():
            names = [os.fsencode(row_name(path, state.identity["names"])) for path in batch.names]
            values = rows.get(layer, np.empty((0, state.columns), np.float32))  # (B, D)
            assert len(values) == len(names), f"{layer}: {len(values)} rows for {len(names)} images"
            if len(names) and values.shape[1] != state.columns:
                raise UserError(
                    f"--model.layer {layer}: from {batch.names[0]} on {values.shape[1]} columns, expected "
                    f"{state.columns} as before. Rows differ with the images' shapes.\n"
                    "Give them one shape with --data.crop, or take a layer after the pooling."
                )
            begin = time.thread_time()
            odd = ~np.isfinite(values)
            encoded = {part: format.encode(names, values) for part, format in state.parts.items()}
            self.stages["text"] += time.thread_time() - begin
            begin, columns = time.monotonic(), state.columns
            counts = int(odd.any(axis=1).sum()), int(odd.sum()), sum(number for _, number in encoded.values())
            entry = Entry(
                batch.number, len(names), columns, counts, {}, self._device, batch.faults, batch.readers, batch.remarks
            )
            self._parts[layer].add(entry, {part: data for part, (data, _) in encoded.items()})
            self.stages["disk"] += time.monotonic() - begin
        self.computed += batch.size
