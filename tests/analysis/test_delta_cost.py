"""What a delta folder costs: the bytes of factors are told apart, and all bytes are those of the files."""

import pytest
from factored import factored_pair
from safetensors.torch import load_file

from dpp_lightning.analysis.delta_cost import inspect_delta
from dpp_lightning.cli import main
from dpp_lightning.delta.folder import delta_bytes

KINDS = {
    "ranked": {"method": "magnitude", "factors_dtype": "int4"},
    "seeded": {"method": "dare", "drawn_rate": 0.8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_totals_of_factors(tmp_path, kind):
    _, delta = factored_pair(**KINDS[kind])
    cost = inspect_delta(delta.save_pretrained(tmp_path / "d"))
    rows = {row.name: row for row in cost.tensors}
    for name, tensor in delta.tensors.items():
        assert rows[name].rank == (None if tensor.factors is None else tensor.factors.rank)
        assert rows[name].kept == tensor.stored_numbers
        assert (rows[name].factors > 0) == (tensor.factors is not None)
    blob = load_file(tmp_path / "d/delta_model.safetensors")["factors"].numel()
    assert 0 < blob - cost.factors <= 16  # the head of the one chunk
    assert sum(row.factors for row in cost.tensors) == pytest.approx(cost.factors)
    parts = (cost.positions, cost.values, cost.factors, cost.carried, cost.config, cost.overhead)
    assert sum(parts) == cost.total == delta_bytes(tmp_path / "d")
    assert cost.density == pytest.approx(delta.density)


def test_the_table_shows_rank_and_factors_only_where_there_are_any(tmp_path, capsys):
    _, delta = factored_pair()
    delta.save_pretrained(tmp_path / "d")
    assert main(["inspect", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["density", "positions", "entropy", "values", "factors", "dense"]
    assert lines[1] == ["tensor", "shape", "%", "rank", *["bytes"] * 5]
    assert next(line for line in lines if line[0] == "layers.0.0.weight")[3] == "2"
    assert f"factors {inspect_delta(tmp_path / 'd').factors:,}" in out
