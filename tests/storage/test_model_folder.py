"""Which files belong to a model beside its weights, to a delta, to a task; and which of the base's do not."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load, save_file

from dpp_lightning.storage.model_folder import (
    SIDE_PATTERNS,
    changed_side_files,
    check_side_name,
    copy_files,
    dense_side_files,
    merged_side_files,
    module_weights,
    side_files,
)

SIDE_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "qwen.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "3_Asym/query_Dense/config.json", "source.spm",
]  # fmt: skip
OTHERS = [
    "modeling.py", "vocab.py", "vocab.pkl", "chat_template.py", "tokenizer.bin", "model.safetensors", "README.md",
    "model.safetensors.index.json", "training_args.bin", "trainer_state.json", "tokenizer.pt", "delta_config.json",
    "delta_model.safetensors", "sst2.config.json", "checkpoint-5/config.json", "onnx/model.safetensors",
    "1_Pooling/pooling.py", "2_Dense/onnx.bin", "adapter/adapter_config.json", "2024_runs/config.json",
    "additional_chat_templates/deeper/x.jinja", "3_Asym/a/b/config.json", "additional_chat_templates/x.py",
]  # fmt: skip

SAYS = "says"


def folder_of(path, *names, **files):
    """A folder of files; ``__`` in a name stands for a dot. Those without content say their own name, in JSON where that
    is what they are."""
    for name, content in {**dict(zip(names, names, strict=True)), **files}.items():
        file = path / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({SAYS: content}) if file.suffix == ".json" and content[0] not in "[{" else content)
    return path


def contents(files):
    return {name: said(path.read_text()) for name, path in files.items()}


def said(text):
    """What a file of :func:`folder_of` says."""
    return json.loads(text)[SAYS] if text.startswith(f'{{"{SAYS}"') else text


def test_side_files_are_those_of_the_model_and_neither_code_nor_pickles_nor_weights(tmp_path):
    folder_of(tmp_path, *SIDE_FILES, *OTHERS)
    (tmp_path / "vocab.json.d").mkdir()
    (tmp_path / "tokenizer.json.d").mkdir()
    assert side_files(tmp_path) == {name: tmp_path / name for name in sorted(SIDE_FILES)}
    assert side_files(tmp_path / "model.safetensors") == {}
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        side_files("./nowhere")


def test_the_files_of_every_tokenizer_and_processor_of_transformers_are_side_files(tmp_path):
    """By the names in its source: a few are those of a slow tokenizer alone."""
    source = Path(transformers.__file__).parent
    code = "".join(path.read_text("utf-8") for path in source.glob("models/*/tokenization_*.py"))
    tables = re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", code, re.DOTALL | re.MULTILINE)
    names = {name for table in tables for name in re.findall(r': "([^"]+\.[^"]+)"', table)}
    constants = (source / "utils/__init__.py").read_text("utf-8")
    names |= set(re.findall(r'^[A-Z_]*(?:EXTRACTOR|PROCESSOR|TOKENIZER|CONFIG)_NAME = "(.+)"', constants, re.MULTILINE))
    assert len(names) > 25
    assert set(side_files(folder_of(tmp_path, *names))) == names


def test_of_a_hub_id_all_side_files_are_fetched_and_no_code():
    everything = [*SIDE_FILES, "2_Dense/pytorch_model.bin", *(name for name in OTHERS if name.endswith(".py"))]
    fetched = set(filter_repo_objects(everything, allow_patterns=list(SIDE_PATTERNS)))
    assert fetched >= {*SIDE_FILES, "2_Dense/pytorch_model.bin"}
    assert not {name for name in fetched if name.endswith(".py")} - {"vocab.py"}  # which side_files() leaves out


def test_a_delta_holds_the_files_that_say_something_else_than_the_bases(tmp_path):
    config, spaced = json.dumps({"a": [1, 2]}), json.dumps({"a": [1, 2]}, indent=4)
    base = folder_of(tmp_path / "base", config__json=config, vocab__txt="a", merges__txt="x", tokenizer__json="[1]")
    tuned = folder_of(
        tmp_path / "tuned", config__json=spaced, vocab__txt="a ", merges__txt="x", tokenizer__json="[2]", spiece__model="s"
    )  # fmt: skip
    assert set(changed_side_files(base, tuned)) == {"vocab.txt", "tokenizer.json", "spiece.model"}
    assert changed_side_files(base, base) == {}


TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
ST = ["modules.json", "1_Pooling/config.json"]


@pytest.mark.parametrize(
    ("in_base", "in_finetuned", "absent"),
    [
        ([*TOKENIZER, "chat_template.jinja"], TOKENIZER, ["chat_template.jinja"]),
        ([*TOKENIZER, "additional_chat_templates/a.jinja"], TOKENIZER, ["additional_chat_templates/a.jinja"]),
        (["vocab.txt", "special_tokens_map.json", *TOKENIZER], TOKENIZER, ["special_tokens_map.json", "vocab.txt"]),
        (["spiece.model"], ["tokenizer.json"], ["spiece.model"]),
        (["preprocessor_config.json"], ["processor_config.json"], ["preprocessor_config.json"]),
        (["preprocessor_config.json", "config.json"], ["config.json", *TOKENIZER], []),
        (["generation_config.json", "config.json"], ["config.json"], ["generation_config.json"]),
        ([*ST, "2_Dense/config.json", "2_Dense/model.safetensors"], ST, ["2_Dense/config.json", "2_Dense/model.safetensors"]),
        ([*ST, "sentence_bert_config.json"], ["config.json", *TOKENIZER], []),
        ([*TOKENIZER, "chat_template.jinja", "config.json"], ["config.json"], []),
        ([*TOKENIZER, "vocab.txt"], ["chat_template.jinja"], []),
        (["chat_template.jinja"], ["additional_chat_templates/a.jinja"], ["chat_template.jinja"]),
        (["config.json"], TOKENIZER, []),
        ([*TOKENIZER, "config.json"], [], []),
    ],
)  # fmt: skip
def test_what_the_finetuned_model_lacks_is_absent_where_its_folder_has_others_of_that_kind(
    tmp_path, in_base, in_finetuned, absent
):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tuned.mkdir()
    files = changed_side_files(folder_of(base, *in_base), folder_of(tuned, *in_finetuned))
    assert sorted(name for name, path in files.items() if path is None) == sorted(absent)
    delta = tmp_path / "delta"
    delta.mkdir()
    copy_files(files, delta)
    dense = dense_side_files(base, delta, absent=absent)
    assert set(dense) == {*in_base, *in_finetuned} - set(absent)
    if in_finetuned:
        assert set(side_files(tuned)) <= set(dense)


def test_of_a_file_of_weights_nothing_is_known_so_that_nothing_is_absent(tmp_path):
    base, tuned = folder_of(tmp_path / "base", *SIDE_FILES), folder_of(tmp_path / "tuned", "model.safetensors")
    assert changed_side_files(base, tuned / "model.safetensors") == {}
    assert changed_side_files(base, tuned, weights_only=True) == {}


def test_weights_alone_are_those_of_further_modules_too(tmp_path):
    base = folder_of(tmp_path / "base", *TOKENIZER, *ST)
    tuned = folder_of(tmp_path / "tuned", *ST, "2_Dense/model.safetensors", tokenizer__json="other")
    assert set(changed_side_files(base, tuned, weights_only=True)) == {"2_Dense/model.safetensors"}


def test_a_merged_delta_gives_each_task_its_own_files_back(tmp_path):
    base = folder_of(tmp_path / "base", config__json="base", vocab__txt="words", merges__txt="base")
    deltas = {
        "sst2": folder_of(tmp_path / "sst2", config__json="2 labels", vocab__txt="more words"),
        "sst2.b": folder_of(tmp_path / "b", config__json="3 labels", vocab__txt="more words", spiece__model="b"),
    }
    merged = tmp_path / "merged"
    merged.mkdir()
    copy_files(merged_side_files(deltas), merged)
    (merged / "delta_config.json").write_text("{}")
    shared = {"merges.txt": "base", "vocab.txt": "more words"}
    for task, expected in (
        ("sst2", {**shared, "config.json": "2 labels"}),
        ("sst2.b", {**shared, "config.json": "3 labels", "spiece.model": "b"}),
        (None, {**shared, "config.json": "base"}),
    ):
        assert contents(dense_side_files(base, merged, tasks=list(deltas), task=task)) == expected


def test_a_merged_delta_has_the_modules_and_the_absent_files_of_each_task(tmp_path):
    base = folder_of(tmp_path / "base", *TOKENIZER, "chat_template.jinja", "vocab.txt", "1_Pooling/config.json")
    a = folder_of(tmp_path / "a", **{"1_Pooling/config.json": "cls"})
    b = folder_of(tmp_path / "b", **{"2_Dense/model.safetensors": "b"})
    absent = {"a": ["vocab.txt"], "b": ["vocab.txt", "chat_template.jinja"]}
    files = merged_side_files({"a": a, "b": b}, absent)
    gone = [name for name, path in files.items() if path is None]
    assert sorted(gone) == ["b.chat_template.jinja", "vocab.txt"]
    merged = tmp_path / "merged"
    merged.mkdir()
    copy_files(files, merged)
    assert set(module_weights(merged)) == {"b.2_Dense/model.safetensors"}
    of_a = contents(dense_side_files(base, merged, tasks=["a", "b"], task="a", absent=gone))
    assert set(of_a) == {*TOKENIZER, "chat_template.jinja", "1_Pooling/config.json"}
    assert of_a["1_Pooling/config.json"] == "cls"
    of_b = contents(dense_side_files(base, merged, tasks=["a", "b"], task="b", absent=gone))
    assert set(of_b) == {*TOKENIZER, "1_Pooling/config.json", "2_Dense/model.safetensors"}
    assert of_b["1_Pooling/config.json"] == "1_Pooling/config.json"


def test_files_that_all_tasks_have_alike_lie_there_once(tmp_path):
    deltas = {name: folder_of(tmp_path / name, config__json="same", vocab__txt=name) for name in "ab"}
    assert set(merged_side_files(deltas)) == {"config.json", "a.vocab.txt", "b.vocab.txt"}


def test_a_modules_pickled_weights_are_read_as_tensors_and_written_as_safetensors(tmp_path):
    weights = {"linear.weight": torch.arange(6.0).reshape(2, 3)}
    base, tuned, target = tmp_path / "base", tmp_path / "tuned", tmp_path / "target"
    for folder in (base / "2_Dense", tuned / "2_Dense", target):
        folder.mkdir(parents=True)
    torch.save(weights, base / "2_Dense/pytorch_model.bin")
    save_file(weights, tuned / "2_Dense/model.safetensors", {"format": "pt"})
    assert set(side_files(base)) == {"2_Dense/model.safetensors"}
    assert changed_side_files(base, tuned) == {}
    copy_files(side_files(base), target)
    assert os.listdir(target / "2_Dense") == ["model.safetensors"]
    written = load((target / "2_Dense/model.safetensors").read_bytes())
    assert torch.equal(written["linear.weight"], weights["linear.weight"])
    save_file({"linear.weight": weights["linear.weight"] + 1}, tuned / "2_Dense/model.safetensors")
    assert set(changed_side_files(base, tuned)) == {"2_Dense/model.safetensors"}


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../b", "a//b", "", ".", "..", "a\\b", "C:x", "C:/x", "//host/share/x", "a/b/c/d", "a/", "x\0y",
     "x\ny", "x" * 256, "a/./b", "a:b", "\u202ex"],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder_or_cannot_be_printed_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a file beside the weights cannot be named"):
        check_side_name(name)
    with pytest.raises(ValueError, match="a file beside the weights cannot be named"):
        copy_files({name: b"x"}, tmp_path)
    assert os.listdir(tmp_path) == []


DAMAGED = {
    "deep": b"[" * 100_000, "cut": b'{"a": ', "no text": b"\xff\xfe", "a list": b"[1, 2]", "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_configuration_that_cannot_be_read_gets_into_no_delta_and_no_model(tmp_path, content):
    base, tuned = folder_of(tmp_path / "base", config__json='{"a": 1}'), folder_of(tmp_path / "tuned", "vocab.txt")
    (tuned / "config.json").write_bytes(content)
    for act in (
        lambda: changed_side_files(base, tuned),
        lambda: dense_side_files(base, tuned),
        lambda: merged_side_files({"a": tuned, "b": base}),
    ):
        with pytest.raises(ValueError, match=r"config\.json"):
            act()


def test_links_are_not_followed_out_of_their_folder(tmp_path):
    base, tuned = folder_of(tmp_path / "base", "config.json"), folder_of(tmp_path / "tuned", "config.json", "real.txt")
    secret = folder_of(tmp_path, secret__txt="secret") / "secret.txt"
    (tuned / "notes.md").symlink_to(secret)  # no side file
    (tuned / "vocab.txt").symlink_to("real.txt")
    assert contents(side_files(tuned))["vocab.txt"] == "real.txt"
    other = folder_of(tmp_path / "modules", "model.safetensors", "config.json")
    for name, meant in (("merges.txt", "../secret.txt"), ("tokenizer.json", str(secret)), ("2_Dense", str(other))):
        (tuned / name).symlink_to(meant)
        for act in (side_files, lambda folder: changed_side_files(base, folder), lambda f: merged_side_files({"a": f})):
            with pytest.raises(ValueError, match=f"{name}.* leads to .*out of its folder"):
                act(tuned)
        (tuned / name).unlink()
    (tuned / "sst2.vocab.txt").symlink_to(secret)  # a merged delta's, of a task
    with pytest.raises(ValueError, match="out of its folder"):
        dense_side_files(base, tuned, tasks=["sst2"], task="sst2")


def test_links_of_the_hubs_cache_lead_to_the_blobs_of_their_repository_alone(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    folder_of(blobs, "1f")
    folder_of(tmp_path / "models--a--c" / "blobs", "2e")
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.txt").symlink_to("../../blobs/1f")
    assert contents(side_files(snapshot)) == {"vocab.txt": "1f"}
    (snapshot / "merges.txt").symlink_to("../../../models--a--c/blobs/2e")
    with pytest.raises(ValueError, match="out of its folder"):
        side_files(snapshot)
