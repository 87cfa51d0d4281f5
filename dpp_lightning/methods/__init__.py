"""Methods: the papers as pure functions on pairs of tensors, and the tables of what can be chosen."""
