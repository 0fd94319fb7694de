"""Blocks as affine maps: what each layer is, how they compose, and what happens at the border.

affine         Affine maps on feature maps, and their algebra: compose, add, pad.
blocks         A network's blocks.
folding        Folding.
graphs         Questions about a traced block.
interpreting   Running a traced block on an `Affine` in place of a tensor.
layers         Layers as affine maps.
merged_block   What a merged block is as a module.
padding        Hoisting: move a block's inner zero padding to the block's input, so that merging is exact.
tracing        Blocks as graphs: recording what a block does, and refusing what a graph would not show.
"""

from . import affine
from .affine import NO_PADDING, Affine, Pair
from .blocks import (
    SITE_KEY,
    Shape,
    TakeOut,
    channels_of,
    check_runs,
    check_weights,
    droppable,
    ghost_of,
    in_channels,
    input_shapes,
    is_foldable,
    linear_blocks,
    merged_shape,
    shared_modules,
    single_activations,
    site_names,
    structure_of,
)
from .folding import fold
from .graphs import (
    BOUNDARY,
    after,
    ancestors,
    bypass,
    dtype_of,
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
from .merged_block import BorderBias, MergedBlock, OnesChannel, merged_block
from .padding import InteriorBatchNorm2d
from .tracing import trace
