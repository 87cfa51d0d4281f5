"""Files and folders appear whole or not at all, also by Windows' rules."""

import multiprocessing
import os
import re
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpp_lightning.storage import atomic_write
from dpp_lightning.storage.atomic_write import (
    atomic_file,
    atomic_folder,
    check_writable,
    is_unfinished,
    remove_leftovers,
)


@pytest.fixture(params=["this system", "windows"])
def system(request, monkeypatch):
    """Windows' rules, as far as they are stricter: folders cannot be opened, what is synced must be open for writing,
    and nothing takes the name of a folder that is there."""
    if request.param == "windows":
        replace, writable = os.replace, set()

        def open_file(path, flags):
            if os.path.isdir(path):
                raise PermissionError(13, "Permission denied", str(path))
            handle = os.open(path, flags)
            (writable.add if flags & os.O_RDWR else writable.discard)(handle)
            return handle

        def sync(handle):
            if handle not in writable:
                raise OSError(9, "Bad file descriptor")
            os.fsync(handle)

        def rename(source, target, **names):
            if os.path.isdir(target):
                raise PermissionError(5, "Access is denied", str(source))
            replace(source, target, **names)

        monkeypatch.setattr(sys, "platform", "win32")
        windows = SimpleNamespace(open=open_file, fsync=sync, close=os.close, O_RDONLY=os.O_RDONLY, O_RDWR=os.O_RDWR)
        monkeypatch.setattr(atomic_write, "os", windows)
        monkeypatch.setattr(os, "replace", rename)  # which pathlib calls
    return request.param


def anything():
    """No check: whatever is there may be replaced."""


def write(folder, text, check=anything):
    with atomic_folder(folder, check) as temporary:
        (temporary / "mark").write_text(text)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(text)
        assert not (folder / "mark").exists() or (folder / "mark").read_text() != text


def test_a_folder_appears_and_is_replaced_whole(system, tmp_path):
    folder = tmp_path / "parents" / "out"
    write(folder, "first")
    write(folder, "second")
    assert ((folder / "mark").read_text(), (folder / "inner" / "file").read_text()) == ("second", "second")
    assert os.listdir(folder.parent) == ["out"]
    if system == "this system" and os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_an_empty_folder_is_taken(system, tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "text")
    assert (tmp_path / "out" / "mark").read_text() == "text"
    assert os.listdir(tmp_path) == ["out"]


def test_a_block_that_fails_leaves_what_was_there(system, tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", anything) as temporary:
        (temporary / "mark").write_text(str(1 / 0))
    assert (tmp_path / "out" / "mark").read_text() == "old"
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "file.txt") as path:
        path.write_text(str(1 / 0))
    assert os.listdir(tmp_path) == ["out"]


def test_what_came_meanwhile_is_checked_before_it_would_be_replaced(system, tmp_path):
    calls = []

    def check():
        calls.append((tmp_path / "out").exists())
        if calls[-1]:
            raise FileExistsError("in the way")

    def write_while_another_does():
        with atomic_folder(tmp_path / "out", check) as temporary:
            (temporary / "mark").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes").write_text("x")

    with pytest.raises(FileExistsError, match="in the way"):
        write_while_another_does()
    assert calls == [False, True]
    assert (os.listdir(tmp_path), os.listdir(tmp_path / "out")) == (["out"], ["notes"])


def test_a_folder_whose_name_cannot_be_taken_keeps_its_old_contents(system, tmp_path, monkeypatch):
    """As on Windows, where a file in it is open: the second rename fails, the first is undone."""
    write(tmp_path / "out", "old")
    monkeypatch.setattr(atomic_write, "_exchanged", lambda *_: False)
    replace = os.replace

    def rename(source, target, **names):
        if str(target) == str(tmp_path / "out") and not str(source).endswith(".old"):
            raise PermissionError(5, "Access is denied")
        replace(source, target, **names)

    monkeypatch.setattr(os, "replace", rename)
    cure = "none of its files may be open" if system == "windows" else "Access is denied"
    with pytest.raises(PermissionError, match=cure):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_folder_that_cannot_be_put_back_is_named(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    monkeypatch.setattr(atomic_write, "_exchanged", lambda *_: False)
    replace = os.replace

    def rename(source, target, **names):
        if str(target) == str(tmp_path / "out"):
            raise OSError(5, "Input/output error")
        replace(source, target, **names)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(OSError, match=r"what it held is in .*old: ") as error:
        write(tmp_path / "out", "new")
    place = re.search(r"is in (.*\.old)", str(error.value))[1]
    assert Path(place, "mark").read_text() == "old"


def killed(work):
    """Run in a child that ends as by SIGKILL where it calls ``die``."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


POSIX = pytest.mark.skipif(os.name != "posix", reason="forks")


@POSIX
@pytest.mark.parametrize(
    "moment",
    ["with its lock", "in the block", "before the names change", "after the names changed", "between two"],
)
def test_a_kill_leaves_a_whole_folder_and_the_next_run_removes_the_rest(tmp_path, monkeypatch, moment):
    write(tmp_path / "out", "old")

    def work():
        if moment == "in the block":
            with atomic_folder(tmp_path / "out", anything) as temporary:
                (temporary / "mark").write_text("half")
                die()
        if moment == "with its lock":
            monkeypatch.setattr(Path, "mkdir", lambda path, **_: die() if path.name[0] == "." else None)
        elif moment == "before the names change":
            monkeypatch.setattr(atomic_write, "_exchanged", die)
        elif moment == "after the names changed":
            monkeypatch.setattr(atomic_write.shutil, "rmtree", die)
        else:
            monkeypatch.setattr(atomic_write, "_exchanged", lambda *_: False)
            replace = os.replace
            monkeypatch.setattr(os, "replace", lambda a, b, **_: die() if Path(b).name == "out" else replace(a, b))
        write(tmp_path / "out", "new")

    killed(work)
    assert len(os.listdir(tmp_path)) > 1
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", anything):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "mark").read_text() == ("new" if moment == "after the names changed" else "old")
    assert os.listdir(tmp_path) == ["out"]


@POSIX
def test_what_a_kill_leaves_of_a_file_is_removed_with_the_next_file(tmp_path):
    def work():
        with atomic_file(tmp_path / "last.ckpt", suffix=".part") as temporary:
            temporary.write_text("half")
            die()

    killed(work)
    assert sorted(Path(name).suffix for name in os.listdir(tmp_path)) == [".lock", ".part"]
    with atomic_file(tmp_path / "table.md") as temporary:
        temporary.write_text("text")
    assert os.listdir(tmp_path) == ["table.md"]


@POSIX
def test_an_old_folder_gets_its_own_name_back_whatever_is_written_next(tmp_path, monkeypatch):
    """Not that of ``out``, which a name such as ``.out-0.9.….old`` also begins with."""
    write(tmp_path / "out-0.9", "old")
    monkeypatch.setattr(atomic_write, "_exchanged", lambda *_: False)
    replace = os.replace

    def work():
        monkeypatch.setattr(os, "replace", lambda a, b, **_: die() if Path(b).name == "out-0.9" else replace(a, b))
        write(tmp_path / "out-0.9", "new")

    killed(work)
    write(tmp_path / "out-0", "text")
    assert sorted(os.listdir(tmp_path)) == ["out-0", "out-0.9"]
    assert (tmp_path / "out-0.9" / "mark").read_text() == "old"


@POSIX
def test_what_cannot_be_removed_keeps_its_lock_for_the_next_run(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    with monkeypatch.context() as broken:
        broken.setattr(atomic_write.shutil, "rmtree", lambda *_, **__: None)
        write(tmp_path / "out", "new")
    assert len(os.listdir(tmp_path)) == 3
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "mark").read_text() == "new"


def test_a_lock_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch):
    unlink = Path.unlink

    def fails(path, missing_ok=False):
        if path.suffix == ".lock":
            raise OSError(5, "Input/output error")
        unlink(path, missing_ok)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", fails)
        write(tmp_path / "out", "text")
    assert (tmp_path / "out" / "mark").read_text() == "text"
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"]


def test_hidden_files_of_others_are_left_alone(tmp_path):
    names = [".git", ".git.dpp.lock", ".out.0123abcd", ".out.0123abcd.lock", "out.0123abcd.dpp.lock"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_folder_inside_an_unfinished_one_is_written_in_its_place(tmp_path):
    """The outer one appears whole or not at all, and a message names no place that will not be."""
    with atomic_folder(tmp_path / "out", anything) as outer:
        with atomic_folder(outer / "task", anything) as inner:
            assert inner == outer / "task"
            (inner / "mark").write_text("text")
            assert os.listdir(outer) == ["task"]
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "task" / "mark").read_text() == "text"
    assert not is_unfinished(outer)


@POSIX
def test_what_a_live_run_is_writing_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "out", anything) as temporary:
        (temporary / "mark").write_text("first")
        child = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path / "out", "second"))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert (tmp_path / "out" / "mark").read_text() == "second"
        write_file(tmp_path / "file.txt", "text")
        assert (temporary / "mark").read_text() == "first"
    (tmp_path / "file.txt").unlink()
    assert (tmp_path / "out" / "mark").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_system_without_locks_is_written_as_well(tmp_path, monkeypatch):
    def acquire(self, *_, **__):
        Path(self.lock_file).touch()
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(atomic_write.FileLock, "acquire", acquire)
    for text in ("first", "second"):
        write(tmp_path / "out", text)
    assert (tmp_path / "out" / "mark").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


@POSIX
def test_a_folder_is_there_at_every_moment_of_its_replacement(tmp_path):
    write(tmp_path / "out", "old")
    other = tmp_path / "other"
    write(other, "new")
    if not atomic_write._exchanged(other, tmp_path / "out"):
        pytest.skip("this file system cannot exchange names")
    assert ((tmp_path / "out" / "mark").read_text(), (other / "mark").read_text()) == ("new", "old")
    with pytest.raises(FileNotFoundError):
        atomic_write._exchanged(tmp_path / "nowhere", tmp_path / "out")


def write_file(path, text):
    with atomic_file(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("act", [write, write_file])
def test_a_sync_that_fails_after_the_name_was_taken_says_so(act, tmp_path, monkeypatch):
    sync = atomic_write._sync

    def fails(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(atomic_write, "_sync", fails)
    with pytest.raises(OSError, match="is written and has its name, but the system does not confirm that: Input"):
        act(tmp_path / "out", "text")
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_is_replaced_whole(system, tmp_path):
    path = tmp_path / "parents" / "file.txt"
    for text in ("first", "second"):
        with atomic_file(path, suffix=".part") as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".part"
            assert not path.exists() or path.read_text() == "first"
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["file.txt"]


def test_everything_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic_write, "_sync", lambda path: synced.append((path.name, (tmp_path / "out").exists())))
    write(tmp_path / "out", "text")
    before = {name for name, exists in synced if not exists}
    assert {"mark", "inner", "file"} < before
    assert synced[-1] == (tmp_path.name, True)  # and then the name itself


def test_a_folder_that_cannot_be_written_is_known_beforehand(system, tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists(), "what fails later leaves no empty folder behind"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="choose another output folder"):
        check_writable(tmp_path / "file" / "folder")
