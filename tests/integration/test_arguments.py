"""How a user asks for Medusa: every way that vLLM has, and every key of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs

from tests import tiny
from tests.integration.command_line import (
    DEMO_HEADS,
    DEMO_MODEL,
    MEDUSA_HEADS,
    engine_config,
    merge_heads,
    serve_arguments,
)
from tests.integration.conftest import (
    counters,
    draft_with,
    greedy,
    make_oracle,
    open_engine,
    random_prompts,
    spec_metrics,
)
from vllm_medusa.config import MedusaConfig
from vllm_medusa.errors import UserError
from vllm_medusa.plugin import arguments as plugin_arguments
from vllm_medusa.plugin.identity import PROPOSER_CLASS, medusa_config_of
from vllm_medusa.tree.draft_tree import DraftTree, write_tree_file
from vllm_medusa.tree.limits import DynamicTrees
from vllm_medusa.tree.named import default_paths, named_tree, tree_names
from vllm_medusa.tree.schedule import TreeSchedule, read_schedule_file, write_schedule_file

pytestmark = pytest.mark.engine

H = str(MEDUSA_HEADS)
DEMO_TREE = json.loads((MEDUSA_HEADS / "medusa_tree.json").read_text())["paths"]
PATHS = [[0], [1], [0, 0]]
PROMPTS = random_prompts(3, seed=1)


def resolved(vllm_config: Any) -> MedusaConfig:
    """Our part of a configuration, once vLLM's part was seen to fit it."""
    config = medusa_config_of(vllm_config)
    assert config is not None
    speculative = vllm_config.speculative_config
    assert (speculative.method, speculative.model) == ("custom_class", PROPOSER_CLASS)
    assert speculative.num_speculative_tokens == config.limits.max_nodes
    assert vllm_config.parallel_config.worker_cls == "vllm_medusa.plugin.worker.worker.MedusaWorker"
    return config


def tree_of(speculative_config: Any, model: Path = DEMO_MODEL) -> DraftTree:
    return resolved(engine_config(model, speculative_config)).tree


def demo(**keys: Any) -> dict[str, Any]:
    return {"method": "medusa", "model": H, **keys}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("merged") / "model"
    return merge_heads(DEMO_MODEL, MEDUSA_HEADS, directory, "medusa_head.")


@pytest.mark.parametrize(
    "argv",
    [
        ["--speculative-config", json.dumps(demo(tree=PATHS))],
        ["-sc", json.dumps(demo(tree=PATHS))],
        [f"--speculative-config={json.dumps(demo(tree=PATHS))}"],
        ["--speculative_config", json.dumps(demo(tree=PATHS))],
        [
            *("--speculative-config.method", "medusa", "--speculative-config.model", H),
            *("--speculative-config.tree", json.dumps(PATHS)),
        ],
        ["-sc.method", "medusa", "-sc.model", H, "-sc.tree", json.dumps(PATHS)],
        ["--spec-method", "medusa", "--spec-model", H, "-sc.tree", json.dumps(PATHS)],
        ["--spec-method=medusa", "--speculative-config", json.dumps({"model": H, "tree": PATHS})],
    ],
    ids=lambda argv: argv[0].split("=")[0] + f"-{len(argv)}",
)
def test_command_line(argv: list[str]) -> None:
    config = resolved(serve_arguments(DEMO_MODEL, *argv).create_engine_config())
    assert config.heads == H
    assert config.tree == DraftTree.from_paths(PATHS)


def test_command_line_with_a_number_of_tokens() -> None:
    argv = ["--spec-method", "medusa", "--spec-model", H, "--spec-tokens", "7"]
    config = resolved(serve_arguments(DEMO_MODEL, *argv).create_engine_config())
    assert config.tree == DraftTree.from_paths(DEMO_TREE[:7])


@pytest.mark.parametrize(
    "argv",
    [
        ["--speculative-config", "medusa"],
        ["--speculative-config=medusa"],
        ["-sc", "medusa"],
        ["--spec-method", "medusa"],
        ["--speculative-config.method", "medusa"],
    ],
    ids=lambda argv: " ".join(argv),
)
def test_heads_in_the_model_on_the_command_line(merged: Path, argv: list[str]) -> None:
    config = resolved(serve_arguments(merged, *argv).create_engine_config())
    assert config.heads == str(merged)
    assert config.tree == DraftTree.from_paths(DEMO_TREE)
    assert config.dynamic is not None


@pytest.mark.parametrize("value", ["medusa", {"method": "medusa", "tree": "cpu-8"}], ids=str)
def test_configuration_file(merged: Path, tmp_path: Path, value: Any) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(f"speculative-config: {json.dumps(value)}\n")
    config = resolved(serve_arguments(merged, "--config", str(path)).create_engine_config())
    assert config.heads == str(merged)
    assert config.limits.max_nodes == (16 if value == "medusa" else 8)
    assert (config.dynamic is not None) == (value == "medusa")


def test_other_values_stay_json() -> None:
    arguments = serve_arguments(DEMO_MODEL, "--speculative-config", '{"method": "ngram"}')
    assert arguments.speculative_config == {"method": "ngram"}
    with pytest.raises(SystemExit):
        serve_arguments(DEMO_MODEL, "--speculative-config", "ngram")


@pytest.mark.parametrize(
    "arguments",
    [
        {"speculative_config": demo(num_speculative_tokens=5)},
        {"speculative_config": demo(), "spec_tokens": 5},
        {"spec_method": "medusa", "spec_model": H, "spec_tokens": 5},
        {"spec_method": "medusa", "speculative_config": {"model": H}, "spec_tokens": 5},
        {"speculative_config": {"method": "medusa", "model": H, "num-speculative-tokens": 5}},
    ],
)
def test_engine_arguments(arguments: dict[str, Any]) -> None:
    config = resolved(EngineArgs(model=str(DEMO_MODEL), **arguments).create_engine_config())
    assert config.heads == H
    assert config.tree == DraftTree.from_paths(DEMO_TREE[:5])


def test_engine_arguments_can_be_used_again(merged: Path) -> None:
    """vLLM makes a configuration twice from the same arguments, for instance with API servers."""
    arguments = EngineArgs(
        model=str(merged), speculative_config="medusa", additional_config={"mine": 1}
    )
    first = arguments.create_engine_config()
    assert arguments.speculative_config == "medusa"
    assert arguments.additional_config == {"mine": 1}
    assert arguments.worker_cls == "auto"
    second = arguments.create_engine_config()
    assert resolved(first) == resolved(second)
    assert first.additional_config == second.additional_config
    assert first.additional_config["mine"] == 1


# The keys.


@pytest.mark.parametrize("name", tree_names())
def test_named_tree(name: str) -> None:
    assert tree_of(demo(tree=name)) == named_tree(name, 4)


def test_tree_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path)))
    path = tmp_path / "tree.json"
    write_tree_file(path, PATHS)
    (tmp_path / "bare").write_text(json.dumps(PATHS))
    (tmp_path / "chain").write_text(json.dumps(PATHS))
    expected = DraftTree.from_paths(PATHS)
    assert tree_of(demo(tree=str(path))) == expected
    assert tree_of(demo(tree=str(tmp_path / "bare"))) == expected
    assert tree_of(demo(tree="~/tree.json")) == expected
    monkeypatch.chdir(tmp_path)
    assert tree_of(demo(tree="tree.json")) == expected
    # A file does not hide a named tree.
    assert tree_of(demo(tree="chain")) == DraftTree.chain(4)


def test_path_objects(tmp_path: Path) -> None:
    write_tree_file(tmp_path / "tree.json", PATHS)
    spec = {"method": "medusa", "model": MEDUSA_HEADS, "tree": tmp_path / "tree.json"}
    config = resolved(engine_config(DEMO_MODEL, spec))
    assert (config.heads, config.tree) == (H, DraftTree.from_paths(PATHS))
    arguments = EngineArgs(model=str(DEMO_MODEL), spec_method="medusa", spec_model=MEDUSA_HEADS)
    assert resolved(arguments.create_engine_config()).heads == H


def test_auto_is_dynamic_on_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, vllm

    messages: list[str] = []
    monkeypatch.setattr(plugin_arguments.logger, "info", messages.append)
    bounds = DynamicTrees(max_nodes=9, max_depth=5, learn=False)
    spec = demo(max_nodes=9, max_depth=5, learn=False)
    config = resolved(engine_config(DEMO_MODEL, spec))
    assert config.dynamic == bounds
    assert config == resolved(engine_config(DEMO_MODEL, {**spec, "tree": "auto"}))
    assert config == resolved(engine_config(DEMO_MODEL, {**spec, "tree": "dynamic"}))
    static = resolved(engine_config(DEMO_MODEL, demo(tree="static")))
    # vLLM itself takes V1 where there is no Triton.
    monkeypatch.setattr(vllm, "HAS_TRITON", True)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    assert resolved(engine_config(DEMO_MODEL, demo())) == static
    expected = "Medusa: tree='auto' is 'static' on Model Runner V2"
    assert messages == [expected]
    with pytest.raises(UserError, match="max_nodes=9 is for dynamic trees, but tree='auto' is"):
        engine_config(DEMO_MODEL, spec)


def test_static_trees(tmp_path: Path, tiny_model: Path) -> None:
    schedule = read_schedule_file(DEMO_HEADS / "medusa_tree_schedule.json")
    assert tree_of(demo(tree="static", model=str(DEMO_HEADS))) == schedule.tree()
    heads = tiny.make_heads(tmp_path / "heads", num_heads=2)
    spec = {"method": "medusa", "model": str(heads), "tree": "static"}
    config = resolved(engine_config(tiny_model, spec, skip_tokenizer_init=True))
    assert config.tree == DraftTree.from_paths(default_paths(2, 16))
    assert config.tree.depth == 2
    write_tree_file(heads / "medusa_tree.json", PATHS)
    config = resolved(engine_config(tiny_model, spec, skip_tokenizer_init=True))
    assert config.tree == DraftTree.from_paths(PATHS)
    assert config.tree_name == "static: 3 nodes from the heads' checkpoint"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_speculative_tokens": 1}, DEMO_TREE[:1]),
        ({"num_speculative_tokens": 33}, DEMO_TREE[:33]),
        ({"num_speculative_tokens": 64, "tree": "auto"}, DEMO_TREE),
        ({"num_speculative_tokens": 3, "tree": PATHS}, PATHS),
        ({"num_speculative_tokens": 3, "tree": "chain"}, [[0], [0, 0], [0, 0, 0]]),
        ({"num_speculative_tokens": 63, "tree": "mc_sim_7b_63"}, None),
    ],
)
def test_number_of_tokens(keys: dict[str, Any], expected: Any) -> None:
    tree = tree_of(demo(**keys))
    assert tree.num_draft_tokens == keys["num_speculative_tokens"]
    assert tree == (DraftTree.from_paths(expected) if expected else named_tree(keys["tree"], 4))


def test_trees_by_batch_size(tmp_path: Path, tiny_model: Path) -> None:
    sizes = [[1, 4, 12], [5, 64, 3], [65, 256, 0]]
    spec = demo(num_speculative_tokens_per_batch_size=sizes)
    config = resolved(engine_config(DEMO_MODEL, spec))
    assert config.sizes_by_batch == ((1, 4, 12), (5, 64, 3), (65, 256, 0))
    assert config.tree == DraftTree.from_stages([DEMO_TREE[:3], DEMO_TREE[:12]])
    heads = tiny.make_heads(tmp_path / "heads", num_heads=2)
    schedule = TreeSchedule.from_entries([(3, PATHS), (None, [[0]])])
    write_schedule_file(heads / "medusa_tree_schedule.json", schedule)
    spec = {"method": "medusa", "model": str(heads), "tree": "static"}
    config = resolved(engine_config(tiny_model, spec, skip_tokenizer_init=True))
    assert config.tree == schedule.tree()
    assert config.sizes_by_batch == ((1, 3, 3), (4, 4, 1))


def test_other_keys() -> None:
    spec = demo(acceptance="lossless", max_tree_requests=3, revision="main", tree=None)
    config = resolved(engine_config(DEMO_MODEL, spec))
    assert (config.max_tree_requests, config.revision) == (3, "main")
    assert config.tree_name == "dynamic, up to 16 nodes of heads and text"


# Engines that are asked for in these ways.


@pytest.fixture(scope="module")
def apart(tiny_model: Path, tiny_heads: Path) -> tuple[list[list[int]], list[int]]:
    """Text without speculation, and drafts of heads in a directory of their own."""
    with open_engine(tiny_model) as llm:
        reference = greedy(llm, PROMPTS, 40)
    spec = {"method": "medusa", "model": str(tiny_heads)}
    with open_engine(tiny_model, speculative_config=spec) as llm:
        return reference, first_drafts(llm)


@pytest.mark.parametrize("prefix", ["medusa_head.", None])
def test_model_that_holds_its_heads(
    tiny_model: Path,
    tiny_heads: Path,
    tmp_path: Path,
    apart: tuple[list[list[int]], list[int]],
    prefix: str | None,
) -> None:
    """A merged Medusa-2 model, and heads in a file of their own beside the model's."""
    reference, drafts = apart
    directory = merge_heads(tiny_model, tiny_heads, tmp_path / "merged", prefix)
    with open_engine(directory, speculative_config="medusa") as llm:
        assert first_drafts(llm) == drafts
        oracle = make_oracle(PROMPTS, reference)
        draft_with(llm, lambda runner: tiny.OracleDrafter(oracle, runner))
        assert greedy(llm, PROMPTS, 40) == reference
        assert counters(llm)["forks_accepted"] > 10
        # Reloading goes the same way.
        llm.collective_rpc("reload_weights")
        assert greedy(llm, PROMPTS, 40) == reference


def first_drafts(llm: Any) -> list[int]:
    """What the heads draft from a fixed hidden state."""
    import torch

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    hidden = torch.linspace(-2, 2, tiny.HIDDEN_SIZE)[None]
    roots = torch.zeros(len(hidden), dtype=torch.int64)
    return worker.model_runner.drafter.propose(hidden, roots).tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"speculative_config": demo(tree="cpu-16")},
        {"spec_method": "medusa", "spec_model": H, "spec_tokens": 16},
    ],
    ids=["speculative_config", "spec_method"],
)
def test_offline(arguments: dict[str, Any]) -> None:
    with open_engine(DEMO_MODEL, skip_tokenizer_init=False, **arguments) as llm:
        greedy(llm, ["def main(", "class Queue:\n"], 40)
        assert spec_metrics(llm)["num_accepted_tokens"] > 20
        assert counters(llm)["forks_accepted"] > 0


def bench_arguments(*extra: str) -> list[str]:
    return [
        *("--model", str(DEMO_MODEL), "--speculative-config", json.dumps(demo())),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *("--num-gpu-blocks-override", "200", "--block-size", "32"),
        *extra,
    ]


def test_bench_latency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numpy as np
    from vllm.benchmarks import latency
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # It draws token ids below 10,000, which is more than the demo model has.
    randint = np.random.randint
    monkeypatch.setattr(
        np.random,
        "randint",
        lambda low, *rest, **kw: randint(4000 if low == 10000 else low, *rest, **kw),
    )
    path = tmp_path / "latency.json"
    parser = FlexibleArgumentParser()
    latency.add_cli_args(parser)
    options = ["--input-len", "8", "--output-len", "12", "--batch-size", "2"]
    options += ["--num-iters-warmup", "1", "--num-iters", "2"]
    latency.main(parser.parse_args(bench_arguments(*options, "--output-json", str(path))))
    assert json.loads(path.read_text())["avg_latency"] > 0


def test_bench_throughput(tmp_path: Path) -> None:
    from vllm.benchmarks import throughput
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    path = tmp_path / "throughput.json"
    parser = FlexibleArgumentParser()
    throughput.add_cli_args(parser)
    options = ["--dataset-name", "random", "--num-prompts", "3"]
    options += ["--random-input-len", "8", "--random-output-len", "12"]
    throughput.main(parser.parse_args(bench_arguments(*options, "--output-json", str(path))))
    assert json.loads(path.read_text())["num_requests"] == 3


def test_llm_takes_the_bare_string(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM(..., speculative_config="medusa")`, up to the point where the engine would start."""
    from vllm.v1.engine.llm_engine import LLMEngine

    class StopHereError(Exception):
        pass

    def from_engine_args(engine_args: EngineArgs, **kwargs: Any) -> Any:
        raise StopHereError(resolved(engine_args.create_engine_config()).heads)

    monkeypatch.setattr(LLMEngine, "from_engine_args", from_engine_args)
    with pytest.raises(StopHereError, match=os.fspath(merged)):
        LLM(str(merged), speculative_config="medusa")
