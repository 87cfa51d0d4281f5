"""The fit of ``lowrank``: plain or weighted directions, means in the biases, trained factors, damping of the rest.

Every form is compared by its loss on held-out calibration data, as the file will hold it, and the best is kept: no form
is best on every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dpp_lightning.calibration.distillation import Distillation, TrainingSettings
from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, held_tensors
from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.low_rank import DAMPING, FACTORS_DTYPE, decompose, mean_shift, rest_of, with_rest
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.tensors.blocks import weights_of_bias
from dpp_lightning.tensors.dtypes import to_dtype
from dpp_lightning.tensors.factors import Factors

MEANS_BELOW = 4  # mean ranks from which the means of what is left out are worth nothing
# More trained numbers for each calibration text fit the texts and not the model; block by block there may be more.
NUMBERS_PER_TEXT, NUMBERS_PER_TEXT_BY_BLOCK = 400, 1000
STEPS, EPOCHS, RATE = 160, 5, 0.05  # as many steps as so many epochs have, and no fewer than that
DAMPINGS = (0.25, 0.5, 0.75, 1.0)  # of the sampled rest that are tried
_MEANS = ", means in the biases"


@dataclass(frozen=True)
class _Form:
    """One form of the delta: its name, and the delta with its held-out loss."""

    name: str
    delta: SparseDelta
    loss: float


def fit_factors(calibrator: Calibrator, delta: SparseDelta) -> FoundRescaling:
    """Find the best form of a low rank on held-out calibration data: the fit of ``lowrank``.

    Compared are plain directions and those weighted by the inputs, below a mean rank of 4 also with the means of what
    is left out in the biases. Without a rest the better is trained for five epochs or 160 steps, where its numbers
    are at most 1,000 a calibration text block by block, 400 end to end. With a rest that is damped by the best of four
    factors and nothing is trained: what trained factors leave is larger, and drawn beside them undoes their training.

    Args:
        calibrator: its objective trains; its pairs may know their inputs.
        delta: plain factors, drawn in float32.

    Returns:
        The rescaling that gives that delta, whatever it is asked to apply to: it belongs to one mask.
    """
    training = calibrator.distillation
    untrained = _untrained(calibrator.pairs, delta, calibrator.dtype)
    forms = [_Form(name, form, _loss(form, calibrator)) for name, form in untrained]
    best = min(forms, key=lambda form: form.loss)
    before = next(form.loss for form in forms if form.name == "plain")
    has_rest = any(len(tensor.values) for tensor in best.delta.tensors.values())
    forms += _damped(best, calibrator) if has_rest else _trained(best, calibrator)
    best = min(forms, key=lambda form: form.loss)
    found = _described(best, before, training)
    return FoundRescaling(lambda _: found, tuple((float(i), form.loss) for i, form in enumerate(forms)))


def _trained(best: _Form, calibrator: Calibrator) -> list[_Form]:
    """The form with trained factors; none where these are too many numbers for the calibration data."""
    training = calibrator.distillation
    steps, by_block = max(STEPS, EPOCHS * len(training.training)), training.teacher.knows_blocks
    dtype = _factors_dtype(best.delta)
    settings = TrainingSettings.of(best.delta.info, steps, RATE, factors_dtype=dtype, by_block=by_block)
    most = (NUMBERS_PER_TEXT_BY_BLOCK if settings.by_block else NUMBERS_PER_TEXT) * training.samples
    if best.delta.num_factor_numbers > most:
        return []
    found, _ = training.train(best.delta, settings, calibrator.tell_step)
    return [_Form(f"{best.name}, trained" + (" by block" if settings.by_block else ""), found, training.loss(found))]


def _loss(delta: SparseDelta, calibrator: Calibrator) -> float:
    """The held-out loss of a delta as the file will hold it."""
    tensors = held_tensors(delta, calibrator.pairs, calibrator.dtype, _factors_dtype(delta))
    return calibrator.distillation.loss(delta.with_changes(tensors))


def _described(best: _Form, before: float, training: Distillation) -> SparseDelta:
    """The delta of the best form, which says how it was found."""
    said = {
        **best.delta.info.training,
        "form": best.name,
        "texts": training.samples,
        "held_out_before": before,
        "held_out_after": best.loss,
    }
    return best.delta.with_changes(training=said)


def _untrained(pairs: Sequence[TensorPair], delta: SparseDelta, dtype: str | None) -> Iterable[tuple[str, SparseDelta]]:
    """The forms that need no training, by name; the first is the delta as it was drawn."""
    yield "plain", delta
    factors = {name: tensor.factors for name, tensor in delta.tensors.items() if tensor.factors is not None}
    means = _mean_rank(factors) < MEANS_BELOW and any(pair.inputs is not None for pair in pairs)
    if means:
        yield f"plain{_MEANS}", with_means(pairs, delta, dtype)
    if any(pair.inputs is not None and pair.inputs.products is not None for pair in pairs):
        ranks = [factors[pair.name].rank for pair in pairs]
        weighted = {p.name: f for p, f in zip(pairs, decompose(pairs, ranks, weighted=True), strict=True)}
        found = _with_factors(pairs, delta, weighted)
        yield "weighted by the inputs", found
        if means:
            yield f"weighted by the inputs{_MEANS}", with_means(pairs, found, dtype)


def _mean_rank(factors: Mapping[str, Factors]) -> float:
    maps = [part for part in factors.values() if not part.is_whole]
    return sum(part.rank for part in maps) / max(len(maps), 1)


def with_means(pairs: Sequence[TensorPair], delta: SparseDelta, dtype: str | None) -> SparseDelta:
    """The delta with the biases taking what it leaves out of their maps at the mean input: (delta - B A - S) x_mean.

    Args:
        pairs: the tensors, those of maps with their inputs where these are known.
        delta: factors B A of all tensors, and a sampled rest S or none.
        dtype: that the file holds the rest in.
    """
    by_name = {pair.name: pair for pair in pairs}
    held = held_tensors(delta, pairs, dtype, _factors_dtype(delta))
    found = dict(delta.tensors)
    for name, tensor in delta.tensors.items():
        weights = [weight for weight in weights_of_bias(name) if weight in by_name]
        if not weights or tensor.factors is None or not tensor.factors.is_whole:
            continue
        shift = mean_shift(by_name[weights[0]], held[weights[0]].dense(delta.q))
        if shift is not None and shift.numel() == tensor.factors.numbers:
            of_bias = by_name[name].delta().reshape(-1) + shift
            found[name] = replace(tensor, factors=Factors.whole(of_bias))
    return delta.with_changes(found)


def _factors_dtype(delta: SparseDelta) -> str:
    return str(delta.info.settings.get("factors_dtype", FACTORS_DTYPE))


def _with_factors(pairs: Sequence[TensorPair], delta: SparseDelta, factors: Mapping[str, Factors]) -> SparseDelta:
    """The delta with other factors, and the rest sampled of what these leave."""
    tensors = {name: replace(tensor, factors=factors[name]) for name, tensor in delta.tensors.items()}
    return _with_new_rest(pairs, delta.with_changes(tensors))


def _with_new_rest(pairs: Sequence[TensorPair], delta: SparseDelta) -> SparseDelta:
    """The delta with its rest sampled anew of what its factors leave; the same where there is no rest."""
    settings, dtype = delta.info.settings, _factors_dtype(delta)
    rest = rest_of(settings)
    if rest == 1.0:
        return delta
    parts: list[Factors] = []
    for pair in pairs:
        part = delta.tensors[pair.name].factors
        assert part is not None
        parts.append(part)
    rounded = [part.rounded(dtype, pair.name) for pair, part in zip(pairs, parts, strict=True)]
    kept = with_rest(pairs, rounded, parts, delta.info.seed, rest, float(settings.get("damping", DAMPING)))
    tensors = {}
    for pair, entries in zip(pairs, kept, strict=True):
        assert entries.values is not None
        values = to_dtype(entries.values, delta.info.dtype, pair.finetuned, pair.name)
        indices = entries.positions.to(torch.int32) if pair.numel < 2**31 else entries.positions
        tensors[pair.name] = SparseTensor(pair.shape, indices, values, entries.factors)
    return delta.with_changes(tensors)


def _damped(form: _Form, calibrator: Calibrator) -> list[_Form]:
    """The form with its rest damped otherwise, and where it has means in the biases with those of what is then left."""
    now, forms = float(form.delta.info.settings.get("damping", DAMPING)), []
    for damping in DAMPINGS:
        if damping == now:
            continue
        tensors = {
            name: replace(tensor, values=tensor.values * (damping / now)) for name, tensor in form.delta.tensors.items()
        }
        delta = form.delta.with_changes(tensors, settings={**form.delta.info.settings, "damping": damping})
        if form.name.endswith(_MEANS):
            delta = with_means(calibrator.pairs, delta, calibrator.dtype)
        forms.append(_Form(f"{form.name}, rest times {damping:g}", delta, _loss(delta, calibrator)))
    return forms
