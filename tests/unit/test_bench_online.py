"""The online comparison without servers: flags, loads, counters, figures, picture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.bench import online
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.online import Load, OnlineMeasurement, loads_of, run_online
from vllm_medusa.bench.online_report import online_figures_of, online_table, plot_online
from vllm_medusa.bench.prompts import BenchPrompt, PromptSet
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import EngineInfo, EngineProcessError
from vllm_medusa.engines.server import as_flags, read_counters
from vllm_medusa.errors import UserError


def test_options_as_flags() -> None:
    options = {
        "max_model_len": 512,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "hf_overrides": {"a": [1]},
        "dtype": "float32",
        "tokenizer": None,
    }
    assert as_flags(options) == [
        *("--max-model-len", "512", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--hf-overrides", '{"a": [1]}', "--dtype", "float32"),
    ]


def test_loads() -> None:
    settings = Settings(model="M", request_rates=(1.0, math.inf), concurrency=(4,))
    assert list(map(str, loads_of(settings))) == ["1/s, 4 at once", "all at once, 4 at once"]
    settings = Settings(model="M", request_rates=(0.5,))
    assert loads_of(settings) == [Load(0.5, None)]


def test_counters() -> None:
    text = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} 10.0
vllm:generation_tokens_total{engine="1"} 5.0
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0"} 1.7e+09
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 1.0
# TYPE other_total counter
other_total 1.0
"""
    per_pos = "vllm:spec_decode_num_accepted_tokens_per_pos"
    assert read_counters(text) == {
        "vllm:generation_tokens": 15,
        per_pos: 5,
        f"{per_pos}/0": 4,
        f"{per_pos}/1": 1,
    }


def measurement(name: str, number: int, latency_ms: float, drafts: int) -> OnlineMeasurement:
    times = dict.fromkeys(
        ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"), latency_ms / 10
    )
    result = {
        **times,
        "median_e2el_ms": latency_ms,
        "output_throughput": 1000 / latency_ms,
        "request_throughput": 1.0,
        "duration": 1.0,
        "failed": 1,
    }
    metrics = {
        "vllm:spec_decode_num_drafts": drafts,
        "vllm:spec_decode_num_accepted_tokens": 1.5 * drafts,
        "vllm:spec_decode_num_accepted_tokens_per_pos/0": drafts,
        "vllm:spec_decode_num_accepted_tokens_per_pos/1": drafts / 2,
        "vllm:spec_decode_num_accepted_tokens_per_pos/2": 0,
        "vllm:num_preemptions": 2,
    }
    return OnlineMeasurement(name, Load(2.0), number, result, metrics, 2**30)


def test_figures_and_their_picture(tmp_path: Path) -> None:
    measurements = [
        measurement("baseline", 1, 100, 0),
        measurement("tree", 1, 50, 8),
        measurement("baseline", 2, 400, 0),  # the machine has become slow
        measurement("tree", 2, 200, 8),
    ]
    baseline, tree = online_figures_of(measurements)
    assert baseline.latency_ratio is None
    assert tree.latency_ratio is not None
    assert tree.latency_ratio.values == (2.0, 2.0)
    assert tree.tokens_per_step.median == 2.5
    assert baseline.tokens_per_step.median == 1.0
    assert tree.acceptance_by_depth == (1.0, 0.5)
    assert baseline.acceptance_by_depth == ()
    assert (tree.num_failed, tree.num_preemptions) == (2, 4)
    states = {name: VariantState() for name in ("baseline", "tree")}
    states["tree"].starts.append(EngineInfo(12.0, "cpu", None, 1, 1))
    table = online_table([baseline, tree], states)
    assert table.rows[1][:2] == ("tree", "2/s")
    assert "2.00 (2.00 to 2.00)" in table.rows[1]
    ((name, _),) = plot_online(tmp_path, [baseline, tree])
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


class FakeServer:
    """Counts itself among the living."""

    living: set[str] = set()  # noqa: RUF012
    port = 1

    def __init__(self, model: str, speculative: Any, options: Any, environment: Any) -> None:
        self.name = str(speculative)
        self.living.add(self.name)

    def wait(self) -> EngineInfo:
        return EngineInfo(1.0, "cpu", None, 1, 1)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self, patience_s: float = 20) -> None:
        self.living.remove(self.name)


class SilentWatcher:
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


PROMPTS = PromptSet("file", (BenchPrompt("a", None, (1,), "text"),))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_servers_end_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def drive(*arguments: Any) -> dict[str, float]:
        assert len(FakeServer.living) == 1
        raise error

    monkeypatch.setattr(online, "ServerProcess", FakeServer)
    monkeypatch.setattr(online, "_drive", drive)
    with pytest.raises(error):
        run_online(
            Settings(model="M", alive="all"),
            [Variant(name="baseline"), Variant(name="tree", speculative={"method": "medusa"})],
            PROMPTS,
            {"model": "M"},
            {},
            {},
            SilentWatcher(),
            tmp_path,
        )
    assert FakeServer.living == set()


def test_load_generator_that_fails() -> None:
    """What `vllm bench serve` is replaced by fails: its last words are the reason."""
    status, log = online._run(["sh", "-c", "echo ValueError: no tokens; exit 3"])
    assert status == 3
    assert EngineProcessError(log).reason == "ValueError: no tokens"


def test_pandas_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(model="M")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pandas, or give --prompts random"):
        online._dataset_flags(settings, PROMPTS, tmp_path)


def test_prompts_of_the_load_generator(tmp_path: Path) -> None:
    flags = online._dataset_flags(Settings(model="M", max_tokens=7), PROMPTS, tmp_path)
    assert "--skip-chat-template" in flags
    assert flags[-2:] == ["--custom-output-len", "7"]
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "text"}\n'
