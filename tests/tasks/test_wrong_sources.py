"""Sources that are wrong, given in Python: the line and the argument that a command would say, as Python's own errors."""

import pytest
from tiny import Foreign, train_loader, trainer, val_loader
from wrong_sources import make_sources

from dpp_lightning import SparseDelta, prune
from dpp_lightning.analysis.pair_report import inspect_pair
from dpp_lightning.callbacks import ApplyDelta, DeltaPruneCallback
from dpp_lightning.merging.merge_deltas import merge
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.tasks import (
    AdaMergingModule,
    CausalLMModule,
    GLUEDataModule,
    GLUEModule,
    ImageDataModule,
    InstructionDataModule,
    TextMixDataModule,
    VisionModule,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


def set_up(data):
    """A data module without a trainer, as far as it reads its data."""
    data.prepare_data()
    data.setup("fit")


def fit(pretrained):
    """A fit whose callback takes its base from a source."""
    callback = DeltaPruneCallback(method="dare", monitor="acc", pretrained=pretrained, output_dir="out")
    trainer(callback, max_epochs=1).fit(Foreign(), train_loader(100), val_loader())


# what is called, its error, what the message holds
CALLS = [
    (lambda: prune("./absent", "tuned"), FileNotFoundError, "base ./absent: no such file or folder"),
    (lambda: prune("base", "absent"), FileNotFoundError, "finetuned absent: no such file or folder; and as a hub id: "),
    (lambda: prune("base", "delta"), ValueError, "finetuned delta is a delta, not a model"),
    (lambda: prune("base", "lfs"), ValueError, "finetuned lfs: model.safetensors is a Git LFS pointer"),
    (lambda: prune("adapter", "tuned"), ValueError, "base adapter is a PEFT adapter, not a model"),
    (lambda: inspect_pair("base", "./absent"), FileNotFoundError, "finetuned ./absent: no such file or folder"),
    (lambda: load_tensors("./tunde"), FileNotFoundError, "./tunde: no such file or folder: did you mean tuned?"),
    (lambda: SparseDelta.from_pretrained("./absent"), FileNotFoundError, "delta ./absent: no such folder"),
    (lambda: SparseDelta.from_pretrained("tuned"), ValueError, "delta tuned is no delta folder but a model"),
    (lambda: SparseDelta.from_pretrained("deltas"), FileNotFoundError, "deltas/dare-0.9-0: name one"),
    (lambda: SparseDelta.from_pretrained("lfs_delta"), ValueError, "delta_model.safetensors is a Git LFS pointer"),
    (lambda: merge("base", ["delta", "./absent"]), FileNotFoundError, "delta ./absent: no such folder"),
    (lambda: merge("delta", ["delta", "delta"]), ValueError, "base delta is a delta, not a model"),
    (lambda: ApplyDelta("./absent").setup(None, None, "test"), FileNotFoundError, "delta ./absent: no such folder"),
    (lambda: fit("./absent"), FileNotFoundError, "pretrained ./absent: no such file or folder"),
    (lambda: fit("delta"), ValueError, "pretrained delta is a delta, not a model"),
    (lambda: GLUEModule("cola", "./absent"), FileNotFoundError, "model.pretrained ./absent: no such file or folder"),
    (lambda: GLUEModule("cola", "no_config"), FileNotFoundError, "model.pretrained no_config has no config.json"),
    (lambda: GLUEModule("cola", "no_type"), ValueError, "model.pretrained no_type cannot be loaded: "),
    (lambda: CausalLMModule("no_tokenizer"), FileNotFoundError, "model.pretrained no_tokenizer holds no vocabulary"),
    (lambda: CausalLMModule("truncated"), ValueError, "model.pretrained truncated: model.safetensors is not a whole"),
    (lambda: VisionModule("two_layer", pretrained="./absent"), FileNotFoundError, "model.pretrained ./absent: no such"),
    (lambda: VisionModule(pretrained="base"), ValueError, "model.pretrained base: its config.json names no architecture"),
    (
        lambda: AdaMergingModule({"sst2": "tuned"}, "base").configure_model(), ValueError,
        "model.deltas.sst2 tuned is no delta folder but a model",
    ),
    (lambda: set_up(GLUEDataModule("cola", "./absent")), FileNotFoundError, "data.path ./absent: no such folder"),
    (lambda: set_up(GLUEDataModule("cola", "glue")), FileNotFoundError, "data.path glue: expected cola/train-*.parquet"),
    (lambda: set_up(GLUEDataModule("cola", "absent")), FileNotFoundError, "data.path absent: no such folder; and as a"),
    (lambda: set_up(ImageDataModule("empty")), FileNotFoundError, "data.path empty is an empty folder"),
    (lambda: set_up(ImageDataModule("texts.txt")), ValueError, "data.path texts.txt is a file"),
    (lambda: set_up(InstructionDataModule("absent.json")), FileNotFoundError, "data.path absent.json: no such file"),
    (lambda: set_up(InstructionDataModule("broken.jsonl")), ValueError, "data.path broken.jsonl cannot be loaded: "),
    (
        lambda: set_up(InstructionDataModule("good.jsonl", tokenizer="no_tokenizer")), FileNotFoundError,
        "data.tokenizer no_tokenizer holds no vocabulary",
    ),
    (lambda: TextMixDataModule({"a": "absent.txt"}), FileNotFoundError, "data.files.a absent.txt: no such file"),
    (lambda: TextMixDataModule({"a": "zero.jsonl"}), ValueError, "data.files.a zero.jsonl is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "says"), CALLS, ids=[row[2] for row in CALLS])
def test_a_wrong_source_is_an_error_in_one_line(call, error, says, sources, monkeypatch, tmp_path):
    monkeypatch.chdir(sources)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(error) as raised:
        call()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
