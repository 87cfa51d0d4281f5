"""Steps that no number leaves a tensor in, compiled, captured or neither, are the steps of the plain optimizer."""

import pytest
import torch
from test_adamr import (
    SHAPES,
    assert_same,
    both_paths,
    random_parameters,
    saved_and_loaded,
    set_gradients,
    table,
    train,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

from dpp_lightning.optim import AdamR, adamr_step

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


def groups(parameters, **settings):
    """Three groups: most parameters, one that ascends with other betas, a fresh head."""
    other = {"params": parameters[1:2], "betas": (0.8, 0.95), "maximize": True, "delta_decay": 0.0}
    return [{"params": [*parameters[:1], *parameters[3:]], **settings}, other, {"params": parameters[2:3], "new": True}]


def both(settings, changed, dtype=torch.float64, device="cpu", step_of=lambda optimizer: optimizer.step):
    """Parameters after eight steps of the plain optimizer and of a changed one; the rate is halved after four."""
    results = []
    for own, wrap in (({}, lambda optimizer: optimizer.step), (changed, step_of)):
        parameters = random_parameters(dtype=dtype, device=device)
        optimizer = AdamR(groups(parameters), **{"lr": 1e-2, "delta_decay": 0.3, **settings, **own})
        step = wrap(optimizer)
        for i in range(8):
            set_gradients(parameters, i)
            if i == 4:
                for group in optimizer.param_groups:
                    if isinstance(group["lr"], torch.Tensor):
                        group["lr"].fill_(5e-3)
                    else:
                        group["lr"] = 5e-3
            step()
        results.append(parameters)
    return results


@devices
@table
def test_capturable_steps_are_the_plain_ones(norm, amsgrad, foreach, device):
    settings = {"norm": norm, "amsgrad": amsgrad, "foreach": foreach}
    changed = {"capturable": True, "lr": torch.tensor(1e-2, dtype=torch.float64, device=device)}
    plain, capturable = both(settings, changed, device=device)
    assert_same(capturable, plain, rtol=1e-9, atol=1e-10)


@devices
@table
def test_a_rate_in_a_tensor_is_that_rate(norm, amsgrad, foreach, device):
    settings = {"norm": norm, "amsgrad": amsgrad, "foreach": foreach}
    plain, tensor = both(settings, {"lr": torch.tensor(1e-2, dtype=torch.float64)}, device=device)
    assert_same(tensor, plain)


@devices
def test_capturable_counts_steps_on_the_device_and_resumes(device):
    whole = random_parameters(device=device)
    first = AdamR(whole, capturable=True)
    train(first, whole, 3)
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    second = AdamR(resumed)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert {state["step"].device.type for state in second.state.values()} == {device}
    assert_same(train(second, resumed, 3, start=3), train(first, whole, 3, start=3))


def test_a_capturable_step_takes_no_number_from_a_tensor(monkeypatch):
    parameters = random_parameters()
    optimizer = AdamR(parameters, capturable=True, lr=torch.tensor(1e-3))
    set_gradients(parameters, 0)
    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a wait for the device"))
    optimizer.step()


@table
def test_torch_compile_has_no_graph_breaks_and_compiles_once(norm, amsgrad, foreach):
    counter = CompileCounter()
    torch.compiler.reset()
    settings = {"norm": norm, "amsgrad": amsgrad, "foreach": foreach}
    changed = {"lr": torch.tensor(1e-2, dtype=torch.float64)}
    plain, compiled = both(
        settings, changed, step_of=lambda o: torch.compile(o.step, fullgraph=True, backend=counter, dynamic=False)
    )
    assert_same(compiled, plain, rtol=1e-9, atol=1e-10)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_with_its_own_backend(dtype):
    torch.compiler.reset()
    changed = {"lr": torch.tensor(1e-2)}
    plain, compiled = both({}, changed, dtype, step_of=lambda o: torch.compile(o.step, fullgraph=True))
    assert_same(compiled, plain, **(CLOSE if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))


@pytest.fixture
def not_compiled(monkeypatch):
    """The compiled kernel as plain Python, for parameters of 7 entries or more."""
    calls = []
    real = adamr_step.adamr_lists
    monkeypatch.setattr(adamr_step, "LARGE", 7)
    monkeypatch.setattr(adamr_step, "compiled_lists", lambda: lambda *given: calls.append(given) or real(*given))
    return calls


@table
def test_the_kernel_gives_the_plain_steps(norm, amsgrad, foreach, not_compiled):
    plain, compiled = both({"norm": norm, "amsgrad": amsgrad, "foreach": foreach}, {"compiled": True})
    assert_same(compiled, plain, rtol=1e-9, atol=1e-10)
    assert len(not_compiled) == 8 * sum(torch.Size(shape).numel() >= 7 for shape in SHAPES)


@both_paths
def test_narrow_weights_are_rounded_once(not_compiled, foreach):
    wide, compiled = (random_parameters(dtype=torch.bfloat16) for _ in range(2))
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    for parameters, settings in ((wide, {}), (compiled, {"compiled": True})):
        optimizer = AdamR(parameters, lr=1e-2, delta_decay=0.5, foreach=foreach, **settings)
        for p in compiled:
            p.grad = None
        generator = torch.Generator().manual_seed(0)
        for p in parameters:
            p.grad = (0.1 * torch.randn(p.shape, generator=generator)).bfloat16().to(p.dtype)
        optimizer.step()
    assert_same([p for p in compiled if p.numel() >= 7], [p.bfloat16() for p in wide if p.numel() >= 7])


@pytest.mark.slow
@devices
@table
def test_the_kernel_compiled(norm, amsgrad, foreach, device, monkeypatch):
    monkeypatch.setattr(adamr_step, "LARGE", 7)
    settings = {"norm": norm, "amsgrad": amsgrad, "foreach": foreach}
    plain, compiled = both(settings, {"compiled": True}, torch.float32, device)
    assert_same(compiled, plain, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_cuda_graph_holds_a_step(norm):
    plain, captured = (random_parameters(device="cuda", shapes=[(300, 200), (7,)]) for _ in range(2))
    train(AdamR(plain, lr=1e-2, norm=norm), plain, 6)
    rate = torch.tensor(1e-2, device="cuda")
    optimizer = AdamR(captured, lr=rate, norm=norm, capturable=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        train(optimizer, captured, 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    held = [p.grad for p in captured]
    with torch.cuda.graph(graph):
        optimizer.step()  # captured, not run
    for step in range(3, 6):
        set_gradients(captured, step)
        for p, grad in zip(captured, held, strict=True):
            grad.copy_(p.grad)
        graph.replay()
    assert_same(captured, plain, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("some", [False, True])
def test_a_cuda_graph_of_a_step_that_waits_is_refused(some):
    parameters = random_parameters(device="cuda")
    optimizer = AdamR([{"params": parameters[:1], "capturable": some}, {"params": parameters[1:]}])
    train(optimizer, parameters, 1)
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
