"""Stage 2, finetune: recover accuracy after shrinking, by self-distillation from the unshrunk network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .algebra import BOUNDARY
from .data import Data, decoded_by
from .errors import BadConfig, BadModel, ranged
from .merging import shrunk_blocks
from .models import digest
from .shrinking import set_fade, settle
from .training import Log, Train, Trained, evaluate, train


@dataclass(frozen=True)
class Finetune(Train):
    """Settings of a finetuning; defaults are the paper's on ImageNet.

    Args:
        alpha: weight of the teacher's soft labels against the true labels.
        temperature: of the softmax on both sides of the distillation.
        fade: share of the training over which the activations of a network from `fade` go out linearly.
        features: weight of the distance between the shrunk blocks' maps and the teacher's, after the boundary
            activation and relative to their variance; 0 is none.
    """

    alpha: float = ranged(0.7, "0 to 1")
    temperature: float = ranged(1.0, "more than 0")
    fade: float = ranged(0.5, "between 0 and 1")
    features: float = ranged(0.0, "0 or more")


#: name -> settings of a recipe: usual, or gentle for what is nearly right (no augmentation, BatchNorm frozen)
RECIPES: dict[str, dict[str, Any]] = {"usual": {}, "gentle": {"augment": False, "freeze_batchnorm": True}}


def finetune(
    small: nn.Module,
    data: Data,
    teacher: nn.Module | None = None,
    config: Finetune | None = None,
    checkpoint: Path | None = None,
    log: Log | None = None,
) -> Trained:
    """A finetuned copy of a shrunk network.

    The loss is alpha * CE(teacher's softmax) + (1 - alpha) * CE(labels) + features * distance of maps.
    Activations of a network from `fade` go out linearly over the first part of the training, and are out in what is
    returned.

    Args:
        small: from `shrink` or `fade`, on the device to train on; left as it is.
        data: what to train on.
        teacher: the unshrunk network; None trains on labels alone.
        config: the settings.
        checkpoint: where to keep the state, as for `train`.
        log: where to tell how it goes.
    Raises:
        BadModel: if the teacher does no better than chance: its head was never trained for these classes.
        BadConfig: for `features` without a teacher, or of a network without shrunk blocks; BadModel: with another
            network's teacher.
    Source: Fu et al., ICML 2022, stage 2; self-distillation and its weights as in the released settings.
    """
    config = config or Finetune()
    student = copy.deepcopy(small)
    if teacher is not None:
        if log is None or log.steps is None:  # a trial may have an untrained one
            check_teacher(teacher, data)
        teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    names = list(shrunk_blocks(student)) if config.features else []
    if config.features and not (teacher is not None and bool(names)):
        raise BadConfig("features: expected a teacher, and a network from shrink or fade")
    known = dict(teacher.named_modules()) if teacher is not None else {}
    strange = [name for name in names if name not in known]
    if strange:
        raise BadModel(f"features: the teacher has no {', '.join(strange[:3])}: give the network that was shrunk")
    own = Maps(student, names)
    guide = Maps(teacher, names) if teacher is not None else own

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = network(images)
        value = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if teacher is None:
            return value
        with torch.no_grad():
            target = teacher(images).float()
        value = config.alpha * distillation(logits, target, config.temperature) + (1 - config.alpha) * value
        if names:
            value = value + config.features * feature_distance(student, own.last, guide.last)
        return value

    def note(epoch: int) -> dict[str, Any]:
        return {"val_accuracy": evaluate(student, decoded_by(data.val, config.workers))}

    history = train(
        student,
        data,
        loss,
        config,
        after_epoch=note,
        checkpoint=checkpoint,
        title="finetune",
        log=log,
        about="" if teacher is None else digest(teacher.state_dict()),
        before_step=lambda progress: set_fade(student, min(1.0, progress / config.fade)),
    )
    own.forget()
    return Trained(settle(student).eval(), history)


class Maps:
    """The last maps that some modules of a network gave.

    Args:
        model: the network.
        names: of the modules.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.last: dict[str, Tensor] = {}
        self._hooks = [model.get_submodule(n).register_forward_hook(partial(self._note, n)) for n in names]

    def _note(self, name: str, module: nn.Module, given: object, output: Tensor) -> None:
        self.last[name] = output

    def forget(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()


def feature_distance(student: nn.Module, own: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Mean over blocks of the squared distance between maps (N, C, H, W), relative to the target's variance, ().

    A block that has a boundary activation puts the target through it too.
    """
    distances = []
    for name, found in own.items():
        wanted = target[name].detach()
        block = student.get_submodule(name)
        if BOUNDARY in dict(block.named_children()):
            wanted = block.get_submodule(BOUNDARY)(wanted.clone())
        if found.shape != wanted.shape:
            raise BadModel(
                f"features: {name} gives {tuple(found.shape)}, the teacher's "
                f"{tuple(wanted.shape)}: give the network that was shrunk"
            )
        distances.append(F.mse_loss(found.float(), wanted.float()) / wanted.float().var().clamp(min=1e-6))
    return torch.stack(distances).mean()


def distillation(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's softmax against the teacher's, both (N, classes), times temperature squared."""
    soft = (target / temperature).softmax(1)
    return F.cross_entropy(logits / temperature, soft) * temperature**2


def check_teacher(teacher: nn.Module, data: Data, images: int = 512) -> None:
    """Raise `BadModel` unless the teacher is clearly better than chance on some training images."""
    part = data.train.first(images)
    accuracy, chance = evaluate(teacher, part), 1 / len(data.classes)
    margin = 3 * (chance * (1 - chance) / len(part)) ** 0.5
    if not accuracy > chance + margin:
        raise BadModel(
            f"the teacher is right on {accuracy:.1%} of {len(part)} training images, chance is {chance:.1%}: its head "
            f"is not trained for these {len(data.classes)} classes; train it first"
        )
