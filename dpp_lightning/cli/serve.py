"""``dpp serve``: one base and many deltas over HTTP."""

from __future__ import annotations

import signal
import socket
from collections.abc import Mapping, Sequence
from typing import Literal

from dpp_lightning.cli.command import FunctionCommand, say
from dpp_lightning.cli.exit_codes import TERMINATED
from dpp_lightning.delta.checkpoint_base import check_checkpoint
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.serving.delta_service import Served
from dpp_lightning.storage.byte_count import number_of_bytes
from dpp_lightning.storage.source_kind import check_delta, check_model
from dpp_lightning.tensors.devices import usable_device

_ORDER = "dpp serve BASE NAME=DELTA"
_PORTS = range(1024, 65536)  # those that LitServe takes


def serve_deltas(
    base: str,
    deltas: Sequence[str],
    *,
    task: Literal[
        "text-classification", "token-classification", "feature-extraction", "text-generation"
    ] = "text-classification",
    force: bool = False,
    port: int = 8000,
    host: Literal["127.0.0.1", "0.0.0.0", "::"] = "127.0.0.1",
    memory: str = "2 GB",
    max_batch_size: int = 16,
    batch_timeout: float = 0.01,
    device: str = "auto",
) -> None:
    """Serve one base and many deltas over HTTP, until Ctrl-C.

    POST /predict {"inputs": "text" or ["text", "text"], "delta": "NAME", or null for the base} answers as the pipeline
    of transformers over the fine-tuned model. GET /health says when the model is loaded, GET /deltas names the deltas,
    GET /stats and GET /metrics count hits, loads and swaps. There is no authentication. It runs on LitServe, which pip
    install 'dpp_lightning[serve]' brings.

    Args:
        base: a folder in Hugging Face's layout or a hub id
        deltas: what requests call a delta, =, and its folder or hub id; of a merged delta they name NAME@TASK
        task: what the pipeline does
        force: serve deltas although BASE is not theirs
        port: 1024 to 65535
        host: 127.0.0.1 for this machine alone; 0.0.0.0, or :: with IPv6, for all that can reach it
        memory: bytes of deltas in memory at most; those used least recently are dropped and read again when needed
        max_batch_size: requests that are answered together at most, and texts of a forward
        batch_timeout: seconds that a batch waits for further requests
        device: cpu, cuda, cuda:1, mps; auto for cuda where there is one
    """
    sources = _named(deltas)
    _check_numbers(port, max_batch_size, batch_timeout)
    number_of_bytes(memory, "--memory")
    device = usable_device(None if device == "auto" else device)
    _check_installed()
    check_model(base, "BASE", order=_ORDER, config=True)
    for name, source in sources.items():
        check_delta(source, f"{name}:", order=_ORDER)
    _check_free(host, port)
    carried = _read_deltas(base, sources, force=force)
    from dpp_lightning.serving.http_server import make_server, run_server

    kind, _, number = device.partition(":")
    server = make_server(
        Served(base, task, sources, carried, memory, max_batch_size, force),
        accelerator=kind,
        devices=1 if kind == "cpu" else [int(number or 0)],
        max_batch_size=max_batch_size,
        batch_timeout=batch_timeout,
    )
    address = f"http://{'[::1]' if host == '::' else host}:{port}"
    say(f"loading {base}; GET {address}/health is ok when POST {address}/predict answers; Ctrl-C ends it")
    if run_server(server, host, port) == signal.SIGTERM:
        say("dpp: stopped by SIGTERM")
        raise SystemExit(TERMINATED)
    raise KeyboardInterrupt


COMMAND = FunctionCommand(
    serve_deltas,
    example="dpp serve BASE sst2=deltas/sst2 cola=deltas/cola --port 8000",
    groups={"what is served": "task", "where": "port", "how it is run": "memory"},
)


def _named(words: Sequence[str]) -> dict[str, str]:
    """Name to folder or hub id, of ``NAME=DELTA``."""
    sources: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not (name and equals and source) or "@" in name or "/" in name:
            raise ValueError(f"DELTAS {word}: expected NAME=DELTA, such as sst2=deltas/sst2, the name without @ and /")
        if name in sources:
            raise ValueError(f"DELTAS {word}: there is a delta of that name, {sources[name]}: choose another")
        sources[name] = source
    return sources


def _check_numbers(port: int, max_batch_size: int, batch_timeout: float) -> None:
    if port not in _PORTS:
        raise ValueError(f"--port is {port}, expected {_PORTS[0]} to {_PORTS[-1]}")
    if max_batch_size < 1:
        raise ValueError(f"--max_batch_size is {max_batch_size}, expected 1 or more")
    if not 0 <= batch_timeout < 30:
        raise ValueError(f"--batch_timeout is {batch_timeout:g}, expected seconds from 0 to below 30")


def _check_installed() -> None:
    try:
        import litserve  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ValueError(f"dpp serve needs LitServe ({error}): pip install 'dpp_lightning[serve]'") from error


def _check_free(host: str, port: int) -> None:
    """Refuse a port that another server has, before a model is loaded for nothing."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"--port {port} of {host} cannot be used ({error.strerror}): choose another") from error


def _read_deltas(base: str, sources: Mapping[str, str], *, force: bool) -> dict[str, frozenset[str]]:
    """What requests may name, to the names of the tensors that the delta carries, each delta's base checked."""
    carried: dict[str, frozenset[str]] = {}
    for name, source in sources.items():
        try:
            reader = DeltaReader.open(source)
            check_checkpoint(base, reader, force=force)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        tasks: list[str | None] = [*reader.info.tasks]
        for task in tasks or [None]:
            of_task = reader.contents.for_task(task).carried
            carried[f"{name}@{task}" if task else name] = frozenset(of_task)
    return carried
