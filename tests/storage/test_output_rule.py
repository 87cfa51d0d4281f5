"""What a command may write a folder over: new and empty folders, older products on request, nothing else."""

import json
import os

import pytest

import dpp_lightning.storage.output_folder as output_folder_module
from dpp_lightning.cli.exit_codes import FAILED, USAGE_ERROR, describe
from dpp_lightning.storage.output_folder import DELTA, DENSE, DENSE_OF_TASKS, check_output, output_folder

DELTA_FILES = ("delta_config.json", "delta_model.safetensors", "README.md", "config.json", "tokenizer.json")
DENSE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "2_Dense/model.safetensors", "chat_template.jinja")
SHARDS = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
KINDS = {"delta": (DELTA, DELTA_FILES), "dense": (DENSE, DENSE_FILES), "shards": (DENSE, SHARDS)}


def fill(folder, files, text="old"):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def held(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(output, kind, **settings):
    with output_folder(output, kind, **settings) as folder:
        fill(folder, ("delta_config.json" if kind is DELTA else "model.safetensors",), "new")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", [DELTA, DENSE, DENSE_OF_TASKS])
def test_new_and_empty_folders_are_written(tmp_path, kind, overwrite):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "parents/new"):
        write(tmp_path / name, kind, overwrite=overwrite)
        assert set(held(tmp_path / name).values()) == {"new"}


@pytest.mark.parametrize("name", KINDS)
def test_an_older_product_is_replaced_on_request_alone(tmp_path, name):
    kind, files = KINDS[name]
    fill(tmp_path / "out", files)
    with pytest.raises(FileExistsError, match=r"^output \S*out holds a (delta|model) already: give --overwrite "):
        write(tmp_path / "out", kind)
    assert held(tmp_path / "out") == dict.fromkeys(files, "old")
    write(tmp_path / "out", kind, overwrite=True)
    assert set(held(tmp_path / "out").values()) == {"new"}
    assert len(held(tmp_path / "out")) == 1  # nothing of the older one is left
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("foreign", ["thesis.txt", "runs/last.ckpt", "pytorch_model.bin", ".git/HEAD", "notes/"])
@pytest.mark.parametrize("name", KINDS)
def test_other_files_are_named_and_kept(tmp_path, name, foreign, overwrite):
    kind, files = KINDS[name]
    fill(tmp_path / "out", files)
    if foreign.endswith("/"):
        (tmp_path / "out" / foreign).mkdir()
    else:
        fill(tmp_path / "out", [foreign])
    before = held(tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"other files beside a (delta|model), {foreign}, and is not overwritten"):
        write(tmp_path / "out", kind, overwrite=overwrite)
    assert held(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        (("thesis.txt",), DELTA, "holds thesis.txt, not a delta, and is not overwritten"),
        (DENSE_FILES, DELTA, "config.json, model.safetensors, tokenizer.json, not a delta"),
        (DELTA_FILES, DENSE, "tokenizer.json, not a model, and is not overwritten"),
        (("config.json", "tokenizer.json"), DENSE, "not a model"),
        (("a/config.json", "b/x"), DENSE_OF_TASKS, "holds a/, b/, not a model, or one for each task"),
        ([f"file{k}" for k in range(9)], DENSE, "file0, file1, file2, file3, file4, file5 and 3 more, not a model"),
    ],
)
def test_a_folder_of_another_kind_is_never_replaced(tmp_path, files, kind, message):
    fill(tmp_path / "out", files)
    with pytest.raises(FileExistsError, match=message):
        write(tmp_path / "out", kind, overwrite=True)
    assert held(tmp_path / "out") == dict.fromkeys(files, "old")


def test_a_file_is_never_replaced(tmp_path):
    fill(tmp_path, ["out"])
    with pytest.raises(FileExistsError, match="out is a file, which is not overwritten"):
        write(tmp_path / "out", DELTA, overwrite=True)
    with pytest.raises(NotADirectoryError, match=r"cannot be made: \S*out is a file"):
        write(tmp_path / "out" / "inner", DELTA)
    assert (tmp_path / "out").read_text() == "old"


def test_models_for_tasks(tmp_path):
    fill(tmp_path / "out" / "sst2", DENSE_FILES)
    fill(tmp_path / "out" / "mrpc", SHARDS)
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(tmp_path / "out", DENSE_OF_TASKS)
    fill(tmp_path / "out", ["sst2/notes.txt", "scores.csv"])
    with pytest.raises(FileExistsError, match=r"task, sst2/notes.txt, scores.csv, and is not"):
        write(tmp_path / "out", DENSE_OF_TASKS, overwrite=True)
    for name in ("sst2/notes.txt", "scores.csv"):
        (tmp_path / "out" / name).unlink()
    write(tmp_path / "out", DENSE_OF_TASKS, overwrite=True)
    assert held(tmp_path / "out") == {"model.safetensors": "new"}


def test_files_of_the_tasks_of_a_merged_delta_belong_to_it(tmp_path):
    fill(tmp_path / "out", ["sst2.config.json", "my.task.1_Pooling/config.json", "mrpc.config.json"])
    config = json.dumps({"settings": {"tasks": ["sst2", "my.task"]}})
    fill(tmp_path / "out", ["delta_config.json"], config)
    with pytest.raises(FileExistsError, match=r"beside a delta, mrpc\.config\.json, and"):
        write(tmp_path / "out", DELTA, overwrite=True)
    (tmp_path / "out" / "mrpc.config.json").unlink()
    write(tmp_path / "out", DELTA, overwrite=True)


@pytest.mark.parametrize(
    "config", ["", "[]", "{}", '{"settings": {"tasks": 1}}', '{"settings": {"tasks": [[]]}}', "\x00"]
)
def test_a_damaged_delta_is_one_too(tmp_path, config):
    fill(tmp_path / "out", ["delta_config.json"], config)
    write(tmp_path / "out", DELTA, overwrite=True)


@pytest.mark.parametrize("output", ["a", "./a", "b/../a", "link", "~/a"])
@pytest.mark.parametrize("source", ["a", "a/.", "link"])
def test_an_output_that_is_an_input(tmp_path, monkeypatch, output, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "a", DELTA_FILES)
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("a")
    inputs = ("BASE", "elsewhere/base"), ("DELTAS", source)
    with pytest.raises(ValueError, match=f"^--output {output} is the same folder as DELTAS {source}: name another"):
        check_output(output, DELTA, overwrite=True, inputs=inputs, argument="--output")


def test_an_output_inside_or_around_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "runs" / "base", DENSE_FILES)
    fill(tmp_path / "runs", ["last.ckpt"])
    (tmp_path / "link").symlink_to("runs")
    for output, source, message in (
        ("runs/base/new", "link/base", "--output runs/base/new lies in BASE link/base: name a folder outside it"),
        ("runs", "runs/base", "--output runs holds BASE runs/base: name another folder"),
        ("link", "runs/last.ckpt", "--output link holds BASE runs/last.ckpt"),
        ("runs/last.ckpt", "link/last.ckpt", "runs/last.ckpt is the same file as BASE link/last.ckpt"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(output, DENSE, overwrite=True, inputs=[("BASE", source)], argument="--output")
    check_output("runs/dense", DENSE, inputs=[("BASE", "runs/last.ckpt"), ("DELTA", None), ("X", "runs/base")])


def test_an_output_that_the_files_of_an_input_are_links_to(tmp_path):
    fill(tmp_path / "store", DENSE_FILES)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").symlink_to(tmp_path / "store" / "model.safetensors")
    with pytest.raises(ValueError, match=r"store holds what \S*base/model.safetensors of BASE \S*base is a link to"):
        check_output(tmp_path / "store", DENSE, overwrite=True, inputs=[("BASE", tmp_path / "base")])


@pytest.mark.parametrize("output", ["me", "me/model", "me/model/new", "me/delta", "./me/delta"])
def test_a_folder_that_would_hide_a_repository(tmp_path, monkeypatch, output):
    """A hub id is one only while no folder of its first part is here: the next command would look in that folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="makes a folder me, which hides the hub's BASE me/model: name another"):
        check_output(output, DELTA, inputs=[("BASE", "me/model")])
    check_output("out/me", DELTA, inputs=[("BASE", "me/model")])
    check_output(tmp_path.parent / "me", DELTA, inputs=[("BASE", "me/model")])


def test_a_link_stays_one_and_its_folder_is_written(tmp_path):
    fill(tmp_path / "disk" / "old", DELTA_FILES)
    (tmp_path / "out").symlink_to("disk/old")
    (tmp_path / "coming").symlink_to("disk/coming")
    write(tmp_path / "out", DELTA, overwrite=True)
    write(tmp_path / "coming", DELTA)
    for name in ("old", "coming"):
        assert held(tmp_path / "disk" / name) == {"delta_config.json": "new"}
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "coming").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["coming", "disk", "out"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="leads round to itself"):
        write(tmp_path / "loop", DELTA)


@pytest.mark.parametrize("output", [".", "..", "../here", "link"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, output):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "link").symlink_to("here")
    with pytest.raises(ValueError, match="the current folder or one around it, whose place"):
        check_output(output if output != "link" else tmp_path / "link", DELTA)


def test_a_mount_point_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(ValueError, match="is where a disk is mounted"):
        check_output(tmp_path / "disk", DELTA)
    check_output(tmp_path / "disk" / "new", DELTA)


def test_a_folder_that_may_not_be_written_is_known_at_once(tmp_path, monkeypatch):
    def refuse(dir):  # the superuser may write anywhere
        raise PermissionError(13, "Permission denied", str(dir))

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(
        PermissionError, match=r"^output \S+ cannot be made: cannot write into \S+mine: Permission denied;"
    ):
        check_output(tmp_path / "mine" / "new", DELTA)
    assert os.listdir(tmp_path / "mine") == []


def test_what_came_meanwhile_is_kept(tmp_path):
    """Another run finished first, or someone put a file there: hours later it is still theirs."""
    for name, file in (("first", "delta_config.json"), ("notes", "thesis.txt")):
        with pytest.raises(FileExistsError), output_folder(tmp_path / name, DELTA):
            fill(tmp_path / name, [file], "theirs")
        assert held(tmp_path / name) == {file: "theirs"}
    assert sorted(os.listdir(tmp_path)) == ["first", "notes"]


def test_the_older_product_stays_until_the_new_one_is_complete(tmp_path):
    fill(tmp_path / "out", DELTA_FILES)

    def fail_half_way():
        with output_folder(tmp_path / "out", DELTA, overwrite=True) as folder:
            fill(folder, ["delta_config.json"], "new")
            assert held(tmp_path / "out") == dict.fromkeys(DELTA_FILES, "old")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert held(tmp_path / "out") == dict.fromkeys(DELTA_FILES, "old")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("number", "kind"), [(28, OSError), (5, OSError), (13, PermissionError), (30, PermissionError)]
)
def test_a_full_disk_is_no_wrong_setting(tmp_path, monkeypatch, number, kind):
    def fails(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output_folder_module.tempfile, "TemporaryFile", fails)
    with pytest.raises(OSError, match=f"cannot be made: cannot write into .*: {os.strerror(number)}") as error:
        check_output(tmp_path / "out", DELTA)
    assert type(error.value) is kind
    assert describe(error.value)[1] == (FAILED if kind is OSError else USAGE_ERROR)


def test_a_refused_output_is_rid_of_what_a_kill_left(tmp_path):
    fill(tmp_path / "out", DELTA_FILES)
    fill(tmp_path / ".out.0123abcd", DELTA_FILES)
    (tmp_path / ".out.0123abcd.dpp.lock").touch()
    with pytest.raises(FileExistsError, match="already"):
        check_output(tmp_path / "out", DELTA)
    assert os.listdir(tmp_path) == ["out"]
