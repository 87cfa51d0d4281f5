"""dpp prune, apply and inspect on folders: the same numbers as in memory, whole or not at all, what is copied along."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from recorded_hub import record_hub
from safetensors.torch import load_file, save_file
from tiny_glue import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dpp_lightning import SparseDelta, prune
from dpp_lightning.analysis.delta_cost import inspect_delta, position_entropy
from dpp_lightning.calibration import Calibration
from dpp_lightning.cli import main
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.file_calibration import FileCalibration
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.storage.checkpoints import load_tensors


def perturb(module, scale=0.01, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_((scale * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return module


@pytest.fixture
def bert(tmp_path):
    """A bare encoder's folder (names without prefix) and a classifier fine-tuned from it, in several shards."""
    config = BertConfig(
        vocab_size=211, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertModel(config)
    tuned = BertForSequenceClassification(config)
    tuned.bert.load_state_dict(base.state_dict())
    perturb(tuned)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "base" / "tokenizer.json").write_text('{"x": 1}')
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="5KB")
    (tmp_path / "tuned" / "tokenizer.json").write_text('{\n "x": 1\n}')
    return base, tuned, tmp_path


def llama(vocabulary=97, dtype=torch.bfloat16, tied=True):
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("dare", {}), ("random-drop", {}), ("magnitude", {"budget": "model"}), ("importance", {}), ("magnitude", {})],
)
def test_streaming_gives_the_delta_and_the_dense_model_of_memory(bert, method, settings):
    base, tuned, place = bert
    prune_checkpoint(
        place / "base", place / "tuned", place / "delta", PruningSpec(method, 0.9, 3, method_settings=settings)
    )
    streamed = SparseDelta.from_pretrained(place / "delta")
    memory = prune(base, tuned, method, 0.9, seed=3, **settings)
    assert streamed.info.base_check == memory.info.base_check
    assert streamed.base_fingerprint == memory.base_fingerprint
    for name, part in memory.tensors.items():
        assert torch.equal(streamed.tensors[name].indices, part.indices)
        assert torch.equal(streamed.tensors[name].values, part.values)
    apply_checkpoint(place / "base", place / "delta", place / "dense", max_shard_bytes=4000)
    dense = BertForSequenceClassification.from_pretrained(place / "dense")
    target = BertForSequenceClassification(tuned.config)
    target.bert.load_state_dict(base.state_dict())
    streamed.apply_(target)
    for name, tensor in target.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor), name
    assert dense.config.num_labels == 3
    assert (place / "dense" / "model.safetensors.index.json").is_file()


def test_side_files_are_copied_once(bert):
    _, _, place = bert
    prune_checkpoint(place / "base", place / "tuned", place / "delta", PruningSpec())
    assert sorted(os.listdir(place / "delta")) == [
        "README.md",
        "config.json",
        "delta_config.json",
        "delta_model.safetensors",
    ]  # fmt: skip  - tokenizer.json says the same as the base's
    apply_checkpoint(place / "base", place / "delta", place / "dense")
    assert sorted(os.listdir(place / "dense")) == ["config.json", "model.safetensors", "tokenizer.json"]
    prune_checkpoint(place / "base", place / "tuned", place / "bare", PruningSpec(), weights_only=True)
    assert sorted(os.listdir(place / "bare")) == ["README.md", "delta_config.json", "delta_model.safetensors"]
    assert json.loads((place / "dense" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


def test_a_trainers_checkpoint_and_its_base_folder(bert):
    base, tuned, place = bert
    state = {f"model.{name}": tensor for name, tensor in tuned.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1, "hyper_parameters": {"lr": 1e-4}}, place / "last.ckpt")
    prune_checkpoint(place / "base", place / "last.ckpt", place / "delta", PruningSpec("dare", 0.5))
    apply_checkpoint(place / "base", place / "delta", place / "dense")
    assert set(load_file(place / "dense" / "model.safetensors")) == set(tuned.state_dict())
    same = prune(base, tuned, "dare", 0.5)
    assert SparseDelta.from_pretrained(place / "delta").info.base_check == same.info.base_check


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_in_bfloat16_with_tied_and_grown_vocabulary(tmp_path, tied):
    base, tuned = llama(tied=tied), perturb(llama(tied=tied))
    base.save_pretrained(tmp_path / "base")
    tuned.resize_token_embeddings(103)
    tuned.save_pretrained(tmp_path / "tuned")
    prune_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", PruningSpec("dare", 0.9))
    delta = SparseDelta.from_pretrained(tmp_path / "delta")
    grown = {"embed_tokens.weight"} if tied else {"embed_tokens.weight", "lm_head.weight"}
    assert {name: tuple(rows.shape) for name, rows in delta.new_rows.items()} == dict.fromkeys(grown, (6, 16))
    assert not delta.carried
    apply_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert dense.dtype == torch.bfloat16
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == tied
    target = llama(tied=tied)
    target.resize_token_embeddings(103)
    with torch.no_grad():
        for p, q in zip(target.parameters(), base.parameters(), strict=True):
            p[: len(q)] = q
    before = {n: t.clone() for n, t in target.state_dict().items()}
    delta.apply_(target)
    for name, tensor in target.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor), name
    delta.revert_(target)
    assert all(torch.equal(before[n], t) for n, t in target.state_dict().items())
    assert torch.equal(dense.get_input_embeddings().weight[97:], tuned.get_input_embeddings().weight[97:])


def test_a_vocabulary_that_became_shorter(tmp_path):
    llama(103).save_pretrained(tmp_path / "base")
    base = llama(103)
    base.resize_token_embeddings(97)
    perturb(base).save_pretrained(tmp_path / "tuned")
    prune_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", PruningSpec("dare", 0.5))
    apply_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.get_input_embeddings().weight.shape == (97, 16)


def test_mixed_dtypes_are_computed_in_float32(tmp_path):
    base, tuned = llama(dtype=torch.bfloat16), perturb(llama(dtype=torch.float32), 1e-4)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    prune_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", PruningSpec("dare", 0.9))
    delta = SparseDelta.from_pretrained(tmp_path / "delta")
    ours = dict(base.model.named_parameters())
    for name, part in delta.tensors.items():
        exact = dict(tuned.model.named_parameters())[name].detach().reshape(-1)[part.indices.long()]
        exact = exact - ours[name].detach().float().reshape(-1)[part.indices.long()]
        assert torch.equal(part.values, exact)


def test_a_bfloat16_base_loaded_in_float32_is_the_same_base(tmp_path):
    base, tuned = llama(), perturb(llama())
    delta = prune(base, tuned, "dare", 0.9)
    delta.apply_(llama(dtype=torch.bfloat16).float())
    with pytest.raises(ValueError, match="not the base of this delta"):
        prune(llama(dtype=torch.float32), perturb(llama(dtype=torch.float32)), "dare", 0.9).apply_(llama())


def test_another_base_is_refused_with_both_names_and_nothing_is_left(bert):
    base, _, place = bert
    perturb(base, seed=5).save_pretrained(place / "other")
    prune_checkpoint(place / "base", place / "tuned", place / "delta", PruningSpec("dare", 0.9))
    with pytest.raises(ValueError, match=r"other is not the base of this delta.*base(?s:.*)force"):
        apply_checkpoint(place / "other", place / "delta", place / "dense")
    assert not (place / "dense").exists()
    apply_checkpoint(place / "other", place / "delta", place / "dense", force=True)
    assert not [p for p in os.listdir(place) if p.startswith(".")]


def test_all_missing_and_extra_tensors_are_listed_at_once(bert):
    base, _tuned, place = bert
    prune_checkpoint(place / "base", place / "tuned", place / "delta", PruningSpec("dare", 0.9))
    state = dict(base.state_dict())
    del state["encoder.layer.0.output.dense.weight"]
    state["encoder.layer.1.output.dense.weight"] = torch.zeros(3, 3)
    state["something.else"] = torch.zeros(2)
    save_file(state, place / "broken.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        apply_checkpoint(place / "broken.safetensors", place / "delta", place / "dense")
    for part in (
        "layer.0.output.dense.weight: not there",
        "layer.1.output.dense.weight: shape",
        "not in the delta: something.else",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="do not have the same layers") as error:
        prune_checkpoint(place / "broken.safetensors", place / "tuned", place / "delta2", PruningSpec("dare", 0.9))
    for part in ("layer.0.output.dense.weight: only in the fine", "layer.1.output.dense.weight: shape"):
        assert part in str(error.value)
    assert not (place / "dense").exists()
    assert not (place / "delta2").exists()


def test_outputs_are_never_overwritten(bert, capsys):
    _, _, place = bert
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("x")
    base, tuned = str(place / "base"), str(place / "tuned")
    assert main(["prune", base, tuned, "--output", str(place / "mine")]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert main(["prune", base, tuned, "--output", str(place / "delta")]) == 0
    again = ["prune", base, tuned, "--pruning_rate", "0.5", "--output", str(place / "delta")]
    assert main(again) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert SparseDelta.from_pretrained(place / "delta").pruning_rate == 0.9
    assert main([*again, "--overwrite"]) == 0
    assert main(["apply", base, str(place / "delta"), "--output", base]) == 2
    assert main(["apply", base, str(place / "delta"), "--output", str(place / "delta")]) == 2
    assert SparseDelta.from_pretrained(place / "delta").pruning_rate == 0.5


def test_a_full_disk_leaves_nothing(bert):
    """A limit on the file size stands for the full disk: the write fails in the middle of the weights."""
    _, _, place = bert
    prune_checkpoint(place / "base", place / "tuned", place / "delta", PruningSpec("dare", 0.9))
    program = textwrap.dedent(
        """
        import resource, signal, sys
        from dpp_lightning.cli import main
        import dpp_lightning.cli.apply
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        sys.exit(main(sys.argv[1:]))
        """
    )
    arguments = ["apply", place / "base", place / "delta", "--output", place / "dense"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "dpp apply: failed: " in done.stderr
    assert not (place / "dense").exists()
    assert not [p for p in os.listdir(place) if p.startswith(".")]


def test_a_killed_apply_leaves_no_output_under_its_name(bert):
    _, _, place = bert
    prune_checkpoint(place / "base", place / "tuned", place / "delta", PruningSpec("dare", 0.9))
    program = textwrap.dedent(
        """
        import sys, time
        from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
        apply_checkpoint(*sys.argv[1:], progress=lambda done, total: (print(done, flush=True), time.sleep(60)))
        """
    )
    arguments = [sys.executable, "-c", program, *(str(place / n) for n in ("base", "delta", "dense"))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (place / "dense").exists()
    apply_checkpoint(place / "base", place / "delta", place / "dense")


def test_q_is_searched_on_a_text_or_a_batch(tmp_path, capsys):
    """The q of the command is the one that the search finds in memory on the same batch."""
    base, tuned = make_model(tmp_path / "base"), tmp_path / "tuned"
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    perturb(model, 0.3).save_pretrained(tuned)
    make_tokenizer(tuned)
    lines = ["good film", "bad film with a good end", "so bad", "w1 w2 w3"]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n\n")
    inputs = AutoTokenizer.from_pretrained(tuned)(lines, padding=True, return_tensors="pt")
    save_file(dict(inputs), tmp_path / "batch.safetensors")
    plan_base = BertModel.from_pretrained(base)
    with torch.no_grad():
        reference = model(**inputs).logits
    target = BertForSequenceClassification.from_pretrained(tuned).eval()
    target.bert.load_state_dict(plan_base.state_dict())

    @torch.no_grad()
    def change(candidate):
        with candidate.applied(target, force=True):
            return float((target(**inputs).logits - reference).abs().mean())

    expected = prune(plan_base, tuned, "darex-q", 0.9, calibration=Calibration(change)).q
    command = ["prune", base, str(tuned), "--method", "darex-q", "--pruning_rate", "0.9", "--output"]
    for data in ("text.txt", "batch.safetensors"):
        assert main([*command, str(tmp_path / data[:5]), "--calibration", str(tmp_path / data)]) == 0
        found = SparseDelta.from_pretrained(tmp_path / data[:5]).q
        assert found == pytest.approx(expected, rel=1e-3)
        assert f"q={found:.4g}" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "x")]) == 2
    assert "searches q" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "x"), "--calibration", str(tmp_path / "none.txt")]) == 2
    assert main([*command, str(tmp_path / "x"), "--q", "0.5"]) == 0
    assert SparseDelta.from_pretrained(tmp_path / "x").q == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dare-x"], "did you mean"),
        (["--pruning_rate", "1"], r"\[0, 1\)"),
        (["--method_settings.budget", "model"], "unknown method setting"),
        (["--carry", "nothing.*"], "matches none"),
        (["--calibration", "x.txt"], "nothing to calibrate"),
        (["--q", "0"], "finite number above 0"),
        (["--dtype", "int5"], "--dtype int5 is not one of .*: did you mean int"),
        (["--method", "importance", "--dtype", "int8"], "weighs"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(bert, capsys, arguments, message):
    _, _, place = bert
    where = [str(place / "base"), str(place / "tuned"), "--output", str(place / "delta")]
    assert main(["prune", *where, *arguments]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert "Traceback" not in told
    assert not (place / "delta").exists()


def test_inspect_counts_every_byte(bert, capsys):
    _, _, place = bert
    for method, dtype in (("dare", "bfloat16"), ("magnitude", None), ("importance", None)):
        folder = place / method
        prune_checkpoint(place / "base", place / "tuned", folder, PruningSpec(method, 0.9, dtype=dtype))
        cost = inspect_delta(folder)
        size = sum((folder / n).stat().st_size for n in ("delta_model.safetensors", "delta_config.json"))
        assert cost.total == size == cost.positions + cost.values + cost.carried + cost.config + cost.overhead
        delta = SparseDelta.from_pretrained(folder)
        assert cost.kept == delta.num_kept + sum(t.numel() for t in delta.carried.values())
        assert cost.density == pytest.approx(delta.density)
        assert sum(row.positions for row in cost.tensors) == pytest.approx(cost.positions)
        assert sum(row.values for row in cost.tensors) == pytest.approx(cost.values)
        assert (cost.positions == cost.entropy == 0) == (method == "dare")
        dense = sum(tensor.nbytes for tensor in load_tensors(place / "tuned").values())
        assert cost.ratio == pytest.approx(dense / size)
        assert main(["inspect", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["total"] == size
        assert main(["inspect", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert "classifier.weight" in shown
        assert ("follow from the seed" in shown) == (method == "dare")


def test_position_entropy_is_that_of_the_binomial_coefficient():
    assert position_entropy(5, 2) == pytest.approx(3.3219280948873626)  # log2 10
    assert position_entropy(7, 0) == pytest.approx(0)


def test_absolute_values_overwrite_the_base(bert):
    base, tuned, _ = bert
    target = BertForSequenceClassification(tuned.config)
    target.bert.load_state_dict(base.state_dict())
    delta = prune(base, tuned, "importance", 0.9)
    engine = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in engine.items()}
    updates = list(delta.to_absolute(target))
    for name, shape, dtype, values, indices in updates:
        assert engine[name].shape == shape
        assert engine[name].dtype == dtype == values.dtype
        assert indices.dtype == torch.int64
        assert bool((indices[1:] > indices[:-1]).all())
        assert bool(torch.isfinite(values).all())
        for _ in range(2):  # overwriting is idempotent
            engine[name].view(-1)[indices] = values
    assert all(torch.equal(before[n], t) for n, t in target.state_dict().items()), "the base is only read"
    delta.apply_(target)
    carried = set(delta.carried)
    for name, tensor in target.state_dict().items():
        if name not in carried:
            assert torch.equal(engine[name], tensor), name
    other = BertForSequenceClassification(tuned.config)
    with pytest.raises(ValueError, match="not the base"):
        next(delta.to_absolute(other))


def test_push_to_hub_uploads_the_folder(bert, monkeypatch):
    base, tuned, _ = bert
    calls = record_hub(
        monkeypatch, lambda folder: (SparseDelta.from_pretrained(folder).info.dtype, sorted(os.listdir(folder)))
    )
    delta = prune(base, tuned, "dare", 0.9)
    assert delta.push_to_hub("me/delta", revision="v2", private=True, token="t", dtype="bfloat16") == "the commit"
    files = ["README.md", "delta_config.json", "delta_model.safetensors"]
    assert calls == [
        ("token", "t"), ("repo", "me/delta", True, True), ("branch", "v2", True),
        ("upload", "me/delta", ("bfloat16", files), "v2", "Upload pruned delta"),
    ]  # fmt: skip


def test_hub_ids_are_read_through_the_hubs_client(bert, monkeypatch):
    _base, _tuned, place = bert
    asked = []

    def download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision))
        folder = place / f"cache-{repo_id.replace('/', '-')}"
        shutil.copytree(place / repo_id.split("/")[1], folder, dirs_exist_ok=True)
        return str(folder)

    monkeypatch.setattr("dpp_lightning.storage.hub.snapshot_download", download)
    prune_checkpoint("us/base", "us/tuned", place / "delta", PruningSpec(), base_revision="v1")
    info = SparseDelta.from_pretrained("us/delta", revision="main").info
    assert (info.base_name, info.base_revision) == ("us/base", "v1")
    assert {("us/base", "v1"), ("us/tuned", None), ("us/delta", "main")} <= set(asked)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("wanda", []),
        ("importance", ["--method_settings.score", "activation"]),
        ("darex-q-layer", ["--method_settings.rows", "trimmed", "--dtype", "int8"]),
        ("darex-learned", ["--dtype", "bfloat16"]),
        ("dppa", ["--method_settings.variant", "released"]),
        ("struct-darex-q", ["--method_settings.b", "0.5"]),
    ],
)
def test_methods_with_calibration_from_the_command_line(tmp_path, method, extra):
    """The delta applies, says what was found, and gives an output nearer to the fine-tuned model's than no delta."""
    base, tuned = make_model(tmp_path / "base"), tmp_path / "tuned"
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    perturb(model, 0.3).save_pretrained(tuned)
    make_tokenizer(tuned)
    (tmp_path / "text.txt").write_text(
        "\n".join(["good film", "bad film with a good end", "so bad", "w1 w2", "w3 good"])
    )
    command = [
        "prune",
        base,
        str(tuned),
        "--method",
        method,
        "--pruning_rate",
        "0.8",
        "--calibration",
        str(tmp_path / "text.txt"),
    ]
    assert main([*command, "--output", str(tmp_path / "delta"), *extra]) == 0
    delta = SparseDelta.from_pretrained(tmp_path / "delta")
    found = {"darex-q-layer": "eta", "dppa": "factors"}.get(method)
    assert found is None or found in delta.info.settings
    assert main(["apply", base, str(tmp_path / "delta"), "--output", str(tmp_path / "dense")]) == 0
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    inputs = AutoTokenizer.from_pretrained(tuned)(["good film", "so bad w1"], padding=True, return_tensors="pt")
    plain = BertForSequenceClassification.from_pretrained(tuned).eval()
    plain.bert.load_state_dict(BertModel.from_pretrained(base).state_dict())
    with torch.no_grad():
        wanted, got, none = (m(**inputs).logits for m in (model, dense, plain))
    assert (got - wanted).abs().mean() < 2 * (none - wanted).abs().mean()


def test_a_low_rank_with_a_drawn_rest_is_one_file_streamed_and_in_memory(tmp_path):
    base, tuned = make_model(tmp_path / "base"), tmp_path / "tuned"
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2)
    perturb(model, 0.3).save_pretrained(tuned)
    settings = {"rank": 1, "rest": 0.8}
    spec = PruningSpec("lowrank", seed=3, method_settings=settings)
    prune_checkpoint(base, tuned, tmp_path / "streamed", spec, weights_only=True)
    delta = prune(base, str(tuned), "lowrank", seed=3, **settings)
    delta.save_pretrained(tmp_path / "held")
    streamed, held = (SparseDelta.from_pretrained(tmp_path / name) for name in ("streamed", "held"))
    assert streamed.info.rest
    assert streamed.info.drawn_rate == 0.8
    name = "delta_model.safetensors"
    assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "held" / name).read_bytes()
    assert sum(len(tensor.values) for tensor in held.tensors.values()) > 500


@pytest.mark.parametrize("method", ["refit", "lowrank", "darex-learned", "darex-q-layer", "dare-dpa", "dppa"])
def test_what_is_fitted_is_kept_at_float32_as_in_memory(tmp_path, method):
    """In the dtype that fits are drawn in, too."""
    base, tuned = make_model(tmp_path / "base"), tmp_path / "tuned"
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2)
    perturb(model, 0.3).save_pretrained(tuned)
    make_tokenizer(tuned)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(["good film", "bad film with a good end", "so bad", "w1 w2", "w3 good"] * 8))
    settings = {"refit": {"steps": 5}, "lowrank": {"steps": 5, "rank": 2}}.get(method, {})
    spec = PruningSpec(method, 0.8, dtype="float32", method_settings=settings)
    prune_checkpoint(base, tuned, tmp_path / "out", spec, calibration=FileCalibration(tuned, texts), weights_only=True)
    streamed = SparseDelta.from_pretrained(tmp_path / "out")
    held = prune(base, str(tuned), method, 0.8, calibration=FileCalibration(tuned, texts), dtype="float32", **settings)
    plain = prune(base, str(tuned), "dare", 0.8)
    assert streamed.info.factors_dtype == held.info.factors_dtype == ("int3" if method == "lowrank" else None)
    for name, tensor in held.tensors.items():
        assert torch.equal(tensor.values, streamed.tensors[name].values)
        if tensor.factors is not None:
            assert torch.equal(tensor.factors.left, streamed.tensors[name].factors.left)
    if method == "dare-dpa":
        assert any(not torch.equal(t.values, held.tensors[n].values) for n, t in plain.tensors.items())
    if method in ("refit", "lowrank"):
        assert streamed.info.training["held_out_after"] < 2


def test_at_rate_0_two_dtypes_give_the_fine_tuned_model_bit_for_bit(tmp_path):
    base, tuned = make_model(tmp_path / "base"), tmp_path / "tuned"
    model = perturb(BertForSequenceClassification.from_pretrained(base, num_labels=2), 0.01).to(torch.bfloat16)
    model.save_pretrained(tuned)
    prune_checkpoint(base, tuned, tmp_path / "delta", PruningSpec("dare", 0.0))
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(dense[name].double(), tensor.double()), name
