"""Cost of calibration: the scalar search for q against the released grid, the closed-form layer q against the scan.

Run by hand: python tests/benchmarks/bench_calibration.py --pretrained ENCODER --checkpoint last.ckpt --data GLUE
[--task sst2] [--pruning_rate 0.99]. The checkpoint is one of ``dpp fit`` on that task. Both searches see the same model
and the same batch of the calibration split and minimise the change of the logits; the score is that of the validation
split. The grid is a twin of the published search: q in steps of 0.1 until 4 misses in a row, then in steps of 0.01 around
the best, every candidate the mean over 4 masks less one outlier, all weights rewritten for each.
"""

import argparse
import time
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor

from dpp_lightning.calibration.calibration_data import Objective
from dpp_lightning.calibration.fit_rescaling import Calibrator
from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.calibration.layer_q import layer_sums
from dpp_lightning.calibration.output_change import output_change
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.rescaling import layer_q, phi
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule
from dpp_lightning.tensors.names import canonical_tensors

MASKS, MISSES, SAMPLES = 4, 4, 64


def models(options):
    data = GLUEDataModule(options.task, path=options.data, tokenizer=options.pretrained)
    data.setup()
    base, tuned = (GLUEModule(options.task, options.pretrained).eval() for _ in range(2))
    tuned.load_state_dict(torch.load(options.checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    for name in tuned.new_parameter_names:
        base.get_parameter(name).data.copy_(tuned.get_parameter(name))
    return base, tuned, data


@torch.no_grad()
def outputs(module, batch) -> list[Tensor]:
    return [module(batch)]


@torch.no_grad()
def score(module, data) -> float:
    scores = module.scores("val")
    scores.reset()
    for batch in data.val_dataloader():
        module.score_batch("val", batch)
    return float(scores.compute()["score"])


class ReleasedGrid:
    """A twin of the published search for q."""

    def __init__(self, base, tuned, batch, rate, scope) -> None:
        self.target, self.batch, self.rate = base, batch, rate
        self.reference = outputs(tuned, batch)
        held, finetuned = canonical_tensors(base), canonical_tensors(tuned)
        self.theta = {n: t.detach().clone() for n, t in held.items() if t.is_floating_point() and n not in scope.carry}
        self.delta = {n: finetuned[n].detach() - t for n, t in self.theta.items()}
        g = torch.Generator().manual_seed(0)
        self.masks = [
            {n: torch.rand(d.shape, generator=g) >= rate for n, d in self.delta.items()} for _ in range(MASKS)
        ]
        self.held, self.forwards = held, 0

    @torch.no_grad()
    def cost(self, q: float) -> float:
        changes = []
        for mask in self.masks:
            for name, theta in self.theta.items():
                self.held[name].copy_(theta + self.delta[name] * mask[name] / q)
            changes.append(output_change(self.reference, outputs(self.target, self.batch)))
            self.forwards += 1
        centre = median(changes)
        changes.remove(max(changes, key=lambda c: abs(c - centre)))
        return mean(changes)

    def walk(self, candidates) -> float:
        best, best_cost, missed = None, float("inf"), 0
        for q in candidates:
            cost = self.cost(q)
            missed = missed + 1 if cost >= best_cost else 0
            if cost < best_cost:
                best, best_cost = q, cost
            if missed >= MISSES:
                break
        return best

    def search(self) -> float:
        keep = round(1 - self.rate, 6)
        coarse = self.walk([keep, *(k / 10 for k in range(1, 11) if k / 10 > keep)])
        fine = [coarse + k / 100 for k in range(-10, 11)]
        best = self.walk([q for q in fine if keep <= q <= 1])
        with torch.no_grad():
            for name, theta in self.theta.items():
                self.held[name].copy_(theta)
        return best


def scan(c: Tensor, p: float, eta: float) -> float:
    """A twin of the published per-layer q: 989 candidates, the sums taken anew for each, the mean over rows."""
    best = []
    for row in c:
        values = [
            eta * (1 - (1 - p) / q) * row.sum().abs() + eta**2 * phi(p) * row.square().sum() / (4 * q**2)
            for q in np.linspace(1 - p, 1, 989)
        ]
        best.append(np.linspace(1 - p, 1, 989)[int(torch.stack(values).argmin())])
    return float(np.mean(best))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--pruning_rate", type=float, default=0.99)
    options = parser.parse_args()
    rate = options.pruning_rate
    base, tuned, data = models(options)
    loader = data.calibration_dataloader()
    batch = loader.collate_fn([loader.dataset[i] for i in range(SAMPLES)])
    scope = Scope().carrying(n.removeprefix("model.") for n in tuned.new_parameter_names)
    with collected_inputs(tuned) as collector:
        reference = outputs(tuned, batch)
    plan = PruningPlan.of(base, tuned, scope).with_inputs(collector.statistics)
    delta = plan.draw(PruningSpec("darex-q", rate))

    def change(candidate) -> float:
        with candidate.applied(base, force=True):
            return output_change(reference, outputs(base, batch))

    start = time.perf_counter()
    fit = Calibrator(plan.pairs, Objective(change)).fit(delta)
    scalar_seconds, q = time.perf_counter() - start, fit.apply(delta).q
    grid = ReleasedGrid(base, tuned, batch, rate, scope)
    start = time.perf_counter()
    grid_q = grid.search()
    grid_seconds = time.perf_counter() - start
    rows = []
    for name, value in (("scalar search", q), ("released grid", grid_q)):
        scores = []
        for seed in range(MASKS):
            with plan.draw(PruningSpec("darex-q", rate, seed)).rescaled(value).applied(base, force=True):
                scores.append(score(base, data))
        rows.append((name, value, change(delta.rescaled(value)), mean(scores)))
    for (name, value, cost, got), seconds, forwards in zip(
        rows, (scalar_seconds, grid_seconds), (len(fit.tried), grid.forwards), strict=True
    ):
        print(
            f"{name}: q = {value:.4f}, change {cost:.4f}, score {got:.4f} over {MASKS} masks, {forwards} forwards, {seconds:.1f} s"
        )
    print(f"the grid takes {grid_seconds / scalar_seconds:.1f} times as long")

    name = max((n for n in layer_sums(plan.pairs).of_weight), key=lambda n: plan.finetuned[n].numel())
    c = (plan.finetuned[name].detach() - plan.base[name].detach()).double() * plan.inputs[name].mean
    rows_used = 64  # of the scan; its time is that of these rows times all rows
    start = time.perf_counter()
    for _ in range(20):
        closed = layer_q(c[:rows_used].sum(1), c[:rows_used].square().sum(1), rate, 1.0)
    fast = (time.perf_counter() - start) / 20
    start = time.perf_counter()
    slow_q = scan(c[:rows_used], rate, 1.0)
    slow = time.perf_counter() - start
    print(
        f"{name}, {rows_used} rows: closed form q = {closed:.4f}, scan {slow_q:.4f}; the scan takes {slow / fast:,.0f} times as long"
    )


if __name__ == "__main__":
    main()
