"""Score over the true bytes of a delta, for every method with and without data. Run by hand.

    python tests/benchmarks/bench_frontier.py run --base ENCODER --data GLUE --output rows.jsonl sst2-adamw=FOLDER ...
    python tests/benchmarks/bench_frontier.py table --output rows.jsonl
    python tests/benchmarks/bench_frontier.py plot --output rows.jsonl --model sst2-adamw --picture frontier.png
    python tests/benchmarks/bench_frontier.py plot --output rows.jsonl --over texts --picture texts.png

Every checkpoint is a classifier folder of transformers whose label begins with its GLUE task. A form is pruned as ``dpp
prune`` does it, the head carried, and scored on GLUE's whole validation split. Texts are drawn from the train split,
others for every seed. Rows that the output has are not made again.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import torch
from safetensors.torch import load_file

from dpp_lightning import SparseDelta
from dpp_lightning.analysis.delta_cost import inspect_delta
from dpp_lightning.cli.prune import prune_to_folder
from dpp_lightning.tasks.common.dataset_source import load_data
from dpp_lightning.tasks.glue.scores import GLUEScores
from dpp_lightning.tasks.glue.task_table import TASKS

DATA_FREE = {
    "dare": [{"pruning_rate": rate} for rate in (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)],
    "dare, int2": [
        {"method": "dare", "pruning_rate": rate, "dtype": "int2"} for rate in (0.9, 0.95, 0.98, 0.99, 0.995)
    ],
    "magnitude": [{"pruning_rate": rate} for rate in (0.98, 0.99, 0.995, 0.998, 0.999)],
    "importance": [{"pruning_rate": rate, "q": 1 - rate} for rate in (0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)],
    "lowrank": [{"settings": [f"rank={rank}"]} for rank in (1, 2, 3, 4, 6, 8, 16)],
    "lowrank and a rest": [
        {"method": "lowrank", "settings": [f"rank={rank}", f"rest={rest}"]}
        for rank, rest in ((2, 0.97), (4, 0.97), (4, 0.94), (4, 0.9))
    ],
}
WITH_TEXTS = {
    "darex-q": [{"pruning_rate": rate} for rate in (0.99, 0.998, 0.999)],
    "darex-q, int2": [{"method": "darex-q", "pruning_rate": rate, "dtype": "int2"} for rate in (0.99, 0.995, 0.998)],
    "importance, q found": [{"method": "importance", "pruning_rate": rate} for rate in (0.99, 0.998, 0.999, 0.9995)],
    "refit": [{"pruning_rate": rate} for rate in (0.9995, 0.999, 0.998, 0.995)],
    "refit, int2": [
        {"method": "refit", "pruning_rate": rate, "dtype": "int2"} for rate in (0.9995, 0.999, 0.998, 0.995)
    ],
    "lowrank, trained": [
        {"method": "lowrank", "settings": [f"rank={rank}", "factors_dtype=int2"]} for rank in (1, 2, 4, 8)
    ],
    "auto": [{"max_bytes": size} for size in ("30kB", "50kB", "110kB", "240kB")],
}
FORMS = DATA_FREE | WITH_TEXTS
SEEDLESS = ("magnitude", "lowrank")
MARKED = {"1 bit an entry of the linear maps": 1.33e6, "224 times smaller than the model": 0.406e6}  # published


class Checkpoint:
    """A fine-tuned classifier, its base, and its data."""

    def __init__(self, options, label: str, folder: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        task = label.split("-")[0]
        self.folder, self.base, self.task = folder, options.base, TASKS[task]
        self.tokenizer = AutoTokenizer.from_pretrained(options.base)
        self.model = AutoModelForSequenceClassification.from_pretrained(options.base, num_labels=self.task.num_labels)
        self.model.eval()
        data = load_data(options.data, task)
        self.train, self.batches = data["train"], list(self._batches(data["validation"]))

    def _batches(self, rows, size=64):
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][self.task.columns[0]]))
        for start in range(0, len(rows), size):
            some = [rows[i] for i in order[start : start + size]]
            texts = [[row[column] for row in some] for column in self.task.columns]
            tokens = self.tokenizer(*texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
            yield tokens, torch.tensor([row["label"] for row in some])

    def texts(self, folder: Path, count: int, seed: int) -> str:
        """A file of that many texts of the train split, other ones for every seed."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1000 + seed))[:count].tolist()
        lines = ["\t".join(self.train[i][column].strip() for column in self.task.columns) for i in order]
        path = folder / ("texts.tsv" if len(self.task.columns) > 1 else "texts.txt")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    @torch.inference_mode()
    def score(self) -> float:
        """The task's score of the model as it stands, in per cent."""
        scores = GLUEScores(self.task)
        for tokens, labels in self.batches:
            scores.update(self.model(**tokens).logits, labels)
        return 100 * float(scores.compute()["score"])

    def unpruned(self) -> float:
        """The fine-tuned model's score."""
        state = load_file(Path(self.folder, "model.safetensors"))
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(state)
        found = self.score()
        self.model.load_state_dict(before)
        return found

    def measure(self, form: str, settings: dict, texts: int, seed: int) -> dict:
        """Prune in one form and score it."""
        with tempfile.TemporaryDirectory() as place:
            call = {"method": form, **settings, "seed": seed, "carry": ["classifier*"], "weights_only": True}
            if texts:
                call |= {"calibration": self.texts(Path(place), texts, seed), "calibration_samples": texts}
            wall, cpu = time.perf_counter(), time.process_time()
            prune_to_folder(self.base, self.folder, output=str(Path(place, "delta")), **call)
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            size = inspect_delta(Path(place, "delta")).total
            delta = SparseDelta.from_pretrained(Path(place, "delta"))
            with delta.applied(self.model):
                return {"bytes": size, "score": self.score(), **spent, "training": delta.info.training}


def run(options) -> None:
    output = Path(options.output)
    rows = _rows(output)
    known = {json.dumps([row[k] for k in ("model", "form", "settings", "texts", "seed")]) for row in rows}
    for word in options.checkpoints:
        label, folder = word.split("=", 1)
        point = Checkpoint(options, label, folder)
        wanted = [("unpruned", {}, 0, 0)] + [
            (form, _with(settings, options.settings), texts, seed)
            for form in options.forms
            for texts in (options.texts if form in WITH_TEXTS else [0])
            for settings in FORMS[form]
            if not options.only or any(word in json.dumps(settings) for word in options.only)
            for seed in (options.seeds if form not in SEEDLESS else [0])
        ]
        for form, settings, texts, seed in wanted:
            key = {"model": label, "form": form, "settings": settings, "texts": texts, "seed": seed}
            if json.dumps(list(key.values())) in known:
                continue
            found = {"score": point.unpruned()} if form == "unpruned" else point.measure(form, settings, texts, seed)
            with output.open("a") as file:
                file.write(json.dumps({**key, **found}) + "\n")


def _with(settings: dict, more: list[str]) -> dict:
    """A form's settings with further ones of its method."""
    return {**settings, "settings": [*settings.get("settings", []), *more]} if more else settings


def table(options) -> None:
    """Mean and deviation over seeds as Markdown."""
    groups = defaultdict(list)
    for row in _rows(Path(options.output)):
        groups[row["model"], row["form"], json.dumps(row["settings"]), row["texts"]].append(row)
    print("| model | form | settings | texts | seeds | kB | score | CPU s |\n|---|---|---|---|---|---|---|---|")
    for (model, form, _, texts), rows in sorted(groups.items()):
        words = " ".join(str(v) if k == "settings" else f"{k}={v:g}" if isinstance(v, float) else f"{v}"
                         for k, v in rows[0]["settings"].items() if k not in ("method", "q"))  # fmt: skip
        scores = [row["score"] for row in rows]
        spread = f" ({stdev(scores):.1f})" if len(scores) > 1 else ""
        size = f"{fmean(row['bytes'] for row in rows) / 1000:.1f}" if "bytes" in rows[0] else ""
        cpu = f"{fmean(row['cpu'] for row in rows):.0f}" if "cpu" in rows[0] else ""
        print(f"| {model} | {form} | {words} | {texts} | {len(rows)} | {size} | {fmean(scores):.1f}{spread} | {cpu} |")


def plot(options) -> None:
    """Score over bytes, one line a form, with the fine-tuned model's score and published sizes; or over texts."""
    from matplotlib import pyplot

    if options.over == "texts":
        plot_texts(options, pyplot)
        return
    rows = [row for row in _rows(Path(options.output)) if row["model"] == options.model]
    unpruned = next(row["score"] for row in rows if row["form"] == "unpruned")
    points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "bytes" in row:
            points[row["form"]][json.dumps(row["settings"])].append(row)
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    axes.set_prop_cycle(color=[*pyplot.colormaps["tab10"].colors, "black", "gold"])
    for form, groups in points.items():
        drawn = sorted(map(_point, groups.values()))
        ours = form in ("auto", "refit") or "lowrank" in form
        style = {"lw": 2.2, "marker": "o"} if ours else {"lw": 1, "marker": "."}
        axes.errorbar(*zip(*drawn, strict=True), label=form, **style)
    axes.axhline(unpruned, color="black", lw=1, ls="--", label=f"fine-tuned, {options.dense_bytes / 1e6:.1f} MB dense")
    for name, size in MARKED.items():
        axes.axvline(size / 1000, color="grey", lw=0.8, ls=":")
        axes.annotate(name, (size / 1000, axes.get_ylim()[0]), rotation=90, fontsize=7, ha="right", va="bottom")
    axes.set(xscale="log", ylabel="score, %", xlabel="kB of the delta")
    ticks = (10, 30, 100, 300, 1000, 3000)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.tick_params(axis="x", which="minor", length=0)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(options.picture, dpi=150)


def plot_texts(options, pyplot) -> None:
    """Score over the number of calibration texts, a picture for each model, a line for each form."""
    lines = defaultdict(lambda: defaultdict(list))
    unpruned = {row["model"]: row["score"] for row in _rows(Path(options.output)) if row["form"] == "unpruned"}
    for row in _rows(Path(options.output)):
        if row["texts"] and row["model"] in unpruned:
            lines[row["model"]][row["form"], json.dumps(row["settings"])].append(row)
    figure, axes = pyplot.subplots(1, len(lines), figsize=(4.2 * len(lines), 3.4), layout="constrained", squeeze=False)
    for place, (model, forms) in zip(axes[0], lines.items(), strict=True):
        for (form, _), rows in forms.items():
            size = fmean(row["bytes"] for row in rows) / 1000
            label = f"{form.split(',')[0]} {_words(rows[0]['settings'])}, {size:.0f} kB"
            counts = sorted({row["texts"] for row in rows})
            scores = [fmean(row["score"] for row in rows if row["texts"] == count) for count in counts]
            place.plot(counts, scores, marker="o", ms=3, label=label)
        place.axhline(unpruned[model], color="black", lw=1, ls="--", label="fine-tuned")
        place.set(xscale="log", title=model, xlabel="calibration texts", ylabel="score, %")
        place.set_xticks(counts, [f"{count:,}" for count in counts])
        place.tick_params(axis="x", which="minor", length=0)
        place.legend(fontsize=7, loc="lower right")
    figure.savefig(options.picture, dpi=150)


def _words(settings: dict) -> str:
    """Settings of a form in short."""
    return " ".join(
        " ".join(v) if k == "settings" else f"{k}={v}" for k, v in settings.items() if k not in ("method", "q")
    )


def _point(rows: list[dict]) -> tuple[float, float, float]:
    """kB, mean score and its deviation over seeds."""
    scores = [row["score"] for row in rows]
    spread = stdev(scores) if len(scores) > 1 else 0.0
    return fmean(row["bytes"] for row in rows) / 1000, fmean(scores), spread


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument("checkpoints", nargs="*", metavar="LABEL=FOLDER")
    parser.add_argument("--base")
    parser.add_argument("--data")
    parser.add_argument("--output", required=True)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--only", nargs="+", help="settings that have one of these texts, such as 0.999")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--texts", nargs="+", type=int, default=[1024])
    parser.add_argument("--settings", nargs="+", default=[], help="further settings of the methods, such as loss=block")
    parser.add_argument("--over", choices=["bytes", "texts"], default="bytes", help="what is plotted over")
    parser.add_argument("--model")
    parser.add_argument("--dense_bytes", type=float, default=90.9e6)
    parser.add_argument("--picture")
    options = parser.parse_intermixed_args()
    {"run": run, "table": table, "plot": plot}[options.command](options)


if __name__ == "__main__":
    main()
