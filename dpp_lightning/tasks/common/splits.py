"""What the data modules have in common: the cut of a training set, and what they learn from the trainer they are in."""

from typing import Any, TypedDict

from lightning.pytorch import Trainer

from dpp_lightning.tasks.common.reproducible import EvaluationSampler


class Replica(TypedDict):
    """How many ranks there are, and which of them this is, as samplers want to be told."""

    num_replicas: int
    rank: int


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


def of_module(trainer: Trainer | None, attribute: str) -> Any:
    """An attribute of the module that a data module is used with; None without trainer or attribute."""
    return None if trainer is None else getattr(trainer.lightning_module, attribute, None)


def replica(trainer: Trainer | None) -> Replica:
    """This rank's place among those of a trainer; the only one without."""
    kwargs = None if trainer is None else trainer.distributed_sampler_kwargs
    return (
        {"num_replicas": kwargs["num_replicas"], "rank": kwargs["rank"]} if kwargs else {"num_replicas": 1, "rank": 0}
    )


def evaluation_sampler(trainer: Trainer | None, samples: int) -> EvaluationSampler | None:
    """Deals samples that are scored out to the ranks; None where there is one."""
    own = replica(trainer)
    return EvaluationSampler(samples, **own) if own["num_replicas"] > 1 else None
