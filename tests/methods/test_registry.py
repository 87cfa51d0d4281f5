"""The table of methods: a selection or a fit of one's own is one row more, and every door takes it."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import pair as two_models

from dpp_lightning import METHODS, prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.calibration.fit_rescaling import FoundRescaling
from dpp_lightning.methods import Fit, KeptEntries, Method, PruningSpec, register_method, registry
from dpp_lightning.methods.registry import MethodTable
from dpp_lightning.methods.rescaling import no_rescaling


def every_other(pairs, pruning_rate, seed, *, first: int = 0):
    """A toy selection: every second entry."""
    for pair in pairs:
        yield KeptEntries(torch.arange(int(first), pair.numel, 2))


def halved(calibrator, delta):
    """A toy fit: q = 2, where that costs less."""
    costs = ((delta.q, calibrator.cost(delta)), (2.0, calibrator.cost(delta.rescaled(2.0))))
    q = min(costs, key=lambda tried: tried[1])[0]
    return FoundRescaling(lambda other: other.rescaled(q), costs)


EVERY_OTHER = Method(every_other, no_rescaling, "A toy", "https://example.org", random=False)


@pytest.fixture
def registered(monkeypatch):
    """``register_method`` on a copy of the table's rows, for one test."""
    monkeypatch.setattr(METHODS, "_rows", dict(METHODS._rows))
    return register_method


def test_a_selection_of_ones_own_prunes_under_its_name(registered):
    base, finetuned = two_models()
    registered("every-other", EVERY_OTHER)
    delta = prune(base, finetuned, "every-other", 0.5, first=1)
    assert "every-other" in METHODS
    assert delta.info.settings == {"first": 1}
    for name, kept in delta.tensors.items():
        expected = (finetuned.state_dict()[name] - base.state_dict()[name]).flatten()[1::2]
        assert torch.equal(kept.values, expected)
        assert kept.indices.tolist() == list(range(1, 2 * len(expected) + 1, 2))[: len(kept.indices)]


def test_a_fit_of_ones_own_is_found_and_applied(registered):
    base, finetuned = two_models()
    registered("every-other-halved", replace(EVERY_OTHER, fit=Fit(halved, one_q=True)))
    seen = []
    delta = prune(
        base, finetuned, "every-other-halved", 0.5, calibration=Calibration(lambda d: seen.append(d.q) or -d.q)
    )
    assert delta.q == 2.0
    assert seen == [1.0, 2.0]
    with pytest.raises(ValueError, match="calibration"):
        prune(base, finetuned, "every-other-halved", 0.5)


@pytest.mark.parametrize(
    ("name", "method", "error", "message"),
    [
        ("dare", EVERY_OTHER, ValueError, "already"),
        ("Every Other", EVERY_OTHER, ValueError, "lower-case"),
        ("every-other", every_other, TypeError, "Method"),
    ],
)
def test_what_cannot_be_registered_is_refused(registered, name, method, error, message):
    with pytest.raises(error, match=message):
        registered(name, method)


def test_registering_the_same_row_twice_changes_nothing(registered):
    registered("every-other", EVERY_OTHER)
    before = list(METHODS)
    registered("every-other", EVERY_OTHER)
    assert list(METHODS) == before


def test_entry_points_are_rows_and_a_broken_one_is_named(monkeypatch):
    def broken():
        raise ImportError("no module named toy")

    points = [
        SimpleNamespace(name="toy", value="toy:METHOD", load=lambda: EVERY_OTHER),
        SimpleNamespace(name="torn", value="torn:METHOD", load=broken),
        SimpleNamespace(name="dare", value="thief:METHOD", load=lambda: EVERY_OTHER),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "dpp_lightning.methods" else [])
    table = MethodTable({"dare": METHODS["dare"]})
    with pytest.warns(UserWarning, match="is left out") as warned:
        assert list(table) == ["dare", "toy"]
    assert {str(w.message).split(" of ")[0] for w in warned} == {"method 'torn'", "method 'dare'"}
    assert table["dare"] is METHODS["dare"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(table) == 2, "loaded once"


@pytest.mark.parametrize("name", list(METHODS))
def test_every_row_is_whole(name):
    """A paper, an address, and a fit whose object reference leads to a function."""
    row = METHODS[name]
    assert row.paper
    assert row.url.startswith("https://")
    assert row.fit is None or callable(row.fit.function)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dar"}, "did you mean 'dare'"),
        ({"pruning_rate": 1.0}, r"\[0, 1\)"),
        ({"seed": -1}, "seed"),
        ({"dtype": "int5"}, "dtype"),
        ({"q": 0.0}, "above 0"),
        ({"method": "dppa", "q": 0.5}, "more than one q"),
        ({"method": "magnitude", "method_settings": {"budgt": "model"}}, "budget"),
        ({"method": "importance", "dtype": "int4"}, "int4"),
    ],
)
def test_a_spec_is_checked_when_it_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningSpec(**settings)
