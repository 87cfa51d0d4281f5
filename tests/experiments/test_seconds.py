"""What the seconds of a run went into."""

from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.tables import seconds_caption, table_caption


def row(**values):
    return Result("dare", 0.5, pruning_rate=0.9, seed=0, **values)


def test_shares_are_of_all_pruned_rows_together():
    rows = [
        Result("base", 0.1, seconds=100.0),
        row(seconds=10.0, prune_seconds=2.0, score_seconds=7.0),
        row(seconds=30.0, prune_seconds=18.0, score_seconds=11.0),
    ]
    assert seconds_caption(rows) == ("40.0 s for 2 pruned models: draw, search and train 50%, score 45%, save 5%")


def test_rows_that_do_not_tell_have_no_shares():
    assert seconds_caption([row(seconds=3.0)]) == seconds_caption([Result("base", 0.1)]) == ""


def test_the_caption_on_a_terminal_is_one_text_without_escapes():
    rows = [Result("base", 0.1, split="validation"), row(seconds=2.0, prune_seconds=0.5, score_seconds=1.0)]
    caption = table_caption(rows, "val_score")
    assert caption.startswith("score: val_score on validation; 2.0 s for 1 pruned models: ")
    assert "\n" not in caption  # which a terminal's table shows as an escape
