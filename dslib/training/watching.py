"""What watches a training: is the loss a number, must it stop or save, how quick is it, and who is told."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import DslibError
from ..records import whole_file
from . import processes
from .feeding import Feed
from .settings import Train
from .state import History

T = TypeVar("T")
STALLED, WINDOW = 0.25, 20.0  # share of the time spent waiting for images, over so many seconds of training
IMPATIENT = 3.0  # seconds


@dataclass(frozen=True)
class Log:
    """Where a training tells how it goes.

    Args:
        folder: for `<title>.csv`, one row an epoch; None writes none.
        tensorboard: whether `<folder>/tensorboard/<title>` gets TensorBoard's curves too.
        echo: is told of every epoch, and of what slows the training; None is silent.
        steps: a trial: the training ends by `Enough` after so many steps.
    """

    folder: Path | None = None
    tensorboard: bool = False
    echo: Callable[[str], object] | None = None
    steps: int | None = None

    def say(self, text: str) -> None:
        """Tell it, once for all processes."""
        if self.echo is not None and processes.rank() == 0:
            self.echo(text)


class Enough(Exception):
    """A trial's outcome: when it began and each step ended (s), and how many steps the whole training would have."""

    def __init__(self, ended: list[float], steps: int) -> None:
        super().__init__(ended, steps)  # what pickle calls it with again
        self.ended, self.steps = ended, steps

    def __str__(self) -> str:
        """How far the trial went."""
        return f"{len(self.ended) - 1} of {self.steps} steps"


class Stopping:
    """SIGINT and SIGTERM end a training after the step in progress; between steps at once, while it saves not at all.

    Whoever presses Ctrl-C again some seconds later ends it in the middle of a step. What launches several processes
    sends a second signal as a matter of course: that one does no harm.

    Args:
        active: False leaves signals as they are; so does any thread but the main one.
    """

    def __init__(self, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self.wanted, self.stepping, self._saving, self._since = False, False, False, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # a background job ignores Ctrl-C
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block a signal is only noted."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _note(self, number: int, _: object) -> None:
        again = self.wanted and number == signal.SIGINT and time.monotonic() - self._since > IMPATIENT
        if not self._saving and (again or not self.stepping):
            raise KeyboardInterrupt
        if not self.wanted:
            self.wanted, self._since = True, time.monotonic()


class Pulse:
    """Each step's loss and gradient norm, and what any process wishes; all processes learn the same of the same step.

    On a GPU they are read one step late, so that nobody waits for it.

    Args:
        title, lr: for the message when the loss is not finite.
        device: that trains.
        gradients: whether the gradient's norm must be finite too; not with a float16 scaler, which tries.
    """

    def __init__(self, title: str, lr: float, device: torch.device, gradients: bool) -> None:
        self._title, self._lr, self._late, self._gradients = title, lr, device.type != "cpu", gradients
        self._pending: tuple[int, int, Tensor] | None = None
        self.total, self.stop, self.save = 0.0, False, False

    def beat(self, epoch: int, step: int, loss: Tensor, norm: Tensor, stop: bool, save: bool) -> None:
        """Take this step's values, and read those that are due; `total` is the sum of losses read in this epoch.

        Raises:
            DslibError: for a loss or gradient that is not finite, naming epoch and batch.
        """
        wishes = [torch.full_like(loss, float(wish)) for wish in (stop, save)]
        values = processes.all_reduce_sum(torch.stack([loss, norm.detach().to(loss.device), *wishes]))
        before, self._pending = self._pending, (epoch, step, values)
        if not self._late:
            self.flush()
        elif before is not None:
            self._read(*before)

    def flush(self) -> None:
        """Read what is not read yet."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(*pending)

    def _read(self, epoch: int, step: int, values: Tensor) -> None:
        loss, norm, stop, save = values.tolist()
        for what, value in (("loss", loss), *([("gradient's norm", norm)] if self._gradients else [])):
            if not math.isfinite(value):
                raise DslibError(
                    f"{self._title}: the {what} is {value} at epoch {epoch + 1}, batch {step + 1}: "
                    f"lower the learning rate (lr {self._lr:g})"
                )
        self.total += loss / processes.count()
        self.stop, self.save = stop > 0, save > 0


class Reporter:
    """Tells how a training goes: a progress bar, a line, a CSV row and TensorBoard's points an epoch.

    It also warns once if the training waits for its images, and ends a trial.

    Args:
        log: where it tells.
        title: of the training.
        config, feed: of the training.
        history: its rows so far.
        done: its steps so far.
    """

    def __init__(self, log: Log, title: str, config: Train, feed: Feed, history: History, done: int) -> None:
        self._log, self._title, self._config, self._feed, self._done = log, title, config, feed, done
        self._steps, self._batch = feed.steps * config.epochs, config.batch_size
        hidden = True if processes.rank() else None  # None: hidden where there is no terminal
        images = [steps * self._batch for steps in (self._steps, done)]
        self._bar = tqdm(total=images[0], initial=images[1], desc=title, unit="img", leave=False, disable=hidden)
        self._began = self._since = time.perf_counter()
        self._ended, self._made = [self._began], 0
        self._seconds, self._waited, self._warned = 0.0, 0.0, False
        self._file, self._board = title.replace(" ", "_"), None
        self._writes = log.folder is not None and processes.rank() == 0
        if log.tensorboard and self._writes:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(f"{log.folder}/tensorboard/{self._file}", purge_step=len(history) + 1)
        self._write(history)

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """An epoch's items; the time that each but the first lets wait is counted."""
        asked = None
        for item in items:
            now = time.perf_counter()
            if asked is None:  # before it was an evaluation; workers begin, and decode a whole batch each
                self._since = now
            else:
                self._waited += now - asked
            yield item
            asked = time.perf_counter()

    def step(self) -> None:
        """A step was done.

        Raises:
            Enough: after the last step of a trial.
        """
        now = time.perf_counter()
        self._bar.update(self._batch)
        self._made, self._seconds, self._since = self._made + 1, self._seconds + now - self._since, now
        if self._log.steps is not None:
            self._ended.append(now)
            if self._made >= self._log.steps:
                raise Enough(self._ended, self._steps)
        if self._seconds >= WINDOW:
            if not self._warned and self._waited > STALLED * self._seconds:
                self._warn(self._waited / self._seconds)
            self._seconds, self._waited = 0.0, 0.0

    def epoch(self, history: History) -> None:
        """An epoch was done: its numbers, images per second (evaluation included), minutes to the end."""
        row = history[-1]
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()
        self._write(history)
        rate = self._made * self._batch / max(time.perf_counter() - self._began, 1e-9)
        minutes = (self._steps - self._done - self._made) * self._batch / max(rate, 1e-9) / 60
        accuracy = f", accuracy {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
        self._log.say(
            f"{self._title} {row['epoch']}/{self._config.epochs}: loss {row['loss']:.4f}{accuracy}; {rate:.0f} "
            f"images/s, {minutes:.0f} minutes left"
        )

    def close(self) -> None:
        """Take the progress bar away, and write what is left."""
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _warn(self, share: float) -> None:
        self._warned = True
        message = f"warning: {self._title} waits for its images {share:.0%} of the time: {self._feed.remedy}"
        if self._log.echo is None and processes.rank() == 0:
            tqdm.write(message)
        else:
            self._log.say(message)

    def _write(self, history: History) -> None:
        """The rows so far, as CSV; columns that are no single numbers are left out."""
        if not self._writes or not history:
            return
        import pandas as pd

        rows = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in history]
        with whole_file(f"{self._log.folder}/{self._file}.csv") as partial:
            pd.DataFrame(rows).to_csv(partial, index=False)
