"""Packing and the loss's positions, for random documents."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training import document
from vllm_medusa.training.new_layers import low_rank_factors
from vllm_medusa.training.packing import build_batch, pack_epoch

masks = st.lists(st.booleans(), min_size=1, max_size=20)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 90), st.integers(0, 9)
)
def test_packing_keeps_every_document_once_and_fits(
    lengths: list[int], size: int, seed: int
) -> None:
    sequences = pack_epoch(lengths, size, np.random.default_rng(seed))
    assert sorted(index for sequence in sequences for index in sequence) == list(
        range(len(lengths))
    )
    loads = [sum(lengths[index] for index in sequence) for sequence in sequences]
    assert max(loads) <= size
    # Best fit leaves no two sequences that would fit into one.
    assert len(loads) == 1 or sum(sorted(loads)[:2]) > size


@given(st.lists(st.lists(masks, min_size=1, max_size=3), min_size=1, max_size=3))
def test_learnt_positions_are_those_before_answer_tokens_of_their_own_document(
    rows: list[list[list[bool]]],
) -> None:
    size = max(sum(map(len, row)) for row in rows) + 1
    batch = build_batch([[document([1] * len(mask), mask) for mask in row] for row in rows], size)
    expected = []
    for number, row in enumerate(rows):
        start = number * size
        for mask in row:
            expected += [
                (start + place - 1, place - 1)
                for place, is_answer in enumerate(mask)
                if is_answer and place > 0
            ]
            start += len(mask)
    assert list(zip(batch.learnt.tolist(), batch.depth.tolist(), strict=True)) == expected


@given(masks)
def test_answers_are_the_runs_of_the_mask(mask: list[bool]) -> None:
    item = document([1] * len(mask), mask)
    inside = [index for start, stop in item.answers() for index in range(start, stop)]
    assert inside == [index for index, flag in enumerate(mask) if flag and index > 0]
    assert all(start < stop for start, stop in item.answers())


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_low_rank_factors_are_the_truncated_svd(rank: int, seed: int) -> None:
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
    down, up = low_rank_factors(weight, rank)
    assert down.shape == (rank, 8)
    assert up.shape == (20, rank)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(up @ down, best, atol=1e-4, rtol=1e-4)
