"""dpp eval: lm-evaluation-harness on a dense causal language model, or on a base with a delta put onto it in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from dpp_lightning._version import __version__
from dpp_lightning.cli.command import FunctionCommand, say
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.experiments.terminal_tables import Column, show_table
from dpp_lightning.storage.atomic_write import atomic_file, check_writable
from dpp_lightning.storage.checkpoints import common_dtype
from dpp_lightning.storage.locate import not_found
from dpp_lightning.storage.model_folder import copy_files, dense_side_files, side_files
from dpp_lightning.storage.output_file import check_output_file
from dpp_lightning.storage.quiet_loading import without_load_report
from dpp_lightning.storage.source_kind import check_delta, check_model
from dpp_lightning.storage.tokenizer_files import check_vocabulary, read_tokenizer
from dpp_lightning.tensors.devices import usable_device
from dpp_lightning.tensors.names import canonical_names

_SHOWN = 5
_ORDER = "dpp eval MODEL --delta DELTA"
_OF_DELTA = ("method", "pruning_rate", "seed", "q", "base_fingerprint")  # of the delta, in the result


def evaluate_model(
    model: str,
    *,
    tasks: Sequence[str],
    output: str,
    overwrite: bool = False,
    log_samples: bool = False,
    delta: str | None = None,
    task: str | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    device: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> None:
    """Score a causal language model with lm-evaluation-harness, which pip install 'dpp_lightning[eval]' brings.

    With --delta the delta is put onto MODEL in memory, as dpp apply would write it.

    Args:
        model: a folder in Hugging Face's layout or a hub id
        tasks: the harness's tasks, groups, tags or patterns, such as gsm8k
        output: JSON file for the whole result; a new one, or see --overwrite
        overwrite: replace an earlier result in that file once the new one is complete; any other file is refused all
            the same
        log_samples: also write every prompt and answer into the file
        delta: a delta folder or hub id whose base is MODEL
        task: of a merged delta, the task whose head is used
        dtype: of the weights; null for the checkpoint's, with a delta that of its files, of several the wider
        device: cpu, cuda, cuda:1; null for cuda where there is one
        batch_size: examples at a time
        max_length: tokens of prompt and answer at most; null for the model's own limit
        include_path: folder with task YAMLs of your own
        num_fewshot: worked examples in the prompt; null for the task's own number
        limit: only the first examples of each task, for a quick look; null for all
        apply_chat_template: put prompts into the tokenizer's chat template
    """
    at_least = {"num_fewshot": (num_fewshot, 0), "limit": (limit, 1), "batch_size": (batch_size, 1)}
    _check_numbers({**at_least, "max_length": (max_length, 2)})
    _check_paths(delta, task, include_path)
    check_output_file(output, "results of dpp eval", _is_result, overwrite=overwrite)
    check_writable(Path(output).parent)
    device = usable_device(device)
    _check_harness()
    check_model(model, "MODEL", order=_ORDER, config=True)
    if delta:
        check_delta(delta, "--delta")
    sparse_delta = read_delta(delta, task) if delta else None
    with side_folder(model, delta, task) as folder:
        tokenizer = load_tokenizer(model, folder, apply_chat_template)
        loaded_tasks = load_tasks([name for word in tasks for name in word.split(",") if name], include_path)
        loaded = load_model(model, sparse_delta, folder, dtype).to(device)
    harness = _make_harness(model, loaded, tokenizer, loaded_tasks, batch_size, max_length)
    result = _score(
        harness,
        loaded_tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        log_samples=log_samples,
        apply_chat_template=apply_chat_template,
    )
    result["dpp"] = {"version": __version__, "model": model, "delta": delta, "task": task}
    if sparse_delta:
        result["dpp"] |= {name: getattr(sparse_delta.info, name) for name in _OF_DELTA}
    _write(result, Path(output))
    _show(result)
    fixed = {name: used for name, used in result["n-shot"].items() if num_fewshot is not None and used != num_fewshot}
    if fixed:
        say(f"--num_fewshot {num_fewshot} is not used where a task fixes its own: {fixed}")
    say(f"{output}: the whole result")


COMMAND = FunctionCommand(
    evaluate_model,
    example="dpp eval BASE --delta DELTA --tasks gsm8k --output gsm8k.json",
    groups={
        "what is scored and written": "tasks",
        "the model": "delta",
        "how it is run": "device",
        "the tasks": "include_path",
    },
)


def _check_numbers(numbers: Mapping[str, tuple[int | None, int]]) -> None:
    """Refuse an option's number below its least value."""
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}, expected {least} or more")


def _check_paths(delta: str | None, task: str | None, include_path: str | None) -> None:
    """Refuse what can be known to be wrong of paths, before anything is read."""
    if task and not delta:
        raise ValueError(f"--task {task} chooses a task of a merged delta: give --delta DELTA too, or leave it")
    if include_path and not Path(include_path).is_dir():
        raise not_found(include_path, "folder", "--include_path")


def _is_result(file: Path) -> bool:
    """Whether a file is one that :func:`evaluate_model` wrote."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"results", "dpp"} <= set(content)


def _check_harness() -> None:
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
        hints = [f"{name!r}" + (f" (near: {', '.join(names)})" if names else "") for name, names in near.items()]
        raise ValueError(
            f"lm-evaluation-harness has no task {', '.join(hints) or 'without a name'}; "
            "`lm_eval ls tasks` lists all, --include_path DIR adds your own"
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


def _make_harness(
    source: str, model: Any, tokenizer: Any, tasks: Sequence[Any], batch_size: int, max_length: int | None
) -> Any:
    """The harness's wrapper of the model; refused where a task's answers leave no room for a prompt."""
    from lm_eval.models.huggingface import HFLM

    # an object in place of a name is meant here, so the harness need not warn of it
    logging.getLogger(HFLM.__module__).addFilter(lambda record: "`pretrained`" not in str(record.msg))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    harness.pretrained = source  # by which the result names the commit
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"MODEL {source}: its tokenizer has neither a bos_token nor an eos_token, with which the harness begins a "
            "text: save it with one"
        )
    leaves = (leaf for item in tasks for leaf in (item.get_all_tasks() if hasattr(item, "child_names") else [item]))
    for task in leaves:
        room = (task.config.generation_kwargs or {}).get("max_gen_toks", harness.max_gen_toks)
        if task.OUTPUT_TYPE == "generate_until" and room >= harness.max_length:
            raise ValueError(
                f"{task.task_name} writes up to {room} tokens, no room for a prompt within {harness.max_length}: raise "
                "--max_length, or lower max_gen_toks in a task YAML of your own"
            )
    return harness


def _score(harness: Any, tasks: Sequence[Any], **settings: Any) -> dict[str, Any]:
    import lm_eval

    return lm_eval.simple_evaluate(model=harness, tasks=list(tasks), **settings)


def _write(result: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(result, indent=1, default=lambda o: o.item() if isinstance(o, np.generic) else str(o))
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _show(result: Mapping[str, Any]) -> None:
    rows = []
    for task, scores in {**result["results"], **result.get("groups", {})}.items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = scores.get(f"{metric}_stderr,{kind}")
                label = metric if kind == "none" else f"{metric} ({kind})"
                rows.append((task, label, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    names = [Column(heading, text=True, names=True) for heading in ("task", "metric")]
    show_table([*names, Column("value"), Column("stderr")], rows)


def read_delta(folder: str, task: str | None) -> SparseDelta:
    """The delta, of a merged one as ``task`` uses it.

    Raises:
        ValueError: the delta is merged and its heads differ, but no task is named; or it has no such task.
        FileNotFoundError: no such folder, or a folder without a delta.
    """
    delta = SparseDelta.from_pretrained(folder)
    delta.contents.for_task(task)
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
    info = DeltaReader.open(delta).info
    with TemporaryDirectory() as folder:
        files = dense_side_files(model, delta, tasks=info.tasks, task=task, absent=info.absent_files)
        copy_files(files, Path(folder))
        yield folder


def load_tokenizer(model: str, folder: str, chat: bool) -> Any:
    """The tokenizer that lies in a folder beside the other files of a model."""
    cure = "save the tokenizer beside the model, tokenizer.save_pretrained(folder)"
    try:
        tokenizer = read_tokenizer(folder)
    except ValueError as error:
        raise ValueError(f"MODEL {model}: its tokenizer cannot be loaded ({error}): {cure}") from error
    check_vocabulary(tokenizer, folder, "MODEL", given=model)
    if chat and not tokenizer.chat_template:
        raise ValueError("--apply_chat_template: the tokenizer has no chat template; leave the option out")
    return tokenizer


def load_model(source: str, delta: SparseDelta | None, folder: str, dtype: str | None) -> Any:
    """A causal language model, with the delta put onto it in a dtype that its files fit and only then cast.

    Args:
        source: folder or hub id of the base, or of a dense model where there is no delta.
        delta: put on for good, since the model is not used as a base again.
        folder: as :func:`side_folder` gives it.
        dtype: of the weights; None for the one that the base's files have, as ``dpp apply`` writes it, of several the
            wider.

    Raises:
        ValueError: a delta of another base, or weights without the tensors of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    base_config, config = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(folder)
    rows = config.get_text_config().vocab_size
    if delta is not None:  # the base as it is: the delta is checked against its values and may add rows
        config.dtype, config.get_text_config().vocab_size = base_config.dtype, base_config.get_text_config().vocab_size
    # its configuration may name another dtype than its files have, which dpp apply goes by
    own = dtype or "auto" if delta is None else common_dtype(source, delta.contents.shapes_in_base) or "auto"
    with without_load_report(bar=False):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=own, output_loading_info=True)
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
    for parameter in [p for p in model.parameters() if dtype and p.dtype == model.dtype]:
        parameter.data = parameter.data.to(getattr(torch, str(dtype).removeprefix("torch.")))
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:  # the base may have one, and the fine-tuned model none
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model
