"""Images a second and time left: a bar on a terminal, a plain line now and then in a file."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from featx.messages import log


class Progress(Callback):
    """Show how far process 0 is; its share stands for the whole, since all have equally many batches, but for one.

    Attributes:
        seconds: From the first batch asked for to the last one written.
        error: What ended the run early.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._bar: Any = None
        self._total = self._done = 0
        self._start = self._next = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar, or the lines."""
        if not trainer.is_global_zero:
            return
        self._start = time.monotonic()
        self._next = self._start + 5
        self._total = len(trainer.predict_dataloaders.sampler)  # type: ignore[union-attr]
        if sys.stderr.isatty():
            share = f"rank 0 of {trainer.world_size}" if trainer.world_size > 1 else None
            self._bar = tqdm(total=self._total, unit=" images", desc=share, dynamic_ncols=True, smoothing=0.1)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
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
            share = f" of rank 0's {self._total:,}" if trainer.world_size > 1 else f" of {self._total:,}"
            left = _clock((self._total - self._done) / rate)
            log.info("%s%s images, %.1f images/s, %s left", f"{self._done:,}", share, rate, left)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the bar and stop the clock."""
        self.seconds = time.monotonic() - self._start
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the bar and keep what happened."""
        self.error = exception
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
