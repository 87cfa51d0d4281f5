"""Merging: several deltas of one base to one."""
