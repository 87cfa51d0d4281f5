"""Paths and hub ids that are wrong: one line that names the argument, the path and the cure, before anything is read.

The same table holds for every command that takes paths; another one in tests/tasks holds for what is used from Python.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from wrong_sources import make_sources

from dpp_lightning.cli import main
from dpp_lightning.storage import hub

NOT_CACHED = "as a hub id: nothing of it is in the hub's cache, and the hub was not asked, as HF_HUB_OFFLINE is set"
MERGE_IT = "merge it into its base first"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def here(sources, monkeypatch):
    """The working folder is that of the sources, the hub is switched off, and only a hub id is asked of its cache."""
    monkeypatch.chdir(sources)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(sources / "cache"))
    asked, download = [], hub.snapshot_download

    def record(repo_id, **settings):
        asked.append(repo_id)
        return download(repo_id, **settings, cache_dir=str(sources / "cache"))

    monkeypatch.setattr(hub, "snapshot_download", record)
    return asked


# command line, what the line begins with, what else it says
FUNCTIONS = [
    # nothing there: a word, a hub id, paths of every form
    ("prune base absent -o", "FINETUNED absent: no such file or folder", NOT_CACHED),
    ("prune bas tuned -o", "BASE bas: no such file or folder (did you mean base?)", NOT_CACHED),
    ("prune base org/absent -o", "FINETUNED org/absent: no such file or folder (nor a folder org)", NOT_CACHED),
    ("prune base runs/tunde -o", "FINETUNED runs/tunde: no such file or folder", "did you mean runs/tuned?"),
    ("prune base rums/tuned -o", "FINETUNED rums/tuned: no such file or folder (did you mean runs/tuned?)", NOT_CACHED),
    ("prune base base/absent -o", "FINETUNED base/absent: no such file or folder", "is here, so that this is not taken for"),
    ("prune base ./tunde -o", "FINETUNED ./tunde: no such file or folder", "did you mean tuned?"),
    ("prune base ../tunde/ -o", "FINETUNED ../tunde/: no such file or folder", "check the path"),
    ("prune base ~/absent -o", f"FINETUNED {Path.home() / 'absent'}: no such file or folder", "a hub id it cannot be"),
    ("prune base a/b/c -o", "FINETUNED a/b/c: no such file or folder (nor a folder a)", "check the path"),
    ("prune base 'C:\\absent' -o", "FINETUNED C:\\absent: no such file or folder", "a hub id it cannot be"),
    ("prune base absent.safetensors -o", "FINETUNED absent.safetensors: no such file or folder", "check the path"),
    ("prune base org/absent.ckpt -o", "FINETUNED org/absent.ckpt: no such file or folder", "check the path"),
    ("prune base '' -o", "FINETUNED ''", ""),
    ("prune base tuned -o --method darex-q --calibration absent.txt", "--calibration absent.txt: no such file", "check the"),
    ("prune base tuned -o --method darex-q --calibration tuned", "--calibration tuned is a folder", "expected a file"),
    ("prune base tuned -o --method darex-q --calibration empty.txt", "--calibration empty.txt is empty", "0 bytes"),
    ("prune --config absent.yaml", "the config file 'absent.yaml' does not exist", ""),
    ("apply base absent -o", "DELTA absent: no such folder", NOT_CACHED),
    ("apply ./absent delta -o", "BASE ./absent: no such file or folder", "check the path"),
    ("merge base delta absent -o", "DELTAS absent: no such folder", NOT_CACHED),
    ("merge base delta ./dleta -o", "DELTAS ./dleta: no such folder", "did you mean delta?"),
    ("inspect ./absent", "DELTA ./absent: no such folder", "check the path"),
    ("inspect base ./absent", "FINETUNED ./absent: no such file or folder", "check the path"),
    ("export absent -o", "CHECKPOINT absent: no such checkpoint", "check the path"),
    ("export plain.ckpt -o --config_from ./absent", "--config_from ./absent: no such folder", "check the path"),
    ("export plain.ckpt -o --base ./absent", "--base ./absent: no such file or folder", "check the path"),
    ("push absent me/x", "FOLDER absent: no such folder", "check the path"),
    ("plan absent", "MODEL absent: no such file or folder", NOT_CACHED),
    ("plan org/absent --revision v1", "MODEL org/absent: no such file or folder", "nothing of its revision v1 is in the hub's"),
    # another thing than wanted
    ("prune delta tuned -o", "BASE delta is a delta, not a model", "expected dpp prune BASE FINETUNED"),
    ("prune base delta -o", "FINETUNED delta is a delta, not a model", "dpp apply BASE delta --output DENSE writes"),
    ("prune base adapter -o", "FINETUNED adapter is a PEFT adapter, not a model", MERGE_IT),
    ("prune adapter tuned -o", "BASE adapter is a PEFT adapter, not a model", MERGE_IT),
    ("prune base adapter/adapter_model.safetensors -o", "FINETUNED adapter/adapter_model.safetensors is a file", MERGE_IT),
    ("prune base empty -o", "FINETUNED empty is an empty folder", "expected a model"),
    ("prune base deltas -o", "FINETUNED deltas is a folder of deltas (deltas/dare-0.9-0)", "not a model"),
    ("prune base logs -o", "FINETUNED logs is a folder without weights", "logs/version_0/checkpoints/epoch=0.ckpt"),
    ("prune base tuned/config.json -o", "FINETUNED tuned/config.json is no file of weights", ".safetensors"),
    ("prune base texts.txt -o", "FINETUNED texts.txt is no file of weights", "a folder in Hugging Face's layout"),
    ("apply delta base -o", "BASE delta is a delta, not a model", "expected dpp apply BASE DELTA"),
    ("apply base tuned -o", "DELTA tuned is no delta folder but a model", "expected dpp apply BASE DELTA"),
    ("apply base adapter -o", "DELTA adapter is no delta folder but a PEFT adapter", MERGE_IT),
    ("apply base empty -o", "DELTA empty is no delta folder", "it lacks delta_model.safetensors and delta_config.json"),
    ("apply base deltas -o", "DELTA deltas is no delta folder itself", "deltas/dare-0.9-0: name one"),
    ("apply base delta/delta_model.safetensors -o", "DELTA delta/delta_model.safetensors is a file of a delta", "folder, delta"),
    ("apply base half -o", "DELTA half is no delta folder: it lacks delta_model.safetensors", "the whole folder"),
    ("merge delta delta base -o", "BASE delta is a delta, not a model", "expected dpp merge BASE DELTA DELTA"),
    ("merge base delta tuned -o", "DELTAS tuned is no delta folder but a model", ""),
    ("inspect tuned", "DELTA tuned is no delta folder but a model", "dpp inspect BASE FINETUNED"),
    ("inspect base delta", "FINETUNED delta is a delta", "dpp inspect DELTA"),
    ("export logs -o", "CHECKPOINT logs is a folder; checkpoints in it are logs/version_0/checkpoints/epoch=0.ckpt", "name one"),
    ("export base -o", "CHECKPOINT base is a folder, expected a .ckpt file or a sharded folder", "it holds config.json"),
    ("export plain.ckpt -o --config_from empty", "--config_from empty has no config.json", "save_pretrained"),
    ("push tuned me/x", "FOLDER tuned is no delta folder but a model", "expected dpp push FOLDER REPO_ID"),
    ("plan empty", "MODEL empty is an empty folder", ""),
    ("plan delta", "MODEL delta is a delta, not a model", ""),
    # files that are not what they are called
    ("prune base lfs -o", "FINETUNED lfs: model.safetensors is a Git LFS pointer, not the weights", "run git lfs pull in lfs"),
    ("apply lfs delta -o", "BASE lfs: model.safetensors is a Git LFS pointer", "run git lfs pull"),
    ("apply base lfs_delta -o", "DELTA lfs_delta: delta_model.safetensors is a Git LFS pointer", "run git lfs pull"),
    ("prune base page.safetensors -o", "FINETUNED page.safetensors is a web page (HTML)", "hf download"),
    ("prune base truncated -o", "FINETUNED truncated: model.safetensors is not a whole safetensors file", "again"),
    ("prune base zero.safetensors -o", "FINETUNED zero.safetensors is empty (0 bytes)", "copy or download it again"),
    ("prune base torn.ckpt -o", "FINETUNED torn.ckpt is truncated", "copy or download it again"),
    ("prune base folder.safetensors -o", "FINETUNED folder.safetensors is an empty folder", ""),
    ("prune base inner -o", "FINETUNED inner: model.safetensors is a folder, expected a file of weights", ""),
    ("prune base lost -o", "FINETUNED lost: model.safetensors is a link to ../blobs/gone, which is not there", "fetch"),
    ("prune base lost_link -o", "FINETUNED lost_link is a link to gone, which is not there", "fetch or copy it again"),
    ("prune base shards -o", "FINETUNED shards lacks shards that model.safetensors.index.json names: model-2", "fetch"),
    ("prune base packed.zip -o", "FINETUNED packed.zip is an archive", "unpack it"),
    ("prune base packed.tar.gz -o", "FINETUNED packed.tar.gz is an archive", "unpack it"),
    ("prune base packed.safetensors -o", "FINETUNED packed.safetensors is an archive", "unpack it"),
    ("export zero.ckpt -o", "CHECKPOINT zero.ckpt is empty (0 bytes)", ""),
    ("export plain.ckpt -o --config_from html", "--config_from html: config.json is a web page (HTML)", "download"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "begins", "says"), FUNCTIONS, ids=[row[0] for row in FUNCTIONS])
def test_a_wrong_path_is_one_line_before_anything_is_read(line, begins, says, here, sources, capsys, monkeypatch):
    monkeypatch.setattr("dpp_lightning.storage.mapped_file.map_pages", lambda path: pytest.fail(f"{path} was read"))
    before = sorted(path.name for path in sources.iterdir())
    words = shlex.split(line)
    if "-o" in words:
        words[words.index("-o") : words.index("-o") + 1] = ["--output", "out"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"dpp {words[0]}: error: {begins}")
    assert says in said.err
    assert said.err.count("\n") == 1
    assert sorted(path.name for path in sources.iterdir()) == before
    assert set(here) <= {"absent", "bas", "org/absent", "rums/tuned"}  # nothing that looks like a path


GLUE = "fit --data GLUEDataModule --model GLUEModule --model.task cola --model.pretrained {}"
CAUSAL = "fit --data InstructionDataModule --model CausalLMModule --model.pretrained {}"
VISION = "fit --model VisionModule --model.model_name two_layer --data {}"
TEST = "test --model GLUEModule --model.task cola --model.pretrained base --data GLUEDataModule --data.path glue {}"
LIGHTNING = [
    (GLUE.format("absent"), "model.pretrained absent: no such file or folder", NOT_CACHED),
    (GLUE.format("./absent"), "model.pretrained ./absent: no such file or folder", "check the path"),
    (GLUE.format("empty"), "model.pretrained empty is an empty folder", ""),
    (GLUE.format("no_config"), "model.pretrained no_config has no config.json", "save_pretrained(folder)"),
    (GLUE.format("no_weights"), "model.pretrained no_weights holds no weights", "it holds config.json"),
    (GLUE.format("broken_config"), "model.pretrained broken_config: config.json is not readable JSON", "save the model"),
    (GLUE.format("html"), "model.pretrained html: config.json is a web page (HTML)", "hf download"),
    (GLUE.format("lfs"), "model.pretrained lfs: model.safetensors is a Git LFS pointer", "git lfs pull"),
    (GLUE.format("no_type"), "model.pretrained no_type cannot be loaded", "model_type"),
    (GLUE.format("delta"), "model.pretrained delta is a delta, not a model", "dpp apply BASE delta"),
    (GLUE.format("adapter"), "model.pretrained adapter is a PEFT adapter", MERGE_IT),
    (GLUE.format("base/model.safetensors"), "model.pretrained base/model.safetensors is a file", "a folder with config"),
    (CAUSAL.format("no_tokenizer"), "model.pretrained no_tokenizer holds no vocabulary", "all words would be unknown"),
    (CAUSAL.format("base --model.tokenizer ./absent"), "model.tokenizer ./absent: no such folder", "check the path"),
    (GLUE.format("base --data.path ./absent"), "data.path ./absent: no such folder", "check the path"),
    (GLUE.format("base --data.path empty"), "data.path empty is an empty folder", "expected data in it"),
    (GLUE.format("base --data.path texts.txt"), "data.path texts.txt is a file", "expected a folder or a hub id"),
    (GLUE.format("base --data.path glue --data.tokenizer ./absent"), "data.tokenizer ./absent: no such folder", "check"),
    (CAUSAL.format("base --data.path absent.jsonl"), "data.path absent.jsonl: no such file", "check the path"),
    (CAUSAL.format("base --data.path zero.jsonl"), "data.path zero.jsonl is empty", "0 bytes"),
    (CAUSAL.format("base --data.path texts.txt"), "data.path texts.txt is a file", "a file (.json, .jsonl, .parquet)"),
    (CAUSAL.format("base --data.test_path ./absent"), "data.test_path ./absent: no such folder or file", "check the path"),
    (VISION.format("ImageDataModule --data.path ./absent"), "data.path ./absent: no such folder", "check the path"),
    (VISION.format("ImageDataModule --data.path empty"), "data.path empty is an empty folder", ""),
    (VISION.format("DigitsDataModule --model.pretrained absent.ckpt"), "model.pretrained absent.ckpt: no such file", "shipped"),
    (VISION.format("DigitsDataModule --model.pretrained lfs/model.safetensors"), "model.pretrained lfs/model", "git lfs pull"),
    (VISION.format("DigitsDataModule --model.pretrained base"), "model.pretrained base: its config.json names no arch", "timm"),
    (TEST.format("--delta absent"), "--delta absent: no such folder", NOT_CACHED),
    (TEST.format("--delta tuned"), "--delta tuned is no delta folder but a model", ""),
    (TEST.format("--ckpt_path absent.ckpt"), "there is no checkpoint 'absent.ckpt' (--ckpt_path)", ""),
    (TEST.format("--ckpt_path logs"), "--ckpt_path logs is a folder; checkpoints in it are logs/version_0", "name one"),
    (TEST.format("--ckpt_path zero.ckpt"), "--ckpt_path zero.ckpt is empty (0 bytes)", ""),
    (TEST.format("--ckpt_path texts.txt"), "--ckpt_path texts.txt is no checkpoint", "expected a .ckpt file"),
    (
        TEST.format("--trainer.callbacks DeltaPruneCallback --trainer.callbacks.pretrained ./absent"),
        "DeltaPruneCallback.pretrained ./absent: no such file or folder", "check the path",
    ),
    (
        TEST.format("--trainer.callbacks ApplyDelta --trainer.callbacks.delta tuned"),
        "ApplyDelta.delta tuned is no delta folder but a model", "",
    ),
    (
        "fit --model AdaMergingModule --model.deltas.sst2 ./absent --model.pretrained base --data GLUEMixDataModule",
        "model.deltas.sst2 ./absent: no such folder", "check the path",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "begins", "says"), LIGHTNING, ids=[row[0] for row in LIGHTNING])
def test_a_wrong_path_of_a_lightning_command_is_one_line(line, begins, says, here, capsys):
    words = shlex.split(line)
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"dpp {words[0]}: error: {begins}")
    assert says in said[-1]
    assert [text for text in said if "Seed set" not in text] == said[-1:]


class Harmful:
    """What loads by a call: of ``torch.load`` without ``weights_only``."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {"a": Harmful()}, "pytorch-lightning_version": "2.6.6"}, r"could run any code.*--weights_only"),
        ({"weight": torch.zeros(2)}, r"it lacks state_dict and pytorch-lightning_version"),
        ([1, 2], r"no checkpoint of Lightning's Trainer"),
    ],
    ids=["code", "weights alone", "a list"],
)
def test_a_file_that_no_trainer_wrote_is_refused_before_it_is_loaded(tmp_path, monkeypatch, capfd, content, words):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a.ckpt")
    assert main(["test", "--config", "quickstart.yaml", "--ckpt_path", "a.ckpt"]) == 2
    out, error = capfd.readouterr()
    assert re.search(words, error.splitlines()[-1])
    assert "run\n" not in out
