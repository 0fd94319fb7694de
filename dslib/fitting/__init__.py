"""What calibrating stands on: which layers are fitted, to what, and by which least squares.

layers         Where a network is fitted to another.
least_squares  Ridge least squares for the weights of a convolution, from sums over batches.
replaying      Running the rest of a network: what comes before a module is not computed again, but replayed.
statistics     The mean and spread of a network's channels, and giving them to another's.
"""

from .layers import (
    Convolution,
    Opened,
    Station,
    calls,
    last_convolution,
    normalised_before,
    shares,
    targets_at,
    values_at,
    within_reach,
)
from .least_squares import Sums
from .replaying import Rest
from .statistics import match, moments_at
