"""PruningSpec: what one pruned delta is drawn and fitted by, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpp_lightning.methods.registry import Fit, Method, get_method
from dpp_lightning.methods.rescaling import check_q
from dpp_lightning.sampling.sampler import stream_key
from dpp_lightning.storage.byte_count import number_of_bytes


@dataclass(frozen=True)
class PruningSpec:
    """Method, rate, seed, dtype, q and the method's own settings of one pruned delta.

    Attributes:
        method: a name of ``METHODS``.
        pruning_rate: fraction of the delta that is dropped, in [0, 1).
        seed: of the random selections, an integer >= 0.
        dtype: how the kept values are held: float32, bfloat16, float16, float64, int8, int4, int3 or int2; None for the
            method's own. For most methods that is the fine-tuned dtype, at most 32 bits, and where nothing is dropped
            one in which base plus delta is the fine-tuned model bit for bit: float32 for models of one dtype of 16
            bits, float64 for others.
        q: what kept values are divided by, given by hand; None for the method's own.
        method_settings: the method's own settings, such as ``{"budget": "model"}`` of ``magnitude``.

    Raises:
        ValueError: an unknown method, setting or dtype, a rate outside [0, 1), a negative seed, a q that is not a
            finite number above 0, a q for a method that finds more than one, or a dtype for one that chooses it.
    """

    method: str = "dare"
    pruning_rate: float = 0.9
    seed: int = 0
    dtype: str | None = None
    q: float | None = None
    method_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        row = get_method(self.method)
        object.__setattr__(self, "method_settings", with_numbers_of_bytes(self.method_settings))
        row.check(self.pruning_rate, self.method_settings)
        if row.fit is not None and row.fit.draws and self.dtype is not None:
            raise ValueError(f"{self.method} chooses how the values of its forms are held: leave dtype= out")
        if self.dtype is None and row.dtype is not None and not self.keeps_all:
            object.__setattr__(self, "dtype", row.dtype)
        row.check_dtype(self.method, self.dtype)
        stream_key("", self.seed)
        if self.q is not None:
            check_q(self.q, self.pruning_rate)
            if row.fit is not None and not row.fit.one_q:
                raise ValueError(
                    f"{self.method} has more than one q; leave q= out, or take method 'darex-q' to give one"
                )

    @property
    def row(self) -> Method:
        """The method's row of ``METHODS``."""
        return get_method(self.method)

    @property
    def fit(self) -> Fit | None:
        """What is to be found on calibration data; None where nothing is: q is given, or no entry is dropped."""
        return self.row.fit if self.q is None and not self.keeps_all else None

    @property
    def ignores_rate(self) -> bool:
        """Whether the settings say how much is kept, so that the rate plays no part."""
        return self.row.ignores_rate is not None and self.row.ignores_rate(self.method_settings)

    @property
    def keeps_all(self) -> bool:
        """Whether no entry is dropped."""
        return self.pruning_rate == 0 and not self.ignores_rate

    @property
    def rest(self) -> float:
        """The rate at which a seed draws what the method's factors leave; 1 where it draws nothing."""
        return 1.0 if self.row.rest is None else self.row.rest(self.method_settings)

    @property
    def seeded(self) -> bool:
        """Whether the kept positions follow from seed and names, so that a file need not store them."""
        return self.row.seeded or self.rest < 1

    @property
    def needs_inputs(self) -> bool:
        """Whether the layers' inputs on calibration data are needed."""
        return self.row.needs_inputs(self.method_settings)

    @property
    def factors_dtype(self) -> str | None:
        """How the numbers of factors are held; None for a method that has none."""
        return self.method_settings.get("factors_dtype", self.row.factors_dtype)

    @property
    def needs_moments(self) -> bool:
        """Whether second moments of the layers' inputs are of use, where there is calibration data."""
        return self.fit is not None and self.fit.uses_moments

    @property
    def exact(self) -> bool:
        """Whether base plus delta is to be the fine-tuned model bit for bit."""
        return self.keeps_all and self.dtype is None and self.q in (None, 1)

    @property
    def streams(self) -> bool:
        """Whether values are known as they are drawn, so that a delta is written tensor by tensor; a q comes later."""
        fit = self.row.fit
        return fit is None or ((self.exact or fit.one_q) and not fit.draws)

    @property
    def drawn_dtype(self) -> str | None:
        """The dtype to draw in: that of the file, or float32 where the method's fit gives the values weights."""
        return self.dtype if self.streams else "float32"

    def check_calibration(self, *, objective: bool, inputs: bool) -> None:
        """Refuse a method that cannot do without calibration data.

        Args:
            objective: there is something to fit by.
            inputs: the layers' inputs are known, or can be had.

        Raises:
            ValueError: the method needs what is not there; the message names the cure.
        """
        if self.needs_inputs and not inputs:
            raise ValueError(
                f"{self.method} needs the layers' inputs on calibration data, and there is none: give it "
                "(calibration=, --calibration), or take a method without data such as 'magnitude' or 'importance' with "
                "score=magnitude"
            )
        if self.fit is None or not self.fit.required or objective:
            return
        if self.fit.needs_distillation:
            raise ValueError(
                f"{self.method} trains on calibration data: give it (calibration=, --calibration), some hundred texts "
                "without labels"
            )
        raise ValueError(
            f"{self.method} searches q: give calibration data (calibration=, --calibration), or q by hand (q=, --q), "
            "or take method 'dare' for q = 1 - pruning_rate"
            if self.fit.one_q
            else f"{self.method} fits its rescaling: give calibration data (calibration=, --calibration)"
        )


def with_numbers_of_bytes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings with ``max_bytes`` as a number, which may be given as ``"50kB"``.

    Raises:
        ValueError: text that says no number of bytes.
    """
    given = settings.get("max_bytes")
    return {**settings, "max_bytes": number_of_bytes(given, "max_bytes")} if isinstance(given, str) else dict(settings)
