"""Merging: the rules against slow twins, what a merge keeps for each task, what it refuses, the command."""

import json

import pytest
import torch
from merge_cases import deltas_of, dense
from tiny import pair
from tiny_glue import make_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from dpp_lightning import SparseDelta, merge, prune
from dpp_lightning.cli import main
from dpp_lightning.merging.weights import delta_weights
from dpp_lightning.methods.merge_rules import MERGES, WeightedEntries, elected_mean, trimmed, union_of, weighted_sum


def ties_twin(deltas, weights, trim_rate, scale):
    """Elect and average entry by entry, in plain Python."""
    merged = {}
    for name, first in deltas[0].items():
        flats = [d[name].flatten().tolist() for d in deltas]
        if trim_rate is not None:
            n = len(flats[0])
            count = n - int(trim_rate * n + 1e-9)
            for flat in flats:
                cut = sorted(range(n), key=lambda i: (-abs(flat[i]), i))[count:]
                for i in cut:
                    flat[i] = 0.0
        values = []
        for entries in zip(*flats, strict=True):
            weighted = [w * v for w, v in zip(weights, entries, strict=True)]
            total = sum(weighted)
            agree = [(abs(w), x) for w, x in zip(weights, weighted, strict=True) if x * total > 0]
            values.append(scale * sum(x for _, x in agree) / sum(w for w, _ in agree) if agree else 0.0)
        merged[name] = torch.tensor(values, dtype=torch.float64).reshape(first.shape)
    return merged


@pytest.mark.parametrize("weights", [[0.4, 0.4, 0.4], [1.0, -0.5, 0.3]])
def test_task_arithmetic_is_the_sum_of_the_dense_deltas(weights):
    base, _ = pair()
    deltas = deltas_of(base)
    merged = dense(merge(base, deltas, "task-arithmetic", weights, scale=0.9), base)
    dense_deltas = [dense(delta, base) for delta in deltas.values()]
    for name, tensor in merged.items():
        expected = 0.9 * sum(w * delta[name] for w, delta in zip(weights, dense_deltas, strict=True))
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, -0.5, 0.3]])
@pytest.mark.parametrize("trim_rate", [None, 0.8])
def test_ties_equals_its_slow_twin(weights, trim_rate):
    base, _ = pair()
    deltas = deltas_of(base)
    merged = merge(base, deltas, "ties", weights, trim_rate=trim_rate, scale=1.5)
    expected = ties_twin([dense(delta, base) for delta in deltas.values()], weights, trim_rate, 1.5)
    for name, tensor in dense(merged, base).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-9), name
        assert merged.tensors[name].indices.numel() == int((expected[name] != 0).sum())


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_the_order_of_the_deltas_does_not_matter(method):
    base, _ = pair()
    deltas = deltas_of(base, 4)
    in_order = merge(base, deltas, method, [0.1, 0.2, 0.3, 0.4])
    reversed_order = merge(base, dict(reversed(deltas.items())), method, [0.4, 0.3, 0.2, 0.1])
    for name, sparse in in_order.tensors.items():
        assert torch.equal(sparse.indices, reversed_order.tensors[name].indices)
        assert torch.allclose(sparse.values, reversed_order.tensors[name].values, rtol=1e-6)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_one_delta_with_weight_1_gives_that_delta(method):
    base, finetuned = pair()
    delta = prune(base, finetuned, "dare", 0.8, seed=3, carry=("head.*",))
    merged = merge(base, {"only": delta}, method, 1.0)
    for name, sparse in delta.tensors.items():
        assert torch.equal(merged.tensors[name].indices, sparse.indices)
        assert torch.allclose(merged.tensors[name].values, sparse.values / delta.q, rtol=1e-6)
    merged.apply_(base)  # its head is carried once, since no other task has another
    assert torch.equal(base.head.weight, finetuned.head.weight)


def test_deltas_of_one_seed_are_named_once_where_the_seed_matters(recwarn):
    base, finetuned = pair()
    made = {
        "a": prune(base, finetuned, "dare", 0.8, seed=5),
        "b": prune(base, pair(scale=0.02)[1], "importance", 0.9, seed=5, q=0.1),
        "other_seed": prune(base, finetuned, "dare", 0.8, seed=6),
        "by_value": prune(base, finetuned, "magnitude", 0.8, seed=5),
    }
    for left_out in ("a", "b"):
        merge(base, {name: delta for name, delta in made.items() if name != left_out}, "ties")
    assert not recwarn.list
    merge(base, made, "ties")
    (said,) = recwarn.list
    assert str(said.message).startswith("a, b were drawn by one seed, 5, ")


def test_deltas_of_one_seed_share_their_positions_and_the_file_needs_none(tmp_path):
    base, finetuned = pair()
    deltas = {f"t{k}": prune(base, pair(scale=0.01 * (k + 1))[1], "dare", 0.8, seed=5) for k in range(2)}
    merged = merge(base, deltas)
    assert merged.info.seeded
    merged.save_pretrained(tmp_path / "merged")
    loaded = SparseDelta.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(sparse.indices, merged.tensors[name].indices) for name, sparse in loaded.tensors.items())
    assert not merge(base, {**deltas, "other": prune(base, finetuned, "dare", 0.8, seed=6)}).info.seeded
    assert not merge(base, deltas, "ties").info.seeded


def test_a_base_that_is_part_of_a_larger_model_gives_the_merge_the_deltas_names():
    """``student.head.weight`` beside a carried ``head.bias`` would be of no model."""
    base = pair()[0]
    tuned = [pair(seed=0, scale=0.01 * (k + 1))[1] for k in range(2)]
    deltas = {f"t{k}": prune(base, t, "dare", 0.5, carry=["head.bias"]) for k, t in enumerate(tuned)}
    plain, within = (merge(b, deltas).for_task("t0") for b in (base, nn.ModuleDict({"student": base})))
    assert list(within.tensors) == list(plain.tensors)
    assert list(within.carried) == list(plain.carried) == ["head.bias"]
    within.apply_(base)
    assert torch.equal(base.head.bias, tuned[0].head.bias)
    within.revert_(base)
    within.apply_(nn.ModuleDict({"student": base}))
    assert torch.equal(base.head.bias, tuned[0].head.bias)


def test_a_delta_of_another_base_is_named():
    base, finetuned = pair()
    stranger, tuned = pair(seed=1)
    deltas = {"mine": prune(base, finetuned, "dare", 0.8), "odd": prune(stranger, tuned, "dare", 0.8)}
    with pytest.raises(ValueError, match=r"odd: its base is .*fingerprint") as error:
        merge(base, deltas)
    assert "mine:" not in str(error.value)
    assert deltas["mine"].base_fingerprint in str(error.value)


def test_a_base_that_differs_only_later_is_found_at_the_end_and_nothing_is_left(tmp_path):
    base, finetuned = pair()
    deltas = []
    for k, task in enumerate(("one", "two")):
        prune(base, finetuned, "dare", 0.5, seed=k).save_pretrained(tmp_path / task)
        deltas.append(str(tmp_path / task))
    changed = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    changed["norm.weight"] += 1
    torch.save(changed, tmp_path / "base.pt")
    code = main(["merge", str(tmp_path / "base.pt"), *deltas, "--output", str(tmp_path / "merged")])
    assert code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "one", "two"]


def test_a_pattern_of_weights_that_matches_no_tensor_is_refused():
    base, one = pair()
    deltas = {t: prune(base, one, "dare", 0.5, seed=k) for k, t in enumerate("ab")}
    name = next(iter(deltas["a"].tensors))
    with pytest.raises(ValueError, match=r"the weights of a name encoder\.layer\.0\.\*, which is none of its tensors"):
        merge(base, deltas, weights={"a": {"encoder.layer.0.*": 0.0, name: 1.0}, "b": 0.5})
    merge(base, deltas, weights={"a": {name: 1.0}, "b": 0.5})


def test_weights_go_by_exact_name_then_the_longest_pattern():
    (weight,) = delta_weights([{"*": 0.1, "layers.*": 0.2, "layers.0.*": 0.3, "layers.0.bias": 0.4}], ["t"], 1.0)
    assert [weight(n) for n in ("norm", "layers.1.bias", "layers.0.weight", "layers.0.bias")] == [0.1, 0.2, 0.3, 0.4]
    assert [w("x") for w in delta_weights({"b": 2.0, "a": 1.0}, ["a", "b"], 1.0)] == [1.0, 2.0]
    base, finetuned = pair()
    delta = prune(base, finetuned, "magnitude", 0.5)
    merged = merge(base, [delta], weights=[{"head.*": 0.0, "*": 1.0}])
    assert not merged.tensors["head.weight"].values.any()
    assert torch.equal(merged.tensors["norm.weight"].values, delta.tensors["norm.weight"].values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "slerp"}, "unknown merge method"),
        ({"weights": [1.0, 1.0, 1.0]}, "got 3 weights for 2 deltas"),
        ({"weights": {"t0": 1.0, "sst2": 1.0}}, "name each once"),
        ({"weights": float("nan")}, "finite number"),
        ({"method": "adamerging"}, "adamerging_glue.yaml"),
        ({"trim_rate": 0.5}, "belongs to ties"),
        ({"method": "ties", "trim_rate": 1.0}, r"\[0, 1\)"),
        ({"tasks": ["a", "a"]}, "name of its own"),
        ({"tasks": ["a", "A"]}, "name of its own"),  # one file on macOS and Windows
        ({"tasks": ["a", "b."]}, "name of its own"),
        ({"tasks": ["a", "../b"]}, "name of its own"),
        ({"tasks": ["a"]}, "1 task names for 2 deltas"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    base, _ = pair()
    with pytest.raises(ValueError, match=message):
        merge(base, deltas_of(base, 2), **settings)


def test_a_tensor_pruned_here_and_carried_there_is_refused():
    base, finetuned = pair()
    deltas = {"a": prune(base, finetuned, "dare", 0.8), "b": prune(base, finetuned, "dare", 0.8, carry=("embed.*",))}
    with pytest.raises(ValueError, match=r"b carries embed.weight .*same scope"):
        merge(base, deltas)
    with pytest.raises(ValueError, match="merge of a"):
        merge(base, {"m": merge(base, {"a": deltas["a"]}), "a": deltas["a"]})


def grown(rows, seed):
    base, finetuned = pair()
    torch.manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in finetuned.state_dict().items()}
    state["embed.weight"] = torch.cat([state["embed.weight"], torch.randn(rows, 8)])
    return base, state


def test_vocabularies_that_grew_differently_are_refused_and_carrying_them_is_the_cure():
    (base, two), (_, three) = grown(2, 0), grown(3, 1)
    with pytest.raises(ValueError, match=r"embed.weight: a added 2 rows .* b 3.*--carry"):
        merge(base, {"a": prune(base, two, "dare", 0.8), "b": prune(base, three, "dare", 0.8)})
    merged = merge(base, {t: prune(base, s, "dare", 0.8, carry=("embed.*",)) for t, s in (("a", two), ("b", three))})
    for task, state in (("a", two), ("b", three)):
        assert torch.equal(merged.for_task(task).carried["embed.weight"], state["embed.weight"])
    same = merge(base, {t: prune(base, two, "dare", 0.8, seed=k) for k, t in enumerate("ab")}, weights=0.5)
    assert torch.equal(same.new_rows["embed.weight"], two["embed.weight"][37:])


@pytest.fixture
def glue_deltas(tmp_path):
    """A base folder, and the folders of two classifiers' deltas, with two and three classes."""
    base = make_model(tmp_path / "base", BertModel)
    folders = {}
    for k, (task, labels) in enumerate((("sst2", 2), ("mnli", 3))):
        torch.manual_seed(k)
        model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(tmp_path / f"{task}-model")
        command = ["prune", base, str(tmp_path / f"{task}-model"), "--method", "importance", "--pruning_rate", "0.8"]
        assert main([*command, "--output", str(tmp_path / task)]) == 0
        folders[task] = str(tmp_path / task)
    return base, folders


def test_the_command_merges_keeps_heads_apart_and_exports_each_task(glue_deltas, tmp_path, capsys):
    base, folders = glue_deltas
    command = ["merge", base, *folders.values(), "--weights", "0.5", "0.25", "--output", str(tmp_path / "merged")]
    assert main([*command, "--dense", str(tmp_path / "dense")]) == 0
    merged = SparseDelta.from_pretrained(tmp_path / "merged")
    assert merged.info.settings["tasks"] == ["sst2", "mnli"]
    in_memory = merge(base, folders, weights=[0.5, 0.25])
    assert merged.info == in_memory.info
    assert all(torch.equal(sparse.values, in_memory.tensors[name].values) for name, sparse in merged.tensors.items())

    for task, labels in (("sst2", 2), ("mnli", 3)):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense" / task)
        assert model.config.num_labels == labels
        target = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
        merged.for_task(task).apply_(target)
        for (name, a), b in zip(target.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="merges sst2, mnli"):
        merged.apply_(target)
    with pytest.raises(ValueError, match="no task 'cola'"):
        merged.for_task("cola")
    capsys.readouterr()
    assert main(["apply", base, str(tmp_path / "merged"), "--output", str(tmp_path / "x")]) == 2
    assert "--task sst2" in capsys.readouterr().err
    assert main(["apply", base, str(tmp_path / "merged"), "--task", "mnli", "--output", str(tmp_path / "x")]) == 0
    assert json.loads((tmp_path / "x" / "config.json").read_text())["id2label"].keys() == {"0", "1", "2"}
    assert main(["inspect", str(tmp_path / "merged")]) == 0


def test_weights_from_a_file(glue_deltas, tmp_path):
    base, folders = glue_deltas
    (tmp_path / "w.json").write_text(json.dumps({"mnli": 0.0, "sst2": {"*": 1.0}}))
    command = ["merge", base, *folders.values(), "--method", "adamerging", "--output", str(tmp_path / "merged")]
    assert main([*command, "--weights", str(tmp_path / "w.json")]) == 0
    alone = SparseDelta.from_pretrained(folders["sst2"])
    merged = SparseDelta.from_pretrained(tmp_path / "merged")
    for name, tensor in dense(merged, None).items():
        assert torch.allclose(tensor, dense(alone, None)[name], rtol=1e-6, atol=1e-12)


def test_rules_on_entries():
    a = WeightedEntries(torch.tensor([0, 2]), torch.tensor([1.0, -2.0]), 1.0)
    b = WeightedEntries(torch.tensor([2, 5]), torch.tensor([2.0, 3.0]), 1.0)
    indices, values = weighted_sum([a, b], 9)
    assert indices.tolist() == [0, 2, 5]
    assert values.tolist() == [1.0, 0.0, 3.0]
    indices, values = elected_mean([a, b], 9)  # the opposite entries have no sign
    assert indices.tolist() == [0, 5]
    assert values.tolist() == [1.0, 3.0]
    indices, values = trimmed(torch.tensor([1, 4, 7, 9]), torch.tensor([1.0, -3.0, 1.0, 2.0]), 10, 0.7)
    assert (indices.tolist(), values.tolist()) == ([1, 4, 9], [1.0, -3.0, 2.0])
    assert all(row.url.startswith("https://") and row.paper for row in MERGES.values())


@pytest.mark.parametrize("numel", [50, 5000])  # marked, and sorted
def test_unions_of_positions(numel):
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randperm(numel, generator=generator)[:20].sort().values.int() for _ in range(3)]
    union = union_of(sets, numel)
    assert union.dense == (numel == 50)
    assert union.positions.tolist() == sorted({i for positions in sets for i in positions.tolist()})
    for positions, places, ranks in zip(sets, union.places, union.ranks(), strict=True):
        assert torch.equal(union.positions[ranks], positions.long())
        sums = torch.zeros(union.size).index_add(0, places, torch.ones(len(places)))
        assert union.positions[union.read(sums) == 1].tolist() == positions.tolist()


def test_large_tensors_are_merged_in_blocks(monkeypatch):
    base, _ = pair()
    whole = merge(base, deltas_of(base), "ties")
    monkeypatch.setattr("dpp_lightning.merging.merge_deltas._BLOCK", 50)
    for name, sparse in merge(base, deltas_of(base), "ties").tensors.items():
        assert torch.equal(sparse.indices, whole.tensors[name].indices)
        assert torch.equal(sparse.values, whole.tensors[name].values)
