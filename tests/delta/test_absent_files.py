"""What a delta says of the base's files that the fine-tuned model does not have: written, read, refused."""

import json

import pytest
import tiny

from dpp_lightning import SparseDelta, prune
from dpp_lightning.delta.config_file import CONFIG_FILE, config_checksum
from dpp_lightning.delta.folder import delta_bytes, further_bytes, set_q


@pytest.fixture
def delta():
    return prune(*tiny.pair(), "dare", 0.5)


def edited(folder, **fields):
    """The folder with other fields in its config; those that are None are taken out."""
    path = folder / CONFIG_FILE
    config = {key: value for key, value in {**json.loads(path.read_text()), **fields}.items() if value is not None}
    path.write_text(json.dumps({**config, "config_checksum": config_checksum(config)}))
    return folder


def test_files_that_are_none_are_absent_and_stay_so_under_another_q(tmp_path, delta):
    files = {"config.json": b"{}", "vocab.txt": None, "1_Pooling/config.json": None, "2_Dense/config.json": b"{}"}
    folder = delta.save_pretrained(tmp_path / "delta", side_files=files)
    names = ("1_Pooling/config.json", "vocab.txt")
    assert SparseDelta.from_pretrained(folder).info.absent_files == names
    set_q(folder, 0.3)
    assert SparseDelta.from_pretrained(folder).info.absent_files == names
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {
        "README.md", "config.json", "delta_config.json", "delta_model.safetensors", "2_Dense/config.json"
    }  # fmt: skip


def test_a_delta_that_is_saved_again_without_its_files_knows_of_none_that_is_absent(tmp_path, delta):
    folder = delta.save_pretrained(tmp_path / "delta", side_files={"vocab.txt": None})
    read = SparseDelta.from_pretrained(folder)
    again = SparseDelta.from_pretrained(read.save_pretrained(tmp_path / "again"))
    assert (read.info.absent_files, again.info.absent_files) == (("vocab.txt",), ())
    assert SparseDelta.from_bytes(*read.to_bytes()).info.absent_files == ()


def test_a_config_without_the_field_says_nothing_and_unknown_names_are_let_be(tmp_path, delta):
    folder = delta.save_pretrained(tmp_path / "delta", side_files={"vocab.txt": None})
    assert SparseDelta.from_pretrained(edited(folder, absent_files=None)).info.absent_files == ()
    later = ["a.later.kind", "sst2.vocab.txt", "model.safetensors"]
    assert SparseDelta.from_pretrained(edited(folder, absent_files=later)).info.absent_files == tuple(later)


@pytest.mark.parametrize(
    "names",
    ["vocab.txt", [3], [None], {"vocab.txt": 1}, ["../vocab.txt"], ["/etc/passwd"], ["a\\b"], ["a/b/c/d"], ["C:\\x"],
     [""], ["x" * 300], ["a\x1b[2Jb"], [["vocab.txt"]], [f"{n}.json" for n in range(10_001)], 7, False],
    ids=lambda names: str(names)[:20],
)  # fmt: skip
def test_hostile_names_are_refused(tmp_path, delta, names):
    folder = edited(delta.save_pretrained(tmp_path / "delta"), absent_files=names)
    with pytest.raises(ValueError, match=r"absent_files|names of tensors or files|beside the weights cannot be named"):
        SparseDelta.from_pretrained(folder)


def test_a_writer_refuses_names_that_no_reader_takes(tmp_path, delta):
    with pytest.raises(ValueError, match="cannot be named"):
        delta.save_pretrained(tmp_path / "delta", side_files={"../vocab.txt": None})
    assert not (tmp_path / "delta").exists()


def test_weights_of_further_modules_count_among_the_deltas_bytes_and_stand_in_its_card(tmp_path, delta):
    plain = delta_bytes(delta.save_pretrained(tmp_path / "plain"))
    files = {"2_Dense/model.safetensors": b"x" * 1234, "2_Dense/config.json": b"{}", "vocab.txt": b"abc"}
    folder = delta.save_pretrained(tmp_path / "delta", side_files=files)
    assert (delta_bytes(folder) - plain, further_bytes(folder)) == (1234, 5)
    card = (folder / "README.md").read_text()
    assert "| weights of further modules, dense | `2_Dense/model.safetensors` (1,234 bytes) |" in card
    assert f"{plain + 1234:,}, {delta.info.ratio(plain + 1234):.1f} |" in card
