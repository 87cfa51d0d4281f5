"""Mixed batches: every row has its own delta's weights, and what cannot be so is refused by name."""

import threading

import pytest
import torch
import torch.nn.functional as F
from factored import factored_pair
from tiny_causal import make_decoder
from torch import nn

from dpp_lightning import DeltaPool, SparseDelta, prune
from dpp_lightning.serving.sparse_products import CannotMixError


class Net(nn.Module):
    """An embedding, a map, a norm and a head."""

    def __init__(self, words=11, labels=3):
        super().__init__()
        self.embed, self.map = nn.Embedding(words, 6), nn.Linear(6, 10)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, labels)

    def forward(self, ids):
        return self.head(self.norm(F.gelu(self.map(self.embed(ids)))).mean(1))


def tuned(base, seed, **settings):
    torch.manual_seed(seed)
    model = Net(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = base.state_dict()[name]
            if parameter.shape == start.shape:
                parameter.copy_(start + 0.3 * torch.randn_like(start))
    return model


def net_pool(number=3, rate=0.6, carry=("head.*",), **settings):
    torch.manual_seed(0)
    base = Net()
    deltas = {
        f"d{k}": prune(base, tuned(base, k, **settings), "dare", rate, seed=k, carry=list(carry)) for k in range(number)
    }
    pool = DeltaPool(base)
    for name, delta in deltas.items():
        pool.add(name, delta)
    return base, pool


def ids(rows, length=5, words=11):
    return torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def one_by_one(pool, rows, tokens):
    outputs = []
    for row, name in enumerate(rows):
        with pool.use(name) as model:
            outputs.append(model(tokens[row : row + 1]))
    return torch.cat(outputs)


@pytest.mark.parametrize("carry", [("head.*",), ()], ids=["a carried head", "a pruned head"])
@pytest.mark.parametrize(
    "rows",
    [
        ["d0"],
        ["d0", "d1", "d2"],
        ["d0", "d0", "d1", "d1"],  # as many of each, next to each other
        ["d0", "d1", "d0", "d1"],  # as many of each, in turn
        ["d2", None, "d0", "d2", "d1", "d2", None],  # of the base as well
        [None, None],
    ],
)
def test_every_row_has_its_own_weights(rows, carry):
    base, pool = net_pool(carry=carry)
    tokens, before = ids(len(rows), length=len(rows) + 2), {n: t.clone() for n, t in base.state_dict().items()}
    with torch.no_grad(), pool.mixed(rows) as model:
        together, again = model(tokens), model(tokens)
    assert torch.allclose(together, one_by_one(pool, rows, tokens), atol=1e-5)
    assert torch.equal(together, again)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_shared_rows_get_every_delta():
    """Embeddings of positions, computed once for all rows."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(11, 6), nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, tokens):
            return self.head(self.words(tokens) + self.places(torch.arange(tokens.shape[1])[None]))

    torch.manual_seed(0)
    base = Positions()
    pool = DeltaPool(base)
    for seed in range(1, 3):
        torch.manual_seed(seed)
        finetuned = Positions()
        pool.add(f"d{seed}", prune(base, finetuned, "dare", 0.5, seed=seed))
    rows, tokens = ["d1", "d2", "d1"], ids(3)
    expected = one_by_one(pool, rows, tokens)
    with torch.no_grad(), pool.mixed(rows):
        assert torch.allclose(base(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("rate", [0.9, None], ids=["beside kept entries", "alone"])
def test_factors_are_multiplied_as_they_are(rate):
    base, delta = factored_pair("magnitude" if rate else "dare", rate or 0.9, drawn_rate=None if rate else 0.9)
    tensors = {name: tensor for name, tensor in delta.tensors.items() if name.startswith(("layers.", "embed."))}
    pool = DeltaPool(base)
    pool.add("a", SparseDelta(tensors, {}, delta.info), force=True)
    rows, tokens = ["a", None, "a"], ids(3, words=37)
    expected = one_by_one(pool, rows, tokens)
    with torch.no_grad(), pool.mixed(rows):
        assert torch.allclose(base(tokens), expected, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_a_mixed_batch_generates_are_those_of_each_delta(dtype):
    base = make_decoder().eval().to(dtype)
    pool = DeltaPool(base)
    for seed in range(2):
        finetuned = make_decoder(seed=seed + 1).eval().to(dtype)
        pool.add(f"d{seed}", prune(base, finetuned, "dare", 0.5, seed=seed))
    rows = ["d1", None, "d0", "d1"]
    tokens = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pool.mixed(rows) as model:
        together = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    agree = 0
    for row, name in enumerate(rows):
        with pool.use(name) as model:
            alone = model.generate(tokens[row : row + 1], attention_mask=torch.ones(1, 6), **settings)
        agree += torch.equal(together[row], alone[0])
    assert (
        agree == 4 if dtype == torch.float32 else agree >= 1
    )  # bfloat16 rounds a written change, and none that is added


def test_in_inference_mode():
    _, pool = net_pool()
    rows, tokens = ["d0", "d1", "d2"], ids(3)
    expected = one_by_one(pool, rows, tokens)
    with torch.inference_mode(), pool.mixed(rows) as model:
        assert torch.allclose(model(tokens), expected, atol=1e-5)


def test_a_batch_of_as_many_rows_as_tokens_is_refused_until_its_layout_is_known():
    _, pool = net_pool(carry=())
    rows, square = ["d0", "d1", "d2"], ids(3, length=3)
    said = r"shape \(3, 3\), of which either dimension may be the 3 rows"
    with pytest.raises(CannotMixError, match=said), pool.mixed(rows) as model:
        model(square)
    with torch.no_grad(), pool.mixed(rows) as model:
        model(ids(3, length=4))
    expected = one_by_one(pool, rows, square)
    with torch.no_grad(), pool.mixed(rows) as model:
        assert torch.allclose(model(square), expected, atol=1e-5)


def test_a_batch_of_another_size_is_refused():
    _, pool = net_pool()
    said = r"embed.weight got a tensor of shape \(4, 5\) in a batch of 2 rows"
    with pytest.raises(CannotMixError, match=said), pool.mixed(["d0", "d1"]) as model:
        model(ids(4))


def test_heads_of_different_sizes_cannot_share_a_batch():
    base, pool = net_pool(2)
    pool.add("five", prune(base, tuned(base, 7, labels=5), "dare", 0.6, carry=["head.*"]))
    with pytest.raises(CannotMixError, match=r"head.weight has 2 shapes"), pool.mixed(["d0", "five"]) as model:
        model(ids(2))
    with torch.no_grad(), pool.mixed(["five", "five"]) as model:
        assert model(ids(2)).shape == (2, 5)


def test_a_vocabulary_that_grew_cannot_share_a_batch():
    torch.manual_seed(0)
    base = Net()
    pool = DeltaPool(base)
    grown = Net(words=13)
    pool.add("grown", prune(base, grown, "dare", 0.6))
    with pytest.raises(CannotMixError, match=r"embed.weight has more rows than the base's"), pool.mixed(["grown"]):
        pass


@pytest.mark.parametrize("kind", ["a weight that is transposed", "attention of torch", "a view"])
def test_a_function_that_takes_one_weight_for_all_rows_is_refused(kind):
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.map = nn.Linear(6, 6)

        def forward(self, x):
            if kind == "attention of torch":
                return self.attention(x, x, x)[0]
            return x @ self.map.weight.T if kind == "a weight that is transposed" else x * self.map.bias[:6]

    torch.manual_seed(0)
    base, finetuned = Direct(), Direct()
    pool = DeltaPool(base)
    pool.add("a", prune(base, finetuned, "magnitude", 0.2))
    said = r"goes into .*, which takes one weight for all rows"
    with pytest.raises(CannotMixError, match=said), pool.mixed(["a", None]) as model:
        model(torch.randn(2, 3, 6))


@pytest.mark.parametrize("how", ["as inputs", "by keyword", "compiled", "its pointer"])
def test_what_could_go_past_the_pool_is_refused(how):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(6, 6)

        def forward(self, x):
            if how == "as inputs":
                return F.linear(self.map.weight, x[0])
            if how == "by keyword":
                return torch.add(x, other=self.map.bias)
            return self.map.bias.data_ptr() if how == "its pointer" else self.map(x)

    torch.manual_seed(0)
    base, finetuned = Other(), Other()
    if how == "compiled":
        base.map.compile()
    pool = DeltaPool(base)
    pool.add("a", prune(base, finetuned, "magnitude", 0.2))
    said = "is compiled" if how == "compiled" else "map"
    with pytest.raises(CannotMixError, match=said), pool.mixed(["a", None]) as model:
        model(torch.randn(2, 3, 6))


def test_other_threads_see_the_base_while_a_thread_mixes():
    base, pool = net_pool()
    tokens, seen = ids(3), []
    with torch.no_grad():
        plain = base(tokens)
        with pool.mixed(["d0", "d1", "d2"]):
            thread = threading.Thread(target=lambda: seen.append(base(tokens).detach()))
            thread.start()
            thread.join()
    assert torch.equal(seen[0], plain)


def test_what_a_mixed_batch_keeps_is_counted():
    _, pool = net_pool()
    pool.preload()
    before = pool.stats().num_bytes
    with pool.mixed(["d0"]):
        pass
    assert pool.stats().num_bytes > before
    pool.memory = before + 200
    with pool.mixed(["d1"]):
        pass
    assert pool.stats().num_bytes <= pool.memory
    assert len(pool.stats().loaded) < 3


class Picking(nn.Module):
    """A head on the tokens that an index picks, or on a table of the model's own, as many as there are rows."""

    def __init__(self, way):
        super().__init__()
        self.way, self.embed, self.head = way, nn.Embedding(11, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, tokens, mask=None):
        x = self.embed(tokens)
        if self.way == "mask":
            return self.head(x[mask])
        if self.way == "order":
            return self.head(x[torch.tensor([1, 0, 3, 2])])
        if self.way == "select":
            return self.head(torch.index_select(x, 0, torch.tensor([1, 0, 3, 2])))
        if self.way == "table":
            return x.mean(1) @ self.head(self.table * 2).t()
        return self.head(x[torch.arange(len(x)), mask.long().argmax(1)])  # one place of each row, in their order


def picking_pool(way):
    torch.manual_seed(0)
    base = Picking(way).eval()
    pool = DeltaPool(base)
    for k in (1, 2):
        torch.manual_seed(k)
        tuned_state = {n: t + 0.3 * torch.randn_like(t) for n, t in base.state_dict().items()}
        pool.add(
            f"d{k}", prune(base.state_dict(), tuned_state, "dare", 0.5, seed=k, exclude=["table"], outside="revert")
        )
    return pool


@torch.no_grad()
@pytest.mark.parametrize("way", ["mask", "order", "select", "table"])
def test_what_has_the_length_of_the_batch_by_chance_is_not_taken_for_its_rows(way):
    """Of four rows four tokens are picked, two of them of the first row."""
    pool, tokens = picking_pool(way), ids(4)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 1] = mask[0, 3] = mask[2, 2] = mask[3, 1] = True
    with (
        pytest.raises(CannotMixError, match=r"head\.(weight|bias) got a tensor that is"),
        pool.mixed(["d1", "d2", "d2", "d1"]) as model,
    ):
        model(tokens, mask)


@torch.no_grad()
def test_one_place_of_each_row_is_the_rows():
    pool, tokens, rows = picking_pool("pooled"), ids(4), ["d1", "d2", "d2", "d1"]
    mask = torch.eye(5, dtype=torch.bool)[:4]
    with pool.mixed(rows) as model:
        found = model(tokens, mask)
    for row, name in enumerate(rows):
        with pool.use(name) as model:
            torch.testing.assert_close(found[row], model(tokens[row : row + 1], mask[row : row + 1])[0])


@torch.no_grad()
def test_a_vocabulary_that_grew_and_is_carried_is_answered_in_groups():
    base = Net()
    pool = DeltaPool(base)
    for k in range(2):
        pool.add(f"d{k}", prune(base, tuned(base, k, words=14), "dare", 0.5, seed=k, carry=["embed.*"]))
    requests = [("d0", [1, 12, 2]), ("d1", [1, 13, 2]), ("d0", [3, 4, 5])]

    def forward(model, some):
        return list(model(torch.tensor([tokens for _, tokens in some])))

    settings = {"key": lambda request: request[0], "forward": forward}
    for together, alone in zip(
        pool.map(requests, **settings), pool.map(requests, mix_up_to=0, **settings), strict=True
    ):
        torch.testing.assert_close(together, alone)
    with pytest.raises(CannotMixError, match=r"embed\.weight has other sizes"), pool.mixed(["d0", "d1"]) as model:
        model(torch.tensor([[1, 12], [1, 13]]))


def test_an_error_of_another_kind_in_a_mixed_batch_says_where_it_was():
    _, pool = net_pool(2)
    with pytest.raises(RuntimeError) as error, pool.mixed(["d0", "d1"]) as model:
        model(torch.ones(2, 3))  # ids that are no integers
    assert "one at a time" in error.value.__notes__[0]


@torch.no_grad()
def test_a_number_is_no_row_and_makes_none_of_the_next():
    _, pool = net_pool(2)
    with (
        pytest.raises(CannotMixError, match=r"norm\.weight got a tensor of shape \(\) in a batch of 2 rows"),
        pool.mixed(["d0", "d1"]) as model,
    ):
        torch.mul(torch.tensor(2.0), model.norm.weight)
    assert "norm.weight" not in pool._batch_first


class Moved(nn.Module):
    """Between two maps what comes of the rows is moved."""

    def __init__(self, move):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.move = nn.Linear(6, 6), nn.Linear(6, 6), move

    def forward(self, x):
        return self.second(self.move(torch.tanh(self.first(x))))


def pool_of(make):
    base, pool = make(), None
    pool = DeltaPool(base)
    for seed, name in enumerate("ab"):
        tuned = make()
        torch.manual_seed(seed + 5)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        pool.add(name, prune(base, tuned, "dare", 0.3, seed=seed))
    return pool


ORDER = torch.tensor([2, 0, 1]).view(3, 1, 1)
REORDERED = {
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "rot90": lambda h: h.rot90(2, (0, 1)),
    "slices": lambda h: torch.cat([h[1:], h[:1]]),
    "rows": lambda h: torch.stack([h[2], h[1], h[0]]),
    "unbind": lambda h: torch.stack(h.unbind(0)[::-1]),
    "split": lambda h: torch.cat(h.split(1)[::-1]),
    "narrow": lambda h: torch.cat([h.narrow(0, 1, 2), h.narrow(0, 0, 1)]),
    "sort": lambda h: h.sort(0).values,
    "topk": lambda h: h.topk(3, dim=0).values,
    "gather": lambda h: h.gather(0, ORDER.expand_as(h)),
    "take_along_dim": lambda h: h.take_along_dim(ORDER.expand_as(h), 0),
    "scatter": lambda h: torch.zeros_like(h).scatter(0, ORDER.expand_as(h), h),
    "index_copy": lambda h: torch.zeros_like(h).index_copy(0, ORDER.flatten(), h),
    "pieces beside each other": lambda h: torch.cat(h.split(1), 1).view(h.shape),
    "reshape": lambda h: h.permute(1, 0, 2).reshape(h.shape),
}


@pytest.mark.parametrize("how", REORDERED)
def test_rows_in_another_order_are_refused(how):
    """Negatives of a batch, for one: each row would be computed with the delta of another."""
    x, pool, refused = torch.randn(3, 5, 6), pool_of(lambda: Moved(REORDERED[how])), "picked or put into another order"
    with pytest.raises(CannotMixError, match=refused), torch.no_grad(), pool.mixed(["a", None, "b"]) as model:
        model(x)


KEPT = {
    "along tokens": lambda h: h.flip(1).roll(1, 1).sort(-1).values,
    "pieces in their order": lambda h: torch.cat(h.split(1)) + torch.stack(h.unbind(0)),
    "tokens together": lambda h: h.reshape(-1, h.shape[-1]).view(h.shape),
    "all of them": lambda h: h[:] + h[0:3] + h[:, :5],
}


@pytest.mark.parametrize("how", KEPT)
def test_what_leaves_the_rows_in_their_order_is_mixed(how):
    pool, x = pool_of(lambda: Moved(KEPT[how])), torch.randn(3, 5, 6)
    with torch.no_grad(), pool.mixed(["a", None, "b"]) as model:
        mixed = model(x)
    assert torch.allclose(mixed, one_by_one(pool, ["a", None, "b"], x), atol=1e-5)


class Aliased(nn.Module):
    """A weight that is also known by another name of its memory, or goes into code that is no Python."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.how = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False), how
        self.scale = nn.Parameter(torch.randn(6))
        self.views = [self.embed.weight.t()]
        if how == "another parameter":
            self.head.weight.data = self.embed.weight.data

    def forward(self, ids):
        states = torch.tanh(self.embed(ids))
        if self.how == "a view":
            return states @ self.views[0]
        return self.head(scaled(states, self.scale) if self.how == "scripted" else states)


@torch.jit.script
def scaled(x, weight):
    return x * weight


@pytest.mark.parametrize("how", ["another parameter", "a view", "scripted"])
def test_a_changed_weight_that_is_used_unseen_is_refused(how):
    pool, refused = pool_of(lambda: Aliased(how)), "by another name of its memory|failed in the TorchScript interpreter"
    with (
        pytest.raises((ValueError, RuntimeError), match=refused),
        torch.no_grad(),
        pool.mixed(["a", None, "b"]) as model,
    ):
        model(torch.randint(0, 12, (3, 5)))


@pytest.mark.parametrize("rows", [2, 3])
def test_a_cast_weight_of_a_module_with_parts_is_not_laid_out_by_its_inputs(rows):
    """Of three dimensions, where the weight meets four: the rows' weights would go to the heads."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.scale, self.map = nn.Parameter(torch.randn(4)), nn.Linear(12, 12)

        def forward(self, x):
            heads = self.map(x).view(len(x), -1, 3, 4).transpose(1, 2)
            return (heads * self.scale.to(x.dtype)).transpose(1, 2).reshape(x.shape)

    pool, names = pool_of(Heads), ["a", "b", None][:rows]
    with pytest.raises(CannotMixError, match="scale goes into to"), torch.no_grad(), pool.mixed(names) as model:
        model(torch.randn(rows, 5, 12))
