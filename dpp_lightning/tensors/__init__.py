"""Tensors: the name, block, dtype, shards and hash of one tensor; gather and scatter at flat positions."""
