"""Datasets, their splits, and how training images are augmented.

datasets     CIFAR-10, Imagenette, ImageNet, digits, your own folder or arrays: by name or path
splits       a split: batches of normalised images, from memory or from files that are read as they are used
augmenting   augmentation whose chance is a function of seed, epoch and image
"""

from .augmenting import chance_of, draws, erased, mixed, rand_augment
from .datasets import Data, find_file, load_data, load_photos
from .splits import Batch, Files, FolderSplit, Split, check_batch_size, cut, decoded_by, normalise
