"""Rows -> parts: a thread that encodes the rows, writes them, and syncs as often as that costs little."""

import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from featx.data.batch import Batch, with_zero_rows
from featx.errors import UserError
from featx.writer.folder import LayerState
from featx.writer.formats import row_name
from featx.writer.journal import Entry, Part

MAX_QUEUED = 4  # batches waiting for the disk, besides those still being computed; then the network waits
SYNC_SHARE = 1 / 10  # of the time may be spent on syncs, unless they would be more than MAX_UNSYNCED apart
MAX_UNSYNCED = 10.0  # seconds


class RowStream:
    """Takes batches of rows from the main thread and writes them to disk in a thread of its own.

    Args:
        states: The folder of each layer, with the parts to write.
        stem: Returns the prefix of this process's file names for a batch.
        device: The device that computes the rows, for the journal.
        on_gpu: Whether it is a GPU, which the thread waits for.
        first: The number of the first batch, if it is known; its parts are opened at once.
        computing: Maximum number of queued batches that are still being computed.
        moved_on: Called with a batch of another prefix when all rows before it are on disk.

    Attributes:
        computed: Images so far.
        listed: Images without a row so far.
        stages: Seconds spent on text, on the disk and, with a GPU, waiting for the network.
    """

    def __init__(
        self,
        states: Mapping[str, LayerState],
        stem: Callable[[int], str],
        device: str,
        on_gpu: bool,
        first: int | None,
        computing: int,
        moved_on: Callable[[int], None] | None = None,
    ) -> None:
        self.computed = self.listed = 0
        self.stages: dict[str, float] = defaultdict(float)
        self._states = states
        self._stem = stem
        self._device = device
        self._on_gpu = on_gpu
        self._parts: dict[str, Part] = {}  # of the current shard
        self._shard: tuple[str, int] | None = None
        self._moved_on = moved_on
        self._finished: dict[Path, str] = {}  # SHA-256 of the parts of earlier shards
        self._failure: BaseException | None = None
        self._queue: queue.Queue[tuple[Batch, Mapping[str, Tensor]] | None] = queue.Queue(MAX_QUEUED + computing)
        if first is not None:
            self._open_shard_of(first)
        self._thread = threading.Thread(target=self._write_all, name="featx-writer", daemon=True)
        self._thread.start()

    def put(self, batch: Batch, features: Mapping[str, Tensor]) -> None:
        """Queue a batch with its rows, ``(B, D) float32`` per layer; wait while the queue is full.

        Raises:
            BaseException: The thread's failure.
        """
        while self._failure is None:
            with suppress(queue.Full):
                return self._queue.put((batch, features), timeout=1)
        raise self._failure

    def end(self, seconds: float | None = None) -> None:
        """Wait until all rows are on disk, the thread has failed, or so many seconds have passed."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=seconds)
            except queue.Full:
                return
            self._thread.join(seconds)

    def finish(self) -> None:
        """Wait until all rows are on disk.

        Raises:
            BaseException: The thread's failure.
        """
        while self._thread.is_alive():
            self.end(1)
        if self._failure is not None:
            raise self._failure

    def digests(self) -> dict[Path, str]:
        """Return the SHA-256 of each part's files as written."""
        found = dict(self._finished)
        for part in self._parts.values():
            found |= part.digests()
        return found

    def close(self) -> None:
        """Close the parts without a sync."""
        for part in self._parts.values():
            part.close()
        self._parts = {}

    def _write_all(self) -> None:
        try:
            last, cost, unsynced = time.monotonic(), 0.0, False
            while True:
                due = last + min(cost / SYNC_SHARE, MAX_UNSYNCED)
                with suppress(queue.Empty):
                    item = self._queue.get(timeout=max(0.0, due - time.monotonic()) if unsynced else None)
                    if item is None:
                        break
                    self._write(*item)
                    unsynced = True
                if time.monotonic() >= due:
                    begin = time.monotonic()
                    self._sync()
                    last = time.monotonic()
                    cost, unsynced = last - begin, False
            self._sync()
        except BaseException as err:  # the main thread raises it
            self._failure = err

    def _sync(self) -> None:
        begin = time.monotonic()
        for part in self._parts.values():
            part.sync()
        self.stages["disk"] += time.monotonic() - begin

    def _open_shard_of(self, batch: int) -> None:
        """Open the parts of a batch's shard, after bringing those of the shard before it to disk."""
        shard = self._stem(batch), next(iter(self._states.values())).shard_of(batch)
        if shard != self._shard:
            self._sync()
            self._finished = self.digests()
            self.close()
            if self._moved_on is not None:
                self._moved_on(batch)
            self._shard = shard
            for layer, state in self._states.items():
                one = state.shards[shard[1]]
                self._parts[layer] = Part(state.folder, shard[0] + one.label, state.digest, state.heads(one))

    def _write(self, batch: Batch, features: Mapping[str, Tensor]) -> None:
        begin = time.monotonic()
        rows = {layer: values.cpu().numpy() for layer, values in features.items()}
        if self._on_gpu:
            self.stages["network"] += time.monotonic() - begin
        self._open_shard_of(batch.number)
        for layer, state in self._states.items():
            names = [os.fsencode(row_name(path, state.identity["names"])) for path in batch.names]
            values = rows.get(layer, np.empty((0, state.columns), np.float32))  # (B, D)
            assert len(values) == len(names), f"{layer}: {len(values)} rows for {len(names)} images"
            if len(names) and values.shape[1] != state.columns:
                raise UserError(
                    f"--model.layer {layer}: {values.shape[1]} columns from {batch.names[0]} on, expected "
                    f"{state.columns} as before. The number depends on the image's shape.\n"
                    "Crop all images to one shape with --data.crop, or use a layer after the pooling."
                )
            begin = time.thread_time()
            not_finite = (~np.isfinite(values)).sum(axis=1)  # (B,)
            encoded = {part: format.encode(names, values) for part, format in state.parts.items()}
            self.stages["text"] += time.thread_time() - begin
            begin, columns = time.monotonic(), state.columns
            overflowed = sum(number for _, number in encoded.values())
            remarked = with_zero_rows(batch, values) if state.identity.get("normalize") else batch
            counts = int(np.count_nonzero(not_finite)), int(not_finite.sum()), overflowed
            noted = {name: [0, 0, *kinds] for name, kinds in remarked.remarkable.items()}
            if overflowed or counts[1]:
                with np.errstate(over="ignore"):
                    infinite = (np.isinf(values.astype(state.identity["dtype"])) & np.isfinite(values)).sum(axis=1)
                for row in np.flatnonzero(not_finite + infinite):
                    kinds = remarked.remarkable.get(batch.names[row], [])
                    noted[batch.names[row]] = [int(not_finite[row]), int(infinite[row]), *kinds]
            made = self._device, batch.faults, batch.readers, remarked.remarks, noted
            entry = Entry(batch.number, len(names), columns, counts, {}, *made)
            self._parts[layer].add(entry, {part: data for part, (data, _) in encoded.items()})
            self.stages["disk"] += time.monotonic() - begin
        self.computed += batch.size
        self.listed += sum(not fault.used for fault in batch.faults)
