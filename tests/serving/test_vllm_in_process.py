"""vLLM itself, on the CPU: an engine switches between deltas of one base, exactly, and survives what is refused."""

import shutil
import sys
from importlib.util import find_spec

import pytest
from vllm_engines import checksums, engine, environment, install_plugin, tokens_of, tokens_of_transformers
from vllm_models import dense_folder, make_folders

from dpp_lightning.serving.vllm.switch import switch_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, see tests/serving/vllm_env.sh"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        for place in install_plugin(folder / "packages"):
            patch.syspath_prepend(place)
        yield make_folders(folder)


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder / "base", dtype="float32") as llm:
        yield llm


def switch(llm, folder, name, **settings):
    switch_engine(llm, None if name is None else str(folder / name), **settings)


def test_greedy_tokens_are_those_of_transformers_in_three_rounds(llm, folder):
    expected = {n: tokens_of_transformers(dense_folder(folder, n)) for n in (None, "A", "B", "carrying", "merged")}
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)
    for _ in range(3):
        for name in (None, "A", "B", None, "carrying", "A", "merged", None):
            switch(llm, folder, name)
            assert tokens_of(llm) == expected[name], name


def test_prompts_of_the_weights_before_are_forgotten(llm, folder):
    """The prefix cache is what would answer with them: without the switch's reset the second answer is another."""
    switch(llm, folder, None)
    tokens_of(llm)
    switch(llm, folder, "A")
    fresh = tokens_of(llm)
    switch(llm, folder, None)
    tokens_of(llm)
    llm.start_weight_update()
    llm.update_weights({"update_info": {"delta": str(folder / "A")}})
    llm.finish_weight_update()
    assert tokens_of(llm) != fresh
    llm.reset_prefix_cache()
    assert tokens_of(llm) == fresh


@pytest.mark.parametrize("present", [None, "A"])
def test_what_is_refused_leaves_the_present_weights(llm, folder, tmp_path, present):
    switch(llm, folder, present)
    before, tokens = checksums(llm), tokens_of(llm)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "B", damaged)
    content = bytearray((damaged / "delta_model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "delta_model.safetensors").write_bytes(content)
    for delta, settings, message in (
        (damaged, {}, "damaged"),
        (tmp_path / "absent", {}, "no such folder"),
        (folder / "A", {"task": "sst2"}, "no task 'sst2'"),
        (folder / "of_other", {}, "is not the base of this delta"),
        (folder / "base", {}, "delta"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            switch_engine(llm, str(delta), **settings)
        assert "restart" not in str(caught.value)
        assert checksums(llm) == before
    switch(llm, folder, "B")
    switch(llm, folder, present)
    assert (checksums(llm), tokens_of(llm)) == (before, tokens)


@pytest.mark.parametrize(
    ("kind", "tied", "dtype", "names"),
    [("qwen2", True, "bfloat16", (None, "A", "carrying")), ("llama", False, "float32", ("B", "merged"))],
)
def test_the_weights_are_those_of_the_dense_checkpoints_bit_for_bit(kind, tied, dtype, names, folder, tmp_path):
    make_folders(tmp_path, kind, tied)
    expected = {}
    for name in names:
        with engine(dense_folder(tmp_path, name), dtype=dtype) as dense:
            expected[name] = checksums(dense)
    with engine(tmp_path / "base", dtype=dtype) as llm:
        for name in (*names, *reversed(names), *names):
            switch(llm, tmp_path, name)
            assert checksums(llm) == expected[name], name


def test_two_workers_hold_their_parts_of_the_dense_checkpoint(folder):
    with engine(dense_folder(folder, "A"), dtype="float32", tensor_parallel_size=2) as dense:
        expected = checksums(dense)
    with engine(folder / "base", dtype="float32", tensor_parallel_size=2) as llm:
        before = checksums(llm)
        switch(llm, folder, "B")
        switch(llm, folder, "A")
        assert checksums(llm) == expected
        with pytest.raises(Exception, match="no such folder"):
            switch(llm, folder, "absent")
        assert checksums(llm) == expected
        switch(llm, folder, None)
        assert checksums(llm) == before


def test_the_cpu_engine_as_it_is_refuses(folder, monkeypatch, capfd):
    """It packs the weights, so that what is written to them would change nothing."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(folder / "packages")])
    with pytest.raises(RuntimeError, match="initialization failed"), engine(folder / "base", dtype="float32"):
        pass
    assert "deltas cannot be switched in this server: vLLM's CPU engine packs weights" in "".join(capfd.readouterr())
