"""Typical acceptance against its oracle."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.typical import taken_tokens, typical_path
from vllm_medusa.tree.rows import NodeRows
from vllm_medusa.tree.step_trees import StepTrees
from vllm_medusa.tree.typical import TypicalBounds, TypicalRule, take_typical

VOCAB_SIZE = 5


@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 4))
def test_against_the_oracle(seed: int, max_nodes: int, num_reqs: int) -> None:
    rng = random.Random(seed)
    counts = [max_nodes, *(rng.randint(0, max_nodes) for _ in range(num_reqs - 1))]
    trees = [[rng.randrange(max(0, i - 3), i + 1) for i in range(n)] for n in counts]
    rules = [
        rng.choice([None, TypicalRule(posterior_threshold=0.2, posterior_alpha=rng.random())])
        for _ in trees
    ]
    rows = NodeRows.build(StepTrees.build(trees))
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(
        sum(counts) + num_reqs, VOCAB_SIZE, generator=generator, dtype=torch.float64
    )
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
    logits[:, 0] = 0  # something is left of every row
    targets = torch.randint(VOCAB_SIZE, (num_reqs, max_nodes + 1), generator=generator)
    drafts = torch.randint(-1, VOCAB_SIZE, (num_reqs, max_nodes), generator=generator)
    taken = take_typical(rows, targets, drafts, logits, TypicalBounds.make(rules))
    probs = logits.softmax(dim=-1)
    for req, (parents, rule) in enumerate(zip(trees, rules, strict=True)):
        sampled = targets[req].tolist()
        if rule is None:
            assert taken[req].tolist() == sampled
            continue
        tokens = [-1, *drafts[req, : len(parents)].tolist()]
        held = [
            parent if token >= 0 else -1 for parent, token in zip(parents, tokens[1:], strict=True)
        ]
        mine = probs[rows.starts[req] : rows.starts[req + 1]].tolist()
        path = typical_path(
            [0, *held], tokens, mine, rule.posterior_threshold, rule.posterior_alpha
        )
        assert taken[req].tolist() == taken_tokens(path, tokens, sampled)
