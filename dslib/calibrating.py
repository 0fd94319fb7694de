"""Calibration: a shrunk network in seconds, from unlabelled images, without training.

Each removed block becomes the one convolution that best reproduces the block *with* its activations, by ridge least
squares: one block after another from the input on, on the inputs that the network compressed so far gives, against
what the original network makes of the same images. The kept blocks after them are adjusted in the same way by their
last convolution, which takes back some of the error. Ours; the paper starts from activations torn out.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import dropwhile, islice
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from .algebra import dtype_of, fold, in_channels, input_shapes, is_activation_module, site_names, trace
from .data import FolderSplit, Split
from .errors import BadConfig, BadData, DslibError, NotTraceable
from .fitting import (
    Convolution,
    Opened,
    Rest,
    Station,
    Sums,
    calls,
    last_convolution,
    match,
    moments_at,
    normalised_before,
    shares,
    targets_at,
    values_at,
    within_reach,
)
from .measuring import halving, tune_allocator
from .merging import check_values, merge, removed_groups
from .shrinking import shrink
from .sites import Mask, Plan

Images = Tensor | Split | FolderSplit
Batches = Callable[[int], Iterator[Tensor]]
IMAGE_BYTES = 2**30  # held at most as floats
MATCHED_IMAGES = 128  # enough for a mean and a spread


@dataclass(frozen=True)
class Calibrate:
    """Settings of a calibration.

    Args:
        ridge: added to the least squares, as a share of the mean square of the convolution's inputs.
        ridges: so many ridges are tried for each convolution, each ten times the one before, on a quarter of the
            images that is held back from its fit until then; with fewer than four images, or 10,000 unknowns, one.
        positions: at most so many output positions of a block are used, spread over all images (one of each at least).
        refit: whether kept blocks after a removed one are adjusted by their last convolution.
        match: whether, before that, the channels of their other convolutions get the original's mean and spread.
        reach: how many kept blocks after each change are adjusted, by their order in the network; None for all.
        batch_size: images a batch; halved where the device's memory does not hold it.
        seed: of the choice of positions.
    """

    ridge: float = 1e-3
    ridges: int = 6
    positions: int = 150_000
    refit: bool = True
    match: bool = True
    reach: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.reach is not None and not self.reach > 0:
            raise BadConfig(f"reach: expected 1 or more, found {self.reach}")
        if not self.ridge > 0:
            raise BadConfig(f"ridge: expected more than 0, found {self.ridge}")
        if not self.ridges > 0:
            raise BadConfig(f"ridges: expected 1 or more, found {self.ridges}")
        if not self.positions > 0:
            raise BadConfig(f"positions: expected 1 or more, found {self.positions}")
        if not self.batch_size > 0:
            raise BadConfig(f"batch_size: expected 1 or more, found {self.batch_size}")


class Calibrated(NamedTuple):
    """A merged network in eval, and for each block that was fitted the error that is left.

    `errors`: site name -> norm of the difference from the original block's output (the residual taken off), relative
    to that output's own (its mean taken off); of a run, its last site's.
    """

    model: nn.Module
    errors: dict[str, float]


@torch.no_grad()
def calibrate(
    model: nn.Module, mask: Mask | Plan, images: Images, config: Calibrate | None = None, progress: bool = True
) -> Calibrated:
    """The network with each removed site (or run) as one convolution, fitted to what it did with its activations.

    Where a block is dropped, what is left of the network after it is adjusted.

    Args:
        model: the network; left as it is.
        mask: which sites to remove, which of them together, and which whole.
        images: unlabelled: (N, C, S, S) as the network takes them, or a split of a dataset.
        config: the settings.
        progress: show a bar.
    Returns:
        The merged network, with the state keys that `merge` gives, so that a `Recipe` rebuilds it; and the errors.
    Raises:
        BadData: if there are no images, or they are not finite or not of the network's shape.
        NotMergeable, MaskMismatch: as `shrink`; also if a weight is NaN or infinite, naming it.
        DslibError: naming the block, if what it computes is too large to be squared.
    """
    settings = config or Calibrate()
    check_values([model], type(model).__name__)
    batches = _batches(images, model)
    tune_allocator()
    count = len(images)

    def calibrated(size: int) -> Calibrated:
        return _calibrated(model, mask, batches, count, replace(settings, batch_size=size), progress)

    return halving(calibrated, settings.batch_size)


def _calibrated(
    model: nn.Module, mask: Mask | Plan, batches: Batches, count: int, config: Calibrate, progress: bool
) -> Calibrated:
    first = next(iter(batches(1)))
    original, small = copy.deepcopy(model), _start(model, mask, first.shape[-1])
    original.eval()
    stations, kept = _open(original, small, mask, first, config)
    blocks = [station.name for station in stations] + [station.conv.rpartition(".")[0] for station in stations]
    original, fast = (fold(network, first, branches=False, blocks=blocks) for network in (original, small))
    networks = Networks(original, fast, small)
    stations = [_folded(station, networks.fast) for station in stations if station.is_folded(networks.fast)]
    positions = max(1, config.positions // count)
    rest = Rest(networks.fast)
    inner = [each for station in stations for each in station.before]
    few = list(islice(batches(config.batch_size), -(-MATCHED_IMAGES // config.batch_size))) if inner else []
    wanted = moments_at(networks.original, inner, few)
    errors: dict[str, float] = {}
    short = False
    bar = tqdm(total=len(stations), desc="calibrate", leave=False, disable=None if progress else True)
    for some in shares(stations, networks.original, first, positions, count):
        targets = targets_at(networks.original, some, batches(config.batch_size), positions, config.seed)
        for station in some:
            for each in station.before:
                match(each, wanted[each.name], rest, networks.small, few)
            sums = Sums(networks.conv(station), positions, config.seed, config.ridges)
            for i, images in enumerate(batches(config.batch_size)):
                found, read = values_at(rest.at(i), images, station)
                sums.add(read, found, targets[station.name][i], i)
            short |= sums.count < sums.unknowns
            errors[station.name] = _solved(station, sums, networks, config)
            if station is not stations[-1]:
                rest.begin_after(station.name, batches(config.batch_size), count)
            del targets[station.name]
            bar.update()
    bar.close()
    if short:  # the same words whatever the plan, so that Python shows those of a ranking's many calibrations once
        warnings.warn(
            f"{count} images have fewer positions than some convolutions have weights to fit: give more images",
            stacklevel=5,
        )
    for name, block in kept.items():
        small.set_submodule(name, block)
    return Calibrated(small, {s.name: errors[s.name] for s in stations if s.removed})


class Networks(NamedTuple):
    """The original and the small network, BatchNorms folded, which is quicker; and the small one to be returned."""

    original: nn.Module
    fast: nn.Module
    small: nn.Module

    def conv(self, station: Station) -> nn.Conv2d:
        """The folded convolution of a station."""
        found = self.fast.get_submodule(station.conv)
        assert isinstance(found, nn.Conv2d)
        return found


def logits_of(model: nn.Module, images: Images, batch_size: int = 64) -> Tensor:
    """The network's outputs in eval for images as `calibrate` takes them, (N, classes) float32 on the CPU."""
    batches, training = _batches(images, model), [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            return torch.cat([model(part).float().cpu() for part in batches(batch_size)])
    finally:
        for module in training:
            module.training = True


def _start(model: nn.Module, mask: Mask | Plan, image_size: int) -> nn.Module:
    """The merged network to begin with: of each removed block only what passes by its convolutions, as a residual."""
    small = shrink(model, mask, image_size=image_size)
    small.eval()
    for blocks in removed_groups(small).values():
        for conv in (m for block in blocks for m in block.modules() if isinstance(m, nn.Conv2d)):
            conv.weight = nn.Parameter(torch.zeros_like(conv.weight))  # not in place: another block may share it
    return merge(small)


def _open(
    original: nn.Module, small: nn.Module, mask: Mask | Plan, first: Tensor, config: Calibrate
) -> tuple[list[Station], dict[str, nn.Module]]:
    """What is to be fitted, in the order of the forward pass; and the kept blocks to put back in the end."""
    plan = mask if isinstance(mask, Plan) else Plan(mask)
    stations: dict[str, Station] = {}
    kept: dict[str, nn.Module] = {}
    for names in plan.groups:
        if is_activation_module(original.get_submodule(names[0])):
            continue  # a single one, outside blocks: there is nothing to fit
        original.set_submodule(names[-1], Opened(_traced(original, names[-1])))
        conv = f"{names[0]}.conv"
        stations[names[-1]] = Station(names[-1], conv, conv, f"{names[-1]}.body", removed=True)
    tried = within_reach(site_names(model=original), plan.mask.removed, config.reach) if config.refit else []
    for name in input_shapes(small, tried, first.shape[-1]):  # those called with one map alone
        try:
            traced = _traced(small, name)
            theirs = Opened(_traced(original, name))
        except NotTraceable:
            continue  # it stays as it is
        ours = Opened(traced)
        found = last_convolution(ours.body)
        if found is None:
            continue
        kept[name] = small.get_submodule(name)
        small.set_submodule(name, ours)
        original.set_submodule(name, theirs)
        body = f"{name}.body"
        others = normalised_before(ours.body, found) if config.match else []
        before = tuple(_station(body, other, f"{body}.{other.conv}") for other in others)
        stations[name] = replace(_station(body, found, body), name=name, before=before)
    gone = dict.fromkeys(plan.dropped)
    called = calls(original, {name: s.target for name, s in stations.items()} | {name: name for name in gone}, first)
    for name in (s.name for s in stations.values() if s.removed):
        if called[name] != 1:
            raise BadConfig(f"{name} is called {called[name]} times in a forward pass, expected once: keep it")
    changed = dropwhile(lambda name: name not in gone and not stations[name].removed, called)
    return [stations[name] for name in changed if name not in gone and called[name] == 1], kept


def _folded(station: Station, network: nn.Module) -> Station:
    return replace(station, before=tuple(inner for inner in station.before if inner.is_folded(network)))


def _station(body: str, found: Convolution, output: str) -> Station:
    batchnorm = f"{body}.{found.batchnorm}" if found.batchnorm else None
    return Station(output, f"{body}.{found.conv}", output, output, removed=False, batchnorm=batchnorm)


def _traced(model: nn.Module, name: str) -> fx.GraphModule:
    return trace(model.get_submodule(name), name)


def _solved(station: Station, sums: Sums, networks: Networks, config: Calibrate) -> float:
    """Change the station's convolution in both small networks; returns the relative error that is left."""
    if not sums.is_finite():
        raise DslibError(f"{station.name}: what it reads or gives is too large on these images: were they normalised?")
    try:
        weight, bias, error = sums.solve(config.ridge)
    except torch.linalg.LinAlgError as error:
        reason = f"{station.name}: its inputs depend too much on each other for ridge {config.ridge:g}: raise it"
        raise DslibError(reason) from error
    station.change(networks.fast, networks.small, weight, bias)
    return error


def _batches(images: Images, model: nn.Module) -> Batches:
    """Batches of a size, on the network's device, checked; held as floats where they are not too many."""
    if not isinstance(images, (Tensor, Split, FolderSplit)):
        raise BadConfig(f"images: expected a tensor (N, C, S, S) or a split, found {type(images).__name__}")
    if not len(images) > 0:
        raise BadData("images: expected one or more, found none")
    device, dtype, channels = next(model.parameters()).device, dtype_of(model), in_channels(model)
    if not isinstance(images, Tensor):
        shape = next(images.batches(1))[0].shape
        if 4 * len(images) * shape[1:].numel() <= IMAGE_BYTES:
            images = torch.cat([part for part, _ in images.batches(256)])
    if isinstance(images, Tensor):
        good = images.ndim == 4 and images.shape[1] == channels and images.shape[2] == images.shape[3]
        if not (good and images.is_floating_point()):
            raise BadData(
                f"images: expected normalised floats of shape (N, {channels}, S, S), found {images.dtype} "
                f"{tuple(images.shape)}"
            )
        if not images.isfinite().all():
            raise BadData("images: some values are NaN or infinite")

    def batches(size: int) -> Iterator[Tensor]:
        parts = images.split(size) if isinstance(images, Tensor) else (x for x, _ in images.batches(size))
        for part in parts:
            yield part.to(device, dtype)

    return batches
