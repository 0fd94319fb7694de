"""Blocks as affine maps: what each layer is, how they compose, and what happens at the border.

affine         affine maps on feature maps and their algebra: compose, add, concatenate, pad
layers         each layer as an affine map, or why it is none
tracing        a block as a graph over its own layers; what a graph would not show is refused
graphs         questions about a traced block: its activations, its end, what comes after
padding        what makes a merge exact at the border: inner padding is hoisted to the block's input
interpreting   a traced block run on an affine map in place of a feature map
linear         blocks made linear: activations out, padding hoisted, one or several in a row
merged_block   the merged convolution as a module, with what its border needs
folding        what has no activation inside becomes one convolution: BatchNorm, RepVGG, MobileOne
blocks         which blocks a network has, and which may be merged together or dropped
forward        what one forward pass of a network shows; hooks
"""

from . import affine
from .affine import NO_PADDING, Affine, Pair, compose
from .blocks import (
    check_runs,
    check_weights,
    count_of,
    droppable,
    is_foldable,
    shared_modules,
    single_activations,
    site_names,
    structure_of,
)
from .folding import fold
from .forward import Call, Shape, dtype_of, ghost_of, hooked, in_channels, input_shapes
from .graphs import (
    BOUNDARY,
    after,
    ancestors,
    bypass,
    first_conv,
    is_activation,
    is_activation_module,
    is_conv,
    module_of,
    output_of,
    removable_activations,
    tail,
)
from .interpreting import Seen, interpret_run, linear_part, macs_of, ones_response, start_of
from .layers import free_layers, from_batchnorm, padding_of
from .linear import SITE_KEY, TakeOut, channels_of, linear_blocks, merged_shape
from .merged_block import BorderBias, MergedBlock, OnesChannel, merged_block
from .padding import InteriorBatchNorm2d
from .tracing import trace
