"""A pipeline of transformers over a pool's model, whose call says which delta answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, pipeline
from transformers.pipelines.base import ChunkPipeline

from dpp_lightning.serving import model_settings
from dpp_lightning.serving.model_settings import ModelSettings, SettingsReader

Request = TypeVar("Request")
Result = TypeVar("Result")

_OF_POOL = ("model", "device", "device_map", "dtype", "torch_dtype", "config")
_PROCESSORS = ("feature_extractor", "image_processor", "video_processor", "processor")


class Pool(model_settings.Pool, Protocol):
    """What is needed of a :class:`dpp_lightning.serving.delta_pool.DeltaPool`."""

    def map(
        self,
        requests: Iterable[Request],
        *,
        key: Callable[[Request], str | None],
        forward: Callable[[nn.Module, list[Request]], Sequence[Result]],
        batch_size: int,
    ) -> list[Result]:
        """Answer requests for many deltas."""


class DeltaPipeline:
    """A pipeline of transformers whose call takes ``delta=``.

    Each delta answers with its own labels, generation settings and tokenizer where its folder holds some. Threads may
    share it: calls take turns.

    Args:
        pool: over a model of transformers.
        task: as for ``transformers.pipeline``: ``"text-classification"``, ``"text-generation"`` and so on.
        tokenizer: of the base; by default what lies beside the model. A delta whose folder holds files of a tokenizer
            uses its own.
        pipeline_settings: as for ``transformers.pipeline``, but for the model and where it is.

    Raises:
        ValueError: settings of the model, which is the pool's; or a tokenizer that is not given and cannot be loaded.
    """

    def __init__(self, pool: Pool, task: str, tokenizer: Any = None, **pipeline_settings: Any) -> None:
        if wrong := [name for name in _OF_POOL if name in pipeline_settings]:
            raise ValueError(f"{', '.join(wrong)}: the model is the pool's, where and as it is: leave that out")
        self._pool, self._task, self._settings = pool, task, pipeline_settings
        model: Any = pool.model
        if not hasattr(model, "config"):
            raise ValueError(f"a pipeline needs a model of transformers, got {type(model).__name__}")
        if tokenizer is None and not any(name in pipeline_settings for name in _PROCESSORS):
            tokenizer = _tokenizer_beside(model)
        self._model = model
        self._read = SettingsReader(pool, tokenizer)
        self._pipelines: dict[int, Any] = {}  # by the identity of the tokenizer
        with pool.use(None):
            self._base = self._pipeline_of(self._read.of(None))

    def __repr__(self) -> str:
        """The task and the pool, in one line."""
        return f"DeltaPipeline({self._task!r}, {self._pool!r})"

    def tokenizer_of(self, delta: str | None) -> Any:
        """The tokenizer that a delta is used with, of transformers; None for models of other inputs.

        Raises:
            ValueError: an unknown name, or files beside the delta that cannot be read.
        """
        return self._read.of(delta).tokenizer

    def __call__(self, inputs: Any, *, delta: str | Sequence[str | None] | None = None, **call_settings: Any) -> Any:
        """What the pipeline of the fine-tuned model gives.

        With a batch size above 1, inputs of several deltas may share a batch, as in
        :meth:`dpp_lightning.serving.delta_pool.DeltaPool.map`.

        Args:
            inputs: as for the pipeline of transformers: one input or a list of them. Datasets and generators are read
                to their end, and give a list.
            delta: one of the pool's names; None for the base; or a list of such, one for each of a list of inputs.
            call_settings: as for the pipeline of transformers, such as ``top_k`` or ``batch_size``.

        Raises:
            ValueError: an unknown name, a delta of another base or larger than the memory, or names that are not as
                many as the inputs.
        """
        inputs = _listed(inputs)
        if isinstance(delta, str) or delta is None:
            return inputs if inputs == [] else self._use(delta, inputs, call_settings)
        if not isinstance(inputs, list) or len(inputs) != len(delta):
            count = f"{len(inputs)} inputs" if isinstance(inputs, list) else "one input"
            raise ValueError(f"delta= has {len(delta)} names for {count}: give a list of inputs, and one name for each")
        return self._use_each(delta, inputs, call_settings)

    def _use(self, name: str | None, inputs: Any, call_settings: dict[str, Any]) -> Any:
        settings = self._read.of(name)
        with self._pool.use(name), settings.put_on(self._model):
            return self._pipeline_of(settings)(inputs, **call_settings)

    def _use_each(self, names: Sequence[str | None], inputs: list[Any], call_settings: dict[str, Any]) -> list[Any]:
        """Answers of a list of inputs, each with its delta; those that can share a batch are answered together."""
        call = dict(call_settings)
        batch_size = call.pop("batch_size", None) or self._settings.get("batch_size") or 1
        together: dict[Any, list[int]] = {}
        for place, name in enumerate(names):
            settings = self._read.of(name)
            together.setdefault(id(settings) if self._row_by_row and batch_size > 1 else name, []).append(place)
        results: dict[int, Any] = {}
        for places in together.values():
            some, settings = [inputs[place] for place in places], self._read.of(names[places[0]])
            if len({names[place] for place in places}) == 1:
                answers = self._use(names[places[0]], some, {**call, "batch_size": batch_size})
            else:
                answers = self._map(settings, [(names[p], inputs[p]) for p in places], batch_size, call)
            results.update(zip(places, answers, strict=True))
        return [results[place] for place in range(len(inputs))]

    def _map(
        self, settings: ModelSettings, requests: list[tuple[str | None, Any]], batch_size: int, call: dict[str, Any]
    ) -> list[Any]:
        def forward(model: nn.Module, some: list[tuple[str | None, Any]]) -> list[Any]:
            with settings.put_on(model):
                return list(self._pipeline_of(settings)([text for _, text in some], batch_size=len(some), **call))

        return self._pool.map(requests, key=lambda request: request[0], forward=forward, batch_size=batch_size)

    @property
    def _row_by_row(self) -> bool:
        """Whether an input is one row of one forward, so that rows of a batch can be told apart by their inputs."""
        return not (isinstance(self._base, ChunkPipeline) or getattr(self._base, "_pipeline_calls_generate", True))

    def _pipeline_of(self, settings: ModelSettings) -> Any:
        """The pipeline with a tokenizer; call it with the settings on the model."""
        key = id(settings.tokenizer)
        if key not in self._pipelines:
            make: Any = pipeline  # whose overloads want the task as a literal
            whole = getattr(self._model, "hf_device_map", None) is None
            self._pipelines[key] = make(
                self._task,
                model=self._model,
                tokenizer=settings.tokenizer,
                device=self._model.device if whole else None,
                **self._settings,
            )
        return self._pipelines[key]


def _listed(inputs: Any) -> Any:
    """As a list what transformers would read only when the delta's weights have gone again."""
    if isinstance(inputs, IterableDataset | Iterator):
        return list(inputs)
    if isinstance(inputs, Dataset):
        return [inputs[place] for place in range(len(inputs))]  # type: ignore[arg-type]
    return list(inputs) if isinstance(inputs, tuple) else inputs


def _tokenizer_beside(model: Any) -> Any:
    place = model.name_or_path
    try:
        if not place:
            raise ValueError("the model was made in memory")
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of the pool's model cannot be loaded ({reason}): give tokenizer=") from error
