"""The engine's heads that run in turn, split over ranks, against one node at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import checkpoints, sequential_checkpoints
from tests.integration.test_proposer import (
    HIDDEN_SIZE,
    ROOT_SIZE,
    TREE,
    VOCAB_SIZE,
    embedding,
    load_rank,
    some_roots,
    some_states,
)
from tests.oracles import heads as oracle
from vllm_medusa.heads import HeadsCheckpoint
from vllm_medusa.plugin.worker import proposer

pytestmark = pytest.mark.engine

KINDS: list[dict[str, Any]] = [
    {"lm_head": "own", "has_lm_head_bias": True},
    {"lm_head": "own", "num_layers": 3, "logit_scale": 0.5},
    {"lm_head": "own", "draft_vocab_size": 41},
    {"lm_head": "common"},
    {"lm_head": "low_rank", "rank": 5},
    {"is_tied": False, "inner_size": 6},
    {"is_tied": True, "inner_size": 10, "scales_input": True},
]


def write_heads(directory: Path, **options: Any) -> tuple[Path, HeadsCheckpoint]:
    """Hydra heads, or an MLP speculator."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE}
    if "is_tied" in options:
        heads = sequential_checkpoints.make_mlp_speculator(**sizes, **options)
        return sequential_checkpoints.write_mlp_speculator(directory, heads), heads
    heads = sequential_checkpoints.make_hydra(root_size=ROOT_SIZE, **sizes, **options)
    return checkpoints.write_native(directory, heads), heads


def below(heads: HeadsCheckpoint, hidden: Tensor, tokens: list[int]) -> dict[int, float]:
    """Log-probability of each token after a path that begins with the root, the best first."""
    head = len(tokens) - 1
    if heads.spec.kind == "hydra":
        feature = oracle.hydra_features(heads, head, hidden, embedding()[torch.tensor(tokens)])
    else:
        feature = oracle.mlp_features(heads, hidden, tokens)
    rows = feature[None, None].expand(heads.spec.num_heads, 1, -1)
    logits = oracle.logits(heads, rows)[head, 0] * heads.spec.logit_scale
    names = heads.tensors.get("token_map", torch.arange(VOCAB_SIZE)).tolist()
    found = logits.log_softmax(dim=-1).sort(descending=True)
    return {
        names[i]: float(value)
        for i, value in zip(found.indices.tolist(), found.values, strict=True)
    }


def check(loaded: proposer.MedusaProposer, heads: HeadsCheckpoint, num_rows: int) -> None:
    hidden, roots = some_states(num_rows), some_roots(num_rows)
    assert loaded.by_parent
    drafts = loaded.propose(hidden, roots).tolist()
    log_probs, tokens = loaded.probable_guesses(hidden, roots)
    # Below the root and below its first child.
    assert log_probs.shape == tokens.shape == (2, num_rows, TREE.top_k)
    for row, root in enumerate(roots.tolist()):
        by_path = {(): [root]}
        for node, path in enumerate(TREE.paths):
            guesses = list(below(heads, hidden[row], by_path[path[:-1]]))
            by_path[path] = [*by_path[path[:-1]], guesses[path[-1]]]
            assert drafts[row][node] == by_path[path][-1]
        for table, path in enumerate([(), (0,)]):
            wanted = below(heads, hidden[row], by_path[path])
            assert tokens[table, row].tolist() == list(wanted)[: TREE.top_k]
            values = torch.tensor(list(wanted.values())[: TREE.top_k])
            torch.testing.assert_close(log_probs[table, row], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]) -> None:
    path, heads = write_heads(tmp_path, **kind)
    loaded = load_rank(monkeypatch, path)
    for num_rows in (1, 5):
        check(loaded, heads, num_rows)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("world_size", [2, 5])
def test_split_over_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], world_size: int
) -> None:
    """Each rank's rows of the lm_heads together give what one rank alone gives."""
    path, heads = write_heads(tmp_path, **kind)
    ranks = [load_rank(monkeypatch, path, rank, world_size) for rank in range(world_size)]
    features: dict[int, Tensor] = {}

    def of_all(part: Tensor, dim: int) -> Tensor:
        """Play the collective: compute every rank's part of what this rank gives."""
        return torch.cat([given[part.ndim](rank) for rank in ranks], dim)

    def guesses(rank: proposer.MedusaProposer, head: int) -> tuple[Tensor, Tensor]:
        logits = rank._lm_heads.of_head(features[head], head)[None]
        best = logits.topk(min(TREE.top_k, logits.shape[-1]), dim=-1)
        missing = (0, TREE.top_k - best.values.shape[-1])
        values = torch.nn.functional.pad(best.values, missing, value=-torch.inf)
        tokens = torch.nn.functional.pad(best.indices, missing) + rank._lm_heads.first_token
        return torch.stack((values, tokens.float())), logits

    given = {
        4: lambda rank: guesses(rank, max(features))[0],
        3: lambda rank: (guesses(rank, max(features))[1] * heads.spec.logit_scale).logsumexp(
            -1, keepdim=True
        ),
    }
    monkeypatch.setattr(proposer, "tensor_model_parallel_all_gather", of_all)
    for rank in ranks:
        advance = rank._in_turn.advance

        def record(head: int, states: Tensor, tokens: Tensor, advance: Any = advance) -> Any:
            if head == 0:
                features.clear()
            found = advance(head, states, tokens)
            features[head] = found[1]
            return found

        monkeypatch.setattr(rank._in_turn, "advance", record)
        check(rank, heads, 5)
