"""Switching vLLM from outside: its calls for an update of weights in their order, with nothing stale left behind.

Neither function needs vLLM where it runs, so that a client of a server can do without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

RESTART = "restart the server"  # in the message of every failure after which the weights of a server are not known


def switch_engine(
    engine: Any, delta: str | None, *, task: str | None = None, revision: str | None = None, force: bool = False
) -> None:
    """Switch an engine in this process, between two calls of its ``generate``.

    Args:
        engine: a ``vllm.LLM`` made with ``weight_transfer_config=WeightTransferConfig(backend="dpp")``.
        delta: folder or hub id; None for the base.
        task: of a merged delta with a head for each task, the one that is wanted.
        revision: branch, tag or commit of a hub id.
        force: use the delta although it is of another base.

    Raises:
        Exception: of the engine's own kind, in one line. The weights are as before, unless it says to restart.
        RuntimeError: the engine is still at work on requests, so that what it remembers of prompts stays.
    """
    engine.start_weight_update()
    try:
        engine.update_weights({"update_info": _update_info(delta, task, revision, force)})
    except BaseException:
        with suppress(Exception):  # an error of workers whose update has ended
            engine.finish_weight_update()
        raise
    engine.finish_weight_update()
    if not engine.reset_prefix_cache():
        raise RuntimeError(
            "the weights are switched, but requests were under way, so that the prefix cache is of the weights before: "
            "end them, then call reset_prefix_cache() of the engine"
        )
    engine.llm_engine.reset_encoder_cache()


def switch_server(
    url: str,
    delta: str | None,
    *,
    task: str | None = None,
    revision: str | None = None,
    force: bool = False,
    timeout: float = 600.0,
) -> None:
    """Switch a running server. Requests under way are answered first, by the weights before; new ones wait meanwhile.

    Args:
        url: of the server, such as ``http://localhost:8000``; started with ``VLLM_SERVER_DEV_MODE=1`` and
            ``--weight-transfer-config '{"backend": "dpp"}'``.
        delta: folder as the server's workers see it, or hub id; None for the base.
        task, revision, force: as for :func:`switch_engine`.
        timeout: seconds that each step may take.

    Raises:
        RuntimeError: the server refuses. It goes on with the weights before, unless the message says to restart it,
            when it stays paused.
        OSError: it cannot be reached, or a step takes longer than the timeout; the server may then be paused.
    """
    if _call(url, "is_paused", timeout).get("is_paused"):
        raise RuntimeError(f"{url} is paused, as during a switch of another client; wait, or POST /resume to it first")
    _call(url, "pause?mode=wait&clear_cache=true", timeout, {})
    try:
        _call(url, "start_weight_update", timeout, {})
        _call(url, "update_weights", timeout, {"update_info": _update_info(delta, task, revision, force)})
        _call(url, "finish_weight_update", timeout, {})
    except RuntimeError as error:
        with suppress(RuntimeError):  # an error of workers whose update has ended
            _call(url, "finish_weight_update", timeout, {})
        if RESTART not in str(error):
            _call(url, "resume", timeout, {})
        raise
    _call(url, "resume", timeout, {})


def _update_info(delta: str | None, task: str | None, revision: str | None, force: bool) -> dict[str, Any]:
    return {"delta": None if delta is None else str(delta), "task": task, "revision": revision, "force": force}


def _call(url: str, path: str, timeout: float, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the server answers; GET without content, else POST of JSON."""
    data = None if content is None else json.dumps(content).encode()
    request = Request(f"{url.rstrip('/')}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=timeout) as answer:
            return dict(json.load(answer))
    except HTTPError as error:
        raise RuntimeError(f"{url} refused {path.partition('?')[0]}: {_reason(error)}") from error


def _reason(error: HTTPError) -> str:
    """The message in an answer that is an error; its status where there is none."""
    text = error.read().decode(errors="replace")
    try:
        said = json.loads(text)["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError):
        return f"status {error.code} {' '.join(text.split())[:500]}"
