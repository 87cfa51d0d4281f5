"""vLLM's server on the loopback: clients switch it over HTTP, and what is refused leaves it serving."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from urllib.request import Request, urlopen

import pytest
from vllm_engines import PROMPT, server, tokens_of_transformers
from vllm_models import dense_folder, make_folders

from dpp_lightning.serving.vllm.switch import switch_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, see tests/serving/vllm_env.sh"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("vllm_http"))


@pytest.fixture(scope="module")
def url(folder):
    with server(folder / "base", folder) as url:
        yield url


def answer(url, prompt=PROMPT, count=16):
    """Greedy tokens of the server."""
    content = {
        "model": "base", "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    request = Request(f"{url}/v1/completions", json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["token_ids"]


def place(folder, name):
    return None if name is None else str(folder / name)


def test_greedy_tokens_are_those_of_transformers_in_three_rounds(url, folder):
    names = (None, "A", "B", None)
    expected = {name: tokens_of_transformers(dense_folder(folder, name)) for name in names}
    for _ in range(3):
        for name in names:
            switch_server(url, place(folder, name))
            assert answer(url) == expected[name], name


@pytest.mark.parametrize("present", [None, "A"])
def test_what_is_refused_is_said_in_one_line_and_the_server_goes_on(url, folder, tmp_path, present):
    switch_server(url, place(folder, present))
    before = answer(url)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "B", damaged)
    (damaged / "delta_model.safetensors").write_bytes(b"\0" * 100)
    for delta, task, message in (
        (damaged, None, "damaged|safetensors"),
        (tmp_path / "absent", None, "no such folder"),
        (folder / "B", "sst2", "no task 'sst2'"),
        (folder / "of_other", None, "is not the base of this delta"),
    ):
        with pytest.raises(RuntimeError, match=message) as caught:
            switch_server(url, str(delta), task=task)
        assert "\n" not in str(caught.value)
        assert answer(url) == before
    switch_server(url, place(folder, "B"))
    assert answer(url) == tokens_of_transformers(dense_folder(folder, "B"))


def test_requests_under_way_are_answered_by_the_weights_before(url, folder):
    """Some are sent before the switch and some during it: each has the tokens of one of the two models."""
    switch_server(url, None)
    prompts = [[*PROMPT[:10], 2 + k] for k in range(8)]
    before = [answer(url, prompt) for prompt in prompts]
    with ThreadPoolExecutor(9) as pool:
        first = [pool.submit(answer, url, prompt) for prompt in prompts]
        switch_server(url, place(folder, "A"))
        second = [pool.submit(answer, url, prompt) for prompt in prompts]
    after = [tokens_of_transformers(dense_folder(folder, "A"), prompt) for prompt in prompts]
    assert [request.result() for request in second] == after
    for request, old, new in zip(first, before, after, strict=True):
        assert request.result() in (old, new)


def test_a_paused_server_is_left_to_who_paused_it(url, folder):
    switch_server(url, None)
    urlopen(Request(f"{url}/pause?mode=wait", b"{}", method="POST"), timeout=60)
    try:
        with pytest.raises(RuntimeError, match="is paused"):
            switch_server(url, place(folder, "A"))
    finally:
        urlopen(Request(f"{url}/resume", b"{}", method="POST"), timeout=60)
    assert answer(url) == tokens_of_transformers(folder / "base")
