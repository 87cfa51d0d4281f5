"""Scope on the roads that prune: blocks found on full names or by patterns, the linear scope, refusals in one line."""

import warnings

import pytest
import torch
from tiny import pair
from transformers import (
    AlbertConfig,
    AlbertModel,
    ConvNextConfig,
    ConvNextModel,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from dpp_lightning import METHODS, SparseDelta, prune
from dpp_lightning.cli import main
from dpp_lightning.pruning.scope import Scope

BY_BLOCKS = [name for name, row in METHODS.items() if row.by_blocks and not row.fit]


def states(shapes, seed=0):
    """A base and a fine-tuned state dict; the delta's tail is heavier from one tensor to the next."""
    g = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tails = {name: torch.randn(t.shape, generator=g).abs() ** (i / 2) for i, (name, t) in enumerate(base.items())}
    return base, {n: t + 0.01 * tails[n] * torch.randn(t.shape, generator=g) for n, t in base.items()}


def models(make):
    torch.manual_seed(0)
    base, finetuned = make(), make()
    with torch.no_grad():
        for a, b in zip(base.parameters(), finetuned.parameters(), strict=True):
            b.copy_(a + 0.01 * torch.randn_like(a) * torch.randn_like(a).abs() ** 2)
    return base, finetuned


def kept_shares(delta):
    return {name: len(kept.values) / torch.Size(kept.shape).numel() for name, kept in delta.tensors.items()}


# --- blocks are found whatever else the model holds -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["owl", "dp"])
@pytest.mark.parametrize(
    "front", ["model.layers.", "layers.", "encoder.layer.", "transformer.h.", "model.decoder.layers."]
)
@pytest.mark.parametrize("further", [(), ("embed_tokens.weight", "norm.weight")])
def test_a_model_of_nothing_but_blocks_has_other_kept_shares_from_block_to_block(method, front, further):
    shapes = {f"{front}{b}.{n}.weight": (40, 30) for b in range(4) for n in ("q_proj", "up_proj")}
    head = front.split("layer")[0].split("h.")[0]
    base, finetuned = states({**shapes, **{head + name: (20, 30) for name in further}})
    shares = kept_shares(prune(base, finetuned, method, 0.8))
    blocks = [{share for name, share in shares.items() if f".{b}." in f".{name}"} for b in range(4)]
    assert all(blocks)
    assert len({tuple(sorted(block)) for block in blocks}) == 4
    assert max(max(block) for block in blocks) - min(min(block) for block in blocks) > 0.05


@pytest.mark.parametrize("method", [*BY_BLOCKS, "dare"])
def test_a_pattern_finds_the_blocks_that_names_do_not_tell(method):
    shapes = {f"layers.{b}.{n}.weight": (40, 30) for b in range(4) for n in "ab"}
    known, finetuned = states({**shapes, "x": (3,)})
    renamed = [{n.replace("layers.", "tower.cells."): t for n, t in s.items()} for s in (known, finetuned)]
    expected = prune(known, finetuned, method, 0.8, scope="linear")
    found = prune(*renamed, method, 0.8, scope="linear", blocks="tower.cells.*")
    assert len(found.tensors) == 8
    if not METHODS[method].random:  # a random selection draws by the tensor's name
        assert list(kept_shares(found).values()) == list(kept_shares(expected).values())
    assert found.info.scope["blocks"] == ["tower.cells.*"]


def test_one_pattern_may_be_a_text_and_another_spelling_is_the_same():
    assert Scope.of("all", "a.*", "b.*", "carry", "c.*", "d.*") == Scope.of(
        include=["a.*"], exclude=("b.*",), carry=["c.*"], blocks=["d.*"]
    )


# --- the linear scope -------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
LINEAR = {
    "qwen2": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**TINY, num_key_value_heads=1)),
        lambda name: "_proj." in name,
    ),
    "gpt_oss": (
        lambda: GptOssForCausalLM(
            GptOssConfig(**TINY, num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
        ),
        lambda name: "_proj" in name or "router" in name,
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=30)
        ),
        lambda name: "Attention.q." in name or any(f".{n}.weight" in name for n in ("q", "k", "v", "o", "wi", "wo")),
    ),
    "swin": (
        lambda: SwinModel(SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2)),
        lambda name: "layers" in name and "norm" not in name and "relative_position" not in name,
    ),
    "xlnet": (
        lambda: XLNetModel(XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=30)),
        lambda name: ".ff.layer_1" in name or ".ff.layer_2" in name or name[-len("rel_attn.q") :] in [f"rel_attn.{c}" for c in "qkvor"],
    ),
    "albert": (
        lambda: AlbertModel(AlbertConfig(**TINY, embedding_size=8)),
        lambda name: "albert_layers" in name and "LayerNorm" not in name and "layer_norm" not in name,
    ),
    "convnext": (
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)),
        lambda name: "pwconv" in name,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINEAR)
def test_the_linear_scope_takes_weights_and_biases_of_linear_maps_in_blocks(kind):
    make, is_linear = LINEAR[kind]
    base, finetuned = models(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        delta = prune(base, finetuned, "magnitude", 0.5, scope="linear")
    whole = prune(base, finetuned, "magnitude", 0.5)
    assert sorted(delta.tensors) == sorted(name for name in whole.tensors if is_linear(name))


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("method", ["owl", "dp"])
def test_methods_by_blocks_tell_blocks_of_real_models_apart(kind, method):
    base, finetuned = models(LINEAR[kind][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        shares = {
            round(share, 2)
            for n, share in kept_shares(prune(base, finetuned, method, 0.5)).items()
            if LINEAR[kind][1](n)
        }
    assert len(shares) > 1 or (kind, method) == ("albert", "owl")  # which has a single block


def resnet():
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]))


@pytest.mark.parametrize(
    ("method", "scope", "message"),
    [
        ("dare", "linear", r"^scope='linear' prunes .* \(encoder\.stages\.0\.layers\.0\., .*\(convolutions do not count\): take scope='all'"),
        ("owl", "all", r"^owl goes by .*encoder\.stages\.0\.layers\.0\., .*: take a method that needs none, such as 'dare'"),
        ("dp", "all", "^dp and dppa go by"),
        ("struct-dare", "all", "^struct-dare and struct-darex-q go by"),
    ],
)  # fmt: skip
def test_a_model_of_convolutions_is_refused_in_one_line(method, scope, message):
    base, finetuned = models(resnet)
    with pytest.raises(ValueError, match=message) as error:
        prune(base, finetuned, method, 0.5, scope=scope)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "scope"), [("dare", "linear"), *((method, "all") for method in BY_BLOCKS)]
)  # fmt: skip
def test_names_that_tell_of_no_block_are_refused_with_the_pattern_to_give(method, scope):
    base, finetuned = states({f"tower.cells.{b}.{n}.weight": (6, 5) for b in range(3) for n in "ab"} | {"x": (3,)})
    with pytest.raises(ValueError, match=r"say where the blocks are, as in blocks='tower\.cells\.\*' \(--blocks\), or"):
        prune(base, finetuned, method, 0.5, scope=scope)


def test_a_pattern_that_matches_nothing_is_refused():
    base, finetuned = pair()
    with pytest.raises(
        ValueError, match=r"the blocks pattern 'tower\.\*' matches none of the 15 tensors; .* 'layers\.\*'$"
    ):
        prune(base, finetuned, "owl", 0.5, blocks=["layers.*", "tower.*"])


def test_the_linear_scope_warns_where_blocks_have_few_of_the_entries():
    base, finetuned = states({"layers.0.q.weight": (4, 4), "embed.weight": (60, 4), "trunk.3.w.weight": (90, 4)})
    with pytest.warns(
        UserWarning, match=r"which have 2\.6 % of the entries here; .* are trunk\.3\.w\.weight, embed"
    ) as told:
        prune(base, finetuned, "dare", 0.5, scope="linear")
    assert "as in blocks='trunk.*' (--blocks)" in str(told[0].message)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    from safetensors.torch import save_file

    base, finetuned = states({f"tower.cells.{b}.{n}.weight": (40, 30) for b in range(3) for n in "ab"} | {"x": (3,)})
    save_file(base, tmp_path / "base.safetensors")
    save_file(finetuned, tmp_path / "finetuned.safetensors")
    return tmp_path


def run(folder, *words):
    files = [str(folder / f"{name}.safetensors") for name in ("base", "finetuned")]
    return main(["prune", *files, "--output", str(folder / "delta"), *words])


@pytest.mark.parametrize("words", [("--method", "dp"), ("--scope", "linear")])
def test_the_command_asks_for_blocks_and_takes_them(folders, words, capsys):
    assert run(folders, *words) != 0
    said = capsys.readouterr().err
    assert "blocks='tower.cells.*' (--blocks)" in said.strip().splitlines()[-1]
    assert not (folders / "delta").exists()
    assert run(folders, *words, "--blocks", "tower.cells.*") == 0
    delta = SparseDelta.from_pretrained(folders / "delta")
    assert delta.info.scope["blocks"] == ["tower.cells.*"]
    assert len({round(share, 2) for share in kept_shares(delta).values()}) > 1 or "linear" in words
