"""DeltaPool: each use has the weights that apply_ gives, bit for bit, and the base is exact in between."""

import copy
import threading

import pytest
import torch
from factored import factored_pair
from interrupted import at_every_line
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dpp_lightning import DeltaPool, merge, prune

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Model(nn.Module):
    """An embedding tied to the output, a map, a head."""

    def __init__(self, words=7, labels=2):
        super().__init__()
        self.embed, self.map, self.head = nn.Embedding(words, 3), nn.Linear(3, 4), nn.Linear(4, labels)
        self.output = nn.Linear(3, words, bias=False)
        self.output.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))


def base_model(**settings):
    torch.manual_seed(0)
    return Model(**settings)


def tuned(seed, model=None, **settings):
    """A fine-tuned model: the base's weights with noise, new rows and another head where the settings say so."""
    base, model = base_model(), Model(**settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            start = base.state_dict()[name]
            common = tuple(slice(0, size) for size in start.shape)
            if all(have >= size for have, size in zip(tensor.shape, start.shape, strict=True)):
                tensor[common] = start
            tensor += 0.1 * torch.randn_like(tensor)
        model.seen += seed
    return model


def delta_of(seed, rate=0.5, method="dare", **settings):
    return prune(base_model(), tuned(seed, **settings), method, rate, seed=seed, carry=["head.*"])


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def applied(delta, model):
    """A copy of the model with a delta, as apply_ writes it."""
    model = copy.deepcopy(model)
    delta.apply_(model)
    return state(model)


def test_each_use_has_the_weights_that_apply_gives_and_the_base_is_exact_in_between():
    base, deltas = base_model(), {f"d{seed}": delta_of(seed) for seed in range(1, 4)}
    pool, before = DeltaPool(base), state(base)
    for name, delta in deltas.items():
        pool.add(name, delta)
    for name in ["d1", "d2", "d2", None, "d3", "d1"]:
        with pool.use(name) as model:
            assert model is base
            assert same(state(model), before if name is None else applied(deltas[name], base_model()))
            assert model.output.weight is model.embed.weight
        assert same(state(base), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_in_every_dtype_and_with_factors(dtype):
    base, delta = factored_pair()
    base, delta = base.to(dtype), delta.with_changes()
    pool, before, expected = DeltaPool(base), state(base), copy.deepcopy(base)
    delta.apply_(expected, force=True)
    pool.add("a", delta, force=True)
    for _ in range(2):
        with pool.use("a"):
            assert same(state(base), state(expected))
        assert same(state(base), before)


def test_a_delta_that_is_whole_replaces_no_parameter_object():
    base, delta = factored_pair()
    pool, parameters = DeltaPool(base), dict(base.named_parameters())
    pool.add("a", delta)
    with pool.use("a"):
        assert all(dict(base.named_parameters())[name] is parameter for name, parameter in parameters.items())


def test_heads_of_other_sizes_and_vocabularies_that_grew():
    base = base_model()
    pool, before = DeltaPool(base), state(base)
    pool.add("three labels", delta_of(1, labels=3))
    pool.add("nine words", delta_of(2, words=9))
    expected = {"three labels": tuned(1, labels=3), "nine words": tuned(2, words=9)}
    for name in [*expected, *expected]:
        with pool.use(name):
            assert same({"head": base.head.weight.data}, {"head": expected[name].head.weight.data})
            assert base.head(torch.ones(1, 4)).shape == expected[name].head(torch.ones(1, 4)).shape
            assert base.embed.weight.shape == expected[name].embed.weight.shape
            assert torch.equal(base.embed.weight[7:], expected[name].embed.weight[7:])
            assert base.output.weight is base.embed.weight
        assert same(state(base), before)


def test_a_model_that_has_the_rows_already():
    base = base_model()
    grown = Model(words=9)
    grown.load_state_dict(
        {**state(grown), **{n: t for n, t in state(base).items() if "embed" not in n and "output" not in n}}
    )
    with torch.no_grad():
        grown.embed.weight[:7] = base.embed.weight
    delta, pool, before = delta_of(2, words=9), DeltaPool(grown), state(grown)
    expected = applied(delta, grown)
    pool.add("nine words", delta)
    with pool.use("nine words"):
        assert same(state(grown), expected)
    assert same(state(grown), before)


def test_a_merged_delta_is_used_by_its_tasks(tmp_path):
    base = base_model()
    deltas = {"a": delta_of(1), "b": delta_of(2, labels=3)}
    merged = merge(base, deltas)
    merged.save_pretrained(tmp_path / "merged")
    pool, before = DeltaPool(base), state(base)
    pool.add("m", tmp_path / "merged")
    assert pool.names == ["m@a", "m@b"]
    expected = {
        "a": applied(merged.for_task("a"), base_model()),
        "b": applied(merged.for_task("b"), base_model(labels=3)),
    }
    for task in ("a", "b", "a"):
        with pool.use(f"m@{task}"):
            assert torch.equal(base.head.weight, expected[task]["head.weight"])
            assert torch.equal(base.embed.weight, expected[task]["embed.weight"])
        assert same(state(base), before)
    assert pool.stats().loads == 1
    with pytest.raises(ValueError, match="choose one"), pool.use("m"):
        pass
    with pytest.raises(ValueError, match="no task 'c': it merges a, b"), pool.use("m@c"):
        pass
    assert same(state(base), before)


def test_tensors_that_the_files_hold_in_other_pieces(tmp_path):
    """A model of transformers whose experts are one tensor in memory and many in the files."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    ))  # fmt: skip
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in finetuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    delta = prune(base, finetuned, "dare", 0.5)
    pool, before, expected = DeltaPool(base), state(base), applied(delta, base)
    pool.add("a", delta)
    with pool.use("a"):
        assert same(state(base), expected)
    assert same(state(base), before)


def folder(tmp_path, seed, **settings):
    return str(delta_of(seed, **settings).save_pretrained(tmp_path / f"d{seed}"))


def test_the_least_recently_used_leave_by_bytes(tmp_path):
    base = base_model()
    folders = [folder(tmp_path, seed) for seed in range(4)]
    one = DeltaPool(base)
    one.add("a", folders[0])
    one.preload()
    size = one.stats().num_bytes
    pool = DeltaPool(base, memory=int(2.5 * size))
    for number, path in enumerate(folders):
        pool.add(f"d{number}", path)
    assert pool.stats().loads == 0
    for name in ("d0", "d1", "d0", "d2"):
        with pool.use(name):
            pass
    stats = pool.stats()
    assert stats.loaded == ("d0", "d2")
    assert (stats.hits, stats.loads, stats.evictions, stats.swaps) == (1, 3, 1, 4)
    assert stats.num_bytes <= pool.memory
    assert stats.swap_ms > 0
    pool.preload(["d3"])
    assert pool.stats().loaded == ("d2", "d3")
    pool.evict("d2")
    assert pool.stats().loaded == ("d3",)
    with pytest.raises(ValueError, match=r"d0, d1 had to leave again for others"):
        pool.preload()
    small = DeltaPool(base, memory="10 B")
    small.add("a", folders[0])
    with pytest.raises(ValueError, match=r"a takes [\d,]+ bytes in memory, and the pool may have 10"), small.use("a"):
        pass
    assert small.stats().loaded == ()


def test_a_hundred_positions_take_less_than_seven_bytes_each():
    """Two for the position, four for the value; the start of every block of 65,536 entries beside them."""
    base = nn.Linear(1000, 1000, bias=False)
    finetuned = nn.Linear(1000, 1000, bias=False)
    pool = DeltaPool(base)
    pool.add("a", prune(base, finetuned, "dare", 0.99))
    pool.preload()
    assert pool.stats().num_bytes < 6.2 * 10_000


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    base = base_model()
    pool = DeltaPool(base)
    pool.add("a", folder(tmp_path, 1))
    with pytest.raises(ValueError, match="the pool has a delta named 'a'"):
        pool.add("a", delta_of(2))
    with pytest.raises(ValueError, match="without '@'"):
        pool.add("a@b", delta_of(2))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pool.add("b", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no delta 'c'; it has a"), pool.use("c"):
        pass
    with pytest.raises(ValueError, match="'a' has no task 'x': it is no merged delta"), pool.use("a@x"):
        pass
    with pytest.raises(RuntimeError, match="inside a block of this pool"), pool.use("a"), pool.use("a"):
        pass
    pool.remove("a")
    assert pool.names == []
    with pytest.raises(ValueError, match="memory is a number of bytes"):
        DeltaPool(base, memory="much")


def test_a_delta_of_another_base_or_architecture_is_refused_and_the_model_stays():
    base = base_model()
    pool = DeltaPool(base)
    other = tuned(9)
    pool.add("other", prune(other, tuned(1), "dare", 0.5))
    pool.add("wide", prune(nn.Linear(5, 6), nn.Linear(5, 6), "dare", 0.5))
    before = state(base)
    for name, said in (("other", "other: .*is not the base of this delta"), ("wide", "wide: .*does not fit")):
        with pytest.raises(ValueError, match=said), pool.use(name):
            pass
    assert same(state(base), before)
    assert pool.stats().loaded == ()
    pool.add("forced", prune(other, tuned(1), "dare", 0.5), force=True)
    with pool.use("forced"):
        assert not same(state(base), before)
    assert same(state(base), before)


@pytest.mark.parametrize("change", ["train", "cast", "apply"])
def test_a_model_that_was_changed_behind_its_back_is_refused(change):
    base, delta = base_model(), delta_of(1)
    pool = DeltaPool(base)
    pool.add("a", delta)
    with pool.use("a"):
        pass
    if change == "train":
        with torch.no_grad():
            base.map.weight.mul_(1.5)
    elif change == "cast":
        base.half()
    else:
        delta_of(2).apply_(base)
    with pytest.raises(RuntimeError, match="changed since the pool was made"), pool.use("a"):
        pass


def test_a_model_that_was_put_back_is_the_base_still():
    base, delta, other = base_model(), delta_of(1), delta_of(2)
    pool = DeltaPool(base)
    pool.add("a", delta)
    expected = applied(delta, base)
    with other.applied(base):
        pass
    with pool.use("a"):
        assert same(state(base), expected)


def test_a_model_of_inference_mode_and_a_quantised_one_are_refused():
    with torch.inference_mode():
        made_there = base_model()
    with pytest.raises(ValueError, match="made in inference mode"):
        DeltaPool(made_there)
    integers = base_model()
    integers.map.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        DeltaPool(integers)


def test_threads_that_share_a_pool_see_their_own_delta():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=2, **SIZES)
    base = BertForSequenceClassification(config).eval()
    tokens = torch.randint(0, 30, (1, 8))
    deltas, expected = {}, {}
    for seed in range(4):
        finetuned = copy.deepcopy(base)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in finetuned.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        deltas[str(seed)] = prune(base, finetuned, "dare", 0.3, seed=seed)
        with torch.no_grad(), deltas[str(seed)].applied(base):
            expected[str(seed)] = base(tokens).logits.clone()
    pool, before, wrong = DeltaPool(base), state(base), []
    for name, delta in deltas.items():
        pool.add(name, delta)

    def work(start):
        for round_ in range(60):
            name = str((start + round_) % 4)
            with torch.no_grad(), pool.use(name) as model:
                if not torch.equal(model(tokens).logits, expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert same(state(base), before)


@pytest.mark.slow
def test_interrupted_at_every_line_the_base_is_back_at_the_next_use():
    deltas = [delta_of(1), delta_of(2, labels=3)]
    clean = state(base_model())

    def make():
        pool = DeltaPool(base_model())
        pool.add("a", deltas[0])
        pool.add("b", deltas[1])
        pool.preload()
        return (pool,)

    def work(pool):
        for name in ("a", "b"):
            with pool.use(name):
                pass

    def check(pool):
        with pool.use(None) as model:
            assert same(state(model), clean)
        with pool.use("b") as model:
            assert model.head.out_features == 2
            assert model.head.weight.shape == (3, 4)
        assert same(state(pool.model), clean)

    at_every_line(make, work, check, more_than=100)


class Normed(nn.Module):
    """With a norm that counts what it sees in training."""

    def __init__(self):
        super().__init__()
        self.map, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.map(x))


@pytest.mark.parametrize("block", ["use", "base", "mixed"])
def test_what_changes_the_model_inside_a_block_is_noticed_at_the_next(block):
    """Running statistics of a model that is not in eval, or a step of an optimizer."""
    base = Normed()
    changed = {n: t + 0.1 if n.startswith("map") else t for n, t in base.state_dict().items()}
    pool = DeltaPool(base)
    for seed in range(2):
        pool.add(f"d{seed}", prune(base.state_dict(), changed, "dare", 0.5, seed=seed))
    inside = {
        "use": lambda: pool.use("d0"),
        "base": lambda: pool.use(None),
        "mixed": lambda: pool.mixed(["d0", "d1"] * 4),
    }
    base.eval()
    with torch.no_grad(), inside[block]() as model:
        model(torch.randn(8, 4))
    with pool.use("d1"):
        pass
    base.train()
    with torch.no_grad(), inside[block]() as model:
        model.norm(torch.randn(8, 4) + 3)
    with pytest.raises(RuntimeError, match=r"norm\.running_mean.*of the model changed since"), pool.use("d1"):
        pass


def test_a_delta_that_is_used_in_inference_mode_first_is_used_outside_of_it_too():
    pool = DeltaPool(base_model())
    pool.add("d", delta_of(1))
    pool.add("e", delta_of(2))
    with torch.inference_mode(), pool.mixed(["d", "e"]):
        pass
    with torch.inference_mode(), pool.use("d") as model:
        model.head(torch.ones(2, 4))
    with pool.use("d") as model:
        model.head(torch.ones(2, 4)).sum().backward()
    with pool.mixed(["d", "e"]) as model:
        model.map(torch.ones(2, 3)).sum().backward()


def test_a_task_of_a_merged_delta_is_not_removed_alone():
    base = base_model()
    pool = DeltaPool(base)
    pool.add("m", merge(base, {"x": delta_of(1), "y": delta_of(2)}))
    with pytest.raises(ValueError, match="'m@x' is one task of a merged delta: remove 'm'"):
        pool.remove("m@x")
    pool.remove("m")
    assert pool.names == []
