"""``dpp serve`` over real HTTP on the loopback: several clients, more deltas than the memory holds, errors, the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from served_deltas import LABELS, TEXTS, close, dense_pipeline, make_deltas

pytest.importorskip("litserve")
pytest.importorskip("prometheus_client")

TASKS = [*LABELS, None]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_deltas(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def dense(place):
    return {task: dense_pipeline(place, task) for task in TASKS}


class Server:
    """A server in processes of its own.

    Args:
        folder: is where it runs; gets what it says.
        words: the command line after the deltas.
    """

    def __init__(self, folder, words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", folder / f"log{port}"
        command = [sys.executable, "-m", "dpp_lightning", "serve", "base", *(f"{task}=delta/{task}" for task in LABELS)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), "--device", "cpu", *words],
                cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def wait(self):
        """Until the model is loaded."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.get("/health")[0] == 200:
                    return
            except (URLError, ConnectionError):
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def until_it_says(self, text):
        """Until a text is in the log, and a moment longer."""
        end = time.monotonic() + 120
        while text not in self.log.read_text() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)

    def get(self, path, body=None):
        """Status and text of an answer; a body is posted."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def predict(self, inputs, delta):
        status, text = self.get("/predict", {"inputs": inputs, "delta": delta})
        return status, json.loads(text)

    def stop(self, number, group=False):
        """Send a signal; returns the exit code and what is left of the group of processes."""
        if self.process.poll() is None:
            (os.killpg if group else os.kill)(self.process.pid, number)
        code = self.process.wait(60)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return code, "nothing"
            time.sleep(0.05)
        return code, "processes"


@pytest.fixture(scope="module")
def server(place):
    running = Server(place, ["--memory", "50 kB", "--max_batch_size", "8"])
    try:
        running.wait()
        yield running
    finally:
        running.stop(signal.SIGTERM)


def test_eight_clients_over_more_deltas_than_fit(server, dense):
    """Every answer is that of the dense fine-tuned model."""
    expected = {task: dense[task](TEXTS) for task in TASKS}

    def client(number):
        wrong = []
        for turn in range(12):
            task = TASKS[(number + turn) % len(TASKS)]
            inputs = TEXTS if turn % 2 else TEXTS[turn % len(TEXTS)]
            status, answer = server.predict(inputs, task)
            right = expected[task] if turn % 2 else [expected[task][turn % len(TEXTS)]]
            if status != 200 or answer["delta"] != task or not close(answer["outputs"], right):
                wrong.append((task, status, answer, right))
        return wrong

    with ThreadPoolExecutor(8) as clients:
        assert [*clients.map(client, range(8))] == [[]] * 8
    status, text = server.get("/stats")
    stats = json.loads(text)
    assert status == 200
    assert stats["evictions"] > 0
    assert stats["num_bytes"] <= stats["memory"] == 50_000
    status, text = server.get("/deltas")
    rows = json.loads(text)["deltas"]
    assert [row["name"] for row in rows] == list(LABELS)
    assert {row["name"] for row in rows if row["in_memory"]} == set(stats["loaded"])
    status, text = server.get("/metrics")
    assert f"dpp_pool_swaps_total {float(stats['swaps'])}" in text.splitlines()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"inputs": "w1", "delta": "nope"}, 404, "there is no delta 'nope'; there are sst2, mnli, cola"),
        ({"inputs": "w1 " * 200, "delta": "sst2"}, 400, "a text has 202 tokens, and the model takes at most 128"),
        ({"inputs": "w1"}, 422, "Field required"),
        ({"delta": "sst2"}, 422, "Field required"),
        ({"inputs": "w1", "delta": "sst2", "detla": 1}, 422, "Extra inputs are not permitted"),
        ({"inputs": [1], "delta": "sst2"}, 422, "valid string"),
        ({"inputs": ["w1"] * 1025, "delta": "sst2"}, 422, "at most 1024 items"),
        ([], 422, "valid dictionary"),
        (b"{", 422, "JSON decode error"),
    ],
)
def test_what_is_wrong_with_a_request_is_its_answer(server, body, status, says):
    code, text = server.get("/predict", body)
    assert code == status
    assert says in text
    assert "Traceback" not in text


def test_a_key_of_litserve_holds_for_every_route(monkeypatch):
    from starlette.testclient import TestClient

    from dpp_lightning.serving.delta_service import Served
    from dpp_lightning.serving.http_server import make_server

    monkeypatch.setattr("litserve.server.LIT_SERVER_API_KEY", "secret")
    served = Served("base", "text-classification", {}, {}, "2 GB", 1)
    server = make_server(served, accelerator="cpu", devices=1, max_batch_size=2, batch_timeout=0.01)
    client = TestClient(server.app)
    for path in ("/deltas", "/stats", "/metrics"):
        assert client.get(path).status_code in (401, 403)
    assert client.post("/predict", json={"inputs": "w1", "delta": None}).status_code in (401, 403)
    assert client.get("/stats", headers={"X-API-Key": "secret"}).json() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group", "expected"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
)
@pytest.mark.parametrize("when", ["loading", "serving"])
def test_a_signal_ends_it_and_leaves_no_process(place, number, group, expected, when):
    running = Server(place, [])
    try:
        if when == "serving":
            running.wait()
            assert running.predict("w1", "sst2")[0] == 200
        else:
            running.until_it_says("loading base")
    finally:
        code, left = running.stop(number, group)
    assert (code, left) == (expected, "nothing"), running.log.read_text()
    assert "Traceback" not in running.log.read_text()


@pytest.mark.slow
def test_a_model_that_is_killed_ends_the_server_with_one_line(place):
    running = Server(place, [])
    try:
        running.wait()
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "-g", str(running.process.pid)], capture_output=True, text=True
        )
        (model,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]
        os.kill(model, signal.SIGKILL)
        assert running.process.wait(60) == 1
    finally:
        assert running.stop(signal.SIGTERM) == (1, "nothing")
    assert running.log.read_text().count("dpp serve: failed: the process that holds the model has ended") == 1
    assert "Traceback" not in running.log.read_text()
