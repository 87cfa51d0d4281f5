"""Sampling: kept positions from (seed, tensor name, flat position) alone. Part of the file format."""
