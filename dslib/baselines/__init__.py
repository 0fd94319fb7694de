"""Other ways to make a network small, each a function of a `Trial` -> a trained network within the budget.

All spend the same time, search included; latencies are measured by the same harness.

blocks      Layer-wise pruning: whole residual blocks go, the least important first.
budget      How fast a network must become, as measured; and the least change that makes it so.
channels    Pruning of channels: uniform widths, by magnitude, by Taylor expansion.
choosing    Ways to choose which activations to keep: random, evenly spaced, the paper's masks, learned slopes.
coupling    Channels that go together: groups of layers, narrower copies, and their multiply-accumulates.
depth       Methods that take activations out: the paper's search, its masks, Layer Folding, and ours.
evolution   MetaPruning: generated weights for any widths, and an evolutionary search among them.
rebuilding  Networks again from what their records say they are, for their latency.
slim        A network of any width: one set of weights, and generators that change them for each choice of channels.
trial       One method at work: what it is given, what it has spent, and what came of it.
tuning      Equal time for all: a clock, and trainings of as many images as fit into what is left.
"""

from __future__ import annotations

from collections.abc import Callable

from .blocks import layers
from .budget import Budget
from .channels import magnitude, taylor, uniform
from .choosing import CHOICES, PAPER_KEPT, masks_of, within
from .depth import depthshrinker, given_masks, layer_folding, narrow_and_shrunk, planner
from .evolution import metapruning
from .rebuilding import rebuilt
from .trial import Pruned, Trial, seed_means
from .tuning import Effort

#: what is made of a trial's network
Method = Callable[[Trial], Pruned]
#: name -> method
METHODS: dict[str, Method] = {
    "uniform": uniform,
    "magnitude": magnitude,
    "taylor": taylor,
    "layers": layers,
    "metapruning": metapruning,
    "layer-folding": layer_folding,
    "depthshrinker": depthshrinker,
    "given-masks": given_masks,
    "planner": planner,
    "narrow-and-shrunk": narrow_and_shrunk,
}
