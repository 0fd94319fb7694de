"""The one training loop and what it needs: settings, state on disk, several processes, evaluation.

engine         What runs a step.
evaluating     What a network says of a split.
expanding      Expand, then shrink: a small network trains as a larger one and ends in the very same shape.
feeding        The images of a training: which one every process sees in every step, augmented, on its device.
loop           The one training loop. It knows nothing of sites.
processes      Several processes of one job, as `torchrun` or `accelerate launch` starts them.
settings       The settings of a training, and the learning rate at every moment of it.
state          The state of a training on disk.
watching       What watches a training.
"""

from . import processes
from .evaluating import batchnorm_drift, evaluate, loss_of, loss_on, predict, recalibrate_batchnorm, top1
from .expanding import Boost, boost, contract, expand
from .feeding import resident
from .loop import Trained, cross_entropy, groups, train
from .settings import Train
from .state import FREE, claimed, remove_state
from .watching import Enough, Log
