"""Two paths that lead to one place are known as such, however they are spelled."""

import os

import pytest

from dpp_lightning.storage.same_place import lies_in, links_into, real_path, same_place


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "b" / "chain").symlink_to("../link")
    return tmp_path


@pytest.mark.parametrize("other", ["a", "./a", "a/", "a/.", "b/../a", "link", "link/", "b/chain", "~/a", "a/inner/.."])
def test_spellings_of_one_folder(tree, other):
    assert same_place("a", other)
    assert same_place(tree / "a", other)
    assert not same_place("b", other)
    assert not lies_in("a", other)
    assert lies_in("a/inner", other)
    assert lies_in(f"{other}/new/x", "a")
    assert not lies_in("b/new", other)


@pytest.mark.parametrize(("one", "other"), [("new", "./new"), ("link/new", "a/new"), ("b/../new", "new/")])
def test_what_is_not_there_yet(tree, one, other):
    assert same_place(one, other)
    assert not same_place(one, "newer")


def test_a_name_that_begins_alike_is_another_place(tree):
    assert not lies_in("ab", "a")
    assert not same_place("a", "a2")


def test_a_folder_inside_by_its_name_alone_lies_in_it(tree):
    (tree / "a" / "out").symlink_to(tree / "b")
    assert lies_in("a/out", "a")
    assert lies_in("a/out/x", "a")
    assert same_place("a/out", "b")


def test_hard_links_and_case(tree):
    (tree / "x").write_text("x")
    os.link(tree / "x", tree / "y")
    assert same_place("x", "y")
    (tree / "X").exists() or (tree / "X").write_text("other")  # as it is on a file system that ignores case
    assert same_place("x", "X") == ((tree / "X").read_text() == "x")


def test_links_of_a_folder_into_another(tree):
    assert links_into("b", "a") == tree.__class__("b/chain")
    assert links_into("a", "b") is None
    (tree / "a" / "inner" / "deep").symlink_to(tree / "b" / "weights")  # leads to nothing that is there
    assert links_into("a", "b") == tree.__class__("a/inner/deep")
    assert real_path("a/inner/deep") == tree / "b" / "weights"
