"""Pruning: two models to one delta, in memory or from checkpoint to folder."""
