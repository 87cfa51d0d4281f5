"""Serving: many deltas of one base."""
