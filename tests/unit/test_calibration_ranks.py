"""The ranks that heads give the right tokens, against one position after another, plainly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import tiny
from vllm_medusa.acceptance import ranks as R
from vllm_medusa.acceptance.paths import RANK_CAP
from vllm_medusa.acceptance.texts import Text
from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads, head_logits, load_heads
from vllm_medusa.target.frozen import FrozenTarget, load_target

NUM_HEADS = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    model = tiny.make_model(tmp_path_factory.mktemp("model"))
    return load_target(str(model), revision=None, dtype=torch.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> HeadsCheckpoint:
    return load_heads(tiny.make_heads(tmp_path_factory.mktemp("heads"), NUM_HEADS))


def texts() -> list[Text]:
    rng = np.random.default_rng(1)
    lengths = [(9, 30, False), (3, 12, True), (20, 3, True), (5, 2, False), (4, 1, True)]
    result = []
    for index, (num_prompt, num_new, has_ended) in enumerate(lengths):
        tokens = rng.integers(0, 300, num_prompt + num_new).tolist()
        result.append(Text(f"p{index}", 0.0, tokens, num_prompt, has_ended))
    looping = [5, 6, 7] * 12
    return [*result, Text("loop", 0.7, [1, 2, 3, *looping], 3, False)]


def plain_ranks(target: FrozenTarget, checkpoint: HeadsCheckpoint, text: Text) -> list[list[int]]:
    """Rank by sorting, a forward pass for every position."""
    heads = MedusaHeads.from_checkpoint(checkpoint, torch.float32)
    weight = checkpoint.tensors.get("lm_head.weight", target.weight)
    token_map = checkpoint.tensors.get("token_map", torch.arange(tiny.VOCAB_SIZE)).tolist()
    new = text.continuation
    rows = []
    for position in range(len(new) - 1 if text.has_ended else len(new) - NUM_HEADS):
        before_root = text.token_ids[: text.num_prompt_tokens + position]
        with torch.no_grad():
            model = target.model.model
            hidden = model(input_ids=torch.tensor([before_root])).last_hidden_state[0, -1:]
            logits = head_logits(heads(hidden), weight=weight)[:, 0]
        row = []
        for head in range(NUM_HEADS):
            place = position + 1 + head
            order = [token_map[i] for i in logits[head].argsort(descending=True).tolist()]
            known = place < len(new) and new[place] in order
            row.append(min(RANK_CAP, order.index(new[place])) if known else RANK_CAP)
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", ["own", "target", "token_map"])
def test_ranks_are_those_of_sorting(
    target: FrozenTarget, checkpoint: HeadsCheckpoint, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = dict(checkpoint.tensors)
    spec = checkpoint.spec
    if kind == "target":
        del tensors["lm_head.weight"]
        spec = replace(spec, lm_head="target")
    if kind == "token_map":
        token_map = torch.randperm(tiny.VOCAB_SIZE, generator=torch.Generator().manual_seed(0))[
            :200
        ]
        tensors["token_map"] = token_map
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, token_map]
    checkpoint = replace(checkpoint, spec=spec, tensors=tensors)
    # Several batches, and several chunks of a text.
    monkeypatch.setattr(R, "_BATCH_TOKENS", 60)
    monkeypatch.setattr(R, "_MAX_LOGITS", 7 * NUM_HEADS * tiny.VOCAB_SIZE)
    # Heads near the target's own guesses, or nearly all ranks would be misses.
    tensors["blocks.weight"] = tensors["blocks.weight"] * 0.1
    given = texts()
    done: list[int] = []
    found = R.RankMeter(target, checkpoint).measure(given, done.append)
    assert sum(done) == len(given)
    for text, continuation in zip(given, found, strict=True):
        assert continuation.prompt_id == text.prompt_id
        assert continuation.temperature == text.temperature
        assert continuation.ranks.tolist() == plain_ranks(target, checkpoint, text)
    assert any((continuation.ranks < RANK_CAP).any() for continuation in found)


def test_positions_before_the_loop(target: FrozenTarget, checkpoint: HeadsCheckpoint) -> None:
    *others, looping = R.RankMeter(target, checkpoint).measure(texts(), lambda _: None)
    # The run of 16 tokens that begins at token 3 stood at token 0 before.
    assert looping.num_before_loop == 3 - NUM_HEADS
    for continuation in others:
        expected = max(0, len(continuation.ranks))
        assert continuation.num_before_loop <= expected
    assert others[0].num_before_loop == len(others[0].ranks) == 27
