"""Images a second and time left: a bar on a terminal, a plain line now and then; and where the time went."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import TqdmWarning

from featx.errors import count, log
from featx.process.shared import ignored

STAGES = ("decode", "resize", "network", "text", "wait", "disk")


class Progress(Callback):
    """Show how far process 0 is; its share stands for the whole, since all have equally many batches, but for one.

    Args:
        total: Images, where the loader does not know it; 0: nobody does.

    Attributes:
        stages: Seconds that cores took to decode and to resize, and that process 0 waited for images.
    """

    def __init__(self, total: int = 0) -> None:
        self.stages: dict[str, float] = defaultdict(float)
        self._bar: Any = None
        self._total = total
        self._done = 0
        self._start = self._next = self._asked = 0.0

    @property
    def seconds(self) -> float:
        """From the first batch asked for until now; behind the run, until all is on disk."""
        return time.monotonic() - self._start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock, and count from nothing where another Trainer had this before."""
        self._start = time.monotonic()
        self._done = 0
        self.stages.clear()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar, or the lines."""
        if not trainer.is_global_zero:
            return
        self._start = self._asked = time.monotonic()
        self._next = self._start + 5
        if sampler := getattr(trainer.predict_dataloaders, "sampler", None):
            self._total = len(sampler)
        if sys.stderr.isatty() or "ipykernel" in sys.modules:
            with ignored("", TqdmWarning):  # where ipywidgets are missing, a notebook's bar is one of text
                from tqdm.auto import tqdm
            share = f"rank 0 of {trainer.world_size}" if trainer.world_size > 1 else None
            total = self._total or None
            self._bar = tqdm(total=total, unit=" images", desc=share, dynamic_ncols=True, smoothing=0.1)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        """Count what it took to get a batch."""
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
        elif trainer.is_global_zero and self._total and now >= self._next:
            elapsed = now - self._start
            rate = self._done / elapsed
            self._next = now + min(60, elapsed)
            share = f" of rank 0's {self._total:,}" if trainer.world_size > 1 else f" of {self._total:,}"
            left = _clock((self._total - self._done) / rate)
            log.info("%s%s images, %.1f images/s, %s left", f"{self._done:,}", share, rate, left)
        self._asked = time.monotonic()

    def teardown(self, *_: Any, **__: Any) -> None:
        """End the bar; rows are still computed and written, and the clock runs on."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = teardown


def stages(trainer: Trainer, *owners: Any) -> dict[str, float]:
    """Return the seconds of each stage so far in this process and its workers.

    Args:
        trainer: Of the run; its Progress counts, a user's callback with an attribute of that name does not.
        owners: What else has ``stages``: the FeatureExtractor and the FeatureWriter.

    decode, resize and text are seconds of a core, and so is network on a CPU; on a GPU it is what the writing thread
    waited for. wait is what the main process waited for images, disk what the writing thread did for the disk.
    """
    found = dict.fromkeys(STAGES, 0.0)
    for owner in (*owners, *(bar for bar in trainer.callbacks if isinstance(bar, Progress))):  # type: ignore[attr-defined]
        for name, seconds in owner.stages.items():
            found[name] += seconds
    return {name: round(seconds, 2) for name, seconds in found.items()}


def where_the_time_went(
    spent: dict[str, float], seconds: float, cores: int, workers: int, on_gpu: bool, turbo_saves: Callable[[], float]
) -> Iterator[str]:
    """Yield two lines: the seconds of each stage, and which of them is the wall, with a piece of advice.

    Args:
        spent: What ``stages`` returns.
        seconds: The whole run's.
        cores: That the process could use.
        workers: That decoded.
        on_gpu: Whether the network ran on a GPU.
        turbo_saves: Measures the seconds of a core that ``--data.decoder turbo`` would save; 0 where it would not.
    """
    yield "time: " + ", ".join(f"{name} {spent[name]:.1f} s" for name in STAGES) + f"; all {seconds:.1f} s"
    work = {"decoding": spent["decode"] + spent["resize"], "the network": spent["network"], "text": spent["text"]}
    on_cores = {name: value for name, value in work.items() if not (on_gpu and name == "the network")}
    busy = sum(on_cores.values()) / (cores * seconds)
    waiting = spent["wait"] > seconds / 2
    most = max(on_cores, key=lambda name: on_cores[name])
    share = f"{100 * on_cores[most] / (cores * seconds):.0f} % of {count(cores, 'core')}"
    if spent["disk"] > seconds / 2:
        yield "the disk is the wall: --writer.out_dir on a faster one would help"
    elif waiting and busy < 0.7 and workers < cores:
        yield f"decoding is the wall, and cores are idle: more --data.num_workers than {workers} would help"
    elif waiting and busy < 0.7:
        yield "reading the images is the wall: --data.dir on a faster disk, or more --data.num_workers, would help"
    elif not on_gpu and busy < 0.7:
        worked = f"{count(cores, 'core')} worked {100 * busy:.0f} % of the time"
        yield f"{worked}: other programs on this machine, or so short a run, are the wall"
    elif on_gpu and not waiting:
        yield "the network is the wall: a lower --trainer.precision, or more --trainer.devices, would help"
    elif most == "decoding" and (saved := turbo_saves()) > 0:
        yield f"decoding is the wall, {share}: --data.decoder turbo would save {saved * 1000:.1f} ms of it an image"
    else:
        others = 100 * (1 - on_cores[most] / (sum(on_cores.values()) or 1))
        yield f"{most} is the wall, {share}: more cores would help; all else is {others:.0f} % of the work"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
