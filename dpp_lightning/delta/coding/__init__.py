"""The coding of kept entries: positions and values of many tensors to bytes and back."""
