"""Settings of benchmarks: how a field is declared, and those that several benchmarks have."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import BadConfig, Settings
from ..measuring import PRECISIONS, RUNTIMES

ON_RUNTIMES, IN_PRECISIONS = (f"one of {', '.join(names)}" for names in (RUNTIMES, PRECISIONS))


def setting(default: Any, expected: str | None = None, option: str = "", least: int = 0, recorded: bool = True) -> Any:
    """A field of a benchmark's settings.

    Args:
        default, expected: as for `errors.ranged`.
        option: what it is called on the command line, if not like the field.
        least: how many values it must have.
        recorded: whether it belongs to what a record is of.
    """
    metadata = {"expected": expected, "option": option, "least": least, "recorded": recorded}
    return field(default=default, metadata={name: value for name, value in metadata.items() if value not in (None, "")})


def argument() -> Any:
    """A field that must be given, and stands on the command line without a name."""
    return field(metadata={"argument": True})


@dataclass(frozen=True)
class BenchSettings(Settings):
    """Base of a benchmark's settings; their names are a record's, those of options are in `setting`.

    Args:
        model: its name.
        weights: default, or a weights file; trained for the data's classes.
        model_option, options: for the model's function.
        data: digits, imagenette, cifar10, imagenet, a folder, or a .npz file.
        image_size: side in pixels; default the dataset's.
        epochs: of each training.
        lr: per 256 images of batch.
        batch_size: images a step, or a batch whose latency is measured.
        rounds: measurements of each.
        runtime: that latencies are measured on.
        device: auto, cpu, cuda, mps.
        seed: of what is drawn.
        seeds: trainings of each.
    """

    def __post_init__(self) -> None:
        """Raise `BadConfig` for the first value that is out of its range."""
        super().__post_init__()
        for each in fields(self):
            least, found = each.metadata.get("least", 0), getattr(self, each.name)
            if least and len(found) < least:
                raise BadConfig(f"{each.name}: expected {least} or more, found {len(found)}")


@dataclass(frozen=True)
class OneTiming(BenchSettings):
    """What one timing is made of.

    Args:
        model: its name; weights are random.
        image_size: side in pixels.
    """

    model: str = "mobilenet_v2"
    image_size: int = setting(224, "1 or more")
    batch_size: int = setting(8, "1 or more")
    rounds: int = setting(30, "1 or more")


@dataclass(frozen=True)
class OnTrained(BenchSettings):
    """A trained network, the data, and images to calibrate and to rank with.

    Args:
        model: name of a network with weights that are trained for the data's classes.
        data: training images are used without labels where nothing is trained, the validation split only reports.
        count: unlabelled images for a calibration.
        rank_count: images for the ranking.
    """

    model: str = "mobilenet_v2"
    data: str = "imagenette"
    image_size: int | None = None
    count: int = setting(2048, "1 or more")
    rank_count: int = setting(512, "1 or more")
