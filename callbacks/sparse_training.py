"""SparseTraining: train a share of the entries from the start, so that the delta is of exactly these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from dpp_lightning.callbacks.prune_run.base_weights import new_names
from dpp_lightning.callbacks.prune_run.lora_view import find_adapter
from dpp_lightning.callbacks.training_gradients import mean_gradients
from dpp_lightning.methods.selections import Budget
from dpp_lightning.methods.training_masks import highest_positions, random_positions
from dpp_lightning.optim.diff_gates import DiffGates
from dpp_lightning.optim.kept_parameters import KeptParameters
from dpp_lightning.pruning.scope import Fate, Scope
from dpp_lightning.sampling.sampler import exact_rate, stream_key
from dpp_lightning.tensors.names import NamedTensor, buffer_names, canonical_tensors, check_prunable, named_tensors
from dpp_lightning.tensors.owner_positions import positions_in_owners
from dpp_lightning.trainer.strategies import refuse_shared_memory

Mask = Literal["random", "magnitude", "fisher", "gradient", "diff", "diff-struct"]
_BY_GRADIENTS, _BY_GATES = ("fisher", "gradient"), ("diff", "diff-struct")


class SparseTraining(pl.Callback):
    """Train a share of the entries of the model's tensors; all others keep the values of the base, bit for bit.

    The optimizer gets the trained entries in the place of the parameters, so that its state (moments, AdamR's θ0) is of
    their size. Module, checkpoints and evaluation are as in any fit; gradients are dense. Beside it,
    ``DeltaPruneCallback`` with the same rate, seed and scope saves all of them: ``random-drop`` for ``mask="random"``,
    which stores no positions, else ``magnitude``.

    Weight decay of AdamW and Adam pulls the trained entries toward zero; AdamR pulls them toward the base.

    ``diff`` and ``diff-struct`` are diff pruning (Guo et al., https://arxiv.org/abs/2012.07463): for a share of the
    steps every entry has a delta with a gate, which takes five further numbers an entry, then the largest gated deltas
    are kept and trained on with the mask fixed. If the training ends before, the mask is fixed at its end.

    Args:
        mask: which entries are trained. ``random``: those that ``dare`` keeps at this rate and seed; ``magnitude``: the
            largest weights; ``fisher``: those of the largest mean squared gradient over a few training batches;
            ``gradient``: those of the largest absolute mean gradient there; ``diff``: those of the largest delta that
            gates leave; ``diff-struct``: the same with a gate for each tensor beside those of its entries.
        pruning_rate: fraction of the entries that is not trained, in [0, 1).
        seed: of the random mask and of the gates, an integer >= 0.
        batches: how many training batches the gradients are taken on, 1 or more.
        budget: whether a mask by values counts its entries in each ``tensor`` or over the whole ``model``. Over the
            model some tensors may get none, which ``magnitude`` does not count when it saves the delta: give it a rate
            that is lower by their share.
        gate_share: share of the training's steps in which gates are learned, in (0, 1).
        l0_weight: weight of the penalty on each entry whose gate is expected to be open, in [0, ∞).
        gate_lr: learning rate of the gates, above 0.
        scope: of ``all`` floating-point tensors, or only of the ``linear`` maps inside the model's blocks.
        include: glob patterns on canonical names; if given, only of matching tensors.
        exclude: glob patterns on canonical names of tensors of which no share is taken.
        outside: a tensor outside the scope is trained whole (``carry``) or not at all (``revert``).
        carry: glob patterns on canonical names of tensors that are trained whole. New heads are.
        blocks: where the model's blocks are, for ``linear``, if names do not tell.

    Attributes:
        num_kept: how many entries are trained of the tensors of which a share is taken, once the fit has begun.
        num_entries: how many entries these tensors have.

    Raises:
        RuntimeError: at the first step, if a gradient is sparse.
        ValueError: at construction or before the first step, if a setting is outside its range; parameters are in
            shards, quantised or of a LoRA adapter; the module optimises manually; a gradient scaler is used
            (``16-mixed``); another callback adds parameters to the optimizer, or averages weights beside gates; the
            optimizer does not treat each entry by itself; gradients are to be taken on a stream, or gates to be learned
            in a training of no known length; or the checkpoint to resume is of another training.
    """

    def __init__(
        self,
        mask: Mask = "random",
        pruning_rate: float = 0.995,
        seed: int = 0,
        batches: int = 8,
        budget: Budget = "tensor",
        gate_share: float = 0.5,
        l0_weight: float = 1.25e-7,
        gate_lr: float = 0.1,
        scope: Literal["all", "linear"] = "all",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outside: Literal["carry", "revert"] = "carry",
        carry: Sequence[str] = (),
        blocks: Sequence[str] = (),
    ) -> None:
        for name, value, choices in (("mask", mask, get_args(Mask)), ("budget", budget, get_args(Budget))):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")
        if not (0 < gate_share < 1 and 0 <= l0_weight < float("inf") and 0 < gate_lr < float("inf")):
            raise ValueError(
                "gate_share must be in (0, 1), l0_weight in [0, ∞) and gate_lr above 0, got "
                f"{gate_share}, {l0_weight} and {gate_lr}"
            )
        exact_rate(pruning_rate)
        stream_key("", seed)
        self.mask, self.pruning_rate, self.seed = mask, pruning_rate, seed
        self.batches, self.budget = batches, budget
        self.gate_share, self.l0_weight, self.gate_lr = gate_share, l0_weight, gate_lr
        self.scope = Scope.of(scope, include, exclude, outside, carry, blocks)
        self._forget_fit()

    def _forget_fit(self) -> None:
        self.num_kept = self.num_entries = 0
        self._positions: dict[str, Tensor] | None = None  # by canonical name, of the tensors of which a share is taken
        self._kept: KeptParameters | None = None
        self._gates: DiffGates | None = None  # until the mask is fixed
        self._gates_state: dict[str, Any] | None = None  # of a checkpoint
        self._gate_steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check trainer and module."""
        if stage == "fit":
            self._forget_fit()
            _check_trainer(trainer, pl_module)
            _check_callbacks(trainer, self.mask)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the trained entries, before the optimizer's state is restored; by gradients, once there is data."""
        check_prunable(canonical_tensors(pl_module))
        if find_adapter(pl_module) is not None:
            raise ValueError(
                "SparseTraining trains entries of the model's own weights, and this module trains a LoRA adapter: take "
                "one of both"
            )
        if self.mask in _BY_GATES and self._positions is None:
            self._begin_gates(trainer, pl_module)
        elif self._positions is not None or self.mask not in _BY_GRADIENTS:
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the entries by gradients."""
        if self._kept is None and self._gates is None:
            self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Fix the mask once the gates have had their steps."""
        if self._gates is not None and trainer.global_step >= self._gate_steps:
            self._fix_mask(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the mask of a training that ended early."""
        if self._gates is not None:
            rank_zero_warn(
                f"the training ended after {trainer.global_step} steps, and gates are learned in {self._gate_steps}: "
                "the largest deltas are kept as they are, without training on; lower gate_share"
            )
            self._fix_mask(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate with mean gates."""
        if self._gates is not None:
            self._gates.write(mean=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train on with the gates drawn for the step."""
        if self._gates is not None:
            self._gates.write()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Hand the optimizer the gradients of the trained entries, which the trainer may then clip."""
        trained = self._gates or self._kept
        assert trained is not None
        trained.gather_gradients()

    def state_dict(self) -> dict[str, Any]:
        """The settings and, but for a mask by seed, the trained positions, or the gates while they are learned."""
        positions = {} if self.mask == "random" or self._positions is None else self._positions
        state = {"settings": self._identity(), "positions": {n: _narrow(p) for n, p in positions.items()}}
        return state if self._gates is None else state | {"gates": self._gates.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The positions of the training that is resumed.

        Raises:
            ValueError: its settings were others.
        """
        before, now = state_dict["settings"], self._identity()
        if other := [f"{name}={before[name]!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]:
            raise ValueError(
                f"the checkpoint is of a training with other settings of SparseTraining ({'; '.join(other)}): resume "
                "it with its own"
            )
        self._gates_state = state_dict.get("gates")
        if self.mask != "random" and self._gates_state is None:
            self._positions = {name: positions.long() for name, positions in state_dict["positions"].items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume a training of all entries."""
        if trainer.state.fn == TrainerFn.FITTING and self.state_key not in checkpoint.get("callbacks", {}):
            raise ValueError(
                "the checkpoint to resume is of a training without SparseTraining, which changed other entries: leave "
                "ckpt_path out, or the callback"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the optimizer."""
        for trained in (self._kept, self._gates):
            if trained is not None:
                trained.release()
        self._kept = self._gates = None

    def _identity(self) -> dict[str, Any]:
        """What a resumed training must have in common with the checkpoint's."""
        scope = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.scope).items()}
        settings = {"mask": self.mask, "pruning_rate": float(self.pruning_rate), **scope}
        settings |= {} if self.mask == "random" else {"budget": self.budget}
        settings |= {"seed": self.seed} if self.mask in ("random", *_BY_GATES) else {}
        gates = {"gate_share": self.gate_share, "l0_weight": self.l0_weight, "gate_lr": self.gate_lr}
        return settings | (gates if self.mask in _BY_GATES else {})

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the trained entries into the optimizer."""
        shared, fates = self._shared(trainer, module)
        if self._positions is None:
            self._positions = self._chosen(trainer, shared) if shared else {}
        _check_names(self._positions, shared)
        self._kept = KeptParameters(trainer.optimizers[0], _in_owners(module, fates, self._positions))
        self.num_kept, self.num_entries = self._kept.num_kept, self._kept.num_entries
        rank_zero_info(f"SparseTraining ({self.mask}): {self.num_kept:,} of {self.num_entries:,} entries are trained")

    def _shared(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[list[NamedTensor], dict[str, Fate]]:
        """The trained tensors of which a share is taken, and what becomes of every tensor."""
        named = named_tensors(module)
        tensors = {n.name: n.tensor for n in named}
        scope = self.scope.carrying(new_names(module, trainer.optimizers) | buffer_names(module))
        fates = scope.fates(tensors, tensors)
        in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        if self._gates is not None:
            in_optimizer |= {id(p) for p in self._gates.parameters}
        trained = [n for n in named if all(id(owner) in in_optimizer for owner, _ in n.pieces)]
        return [n for n in trained if fates[n.name] == "prune" and n.owner.requires_grad], fates

    def _begin_gates(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put deltas with gates into the optimizer."""
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(f"mask={self.mask!r} needs to know how long the training is: set max_steps or max_epochs")
        self._gate_steps = max(int(steps * self.gate_share), 1)
        shared, fates = self._shared(trainer, module)
        owners = [owner for n in shared for owner, _ in n.pieces]
        reverted = [owner for n in named_tensors(module) if fates[n.name] == "revert" for owner, _ in n.pieces]
        self._gates = DiffGates(
            trainer.optimizers[0], owners, self.l0_weight, self.gate_lr, groups=self.mask == "diff-struct",
            seed=self.seed, untrained=[owner for owner in reverted if not any(owner is gated for gated in owners)],
        )  # fmt: skip
        if self._gates_state is not None:
            self._gates.load_state_dict(self._gates_state)
            self._gates_state = None
        rank_zero_info(f"SparseTraining ({self.mask}): gates are learned in {self._gate_steps} of {int(steps)} steps")

    def _fix_mask(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the largest gated deltas, and train on these entries alone."""
        assert self._gates is not None
        scores_of = self._gates.scores()
        shared, fates = self._shared(trainer, module)
        scores = {n.name: n.of(scores_of) for n in shared}
        self._positions = trainer.strategy.broadcast(highest_positions(scores, self.pruning_rate, self.budget))
        self._gates.finish(_in_owners(module, fates, self._positions))
        self._gates = None
        self._begin(trainer, module)

    def _chosen(self, trainer: pl.Trainer, named: Sequence[NamedTensor]) -> dict[str, Tensor]:
        """The trained positions by canonical name, the same on all ranks."""
        if self.mask == "random":
            return random_positions({n.name: n.tensor for n in named}, self.pruning_rate, self.seed)
        if self.mask == "magnitude":
            scores = {n.name: n.tensor.detach() for n in named}
            return highest_positions(scores, self.pruning_rate, self.budget)
        owners = {id(owner): owner for n in named for owner, _ in n.pieces}
        gradients = mean_gradients(trainer, list(owners.values()), self.batches, squared=self.mask == "fisher")
        scores = {n.name: n.of(gradients) for n in named}
        chosen = highest_positions(scores, self.pruning_rate, self.budget)
        return trainer.strategy.broadcast(chosen)  # rounding could make the ranks' own ones differ


def _check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what SparseTraining does not work with.

    Raises:
        ValueError: parameters in shards, manual optimization, a gradient scaler, or ranks that share memory.
    """
    name = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(f"SparseTraining needs whole parameters, and {name} shards them: take trainer.strategy ddp")
    if not module.automatic_optimization:
        raise ValueError(
            f"SparseTraining needs automatic optimization with one optimizer, and {type(module).__name__} optimises "
            "manually: set automatic_optimization to True, or leave the callback out"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "SparseTraining does not work with a gradient scaler (16-mixed), which looks at the gradients before they "
            "are gathered: take precision bf16-mixed or 32-true"
        )
    refuse_shared_memory(trainer)
    if is_overridden("configure_gradient_clipping", module):
        rank_zero_warn(
            f"{type(module).__name__} clips gradients itself: beside SparseTraining those of the trained entries "
            "are in optimizer.param_groups, and self.parameters() has none"
        )


def _check_callbacks(trainer: pl.Trainer, mask: Mask) -> None:
    """Refuse callbacks that change which entries are trained.

    Raises:
        ValueError: one that adds parameters to the optimizer, or beside gates one that averages weights.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = (WeightAveraging, StochasticWeightAveraging) if mask in _BY_GATES else ()
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, averages):
            raise ValueError(
                f"{name} averages weights from before the mask is fixed too, so that mask={mask!r} would leave a dense "
                "delta: take another mask, or leave one callback out"
            )
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"{name} adds parameters to the optimizer while it trains, and SparseTraining takes their entries "
                "before: leave one out; exclude= with outside='revert' trains the others alone"
            )


def _in_owners(
    module: pl.LightningModule, fates: dict[str, Fate], positions: dict[str, Tensor]
) -> dict[Tensor, Tensor]:
    """The trained flat positions of every parameter that is not trained whole."""
    named = [n for n in named_tensors(module) if not (n.whole and fates[n.name] == "carry")]
    whole = {n.name: torch.arange(n.tensor.numel()) for n in named if fates[n.name] == "carry"}
    return positions_in_owners(named, {**positions, **whole})


def _check_names(positions: dict[str, Tensor], named: Sequence[NamedTensor]) -> None:
    """Refuse positions of another model's checkpoint."""
    if other := positions.keys() ^ {n.name for n in named}:
        raise ValueError(
            f"the checkpoint's trained entries are of other tensors, {len(other)} of them such as {min(other)}: resume "
            "it with the module that it was trained with"
        )


def _narrow(positions: Tensor) -> Tensor:
    """Flat positions in four bytes each where they fit."""
    fits = not len(positions) or int(positions[-1]) < 2**31
    return positions.to(torch.int32) if fits else positions
