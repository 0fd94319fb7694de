"""The images of a training: which one every process sees in every step, augmented, on its device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import (
    Batch,
    Data,
    Files,
    FolderSplit,
    Split,
    chance_of,
    check_batch_size,
    draws,
    erased,
    mixed,
    normalise,
    rand_augment,
)
from ..errors import BadConfig
from . import processes
from .settings import Train


class Feed:
    """Batches of a training split, as a function of seed, epoch and step only.

    A step's images are cut into micro-batches, those of the first round for the processes in order, then those of
    the second: two processes see what one sees that accumulates two.

    Args:
        data: its training split is fed.
        config: of the training.
        device: to put the batches on; a split in memory moves there as a whole where a GPU has room for it.
    Raises:
        BadConfig: if the batch cannot be cut evenly, or is larger than the split.
    """

    def __init__(self, data: Data, config: Train, device: torch.device) -> None:
        rounds = config.accumulate * processes.count()
        if not (config.batch_size % rounds == 0 and config.batch_size // rounds >= 2):
            raise BadConfig(
                f"batch_size {config.batch_size}: expected two images or more for each of {config.accumulate} "
                f"micro-batches in {processes.count()} processes, all alike: give a multiple of {rounds}"
            )
        check_batch_size(config.batch_size, data.train)
        self.split, self.classes, self.config, self.device = data.train, len(data.classes), config, device
        self.steps, self._micro = len(data.train) // config.batch_size, config.batch_size // rounds
        self._images = resident(data.train, device) if isinstance(data.train, Split) else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Each step's micro-batches of this process, from step `start` on: images (b, 3, H, W), labels (b,)."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
        order = torch.randperm(len(self.split), generator=generator)[: self.steps * self.config.batch_size]
        mine = order.reshape(self.steps, self.config.accumulate, processes.count(), self._micro)[:, :, processes.rank()]
        pieces = mine[start:].reshape(-1, self._micro)
        loaded = self._from_memory(epoch, pieces) if self._images is not None else self._from_disk(epoch, pieces)
        micros: list[Batch] = []
        for chosen, (images, labels) in zip(pieces, loaded, strict=True):
            micros.append(self._finished(epoch, chosen, images, labels))
            if len(micros) == self.config.accumulate:
                yield micros
                micros = []

    @property
    def remedy(self) -> str:
        """What helps if a training waits for this."""
        if self._images is None:
            return "raise --workers (for dslib run --search-workers, --finetune-workers), or store the images smaller"
        return "they are augmented one by one: leave --rand-augment out, or give it a folder of files and --workers"

    def _from_memory(self, epoch: int, pieces: Tensor) -> Iterator[Batch]:
        assert isinstance(self.split, Split)
        assert self._images is not None
        config, labels = self.config, self.split.labels[pieces].to(self.device)
        policy = rand_augment(config.rand_augment) if config.augment and config.rand_augment else None
        places = pieces.to(self._images.device)
        for chosen, place, label in zip(pieces, places, labels, strict=True):
            images = sent(self._images[place], self.device)
            if config.augment and self.split.augment is not None:
                images = self.split.augment(images, sent(draws(config.seed, epoch, chosen), self.device))
            if policy is not None:
                images = _one_by_one(images, policy, config.seed, epoch, chosen)
            yield images, label

    def _from_disk(self, epoch: int, pieces: Tensor) -> Iterator[Batch]:
        split, config = self.split, self.config
        assert isinstance(split, FolderSplit)
        policy = rand_augment(config.rand_augment) if config.augment and config.rand_augment else None
        crop = split.augment if config.augment else split.resize
        files = _AugmentedFiles(split.folder, crop, policy, config.seed, epoch)
        workers = split.workers if config.workers is None else config.workers
        yield from files.batches(pieces.tolist(), workers, pin_memory=self.device.type == "cuda")

    def _finished(self, epoch: int, chosen: Tensor, images: Tensor, labels: Tensor) -> Batch:
        """On the device, normalised, erased, mixed."""
        config = self.config
        images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
        images = normalise(images)
        if config.augment and config.erase:
            images = erased(images, sent(draws(config.seed, epoch, chosen)[:, 5:], self.device), config.erase)
        if config.augment and config.mixup:
            seed = int(draws(config.seed + 1, epoch, chosen[:1], 1)[0, 0] * 2**24)
            return mixed(images, labels, self.classes, config.mixup, seed)
        return images, labels


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU from pinned memory, or the copy would wait for all that the GPU still does."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def resident(split: Split, device: torch.device) -> Tensor:
    """The split's images, on the GPU if they take less than a quarter of what is free there."""
    if device.type != "cuda" or split.images.numel() > torch.cuda.mem_get_info(device)[0] / 4:
        return split.images
    return split.images.to(device)


def _one_by_one(images: Tensor, policy: Any, seed: int, epoch: int, chosen: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    done = []
    for image, index in zip(images.round().byte().cpu(), chosen.tolist(), strict=True):
        with chance_of(seed, epoch, index):
            done.append(pil_to_tensor(policy(to_pil_image(image))))
    return torch.stack(done)


@dataclass
class _AugmentedFiles(Files):
    """Images of a folder, cropped and augmented each by its own chance."""

    policy: Any
    seed: int
    epoch: int

    def cropped(self, index: int, image: Tensor) -> Tensor:
        """The image, cropped and augmented."""
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        with chance_of(self.seed, self.epoch, index):
            cropped = self.crop(image)
            return cropped if self.policy is None else pil_to_tensor(self.policy(to_pil_image(cropped)))
