"""Progress of a run: a bar on a terminal, a line now and then in a log; and where the time went."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import TqdmWarning

from featx.errors import count, log
from featx.process.shared import ignored

STAGES = ("decode", "resize", "network", "text", "wait", "disk")


class Progress(Callback):
    """Show the progress of rank 0, which stands for all: their numbers of batches differ by one at most.

    Args:
        total: Number of images, if the loader does not know it; 0: unknown.

    Attributes:
        stages: Core seconds for decoding and resizing, and the seconds that rank 0 waited for images.
    """

    def __init__(self, total: int = 0) -> None:
        self.stages: dict[str, float] = defaultdict(float)
        self._bar: Any = None
        self._total = total
        self._done = 0
        self._start = self._next = self._asked = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the first batch was requested."""
        return time.monotonic() - self._start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock and reset the counts, in case another Trainer has used this callback."""
        self._start = time.monotonic()
        self._done = 0
        self.stages.clear()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar, or the lines."""
        if not trainer.is_global_zero:
            return
        self._start = self._asked = time.monotonic()
        self._next = self._start + 5
        if (sampler := getattr(trainer.predict_dataloaders, "sampler", None)) is not None:
            with suppress(TypeError):  # with --data.shard auto
                self._total = len(sampler)
        if sys.stderr.isatty() or "ipykernel" in sys.modules:
            with ignored("", TqdmWarning):  # where ipywidgets are missing, a notebook's bar is one of text
                from tqdm.auto import tqdm
            share = f"rank 0 of {trainer.world_size}" if trainer.world_size > 1 else None
            total = self._total or None
            self._bar = tqdm(total=total, unit=" images", desc=share, dynamic_ncols=True, smoothing=0.1)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        """Add the time that a batch took to arrive."""
        self.stages["wait"] += time.monotonic() - self._asked
        for stage, seconds in zip(("decode", "resize"), batch.seconds, strict=True):
            self.stages[stage] += seconds

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count a batch."""
        self._done += batch.size
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(batch.size)
        elif trainer.is_global_zero and now >= self._next:
            elapsed = now - self._start
            rate = self._done / elapsed
            self._next = now + min(60, elapsed)
            if not self._total:
                log.info("%s images, %.1f images/s", f"{self._done:,}", rate)
                return
            share = f" of rank 0's {self._total:,}" if trainer.world_size > 1 else f" of {self._total:,}"
            left = _clock((self._total - self._done) / rate)
            log.info("%s%s images, %.1f images/s, %s left", f"{self._done:,}", share, rate, left)
        self._asked = time.monotonic()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Close the bar; the clock keeps running, since rows are still being computed and written."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = teardown


def stages(trainer: Trainer, *owners: Any) -> dict[str, float]:
    """Return the seconds of each stage so far, in this process and its workers.

    decode, resize and text are core seconds. So is network on a CPU; on a GPU it is the time that the writing thread
    waited for results. wait is the time that the main process waited for images, disk the time spent writing.

    Args:
        trainer: The run's; only its Progress callback counts, not a user's callback with a ``stages`` attribute.
        owners: Other objects with ``stages``: the FeatureExtractor and the FeatureWriter.
    """
    found = dict.fromkeys(STAGES, 0.0)
    for owner in (*owners, *(bar for bar in trainer.callbacks if isinstance(bar, Progress))):  # type: ignore[attr-defined]
        for name, seconds in owner.stages.items():
            found[name] += seconds
    return {name: round(seconds, 2) for name, seconds in found.items()}


def bottleneck(
    spent: dict[str, float], seconds: float, cores: int, workers: int, on_gpu: bool, turbo_saves: Callable[[], float]
) -> str:
    """Return the bottleneck of a run, with a piece of advice.

    Args:
        spent: What ``stages`` returns.
        seconds: Duration of the run.
        cores: Number of cores that the process could use.
        workers: Number of data workers.
        on_gpu: Whether the network ran on a GPU.
        turbo_saves: Measures the core seconds per image that ``--data.decoder turbo`` would save, or returns 0.
    """
    work = {"decoding": spent["decode"] + spent["resize"], "the network": spent["network"], "text": spent["text"]}
    on_cores = {name: value for name, value in work.items() if not (on_gpu and name == "the network")}
    busy = sum(on_cores.values()) / (cores * seconds)
    waiting = spent["wait"] > seconds / 2
    most = max(on_cores, key=lambda name: on_cores[name])
    share = f"({100 * on_cores[most] / (cores * seconds):.0f}% of {count(cores, 'core')})"
    if spent["disk"] > seconds / 2:
        return "the disk; --writer.out_dir on a faster one would help"
    if waiting and busy < 0.7 and workers < cores:
        return f"decoding, while cores are idle; more --data.num_workers than {workers} would help"
    if waiting and busy < 0.7:
        return "reading the images; --data.dir on a faster disk or more --data.num_workers would help"
    if not on_gpu and busy < 0.7:
        return f"none; {count(cores, 'core')} {100 * busy:.0f}% busy: a short run, or other programs on this machine"
    if on_gpu and not waiting:
        return "the network; a lower --trainer.precision or more --trainer.devices would help"
    if most == "decoding" and (saved := turbo_saves()) > 0:
        return f"decoding {share}; --data.decoder turbo would save {saved * 1000:.1f} ms per image"
    return f"{most} {share}; more cores would help"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
