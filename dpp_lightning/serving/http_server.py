"""Deltas over HTTP on LitServe: requests that arrive together are one batch, whatever their deltas."""
# LitServe reads the annotation of decode_request as it stands, so annotations must not be texts in this file.

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from types import FrameType
from typing import Annotated, Any

from fastapi import Depends, Response
from fastapi.responses import JSONResponse
from litserve import LitAPI, LitServer
from litserve.utils import WorkerSetupStatus
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field

from dpp_lightning.serving.delta_service import DeltaService, Refusal, Request, Served

MOST_TEXTS = 1024  # of one request
_MOST_BYTES = 10_000_000  # of one request
_ROOM = 1 << 20  # bytes of what the model's process tells that of the server
_ENDED = "the process that holds the model has ended: out of memory, or what it said above"
_COUNTERS = {
    "hits": "Uses of a delta whose values were in memory.",
    "loads": "Deltas read and checked against the base.",
    "evictions": "Deltas whose values were dropped to make room.",
    "swaps": "Times that a delta was written into the model and taken off again.",
}
_GAUGES = {
    "swap_ms": "Milliseconds of a swap, both ways together, in the mean.",
    "load_ms": "Milliseconds of a load in the mean.",
    "num_bytes": "Bytes of the values of all deltas in memory.",
    "memory": "Most bytes that the values of deltas in memory may have.",
}


class PredictRequest(BaseModel):
    """The body of ``POST /predict``.

    Attributes:
        inputs: a text or a list of texts.
        delta: one of ``GET /deltas``; null for the base.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: str | Annotated[list[str], Field(max_length=MOST_TEXTS)]
    delta: str | None


class SharedStats:
    """What the model's process says of its pool, for the process that answers ``GET``: one JSON text in shared memory,
    which goes to a process only as it is started."""

    def __init__(self) -> None:
        self._text: Any = get_context("spawn").Array("c", _ROOM)

    def write(self, stats: dict[str, Any]) -> None:
        """Replace what is there.

        Raises:
            ValueError: more than a MiB.
        """
        text = json.dumps(stats).encode()
        if len(text) >= _ROOM:
            raise ValueError(f"the names of the deltas in memory have more than {_ROOM:,} bytes: take shorter ones")
        self._text.value = text

    def read(self) -> dict[str, Any]:
        """What was written last."""
        stats: dict[str, Any] = json.loads(self._text.value or b"{}")
        return stats


class DeltaAPI(LitAPI):
    """What LitServe calls in the model's process.

    Args:
        served: was checked.
        stats: is written after every batch.
        max_batch_size: most requests of a batch.
        batch_timeout: seconds that a batch waits for further requests.
    """

    def __init__(self, served: Served, stats: SharedStats, max_batch_size: int, batch_timeout: float) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout)
        self._served, self._stats = served, stats

    def setup(self, device: str) -> None:
        """Load the base."""
        self._service = DeltaService(self._served, device)
        self._stats.write(asdict(self._service.pool.stats()))

    def decode_request(self, request: PredictRequest) -> Request:
        """The body as the service takes it."""
        return Request(request.inputs, request.delta)

    def predict(self, x: Request | list[Request]) -> Any:
        """Answer one request, or those of a batch."""
        requests = x if isinstance(x, list) else [x]
        answers = [*zip(requests, self._service.answer(requests), strict=True)]
        self._stats.write(asdict(self._service.pool.stats()))
        return answers if isinstance(x, list) else answers[0]

    def encode_response(self, output: Any) -> Response:
        """The response to one request, with its status: of several in a batch each has its own."""
        request, answer = output
        if isinstance(answer, Refusal):
            return JSONResponse({"detail": answer.reason}, answer.status)
        return JSONResponse({"delta": request.delta, "outputs": answer})


class PoolMetrics(Collector):
    """A pool's numbers as Prometheus reads them.

    Args:
        read: gives them, as :class:`dpp_lightning.serving.delta_pool.PoolStats` has them.
    """

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """One metric for each number."""
        stats = self._read()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"dpp_pool_{name}", text, value=stats[name])
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"dpp_pool_{name}", text, value=stats[name])


class DeltaServer(LitServer):
    """LitServe's server, which minds that the model's process may end, and that Ctrl-C goes to all processes."""

    def launch_inference_worker(self, lit_api: LitAPI) -> Any:
        """Start the model's process, which leaves Ctrl-C to this one."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return super().launch_inference_worker(lit_api)
        finally:
            signal.signal(signal.SIGINT, before)

    def verify_worker_status(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ConnectionAbortedError: its process has ended, or failed.
        """
        status = self.workers_setup_status.values
        while WorkerSetupStatus.READY not in status():
            ended = any(not worker.is_alive() for worker in self.inference_workers)
            if ended or WorkerSetupStatus.ERROR in status():
                raise ConnectionAbortedError(_ENDED)
            time.sleep(0.05)


def make_server(
    served: Served, *, accelerator: str, devices: Any, max_batch_size: int, batch_timeout: float
) -> DeltaServer:
    """A server with the further routes ``GET /deltas``, ``GET /stats`` and ``GET /metrics``.

    Args:
        served: was checked.
        accelerator, devices: as for ``LitServer``; one device.
        max_batch_size, batch_timeout: as for :class:`DeltaAPI`.
    """
    stats = SharedStats()
    api = DeltaAPI(served, stats, max_batch_size, batch_timeout)
    server = DeltaServer(api, accelerator, devices, max_payload_size=_MOST_BYTES)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PoolMetrics(stats.read))

    def deltas() -> Response:
        loaded = stats.read()["loaded"]
        rows = [{"name": name, "in_memory": name.partition("@")[0] in loaded} for name in served.carried]
        return JSONResponse({"base": served.base, "task": served.task, "deltas": rows})

    def numbers() -> Response:
        return JSONResponse(stats.read())

    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    for path, answer in (("/deltas", deltas), ("/stats", numbers), ("/metrics", metrics)):
        server.app.add_api_route(path, answer, dependencies=[Depends(server.setup_auth())])
    return server


def run_server(server: DeltaServer, host: str, port: int) -> int:
    """Serve until Ctrl-C or SIGTERM; all processes have ended on return.

    Args:
        server: of :func:`make_server`.
        host, port: where to listen, as for ``LitServer.run``.

    Returns:
        The signal that ended it.

    Raises:
        ConnectionAbortedError: the model's process ended by itself.
    """
    received: list[int] = []
    try:
        with _interrupted_by((signal.SIGINT, signal.SIGTERM), received):
            server.run(host, port, num_api_servers=1, log_level="warning", generate_client_file=False)
    except (KeyboardInterrupt, EOFError, ConnectionError):  # where LitServe was not ready for it
        if not received:
            raise ConnectionAbortedError(_ENDED) from None
    finally:
        for worker in getattr(server, "inference_workers", []):
            worker.terminate()
    return received[0]


@contextmanager
def _interrupted_by(signals: Iterable[int], received: list[int]) -> Iterator[None]:
    """Signals are a KeyboardInterrupt while the block runs, which LitServe ends all processes upon.

    Args:
        signals: their numbers.
        received: gets those that came.
    """
    here = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != here:  # a process that was forked meanwhile
            os._exit(0)
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
