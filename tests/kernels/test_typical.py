"""The typical path of each request against its oracle."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cases import DEVICE, cases, numbers, random_case
from tests.oracles.typical import taken_tokens, typical_path
from vllm_medusa.kernels import NO_TREE
from vllm_medusa.kernels.typical import take_typical

VOCAB_SIZE = 6


@cases(is_small=False)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 16, 63]), st.integers(1, 5))
def test_against_the_oracle(seed: int, num_drafts: int, num_reqs: int) -> None:
    case = random_case(seed, num_reqs, num_drafts)
    generator = torch.Generator().manual_seed(seed)
    is_never = torch.rand(case.parents[:, 1:].shape, generator=generator) < 0.1
    case.parents[:, 1:][is_never.to(DEVICE)] = -1
    case.prepare()
    rows = sum(case.num_logits)
    rng = random.Random(seed)
    threshold, alpha = rng.choice([0.05, 0.2, 1.0]), rng.choice([0.1, 0.5, 1.0])
    logits = torch.randn(rows, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    logprobs = (3 * logits).log_softmax(dim=-1)
    drafts = [rng.randrange(VOCAB_SIZE) for _ in range(rows)]
    targets = [rng.randrange(VOCAB_SIZE) for _ in range(rows)]
    likelihoods, is_typical, wanted = torch.zeros(rows), torch.zeros(rows, dtype=torch.bool), []
    for req, (start, count) in enumerate(
        zip(case.cu_num_logits.tolist(), case.num_logits, strict=False)
    ):
        parents = case.parents[int(case.idx_mapping[req])].tolist()[:count]
        mine, probs = slice(start, start + count), logprobs[start : start + count].exp()
        for node in range(1, count):
            at = probs[max(parents[node], 0)]
            p, entropy = at[drafts[start + node]], -(at * at.log()).sum()
            likelihoods[start + node] = p.log()
            is_typical[start + node] = p > min(threshold, alpha * float((-entropy).exp()))
        path = [0]
        if case.base[req] != NO_TREE:
            path = typical_path(parents, drafts[mine], probs.tolist(), threshold, alpha)
        wanted += taken_tokens(path, drafts[mine], targets[mine])
    found = numbers(targets, torch.int64)
    take_typical(
        found,
        (case.parents, case.depths, case.ancestors),
        case.idx_mapping,
        case.base,
        numbers(drafts),
        likelihoods.to(DEVICE),
        is_typical.to(DEVICE),
        case.cu_num_logits,
    )
    assert found.tolist() == wanted
