"""Penalties and bad words by a node's own path, against their definitions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import oracles
from tests.kernels.cases import DEVICE, Case, cases, numbers, random_case
from vllm_medusa.kernels.constraints import apply_bad_words, apply_penalties

VOCAB = 70
NUM_TOKENS = 5  # that drafts, outputs and bad words are made of, so that they meet

seeds = st.integers(0, 2**32 - 1)


def rows_of(case: Case) -> list[tuple[int, int]]:
    """Request and node of each row of the logits."""
    return [(req, node) for req, count in enumerate(case.num_logits) for node in range(count)]


def random_tokens(case: Case, count: int) -> list[int]:
    return [case.rng.randrange(NUM_TOKENS) for _ in range(count)]


def tree_case(seed: int) -> Case:
    return random_case(seed, 3, 16, kinds=("tree", "cut", "decode"))


def mapping(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """State index and node of each row, and the rows' tokens."""
    rows = rows_of(case)
    states = case.idx_mapping.tolist()
    return (
        numbers([states[req] for req, _ in rows]),
        numbers([node for _, node in rows]),
        numbers(random_tokens(case, len(rows))),
    )


@cases(20)
@given(seeds)
def test_penalties(seed: int) -> None:
    case = tree_case(seed)
    index, node, tokens = mapping(case)
    num_states = len(case.parents)
    rng, generator = case.rng, torch.Generator().manual_seed(seed)
    repetition = [rng.choice([1.0, 1.3]) for _ in range(num_states)]
    frequency = [rng.choice([0.0, 0.3]) for _ in range(num_states)]
    presence = [rng.choice([0.0, 0.4]) for _ in range(num_states)]
    counts = [[rng.choice([0, 0, 1, 3]) for _ in range(VOCAB)] for _ in range(num_states)]
    in_prompt = [[rng.random() < 0.3 for _ in range(VOCAB)] for _ in range(num_states)]
    packed = [
        [sum(row[32 * w + b] << b for b in range(32) if 32 * w + b < VOCAB) for w in range(3)]
        for row in in_prompt
    ]
    signed = [[w - 2**32 if w >= 2**31 else w for w in row] for row in packed]
    logits = torch.randn(len(node), VOCAB, generator=generator).to(DEVICE)
    wanted = logits.clone()
    for row, (req, at) in enumerate(rows_of(case)):
        state = int(case.idx_mapping[req])
        path = oracles.path_tokens(case, tokens, req, at)
        for token in range(VOCAB):
            count = counts[state][token] + path.count(token)
            if count or in_prompt[state][token]:
                positive = wanted[row, token] > 0
                wanted[row, token] *= 1 / repetition[state] if positive else repetition[state]
            wanted[row, token] -= frequency[state] * count + presence[state] * (count > 0)
    apply_penalties(
        logits,
        index,
        node,
        tokens,
        case.ancestors,
        numbers(repetition, torch.float32),
        numbers(frequency, torch.float32),
        numbers(presence, torch.float32),
        numbers(signed),
        numbers(counts),
    )
    torch.testing.assert_close(logits, wanted)


@cases(30)
@given(seeds)
def test_bad_words(seed: int) -> None:
    case = tree_case(seed)
    index, node, tokens = mapping(case)
    rng, num_states = case.rng, len(case.parents)
    words = [
        [random_tokens(case, rng.randint(1, 5)) for _ in range(rng.randint(0, 4))]
        for _ in range(num_states)
    ]
    prompts = [random_tokens(case, rng.randint(1, 4)) for _ in range(num_states)]
    outputs = [random_tokens(case, rng.randint(0, 5)) for _ in range(num_states)]
    logits = torch.zeros(len(node), VOCAB, device=DEVICE)
    wanted = logits.clone()
    for row, (req, at) in enumerate(rows_of(case)):
        state = int(case.idx_mapping[req])
        history = outputs[state] + oracles.path_tokens(case, tokens, req, at)
        for word in words[state]:
            before = len(word) - 1
            if before <= len(history) and history[len(history) - before :] == word[:-1]:
                wanted[row, word[-1]] = float("-inf")

    def padded(rows: list[list[int]], width: int) -> torch.Tensor:
        return numbers([row + [0] * (width - len(row)) for row in rows])

    flat = [[token for word in state_words for token in word] for state_words in words]
    offsets = [[sum(map(len, ws[:i])) for i in range(len(ws) + 1)] for ws in words]
    apply_bad_words(
        logits,
        index,
        node,
        tokens,
        case.ancestors,
        case.depths,
        padded(flat, 20),
        padded(offsets, 5),
        numbers([len(ws) for ws in words]),
        padded([p + o for p, o in zip(prompts, outputs, strict=True)], 10),
        numbers([len(prompt) for prompt in prompts]),
        numbers([len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)]),
        max(map(len, words)),
    )
    assert torch.equal(logits, wanted)
