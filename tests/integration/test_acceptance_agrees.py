"""`train`, `calibrate` and its check give equal figures on the same texts (float32).

The demo model, made to end some of its answers: the others are cut by the limit of tokens, and some
of those loop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS, REPO
from tests.integration.seeing_heads import RANK, WINDOW, seeing_tensors
from tests.training import make_settings
from vllm_medusa.acceptance.texts import counted_positions
from vllm_medusa.acceptance.trees import best_paths
from vllm_medusa.calibration.check import check_trees, steps_of
from vllm_medusa.calibration.texts import Request
from vllm_medusa.cli import main as cli
from vllm_medusa.data.rows import Row, write_shard
from vllm_medusa.engines.engine import EngineProcess, Run, start_engine
from vllm_medusa.heads import load_heads
from vllm_medusa.training.dataset import load_dataset
from vllm_medusa.training.evaluate import summary
from vllm_medusa.training.loop import Outcome, Training
from vllm_medusa.training.report import write_heads
from vllm_medusa.training.run_directory import RunDirectory

pytestmark = pytest.mark.engine

TEMPERATURE = 0.8
NUM_PROMPTS, MAX_TOKENS, NUM_HEADS, SIZE = 32, 64, 4, 16
#: An empty line and the indent of the next one.
END_TOKENS = [320, 381]
ENGINE = {
    "max_model_len": 512,
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 2**28,
}


@dataclass
class Sampled:
    """Other prompts, each with its own seed, and their sampled answers."""

    rows: Path
    prompts: list[list[int]]
    run: Run

    def run_on(self, engine: EngineProcess) -> Run:
        seeds = list(range(len(self.prompts)))
        return engine.run(self.prompts, MAX_TOKENS, temperature=TEMPERATURE, seeds=seeds)


@dataclass
class Texts:
    """A model, its answers to some prompts, and the rows of them that `train` holds out."""

    model: Path
    rows: Path
    held_out: list[Row]
    run: Run
    sampled: Sampled

    @property
    def options(self) -> dict[str, Any]:
        return {"model": str(self.model), "dtype": "float32", "seed": 0, **ENGINE}

    def requests(self) -> list[Request]:
        prompts = [row.token_ids[: row.answers()[0][0]].tolist() for row in self.held_out]
        return [Request(row.id, tokens) for row, tokens in zip(self.held_out, prompts, strict=True)]


def write_rows(directory: Path, prompts: list[list[int]], run: Run) -> None:
    """Prompts with their answers, as `distill` writes them."""
    directory.mkdir()
    rows = [
        Row(
            f"row {index}",
            np.array(prompt + answer, dtype=np.int32),
            np.arange(len(prompt + answer)) >= len(prompt),
        )
        for index, (prompt, answer) in enumerate(zip(prompts, run.token_ids, strict=True))
    ]
    write_shard(directory / "part-00000.jsonl", rows)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("texts")
    model = Path(shutil.copytree(DEMO_MODEL, directory / "model"))
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": END_TOKENS}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (REPO / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    prompts, other_prompts = tokens[:NUM_PROMPTS], tokens[NUM_PROMPTS:]
    sampled = Sampled(directory / "sampled", other_prompts, None)  # type: ignore[arg-type]
    texts = Texts(model, directory / "rows", [], None, sampled)  # type: ignore[arg-type]
    with EngineProcess(texts.options) as engine:
        engine.wait()
        texts.run = engine.run(prompts, MAX_TOKENS)
        sampled.run = sampled.run_on(engine)
    write_rows(texts.rows, prompts, texts.run)
    write_rows(sampled.rows, other_prompts, sampled.run)
    made = {"num_shards": 1, "made_from": {"temperature": TEMPERATURE}}
    (sampled.rows / "distill.json").write_text(json.dumps(made))
    dataset = load_dataset(texts.rows, vocab_size=4096, max_tokens=512, held_out=0.5)
    texts.held_out = dataset.held_out
    return texts


def trained(
    texts: Texts, heads: Path, sees_tokens: bool, test_data: Sequence[Path] = ()
) -> Outcome:
    """What `train` finds, of the demo's heads in place of those that it starts from."""
    settings = make_settings(
        model=str(texts.model),
        data=str(texts.rows),
        num_heads=NUM_HEADS,
        num_layers=3,
        lr=1e-9,
        steps=1,
        batch_tokens=1024,
        held_out=0.5,
        root_aware=sees_tokens,
        selector=sees_tokens,
        selector_rank=RANK,
        prefix_attention=sees_tokens,
        prefix_window=WINDOW,
        test_data=test_data,
    )
    training = Training(settings)
    demo = load_heads(MEDUSA_HEADS)
    state = {
        f"blocks.{name}": demo.tensors[f"blocks.{name}"].transpose(0, 1).float()
        for name in ("weight", "bias")
    }
    if sees_tokens:
        seeing = seeing_tensors(demo, 4096)
        parts = seeing.pop("prefix.query")[None], seeing.pop("prefix.key_value")
        seeing["prefix.projection"] = torch.cat(parts)
        state |= {name.replace("root.weight", "blocks.root"): seeing[name] for name in seeing}
    training._heads.load_state_dict(state)
    directory = RunDirectory(heads)
    with directory.taken():
        outcome = training.run(directory)
        write_heads(training, outcome, directory.staging(), heads)
        directory.finish()
    return outcome


def calibrated(texts: Texts, heads: Path, directory: Path) -> dict[str, Any]:
    """The report of a calibration on the held-out rows."""
    (directory / "held").mkdir()
    write_shard(directory / "held" / "part-00000.jsonl", texts.held_out)
    arguments = [
        *("calibrate", heads, "--model", texts.model, "--prompts", directory / "held"),
        *("--dtype", "float32", "--no-step-costs", "--sizes", SIZE, "--out", directory / "out"),
    ]
    assert cli.main([str(argument) for argument in arguments]) == 0
    report: dict[str, Any] = json.loads((directory / "out" / "calibration.json").read_text())
    return report


@pytest.mark.parametrize("sees_tokens", [False, True])
def test_train_calibrate_and_check_give_equal_figures(
    texts: Texts, tmp_path: Path, sees_tokens: bool
) -> None:
    has_ended = [times.has_ended for times in texts.run.requests]
    assert 5 < sum(has_ended) < NUM_PROMPTS - 5
    outcome = trained(texts, tmp_path / "heads", sees_tokens)
    report = calibrated(texts, tmp_path / "heads", tmp_path)
    paths = [tuple(path) for path in report["paths"]["joint"]]
    (checked,) = check_trees(
        texts.options,
        {"method": "medusa", "model": str(tmp_path / "heads")},
        [("joint", SIZE, paths)],
        texts.requests(),
        max_tokens=MAX_TOKENS,
        num_heads=NUM_HEADS,
        seed=0,
        progress=lambda _: None,
    )
    sections = {section["with_loops"]: section for section in report["sections"]}
    assert sections[True]["num_positions"] > sections[False]["num_positions"] + 50
    for name, with_loops in (("with_loops", True), ("without_loops", False)):
        figures, section = summary(outcome.continuations, paths)[name], sections[with_loops]
        by_train, by_calibrate = figures["acceptance_length"], section["methods"]["joint"][0]
        length = by_train[f"tree of {SIZE}"]
        assert length > 1.5
        assert length == round(by_calibrate["in_sample"], 4)
        assert length == round(getattr(checked, name).value, 4)
        chain = round(section["chains"][NUM_HEADS - 1]["value"], 4)
        assert by_train[f"chain of {NUM_HEADS}"] == chain
        assert figures["positions"] == section["num_positions"]
        assert figures["accuracy"] == rounded(section["accuracy"])


@pytest.mark.parametrize("sees_tokens", [False, True])
def test_sampled_test_data_is_counted_as_the_engine_samples(
    texts: Texts, tmp_path: Path, sees_tokens: bool
) -> None:
    """Along the samples of an engine without drafts: as many steps as it takes with a tree."""
    outcome = trained(texts, tmp_path / "heads", sees_tokens, [texts.sampled.rows])
    ((test, continuations),) = outcome.tested
    assert test.temperature == TEMPERATURE
    paths = best_paths([item.ranks for item in outcome.continuations], SIZE)
    tree = [list(path) for path in paths]
    config = {"method": "medusa", "model": str(tmp_path / "heads"), "tree": tree}
    config = {**config, "max_tree_requests": len(texts.sampled.prompts)}
    with start_engine({**texts.options, "speculative_config": config}) as engine:
        run = texts.sampled.run_on(engine)
    assert run.token_ids == texts.sampled.run.token_ids
    counts = np.array(steps_of(run, NUM_HEADS)).sum(axis=0)
    for (tokens, steps), figures in zip(
        counts, summary(continuations, paths).values(), strict=True
    ):
        assert steps > 200
        length = figures["acceptance_length"][f"tree of {SIZE}"]
        assert length == round(tokens / steps, 4)
        assert length > 1.1


def rounded(accuracy: dict[str, Sequence[float]]) -> dict[str, list[float]]:
    return {top: [round(share, 4) for share in shares] for top, shares in accuracy.items()}


def test_rows_tell_which_answers_have_ended_as_the_engine_does(texts: Texts) -> None:
    """Rows by their last token, the engine by why it stopped: the same positions count."""
    for tokens, times in zip(texts.run.token_ids, texts.run.requests, strict=True):
        assert times.has_ended == (tokens[-1] in END_TOKENS)
        counted = counted_positions(tokens, times.has_ended, NUM_HEADS)
        assert counted.total == (len(tokens) - 1 if times.has_ended else MAX_TOKENS - NUM_HEADS - 1)
