"""A split of a dataset: batches of normalised images, from memory or from disk."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sized
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
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return replace(self, images=self.images[order], labels=self.labels[order])


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
        from torch.utils.data import DataLoader, Subset

        told = Told(_with_transform(self.folder, self.resize))
        chosen = Subset(told, range(len(self)) if order is None else order.tolist())
        workers = 0 if "openvino" in sys.modules else self.workers  # after OpenVINO ran, forking a worker can crash
        loader = DataLoader(chosen, batch_size, num_workers=workers, worker_init_fn=deaf, collate_fn=collated)
        for images, labels in whole(loader):
            yield normalise(images), labels

    def first(self, count: int, seed: int = 0) -> Split:
        """A random part of `count` images, in memory."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        folder = _with_transform(self.folder, self.resize)
        images = torch.stack([folder[int(i)][0] for i in order])
        return Split(images, torch.tensor([self.folder.targets[int(i)] for i in order]))


class Told(Dataset[Any]):
    """A dataset of which an image that cannot be read is a text that says so.

    Raised in a worker process, an error would come with pages of traceback.

    Args:
        images: index -> image and label; raises BadData.
    """

    def __init__(self, images: Any) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._images[index]
        except BadData as error:
            return str(error)


def collated(found: list[Any]) -> Any:
    """A batch of a `Told` dataset; or the first text in it."""
    broken = next((one for one in found if isinstance(one, str)), None)
    if broken is not None:
        return broken
    images, labels = zip(*found, strict=True)
    return torch.stack(images), torch.tensor(labels)


def whole(batches: Iterable[Any]) -> Iterator[Batch]:
    """Batches from `collated`, in the process that asked for them; raises BadData for a text."""
    for found in batches:
        if isinstance(found, str):
            raise BadData(found)
        yield found


def hold_back(train: Split | FolderSplit, count: int) -> tuple[Split, Split]:
    """All but some of the images, the same at every call; and these.

    Raises:
        BadData: if the images are not held in memory, or are too few.
    """
    if not isinstance(train, Split):
        raise BadData("expected a dataset that is held in memory, to hold images back; this one is read from disk")
    if len(train) <= count:
        raise BadData(f"expected more than {count} training images, to hold that many back; found {len(train)}")
    mixed = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).split([count, len(train) - count])
    held, rest = (replace(train, images=train.images[part], labels=train.labels[part]) for part in mixed)
    return rest, held


def decoded_by(split: Split | FolderSplit, workers: int | None) -> Split | FolderSplit:
    """The split, decoded by so many processes where it is read from disk; None leaves it as it is."""
    return split if workers is None or isinstance(split, Split) else replace(split, workers=workers)


def deaf(_: int) -> None:
    """Let a worker leave signals to the training, which saves its state and then ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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


def _with_transform(folder: ImageFolder, crop: Any) -> ImageFolder:
    from copy import copy

    from torchvision.transforms import v2

    new = copy(folder)
    new.transform = v2.Compose([v2.PILToTensor(), crop])
    return new
