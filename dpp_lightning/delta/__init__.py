"""Deltas: ``SparseDelta``, the folder it is saved as, and the ways it is applied to a base."""
