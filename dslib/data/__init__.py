"""Datasets, their splits, and how training images are augmented.

augmenting     Augmentation whose chance is a function of seed, epoch and image.
datasets       Datasets by name or path. Small sets are held in memory as uint8, large ones are read as they are used.
splits         A split of a dataset: batches of normalised images, from memory or from disk.
"""

from . import splits
from .augmenting import chance_of, draws, erased, mixed, rand_augment
from .datasets import Data, find_file, load_data, load_photos
from .splits import (
    Batch,
    FolderSplit,
    Split,
    Told,
    check_batch_size,
    collated,
    deaf,
    decoded_by,
    hold_back,
    normalise,
    whole,
)
