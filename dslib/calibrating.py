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
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .algebra import dtype_of, fold, in_channels
from .data import FolderSplit, Split
from .errors import BadConfig, BadData, DslibError, Settings, ranged
from .fitting import (
    FittedLayer,
    Rest,
    Sums,
    conv_at,
    in_shares,
    match_statistics,
    moments_at,
    open_blocks,
    targets_at,
    values_at,
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
class Calibrate(Settings):
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

    ridge: float = ranged(1e-3, "more than 0")
    ridges: int = ranged(6, "1 or more")
    positions: int = ranged(150_000, "1 or more")
    refit: bool = True
    match: bool = True
    reach: int | None = ranged(None, "1 or more")
    batch_size: int = ranged(64, "1 or more")
    seed: int = 0


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

    def calibrated(size: int) -> Calibrated:
        return _Calibration(model, mask, batches, len(images), replace(settings, batch_size=size)).run(progress)

    return halving(calibrated, settings.batch_size)


class _Calibration:
    """One calibration: `layers` of a `small` network are fitted one after another to what the `original` gives.

    The network that runs is `fast`: the small one, BatchNorms folded, which is quicker. Both are changed alike.
    """

    def __init__(self, model: nn.Module, mask: Mask | Plan, batches: Batches, count: int, config: Calibrate) -> None:
        self._batches, self.count, self.config = batches, count, config
        self.positions = max(1, config.positions // count)
        self.first = next(batches(1))
        self.small, original = _start(model, mask, self.first.shape[-1]), copy.deepcopy(model)
        original.eval()
        plan = mask if isinstance(mask, Plan) else Plan(mask)
        how = config.refit, config.match, config.reach
        layers, self.kept = open_blocks(original, self.small, plan, self.first, *how)
        blocks = [layer.name for layer in layers] + [layer.conv.rpartition(".")[0] for layer in layers]
        self.original, self.fast = (
            fold(network, self.first, branches=False, blocks=blocks) for network in (original, self.small)
        )
        self.rest = Rest(self.fast)
        self.layers = [
            replace(layer, before=tuple(inner for inner in layer.before if inner.is_folded(self.fast)))
            for layer in layers
            if layer.is_folded(self.fast)
        ]

    def batches(self) -> Iterator[Tensor]:
        """All images."""
        return self._batches(self.config.batch_size)

    def run(self, progress: bool) -> Calibrated:
        """Fit layer after layer; each reads what those before it give now."""
        inner = [each for layer in self.layers for each in layer.before]
        few = list(islice(self.batches(), -(-MATCHED_IMAGES // self.config.batch_size))) if inner else []
        wanted = moments_at(self.original, inner, few)
        errors: dict[str, float] = {}
        enough = True
        with tqdm(total=len(self.layers), desc="calibrate", leave=False, disable=None if progress else True) as bar:
            for share in in_shares(self.layers, self.original, self.first, self.positions, self.count):
                targets = targets_at(self.original, share, self.batches(), self.positions, self.config.seed)
                for layer in share:
                    for each in layer.before:
                        match_statistics(each, wanted[each.name], self.rest, self.small, few)
                    sums = self._sums(layer, targets.pop(layer.name))
                    enough &= sums.count >= sums.unknowns
                    errors[layer.name] = self._fit(layer, sums)
                    if layer is not self.layers[-1]:
                        self.rest.begin_after(layer.name, self.batches(), self.count)
                    bar.update()
        if not enough:  # the same words whatever the plan: Python shows those of a ranking's many calibrations once
            few_images = f"{self.count} images have fewer positions than some convolutions have weights to fit"
            warnings.warn(f"{few_images}: give more images", stacklevel=5)
        for name, block in self.kept.items():
            self.small.set_submodule(name, block)
        return Calibrated(self.small, {layer.name: errors[layer.name] for layer in self.layers if layer.removed})

    def _sums(self, layer: FittedLayer, targets: list[Tensor]) -> Sums:
        """What least squares needs of a layer, from all images."""
        sums = Sums(conv_at(self.fast, layer.conv), self.positions, self.config.seed, self.config.ridges)
        for i, images in enumerate(self.batches()):
            found, read = values_at(self.rest.at(i), images, layer)
            sums.add(read, found, targets[i], i)
        return sums

    def _fit(self, layer: FittedLayer, sums: Sums) -> float:
        """Change the layer's convolution in both small networks; returns the relative error that is left."""
        if not sums.is_finite():
            reason = "what it reads or gives is too large on these images: were they normalised?"
            raise DslibError(f"{layer.name}: {reason}")
        try:
            weight, bias, error = sums.solve(self.config.ridge)
        except torch.linalg.LinAlgError as error:
            reason = f"its inputs depend too much on each other for ridge {self.config.ridge:g}: raise it"
            raise DslibError(f"{layer.name}: {reason}") from error
        layer.change(self.fast, self.small, weight, bias)
        return error


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


def _batches(images: Images, model: nn.Module) -> Batches:
    """Batches of a size, on the network's device, checked; held as floats where they are not too many."""
    if not isinstance(images, (Tensor, Split, FolderSplit)):
        raise BadConfig(f"images: expected a tensor (N, C, S, S) or a split, found {type(images).__name__}")
    if not len(images):
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
