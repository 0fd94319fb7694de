"""Augmentation whose chance is a function of seed, epoch and image: the same for any batch, process or resumption.

Images that are held in memory are cropped, flipped, shifted and erased in whole batches, on the device that trains.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 10  # random numbers of an image: five for a crop or shift and the flip, five for erasing


def draws(seed: int, epoch: int, indices: Tensor, count: int = DRAWS) -> Tensor:
    """Random numbers of images, (B, count) float32 in [0, 1), on the CPU.

    Args:
        seed: of the training.
        epoch: from 0.
        indices: of the images, (B,) int64.
        count: numbers of each.
    Source: the mixing function of SplitMix64 (Steele et al., OOPSLA 2014), of a counter.
    """
    counter = np.arange(count, dtype=np.uint64)[None]
    of_epoch = _mixed(_mixed(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    key = _mixed(of_epoch + indices.numpy().astype(np.uint64))
    bits = _mixed(key[:, None] + counter * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) / np.float32(2**24))


def _mixed(z: Any) -> Any:
    """64 well mixed bits of each of some 64-bit integers; products wrap around."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Crops:
    """Random resized crops and left-right flips.

    Args:
        scale: least and largest share of the area.
        ratio: least and largest width over height.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (B, 3, H, W) of 0 to 255, numbers (B, 5 or more) -> float images of the same shape."""
        from torchvision.ops import roi_align

        height, width = images.shape[2:]
        area = _between(*self.scale, numbers[:, 0]) * height * width
        ratio = _between(math.log(self.ratio[0]), math.log(self.ratio[1]), numbers[:, 1]).exp()
        w, h = (area * ratio).sqrt().clamp(max=width), (area / ratio).sqrt().clamp(max=height)
        x, y = (width - w) * numbers[:, 2], (height - h) * numbers[:, 3]
        boxes = torch.stack([torch.arange(len(images), device=x.device), x, y, x + w, y + h], 1)
        return flipped(roi_align(images.float(), boxes, (height, width), aligned=True), numbers[:, 4])


@dataclass(frozen=True)
class Shifts:
    """Random shifts by whole pixels, up to a share of the side; what comes in is black.

    Args:
        share: of the side.
        flip: whether images are flipped too: where mirror images mean the same.
    """

    share: float = 1 / 8
    flip: bool = False

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (B, 3, H, W), numbers (B, 5 or more) -> images of the same type and shape."""
        (height, width), device = images.shape[2:], images.device
        most = int(min(height, width) * self.share)
        padded = F.pad(images, (most,) * 4)
        x, y = ((numbers[:, i] * (2 * most + 1)).long()[:, None] for i in (2, 3))
        rows, columns = y + torch.arange(height, device=device), x + torch.arange(width, device=device)
        chosen = torch.arange(len(images), device=device)[:, None, None]
        shifted = padded.permute(0, 2, 3, 1)[chosen, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return flipped(shifted, numbers[:, 4]) if self.flip else shifted


def _between(low: float, high: float, numbers: Tensor) -> Tensor:
    return low + (high - low) * numbers


def flipped(images: Tensor, numbers: Tensor) -> Tensor:
    """Images (B, 3, H, W), mirrored left to right where their number (B,) is below a half."""
    return torch.where(numbers[:, None, None, None] < 0.5, images.flip(3), images)


def erased(images: Tensor, numbers: Tensor, probability: float) -> Tensor:
    """Normalised images (B, 3, H, W) with a rectangle of some set to zero, ImageNet's mean.

    Args:
        images: normalised.
        numbers: (B, 5).
        probability: of an image to lose a rectangle, of 2 % to a third of its area, 0.3 to 3.3 times as wide as high.
    Source: Zhong et al., Random Erasing, AAAI 2020; limits and `const` mode as in timm.
    """
    height, width = images.shape[2:]
    area = _between(0.02, 1 / 3, numbers[:, 1]) * height * width
    ratio = _between(math.log(0.3), -math.log(0.3), numbers[:, 2]).exp()
    inside = (numbers[:, 0] < probability)[:, None, None]
    for size, side, place, shape in (
        (height, (area / ratio).sqrt(), numbers[:, 3], (1, -1, 1)),
        (width, (area * ratio).sqrt(), numbers[:, 4], (1, 1, -1)),
    ):
        first = ((size - side.clamp(max=size)) * place)[:, None, None]
        at = torch.arange(size, device=images.device).reshape(shape)
        inside = inside & (at >= first) & (at < first + side[:, None, None])
    return images.masked_fill(inside[:, None], 0.0)


def mixed(images: Tensor, labels: Tensor, classes: int, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """A batch blended with itself in reverse: images (B, 3, H, W) and labels as probabilities (B, classes).

    Args:
        images: normalised.
        labels: (B,) int64.
        classes: how many.
        alpha: both parameters of the beta distribution that the share is drawn from.
        seed: of the batch.
    Source: Zhang et al., mixup, ICLR 2018.
    """
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    soft = F.one_hot(labels, classes).to(images.dtype)
    return torch.lerp(images.flip(0), images, share), torch.lerp(soft.flip(0), soft, share)


def rand_augment(magnitude: int) -> Any:
    """timm's RandAugment of two operations, PIL image -> PIL image; magnitude 0 to 10.

    Source: Cubuk et al., RandAugment, 2020.
    """
    from timm.data.auto_augment import rand_augment_transform

    return rand_augment_transform(f"rand-m{magnitude}", {"img_mean": (124, 116, 104)})


@contextmanager
def chance_of(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's chance is this image's own within the block, and what it was after."""
    own = int(draws(seed, epoch, torch.tensor([index]), 1)[0, 0] * 2**24)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own)
        random.seed(own)
        np.random.seed(own)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
