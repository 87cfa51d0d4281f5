"""A dense folder's files beside its weights: the dtype in config.json, and code that is named and not copied."""

import json
import warnings

import pytest
import torch

from dpp_lightning.storage.dense_files import code_files, match_dtype, write_dense_files
from dpp_lightning.storage.safetensors_writer import Entry

F32 = [Entry("a", torch.float32, (4, 4)), Entry("b", torch.bfloat16, (3,)), Entry("n", torch.int64, (99,))]


def config_of(folder, content):
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "bfloat16", "x": 1e-12}, {"dtype": "float32", "x": 1e-12}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype": "float32", "torch_dtype": "float32"}),
        (
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"torch_dtype": "float16"}},
            {"dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"torch_dtype": "float16"}},
        ),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, {"dtype": None, "text_config": {"dtype": "float32"}}),
        ({"text_config": {"torch_dtype": "float16"}}, {"text_config": {"torch_dtype": "float32"}}),
        ({"dtype": None}, {"dtype": None}),
        ({"x": 1}, {"x": 1}),
    ],
)
def test_the_configuration_names_the_dtype_of_most_of_the_weights(tmp_path, before, after):
    path = config_of(tmp_path, before)
    named = before.get("dtype") or before.get("torch_dtype")
    assert match_dtype(path, F32) == (None if named is None else (named, "float32"))
    assert json.loads(path.read_text()) == after
    assert list(json.loads(path.read_text())) == list(before)


def test_a_configuration_that_is_right_stays_byte_for_byte_and_what_is_none_is_left_alone(tmp_path):
    for content in ('{"dtype":"float32",  "vision_config": {"dtype": "bfloat16"}}', "{broken", "[1]"):
        (tmp_path / "config.json").write_text(content)
        assert match_dtype(tmp_path / "config.json", F32) is None
        assert (tmp_path / "config.json").read_text() == content
    match_dtype(tmp_path / "nowhere.json", F32)
    match_dtype(config_of(tmp_path, {"dtype": "float16"}), [Entry("n", torch.int8, (3,))])
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "float16"}


def test_code_of_a_models_own_is_named_in_a_warning_and_not_copied(tmp_path):
    source, dense = tmp_path / "source", tmp_path / "dense"
    for folder in (source, dense):
        folder.mkdir()
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X", "AutoModelForY": "me/z--far.Y"}
    config_of(source, {"auto_map": auto_map, "dtype": "float32"})
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    types = ["sentence_transformers.models.Transformer", "custom_st.Pooling", "torch.nn.Identity", 3]
    (source / "modules.json").write_text(json.dumps([{"type": name} for name in types] + ["x"]))
    for name in ("modeling_x.py", "configuration_x.py"):
        (source / name).write_text("raise SystemExit")
    files = {path.name: path for path in source.glob("*.json")}
    named = "configuration_x.py, custom_st.py, modeling_x.py, tokenization_x.py"
    assert code_files(files) == named.split(", ")
    with pytest.warns(UserWarning, match=f"{named}: put it from the fine-tuned model's folder"):
        write_dense_files(files, dense, F32)
    assert {path.name for path in dense.iterdir()} == set(files)


def test_a_dtype_that_is_replaced_is_named(tmp_path):
    files = {"config.json": config_of(tmp_path, {"dtype": "bfloat16"})}
    (tmp_path / "dense").mkdir()
    with pytest.warns(UserWarning, match=r"names bfloat16; the weights are written in the base's dtype, float32,"):
        write_dense_files(files, tmp_path / "dense", F32)
    assert json.loads((tmp_path / "dense/config.json").read_text()) == {"dtype": "float32"}


def test_a_model_without_code_of_its_own_gets_no_warning(tmp_path):
    files = {"config.json": config_of(tmp_path, {"auto_map": None, "architectures": ["X"]})}
    (tmp_path / "dense").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_dense_files(files, tmp_path / "dense", F32)
