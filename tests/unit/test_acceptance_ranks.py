"""The ranks that heads give the right tokens, against one position after another, plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import tiny
from tests.oracles import heads as oracle
from tests.sequential_checkpoints import make_hydra, make_mlp_speculator
from tests.training import make_settings
from vllm_medusa.acceptance.ranks import Heads, RankMeter, rank_of, wanted_tokens
from vllm_medusa.acceptance.statistics import RANK_CAP
from vllm_medusa.acceptance.stored_heads import StoredHeads
from vllm_medusa.acceptance.texts import Answer, Text
from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads, head_logits, load_heads
from vllm_medusa.target import frozen
from vllm_medusa.target.frozen import FrozenTarget, load_target
from vllm_medusa.training.model import TrainableHeads

NUM_HEADS = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    model = tiny.make_model(tmp_path_factory.mktemp("model"))
    return load_target(str(model), revision=None, dtype=torch.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> HeadsCheckpoint:
    loaded = load_heads(tiny.make_heads(tmp_path_factory.mktemp("heads"), NUM_HEADS))
    # Heads near the target's own guesses, or nearly all ranks would be misses.
    blocks = loaded.tensors["blocks.weight"] * 0.1
    return replace(loaded, tensors={**loaded.tensors, "blocks.weight": blocks})


def texts() -> list[Text]:
    rng = np.random.default_rng(1)
    lengths = [(9, 30, False), (3, 12, True), (20, 3, True), (5, 2, False), (4, 1, True)]
    result = []
    for index, (num_prompt, num_new, has_ended) in enumerate(lengths):
        tokens = rng.integers(0, 300, num_prompt + num_new).tolist()
        answer = Answer(num_prompt, len(tokens), has_ended)
        result.append(Text(f"p{index}", 0.0, tokens, [answer]))
    tokens = rng.integers(0, 300, 40).tolist()
    result.append(Text("two answers", 0.0, tokens, [Answer(1, 12, True), Answer(20, 40, False)]))
    result.append(Text("no answer", 0.0, tokens[:7], []))
    looping = [1, 2, 3, *[5, 6, 7] * 12]
    return [*result, Text("loop", 0.7, looping, [Answer(3, 39, False)])]


def plain_ranks(
    target: FrozenTarget, checkpoint: HeadsCheckpoint, text: Text, answer: Answer
) -> list[list[int]]:
    """Rank by sorting, a forward pass for every position."""
    is_medusa = checkpoint.spec.kind == "medusa"
    heads = MedusaHeads.from_checkpoint(checkpoint, torch.float32) if is_medusa else None
    weight = checkpoint.tensors.get("lm_head.weight", target.weight)
    token_map = checkpoint.tensors.get("token_map", torch.arange(tiny.VOCAB_SIZE)).tolist()
    last = answer.stop - 1
    rows = []
    for root in range(answer.start, last):
        if not answer.has_ended and root + NUM_HEADS + 1 > last:
            break
        with torch.no_grad():
            hidden = target.model.model(input_ids=torch.tensor([text.token_ids[:root]]))
            last_state = hidden.last_hidden_state[0, -1:]
            if heads is None:
                path = text.token_ids[root:last][:NUM_HEADS]
                features = features_in_turn(checkpoint, target, last_state[0], path)
            else:
                features = heads(last_state)
            logits = head_logits(features, weight=weight)[:, 0]
            if "lm_head.bias" in checkpoint.tensors:
                logits = logits + checkpoint.tensors["lm_head.bias"]
        row = []
        for head in range(NUM_HEADS):
            place = root + 1 + head
            order = [token_map[i] for i in logits[head].argsort(descending=True).tolist()]
            pays = place < last and text.token_ids[place] in order
            row.append(min(RANK_CAP, order.index(text.token_ids[place])) if pays else RANK_CAP)
        rows.append(row)
    return rows


def features_in_turn(
    checkpoint: HeadsCheckpoint, target: FrozenTarget, hidden: torch.Tensor, path: list[int]
) -> torch.Tensor:
    """[K, 1, F] of heads that see the tokens before their guess; where there are none, any."""
    rows = []
    for head in range(NUM_HEADS):
        seen = (path + [0] * NUM_HEADS)[: head + 1]
        if checkpoint.spec.kind == "hydra":
            embeddings = target.embedding[torch.tensor(seen)]
            rows.append(oracle.hydra_features(checkpoint, head, hidden, embeddings))
        else:
            rows.append(oracle.mlp_features(checkpoint, hidden, seen))
    return torch.stack(rows)[:, None]


def with_lm_heads(checkpoint: HeadsCheckpoint, target: FrozenTarget, kind: str) -> HeadsCheckpoint:
    """The same blocks with lm_heads of another kind."""
    tensors, spec = dict(checkpoint.tensors), checkpoint.spec
    if kind == "target":
        del tensors["lm_head.weight"]
        spec = replace(spec, lm_head="target")
    if kind == "token_map":
        generator = torch.Generator().manual_seed(0)
        token_map = torch.randperm(tiny.VOCAB_SIZE, generator=generator)[:200]
        tensors["token_map"] = token_map
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, token_map]
    if kind == "common":
        tensors["lm_head.weight"] = target.weight.flip(0).contiguous()
        spec = replace(spec, lm_head="common")
    return replace(checkpoint, spec=spec, tensors=tensors)


def mlp_from(target: FrozenTarget) -> HeadsCheckpoint:
    """A random MLP speculator with few of its ranks out of reach."""
    return make_mlp_speculator(
        num_heads=NUM_HEADS,
        hidden_size=target.hidden_size,
        inner_size=16,
        vocab_size=target.vocab_size,
        scales_input=True,
    )


def hydra_from(checkpoint: HeadsCheckpoint, target: FrozenTarget) -> HeadsCheckpoint:
    """Hydra heads near the target's own guesses, with the same lm_heads."""
    hydra = make_hydra(
        num_layers=2,
        has_lm_head_bias=True,
        num_heads=NUM_HEADS,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        root_size=target.hidden_size,
    )
    tensors = {name: tensor * 0.02 for name, tensor in hydra.tensors.items()}
    for head in range(NUM_HEADS):
        tensors[f"hydra.{head}.weight"][1, :, : target.hidden_size] += torch.eye(target.hidden_size)
    tensors["lm_head.weight"] = checkpoint.tensors["lm_head.weight"]
    return replace(hydra, tensors=tensors)


@pytest.mark.parametrize("kind", ["own", "common", "target", "token_map", "hydra", "mlp"])
def test_ranks_are_those_of_sorting(
    target: FrozenTarget, checkpoint: HeadsCheckpoint, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "hydra":
        checkpoint = hydra_from(checkpoint, target)
    elif kind == "mlp":
        checkpoint = mlp_from(target)
    else:
        checkpoint = with_lm_heads(checkpoint, target, kind)
    # Several batches, and several chunks in each.
    monkeypatch.setitem(frozen._CHUNK_LOGITS, "cpu", 17 * tiny.VOCAB_SIZE)
    given = texts()
    done: list[int] = []
    meter = RankMeter(target, StoredHeads(checkpoint, target), batch_tokens=60)
    found = meter.measure(given, done.append)
    assert sum(done) == len(given)
    assert len(done) > 3
    answers = [(text, answer) for text in given for answer in text.answers]
    for (text, answer), continuation in zip(answers, found, strict=True):
        assert continuation.prompt_id == text.prompt_id
        assert continuation.temperature == text.temperature
        assert continuation.ranks.tolist() == plain_ranks(target, checkpoint, text, answer)
    assert any((continuation.ranks < RANK_CAP).any() for continuation in found)


def test_probabilities_are_those_of_scaled_logits(
    target: FrozenTarget, checkpoint: HeadsCheckpoint
) -> None:
    """Of lm_heads twice as large with half the scale they are the same."""
    plain = with_lm_heads(checkpoint, target, "own")
    scaled = replace(
        plain,
        spec=replace(plain.spec, logit_scale=0.5),
        tensors=plain.tensors | {"lm_head.weight": 2 * plain.tensors["lm_head.weight"]},
    )
    one, other = (
        RankMeter(target, StoredHeads(heads, target), num_guesses=4).measure(
            texts(), lambda _: None
        )
        for heads in (plain, scaled)
    )
    for left, right in zip(one, other, strict=True):
        assert left.guessed is not None
        assert right.guessed is not None
        np.testing.assert_array_equal(left.guessed.guesses, right.guessed.guesses)
        np.testing.assert_allclose(left.guessed.probability, right.guessed.probability, rtol=1e-4)


def measured(target: FrozenTarget, heads: Heads, given: Sequence[Text]) -> list[list[list[int]]]:
    meter = RankMeter(target, heads)
    return [item.ranks.tolist() for item in meter.measure(given, lambda _: None)]


@pytest.mark.parametrize(
    "kind", [{}, {"lm_head": "own"}, {"lm_head": "low-rank", "rank": 64}], ids=str
)
def test_heads_have_the_same_ranks_in_training_and_read_from_files(
    target: FrozenTarget, kind: dict[str, object]
) -> None:
    settings = make_settings(num_heads=NUM_HEADS, num_layers=2, **kind)
    trained = TrainableHeads(settings, target)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    stored = StoredHeads(trained.checkpoint(torch.float32, "m"), target)
    ranks = measured(target, trained, texts())
    assert measured(target, stored, texts()) == ranks
    assert len({rank for table in ranks for row in table for rank in row}) > 10


def test_positions_before_the_loop(target: FrozenTarget, checkpoint: HeadsCheckpoint) -> None:
    meter = RankMeter(target, StoredHeads(checkpoint, target))
    *others, looping = meter.measure(texts(), lambda _: None)
    # The run of 16 tokens that begins at token 3 stood at token 0 before.
    assert looping.num_before_loop == 0
    assert len(looping.ranks_of(with_loops=False)) == 0
    assert len(looping.ranks_of(with_loops=True)) == 36 - NUM_HEADS - 1
    for continuation in others:
        assert continuation.num_before_loop == len(continuation.ranks)
    assert len(others[0].ranks) == 30 - NUM_HEADS - 1


def test_wanted_tokens_are_those_that_make_a_step_longer() -> None:
    # Ended: the last token, 14, is emitted whether it is guessed or not.
    assert wanted_tokens([10, 11, 12, 13, 14], 4, 3).tolist() == [
        [11, 12, 13],
        [12, 13, -1],
        [13, -1, -1],
        [-1, -1, -1],
    ]
    # Cut: what follows 14 is not known, so only the first step's length is.
    assert wanted_tokens([10, 11, 12, 13, 14], 1, 3).tolist() == [[11, 12, 13]]
    assert wanted_tokens([10], 0, 3).shape == (0, 3)


def test_rank_counts_strictly_larger_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert rank_of(logits, torch.tensor([2, 3])).tolist() == [2, 0]
    assert rank_of(logits, torch.tensor([-1, 3])).tolist() == [RANK_CAP, 0]
    assert rank_of(torch.arange(100.0)[None], torch.tensor([0])).tolist() == [RANK_CAP]
    without = torch.tensor([[1.0, -torch.inf]])
    assert rank_of(without, torch.tensor([1])).tolist() == [RANK_CAP]
