"""Files larger than memory: what is written tensor by tensor is what safetensors and transformers read."""

import io
import json
import sys

import pytest
import torch
from full_disk import files_up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from dpp_lightning.storage.mapped_file import DTYPES, map_safetensors
from dpp_lightning.storage.safetensors_writer import (
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    SafetensorsWriter,
    ShardedWriter,
    write_tensors,
)
from dpp_lightning.tensors.fingerprint import raw_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def filled(dtype, shape):
    """A tensor of any bits (for bool: of 0 and 1)."""
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def entries_of(tensors):
    return [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)


def anonymous_mib():
    """Memory of this process that no file backs, in MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


@st.composite
def state_dicts(draw):
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    kinds = st.tuples(st.sampled_from(list(DTYPES.values())), shapes)
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
    return {name: filled(*kind) for name, kind in draw(st.dictionaries(names, kinds, max_size=6)).items()}


@settings(max_examples=150, deadline=None)
@given(state_dicts(), st.integers(1, 9), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
def test_safetensors_reads_bit_for_bit_what_came_in_pieces(tmp_path_factory, tensors, piece, metadata):
    path = tmp_path_factory.getbasetemp() / "pieces.safetensors"
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, entries_of(tensors), metadata)
        for number, tensor in enumerate(tensors.values()):
            if number % 3 == 0:
                writer.write(tensor)
            elif number % 3 == 1:
                for block in tensor.reshape(-1).split(piece):
                    writer.write(block)
            else:
                content = bytes(raw_bytes(tensor))
                for start in range(0, len(content), piece):
                    writer.write(content[start : start + piece])
        assert writer.complete
        writer.close()
    for read in (load_file(path), map_safetensors(path)):
        assert read.keys() == tensors.keys()
        assert all(same(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@settings(max_examples=50, deadline=None)
@given(state_dicts())
def test_what_safetensors_writes_is_mapped_bit_for_bit(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "reference.safetensors"
    save_file(tensors, path)
    read = map_safetensors(path)
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry("a", torch.int8, (1,))] * 2, "'a' is given twice"),
        ([Entry("__metadata__", torch.int8, (1,))], "'__metadata__' is reserved"),
        ([Entry("a", torch.complex128, (1,))], "a: safetensors has no torch.complex128"),
        ([Entry("a", torch.int8, (2, -1))], r"got shape \(2, -1\)"),
    ],
)
def test_headers_the_format_lacks_are_refused_before_a_byte_is_written(tmp_path, entries, message):
    file = io.BytesIO()
    with pytest.raises(ValueError, match=message):
        SafetensorsWriter(file, entries)
    assert not file.getvalue()
    with pytest.raises(ValueError, match=message):
        ShardedWriter(tmp_path, entries, 1)
    assert not list(tmp_path.iterdir())


def test_metadata_must_be_text():
    with pytest.raises(ValueError, match="text to text"):
        SafetensorsWriter(io.BytesIO(), [], {"epoch": 1})


def test_more_fewer_and_other_bytes_than_declared_are_refused():
    entries = [Entry("a", torch.float32, (2, 3)), Entry("none", torch.int8, (0,)), Entry("b", torch.int16, (2,))]
    writer = SafetensorsWriter(io.BytesIO(), entries)
    with pytest.raises(ValueError, match="24 of the 24 bytes of a have not come"):
        writer.close()
    with pytest.raises(ValueError, match="got 25 bytes, but a has 24 left"):
        writer.write(bytes(25))
    for wrong in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"expected a, torch.float32 \(2, 3\)"):
            writer.write(wrong)
    writer.write(torch.zeros(2, 3))
    writer.write(torch.zeros(0, dtype=torch.int8))
    writer.write(b"12")
    with pytest.raises(ValueError, match="2 of the 4 bytes of b have not come"):
        writer.close()
    writer.write(memoryview(b"34"))
    writer.close()
    with pytest.raises(ValueError, match="all tensors are complete"):
        writer.write(b"5")


def test_a_file_that_takes_few_bytes_at_a_time_gets_them_all():
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:5]) if len(data) < 50 else data)

    file = Slow()
    SafetensorsWriter(file, [Entry("a", torch.float32, (7,))]).write(torch.arange(7.0))
    assert file.getvalue().endswith(bytes(raw_bytes(torch.arange(7.0))))


@settings(max_examples=60, deadline=None)
@given(state_dicts(), st.integers(1, 300))
def test_shards_hold_every_tensor_once_and_pass_the_limit_only_alone(tmp_path_factory, tensors, limit):
    folder = tmp_path_factory.mktemp("shards")
    with ShardedWriter(folder, entries_of(tensors), limit) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    files = sorted(folder.glob("*.safetensors"))
    read = [load_file(file) for file in files]
    assert sorted(name for shard in read for name in shard) == sorted(tensors)
    assert all(same(shard[name], tensors[name]) for shard in read for name in shard)
    for shard in read:
        assert sum(t.nbytes for t in shard.values()) <= limit or sum(t.nbytes > 0 for t in shard.values()) == 1
    if len(files) < 2:
        assert [f.name for f in folder.iterdir()] == [SINGLE_FILE]
        return
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {n: f.name for f, shard in zip(files, read, strict=True) for n in shard}
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (20_000, None)])
def test_transformers_loads_the_folder(tmp_path, limit, files):
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=20,
        )
    )
    model.config.save_pretrained(tmp_path)
    weights = model.state_dict()
    with ShardedWriter(tmp_path, entries_of(weights), limit) as writer:
        for tensor in weights.values():
            writer.write(tensor)
    written = len(list(tmp_path.glob("*.safetensors")))
    assert written == files or (files is None and written > 1)
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(same(loaded[name], tensor) for name, tensor in weights.items())


def test_sharded_writer_refuses_missing_bytes_old_files_and_odd_limits(tmp_path):
    entries = [Entry(name, torch.int8, (4,)) for name in "abc"]
    writer = ShardedWriter(tmp_path, entries, 4)
    writer.write(bytes(4))
    with pytest.raises(ValueError, match="4 of the 4 bytes of b"):
        writer.close()
    assert not (tmp_path / INDEX_FILE).exists()
    with pytest.raises(FileExistsError):
        ShardedWriter(tmp_path, entries, 4)
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        ShardedWriter(tmp_path, entries, 0)


@linux
def test_mapped_tensors_take_no_memory_and_writing_spares_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    big = torch.ones(16 * 2**20)  # 64 MiB
    save_file({"a": big, "b": big + 1}, path)
    before = path.read_bytes()
    del big
    start = anonymous_mib()
    tensors = map_safetensors(path)
    assert tensors["a"].sum() + tensors["b"].sum() == 3 * 16 * 2**20
    assert anonymous_mib() - start < 16
    tensors["a"][:10] = 7
    assert tensors["a"][:10].eq(7).all()
    del tensors
    assert path.read_bytes() == before


@linux
def test_a_file_larger_than_memory_is_mapped(tmp_path):
    with open("/proc/meminfo") as file:
        about = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    length = about["MemTotal"] + about["SwapTotal"] + 2**30
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        SafetensorsWriter(file, [Entry("a", torch.uint8, (length,))])
        file.seek(length - 1, io.SEEK_CUR)
        file.write(b"\7")  # a sparse file: one block on the disk
    mapped = map_safetensors(path)["a"]
    assert (mapped.shape, int(mapped[0]), int(mapped[-1])) == ((length,), 0, 7)


def damaged(whole):
    header = int.from_bytes(whole[:8], "little")
    yield from (whole[:-1], whole + b"x", whole[: 8 + header], whole[:5], b"", b"\xff" * 40)
    yield whole.replace(b'"F32"', b'"F99"')
    yield whole.replace(b"[2,3]", b"[2,4]")
    yield whole[:8] + b"[" + whole[9:]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2, 3)}, path)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.safetensors is not a whole safetensors file"):
            map_safetensors(path)


def test_a_dtype_without_a_counterpart_is_named(tmp_path):
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(ValueError, match="a is of dtype F4; expected one of F64"):
        map_safetensors(tmp_path / "m.safetensors")


def test_headers_of_any_length_are_read(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for spaces in range(8):
        text = header + b" " * spaces
        content = len(text).to_bytes(8, "little") + text + bytes(raw_bytes(torch.tensor([1.5, -2])))
        (tmp_path / "m.safetensors").write_bytes(content)
        assert map_safetensors(tmp_path / "m.safetensors")["a"].tolist() == [1.5, -2]


def test_a_refused_mapping_says_what_to_do(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    monkeypatch.setattr("dpp_lightning.storage.mapped_file.mmap.mmap", refuse)
    with pytest.raises(MemoryError, match="overcommit_memory"):
        map_safetensors(tmp_path / "m.safetensors")


def test_tensors_in_memory_are_written_as_save_file_does(tmp_path):
    tensors = {
        "half": filled(torch.float16, (3,)),
        "turned": filled(torch.float32, (5, 3)).T,
        "wide": filled(torch.int64, (2, 2)),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    }
    write_tensors(tmp_path / "m.safetensors", tensors)
    read = load_file(tmp_path / "m.safetensors")
    assert {name: t.shape for name, t in read.items()} == {name: t.shape for name, t in tensors.items()}
    assert all(raw_bytes(read[name]) == raw_bytes(tensors[name]) for name in tensors)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("size", [0, 5000])
def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path, size):
    with files_up_to(size), pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path / "m.safetensors", {"a": torch.ones(5000)})
