"""What a benchmark is: settings and an answer that is measured; its record, resumed and shared, follows from these.

A file of this package is a benchmark, named like it, if it holds a `BENCHMARK`. The first line of its docstring is the
question that it answers; the command line is derived from it, see `dslib.cli.bench`.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ..algebra import in_channels
from ..data import load_data
from ..errors import BadConfig, BadModel, DslibError, first_line
from ..measuring import Timing, pick_device, this_machine
from ..models import load_model
from ..records import Record, as_options, as_words, commit
from ..sites import Sites, find_sites
from .settings import BenchSettings

PAUSE = 5.0  # seconds between two looks at what others make
Values = dict[str, Any]


class Row(NamedTuple):
    """A row that is wanted.

    Args:
        key: what is measured.
        make: measures it; None where it cannot be made, as what it needs is missing.
        keep_errors: one that could not be measured then says why under `error`, and is tried again the next time.
        short: made also when the hours are over.
        told: the line that is told of it.
    """

    key: Values
    make: Callable[[], Mapping[str, Any]] | None
    keep_errors: bool = False
    short: bool = False
    told: Callable[[Values], str] | None = None


# A generator is given each row that it asks for as it then stands (its key alone if it could not be begun); for a list
# of rows a list. A dictionary is of values that stand in the record beside its rows.
Steps = Generator[Row | Sequence[Row] | Values, Any, None]
S = TypeVar("S", bound=BenchSettings)


class Context(Generic[S]):
    """What a benchmark measures with.

    Args:
        config: as given; with `data` and `device` filled in it is `config`.
        out: the record's file, or None.
        echo: is told how it goes.
    """

    def __init__(self, config: S, out: Path | None, echo: Callable[[str], object]) -> None:
        self.out, self.echo = out, echo
        asked: Any = config
        known: Values = {}
        if getattr(config, "device", None):
            known["device"] = str(pick_device(asked.device))
        if hasattr(config, "data"):
            self.data = load_data(asked.data, getattr(config, "image_size", None))
            known |= {"image_size": self.data.image_size} if hasattr(config, "image_size") else {}
        self.device = torch.device(known.get("device", "cpu"))
        self.config: S = replace(config, **known)

    @cached_property
    def trained(self) -> tuple[nn.Module, Sites]:
        """The settings' network, in eval and on the device, and its sites.

        Raises:
            BadModel: if it is not trained for the data's classes.
        """
        config: Any = self.config
        weights = getattr(config, "weights", "default")
        network, is_trained = load_model(config.model, self.data.classes, weights, model_options(config))
        if not is_trained:
            raise BadModel(
                f"{config.model} with weights {weights!r} is not trained for the classes of {config.data}: "
                "give weights that are"
            )
        network = network.to(self.device).eval()
        return network, find_sites(network, self.data.image_size)


@dataclass(frozen=True)
class Benchmark(Generic[S]):
    """A question and how it is answered.

    Args:
        group: questions that it stands among, for `dslib bench`.
        settings: the class of its settings.
        answer: (settings, context) -> the record's values; or a generator of rows, which are kept as they come; or,
            for a benchmark that measures something of another record anew, a whole record.
        told: the lines that are told at the end; or one, a format of the record's values.
        selecting: settings that only say which rows there are: a record may grow by them.
        idle: whether rows that were measured on a busy machine are measured again.
        shared: whether several processes may make rows of one record at the same time.
        out: whether the record's file is optional, required, or there is none.
    """

    group: str
    settings: type[S]
    answer: Callable[[S, Context[S]], Values | Record | Steps]
    told: str | Callable[[Record], Iterable[str]] = ""
    selecting: tuple[str, ...] = ()
    idle: bool = False
    shared: bool = False
    out: str = "optional"

    @property
    def name(self) -> str:
        """Its file's."""
        return self.answer.__module__.rpartition(".")[2]

    @property
    def has_rows(self) -> bool:
        """Whether its rows are kept as they come."""
        return inspect.isgeneratorfunction(self.answer)

    def run(
        self,
        config: S | None = None,
        out: Path | None = None,
        hours: float | None = None,
        echo: Callable[[str], object] = print,
    ) -> Record:
        """Measure, and write the record.

        Args:
            config: what is measured.
            out: the record's file; rows that stand there are not made again.
            hours: no row is begun after so many; those that are missing are told.
            echo: is told how it goes, and the outcome.
        Raises:
            BadConfig: as `Rows`.
        """
        context = Context(config or self.settings(), out, echo)
        made = self.answer(context.config, context)
        missing: list[str] = []
        if isinstance(made, Generator):
            rows = Rows(self._record(context, {}), out, self.idle, self.selecting, hours, self.shared)
            rows.fill(made, echo)
            record, missing = rows.record, rows.missing
        else:
            record = made if isinstance(made, Record) else self._record(context, made)
            if out is not None:
                echo(f"written: {record.save(out)}")
        for line in missing:
            echo(f"missing: {line} (the same command with the same --out makes it)")
        if isinstance(self.told, str):
            echo(self.told.format(**record.values)) if self.told else None
        else:
            for line in self.told(record):
                echo(line)
        return record

    def command(self, config: S, out: Path | None = None) -> str:
        """What to type to get the record of these settings."""
        words = [f"dslib bench {self.name}"]
        for each in _recorded(config):
            value, option = getattr(config, each.name), each.metadata.get("option", each.name)
            if each.type == "bool":
                words += [f"--{'' if value else 'no-'}{option}"] if value != each.default else []
            elif each.init and value not in (None, (), {}):
                words.append(as_words({option: as_options(value) if isinstance(value, dict) else value}))
        return " ".join([*words, *([] if out is None else [as_words({"out": out})])])

    def config_of(self, config: S) -> Values:
        """What a record keeps of its settings."""
        kept = {each.name: getattr(config, each.name) for each in _recorded(config)}
        for each in _recorded(config):
            if each.type.startswith("dict"):
                kept[each.name] = as_options(kept[each.name])
            elif each.type == "Path":
                kept[each.name] = str(kept[each.name])
        return kept

    def _record(self, context: Context[S], values: Values) -> Record:
        command, config = self.command(context.config), self.config_of(context.config)
        return Record(self.name, command, config, values, this_machine(context.device), commit())


def model_options(config: Any) -> dict[str, Any] | None:
    """The keyword arguments for the settings' model."""
    return getattr(config, "model_option", None) or getattr(config, "options", None)


def noise(network: nn.Module, count: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Images without content, (count, C, size, size), with the network's channels."""
    return torch.randn(count, in_channels(network), size, size, device=device)


def speedup_of(timing: Timing, name: str, over: str, key: str = "speedup", prefix: str = "") -> Values:
    """A row's `speedup` and its quartiles."""
    ratio, low, high = timing.speedup(name, over=over)
    return {key: ratio, f"{prefix}q25": low, f"{prefix}q75": high}


def in_turns_values(timing: Timing, name: str, over: str, key: str) -> Values:
    """The values of a benchmark that times two ways, and how many times as long `over` takes."""
    return {
        "networks": timing.frame.T.to_dict(),
        **speedup_of(timing, name, over, key),
        "busy": timing.busy,
        "others": timing.others,
        "runtime": timing.runtime,
    }


class Rows:
    """The rows of a record: each says what was measured (its key), and what came out.

    They are kept in its file as they come: an interrupted benchmark goes on where it stopped.

    Args:
        record: with the settings, without rows.
        out: the record's file; rows that stand there are not measured again. None keeps nothing.
        idle, selecting, shared: as for `Benchmark`; the record of a file with other `selecting` is of both.
        hours: no row is begun after so many; those that are not are `missing`.
    Raises:
        BadConfig: if the file is a record of other settings, or of another machine; or if another process writes it,
            which it shares with none.
    """

    def __init__(
        self,
        record: Record,
        out: Path | None = None,
        idle: bool = False,
        selecting: Collection[str] = (),
        hours: float | None = None,
        shared: bool = False,
    ) -> None:
        self._locks = _locks(out) if shared and out is not None else None
        self._own = _claimed(out) if not shared and out is not None else None  # until this object goes
        self.record, self._out = replace(record, values={**record.values, "rows": []}), out
        self._commit, self._idle = record.commit, idle
        self._began = time.time()
        self._end = math.inf if hours is None else time.monotonic() + 3600 * hours
        self.missing: list[str] = []
        with self._alone():
            if out is not None and out.exists():
                self._take_up(record, out, selecting)
            if self._locks is not None and out is not None:
                self.record.save(out)  # at once: others learn the settings

    def fill(self, steps: Steps, echo: Callable[[str], object]) -> None:
        """Make all rows that a generator asks for, see `Steps`; of a list those that no other process is at, first."""
        found: Any = None
        while True:
            try:
                asked, found = steps.send(found), None
            except StopIteration:
                return
            if isinstance(asked, dict):
                self._note(asked)
            else:
                made = self._share([asked] if isinstance(asked, Row) else asked, echo)
                found = made[0] if isinstance(asked, Row) else made

    def add(self, wanted: Row) -> Values:
        """The row as it stands, or made and saved at once; only its key if it could not be begun."""
        key = _as_read(wanted.key)
        before = self.find(key)
        if before is not None:
            return before
        if wanted.make is None or (time.monotonic() > self._end and not wanted.short):
            self.missing.append(", ".join(f"{name} {value}" for name, value in key.items()))
            return dict(key)
        try:
            row = _as_read({**key, **wanted.make(), "commit": self._commit})
        except Exception as error:  # a table's other rows are still wanted
            if not wanted.keep_errors:
                raise
            kind = "" if isinstance(error, DslibError) else f"{type(error).__name__}: "
            row = {**key, "error": kind + first_line(error)}
            if self._locks is not None:
                row["at"] = time.time()  # others that began before need not try it
        with self._alone():
            self._catch_up()
            rows: list[Values] = self.record.values["rows"]
            rows[:] = [*(other for other in rows if not other.items() >= key.items()), row]
            if self._out is not None:
                self.record.save(self._out)
        return row

    def find(self, key: Mapping[str, Any]) -> Values | None:
        """The row with this key, if it stands there and is not to be made again."""
        self._catch_up()
        key, rows = _as_read(key), self.record.values["rows"]
        lasting = (row for row in rows if "error" not in row and not (self._idle and row.get("busy")))
        return next((row for row in lasting if row.items() >= key.items()), None)

    @contextmanager
    def claimed(self, key: Mapping[str, Any]) -> Iterator[bool]:
        """Whether this process may make the row, within the block; not while another one does."""
        if self._locks is None:
            yield True
            return
        name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        try:
            with FileLock(self._locks / f"{name}.lock", blocking=False):
                yield True
        except Timeout:
            yield False

    def _share(self, asked: Sequence[Row], echo: Callable[[str], object]) -> list[Values]:
        """Make all rows that no other process makes, and wait for those that others make; each is told."""
        waiting = dict(enumerate(asked))
        found: dict[int, Values] = {}
        while waiting:
            left = {}
            for number, row in waiting.items():
                with self.claimed(row.key) as mine:
                    if not mine:
                        left[number] = row
                        continue
                    found[number] = self._failed(row.key) or self.add(row)
                if row.told is not None:
                    echo(row.told(found[number]))
            if len(left) == len(waiting):
                time.sleep(PAUSE)
            waiting = left
        return [found[number] for number in range(len(asked))]

    def _failed(self, key: Mapping[str, Any]) -> Values | None:
        """The row, if it could not be made since this process began, here or in another process."""
        self._catch_up()
        rows = (row for row in self.record.values["rows"] if row.get("at", 0.0) >= self._began)
        return next((row for row in rows if row.items() >= _as_read(key).items()), None)

    def _note(self, values: Values) -> None:
        """Values beside the rows; in a file that stands they must be the same."""
        before = {name: self.record.values[name] for name in values if name in self.record.values}
        if before not in ({}, _as_read(values)):
            raise _other_settings(self._out)
        self.record = replace(self.record, values={**_as_read(values), **self.record.values})

    def _take_up(self, record: Record, out: Path, selecting: Collection[str]) -> None:
        """Go on with the rows that stand in the file."""
        before = Record.load(out)
        configs = [{k: v for k, v in _as_read(r.config).items() if k not in selecting} for r in (record, before)]
        same = configs[0] == configs[1]
        same &= all(_as_read(getattr(record, part)) == getattr(before, part) for part in ("name", "machine"))
        if not same:
            raise _other_settings(out)
        commits = dict.fromkeys([*before.commit.split(", "), record.commit])
        here, there = (_as_read({name: r.config[name] for name in selecting}) for r in (record, before))
        both = _as_read({name: _both(there[name], here[name]) for name in selecting})
        command = f"{before.command}; {record.command}"  # of rows that neither asked for nothing is said
        command = record.command if both == here else before.command if both == there else command
        self.record = replace(
            record, config={**record.config, **both}, command=command, values=before.values, commit=", ".join(commits)
        )

    def _alone(self) -> AbstractContextManager[object]:
        """No other process writes the file meanwhile."""
        return nullcontext() if self._locks is None else FileLock(self._locks / "record.lock")

    def _catch_up(self) -> None:
        """Read what others have added."""
        if self._locks is not None and self._out is not None and self._out.exists():
            self.record = Record.load(self._out)


def _recorded(config: Any) -> list[Any]:
    return [each for each in fields(config) if each.metadata.get("recorded", True)]


def _other_settings(out: Path | None) -> BadConfig:
    return BadConfig(f"{out} is a record of other settings or of another machine: give another file")


def _claimed(out: Path) -> FileLock:
    """A claim to a whole record."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"), is_singleton=True)  # this process may open it again
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BadConfig(f"{out} is being written by another run: wait for it, or choose another --out") from error
    return lock


def _locks(out: Path) -> Path:
    """A folder beside a record for claims to its rows."""
    folder = out.with_suffix(".locks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _both(before: Any, now: Any) -> Any:
    """Two values of a setting that selects rows: all of two lists, the larger of two numbers."""
    return list(dict.fromkeys([*before, *now])) if isinstance(now, list) else max(before, now)


def _as_read(content: Any) -> Any:
    """As it will be read from JSON: a tuple as a list."""
    return json.loads(json.dumps(content))
