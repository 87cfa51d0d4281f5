"""Serving: many deltas of one base in one process, swapped in milliseconds or mixed within one batch."""
