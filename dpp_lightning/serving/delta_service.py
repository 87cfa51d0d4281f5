"""A base with its deltas that answers requests for texts: what is behind a server, whatever carries the requests."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.serving.delta_pool import DeltaPool
from dpp_lightning.storage.checkpoints import common_dtype
from dpp_lightning.storage.locate import few_names
from dpp_lightning.storage.quiet_loading import without_load_report
from dpp_lightning.tensors.names import canonical_names

MODEL_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "feature-extraction": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
}
_PADDED = ("text-classification", "token-classification")  # an answer is the same whatever the text's batch holds
_WRONG, _UNKNOWN, _BROKEN, _BUSY = 400, 404, 500, 503  # as HTTP numbers them

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        base: folder or hub id.
        task: one of :data:`MODEL_CLASSES`.
        sources: name of a delta to its folder or hub id.
        carried: what a request may name, a merged delta once for each of its tasks as ``NAME@TASK``, to the canonical
            names of the tensors that the delta carries whole.
        memory: most bytes of deltas in memory.
        batch_size: most texts of a forward, where a batch does not change their answers.
        force: use deltas although the base is not theirs.
    """

    base: str
    task: str
    sources: Mapping[str, str]
    carried: Mapping[str, frozenset[str]]
    memory: str
    batch_size: int
    force: bool = False


@dataclass(frozen=True)
class Request:
    """One text or several, and the delta that answers; None for the base."""

    inputs: str | list[str]
    delta: str | None

    @property
    def texts(self) -> list[str]:
        """All texts."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


@dataclass(frozen=True)
class Refusal:
    """Why a request has no answer.

    Attributes:
        status: as HTTP numbers it.
        reason: one line.
    """

    status: int
    reason: str


class DeltaService:
    """The model, the pool of deltas and the pipeline, loaded.

    Args:
        served: was checked.
        device: of torch.
    """

    def __init__(self, served: Served, device: str) -> None:
        self._served = served
        model, self._missing = _load(served)
        self.pool = DeltaPool(model.to(device).eval(), served.memory)
        for name, source in served.sources.items():
            self.pool.add(name, source, force=served.force)
        self._pipeline = self.pool.pipeline(served.task)
        can_pad = served.task in _PADDED and self._pipeline.tokenizer_of(None).pad_token_id is not None
        self._batch_size = served.batch_size if can_pad else 1
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def answer(self, requests: Sequence[Request]) -> list[list[Any] | Refusal]:
        """Answer requests together. What is amiss with one of them does not touch the others.

        Returns:
            Of each request what the pipeline gives for each of its texts, in plain lists, dicts and numbers, or why
            there is nothing.
        """
        answers: list[list[Any] | Refusal | None] = [self._refusal(request) for request in requests]
        rest = [request for request, answer in zip(requests, answers, strict=True) if answer is None]
        try:
            results: list[list[Any] | Refusal] = [*self._run(rest)]
        except Exception:
            results = [self._run_alone(request) for request in rest]
        given = iter(results)
        return [next(given) if answer is None else answer for answer in answers]

    def _run(self, requests: Sequence[Request]) -> list[list[Any]]:
        texts = [text for request in requests for text in request.texts]
        names = [request.delta for request in requests for _ in request.texts]
        results = iter(_plain(self._pipeline(texts, delta=names, batch_size=self._batch_size)))
        return [[next(results) for _ in request.texts] for request in requests]

    def _run_alone(self, request: Request) -> list[Any] | Refusal:
        try:
            return self._run([request])[0]
        except Exception as error:
            return _failure(error)

    def _refusal(self, request: Request) -> Refusal | None:
        """Why a request cannot be answered, as far as it can be known before it is tried."""
        known = self._served.carried
        if request.delta is not None and request.delta not in known:
            return Refusal(_UNKNOWN, f"there is no delta {request.delta!r}; there are {few_names(known)}")
        lacking = self._missing - (known[request.delta] if request.delta is not None else frozenset())
        if lacking:
            who = "the base" if request.delta is None else f"the delta {request.delta!r}"
            return Refusal(_WRONG, f"{who} has no {few_names(sorted(lacking))}, which the task needs")
        try:
            return self._too_long(request)
        except Exception as error:
            return _failure(error)

    def _too_long(self, request: Request) -> Refusal | None:
        """Refuse a text with more tokens than the model has positions, which would end in an error on the device."""
        tokenizer = self._pipeline.tokenizer_of(request.delta)
        tokens = tokenizer(request.texts, verbose=False).input_ids if request.texts else []
        longest = max(map(len, tokens), default=0)
        most = min(tokenizer.model_max_length, self._positions or tokenizer.model_max_length)
        if longest <= most:
            return None
        return Refusal(_WRONG, f"a text has {longest} tokens, and the model takes at most {most}")


def _failure(error: Exception) -> Refusal:
    """What to answer a request that raised an error, which the log gets whole where it is not in the request."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | OSError):
        return Refusal(_BUSY, reason)
    if isinstance(error, ValueError):
        return Refusal(_WRONG, reason)
    _log.error("a request failed", exc_info=error)
    return Refusal(_BROKEN, "the model failed; the server's log says where")


def _load(served: Served) -> tuple[Any, frozenset[str]]:
    """The base in the dtype that the deltas fit, and the canonical names of those tensors that its files lack."""
    changed = {name for source in served.sources.values() for name in DeltaReader.open(source).contents.shapes_in_base}
    with without_load_report(bar=False):
        loaded: Any = getattr(transformers, MODEL_CLASSES[served.task]).from_pretrained(
            served.base, dtype=common_dtype(served.base, changed) or "auto", output_loading_info=True
        )
    model, info = loaded
    canonical = canonical_names(model)
    return model, frozenset(canonical.get(name, name) for name in info["missing_keys"])


def _plain(result: Any) -> Any:
    """Results of a pipeline with numbers of Python, whatever they were."""
    if isinstance(result, dict):
        return {str(key): _plain(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [_plain(value) for value in result]
    return result.tolist() if hasattr(result, "tolist") else result
