"""`vllm serve` with draft trees: what clients get, what `/metrics` says, many clients at once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.command_line import (
    DEMO_HEADS,
    DEMO_MODEL,
    MEDUSA_HEADS,
    VLLM,
    environment,
    merge_heads,
)
from tests.integration.conftest import greedy, open_engine
from vllm_medusa.plugin.counters import DESCRIPTIONS

pytestmark = pytest.mark.engine

START_TIMEOUT_S = 280
MAX_TOKENS = 64
#: How long the stress test runs; its 32 clients each abort a third of their requests.
STRESS_S = float(os.environ.get("VLLM_MEDUSA_STRESS_S", "120"))
NUM_CLIENTS = 32

Prompts = list[str]
Texts = list[list[int]]


@dataclass
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    started_at: int = 0  # length of the log then

    def metrics(self) -> dict[str, float]:
        """Sums of ``/metrics`` over labels, and by position where there is one."""
        totals: dict[str, float] = Counter()
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if match := re.fullmatch(r"(vllm:\w+)(\{.*\})? ([\d.e+-]+)", line):
                name, labels, value = match.groups()
                if name.endswith("_created"):
                    continue
                totals[name] += float(value)
                if position := re.search(r'position="(\d+)"', labels or ""):
                    totals[f"{name}/{position[1]}"] += float(value)
        return totals

    def assert_healthy(self) -> None:
        assert self.process.poll() is None
        assert httpx.get(f"{self.url}/health", timeout=30).status_code == 200
        assert not re.search(r"Traceback|\bERROR\b", self.log.read_text()[self.started_at :])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(directory: Path, model: Path, *argv: str) -> Iterator[Server]:
    """Start ``vllm serve MODEL ARGV...`` on a free port of this host; end it in any case."""
    port = free_port()
    options = [
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512"),
        *("--block-size", "32"),
    ]
    log = directory / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [VLLM, "serve", str(model), *options, *argv],
            stdout=out,
            stderr=subprocess.STDOUT,
            # The development mode is there for /collective_rpc.
            env=environment(VLLM_SERVER_DEV_MODE="1", VLLM_LOGGING_LEVEL="INFO"),
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log, process)
        wait_until_ready(server)
        server.started_at = len(log.read_text())
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()[-5000:]
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"not ready in {START_TIMEOUT_S} s: {server.log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in lines]


@pytest.fixture(scope="module")
def offline(prompts: Prompts) -> Texts:
    """Greedy text of every prompt without speculation, in this process."""
    with open_engine(DEMO_MODEL, skip_tokenizer_init=False) as llm:
        return greedy(llm, prompts, MAX_TOKENS)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("merged") / "model"
    return merge_heads(DEMO_MODEL, MEDUSA_HEADS, directory, "medusa_head.")


@pytest.fixture(scope="module")
def server(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Heads in the model's own checkpoint; static trees, so that acceptance is known."""
    directory = tmp_path_factory.mktemp("server")
    with serve(directory, merged, "--spec-method", "medusa", "-sc.tree", "static") as running:
        yield running


def body(prompt: Any, max_tokens: int, **options: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }


def test_text_and_metrics(server: Server, prompts: Prompts, offline: Texts) -> None:
    before = server.metrics()
    response = httpx.post(
        f"{server.url}/v1/completions", json=body(prompts[:8], MAX_TOKENS), timeout=120
    )
    choices = sorted(response.raise_for_status().json()["choices"], key=lambda c: c["index"])
    assert [choice["token_ids"] for choice in choices] == offline[:8]
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    num_drafts = grown["vllm:spec_decode_num_drafts_total"]
    num_accepted = grown["vllm:spec_decode_num_accepted_tokens_total"]
    # Every step emits what it accepted and one token more; a request's first token needs no draft.
    assert num_drafts + num_accepted == pytest.approx(8 * (MAX_TOKENS - 1), abs=8 * 4)
    assert num_accepted > num_drafts / 3
    by_depth = [
        grown[f"vllm:spec_decode_num_accepted_tokens_per_pos_total/{depth}"] for depth in range(4)
    ]
    assert sum(by_depth) == num_accepted
    assert by_depth == sorted(by_depth, reverse=True)
    assert by_depth[3] > 0
    assert grown["vllm:medusa_forks_accepted_total"] > 8
    assert grown["vllm:medusa_fork_paths_total"] > grown["vllm:medusa_forked_requests_total"] > 8
    server.assert_healthy()


def test_stream(server: Server, prompts: Prompts, offline: Texts) -> None:
    tokens: list[int] = []
    largest = 0
    request = body(prompts[3], MAX_TOKENS, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=120) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                tokens += piece
                largest = max(largest, len(piece))
    assert tokens == offline[3]
    assert largest > 1


def test_one_line_at_start(server: Server, merged: Path) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "Medusa: heads" in line]
    assert len(lines) == 1
    assert f"heads {merged}, tree static: 16 nodes from the heads' checkpoint" in lines[0]
    for part in ("leaves", "acceptance lossless", "KV blocks", "MiB"):
        assert part in lines[0]


def test_metrics_page(server: Server) -> None:
    httpx.post(f"{server.url}/v1/completions", json=body("def main(", 60)).raise_for_status()
    page = httpx.get(f"{server.url}/metrics").text
    rpc = httpx.post(f"{server.url}/collective_rpc", json={"method": "medusa_counters"})
    counted = rpc.raise_for_status().json()["results"][0]
    assert min(counted["forked_requests"], counted["fork_paths"], counted["forks_accepted"]) > 0
    lines = page.splitlines()
    labels = '{engine="0",model_name="demo"}'
    for name, description in DESCRIPTIONS.items():
        full_name = f"vllm:medusa_{name}_total"
        assert f"# HELP {full_name} Medusa: {description}" in lines
        assert f"# TYPE {full_name} counter" in lines
        assert f"{full_name}{labels} {float(counted[name])}" in lines
    assert f"vllm:spec_decode_num_drafts_total{labels} {float(counted['forked_requests'])}" in lines


@pytest.mark.slow
def test_several_servers_and_engines(tmp_path: Path, prompts: Prompts, offline: Texts) -> None:
    """Two API servers before two engines: each process makes the configuration anew."""
    spec = json.dumps({"method": "medusa", "model": str(DEMO_HEADS), "tree": "cpu-16"})
    argv = ["--api-server-count", "2", "--data-parallel-size", "2", "--speculative-config", spec]
    with serve(tmp_path, DEMO_MODEL, *argv) as server:
        for _ in range(4):
            request = body(prompts[:8], MAX_TOKENS)
            response = httpx.post(f"{server.url}/v1/completions", json=request, timeout=120)
            choices = response.raise_for_status().json()["choices"]
            assert [c["token_ids"] for c in sorted(choices, key=lambda c: c["index"])] == offline[
                :8
            ]
        metrics = server.metrics()
        assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 4 * 8 * MAX_TOKENS / 4
        assert metrics["vllm:medusa_forks_accepted_total"] > 4 * 8
        server.assert_healthy()


@dataclass
class Tally:
    """What the clients of the stress test saw."""

    finished: Counter[int] = field(default_factory=Counter)
    sampled: int = 0
    aborted: int = 0
    faults: list[str] = field(default_factory=list)


class Client:
    """Sends one request after the other until the time is over."""

    def __init__(self, seed: int, server: Server, prompts: Prompts, offline: Texts) -> None:
        self.rng = random.Random(seed)
        self.url = f"{server.url}/v1/completions"
        self.prompts = prompts
        self.offline = offline

    async def run(self, http: httpx.AsyncClient, deadline: float, tally: Tally) -> None:
        while time.monotonic() < deadline:
            index = self.rng.randrange(len(self.prompts))
            max_tokens = self.rng.randint(1, MAX_TOKENS)
            is_greedy = self.rng.random() < 0.7
            options: dict[str, Any] = {"stream": True}
            if not is_greedy:
                options |= {"temperature": 0.8, "seed": self.rng.randrange(100), "top_p": 0.9}
            stop_after = self.rng.randint(0, 20) if self.rng.random() < 1 / 3 else None
            request = body(self.prompts[index], max_tokens, **options)
            try:
                tokens = await self._tokens(http, request, stop_after)
            except Exception as error:
                tally.faults.append(f"{type(error).__name__}: {error}")
                continue
            if tokens is None:
                tally.aborted += 1
            elif len(tokens) != max_tokens:
                tally.faults.append(f"{len(tokens)} tokens for max_tokens={max_tokens}")
            elif not is_greedy:
                tally.sampled += 1
            elif tokens == self.offline[index][:max_tokens]:
                tally.finished[index] += 1
            else:
                tally.faults.append(f"other text for prompt {index}: {tokens}")

    async def _tokens(
        self, http: httpx.AsyncClient, request: dict[str, Any], stop_after: int | None
    ) -> list[int] | None:
        """Stream a completion; None if the client went away after so many pieces of it."""
        tokens: list[int] = []
        num_pieces = 0
        async with http.stream("POST", self.url, json=request) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if num_pieces == stop_after:
                    return None
                if line.startswith("data: {"):
                    num_pieces += 1
                    data = json.loads(line.removeprefix("data: "))
                    if "choices" not in data:
                        raise RuntimeError(str(data))
                    tokens += data["choices"][0]["token_ids"]
        return tokens


async def run_clients(server: Server, prompts: Prompts, offline: Texts) -> Tally:
    tally = Tally()
    deadline = time.monotonic() + STRESS_S
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        clients = [Client(seed, server, prompts, offline) for seed in range(NUM_CLIENTS)]
        await asyncio.gather(*(client.run(http, deadline, tally) for client in clients))
    return tally


@pytest.mark.slow
@pytest.mark.timeout(900 + STRESS_S)
def test_many_clients_that_come_and_go(
    merged: Path, tmp_path: Path, prompts: Prompts, offline: Texts
) -> None:
    """Fewer KV blocks than 32 requests need and forks for eight: preemptions and fallbacks too."""
    argv = ["-sc.method", "medusa", "-sc.tree", "static", "-sc.max_tree_requests", "8"]
    argv += ["--num-gpu-blocks-override", "280", "--max-num-seqs", "32"]
    with serve(tmp_path, merged, *argv) as server:
        tally = asyncio.run(run_clients(server, prompts, offline))
        assert not tally.faults, (len(tally.faults), tally.faults[:5])
        deadline = time.monotonic() + 60
        while server.metrics()["vllm:num_requests_running"] and time.monotonic() < deadline:
            time.sleep(0.5)
        metrics = server.metrics()
        counted = {name: value for name, value in metrics.items() if "medusa" in name}
        print(tally.finished.total(), tally.sampled, tally.aborted, counted)
        assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0
        assert metrics["vllm:kv_cache_usage_perc"] == 0
        assert metrics["vllm:num_preemptions_total"] > 0
        assert metrics["vllm:medusa_forks_accepted_total"] > 100
        assert metrics["vllm:medusa_chain_fallbacks_total"] > 100
        assert min(tally.finished.total(), tally.aborted, tally.sampled) > STRESS_S / 4
        assert len(tally.finished) > len(prompts) / 2
        server.assert_healthy()
        # The blocks that are left in the prefix cache are right as well.
        response = httpx.post(
            f"{server.url}/v1/completions", json=body(prompts, MAX_TOKENS), timeout=300
        )
        choices = sorted(response.raise_for_status().json()["choices"], key=lambda c: c["index"])
        assert [choice["token_ids"] for choice in choices] == offline
