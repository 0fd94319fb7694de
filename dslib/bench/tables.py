"""What the tables of measurements share: which cases there are, and one case measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..algebra import in_channels
from ..errors import BadConfig, DslibError
from ..measuring import (
    Peaks,
    Timing,
    count_macs,
    count_parameters,
    dtype_for,
    find_peaks,
    measure,
    utilisation,
    working_memory_mib,
)
from ..models import load_model
from ..training import recalibrate_batchnorm
from .benchmark import Row, Steps, Values
from .settings import IN_PRECISIONS, ON_RUNTIMES, BenchSettings, setting

Networks = Mapping[str, nn.Module]


class Case(NamedTuple):
    """What a row is measured at."""

    runtime: str
    precision: str
    batch_size: int


_CPU = [("eager", "float32"), ("eager", "bfloat16"), ("onnxruntime", "float32")]
_CPU += [("openvino", "float32"), ("openvino", "bfloat16")]
_GPU = [("eager", precision) for precision in ("float32", "tf32", "float16", "bfloat16")]
_GPU += [("compile", "float16"), ("cudagraph", "float16")]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MobileNetV2": ("mobilenet_v2", {}),
    "MobileNetV2-1.4": ("mobilenet_v2", {"width_mult": 1.4}),
    "EfficientNet-Lite0": ("timm/efficientnet_lite0", {}),
    "ResNet-50": ("resnet50", {}),
    "ResNet-101": ("resnet101", {}),
    "ResNet-152": ("resnet152", {}),
}


def cases(
    device: torch.device, batch_sizes: Sequence[int] = (), runtimes: Sequence[str] = (), precisions: Sequence[str] = ()
) -> list[Case]:
    """What to measure on a device: every combination of what is given, else what is worth it there.

    On a CPU batches of 1 and 8, `torch.compile` at 8 alone, as it takes long; elsewhere batches of 128 and 256.
    """
    sizes = tuple(batch_sizes) or ((1, 8) if device.type == "cpu" else (128, 256))
    if runtimes or precisions:
        return [Case(r, p, b) for b in sizes for r in runtimes or ("eager",) for p in precisions or ("float32",)]
    if device.type == "cpu":
        found = [Case(*way, size) for size in sizes for way in _CPU]
        return found + [Case("compile", "float32", size) for size in sizes if size == 8]
    ways = _GPU if device.type == "cuda" else [("eager", "float32"), ("eager", "float16")]
    return [Case(*way, size) for size in sizes for way in ways]


@dataclass(frozen=True)
class Measured(BenchSettings):
    """What a table is measured on.

    Args:
        image_size: side in pixels.
        batch_size: default what is usual on the device.
        runtime, precision: as batch_size; all combinations are measured.
        rounds: measurements of each, in all passes; what their number leaves over is not measured.
        passes: the rounds are spread over so many, each network made ready anew for each and all others measured
            meanwhile: within one the machine is alike for all, from one to the next it may not be.
    """

    device: str = "auto"
    image_size: int = 224
    batch_size: tuple[int, ...] = ()
    runtime: tuple[str, ...] = setting((), ON_RUNTIMES)
    precision: tuple[str, ...] = setting((), IN_PRECISIONS)
    rounds: int = 30
    passes: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        good = 0 < self.passes <= self.rounds
        if not good:
            raise BadConfig(
                f"expected one pass or more, of one round or more each, found {self.passes} and {self.rounds}"
            )

    def cases(self, device: torch.device) -> list[Case]:
        """What to measure on a device."""
        return cases(device, self.batch_size, self.runtime, self.precision)


class Table:
    """The rows of networks at several cases, and of the device's peaks.

    Args:
        config: what they are measured on.
        device: the device.
    """

    def __init__(self, config: Measured, device: torch.device) -> None:
        self.config, self.device, self.image_size = config, device, config.image_size
        self.cases = config.cases(device)
        self._peaks: dict[str, Peaks] = {}

    def peaks(self) -> Steps:
        """The device's peaks in each precision."""
        for precision in dict.fromkeys(case.precision for case in self.cases):
            make = partial(self._find_peaks, precision)
            row = yield Row({"peaks": precision}, make, keep_errors=True, short=True)
            if "error" not in row:
                self._peaks[precision] = Peaks(**{field.name: row[field.name] for field in fields(Peaks)})

    def rows(self, model: str, networks: Networks, cases: Sequence[Case] = (), **more: Any) -> Steps:
        """What does not depend on the device; then a row for each case: all networks in turns, over the first.

        Args:
            model: what the networks are called together.
            networks: the networks.
            cases: default the settings'.
            more: stands in the first row, beside MACs and parameters (BatchNorm's counted).
        """
        yield Row({"sizes": model}, lambda: {"networks": self._sizes(networks), **more})
        parts: dict[Case, list[Values]] = {case: [] for case in cases or self.cases}
        passes = list(product(range(self.config.passes), parts))
        for number, case in tqdm(passes, model, leave=False, disable=None):
            key = {"pass": number, "of": model, **case._asdict()}
            parts[case].append((yield Row(key, partial(self._measure, networks, case), keep_errors=True)))
        for case, found in parts.items():
            whole = all("ms" in part or "error" in part for part in found)
            make = partial(self._together, networks, case, found) if whole else None
            yield Row({"model": model, **case._asdict()}, make, keep_errors=True, told=say)

    def _find_peaks(self, precision: str) -> Values:
        return asdict(find_peaks(self.device, precision))

    def _sizes(self, networks: Networks) -> Values:
        shape = self._shape(networks)
        return {
            name: {"macs": count_macs(network, shape), "parameters": count_parameters(network)}
            for name, network in networks.items()
        }

    def _images(self, networks: Networks, case: Case) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(case.batch_size, *self._shape(networks), generator=generator).to(self.device)

    def _measure(self, networks: Networks, case: Case) -> Values:
        """One pass: every round's latency of every network."""
        placed = {name: network.to(self.device) for name, network in networks.items()}
        images, rounds = self._images(networks, case), self.config.rounds // self.config.passes
        timing = measure(placed, images, rounds, runtime=case.runtime, precision=case.precision)
        return {
            "ms": {name: ms.round(4).tolist() for name, ms in timing.ms.items()},
            "others": timing.others,
            "measured_batch_size": timing.batch_size,
            "as_run": timing.runtime,
            "busy": timing.busy,
        }

    def _together(self, networks: Networks, case: Case, parts: Sequence[Values]) -> Values:
        """What several passes say."""
        failed = next((part["error"] for part in parts if "error" in part), None)
        if failed is not None:
            raise DslibError(str(failed))
        size = min(part["measured_batch_size"] for part in parts)  # memory may have sufficed for more once
        parts = [part for part in parts if part["measured_batch_size"] == size]
        ms = {name: np.concatenate([part["ms"][name] for part in parts]) for name in networks}
        others = max((part["others"] for part in parts if part["others"] is not None), default=None)
        timing = Timing(ms, size, str(self.device), parts[0]["as_run"], others)
        found, shape, first = timing.frame, self._shape(networks), next(iter(networks))
        for name in networks:
            found.loc[name, ["speedup", "speedup_q25", "speedup_q75"]] = timing.speedup(name, over=first)
        if case.precision in self._peaks:
            found = found.join(utilisation(networks, shape, timing, self._peaks[case.precision]))
        if case.runtime == "eager":
            images = self._images(networks, case)[:size].to(dtype_for(case.precision))
            found["working_memory_mib"] = [working_memory_mib(network, images) for network in networks.values()]
        return {
            "networks": found.T.to_dict(),
            "measured_batch_size": size,
            "as_run": timing.runtime,
            "busy": any(part["busy"] for part in parts),
            "others": timing.others,
        }

    def _shape(self, networks: Networks) -> tuple[int, int, int]:
        return in_channels(next(iter(networks.values()))), self.image_size, self.image_size


def say(row: Mapping[str, Any]) -> str:
    """One line about a row of a case."""
    case = f"{row['model']}, {row['runtime']} {row['precision']}, batch {row['batch_size']}"
    if "error" in row:
        return f"{case}: {row['error']}"
    if "networks" not in row:
        return f"{case}: not begun"
    found = ", ".join(
        f"{name} {values['images_per_s']:.0f}/s ({values['speedup']:.2f} x)" for name, values in row["networks"].items()
    )
    size = row["measured_batch_size"]
    halved = "" if size == row["batch_size"] else f" (batch {size}: more did not fit)"
    return f"{case}{halved}: {found}{' (the machine was busy)' if row['busy'] else ''}"


def network_called(name: str, image_size: int) -> nn.Module:
    """A network of random weights, in eval, by the paper's name for it or its own.

    Its BatchNorms have statistics that go with the weights: unnormalised maps of deep networks overflow float16.
    """
    known, options = MODELS.get(name, (name, {}))
    model = load_model(known, options=options).model.eval()
    shape = 8, in_channels(model), image_size, image_size
    recalibrate_batchnorm(model, [torch.randn(shape, generator=torch.Generator().manual_seed(0))])
    return model
