"""Tiny random models of many architectures of transformers, with an input for each: a table, deterministic, no network.

Every row is a class of transformers, the settings of its configuration and the inputs of a forward pass. A model is
built in well under a second. Its values are as training leaves them: base + (fine-tuned - base) rounds in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Inputs = dict[str, Tensor]

OLD_NAMES = {  # of files written by early releases: the name's end today to the one in the file
    "bert": {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    "wav2vec2": {
        "conv.parametrizations.weight.original0": "conv.weight_g",
        "conv.parametrizations.weight.original1": "conv.weight_v",
    },
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: of the row.
        kind: what it is an example of, such as "decoder".
        class_name: a class of transformers.
        settings: of its configuration.
        inputs: makes the inputs of a forward pass, two examples.
        old_names: a key of ``OLD_NAMES``: the files below have the names of early releases.
        old_files: which of "base" and "finetuned" have the old names.
    """

    name: str
    kind: str
    class_name: str
    settings: dict[str, Any]
    inputs: Callable[[], Inputs]
    old_names: str | None = None
    old_files: tuple[str, ...] = ()

    @property
    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.class_name)

    def build(self) -> Any:
        """A model with random weights, always the same."""
        torch.manual_seed(0)
        config = self.model_class.config_class(**self.settings)
        model = self.model_class(config).eval().to(config.dtype or torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # some are zeros at first, or written by nothing
                values = torch.randn(parameter.shape) * 0.05 + (parameter.dim() == 1) * 0.5
                parameter.copy_(values.to(model.dtype))
        return model

    def finetune(self, model: Any) -> None:
        """Move every parameter, and every float buffer that is saved, in place.

        The deltas' tails are longer in some tensors than in others, so that blocks and layers differ.
        """
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                delta = torch.randn(parameter.shape, generator=generator)
                power = 1 + 2 * float(torch.rand((), generator=generator))
                delta = (0.02 * delta.sign() * delta.abs() ** power).clamp(-0.3, 0.3)
                parameter.add_(delta.to(model.dtype))
            for buffer in self._saved_buffers(model):
                buffer.add_((0.02 * torch.rand(buffer.shape, generator=generator)).to(buffer.dtype))

    def _saved_buffers(self, model: Any) -> list[Tensor]:
        saved = model.state_dict().keys()
        return [b for name, b in model.named_buffers() if b.is_floating_point() and name in saved]

    def write_old_names(self, folder: Path) -> None:
        """Give the tensors of a folder's file the names of early releases."""
        assert self.old_names is not None
        file, renamed = folder / "model.safetensors", {}
        for name, tensor in load_file(file).items():
            for new, old in OLD_NAMES[self.old_names].items():
                name = re.sub(re.escape(new) + "$", old, name)
            renamed[name] = tensor
        save_file(renamed, file, {"format": "pt"})


def _ids(length: int = 8, vocabulary: int = 99, seed: int = 3) -> Tensor:
    return torch.randint(5, vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def _text() -> Inputs:
    mask = torch.ones(2, 8, dtype=torch.long)
    return {"input_ids": _ids(), "attention_mask": mask}


def _ids_only() -> Inputs:
    return {"input_ids": _ids()}


def _sources_and_targets() -> Inputs:
    return {**_text(), "decoder_input_ids": _ids(5)}


def _images(side: int = 32) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": _normal(2, 3, side, side)}


def _wave(samples: int = 400) -> Callable[[], Inputs]:
    return lambda: {"input_values": _normal(2, samples)}


def _features(frames: int, size: int, name: str = "input_features") -> Callable[[], Inputs]:
    return lambda: {name: _normal(2, frames, size)}


def _text_and_images(image_tokens: int, shape: tuple[int, ...] = (3, 32, 32)) -> Callable[[], Inputs]:
    """Ids with so many image tokens (99) and an image for each example."""

    def make() -> Inputs:
        ids = torch.cat([_ids(3), torch.full((2, image_tokens), 99), _ids(5, seed=5)], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _normal(2, *shape)}

    return make


def _text_and_patches() -> Inputs:
    """As Qwen2-VL takes an image for each example: 4 x 4 patches of 8 x 8 pixels in two frames, merged to 4 tokens."""
    start, end = torch.full((2, 1), 97), torch.full((2, 1), 98)
    ids = torch.cat([_ids(3, 96), start, torch.full((2, 4), 99), end, _ids(5, 96, 5)], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 99).int(),
        "pixel_values": _normal(2 * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _with(make: Callable[[], Inputs], **more: Callable[[], Tensor]) -> Callable[[], Inputs]:
    return lambda: {**make(), **{name: tensor() for name, tensor in more.items()}}


ARCHITECTURES: dict[str, Architecture] = {}


def _add(kind: str, name: str, class_name: str, inputs: Callable[[], Inputs], **settings: Any) -> None:
    ARCHITECTURES[name] = Architecture(name, kind, class_name, settings, inputs)


def _add_old(name: str, of: str, old_names: str, *files: str) -> None:
    row = ARCHITECTURES[of]
    ARCHITECTURES[name] = Architecture(name, row.kind, row.class_name, row.settings, row.inputs, old_names, files)


# fmt: off
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_BERT = {**_SIZES, "vocab_size": 100}
_CLASSES = {**_BERT, "num_labels": 3}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}
_IMAGE_CLASSES = {**_VISION, "num_labels": 3}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_BERT, **_SPECIAL, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100,
    "max_position_embeddings": 64, **_SPECIAL, "decoder_start_token_id": 1, "forced_eos_token_id": None}
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 100,
    "decoder_start_token_id": 0}
_WAV2VEC2 = {**_SIZES, "vocab_size": 20, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, **_SPECIAL}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

_ENCODER = "encoder"
_add(_ENCODER, "bert", "BertForSequenceClassification", _text, **_CLASSES)
_add(_ENCODER, "bert-mlm", "BertForMaskedLM", _text, **_BERT)
_add_old("bert, gamma and beta in the base", "bert", "bert", "base")
_add_old("bert, gamma and beta in both", "bert", "bert", "base", "finetuned")
_add(_ENCODER, "roberta", "RobertaForSequenceClassification", _text, **_CLASSES)
_add(_ENCODER, "roberta-mlm", "RobertaForMaskedLM", _text, **_BERT)
_add(_ENCODER, "xlm-roberta", "XLMRobertaForTokenClassification", _text, **_CLASSES)
_add(_ENCODER, "camembert", "CamembertForMaskedLM", _text, **_BERT)
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
_add(_ENCODER, "deberta-v2", "DebertaV2ForSequenceClassification", _text, **_CLASSES, **_DEBERTA, norm_rel_ebd="layer_norm",
    share_att_key=True)
_add(_ENCODER, "deberta-v2-mlm", "DebertaV2ForMaskedLM", _text, **_BERT, **_DEBERTA)
_add(_ENCODER, "distilbert", "DistilBertForSequenceClassification", _text, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
    vocab_size=100, num_labels=3)
_add(_ENCODER, "electra", "ElectraForSequenceClassification", _text, **_CLASSES, embedding_size=16)
_add(_ENCODER, "modernbert", "ModernBertForSequenceClassification", _text, **_CLASSES, **_SPECIAL, cls_token_id=1,
    sep_token_id=2, attn_implementation="eager")
_add(_ENCODER, "albert", "AlbertForSequenceClassification", _text, **_CLASSES, embedding_size=16)
_add(_ENCODER, "xlnet", "XLNetForSequenceClassification", _text, d_model=32, n_layer=2, n_head=4, d_inner=64,
    vocab_size=100, num_labels=3)
_add(_ENCODER, "longformer", "LongformerForSequenceClassification", _text, **_CLASSES, attention_window=[4, 4],
    max_position_embeddings=64)
_add(_ENCODER, "big-bird", "BigBirdForSequenceClassification", _text, **_CLASSES, attention_type="original_full",
    max_position_embeddings=64)
_add(_ENCODER, "funnel", "FunnelForSequenceClassification", _text, vocab_size=100, block_sizes=[1, 1], num_decoder_layers=1,
    d_model=32, n_head=4, d_head=8, d_inner=64, num_labels=3)
_add(_ENCODER, "convbert", "ConvBertForSequenceClassification", _text, **_CLASSES, embedding_size=16, conv_kernel_size=3)
_add(_ENCODER, "mpnet", "MPNetForSequenceClassification", _text, **_CLASSES)
_add(_ENCODER, "fnet", "FNetForSequenceClassification", _ids_only, hidden_size=32, num_hidden_layers=2,
    intermediate_size=64, vocab_size=100, num_labels=3)
_add(_ENCODER, "perceiver", "PerceiverForSequenceClassification", lambda: {"inputs": _ids(16)}, num_latents=4, d_latents=32,
    d_model=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2,
    vocab_size=100, max_position_embeddings=16, num_labels=3)
_add(_ENCODER, "esm", "EsmForMaskedLM", _text, **_BERT, pad_token_id=0, mask_token_id=3, position_embedding_type="rotary")
_add(_ENCODER, "nomic-bert", "NomicBertModel", _text, **_BERT)

_DECODER = "decoder"
_add(_DECODER, "gpt2", "GPT2LMHeadModel", _text, **_GPT2)
_add(_DECODER, "llama", "LlamaForCausalLM", _text, **_LLAMA)
_add(_DECODER, "llama, bfloat16", "LlamaForCausalLM", _text, **_LLAMA, dtype="bfloat16")
_add(_DECODER, "llama, tied", "LlamaForCausalLM", _text, **_LLAMA, tie_word_embeddings=True)
_add(_DECODER, "qwen2, tied", "Qwen2ForCausalLM", _text, **_LLAMA, tie_word_embeddings=True)
_add(_DECODER, "qwen3", "Qwen3ForCausalLM", _text, **_LLAMA, head_dim=8)
_add(_DECODER, "mistral", "MistralForCausalLM", _text, **_LLAMA)
_add(_DECODER, "gemma2", "Gemma2ForCausalLM", _text, **_LLAMA, head_dim=8, query_pre_attn_scalar=8)
_add(_DECODER, "gemma3", "Gemma3ForCausalLM", _text, **_LLAMA, head_dim=8)
_add(_DECODER, "phi", "PhiForCausalLM", _text, **_LLAMA)
_add(_DECODER, "phi3", "Phi3ForCausalLM", _text, **_LLAMA)
_add(_DECODER, "falcon", "FalconForCausalLM", _text, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    vocab_size=100)
_add(_DECODER, "opt", "OPTForCausalLM", _text, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
    vocab_size=100, max_position_embeddings=64, word_embed_proj_dim=16, **_SPECIAL)
_add(_DECODER, "bloom", "BloomForCausalLM", _text, hidden_size=32, n_layer=2, n_head=4, vocab_size=100, **_SPECIAL)
_add(_DECODER, "gpt-j", "GPTJForCausalLM", _text, **_GPT2, rotary_dim=4)
_add(_DECODER, "gpt-neox", "GPTNeoXForCausalLM", _text, **_BERT, **_SPECIAL, max_position_embeddings=64)
_add(_DECODER, "codegen", "CodeGenForCausalLM", _text, **_GPT2, rotary_dim=4)
_add(_DECODER, "stablelm", "StableLmForCausalLM", _text, **_LLAMA)
_add(_DECODER, "cohere", "CohereForCausalLM", _text, **_LLAMA)
_add(_DECODER, "olmo2", "Olmo2ForCausalLM", _text, **_LLAMA)
_add(_DECODER, "mpt", "MptForCausalLM", _text, d_model=32, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=64)
_add(_DECODER, "starcoder2", "Starcoder2ForCausalLM", _text, **_LLAMA)

_EXPERTS = "mixture of experts"
_add(_EXPERTS, "mixtral", "MixtralForCausalLM", _text, **_LLAMA, num_local_experts=4)
_add(_EXPERTS, "gpt-oss", "GptOssForCausalLM", _text, **_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    sliding_window=16)
_FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_add(_EXPERTS, "qwen2-moe", "Qwen2MoeForCausalLM", _text, **_LLAMA, **_FOUR_EXPERTS, moe_intermediate_size=16,
    shared_expert_intermediate_size=32)
_add(_EXPERTS, "qwen3-moe", "Qwen3MoeForCausalLM", _text, **_LLAMA, **_FOUR_EXPERTS, moe_intermediate_size=16, head_dim=8)
_add(_EXPERTS, "deepseek-v3", "DeepseekV3ForCausalLM", _text, **{**_LLAMA, "num_key_value_heads": 4}, n_routed_experts=4,
    num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
    moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
_add(_EXPERTS, "olmoe", "OlmoeForCausalLM", _text, **_LLAMA, **_FOUR_EXPERTS)
_add(_EXPERTS, "granite-moe", "GraniteMoeForCausalLM", _text, **_LLAMA, num_local_experts=4, num_experts_per_tok=2)
_add(_EXPERTS, "llama4", "Llama4ForCausalLM", _text, **_LLAMA, intermediate_size_mlp=64, head_dim=8, num_local_experts=4,
    num_experts_per_tok=1, interleave_moe_layer_step=2)
_add(_EXPERTS, "phimoe", "PhimoeForCausalLM", _text, **_LLAMA, num_local_experts=4, num_experts_per_tok=2)
_add(_EXPERTS, "dbrx", "DbrxForCausalLM", _text, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=100,
    ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}, attn_config={"kv_n_heads": 2,
    "rope_theta": 10000.0, "clip_qkv": 8.0})
_add(_EXPERTS, "switch-transformers", "SwitchTransformersForConditionalGeneration", _sources_and_targets, **_T5,
    num_decoder_layers=2, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
_add(_EXPERTS, "nllb-moe", "NllbMoeForConditionalGeneration", _sources_and_targets, **_BART, num_experts=4,
    encoder_sparse_step=2, decoder_sparse_step=2)

_STATES = "state space"
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4, "expand": 2}
_MAMBA_PARTS = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}
_add(_STATES, "mamba", "MambaForCausalLM", _ids_only, **_MAMBA)
_add(_STATES, "mamba2", "Mamba2ForCausalLM", _ids_only, **_MAMBA, num_heads=8, head_dim=8, n_groups=1)
_add(_STATES, "falcon-mamba", "FalconMambaForCausalLM", _ids_only, **_MAMBA)
_add(_STATES, "rwkv", "RwkvForCausalLM", _ids_only, hidden_size=32, num_hidden_layers=2, vocab_size=100,
    attention_hidden_size=32)
_add(_STATES, "jamba", "JambaForCausalLM", _text, **_LLAMA, **_FOUR_EXPERTS, **_MAMBA_PARTS, mamba_dt_rank=4,
    attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False)
_add(_STATES, "zamba2", "Zamba2ForCausalLM", _text, **{**_LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 4},
    mamba_d_state=4, mamba_d_conv=4, mamba_expand=2, mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=8,
    layers_block_type=["mamba", "hybrid", "hybrid"], num_mem_blocks=1, use_mem_rope=True, adapter_rank=4)
_add(_STATES, "recurrent-gemma", "RecurrentGemmaForCausalLM", _text, **{k: v for k,
    v in _LLAMA.items() if k != "max_position_embeddings"}, lru_width=32, attention_window_size=16,
    block_types=("recurrent", "attention"))
_add(_STATES, "bamba", "BambaForCausalLM", _text, **_LLAMA, **_MAMBA_PARTS, mamba_n_heads=8, mamba_d_head=8,
    mamba_n_groups=1, attn_layer_indices=[1])

_SEQUENCES = "encoder-decoder"
_add(_SEQUENCES, "t5", "T5ForConditionalGeneration", _sources_and_targets, **_T5)
_add(_SEQUENCES, "mt5", "MT5ForConditionalGeneration", _sources_and_targets, **_T5)
_add(_SEQUENCES, "umt5", "UMT5ForConditionalGeneration", _sources_and_targets, **_T5)
_add(_SEQUENCES, "bart", "BartForConditionalGeneration", _sources_and_targets, **_BART)
_add(_SEQUENCES, "mbart", "MBartForConditionalGeneration", _sources_and_targets, **_BART)
_add(_SEQUENCES, "pegasus", "PegasusForConditionalGeneration", _sources_and_targets, **_BART)
_add(_SEQUENCES, "blenderbot", "BlenderbotForConditionalGeneration", _sources_and_targets, **_BART)
_add(_SEQUENCES, "marian", "MarianMTModel", _sources_and_targets, **_BART)
_add(_SEQUENCES, "led", "LEDForConditionalGeneration", _sources_and_targets, **{k: v for k,
    v in _BART.items() if k != "max_position_embeddings"}, attention_window=[4, 4],
    max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)
_add(_SEQUENCES, "prophetnet", "ProphetNetForConditionalGeneration", _sources_and_targets, vocab_size=100, hidden_size=32,
    encoder_ffn_dim=64, decoder_ffn_dim=64, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
    num_decoder_attention_heads=4, max_position_embeddings=64, **_SPECIAL)
_BERT_DECODER = {**_BERT, "model_type": "bert", "is_decoder": True, "add_cross_attention": True}
_add(_SEQUENCES, "bert2bert", "EncoderDecoderModel", _sources_and_targets, encoder={**_BERT, "model_type": "bert"},
    decoder=_BERT_DECODER, pad_token_id=0, decoder_start_token_id=1)
_add(_SEQUENCES, "vit2bert", "VisionEncoderDecoderModel", _with(_images(), decoder_input_ids=lambda: _ids(5)),
    encoder={**_VISION, "model_type": "vit"}, decoder=_BERT_DECODER, pad_token_id=0, decoder_start_token_id=1)
_add(_SEQUENCES, "speech2bert", "SpeechEncoderDecoderModel", _with(_wave(), decoder_input_ids=lambda: _ids(5)),
    encoder={**_WAV2VEC2, "model_type": "wav2vec2"}, decoder=_BERT_DECODER, pad_token_id=0, decoder_start_token_id=1)

_AUDIO = "audio"
_add(_AUDIO, "whisper", "WhisperForConditionalGeneration", lambda: {"input_features": _normal(2, 8, 40),
    "decoder_input_ids": _ids(5)}, **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
    max_source_positions=20, max_target_positions=20, num_mel_bins=8)
_add(_AUDIO, "wav2vec2", "Wav2Vec2ForCTC", _wave(), **_WAV2VEC2)
_add_old("wav2vec2, weight_g and weight_v in the base", "wav2vec2", "wav2vec2", "base")
_add_old("wav2vec2, weight_g and weight_v in both", "wav2vec2", "wav2vec2", "base", "finetuned")
_add(_AUDIO, "hubert", "HubertForCTC", _wave(), **_WAV2VEC2)
_add(_AUDIO, "wavlm", "WavLMForCTC", _wave(), **_WAV2VEC2)
_add(_AUDIO, "sew", "SEWForCTC", _wave(), **_WAV2VEC2, squeeze_factor=2)
_add(_AUDIO, "speech-to-text", "Speech2TextForConditionalGeneration", _with(_features(24, 8),
    decoder_input_ids=lambda: _ids(5)), **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
    max_source_positions=40, max_target_positions=20, input_feat_per_channel=8, conv_channels=16, num_conv_layers=2,
    conv_kernel_sizes=[3, 3])
_add(_AUDIO, "audio-spectrogram", "ASTForAudioClassification", _features(24, 16, "input_values"), **_SIZES, patch_size=4,
    frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=16, num_labels=3)
_add(_AUDIO, "wav2vec2-bert", "Wav2Vec2BertForCTC", _features(12, 16), **_SIZES, vocab_size=20,
    feature_projection_input_dim=16, conv_depthwise_kernel_size=3)
_add(_AUDIO, "moonshine", "MoonshineForConditionalGeneration", _with(_wave(2000), decoder_input_ids=lambda: _ids(5)),
    hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
    encoder_num_attention_heads=4, decoder_num_attention_heads=4, vocab_size=100, max_position_embeddings=64,
    **_SPECIAL, decoder_start_token_id=1)
_add(_AUDIO, "parakeet", "ParakeetForCTC", _features(32, 16), vocab_size=20, pad_token_id=0, encoder_config={**_SIZES,
    "num_mel_bins": 16, "subsampling_factor": 4, "subsampling_conv_channels": 8, "conv_kernel_size": 3})

_IMAGES = "vision"
_add(_IMAGES, "vit", "ViTForImageClassification", _images(), **_IMAGE_CLASSES)
_add(_IMAGES, "deit", "DeiTForImageClassificationWithTeacher", _images(), **_IMAGE_CLASSES)
_add(_IMAGES, "beit", "BeitForImageClassification", _images(), **_IMAGE_CLASSES)
_add(_IMAGES, "dinov2, registers", "Dinov2WithRegistersForImageClassification", _images(), **{k: v for k,
    v in _IMAGE_CLASSES.items() if k != "intermediate_size"}, mlp_ratio=2, num_register_tokens=2)
_add(_IMAGES, "vit-mae", "ViTMAEForPreTraining", _with(_images(), noise=lambda: _normal(2, 16)), **_VISION,
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32)
_add(_IMAGES, "swin", "SwinForImageClassification", _images(), image_size=32, patch_size=4, embed_dim=16, depths=[1, 1],
    num_heads=[2, 2], window_size=4, num_labels=3)
_add(_IMAGES, "segformer", "SegformerForSemanticSegmentation", _images(), num_encoder_blocks=2, depths=[1, 1],
    sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
    mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3)
_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
    "layer_type": "basic"}
_add(_IMAGES, "detr", "DetrForObjectDetection", _images(), use_timm_backbone=False, backbone=None,
    backbone_config={**_RESNET, "out_features": ["stage2"]}, d_model=32, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
    num_labels=3)
_add(_IMAGES, "mask2former", "Mask2FormerForUniversalSegmentation", _images(64), backbone_config={"model_type": "swin",
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2],
    "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}, hidden_dim=32, feature_size=32,
    mask_feature_size=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4, encoder_feedforward_dim=64,
    dim_feedforward=64, num_queries=5, num_labels=3)
_add(_IMAGES, "mobilevit", "MobileViTForImageClassification", _images(64), image_size=64, hidden_sizes=[16, 24, 32],
    neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 40], num_attention_heads=2, last_hidden_size=32, num_labels=3)
_add(_IMAGES, "resnet", "ResNetForImageClassification", _images(), embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
    num_labels=3)
_add(_IMAGES, "regnet", "RegNetForImageClassification", _images(), embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
    groups_width=8, num_labels=3)
_add(_IMAGES, "efficientnet", "EfficientNetForImageClassification", _images(), image_size=32, width_coefficient=0.25,
    depth_coefficient=0.25, hidden_dim=320, num_labels=3)
_add(_IMAGES, "convnextv2", "ConvNextV2ForImageClassification", _images(), hidden_sizes=[16, 32], depths=[1, 1],
    num_stages=2, num_labels=3)
_add(_IMAGES, "timm", "TimmWrapperForImageClassification", _images(), architecture="resnet18",
    model_args={"block_args": None, "channels": [8, 16, 16, 16]}, num_labels=3)
_add(_IMAGES, "sam", "SamModel", lambda: {**_images(64)(), "input_points": torch.full((2, 1, 1, 2), 7.0)},
    vision_config={**_SIZES, "image_size": 64, "patch_size": 16, "output_channels": 16, "mlp_dim": 64,
    "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8}, prompt_encoder_config={"hidden_size": 16,
    "image_size": 64, "patch_size": 16, "mask_input_channels": 4}, mask_decoder_config={"hidden_size": 16,
    "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16})

_MIXED = "multimodal"
_CLIP_TEXT = {**_BERT, "max_position_embeddings": 20, "eos_token_id": 2, "projection_size": 32}
_TEXT_AND_IMAGE = _with(_text, pixel_values=lambda: _normal(2, 3, 32, 32))
_add(_MIXED, "clip", "CLIPModel", _TEXT_AND_IMAGE, text_config=_CLIP_TEXT, vision_config=_VISION, projection_dim=16)
_add(_MIXED, "siglip", "SiglipModel", _TEXT_AND_IMAGE, text_config=_CLIP_TEXT, vision_config=_VISION)
_LLAMA_TEXT = {**_LLAMA, "model_type": "llama"}
_CLIP_VISION = {**_VISION, "model_type": "clip_vision_model"}
_SIGLIP_VISION = {**_VISION, "model_type": "siglip_vision_model"}
_add(_MIXED, "llava", "LlavaForConditionalGeneration", _text_and_images(16), text_config=_LLAMA_TEXT,
    vision_config=_CLIP_VISION, image_token_index=99)
_add(_MIXED, "llava-next", "LlavaNextForConditionalGeneration", _with(_text_and_images(24, (5, 3, 16, 16)),
    image_sizes=lambda: torch.tensor([[16, 16]] * 2)), text_config=_LLAMA_TEXT, vision_config={**_CLIP_VISION,
    "image_size": 16}, image_token_index=99, image_grid_pinpoints=[[32, 32]])
_add(_MIXED, "paligemma", "PaliGemmaForConditionalGeneration", _text_and_images(16), text_config={**_LLAMA,
    "model_type": "gemma", "head_dim": 8}, vision_config=_SIGLIP_VISION, image_token_id=99, projection_dim=32)
_add(_MIXED, "gemma3 with images", "Gemma3ForConditionalGeneration", _text_and_images(4), text_config={**_LLAMA,
    "model_type": "gemma3_text", "head_dim": 8}, vision_config=_SIGLIP_VISION, image_token_index=99,
    mm_tokens_per_image=4)
_add(_MIXED, "smolvlm", "SmolVLMForConditionalGeneration", _text_and_images(4, (1, 3, 32, 32)), text_config=_LLAMA_TEXT,
    vision_config=_VISION, image_token_id=99, scale_factor=2)
_add(_MIXED, "internvl", "InternVLForConditionalGeneration", _text_and_images(4), text_config={**_LLAMA,
    "model_type": "qwen2"}, vision_config={**_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
    image_token_id=99, downsample_ratio=0.5, image_seq_length=4)
_add(_MIXED, "qwen2-vl", "Qwen2VLForConditionalGeneration", _text_and_patches, text_config={**_LLAMA,
    "rope_parameters": _MROPE}, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
    "mlp_ratio": 2, "patch_size": 8}, image_token_id=99, vision_start_token_id=97, vision_end_token_id=98)
_add(_MIXED, "qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", _text_and_patches, text_config={**_LLAMA,
    "rope_parameters": _MROPE}, vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64,
    "out_hidden_size": 32, "num_heads": 4, "patch_size": 8, "window_size": 16, "fullatt_block_indexes": [1]},
    image_token_id=99, vision_start_token_id=97, vision_end_token_id=98)
_add(_MIXED, "blip-2", "Blip2ForConditionalGeneration", _text_and_images(4), text_config={"model_type": "opt",
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 100,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_SPECIAL}, vision_config=_VISION,
    qformer_config={**_BERT, "encoder_hidden_size": 32, "cross_attention_frequency": 1}, num_query_tokens=4,
    image_token_index=99)
_add(_MIXED, "florence-2", "Florence2ForConditionalGeneration", _with(_text_and_images(17),
    decoder_input_ids=lambda: _ids(5)), text_config={**_BART, "model_type": "bart"}, vision_config={"embed_dim": [16,
    32], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3], "patch_stride": [4, 2],
    "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4, "projection_dim": 32},
    image_token_id=99, projection_dim=32)
_add(_MIXED, "layoutlmv3", "LayoutLMv3ForSequenceClassification", _with(_TEXT_AND_IMAGE, bbox=lambda: torch.ones(2, 8, 4,
    dtype=torch.long)), **_CLASSES, coordinate_size=6, shape_size=4, max_position_embeddings=64,
    max_2d_position_embeddings=32, input_size=32, patch_size=8, has_relative_attention_bias=False,
    has_spatial_attention_bias=False)
_add(_MIXED, "chameleon", "ChameleonForConditionalGeneration", _text, **_LLAMA, vq_config={"embed_dim": 16,
    "num_embeddings": 16, "latent_channels": 16, "resolution": 16, "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1}, vocabulary_map={"<image>": 99})
_add(_MIXED, "janus", "JanusForConditionalGeneration", _text_and_images(16), text_config=_LLAMA_TEXT,
    vision_config={**_VISION, "projection_dim": 32, "num_image_tokens": 16, "mlp_ratio": 2},
    vq_config={"embed_dim": 16, "num_embeddings": 16, "latent_channels": 16, "base_channels": 32,
    "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "num_patches": 16,
    "image_token_embed_dim": 32}, image_token_id=99)
_add(_MIXED, "clap", "ClapModel", _with(_text, input_features=lambda: _normal(2, 1, 64, 16)), text_config={**_BERT,
    "projection_dim": 16}, audio_config={"hidden_size": 32, "num_hidden_layers": 2, "patch_embeds_hidden_size": 16,
    "depths": [1, 1], "num_attention_heads": [2, 2], "spec_size": 32, "num_mel_bins": 16, "window_size": 4,
    "patch_size": 4, "patch_stride": [4, 4], "projection_dim": 16}, projection_dim=16)
# fmt: on
