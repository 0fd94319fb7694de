"""Networks by name, their weights, and heads for the classes at hand.

networks       Networks by name, their weights, and heads for the classes at hand.
weights        Saving and loading tensors.
"""

from .networks import find_head, load_model, load_weights
from .weights import digest, load_tensors, save_tensors
