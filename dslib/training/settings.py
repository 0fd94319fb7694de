"""The settings of a training, and the learning rate at every moment of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import require

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}  # as Fabric calls them


@dataclass(frozen=True)
class Train:
    """Settings of one training; defaults are the paper's on ImageNet, but for `rand_augment` (5) and `erase` (0.25).

    Args:
        epochs: passes over the training split.
        lr: peak learning rate per 256 images of batch.
        batch_size: images a step, of all processes and micro-batches together.
        warmup: epochs over which the learning rate rises linearly from zero.
        final_lr: learning rate at the end.
        momentum: of SGD.
        weight_decay: on weights of two or more dimensions; never on BatchNorm, biases or gates.
        label_smoothing: of the cross-entropy with labels.
        clip: largest gradient norm.
        augment: whether training images are augmented as their dataset says, and as the next three say.
        rand_augment: magnitude of RandAugment, 0 to 10; 0 is none.
        erase: probability of an image to lose a rectangle.
        mixup: alpha of mixup; 0 is none.
        freeze_batchnorm: whether BatchNorm keeps its statistics and normalises by them, as in eval.
        accumulate: micro-batches a step, each as large as fits into memory.
        precision: float32, or mixed with bfloat16 or (on a GPU) float16.
        compile: whether the network is compiled by torch.compile.
        ema: decay of the weights' moving average, which is evaluated and kept in their place; 0 is none.
        workers: processes, of each that trains, that decode images which are read from disk; default its share of the
            machine's cores, 16 at most.
        save_minutes: the state is saved this often, after every epoch, and when the training is interrupted.
        seed: of data order, augmentation and dropout.
    """

    epochs: int = 180
    lr: float = 0.1
    batch_size: int = 256
    warmup: float = 0.0
    final_lr: float = 5e-6
    momentum: float = 0.9
    weight_decay: float = 1e-5
    label_smoothing: float = 0.1
    clip: float = 5.0
    augment: bool = True
    rand_augment: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    freeze_batchnorm: bool = False
    accumulate: int = 1
    precision: str = "float32"
    compile: bool = False
    ema: float = 0.0
    workers: int | None = None
    save_minutes: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.epochs >= 0, f"epochs: expected 0 or more, found {self.epochs}")
        require(
            self.batch_size >= 2,
            f"batch_size: expected 2 or more (BatchNorm needs them), found {self.batch_size}",
        )
        require(self.lr > 0, f"lr: expected more than 0, found {self.lr}")
        require(0 <= self.label_smoothing < 1, f"label_smoothing: expected 0 to 1, found {self.label_smoothing}")
        require(self.clip > 0, f"clip: expected more than 0, found {self.clip}")
        require(0 <= self.momentum < 1, f"momentum: expected 0 to 1, found {self.momentum}")
        require(0 <= self.rand_augment <= 10, f"rand_augment: expected 0 to 10, found {self.rand_augment}")
        require(0 <= self.erase <= 1, f"erase: expected 0 to 1, found {self.erase}")
        require(0 <= self.ema < 1, f"ema: expected 0 to 1, found {self.ema}")
        require(self.accumulate >= 1, f"accumulate: expected 1 or more, found {self.accumulate}")
        require(self.precision in PRECISIONS,
                f"precision: expected one of {', '.join(PRECISIONS)}, found {self.precision!r}")  # fmt: skip
        require(self.save_minutes > 0, f"save_minutes: expected more than 0, found {self.save_minutes}")
        for name in ("warmup", "weight_decay", "final_lr", "mixup"):
            require(getattr(self, name) >= 0, f"{name}: expected 0 or more, found {getattr(self, name)}")
        require(self.seed >= 0, f"seed: expected 0 or more, found {self.seed}")
        require(self.workers is None or self.workers >= 0, f"workers: expected 0 or more, found {self.workers}")


def lr_at(progress: float, config: Train) -> float:
    """The learning rate at `progress` (0 to 1) through training: linear warm-up, then cosine."""
    peak = config.lr * config.batch_size / 256
    warm = config.warmup / max(config.epochs, 1)
    if progress < warm:
        return peak * progress / warm
    done = (progress - warm) / max(1 - warm, 1e-9)
    return config.final_lr + (peak - config.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
