"""Expand, then shrink: a small network trains as a larger one and ends in the very same shape.

Each dense convolution with a BatchNorm behind it becomes an inverted residual block while it trains; the activations
inside fade out, and what is left is merged back into the one convolution. When the network runs, it costs nothing.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data, decoded_by
from ..errors import BadConfig, BadModel, ranged
from ..merging import merge, shrunk_blocks
from ..shrinking import fade, set_fade, settle
from ..sites import Mask, find_sites
from .evaluating import evaluate
from .loop import Trained, cross_entropy, train
from .settings import Train
from .watching import Log

TOLERANCE = 1e-3  # of the largest output, in float32


@dataclass(frozen=True)
class Boost(Train):
    """Settings of a training as a larger network.

    Args:
        ratio: inner channels of each block over the convolution's input channels.
        fade_from, fade_to: share of the training at which the activations begin to fade out, and are out.
    """

    ratio: float = ranged(2.0, "more than 0")
    fade_from: float = 0.3
    fade_to: float = 0.7

    def __post_init__(self) -> None:
        """Check the ranges, and that the fading has a length."""
        super().__post_init__()
        if not 0 <= self.fade_from < self.fade_to <= 1:
            raise BadConfig(f"fade_from, fade_to: expected 0 <= from < to <= 1, found {self.fade_from}, {self.fade_to}")


class Expanded(nn.Module):
    """An inverted residual block with the input, output, kernel, stride and padding of a convolution.

    Args:
        conv: the convolution, of one group.
        ratio: inner channels over input channels.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__()
        wide = max(1, round(conv.in_channels * ratio))
        self.expand = nn.Conv2d(conv.in_channels, wide, 1, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(wide), nn.ReLU6()
        like: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self.depthwise = nn.Conv2d(wide, wide, conv.kernel_size, groups=wide, bias=False, **like)  # type: ignore[arg-type]
        self.norm2, self.act2 = nn.BatchNorm2d(wide), nn.ReLU6()
        self.project = nn.Conv2d(wide, conv.out_channels, 1, bias=False)
        for layer in (self.expand, self.depthwise, self.project):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        x = self.act1(self.norm1(self.expand(x)))
        return self.project(self.act2(self.norm2(self.depthwise(x))))


def expand(model: nn.Module, ratio: float = 2.0, image_size: int = 224, seed: int = 0) -> nn.Module:
    """A copy of the network in which each dense convolution with a BatchNorm behind it is an `Expanded`.

    Activations inside can fade. The stem, whose input is the image, stays. The blocks' weights are new; train the copy
    (`set_fade` moves the activations out), then `contract` it.

    Args:
        model: the network; left as it is.
        ratio: inner channels over input channels.
        image_size: side of the input in pixels.
        seed: of the new weights.
    Raises:
        BadModel: if nothing can be expanded, or `contract` could not put it back: layers are not called in the order
            in which they are registered.
    Source: Fu et al., ICML 2022, section on expanding; Guo et al., ExpandNets, NeurIPS 2020.
    """
    larger = copy.deepcopy(model)
    names = [name for name, conv, _ in _pairs(model) if conv.in_channels > 4]
    if not names:
        raise BadModel("no dense convolution with a BatchNorm behind it: nothing to expand")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            conv = larger.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            block = Expanded(conv, ratio).to(conv.weight.device, conv.weight.dtype)
            larger.set_submodule(name, block.train(conv.training))
    mask = Mask({name: name not in names for name in find_sites(larger, image_size).names})
    faded = fade(larger, mask, None, image_size)
    _check_back(faded, model, image_size)
    return faded


def contract(larger: nn.Module, small: nn.Module) -> nn.Module:
    """The trained network in the shape, and with the state keys, of the small one; exactly equal in eval.

    Args:
        larger: from `expand`, trained; activations that did not fade out are left out.
        small: what was expanded; left as it is.
    Raises:
        BadModel: if `larger` was not made from it.
    """
    linear = settle(larger)
    names = list(shrunk_blocks(linear))
    merged = merge(linear, only=names).state_dict()
    back = copy.deepcopy(small)
    norms = {name: norm for name, _, norm in _pairs(back)}
    try:
        state = {name: merged[name] for name in back.state_dict() if not name.startswith(tuple(f"{n}." for n in names))}
        for name in names:
            state[f"{name}.weight"] = merged[f"{name}.conv.weight"]
            bias = merged[f"{name}.conv.bias"]
            if f"{name}.bias" in back.state_dict():
                state[f"{name}.bias"] = bias
            else:  # BatchNorm subtracts its mean: a bias before it is a smaller mean
                state[f"{norms[name]}.running_mean"] = merged[f"{norms[name]}.running_mean"] - bias
        back.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise BadModel(
            f"this network was not expanded from that one ({error}): give what `expand` was given"
        ) from error
    return back.train(small.training)


def boost(
    small: nn.Module, data: Data, config: Boost, checkpoint: Path | None = None, log: Log | None = None
) -> Trained:
    """A copy of the network, trained on labels as a larger one, in its own shape again.

    Args:
        small: on the device to train on; left as it is. Its dense convolutions' weights do not matter.
        data: what to train on.
        config: the settings.
        checkpoint, log: as for `train`.
    """
    device = next(small.parameters()).device
    larger = expand(small, config.ratio, data.image_size, config.seed).to(device)

    def note(_: int) -> dict[str, Any]:
        return {"val_accuracy": evaluate(larger, decoded_by(data.val, config.workers))}

    def move(progress: float) -> None:
        set_fade(larger, min(1.0, max(0.0, (progress - config.fade_from) / (config.fade_to - config.fade_from))))

    loss = cross_entropy(config.label_smoothing)
    history = train(
        larger, data, loss, config, before_step=move, after_epoch=note, checkpoint=checkpoint, title="expanded", log=log
    )
    return Trained(contract(larger, small).eval(), history)


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, str]]:
    """Dense convolutions and the BatchNorms registered right behind them: (name, convolution, BatchNorm's name)."""
    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if not list(module.children()) or isinstance(module, nn.BatchNorm2d)
    ]  # timm's holds its activation
    for (name, conv), (behind, norm) in itertools.pairwise(leaves):
        if (
            type(conv) is nn.Conv2d
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and isinstance(norm, nn.BatchNorm2d)
            and norm.running_mean is not None
            and norm.num_features == conv.out_channels
        ):
            yield name, conv, behind


def _check_back(larger: nn.Module, small: nn.Module, image_size: int) -> None:
    """Raise `BadModel` unless the expanded network, contracted, computes what it computes linear."""
    trial, first = copy.deepcopy(larger), next(small.parameters())
    with torch.no_grad():
        for block in shrunk_blocks(trial).values():
            for norm in block.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.bias.fill_(0.5)  # as if trained: the merged convolution has a bias then
        linear, larger = settle(trial).eval(), trial
        images = torch.rand(2, 3, image_size, image_size, device=first.device, dtype=first.dtype)
        own, back = linear(images), contract(larger, small).eval()(images)
    same = bool((own - back).abs().max() <= TOLERANCE * own.abs().max().clamp(min=1e-6))
    if not same:
        raise BadModel(
            "the network's layers are not called in the order in which they are registered: it cannot be put "
            "back after expanding"
        )
