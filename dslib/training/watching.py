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
        super().__init__(f"{len(ended) - 1} of {steps} steps")
        self.ended, self.steps = ended, steps


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
        norm = norm.detach().to(loss.device)
        wishes = [torch.full_like(loss, float(wish)) for wish in (stop, save)]
        values = processes.all_reduce_sum(torch.stack([loss, norm, *wishes]))
        before, self._pending = self._pending, (epoch, step, values)
        if self._late and before is not None:
            self._read(before)
        elif not self._late:
            self.flush()

    def flush(self) -> None:
        """Read what is not read yet."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending)

    def _read(self, pending: tuple[int, int, Tensor]) -> None:
        epoch, step, values = pending
        loss, norm, stop, save = values.tolist()
        what = "loss" if not math.isfinite(loss) else "gradient's norm"
        if not math.isfinite(loss) or (self._gradients and not math.isfinite(norm)):
            found = loss if what == "loss" else norm
            raise DslibError(
                f"{self._title}: the {what} is {found} at epoch {epoch + 1}, batch {step + 1}: "
                f"lower the learning rate (lr {self._lr:g})"
            )
        self.total += loss / processes.count()
        self.stop, self.save = stop > 0, save > 0


class Meter:
    """Progress, speed, and whether the loader is what the training waits for.

    Args:
        title: of the training.
        images: of all its steps together; `done` of them before this process began.
        log: is told.
        remedy: what helps when the training waits for its images.
    """

    def __init__(self, title: str, images: int, done: int, log: Log, remedy: str) -> None:
        hidden = True if processes.rank() else None  # None: hidden where there is no terminal
        self._bar = tqdm(total=images, initial=done, desc=title, unit="img", leave=False, disable=hidden)
        self._title, self._log, self._told, self._remedy = title, log, False, remedy
        self._began, self._images = time.perf_counter(), 0
        self._since, self._seconds, self._waited = self._began, 0.0, 0.0
        self._left = images - done

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """An epoch's items; the time that each but the first lets wait is counted."""
        source, first = iter(items), True
        while True:
            asked = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            if first:  # before it was an evaluation; workers begin, and decode a whole batch each
                first, self._since = False, time.perf_counter()
            else:
                self._waited += time.perf_counter() - asked
            yield item

    def step(self, images: int) -> None:
        """A step with so many images was done."""
        self._images += images
        self._bar.update(images)
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        if self._seconds < WINDOW:
            return
        if not self._told and self._waited > STALLED * self._seconds:
            self._told = True
            message = (
                f"warning: {self._title} waits for its images {self._waited / self._seconds:.0%} of the time: "
                f"{self._remedy}"
            )
            if self._log.echo is None and processes.rank() == 0:
                tqdm.write(message)
            else:
                self._log.say(message)
        self._seconds, self._waited = 0.0, 0.0

    def told(self, epochs: int, row: dict[str, Any]) -> str:
        """An epoch in one line: its numbers, images per second (evaluation included), minutes to the end."""
        rate = self._images / max(time.perf_counter() - self._began, 1e-9)
        minutes = (self._left - self._images) / max(rate, 1e-9) / 60
        accuracy = f", accuracy {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
        return (
            f"{self._title} {row['epoch']}/{epochs}: loss {row['loss']:.4f}{accuracy}; {rate:.0f} images/s, "
            f"{minutes:.0f} minutes left"
        )

    def close(self) -> None:
        """Take the progress bar away."""
        self._bar.close()


def write_history(log: Log, title: str, history: list[dict[str, Any]]) -> None:
    """The rows of a training so far, as CSV; columns that are no single numbers are left out."""
    if log.folder is None or not history or processes.rank():
        return
    import pandas as pd

    rows = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in history]
    with whole_file(log.folder / f"{title.replace(' ', '_')}.csv") as partial:
        pd.DataFrame(rows).to_csv(partial, index=False)


class Board:
    """TensorBoard's curves of a training, if `log` wants them."""

    def __init__(self, log: Log, title: str, epoch: int) -> None:
        self._writer = None
        if log.tensorboard and log.folder is not None and processes.rank() == 0:
            from tensorboardX import SummaryWriter

            folder = log.folder / "tensorboard" / title.replace(" ", "_")
            self._writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def add(self, row: dict[str, Any]) -> None:
        """One epoch's row."""
        if self._writer is None:
            return
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
