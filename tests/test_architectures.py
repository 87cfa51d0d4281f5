"""Models of transformers on every road from two models to a pruned one: by folders, modules, the callback, a .ckpt."""

import pytest
from architecture_checks import CALIBRATED, CHECKS, METHODS, TRAINED, Cell, run_checks
from architectures import ARCHITECTURES

# one architecture for each way in which the names in memory and those in the files differ
DEFAULT = (
    "bert, gamma and beta in the base",  # the library gives tensors of old files other names
    "wav2vec2, weight_g and weight_v in the base",
    "qwen2, tied",  # a head that is the embedding
    "mixtral",  # experts: one tensor in memory, several in the file
    "t5",  # blocks in blocks, an embedding that three modules use
    "vit",  # names in the file are those of a former class
    "siglip",  # two towers, each with a prefix of its own
    "llava",  # a model in a model, renamed
)
OTHERS = {*METHODS, *CALIBRATED, *TRAINED, "inspect", "merge"} - {
    "wanda",
    "lowrank by block",
}  # not in the default tests
ROADS = tuple(name for name in CHECKS if name not in OTHERS)


def wrong(cells: dict[str, Cell], allowed: tuple[str, ...] = ("ok",)) -> dict[str, str]:
    return {name: f"{cell.state}: {cell.note}" for name, cell in cells.items() if cell.state not in allowed}


@pytest.mark.parametrize("name", DEFAULT)
def test_every_road_gives_the_same_delta_and_rate_0_the_finetuned_model(name, tmp_path):
    assert wrong(run_checks(ARCHITECTURES[name], tmp_path, ROADS)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_check_of_the_matrix_is_right_or_refused_in_one_line(name, tmp_path):
    assert wrong(run_checks(ARCHITECTURES[name], tmp_path), ("ok", "refused")) == {}
