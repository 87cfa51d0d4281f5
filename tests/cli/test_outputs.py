"""What the commands on files do where their output is there already, or is one of their inputs."""

import re
from pathlib import Path

import pytest
from command_inputs import make_inputs

from dpp_lightning import SparseDelta
from dpp_lightning.cli import main
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.export.plan import plan_export
from dpp_lightning.export.write import export_checkpoint, export_delta
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.storage import atomic_write
from dpp_lightning.storage.safetensors_writer import ShardedWriter

COMMANDS = {
    "prune": "prune base tuned --seed {seed}",
    "merge": "merge base a b --scale {seed}.5",
    "apply": "apply base a --max_shard_bytes {seed}0000",
    "export": "export last.ckpt --max_shard_bytes {seed}0000",
    "export --base": "export last.ckpt --base base --seed {seed}",
}
PYTHON = {
    "prune_checkpoint": lambda out, **more: prune_checkpoint("base", "tuned", out, PruningSpec(), **more),
    "merge_checkpoints": lambda out, **more: merge_checkpoints("base", ["a", "b"], out, **more),
    "apply_checkpoint": lambda out, **more: apply_checkpoint("base", "a", out, **more),
    "export_checkpoint": lambda out, **more: export_checkpoint(plan_export("last.ckpt"), out, **more),
    "export_delta": lambda out, **more: export_delta(plan_export("last.ckpt"), "base", out, PruningSpec(), **more),
}
RULE = "what an earlier run wrote into the output folder, at once when the new is complete"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a classifier fine-tuned from it, as a folder and a checkpoint, and two deltas with heads of their own."""
    return make_inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The models under their names in the current folder, as copies whose change is seen."""
    for path in made.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(made)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(made)).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def held(folder="."):
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refused(capsys, *words):
    """What a command said in its one line: no bar was drawn, nothing was changed."""
    before = held()
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert held() == before
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_run_is_refused_and_replaces_with_overwrite(name, here, capsys):
    first, second = ([*COMMANDS[name].format(seed=seed).split(), "--output", "out"] for seed in (1, 2))
    assert main(first) == 0
    older = held("out")
    line = refused(capsys, *second)
    assert re.search(r"error: --output out holds a (delta|model) already: give --overwrite \(overwrite=True\) to", line)
    (here / "out" / "tokenizer_config.json").write_text("{}")  # of an older run of another model
    assert main([*second, "--overwrite"]) == 0
    newer = held("out")
    assert main([*second[:-1], "same"]) == 0
    assert list(newer.values()) == list(held("same").values())
    assert newer != older


@pytest.mark.parametrize("name", COMMANDS)
def test_files_of_others_are_named_and_kept(name, here, capsys):
    words = [*COMMANDS[name].format(seed=1).split(), "--output", "out", "--overwrite"]
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("x")
    assert re.search("--output out holds thesis.txt, not a (delta|model), and is not", refused(capsys, *words))
    (here / "out" / "thesis.txt").unlink()
    assert main(words) == 0
    (here / "out" / "thesis.txt").write_text("x")
    assert re.search("other files beside a (delta|model), thesis.txt, and is not", refused(capsys, *words))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_product_of_another_kind_is_kept(name, here, capsys):
    """A model where a delta is to be written, and the reverse: two words of the command were swapped."""
    kind, output = ("model", "b") if name in ("apply", "export") else ("delta", "other")
    words = COMMANDS[name].replace(" b ", " a ").format(seed=1).split()
    assert f"not a {kind}, and is not overwritten" in refused(capsys, *words, "--overwrite", "--output", output)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("failure", ["disk", "interrupt"])
def test_the_older_one_stays_until_the_new_one_is_complete(name, failure, here, capsys, monkeypatch):
    words = [*COMMANDS[name].format(seed=1).split(), "--output", "out", "--overwrite"]
    assert main(words) == 0
    before = held()
    error = OSError(28, "No space left on device") if failure == "disk" else KeyboardInterrupt()

    def fail(*_):
        raise error

    monkeypatch.setattr("dpp_lightning.storage.atomic_write._sync", fail)
    if failure == "disk":
        assert main(words) == 1
    else:
        assert main(words) == 130
    assert held() == before
    assert sorted(p.name for p in here.iterdir()) == ["a", "b", "base", "last.ckpt", "other", "out", "tuned"]


INPUTS = [
    ("merge base a b --output a", "--output a is the same folder as DELTAS a: name another folder"),
    ("merge base a b --output ./b/", "is the same folder as DELTAS b"),
    ("merge base a link --output b", "--output b is the same folder as DELTAS link"),
    ("merge base a b --output link", "--output link is the same folder as DELTAS b"),
    ("merge base a b --output base", "is the same folder as BASE base"),
    ("merge base a b --output a/merged", "--output a/merged lies in DELTAS a: name a folder outside it"),
    ("merge base runs/a b --output runs", "--output runs holds DELTAS runs/a: name another folder"),
    ("merge base a b --output out --dense b", "--dense b is the same folder as DELTAS b"),
    ("merge base a b --output out --dense ./out", "--dense ./out is the same folder as --output out"),
    ("merge base a b --output out --dense out/dense", "--dense out/dense lies in --output out"),
    ("merge base a b --output out/merged --dense out", "--dense out holds --output out/merged"),
    ("prune base tuned --output tuned", "is the same folder as FINETUNED tuned"),
    ("prune base tuned --output a/../base", "is the same folder as BASE base"),
    ("prune base tuned --output tuned/delta", "--output tuned/delta lies in FINETUNED tuned"),
    ("prune base last.ckpt --output last.ckpt", "is the same file as FINETUNED last.ckpt"),
    ("prune base runs/last.ckpt --output runs", "--output runs holds FINETUNED runs/last.ckpt"),
    ("apply base a --output base", "is the same folder as BASE base"),
    ("apply base link --output b", "is the same folder as DELTA link"),
    ("apply base/model.safetensors a --output base", "--output base holds BASE base/model.safetensors"),
    ("apply linked a --output tuned", "tuned holds what linked/config.json of BASE linked is a link to"),
    ("export last.ckpt --output tuned", "--output tuned is the same folder as the configuration's source tuned"),
    ("export last.ckpt --config_from other --output other", "is the same folder as the configuration's source other"),
    ("export last.ckpt --base base --output base", "is the same folder as --base base"),
    ("export last.ckpt --base base --output .", "--output . holds CHECKPOINT last.ckpt"),
]  # fmt: skip


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(("words", "said"), INPUTS)
def test_an_output_is_none_of_the_inputs(words, said, overwrite, here, capsys):
    (here / "link").symlink_to("b")
    (here / "runs").mkdir()
    (here / "runs" / "a").symlink_to("../a")
    (here / "runs" / "last.ckpt").write_bytes((here / "last.ckpt").read_bytes())
    (here / "linked").mkdir()
    for path in (here / "tuned").iterdir():
        (here / "linked" / path.name).symlink_to(path)
    assert said in refused(capsys, *words.split(), *overwrite)


def test_dense_folders_of_all_tasks_are_replaced_together(here, capsys, monkeypatch):
    words = ["merge", "base", "a", "b", "--output", "out", "--dense", "dense"]
    assert main(words) == 0
    assert "--output out holds a delta already" in refused(capsys, *words)
    assert "--dense dense holds a model, or one for each task already: give --overwrite" in refused(
        capsys, *words[:4], "--output", "new", "--dense", "dense"
    )
    older = held("dense")
    written = []
    write = ShardedWriter.write

    def fail_in_the_second(self, data):
        if self not in written:
            written.append(self)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardedWriter, "write", fail_in_the_second)
        assert main([*words, "--overwrite", "--scale", "2"]) == 1
    assert held("dense") == older  # not one task of the new merge beside one of the old
    assert main([*words, "--overwrite", "--scale", "2"]) == 0
    assert held("dense").keys() == older.keys()
    assert held("dense") != older
    (here / "dense" / "a" / "scores.csv").write_text("x")
    assert "for each task, a/scores.csv, and is not overwritten" in refused(capsys, *words, "--overwrite")


def test_a_merge_whose_dense_folder_fails_writes_no_delta_either(here, capsys, monkeypatch):
    words = ["merge", "base", "a", "b", "--output", "out", "--dense", "dense"]

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    before = held()
    with monkeypatch.context() as patched:
        patched.setattr("dpp_lightning.cli.merge.apply_checkpoint", fail)
        assert main(words) == 1
    assert held() == before
    assert main(words) == 0  # not refused for a delta that is there already


def test_a_merge_whose_delta_fails_last_names_the_dense_folder(here, capsys, monkeypatch):
    sync = atomic_write._sync

    def fails(path):
        if path.name.startswith(".out."):
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(atomic_write, "_sync", fails)
    capsys.readouterr()
    assert main(["merge", "base", "a", "b", "--output", "out", "--dense", "dense"]) == 1
    assert "dense is written; of out: Input/output error" in capsys.readouterr().err
    assert (here / "dense" / "a" / "model.safetensors").exists()
    assert not (here / "out").exists()


@pytest.mark.parametrize("name", PYTHON)
def test_the_functions_have_the_rule_too(name, here):
    call = PYTHON[name]
    assert call("out") == Path("out")
    before = held()
    with pytest.raises(FileExistsError, match=r"^output out holds a (delta|model) already: give --overwrite"):
        call("out")
    with pytest.raises(ValueError, match=r"same folder as base base|lies in the configuration's source tuned"):
        call("base" if name != "export_checkpoint" else "tuned/inside", overwrite=True)
    assert held() == before
    assert call("out", overwrite=True) == Path("out")


def test_save_pretrained_replaces_a_delta_and_keeps_what_is_not_one(here):
    delta = SparseDelta.from_pretrained("a")
    own = {"labels.csv": b"x", "config.json": b"{}"}
    delta.save_pretrained("out", side_files=own)
    delta.rescaled(0.25).save_pretrained("out", side_files=own)
    assert SparseDelta.from_pretrained("out").q == 0.25
    before = held()
    with pytest.raises(FileExistsError, match=r"folder out holds other files beside a delta, labels\.csv, and is not"):
        delta.save_pretrained("out")
    assert held() == before


@pytest.mark.parametrize("name", ["prune", "merge", "apply", "export"])
def test_the_help_says_the_rule(name, capsys):
    assert main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"--overwrite, --no_overwrite replace {RULE}; a folder that holds any other file is refused all" in text
    assert (
        "folder, new or empty, or see --overwrite; it is none of the inputs and lies neither inside nor around" in text
    )
