"""Blocks of a model, the linear maps inside them and its buffers, by the names and shapes of tensors.

A block is what a model repeats: a transformer layer, a residual block. Libraries number blocks under a handful of
words, which are known here. Each name is judged alone, whatever other tensors there are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

# A list of blocks or of stages and a number in it, ``layers.3.``, or a word with its number, ``encoder_layer_3.``.
_LISTS = (
    r"(?:\w+_|res)?(?:layers?|blocks?)\d*|h|stages?\d*|levels|features|(?:post_)?network|transformers?|encoders|decoders|"
    r"conformer|mixers|self_attends|attentions|ffns|resnets|albert_layer_groups|blocks_token_only"
)
_OUTER = re.compile(
    r"(?:^|(?<=\.))(?!conv_|downsample_|upsample_)"
    rf"(?:(?P<word>{_LISTS})\.\d+|(?:\w+_)?(?:layer|block|stage)_?\d+)\."
)
# Blocks in a list of a stage, ``stages.1.blocks.3.``. ``block.3.layer.1.`` of T5 is a part of a block.
_INNER = re.compile(r"(?P<word>blocks|layers|albert_layers|transformer_encoder|transformer\.layers?)\.\d+\.")
_INNER_OF_UNET = re.compile(r"(?P<word>attentions|resnets)\.\d+\.")
_NUMBER = re.compile(r"\d+\.")  # a block in a stage that is itself a list, ``blocks.1.3.``
_LAYER = re.compile(r"(?:^|[_.])layers?$|\d$")  # what such a thing holds under numbers are its parts
_OWN = re.compile(r"(?:weight|bias|running_mean|running_var|num_batches_tracked)(?:_\w+)?")  # a layer without parts

_TABLE = re.compile(
    r"^(?!relative_pos_embeddings$)"  # a Linear, in ProphetNet
    r".*(?:embed|norm|relative_attention_bias|rel(?:ative)?_pos|pos(?:ition)?_bias)(?!\w*linear)",
    re.IGNORECASE,
)
_LOOKED_UP = {"wte", "wpe", "shared"}  # tables of embeddings whose names do not say so
_BUFFERS = re.compile(  # statistics and constants that models keep among their weights, by the last part of the name
    r"(?:^|\.)(?:running_(?:mean|var)|num_batches_tracked|final_logits_bias|e_score_correction_bias|cluster_size|embed_avg"
    r"|inited|initialized|(?:in|out)put_(?:min|max)|latent_(?:mean|std)|global_(?:mean|invstd)|norm_(?:mean|std)|std_scale"
    r"|std_bias|_[uv]|weight_u|inv_freq|inv_timescales|mup_vector|slope_rate|masked_bias|relative_position_index)$"
)
_EXPERTS = re.compile(
    r"(?:^|[._])(?:experts|moe)\.(?:\w+\.)*(?:[vw]\d+|fc\d+|\w+_proj|\w+_linear)(?:[._]weight)?$|"
    r"(?:^|[._])(?:in|out)put_linear\.weight$"
)
_PLAIN_WEIGHT = re.compile(r"(?:^|[._])(?:proj|gate)_weight$|\.rel_attn\.[qkvor]$|\.r_kernel$")


def block_of(name: str, patterns: Sequence[str] = ()) -> str | None:
    """The block a tensor belongs to, as the leading part of its name.

    It is ``encoder.layer.7.`` for ``encoder.layer.7.output.dense.weight``. Where stages hold blocks it is the block,
    ``stages.1.blocks.3.``; parts of a block that are numbered too, such as ``block.3.layer.1.`` of T5 and experts, are
    no blocks. A weight that is itself what a list holds, ``head.layers.1.weight``, is a layer of a perceptron and in no
    block.

    Args:
        name: of a tensor, with anything in front; a module's name with a dot behind it counts as a tensor inside it.
        patterns: where blocks are, in place of the words that are known here. Each is a glob of the leading parts of
            a name, one part between two dots for one, so that ``tower.cells.*`` has the blocks ``tower.cells.0.``,
            ``tower.cells.1.``, ...; of several that match the one with most parts counts.

    Returns:
        The block with its last dot; None for a tensor outside the blocks.
    """
    if patterns:
        return _matched(name, patterns)
    for outer in _OUTER.finditer(name):
        end, word = outer.end(), outer["word"] or "0"
        if _OWN.fullmatch(name, end):
            continue
        inner = (_INNER_OF_UNET if word.endswith("_blocks") else _INNER).match(name, end)
        if inner and not _OWN.fullmatch(name, inner.end()):
            end, word = inner.end(), inner["word"]
        number = None if _LAYER.search(word) else _NUMBER.match(name, end)
        if number and not _OWN.fullmatch(name, number.end()):
            end = number.end()
        return name[:end]
    return None


def _matched(name: str, patterns: Sequence[str]) -> str | None:
    """The longest leading part of a name that a pattern names, part by part."""
    parts, most = name.split("."), 0
    for pattern in patterns:
        globs = pattern.removesuffix(".").split(".")
        if most < len(globs) < len(parts) and all(map(fnmatchcase, parts, globs)):
            most = len(globs)
    return ".".join(parts[:most]) + "." if most else None


def is_linear_map(name: str, shape: Sequence[int], patterns: Sequence[str] = ()) -> bool:
    """Whether a tensor is the weight of a linear map inside a block, judged by its name and shape alone.

    These are matrices named ``weight``, apart from embeddings, tables of relative positions and norms; those of
    ``torch.nn.MultiheadAttention``; and experts in one tensor, shape (experts, in, out) or (experts, out, in).
    Convolutions are none.

    Args:
        name: of the tensor.
        shape: of the tensor.
        patterns: where blocks are, see :func:`block_of`.
    """
    if len(shape) not in (2, 3) or block_of(name, patterns) is None:
        return False
    if _EXPERTS.search(name) or _PLAIN_WEIGHT.search(name):
        return True
    return len(shape) == 2 and name.endswith(".weight") and not is_table(name)


def is_table(name: str) -> bool:
    """Whether a weight is, by its name, a table that rows are looked up in, or a norm's: it has no input features."""
    return _TABLE.search(name.rpartition(".")[0].rpartition(".")[2]) is not None


def is_buffer_name(name: str) -> bool:
    """Whether a tensor is known by its name to be a statistic or a constant and no parameter."""
    return _BUFFERS.search(name) is not None


def is_multiplied(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is, by its name and shape, the weight of a linear map or a convolution anywhere in a model.

    Those of two or more dimensions, apart from tables that rows are looked up in, wherever the blocks are. What has one
    row and is not named ``weight``, such as a class token, is none; the weight of a map to one output is.

    Args:
        name: canonical name.
        shape: of the tensor.
    """
    *_, module, own = ("", *name.split("."))
    rows_alone = len(shape) > 1 and shape[0] == 1
    return (
        len(shape) > 1
        and not is_table(name)
        and not {own, module} & _LOOKED_UP
        and (own.startswith("weight") or not (rows_alone or _TABLE.search(own)))
    )


def weights_of_bias(name: str) -> tuple[str, ...]:
    """Names that the weight of a bias may have: ``q.weight`` for ``q.bias``, ``down_proj`` for ``down_proj_bias``."""
    if name.endswith(".bias"):
        return (name.removesuffix("bias") + "weight",)
    if name.endswith("_bias"):
        return name.removesuffix("_bias"), name.removesuffix("bias") + "weight"
    return ()
