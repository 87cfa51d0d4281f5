"""Inputs of layers: sums against dense twins, several calls, shared weights, whatever product a weight stands in."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
)

from dpp_lightning.calibration.input_collector import collected_inputs


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.spare = nn.Embedding(11, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, ids):
        return self.linear(self.embed(ids))


def test_sums_over_several_calls_equal_those_over_all_tokens():
    model, ids = Small(), torch.randint(0, 11, (6, 5))
    with collected_inputs(model) as collector:
        model(ids[:4])
        model(ids[4:])
    x = model.embed(ids).reshape(-1, 4).double().detach()
    stats = collector.statistics
    assert stats["linear.weight"].tokens == 30
    assert torch.allclose(stats["linear.weight"].norm, x.norm(dim=0), rtol=1e-6)
    assert torch.allclose(stats["linear.weight"].mean, x.mean(0), atol=1e-7)
    assert torch.equal(stats["embed.weight"].total, torch.bincount(ids.flatten(), minlength=11).double())
    assert "spare.weight" not in stats


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = Small()
    with pytest.raises(IndexError), collected_inputs(model) as collector:
        model(torch.tensor([[99]]))
    before = collector.statistics
    model(torch.tensor([[1]]))
    assert before.keys() == collector.statistics.keys()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_token_that_did_not_come_keeps_a_chance():
    model = Small()
    with collected_inputs(model) as collector:
        model(torch.zeros(1, 8, dtype=torch.long))
    rms = collector.statistics["embed.weight"].rms
    assert (rms > 0).all()
    assert rms[0] > 3 * rms[1]


def test_padding_does_not_count():
    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 30, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    with collected_inputs(model) as padded:
        model(input_ids=ids, attention_mask=mask)
    with collected_inputs(model) as alone:
        model(input_ids=ids[:1], attention_mask=mask[:1])
        model(input_ids=ids[1:, :3], attention_mask=mask[1:, :3])
    name = "encoder.layer.0.attention.self.query.weight"
    assert padded.statistics[name].tokens == alone.statistics[name].tokens == 9
    assert torch.allclose(padded.statistics[name].squares, alone.statistics[name].squares, rtol=1e-5)


def test_conv1d_indexes_its_first_dimension():
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    with collected_inputs(model) as collector:
        model(input_ids=torch.randint(0, 20, (1, 5)))
    stats = collector.statistics
    up = next(s for n, s in stats.items() if n.endswith("mlp.c_proj.weight"))
    assert (up.axis, len(up.squares)) == (0, 32)
    assert sum(n.endswith("wte.weight") or "lm_head" in n for n in stats) == 1


class Tied(nn.Module):
    """An embedding that is the head too, and a matrix that two maps share."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight, self.second.weight = self.embed.weight, self.first.weight

    def forward(self, ids):
        return self.head(self.second(self.first(self.embed(ids))))


def test_a_weight_that_several_modules_share_counts_in_all_of_them():
    model, ids = Tied(), torch.randint(0, 11, (3, 5))
    with collected_inputs(model) as collector:
        model(ids)
    embedded = model.embed(ids)
    first = model.first(embedded)
    stats = collector.statistics
    both = torch.cat([embedded, first]).reshape(-1, 4).double()
    assert stats["first.weight"].tokens == 30
    assert torch.allclose(stats["first.weight"].total, both.sum(0), atol=1e-5)
    assert (stats["embed.weight"].axis, stats["embed.weight"].embedding) == (1, False)
    assert torch.allclose(stats["embed.weight"].total, model.second(first).reshape(-1, 4).double().sum(0), atol=1e-5)


class Shifted(nn.Embedding):
    """Positions that are counted from 2 on, from a tensor that is looked at for its shape alone, as BART has them."""

    def forward(self, hidden, past=0):
        return super().forward(torch.arange(past, past + hidden.shape[1]) + 2)


def test_an_embedding_is_counted_by_the_numbers_that_index_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.kinds = nn.Embedding(9, 4), Shifted(9, 4), nn.EmbeddingBag(9, 4)

        def forward(self, input_ids, attention_mask=None):
            x = self.words(input=input_ids)
            return x + self.places(x) + self.kinds(input_ids).unsqueeze(1)

    ids, mask = torch.randint(0, 9, (2, 3)), torch.tensor([[1, 1, 1], [1, 0, 0]])
    model = Model()
    with collected_inputs(model) as collector:
        model(ids, attention_mask=mask)
    counts = {name: s.total.long().tolist() for name, s in collector.statistics.items()}
    assert counts["places.weight"] == [0, 0, 2, 1, 1, 0, 0, 0, 0]  # of the tokens that are no padding
    assert counts["words.weight"] == torch.bincount(ids[mask.bool()], minlength=9).tolist()
    assert counts["kinds.weight"] == counts["words.weight"]


@pytest.mark.parametrize("form", ["x @ W", "x @ W.T", "W @ x", "addmm", "bmm", "F.linear"])
def test_a_weight_is_seen_in_whatever_product_it_stands(form):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn((2, 5, 3) if form == "bmm" else (5, 3)))

        def forward(self, x):
            w = self.weight
            return {
                "x @ W": lambda: x @ w,
                "x @ W.T": lambda: torch.matmul(x, w.T),
                "W @ x": lambda: w @ x.transpose(1, 2),
                "addmm": lambda: torch.addmm(torch.zeros(1), x.reshape(-1, 5), w),
                "bmm": lambda: torch.bmm(x, w),
                "F.linear": lambda: nn.functional.linear(weight=w, input=x),
            }[form]()

    features, axis = {"x @ W.T": (3, 1), "W @ x": (3, 1), "F.linear": (3, 1), "bmm": (5, 1)}.get(form, (5, 0))
    x = torch.randn(2, 7, features)
    with torch.no_grad(), collected_inputs(model := Model()) as collector:
        model(x)
    stats = collector.statistics["weight"]
    expected = x.double().sum(1) if form == "bmm" else x.double().sum((0, 1))
    assert (stats.axis, stats.tokens) == (axis, 14)
    assert stats.fits(model.weight.shape)
    assert torch.allclose(stats.total, expected, atol=1e-5)


def test_a_part_of_a_weight_is_not_taken_for_all_of_it():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with torch.no_grad(), collected_inputs(model) as to_others:
        model(query, key, key)
    with torch.no_grad(), collected_inputs(model) as to_itself:
        model(query, query, query)
    assert to_others.statistics.keys() == {"out_proj.weight"}
    assert to_itself.statistics["in_proj_weight"].tokens == 6


def test_compiled_modules_and_modules_compiled_before_are_seen():
    model = Small()
    compiled = torch.compile(model, backend="eager")
    ids = torch.randint(0, 11, (2, 5))
    compiled(ids)
    with collected_inputs(compiled) as collector:
        compiled(ids)
    assert collector.statistics["linear.weight"].tokens == 10


def test_inference_mode_and_autocast_change_nothing():
    model, ids = (
        GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).eval(),
        torch.ones(1, 5).long(),
    )
    with torch.no_grad(), collected_inputs(model) as plain:
        model(ids)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), collected_inputs(model) as other:
        model(ids)
    assert {n: s.tokens for n, s in plain.statistics.items()} == {n: s.tokens for n, s in other.statistics.items()}


def test_experts_in_one_tensor_have_inputs_of_their_own():
    config = GptOssConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = GptOssForCausalLM(config).eval()
    before = model.config._experts_implementation
    routed: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.router.register_forward_hook(lambda _m, _a, out: routed.append(out[2]))
    states: list[torch.Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _m, args: states.append(args[0].double()))
    with torch.no_grad(), collected_inputs(model) as collector:
        model(input_ids=torch.randint(0, 20, (2, 6)))
    handle.remove()
    stats = collector.statistics["layers.0.mlp.experts.gate_up_proj"]
    assert (stats.axis, tuple(stats.total.shape), stats.tokens) == (1, (4, 8), 24)
    for expert in range(4):
        rows = states[0][(routed[0] == expert).any(-1)]
        assert torch.allclose(stats.squares[expert], rows.square().sum(0), rtol=1e-5)
    assert model.config._experts_implementation == before


def test_query_key_and_value_that_the_files_hold_as_one_have_their_common_input():
    from transformers import NomicBertConfig, NomicBertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = NomicBertModel(NomicBertConfig(**sizes, vocab_size=30)).eval()
    seen = []
    query = next(child for name, child in model.named_modules() if name.endswith("q_proj"))
    query.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 16)))
    with collected_inputs(model) as collector, torch.no_grad():
        model(input_ids=torch.arange(10).reshape(2, 5))
    name = next(name for name in collector.statistics if "Wqkv" in name)
    statistics = collector.statistics[name]
    assert statistics.axis == 1
    assert torch.allclose(statistics.total, torch.cat(seen).sum(0).double(), atol=1e-5)
