"""The online comparison without servers: flags, loads, counters, figures, picture."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.bench import online
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.figures import ONLINE, Measurement, figures_of
from vllm_medusa.bench.online import Load, Online, loads_of, measurement_of
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.plots import plot
from vllm_medusa.bench.prompts import BenchPrompt, PromptSet
from vllm_medusa.bench.report import speed_table
from vllm_medusa.bench.run import compare
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.engines.process import EngineProcessError
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
    assert read_counters(text) == {
        "vllm:generation_tokens": 15,
        "vllm:spec_decode_num_accepted_tokens_per_pos": 5,
    }


def measurement(name: str, number: int, latency_ms: float, drafts: int) -> Measurement:
    times = dict.fromkeys(
        ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"), latency_ms / 10
    )
    result: dict[str, Any] = {
        **times,
        "median_e2el_ms": latency_ms,
        "output_throughput": 1000 / latency_ms,
        "request_throughput": 1.0,
        "duration": 1.0,
        "failed": 1,
        "errors": ["not kept"],
    }
    if drafts:  # as vLLM 0.32 and 0.33 say it
        result |= {
            "spec_decode_acceptance_length": 2.5,
            "spec_decode_num_drafts": drafts,
            "spec_decode_per_position_acceptance_rates": [1.0, drafts / 16, 0.0],
        }
    counters = {"vllm:num_preemptions": 2.0, "vllm:corrupted_requests": 0.0}
    return measurement_of(name, Load(2.0), number, result, counters, 2**30)


def test_line_of_a_measurement() -> None:
    line = json.loads(json.dumps(measurement("tree", 1, 50, 8).line))
    assert line["result"]["median_e2el_ms"] == 50
    assert line["result"]["spec_decode_acceptance_length"] == 2.5
    assert "errors" not in line["result"]
    assert line["metrics"] == {"vllm:num_preemptions": 2}


def test_figures_and_their_picture(tmp_path: Path) -> None:
    measurements = [
        measurement("baseline", 1, 100, 0),
        measurement("tree", 1, 50, 8),
        measurement("baseline", 2, 400, 0),  # the machine has become slow
        measurement("tree", 2, 200, 4),
    ]
    baseline, tree = figures_of(measurements, ONLINE)
    assert baseline.spreads["latency_ratio"] is None
    found = tree.spreads["latency_ratio"]
    assert found is not None
    assert found.values == (2.0, 2.0)
    assert tree.median("tokens_per_step") == 2.5
    assert baseline.median("tokens_per_step") == 1.0
    # Of 12 drafts, 12 and 8 / 2 + 4 / 4 were accepted at depth 1 and 2.
    assert tree.acceptance_by_depth == (1.0, 5 / 12)
    assert baseline.acceptance_by_depth == ()
    assert tree.totals == {"num_failed": 2, "num_preemptions": 4}
    assert list(tree.to_json(ONLINE))[:4] == ["variant", "load", "requests_per_s", "tokens_per_s"]
    states = {name: VariantState() for name in ("baseline", "tree")}
    states["tree"].starts.append(EngineInfo(12.0, "cpu", None, 1, 1))
    table = speed_table([baseline, tree], states, ONLINE)
    assert table.rows[1][:2] == ("tree", "2/s")
    assert "2.00 (2.00 to 2.00)" in table.rows[1]
    assert table.rows[1][-3:] == ("2", "1.00", "12.0")
    assert table.columns[-3] == "failed"
    ((name, _),) = plot(tmp_path, [baseline, tree], ONLINE)
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


PROMPTS = PromptSet("file", (BenchPrompt("a", None, (1,), "text"),))


def plan_of(settings: Settings) -> Plan:
    return Plan(
        settings=settings,
        variants=[Variant(name="baseline"), Variant(name="tree", speculative={"method": "m"})],
        unavailable={},
        prompts=PROMPTS,
        options={"model": "M"},
        environment={},
        provenance={"machine": {}},
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_servers_end_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def drive(*arguments: Any) -> dict[str, float]:
        assert len(FakeServer.living) == 1
        raise error

    monkeypatch.setattr(online, "ServerProcess", FakeServer)
    monkeypatch.setattr(online, "drive", drive)
    plan = plan_of(Settings(model="M", alive="all", out=tmp_path))
    with pytest.raises(error):
        compare(plan, Online(plan, tmp_path))
    assert FakeServer.living == set()


def test_load_generator_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `vllm bench serve` is replaced by fails: its last words are the reason."""
    monkeypatch.setattr(online, "VLLM", ("sh", "-c", "echo ValueError: no tokens; exit 3"))
    with pytest.raises(EngineProcessError, match="ended with status 3") as failed:
        online.drive(Settings(model="M"), 1, Load(1.0), 1, [], tmp_path)
    assert failed.value.reason == "ValueError: no tokens"


def test_pandas_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(model="M")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pandas, or give --prompts random"):
        online.dataset_flags(settings, PROMPTS, tmp_path)


def test_prompts_of_the_load_generator(tmp_path: Path) -> None:
    flags = online.dataset_flags(Settings(model="M", max_tokens=7), PROMPTS, tmp_path)
    assert "--skip-chat-template" in flags
    assert flags[-2:] == ["--custom-output-len", "7"]
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "text"}\n'
