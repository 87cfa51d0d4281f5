"""Calibration: what is found on data once the kept entries are chosen."""

from dpp_lightning.calibration.calibration_data import Calibration
from dpp_lightning.calibration.input_collector import collected_inputs

__all__ = ["Calibration", "collected_inputs"]
