"""Which files belong to a model beside its weights, to a delta, to a task."""

import json

import pytest

from dpp_lightning.storage.model_folder import (
    changed_side_files,
    copy_files,
    dense_side_files,
    merged_side_files,
    side_files,
)


def folder_of(path, **files):
    """A folder of files; ``__`` in a name stands for a dot."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def contents(files):
    return {name: path.read_text() for name, path in files.items()}


def test_side_files_are_those_of_the_model_and_neither_code_nor_pickles_nor_weights(tmp_path):
    belong = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    belong += ["special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model"]
    belong += ["qwen.tiktoken", "chat_template.jinja", "preprocessor_config.json", "processor_config.json"]
    others = ["modeling.py", "vocab.py", "vocab.pkl", "chat_template.py", "tokenizer.bin", "model.safetensors"]
    others += ["README.md", "model.safetensors.index.json", "training_args.bin", "trainer_state.json", "tokenizer.pt"]
    others += ["delta_config.json", "delta_model.safetensors", "sst2.config.json"]
    for name in belong + others:
        (tmp_path / name).write_text("x")
    (tmp_path / "vocab.json.d").mkdir()
    (tmp_path / "tokenizer.json.d").mkdir()
    assert side_files(tmp_path) == {name: tmp_path / name for name in sorted(belong)}
    assert side_files(tmp_path / "model.safetensors") == {}
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        side_files("./nowhere")


def test_a_delta_holds_the_files_that_say_something_else_than_the_bases(tmp_path):
    config, spaced = json.dumps({"a": [1, 2]}), json.dumps({"a": [1, 2]}, indent=4)
    base = folder_of(tmp_path / "base", config__json=config, vocab__txt="a", merges__txt="x", tokenizer__json="{broken")
    tuned = folder_of(
        tmp_path / "tuned", config__json=spaced, vocab__txt="a ", merges__txt="x", tokenizer__json="{broken ", spiece__model="s"
    )  # fmt: skip
    assert set(changed_side_files(base, tuned)) == {"vocab.txt", "tokenizer.json", "spiece.model"}
    assert changed_side_files(base, base) == {}


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


def test_files_that_all_tasks_have_alike_lie_there_once(tmp_path):
    deltas = {name: folder_of(tmp_path / name, config__json="same", vocab__txt=name) for name in "ab"}
    assert set(merged_side_files(deltas)) == {"config.json", "a.vocab.txt", "b.vocab.txt"}
