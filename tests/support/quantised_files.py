"""Tiny decoders as libraries store them quantised: names, dtypes and shapes of the real formats, values at random."""

import json

import torch
from safetensors.torch import save_file

HIDDEN, LAYERS = 64, 2
PROJECTIONS = ("self_attn.q_proj", "mlp.down_proj")


def plain(dtype=torch.bfloat16):
    """A decoder's tensors as its own files hold them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(50, HIDDEN, generator=generator)}
    for layer in range(LAYERS):
        for projection in PROJECTIONS:
            weight = torch.randn(HIDDEN, HIDDEN, generator=generator)
            tensors[f"model.layers.{layer}.{projection}.weight"] = weight
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(HIDDEN)
    tensors |= {"model.norm.weight": torch.ones(HIDDEN), "lm_head.weight": torch.randn(50, HIDDEN)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _ints(*shape, dtype=torch.uint8):
    return torch.randint(0, 100, shape).to(dtype)


def _bitsandbytes_int8(m):
    return {
        f"{m}.weight": _ints(HIDDEN, HIDDEN, dtype=torch.int8),
        f"{m}.SCB": torch.rand(HIDDEN),
        f"{m}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _bitsandbytes_4bit(kind):
    def make(m):
        return {
            f"{m}.weight": _ints(HIDDEN * HIDDEN // 2, 1),
            f"{m}.weight.absmax": _ints(HIDDEN * HIDDEN // 64),
            f"{m}.weight.nested_absmax": torch.rand(1),
            f"{m}.weight.nested_quant_map": torch.rand(256),
            f"{m}.weight.quant_map": torch.rand(16),
            f"{m}.weight.quant_state.bitsandbytes__{kind}": _ints(90),
        }

    return make


def _gptq(m):
    return {**_awq(m), f"{m}.g_idx": torch.arange(HIDDEN, dtype=torch.int32)}


def _awq(m):
    return {
        f"{m}.qweight": _ints(HIDDEN // 8, HIDDEN, dtype=torch.int32),
        f"{m}.qzeros": _ints(1, HIDDEN // 8, dtype=torch.int32),
        f"{m}.scales": torch.rand(1, HIDDEN).half(),
    }


def _aqlm(m):
    codes = {f"{m}.codes": _ints(HIDDEN, HIDDEN // 8, 1, dtype=torch.int16)}
    return {
        **codes,
        f"{m}.codebooks": torch.rand(1, 256, 1, 8).half(),
        f"{m}.scales": torch.rand(HIDDEN, 1, 1, 1).half(),
    }


def _fp8(scale, dtype=torch.float8_e4m3fn):
    def make(m):
        scales = {f"{m}.{scale}": torch.rand(1, 1), f"{m}.input_scale": torch.rand(())} if scale else {}
        return {f"{m}.weight": torch.randn(HIDDEN, HIDDEN).to(dtype), **scales}

    return make


def _mxfp4(m):
    """As gpt-oss stores its experts, under names of their own."""
    return {
        f"{m}.weight_blocks": _ints(4, HIDDEN, 2, 16),
        f"{m}.weight_scales": _ints(4, HIDDEN, 2),
        f"{m}.bias": torch.rand(4, HIDDEN),
    }


def _nvfp4(m):
    return {
        f"{m}.weight": _ints(HIDDEN, HIDDEN // 2),
        f"{m}.weight_scale": torch.rand(HIDDEN, HIDDEN // 16).to(torch.float8_e4m3fn),
        f"{m}.weight_scale_2": torch.rand(()),
        f"{m}.input_scale": torch.rand(()),
    }


def _compressed(m):
    return {
        f"{m}.weight_packed": _ints(HIDDEN, HIDDEN // 8, dtype=torch.int32),
        f"{m}.weight_scale": torch.rand(HIDDEN, 1).bfloat16(),
        f"{m}.weight_shape": torch.tensor([HIDDEN, HIDDEN]),
    }


def _one(codes, dtype, *shape, **beside):
    """Codes under one name, and scales beside them under others (``__`` stands for a dot)."""

    def make(m):
        scales = {f"{m}.{name.replace('__', '.')}": torch.rand(size) for name, size in beside.items()}
        return {f"{m}.{codes}": _ints(*shape, dtype=dtype), **scales}

    return make


# scheme as messages name it, what a module's weight becomes, quantization_config
SCHEMES = {
    "bitsandbytes int8": (_bitsandbytes_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitsandbytes nf4": (_bitsandbytes_4bit("nf4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes fp4": (_bitsandbytes_4bit("fp4"), {"load_in_4bit": True}),
    "GPTQ": (_gptq, {"quant_method": "gptq", "bits": 4}),
    "AWQ": (_awq, {"quant_method": "awq", "bits": 4}),
    "AQLM": (_aqlm, {"quant_method": "aqlm"}),
    "float8_e4m3fn with scales of blocks": (_fp8("weight_scale_inv"), {"quant_method": "fp8"}),
    "float8_e4m3fn with scales": (_fp8("weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "float8_e4m3fn": (_fp8(None), None),
    "float8_e5m2": (_fp8(None, torch.float8_e5m2), None),
    "MXFP4": (_mxfp4, {"quant_method": "mxfp4"}),
    "NVFP4": (_nvfp4, {"quant_method": "nvfp4"}),
    "compressed-tensors": (_compressed, {"quant_method": "compressed-tensors"}),
    "quanto": (_one("weight._data", torch.int8, 64, 64, weight___scale=(64, 1)), {"quant_method": "quanto"}),
    "torchao": (_one("_weight_qdata", torch.int8, 64, 64, _weight_scale=64), {"quant_method": "torchao"}),
    "HQQ": (_one("W_q", torch.uint8, 32, 64, scale=(64, 1), zero=(64, 1)), {"quant_method": "hqq"}),
    "EETQ": (_one("weight", torch.int8, 64, 64, weight_scales=64), {"quant_method": "eetq"}),
    "HIGGS": (_one("weight", torch.int16, 64, 32, scales=64, tables=16, tables2=16), {"quant_method": "higgs"}),
    "VPTQ": (_one("indices", torch.int32, 1, 64, 4, centroids__weight=(1, 64)), {"quant_method": "vptq"}),
    "SpQR": (_one("dense_weights", torch.int32, 256, row_offsets=65), {"quant_method": "spqr"}),
    "MLX": (_one("weight", torch.uint32, 64, 8, scales=(64, 1), biases=(64, 1)), {"group_size": 64, "bits": 4}),
    "Marlin": (_one("B", torch.int32, 4, 128, s=(1, 64)), {"quant_method": "marlin"}),
    "uint8 with scales": (_one("weight", torch.uint8, 16, 64, weight_scale=1), {"quant_method": "bitnet"}),
    "int8": (_one("weight", torch.int8, 64, 64), None),
    "quark (uint8)": (_one("codes_of_its_own", torch.uint8, 64, 64), {"quant_method": "quark"}),
}


def quantised(scheme):
    """The decoder's tensors with its projections in a scheme."""
    make, _ = SCHEMES[scheme]
    tensors = plain()
    for name in [name for name in tensors if name.removesuffix(".weight").endswith(PROJECTIONS)]:
        del tensors[name]
        tensors |= make(name.removesuffix(".weight"))
    return tensors


def write(folder, tensors, quantization_config=None):
    """A folder in Hugging Face's layout."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
