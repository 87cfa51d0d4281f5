"""Analysis: numbers about models and deltas that need no training."""
