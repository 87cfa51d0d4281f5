"""dpp eval: lm-evaluation-harness on a dense causal language model, or on a base with a delta put onto it in memory."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpp_lightning._version import __version__
from dpp_lightning.cli.command import parser_of, run_command, say
from dpp_lightning.delta.apply_to_checkpoint import dense_side_files
from dpp_lightning.delta.reader import DeltaReader
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.delta.task_heads import of_task, task_names
from dpp_lightning.storage.atomic_write import atomic_file, check_writable
from dpp_lightning.storage.checkpoints import side_files
from dpp_lightning.tensors.names import canonical_names

_SHOWN = 5
_TOLD = ("method", "pruning_rate", "seed", "q", "base_fingerprint")  # of the delta, in the result
_SETTINGS = ("num_fewshot", "limit", "batch_size", "device", "log_samples", "apply_chat_template")


def evaluate(arguments: list[str]) -> int:
    """``dpp eval MODEL --tasks TASK … --output FILE.json``."""
    return run_command(_parser(), arguments, _evaluate)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "eval",
        "Score a causal language model with lm-evaluation-harness (pip install 'dpp_lightning[eval]'). With --delta "
        "the delta is put onto MODEL in memory, as dpp apply would write it.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder in Hugging Face's layout or a hub id")
    add("--delta", metavar="DIR", help="a delta folder or hub id whose base is MODEL")
    add("--task", metavar="NAME", help="of a merged delta, the task whose head is used")
    add("--tasks", nargs="+", required=True, metavar="T", help="the harness's tasks, groups, tags or patterns: gsm8k")
    add("--include-path", metavar="DIR", help="folder with task YAMLs of your own")
    add("--num-fewshot", type=int, metavar="N", help="worked examples in the prompt (default: the task's own)")
    add("--limit", type=int, metavar="N", help="only the first N examples of each task, for a quick look")
    add("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    add("--max-length", type=int, metavar="N", help="tokens of prompt and answer at most (default: the model's own)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: the checkpoint's)")
    add("--apply-chat-template", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--log-samples", action="store_true", help="also write every prompt and answer into the file")
    add("--output", required=True, metavar="FILE.json", help="the whole result; an older file is replaced")
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    _check(options)
    delta = read_delta(options.delta, options.task) if options.delta else None
    with side_folder(options.model, options.delta, options.task) as folder:
        tokenizer = load_tokenizer(folder, options.apply_chat_template)
        tasks = load_tasks([name for word in options.tasks for name in word.split(",") if name], options.include_path)
        model = load_model(options.model, delta, folder, options.dtype).to(options.device)
    result = _score(model, tokenizer, tasks, options)
    result["dpp"] = {"version": __version__, "model": options.model, "delta": options.delta, "task": options.task}
    if delta:
        result["dpp"] |= {name: getattr(delta.info, name) for name in _TOLD}
    with atomic_file(Path(options.output)) as temporary:
        text = json.dumps(result, indent=1, default=lambda o: o.item() if isinstance(o, np.generic) else str(o))
        temporary.write_text(text + "\n", encoding="utf-8")
    _show(result)
    asked = options.num_fewshot
    fixed = {task: used for task, used in result["n-shot"].items() if asked is not None and used != asked}
    if fixed:
        say(f"--num-fewshot {asked} is not used where a task fixes its own: {fixed}")
    say(f"{options.output}: the whole result")


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before anything is read, and set the device."""
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("max_length", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
    if options.task and not options.delta:
        raise ValueError(f"--task {options.task} chooses a task of a merged delta: give --delta DIR too, or leave it")
    if options.include_path and not Path(options.include_path).is_dir():
        raise FileNotFoundError(f"--include-path {options.include_path}: no such folder")
    if Path(options.output).is_dir():
        raise ValueError(f"--output {options.output} is a folder, expected a file such as {options.output}/eval.json")
    check_writable(Path(options.output).parent)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {options.device} cannot be used here ({reason}); try --device cpu") from error
    try:
        import lm_eval
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"dpp eval needs lm-evaluation-harness ({error}): pip install 'dpp_lightning[eval]'"
        ) from error


def load_tasks(names: Sequence[str], include_path: str | None) -> list[Any]:
    """The harness's task and group objects, their data read, so that what is missing is said before a model is loaded.

    Args:
        names: of tasks, groups or tags, or patterns such as ``mmlu_*``.
        include_path: folder with further task YAMLs.

    Raises:
        ValueError: unknown names, with near ones; a task that needs a further package or cannot be run here.
        OSError: the data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        near = {name: get_close_matches(name, manager.all_tasks, n=3) for name in unknown}
        hints = [f"{name!r}" + (f" (near: {', '.join(found)})" if found else "") for name, found in near.items()]
        raise ValueError(
            f"lm-evaluation-harness has no task {', '.join(hints) or 'without a name'}; "
            "`lm_eval ls tasks` lists all, --include-path DIR adds your own"
        )
    wanted = manager.match_tasks(list(names))
    try:
        loaded = manager.load(wanted)
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"{', '.join(wanted)} cannot be loaded by lm-evaluation-harness: {error} (a missing package comes with one "
            "of its extras, such as lm_eval[math])"
        ) from error
    for flag, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "has images or sound")):
        refused = [name for name, task in loaded["tasks"].items() if getattr(task, flag, False)]
        if refused:
            raise ValueError(f"{', '.join(refused[:_SHOWN])} {what}: use lm_eval itself on what dpp apply writes")
    groups = [group for name, group in loaded.get("groups", {}).items() if name in wanted]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)]


def _score(model: Any, tokenizer: Any, tasks: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # an object in place of a name is meant here, so the harness need not warn of it
    logging.getLogger(HFLM.__module__).addFilter(lambda record: "`pretrained`" not in str(record.msg))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=options.max_length)
    harness.pretrained = options.model  # by which the result names the commit
    for task in (leaf for item in tasks for leaf in (item.get_all_tasks() if hasattr(item, "child_names") else [item])):
        room = (task.config.generation_kwargs or {}).get("max_gen_toks", harness.max_gen_toks)
        if task.OUTPUT_TYPE == "generate_until" and room >= harness.max_length:
            raise ValueError(
                f"{task.task_name} writes up to {room} tokens, no room for a prompt within {harness.max_length}: raise "
                "--max-length, or lower max_gen_toks in a task YAML of your own"
            )
    settings = {key: getattr(options, key) for key in _SETTINGS}
    return lm_eval.simple_evaluate(model=harness, tasks=list(tasks), **settings)


def _show(result: Mapping[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "metric", "value", "stderr"):
        table.add_column(name, justify="right" if name in ("value", "stderr") else "left", overflow="fold")
    for task, scores in {**result["results"], **result.get("groups", {})}.items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = scores.get(f"{metric}_stderr,{kind}")
                label = metric if kind == "none" else f"{metric} ({kind})"
                table.add_row(task, label, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    Console().print(table)


def read_delta(folder: str, task: str | None) -> SparseDelta:
    """The delta, of a merged one as ``task`` uses it; refused here where a task must be chosen."""
    delta = SparseDelta.from_pretrained(folder)
    of_task(delta.info, delta.carried, task)
    return delta.for_task(task) if task else delta


@contextmanager
def side_folder(model: str, delta: str | None, task: str | None) -> Iterator[str]:
    """Where configuration and tokenizer are: the model's own place, or the files that ``dpp apply`` would write.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it has no ``config.json``.
    """
    if "config.json" not in side_files(model):
        raise ValueError(f"{model} has no config.json: expected a folder in Hugging Face's layout or a hub id")
    if delta is None:
        yield model
        return
    tasks = task_names(DeltaReader.open(delta).info)
    with TemporaryDirectory() as folder:
        for name, path in dense_side_files(model, None, delta, None, tasks, task).items():
            (Path(folder) / name).write_bytes(path.read_bytes())
        yield folder


def load_tokenizer(folder: str, chat: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat and not tokenizer.chat_template:
        raise ValueError("--apply-chat-template: the tokenizer has no chat template; leave the option out")
    return tokenizer


def load_model(source: str, delta: SparseDelta | None, folder: str, dtype: str | None) -> Any:
    """A causal language model, with the delta put onto it in the checkpoint's own dtype and only then cast.

    Args:
        source: folder or hub id of the base, or of a dense model where there is no delta.
        delta: put on for good, since the model is not used as a base again.
        folder: as :func:`side_folder` gives it.
        dtype: of the weights; None for the one that the configuration names.

    Raises:
        ValueError: a delta of another base, or weights without the tensors of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    own, config = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(folder)
    final, rows = dtype or config.dtype, config.get_text_config().vocab_size
    if delta is not None:  # the base as it is: the delta is checked against its values and may add rows
        config.dtype, config.get_text_config().vocab_size = own.dtype, own.get_text_config().vocab_size
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype if dtype and delta is None else "auto", output_loading_info=True
    )
    model, carried = loaded[0], delta.carried if delta else {}
    canonical = canonical_names(model)
    missing = sorted(name for name in loaded[1]["missing_keys"] if canonical.get(name) not in carried)
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}: expected a causal "
            "language model (a classifier is scored by dpp test)"
        )
    if delta is None:
        return model
    if model.get_input_embeddings().num_embeddings != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    delta.apply_(model)
    for parameter in [p for p in model.parameters() if final and p.dtype == model.dtype]:
        parameter.data = parameter.data.to(getattr(torch, str(final).removeprefix("torch.")))
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
