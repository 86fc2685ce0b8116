"""Heads say in the engine what they said in training, for the same text (float32)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.integration.conftest import draft_with
from tests.training import make_settings, write_rows
from vllm_medusa.data.rows import Row
from vllm_medusa.training.loop import Outcome, Training
from vllm_medusa.training.report import write_heads
from vllm_medusa.training.run_directory import RunDirectory

pytestmark = pytest.mark.engine

NUM_HEADS = 3
PROMPT = [11, 7, 200, 31, 5, 90, 17, 3, 250]


def train(model: Path, directory: Path, **kind: Any) -> tuple[Training, Outcome]:
    """A few strong steps, so that the heads are far from where they started."""
    rng = np.random.default_rng(0)
    rows = [
        Row(f"row {i}", rng.integers(0, 300, 40).astype(np.int32), np.arange(40) >= 8)
        for i in range(24)
    ]
    data = write_rows(directory / "data", rows)
    training = Training(
        make_settings(
            model=str(model),
            data=str(data),
            num_heads=NUM_HEADS,
            steps=8,
            lr=2e-2,
            batch_tokens=400,
            **kind,
        )
    )
    run_directory = RunDirectory(directory / "heads")
    with run_directory.taken():
        outcome = training.run(run_directory)
        write_heads(training, outcome, run_directory.staging(), directory / "heads")
        run_directory.finish()
    return training, outcome


class RecordingDrafter:
    """Drafts as a runner does; keeps the tokens sampled before it and the heads' logits [K, 1, V].

    For a single request.
    """

    def __init__(self, steps: list[tuple[int, Tensor]], runner: Any) -> None:
        self._steps = steps
        self._drafter = runner.tree_drafter
        self._logits: list[Tensor] = []
        lm_heads = runner.drafter._lm_heads

        def record(features: Tensor) -> list[Tensor]:
            parts = lm_heads.logits(features)
            self._logits.append(torch.cat(parts).clone())
            return parts

        runner.drafter._lm_heads = replace(lm_heads, logits=record)

    def num_paths(self, batch_size: int) -> int:
        return self._drafter.num_paths(batch_size)

    def finish(self, req_ids: Any) -> None:
        self._drafter.finish(req_ids)

    def draft(self, batch: Any) -> list[Any]:
        drafts = self._drafter.draft(batch)
        self._steps.append((len(batch.sampled[0]), self._logits[-1]))
        return drafts


@pytest.mark.parametrize(
    "kind",
    [
        {"num_layers": 2},
        {"lm_head": "own"},
        {"lm_head": "low-rank", "rank": 16},
        {"root_aware": True, "selector": True},
        {"prefix_attention": True, "prefix_window": 12},
    ],
    ids=["shared", "own", "low-rank", "seeing", "prefix"],
)
def test_logits_agree(
    tiny_model: Path,
    tmp_path: Path,
    engine: Callable[..., Any],
    kind: dict[str, Any],
) -> None:
    training, outcome = train(tiny_model, tmp_path, **kind)
    heads = {"method": "medusa", "model": str(tmp_path / "heads"), "tree": "chain"}
    recorded: list[tuple[int, Tensor]] = []
    with engine(speculative_config=heads) as llm:
        from vllm import SamplingParams

        draft_with(llm, lambda runner: RecordingDrafter(recorded, runner))

        greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
    tokens = torch.tensor([PROMPT + list(output.outputs[0].token_ids)])
    hidden = training.target.hidden(tokens, torch.arange(tokens.shape[1])[None])[0]
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1])[None]
        hidden_in_context = outcome.heads.in_context(hidden[None], tokens, positions)[0]
        features = outcome.heads.features(hidden_in_context, tokens[0].roll(-1)[:, None])
    num_sampled = 0
    assert len(recorded) > 10
    for num_new, engines in recorded:
        num_sampled += num_new
        position = len(PROMPT) + num_sampled - 2  # of the last token that was computed
        with torch.no_grad():
            ours = [outcome.heads.logits(features[k, position][None], k) for k in range(NUM_HEADS)]
        assert engines.shape == (NUM_HEADS, 1, tiny.VOCAB_SIZE)
        torch.testing.assert_close(engines, torch.stack(ours), atol=1e-4, rtol=0)
        moved = (torch.stack(ours) - training.target.logits(hidden[position])).abs().max()
        assert moved > 0.1  # or heads that did nothing would pass
