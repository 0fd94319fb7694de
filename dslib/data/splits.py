"""A split of a dataset: batches of normalised images, from memory or from disk."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import BadConfig, BadData

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Images in memory.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        augment: from images (B, 3, H, W) of 0 to 255 and random numbers (B, 5 or more) of 0 to 1 to augmented
            images of the same shape, as `augmenting.Crops`; None leaves them as they are.
    """

    images: Tensor
    labels: Tensor
    augment: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """Batches of normalised float images (B, 3, H, W) and labels (B,), not augmented.

        Args:
            batch_size: images a batch; the last may be smaller.
            order: indices to visit; default all, in their own order.
        """
        order = torch.arange(len(self)) if order is None else order
        for chosen in order.split(batch_size):
            yield normalise(self.images[chosen]), self.labels[chosen]

    def first(self, count: int, seed: int = 0) -> Split:
        """A random part of `count` images, the same for the same seed."""
        return self.part(shuffled(len(self), seed)[:count])

    def part(self, chosen: Tensor) -> Split:
        """The images with these indices."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


@dataclass
class Files(Dataset[Any]):
    """The image files of a folder, (3, H, W) uint8 each with its label; a text for one that cannot be read.

    Raised in a worker process, an error would come with pages of traceback.

    Args:
        folder: as torchvision's `ImageFolder`; its `loader` raises BadData.
        crop: what is done to each image, uint8 of any size.
    """

    folder: Any
    crop: Any

    def __len__(self) -> int:
        return len(self.folder.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        from torchvision.transforms.v2.functional import pil_to_tensor

        path, label = self.folder.samples[index]
        try:
            return self.cropped(index, pil_to_tensor(self.folder.loader(path))), label
        except BadData as error:
            return str(error)

    def cropped(self, index: int, image: Tensor) -> Tensor:
        """The image, cropped; augmented where a subclass says so."""
        return self.crop(image)

    def batches(self, batches: list[list[int]], workers: int, pin_memory: bool = False) -> Iterator[Batch]:
        """Batches of these images and labels, decoded in worker processes.

        Raises:
            BadData: if an image cannot be read.
        """
        from torch.utils.data import DataLoader

        loader = DataLoader(
            self,
            batch_sampler=batches,
            num_workers=0 if "openvino" in sys.modules else workers,  # after OpenVINO ran, a forked worker can crash
            worker_init_fn=_ignore_signals,
            collate_fn=_collated,
            generator=torch.Generator(),  # its own: the caller's random numbers go on
            pin_memory=pin_memory,
        )
        for found in loader:
            if isinstance(found, str):
                raise BadData(found)
            yield found


def _ignore_signals(_: int) -> None:
    """Let a worker leave signals to the training, which saves its state and then ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collated(found: list[Any]) -> Any:
    """A batch; or the first text in it."""
    broken = next((one for one in found if isinstance(one, str)), None)
    if broken is not None:
        return broken
    images, labels = zip(*found, strict=True)
    return torch.stack(images), torch.tensor(labels)


@dataclass(frozen=True)
class FolderSplit:
    """Images read from disk as they are used; the same interface as `Split`.

    Args:
        folder: of images.
        augment, resize: what is done to each image (3, H, W) uint8 of any size to train on it, and to evaluate.
        workers: processes that decode.
    """

    folder: ImageFolder
    augment: Any
    resize: Any
    workers: int = field(default_factory=lambda: _usual_workers())

    def __len__(self) -> int:
        return len(self.folder)

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """As `Split.batches`, decoding in worker processes."""
        order = torch.arange(len(self)) if order is None else order
        chosen = [part.tolist() for part in order.split(batch_size)]
        for images, labels in Files(self.folder, self.resize).batches(chosen, self.workers):
            yield normalise(images), labels

    def first(self, count: int, seed: int = 0) -> Split:
        """A random part of `count` images, in memory."""
        chosen = shuffled(len(self), seed)[:count].tolist()
        return Split(*next(Files(self.folder, self.resize).batches([chosen], workers=0)))


def shuffled(count: int, seed: int) -> Tensor:
    """0 to count - 1 in an order that depends on the seed only."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def cut(train: Split | FolderSplit, count: int) -> tuple[Split, Split]:
    """All but some of the images, the same at every call; and these.

    Raises:
        BadData: if the images are not held in memory, or are too few.
    """
    if not isinstance(train, Split):
        raise BadData("expected a dataset that is held in memory, to hold images back; this one is read from disk")
    if len(train) <= count:
        raise BadData(f"expected more than {count} training images, to hold that many back; found {len(train)}")
    order = shuffled(len(train), 0)
    return train.part(order[count:]), train.part(order[:count])


def decoded_by(split: Split | FolderSplit, workers: int | None) -> Split | FolderSplit:
    """The split, decoded by so many processes where it is read from disk; None leaves it as it is."""
    return split if workers is None or isinstance(split, Split) else replace(split, workers=workers)


def _usual_workers() -> int:
    """Processes to decode images: one a core of this training process's share of the machine, 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 16))


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to float, with ImageNet's mean and standard deviation, channels last."""
    mean, std = _statistics(images.device)
    scaled = (images.float() / 255 - mean) / std
    return scaled.contiguous(memory_format=torch.channels_last)


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, 3, 1, 1): kept, or each batch would wait for the GPU to copy them."""
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def check_batch_size(batch_size: int, split: Sized) -> None:
    """Raise `BadConfig` unless the split has at least one whole batch."""
    if len(split) < batch_size:
        raise BadConfig(
            f"batch_size {batch_size} is larger than the split of {len(split)} images: choose a smaller one"
        )
