"""The dense folder of base plus delta has the fine-tuned model's files: templates, tokenizer, modules, dtype."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.folder import DeltaReader, delta_bytes
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint

ALL = PruningSpec("dare", 0.0)
TEMPLATE = "TUNED {{ messages[0]['content'] }}"


def save_tokenizer(folder, template, **settings):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    wrapped.chat_template = template
    wrapped.save_pretrained(folder, **settings)


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    tuned = LlamaForCausalLM(config)
    tuned.load_state_dict({name: tensor * 1.01 for name, tensor in base.state_dict().items()})
    return base, tuned


def folders_of(folder, llama, dtypes=(torch.float32, torch.float32)):
    """Base with a chat template in a file of its own, fine-tuned model without tokenizer."""
    for name, model, dtype in zip(("base", "tuned"), llama, dtypes, strict=True):
        copied = LlamaForCausalLM(model.config)
        copied.load_state_dict(model.state_dict())
        copied.to(dtype).save_pretrained(folder / name)
    save_tokenizer(folder / "base", "BASE")
    return folder / "base", folder / "tuned"


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def roads(base, tuned, folder):
    """Dense folders: of the delta, and of a merge of it with one that says nothing."""
    prune_checkpoint(base, tuned, folder / "delta", ALL)
    apply_checkpoint(base, folder / "delta", folder / "dense")
    prune_checkpoint(base, tuned, folder / "other", ALL, weights_only=True)
    merge_checkpoints(base, [folder / "delta", folder / "other"], folder / "merged", tasks=["a", "b"])
    apply_checkpoint(base, folder / "merged", folder / "dense-a", task="a")
    apply_checkpoint(base, folder / "merged", folder / "dense-b", task="b")
    return [folder / "dense", folder / "dense-a"], folder / "dense-b"


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (None, {}),
        (TEMPLATE, {}),
        (TEMPLATE, {"save_jinja_files": False}),
        ({"default": TEMPLATE, "tool_use": "TOOLS"}, {}),
    ],
    ids=["dropped", "another", "moved", "several"],
)
def test_the_chat_template_is_the_finetuned_models(tmp_path, llama, template, settings):
    base, tuned = folders_of(tmp_path, llama)
    save_tokenizer(tuned, template, **settings)
    changed, unknown = roads(base, tuned, tmp_path)
    for dense in changed:
        assert AutoTokenizer.from_pretrained(dense).chat_template == template
        assert names_in(dense) == names_in(tuned)
    assert AutoTokenizer.from_pretrained(unknown).chat_template == "BASE"
    assert names_in(unknown) == names_in(base)


def test_a_template_moves_into_its_own_file_too(tmp_path, llama):
    base, tuned = folders_of(tmp_path, llama)
    shutil.rmtree(base / "additional_chat_templates", ignore_errors=True)
    (base / "chat_template.jinja").unlink()
    save_tokenizer(base, "BASE", save_jinja_files=False)
    save_tokenizer(tuned, TEMPLATE)
    for dense in roads(base, tuned, tmp_path)[0]:
        assert AutoTokenizer.from_pretrained(dense).chat_template == TEMPLATE


def test_a_model_that_was_saved_without_its_tokenizer_has_the_bases(tmp_path, llama):
    base, tuned = folders_of(tmp_path, llama)
    changed, _ = roads(base, tuned, tmp_path)
    for dense in changed:
        assert AutoTokenizer.from_pretrained(dense).chat_template == "BASE"


def test_files_of_the_bases_tokenizer_are_not_mixed_with_those_of_another(tmp_path, llama):
    base, tuned = folders_of(tmp_path, llama)
    (base / "spiece.model").write_bytes(b"old")
    (base / "special_tokens_map.json").write_text("{}")
    save_tokenizer(tuned, None)
    for dense in roads(base, tuned, tmp_path)[0]:
        assert names_in(dense) == names_in(tuned)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_config_json_names_the_dtype_of_the_tensors(tmp_path, llama, dtypes):
    base, tuned = folders_of(tmp_path, llama, dtypes)
    save_tokenizer(tuned, None)
    with pytest.warns(UserWarning, match="the weights are written in the base's dtype"):
        changed, unknown = roads(base, tuned, tmp_path)
    for dense in [*changed, unknown]:
        assert {tensor.dtype for tensor in load_file(dense / "model.safetensors").values()} == {dtypes[0]}
        assert json.loads((dense / "config.json").read_text())["dtype"] == str(dtypes[0]).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(dense).dtype == dtypes[0]


def test_further_modules_go_along_with_their_weights(tmp_path, llama):
    base, tuned = folders_of(tmp_path, llama)
    weights = {"linear.weight": torch.arange(12.0).reshape(3, 4)}
    for folder, scale in ((base, 1), (tuned, 2)):
        for name in ("1_Pooling", "2_Dense", "3_LayerNorm"):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps({"of": name, "pooling": scale}))
        (folder / "modules.json").write_text("[]")
        save_file({"linear.weight": weights["linear.weight"] * scale}, folder / "2_Dense/model.safetensors")
        save_file(weights, folder / "3_LayerNorm/model.safetensors")
    (base / "4_Normalize").mkdir()
    (base / "4_Normalize/config.json").write_text("{}")
    changed, _ = roads(base, tuned, tmp_path)
    for dense in changed:
        of_tuned = {name for name in names_in(tuned) if "/" in name}
        assert {name for name in names_in(dense) if "/" in name} == of_tuned
        for name in of_tuned:
            assert (dense / name).read_bytes() == (tuned / name).read_bytes()
    delta = tmp_path / "delta"
    assert {name for name in names_in(delta) if name.endswith("/model.safetensors")} == {"2_Dense/model.safetensors"}
    stored = (delta / "2_Dense/model.safetensors").stat().st_size
    assert delta_bytes(delta) == sum(
        (delta / name).stat().st_size for name in ("delta_model.safetensors", "delta_config.json")
    ) + stored  # fmt: skip
    assert DeltaReader.open(delta).info.absent_files == ("4_Normalize/config.json",)


def test_code_that_does_not_go_along_is_named(tmp_path, llama):
    base, tuned = folders_of(tmp_path, llama)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_own.Own"}}))
    prune_checkpoint(base, tuned, tmp_path / "delta", ALL)
    with pytest.warns(UserWarning, match=r"modeling_own\.py"):
        apply_checkpoint(base, tmp_path / "delta", tmp_path / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_checkpoint(base, tuned, tmp_path / "plain", ALL, weights_only=True)
        apply_checkpoint(base, tmp_path / "plain", tmp_path / "plain-dense")


@pytest.mark.filterwarnings("ignore:the pruned delta changes nothing", "ignore:the delta changes nothing")
def test_a_model_of_which_a_further_module_alone_was_trained(tmp_path, llama):
    base, _ = folders_of(tmp_path, llama)
    tuned = tmp_path / "dense-trained"
    for folder in (base, tuned):
        if folder == tuned:
            shutil.copytree(base, tuned)
        (folder / "2_Dense").mkdir(exist_ok=True)
        save_file({"linear.weight": torch.full((2, 2), float(folder == tuned))}, folder / "2_Dense/model.safetensors")
    prune_checkpoint(base, tuned, tmp_path / "delta-dense", ALL)
    apply_checkpoint(base, tmp_path / "delta-dense", tmp_path / "dense-dense")
    assert float(load_file(tmp_path / "dense-dense/2_Dense/model.safetensors")["linear.weight"].sum()) == 4
    (tuned / "2_Dense/model.safetensors").write_bytes((base / "2_Dense/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="equal in all"):
        prune_checkpoint(base, tuned, tmp_path / "delta-equal", ALL)
