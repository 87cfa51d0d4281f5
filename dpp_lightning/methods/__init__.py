"""Methods: the papers as pure functions on pairs of tensors, and the tables of what can be chosen.

The names below are all that a method of one's own needs, see :func:`register_method`.
"""

from dpp_lightning.methods.kept_entries import KeptEntries
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.registry import METHODS, Fit, Method, register_method
from dpp_lightning.methods.tensor_pair import TensorPair

__all__ = ["METHODS", "Fit", "KeptEntries", "Method", "PruningSpec", "TensorPair", "register_method"]
