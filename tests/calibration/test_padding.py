"""Padding does not count: the inputs of a padded batch against those of every sample alone, recorded by plain hooks."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.tensors.names import canonical_names

WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
DECODER = {**WIDTHS, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
BART = {**BOTH, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
MODELS = {
    "BertForSequenceClassification": ("BertConfig", WIDTHS),
    "ModernBertForSequenceClassification": ("ModernBertConfig", {**DECODER, "cls_token_id": 1, "sep_token_id": 2}),
    "LlamaForCausalLM": ("LlamaConfig", DECODER),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}),
    "FalconForCausalLM": ("FalconConfig", {k: v for k, v in WIDTHS.items() if k != "intermediate_size"}),
    "RwkvForCausalLM": ("RwkvConfig", {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}),
    "MixtralForCausalLM": ("MixtralConfig", {**DECODER, "num_local_experts": 4}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
    ),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "XLNetModel": ("XLNetConfig", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 40}),
}
SLOW = {name for name in MODELS if name[:4] not in ("Bert", "Mixt", "T5Fo", "Bart", "XLNe")}


def tiny(name: str) -> nn.Module:
    config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def padded_batch(model: nn.Module, samples: int, tokens: int, target_tokens: int):
    """A batch padded on the right, and its samples alone. Sources get shorter, targets longer."""
    lengths = [tokens - i % (tokens - 1) for i in range(samples)]
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": torch.randint(3, 40, (samples, tokens)) * mask, "attention_mask": mask}
    target_lengths = [target_tokens - (samples - 1 - i) % (target_tokens - 1) for i in range(samples)]
    if model.config.is_encoder_decoder:
        mask = (torch.arange(target_tokens) < torch.tensor(target_lengths)[:, None]).long()
        targets = torch.randint(3, 40, (samples, target_tokens))
        batch |= {"decoder_input_ids": targets * mask, "decoder_attention_mask": mask}
    cut = {name: target_lengths if name.startswith("decoder") else lengths for name in batch}
    return batch, [{name: t[i : i + 1, : cut[name][i]] for name, t in batch.items()} for i in range(samples)]


def recorded(model: nn.Module, batches) -> dict[str, torch.Tensor]:
    """Canonical name of every Linear and Conv1D to all rows that it is called with."""
    rows: dict[str, list[torch.Tensor]] = {}
    names, handles = canonical_names(model), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def hook(_module, args, name=names[f"{name}.weight"]):
                rows.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
@pytest.mark.parametrize(("samples", "tokens", "targets"), [(2, 8, 5), (3, 6, 6), (4, 4, 4)])
def test_a_padded_batch_counts_what_its_samples_alone_do(name, samples, tokens, targets):
    model = tiny(name)
    batch, alone = padded_batch(model, samples, tokens, targets)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with collected_inputs(model) as collector:
            model(**batch)
    statistics = collector.statistics
    expected = recorded(model, alone)
    assert expected
    for weight, rows in expected.items():
        assert statistics[weight].tokens == len(rows), weight
        assert torch.allclose(statistics[weight].total, rows.sum(0), atol=1e-3, rtol=1e-3), weight
        assert torch.allclose(statistics[weight].squares, rows.square().sum(0), atol=1e-3, rtol=1e-3), weight


@pytest.mark.slow
def test_what_a_model_itself_adds_to_fill_its_window_does_not_count():
    config = transformers.LongformerConfig(**WIDTHS, attention_window=[4], pad_token_id=0)
    model = transformers.LongformerForSequenceClassification(config).eval()
    batch, _ = padded_batch(model, 3, 6, 6)
    with torch.no_grad(), collected_inputs(model) as collector:
        model(**batch)
    tokens = {name: s.tokens for name, s in collector.statistics.items() if name.startswith("encoder.")}
    of_first_tokens = {name: tokens.pop(name) for name in list(tokens) if name.endswith("query_global.weight")}
    assert set(tokens.values()) == {int(batch["attention_mask"].sum())}
    assert set(of_first_tokens.values()) == {3}


def test_each_expert_has_the_inputs_of_the_tokens_that_are_sent_to_it():
    model = tiny("MixtralForCausalLM")
    batch, alone = padded_batch(model, 3, 6, 6)
    with torch.no_grad(), collected_inputs(model) as padded:
        model(**batch)
    with torch.no_grad(), collected_inputs(model) as single:
        for sample in alone:
            model(**sample)
    with_padding, without = padded.statistics, single.statistics
    experts = [name for name in without if ".experts." in name]
    assert len(experts) > 6
    assert with_padding.keys() == without.keys()
    two_each = sum(without[name].tokens for name in experts if name.endswith("w1.weight"))
    assert two_each == 2 * int(batch["attention_mask"].sum())
    for name in experts:
        assert with_padding[name].tokens == without[name].tokens
        assert torch.allclose(with_padding[name].squares, without[name].squares, rtol=1e-3)


def test_the_text_s_padding_says_nothing_of_images():
    sides = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {**sides, "image_size": 16, "patch_size": 8}  # 4 patches and the class token
    config = transformers.CLIPConfig(text_config={**sides, "vocab_size": 40, "eos_token_id": 2}, vision_config=vision)
    model = transformers.CLIPModel(config).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad(), collected_inputs(model) as collector:
        model(input_ids=torch.randint(3, 40, (2, 5)), attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16))
    tokens = {name: statistics.tokens for name, statistics in collector.statistics.items()}
    assert tokens["vision_model.encoder.layers.0.mlp.fc1.weight"] == 10
    assert tokens["text_model.encoder.layers.0.mlp.fc1.weight"] == 7


def test_the_padding_of_samples_of_sound_becomes_that_of_frames():
    config = transformers.Wav2Vec2Config(
        **{**WIDTHS, "vocab_size": 12},
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    mask = (torch.arange(400) < torch.tensor([[400], [200]])).long()
    with torch.no_grad(), collected_inputs(model) as collector:
        model(input_values=torch.randn(2, 400), attention_mask=mask)
    frames = int(model._get_feat_extract_output_lengths(torch.tensor([400, 200])).sum())
    tokens = {statistics.tokens for statistics in collector.statistics.values()}
    assert tokens == {frames}


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_s_own_masks_count_the_other_way_round(batch_first):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x, padding = torch.randn(4, 4, 16), torch.zeros(4, 4, dtype=torch.bool)
    padding[2, 1:] = True
    with torch.no_grad(), collected_inputs(model) as collector:
        model(x if batch_first else x.transpose(0, 1).contiguous(), src_key_padding_mask=padding)
    statistics = {name.rpartition("layers.0.")[2]: s for name, s in collector.statistics.items()}
    assert {s.tokens for s in statistics.values()} == {13}
    assert torch.allclose(statistics["self_attn.in_proj_weight"].total, x[~padding].double().sum(0), atol=1e-5)


def test_of_what_the_padding_is_not_known_is_said():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs_embeds, attention_mask=None):
            return self.second(self.first(inputs_embeds)[:, ::2])

    model, mask = Halves(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    said = "which inputs of 1 weights are padding is not known.*: second.weight$"
    with pytest.warns(UserWarning, match=said), collected_inputs(model) as collector:
        model(torch.randn(2, 5, 4), attention_mask=mask)
    assert collector.statistics["first.weight"].tokens == 8
    assert collector.statistics["second.weight"].tokens == 6
