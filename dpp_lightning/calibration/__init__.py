"""Calibration: what is found on data once the kept entries are chosen."""
