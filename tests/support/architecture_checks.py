"""One architecture through every road from two models to a pruned one: what is right, what is refused, what is wrong."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from architecture_trial import Holder, Refused, Trial, keys, quiet_trainer
from architectures import Architecture
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from dpp_lightning import SparseDelta, prune
from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.delta.folder import DeltaReader

METHODS = ("random-drop", "magnitude", "importance", "dp", "owl", "struct-dare")
CALIBRATED = ("wanda", "darex-q", "darex-q-layer")
TRAINED = ("refit", "lowrank", "refit by block", "lowrank by block")


@dataclass(frozen=True)
class Cell:
    """The outcome of one check.

    Attributes:
        state: "ok", "refused" or "FAIL".
        note: the refusal's line, the warning's or what is wrong.
    """

    state: str
    note: str = ""


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one; 0 where all bits are equal."""
    if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        return 0.0
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True) if a.numel())


def check_equal(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert (off := difference(found, expected)) == 0, f"{what}: the outputs are off by {off:.2g}"


def check_keys(trial: Trial, folder: Path) -> None:
    """A dense folder has the names of the fine-tuned folder, or all those of the base where these are older ones."""
    found = keys(folder)
    wanted = keys(trial.finetuned)
    if found not in (wanted, keys(trial.base), trial.saved_keys):
        missing, more = sorted(wanted - found), sorted(found - wanted)
        raise AssertionError(f"the dense folder lacks {missing[:2]} ({len(missing)}) and has {more[:2]} ({len(more)})")


def check_dense_is_finetuned(trial: Trial, folder: Path) -> None:
    check_keys(trial, folder)
    check_equal(trial.outputs(trial.load(folder)), trial.expected, "rate 0")


def check_same_delta(trial: Trial, folder: Path) -> None:
    """The same numbers as in the file of folders, at rate 0.5; what tensors are called in files may differ."""
    reference = trial.prune("dare", 0.5)
    if file_of(folder) == file_of(reference):
        return
    one, two = (SparseDelta.from_pretrained(f) for f in (reference, folder))
    names = [{*d.tensors} for d in (one, two)]
    alone = [sorted(names[0] - names[1])[:2], sorted(names[1] - names[0])[:2]]
    carried = sorted({*two.carried} ^ {*one.carried})[:2]
    raise AssertionError(
        f"another delta than that of the folders: {len(names[1])} tensors for {len(names[0])}, only in that of folders "
        f"{alone[0]}, only here {alone[1]}, carried on one side {carried}"
    )


def file_of(folder: Path) -> tuple[list[tuple[str, tuple[int, ...]]], dict[str, bytes]]:
    """Names and shapes of the tensors in order, and the bytes of all that is stored but for the table of names."""
    stored = load_file(folder / "delta_model.safetensors")
    blobs = {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in stored.items() if name != "table"}
    return list(DeltaReader.open(folder).contents.table), blobs


def rate_zero(trial: Trial) -> None:
    """Folders, rate 0, ``dpp apply``: names and outputs of the fine-tuned folder, and no weight is taken for new."""
    delta = trial.prune("dare", 0)
    check_dense_is_finetuned(trial, trial.dense(delta))
    buffers = {name.rpartition(".")[2] for name, _ in trial.load(trial.base).named_buffers()}
    new = [name for name in SparseDelta.from_pretrained(delta).carried if name.rpartition(".")[2] not in buffers]
    assert not new, f"{len(new)} weights are carried as if they were new, such as {sorted(new)[:2]}"


def in_memory(trial: Trial) -> None:
    """A delta of folders on a loaded model: as the dense folder, and off again to the bit."""
    for delta, expected in (
        (trial.prune("dare", 0), lambda: trial.expected),
        (trial.prune("dare", 0.5), lambda: trial.outputs(trial.load(trial.dense_of_half))),
    ):
        model = trial.load(trial.base)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = SparseDelta.from_pretrained(delta)
        loaded.apply_(model)
        check_equal(trial.outputs(model), expected(), "apply_")
        loaded.revert_(model)
        assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items()), "revert_ left changes"


def modules(trial: Trial) -> None:
    """Two loaded models: the delta of the folders, and it applies to the base's folder and to the model."""
    base, finetuned = trial.load(trial.base), trial.load(trial.finetuned)
    half, zero = prune(base, finetuned, "dare", 0.5), prune(base, finetuned, "dare", 0.0)
    half.save_pretrained(trial.folder / "modules-half")
    zero.save_pretrained(trial.folder / "modules-zero")
    check_same_delta(trial, trial.folder / "modules-half")
    check_dense_is_finetuned(trial, trial.dense(trial.folder / "modules-zero"))
    zero.apply_(base)
    check_equal(trial.outputs(base), trial.expected, "apply_")


def state_dicts(trial: Trial) -> None:
    """Two state dicts of loaded models: rate 0 gives the second, to the bit."""
    base, finetuned = trial.load(trial.base).state_dict(), trial.load(trial.finetuned).state_dict()
    prune(base, finetuned, "dare", 0.0).apply_(base)
    wrong = [name for name, tensor in finetuned.items() if not torch.equal(tensor, base[name])]
    assert not wrong, f"{len(wrong)} tensors differ, such as {wrong[0]}"


def callback_validate(trial: Trial) -> None:
    """The callback with ``pretrained=`` in ``Trainer.validate`` on the fine-tuned model."""
    module = Holder(trial.load(trial.finetuned))
    pruned = _callback(trial.folder / "validate", pretrained=str(trial.base))
    quiet_trainer(pruned).validate(module, DataLoader([trial.inputs], batch_size=None), verbose=False)
    _check_callback(trial, trial.folder / "validate")


def callback_fit(trial: Trial) -> None:
    """The callback in a fit that begins at the base and ends at the fine-tuned model."""
    module, loader = (
        Holder(trial.load(trial.base), trial.load(trial.finetuned)),
        DataLoader([trial.inputs], batch_size=None),
    )
    quiet_trainer(_callback(trial.folder / "fit")).fit(module, loader, loader)
    _check_callback(trial, trial.folder / "fit")


def _callback(folder: Path, **settings: str) -> DeltaPruneCallback:
    return DeltaPruneCallback("dare", [0.0, 0.5], monitor="score", output_dir=str(folder), **settings)


def _check_callback(trial: Trial, folder: Path) -> None:
    check_same_delta(trial, folder / "dare-p0.5-seed0")
    check_dense_is_finetuned(trial, trial.dense(folder / "dare-p0-seed0"))


def checkpoint(trial: Trial) -> None:
    """``dpp prune BASE x.ckpt``: the delta of the folders, and a dense folder that is the fine-tuned model."""
    check_same_delta(trial, trial.prune("dare", 0.5, source=trial.checkpoint))
    check_dense_is_finetuned(trial, trial.dense(trial.prune("dare", 0, source=trial.checkpoint)))


def export(trial: Trial) -> None:
    """``dpp export x.ckpt``: the fine-tuned folder."""
    folder = trial.folder / "exported"
    trial.command("export", trial.checkpoint, "--config_from", trial.base, "--output", folder)
    check_dense_is_finetuned(trial, folder)


def export_delta(trial: Trial) -> None:
    """``dpp export x.ckpt --base``: the delta of the folders."""
    folder = trial.folder / "exported-delta"
    trial.command("export", trial.checkpoint, "--base", trial.base, "--pruning_rate", 0.5, "--output", folder)
    check_same_delta(trial, folder)


def method(trial: Trial, name: str) -> None:
    """A method by ``dpp prune``, then ``dpp apply``: a model that loads."""
    delta = trial.prune(name, 0.5)
    trial.outputs(trial.load(trial.dense(delta)))
    if name in ("dp", "owl") and has_several_blocks(trial.load(trial.base)):
        tensors = SparseDelta.from_pretrained(delta).tensors.values()
        shares = {round(t.values.numel() / torch.Size(t.shape).numel(), 3) for t in tensors if t.values.numel() > 200}
        assert len(shares) > 1, "the kept share is the same in all layers"


def linear(trial: Trial) -> None:
    """``--scope linear``: pruned are the linear maps inside the numbered blocks, as the module tree has them."""
    delta = trial.prune("dare", 0.5, "--scope", "linear")
    trial.outputs(trial.load(trial.dense(delta)))
    tensors = SparseDelta.from_pretrained(delta).tensors
    found = sum(torch.Size(t.shape).numel() for t in tensors.values())
    maps = linear_maps(trial.load(trial.base))
    expected = sum(parameter.numel() for parameter in maps.values())
    assert found == expected, (
        f"{found} entries are pruned, the linear maps in the blocks have {expected}: "
        f"{sorted({*tensors} - {*maps})[:3]} for {sorted({*maps} - {*tensors})[:3]}"
    )


def linear_maps(model: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of the linear maps inside blocks, by name: experts and routers too, shared ones once.

    A block is what a list of modules holds, if it has more than linear maps: the layers of a perceptron are none.
    """
    own = {name: _linear_parameters(name, module) for name, module in model.named_modules()}
    linear = {id(p) for parameters in own.values() for p in parameters.values()}
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    blocks = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name.rpartition(".")[0] in lists - {""} and any(id(p) not in linear for p in module.parameters())
    )
    found = {f"{name}.{part}": p for name, parameters in own.items() for part, p in parameters.items()}
    once = {id(p): name for name, p in reversed(found.items())}
    return {name: found[name] for name in once.values() if name.startswith(blocks)}


def _linear_parameters(name: str, module: nn.Module) -> dict[str, Tensor]:
    """What is of linear maps among the parameters of a module itself."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Linear | Conv1D | nn.MultiheadAttention):
        return own
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return {}
    router = type(module).__name__.endswith(("Router", "Gate"))
    stacked = {n for n, p in own.items() if p.dim() == 3 and min(p.shape) > 1 and "embed" not in n}
    maps = stacked or {n for n, p in own.items() if p.dim() == 2 and (router or "experts" in name.split("."))}
    biases = {bias for n in maps for bias in (f"{n}_bias", n.replace("_weight", "_bias"), "bias")}
    return {n: p for n, p in own.items() if n in maps | biases}


def has_several_blocks(model: nn.Module) -> bool:
    """Whether linear maps lie in more than one thing that a list of modules holds."""
    maps = linear_maps(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            inside = {part.removeprefix(f"{name}.").split(".")[0] for part in maps if part.startswith(f"{name}.")}
            if len(inside) > 1:
                return True
    return False


def calibrated(trial: Trial, name: str) -> str:
    """A method that needs data, with the row's inputs as a batch."""
    trial.warnings.clear()
    printed = trial.command(
        "prune", trial.base, trial.finetuned, "--method", name, "--pruning_rate", 0.5, "--calibration", trial.batch,
        "--output", trial.folder / name,
    )  # fmt: skip
    trial.outputs(trial.load(trial.dense(trial.folder / name)))
    told = [*trial.warnings, *(line for line in printed.splitlines() if "inputs" in line)]
    if name == "wanda" and not told:
        check_not_magnitude(trial, trial.folder / name)
    return told[0] if told else ""


def check_not_magnitude(trial: Trial, folder: Path) -> None:
    """Of no linear map wanda keeps what magnitude keeps; embeddings it ranks like that by definition."""
    found, plain = (SparseDelta.from_pretrained(d).tensors for d in (folder, trial.prune("magnitude", 0.5)))
    shapes = {tuple(weight.shape) for weight in linear_maps(trial.load(trial.base)).values()}
    large = [n for n, t in found.items() if tuple(t.shape) in shapes and t.values.numel() >= 256]
    linear = [n for n in large if re.search(r"\.\d+\..*\.", n) and not re.search(r"embed|bias$", n)]  # in a block
    silent = [n for n in linear if torch.equal(found[n].indices, plain[n].indices)]
    assert not silent, f"magnitude in place of wanda without a word: {len(silent)} tensors such as {silent[0]}"


def trained(trial: Trial, name: str) -> str:
    """Kept values or factors trained in a few steps, end to end and block by block: no worse than they started."""
    method, _, by_block = name.partition(" by ")
    folder, settings = trial.folder / name, ["steps=5", *(["rank=1"] if method == "lowrank" else [])]
    trial.warnings.clear()
    trial.command(
        "prune", trial.base, trial.finetuned, "--method", method, "--pruning_rate", 0.7, "--calibration",
        trial.repeated_batch, "--settings", *settings, *(["loss=block"] if by_block else []), "--output", folder,
    )  # fmt: skip
    delta = SparseDelta.from_pretrained(folder)
    before, after = (delta.info.training[f"held_out_{word}"] for word in ("before", "after"))
    assert after <= before, f"held-out loss {before:g} became {after:g}"
    trial.outputs(trial.load(trial.dense(folder)))
    told = [line for line in trial.warnings if "calibration examples" not in line]
    return told[0] if told else ""


def inspect(trial: Trial) -> None:
    """``dpp inspect`` of the pair and of a delta."""
    trial.command("inspect", trial.base, trial.finetuned)
    trial.command("inspect", trial.prune("dare", 0.5))


def merge(trial: Trial) -> None:
    """``dpp merge`` of two deltas, dense: a model that loads."""
    dense = trial.folder / "merged-dense"
    deltas = (trial.prune("dare", 0.5), trial.prune("magnitude", 0.5))
    trial.command("merge", trial.base, *deltas, "--output", trial.folder / "merged", "--dense", dense)
    check_keys(trial, dense)
    trial.outputs(trial.load(dense))


Check = Callable[[Trial], str | None]


def _each(check: Callable[[Trial, str], str | None], names: tuple[str, ...]) -> dict[str, Check]:
    return {name: lambda trial, name=name: check(trial, name) for name in names}


CHECKS: dict[str, Check] = {
    "rate 0": rate_zero,
    "apply_": in_memory,
    "modules": modules,
    "state dicts": state_dicts,
    "validate": callback_validate,
    "fit": callback_fit,
    ".ckpt": checkpoint,
    "export": export,
    "export --base": export_delta,
    **_each(method, METHODS),
    "linear": linear,
    **_each(calibrated, CALIBRATED),
    **_each(trained, TRAINED),
    "inspect": inspect,
    "merge": merge,
}


def run_checks(
    row: Architecture, folder: Path, names: tuple[str, ...] = tuple(CHECKS), seconds: int = 60
) -> dict[str, Cell]:
    """Run the checks on one architecture.

    Args:
        row: the architecture.
        folder: an empty one.
        names: which checks.
        seconds: all together at most.

    Returns:
        Check to outcome.
    """
    with _still(), _limited(seconds):
        try:
            trial = Trial(row, folder)
        except Exception as error:
            return dict.fromkeys(names, _failure(error))
        outcomes = {name: _outcome(CHECKS[name], trial) for name in names}
    return {name: Cell(c.state, c.note.replace(f"{folder}/", "")) for name, c in outcomes.items()}


def _outcome(check: Check, trial: Trial) -> Cell:
    try:
        return Cell("ok", check(trial) or "")
    except Refused as refusal:
        return Cell("refused", str(refusal))
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Cell:
    """A ValueError of the library in one line is a refusal, all else is a failure."""
    if isinstance(error, AssertionError):
        return Cell("FAIL", str(error) or repr(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, ValueError) and "dpp_lightning" in frame.filename and "\n" not in str(error):
        return Cell("refused", str(error))
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return Cell("FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where})")


@contextlib.contextmanager
def _still() -> Iterator[None]:
    """Nothing of transformers' bars and notes, and of Python's warnings."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        yield
    logger.setLevel(level)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
