"""What calibrating stands on: which layers are fitted, to what, and by which least squares.

layers         Where a network is fitted to another: which convolutions, in which order, and what is wanted there.
least_squares  Ridge least squares for the weights of a convolution, from sums over batches.
replaying      Running the rest of a network: what comes before a module is not computed again, but replayed.
statistics     Feature statistics matching: a channel gets the mean and spread that it has in the original.
"""

from .layers import FittedLayer, conv_at, in_shares, open_blocks, targets_at, values_at
from .least_squares import Sums
from .replaying import Rest
from .statistics import match_statistics, moments_at
