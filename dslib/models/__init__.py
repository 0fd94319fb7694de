"""Networks by name, their weights, and heads for the classes at hand.

networks   a network of torchvision, timm or your own by its name, its weights put in, its head fitted to the classes
weights    tensors in files: whole or not at all, checksummed, read without running anybody's code
"""

from .networks import find_head, load_model, load_weights
from .weights import digest, load_tensors, save_tensors
