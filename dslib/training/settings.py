"""The settings of a training, and the learning rate at every moment of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import Settings, ranged

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}  # as Fabric calls them


@dataclass(frozen=True)
class Train(Settings):
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

    epochs: int = ranged(180, "0 or more")
    lr: float = ranged(0.1, "more than 0")
    batch_size: int = ranged(256, "2 or more (BatchNorm needs them)")
    warmup: float = ranged(0.0, "0 or more")
    final_lr: float = ranged(5e-6, "0 or more")
    momentum: float = ranged(0.9, "0 to less than 1")
    weight_decay: float = ranged(1e-5, "0 or more")
    label_smoothing: float = ranged(0.1, "0 to less than 1")
    clip: float = ranged(5.0, "more than 0")
    augment: bool = True
    rand_augment: int = ranged(0, "0 to 10")
    erase: float = ranged(0.0, "0 to 1")
    mixup: float = ranged(0.0, "0 or more")
    freeze_batchnorm: bool = False
    accumulate: int = ranged(1, "1 or more")
    precision: str = ranged("float32", f"one of {', '.join(PRECISIONS)}")
    compile: bool = False
    ema: float = ranged(0.0, "0 to less than 1")
    workers: int | None = ranged(None, "0 or more")
    save_minutes: float = ranged(10.0, "more than 0")
    seed: int = ranged(0, "0 or more")


def lr_at(progress: float, config: Train) -> float:
    """The learning rate at `progress` (0 to 1) through training: linear warm-up, then cosine."""
    peak = config.lr * config.batch_size / 256
    warm = config.warmup / max(config.epochs, 1)
    if progress < warm:
        return peak * progress / warm
    done = (progress - warm) / max(1 - warm, 1e-9)
    return config.final_lr + (peak - config.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
