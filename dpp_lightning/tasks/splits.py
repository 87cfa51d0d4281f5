"""What the data modules that cut a training set have in common."""


def check_fractions(val_fraction: float, calibration_fraction: float) -> None:
    """Refuse shares of train that are negative or leave nothing of it.

    Raises:
        ValueError: as said.
    """
    if not (val_fraction >= 0 and calibration_fraction >= 0 and val_fraction + calibration_fraction < 1):
        raise ValueError(
            f"val_fraction {val_fraction} and calibration_fraction {calibration_fraction} are shares of train: "
            "each at least 0, together below 1, such as 0.1 and 0.05"
        )
