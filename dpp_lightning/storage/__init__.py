"""Storage: weights on disk and on the hub, read mapped into memory and written whole."""
