"""Trees, acceptance and compaction against their oracles: exactly."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import oracles
from tests.kernels.cases import DEVICE, Case, cases, numbers, random_case, random_parents, states_of
from vllm_medusa.kernels import NO_TREE
from vllm_medusa.kernels.accept import accept
from vllm_medusa.kernels.compact import CacheGroup, compact
from vllm_medusa.kernels.trees import set_trees

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 4, 8, 16, 31, 63])


@cases()
@given(seeds, sizes, st.integers(1, 5))
def test_set_trees(seed: int, num_drafts: int, num_reqs: int) -> None:
    rng = random.Random(seed)
    wanted = states_of(rng, num_reqs, num_drafts)
    index = numbers(rng.sample(range(num_reqs + 3), num_reqs))
    states = [torch.full((num_reqs + 3, num_drafts + 1), 77, device=DEVICE) for _ in range(3)]
    parents = wanted[0].clone()
    parents[:, 0] = rng.choice([-1, 0])
    set_trees(*states, parents.to(rng.choice([torch.int32, torch.int64])), index)
    for state, rows in zip(states, wanted, strict=True):
        assert torch.equal(state[index.long()], rows)
        untouched = torch.ones(len(state), dtype=torch.bool, device=DEVICE)
        untouched[index.long()] = False
        assert (state[untouched] == 77).all()


def test_set_trees_with_nodes_that_are_never_accepted() -> None:
    states = [torch.full((1, 5), 77, device=DEVICE) for _ in range(3)]
    set_trees(*states, numbers([[0, 0, 1, -1, -1]]), numbers([0]))
    parents, depths, ancestors = (state[0].tolist() for state in states)
    assert parents == [0, 0, 1, -1, -1]
    assert depths == [0, 1, 2, 1, 1]
    assert ancestors == [1, 3, 7, 9, 17]


@pytest.mark.parametrize("parent", [0, -1])
def test_accept_of_nodes_that_are_never_accepted(parent: int) -> None:
    case = random_case(1, num_reqs=1, num_drafts=2, kinds=("tree",))
    case.parents[:] = numbers([0, 0, parent], torch.int64)
    case.prepare()
    drafts, targets = numbers([9, 4, 5]), numbers([5, 6, 7], torch.int64)
    _, _, length = accept(
        case.parents, case.idx_mapping, case.base, drafts, targets, case.cu_num_logits, 2
    )
    assert length.tolist() == [1 if parent == 0 else 0]


@cases()
@given(seeds, sizes, st.integers(1, 5))
def test_prepare(seed: int, num_drafts: int, num_reqs: int) -> None:
    case = random_case(seed, num_reqs, num_drafts)
    wanted = oracles.prepare(case)
    case.prepare()
    found = (case.positions, case.token_ancestors, case.base, case.context_lens)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_prepare_ends_old_trees() -> None:
    case = random_case(1, num_reqs=1, kinds=("tree",))
    case.prepare()
    assert (case.base != NO_TREE).sum() == 1


@cases(is_small=False)
@given(seeds, sizes, st.integers(1, 5), st.integers(1, 6))
def test_accept_and_compact(seed: int, num_drafts: int, num_reqs: int, max_depth: int) -> None:
    case = random_case(seed, num_reqs, num_drafts)
    case.prepare()
    # Few tokens, so that paths are long.
    drafts = numbers([case.rng.randrange(3) for _ in range(sum(case.num_logits))])
    targets = numbers([case.rng.randrange(3) for _ in range(sum(case.num_logits))], torch.int64)
    wanted = oracles.accept(case, drafts, targets, max_depth)
    path, tokens, length = accept(
        case.parents, case.idx_mapping, case.base, drafts, targets, case.cu_num_logits, max_depth
    )
    for req, nodes in enumerate(wanted):
        start = int(case.cu_num_logits[req])
        assert length[req] == len(nodes) - 1
        assert path[req].tolist() == nodes + nodes[-1:] * (max_depth + 1 - len(nodes))
        assert tokens[req].tolist() == [int(targets[start + node]) for node in path[req].tolist()]
    check_compaction(case, path, length, wanted)


def check_compaction(
    case: Case, path: torch.Tensor, length: torch.Tensor, wanted: list[list[int]]
) -> None:
    rng, size = case.rng, case.rng.choice([16, 32])
    heads, content = rng.choice([1, 2, 3]), rng.choice([5, 8, 24])
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.uint8])
    pages = 16 * case.num_reqs
    layers = [random_cache(rng, pages, size, heads, content, dtype) for _ in range(3)]
    slot_rows = [0, 1, 1]
    slots = torch.stack([random_slots(case, rng, pages, size) for _ in range(2)])
    after = [
        oracles.compact(case, layer, slots[row], wanted)
        for layer, row in zip(layers, slot_rows, strict=True)
    ]
    # A layer that uses another's cache, which must move once.
    groups = CacheGroup.build([*layers, layers[0]], [*slot_rows, 0])
    assert sum(len(group.caches) for group in groups) == 3
    compact(groups, slots, case.logits_indices, case.cu_num_logits, path, length)
    for layer, right in zip(layers, after, strict=True):
        assert torch.equal(layer, right)


def random_cache(
    rng: random.Random, pages: int, size: int, heads: int, content: int, dtype: torch.dtype
) -> torch.Tensor:
    """Logically [pages, heads, size, content]; of either layout in memory."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    if rng.random() < 0.5:
        shape, order = (pages, size, heads, content), (0, 2, 1, 3)
    else:
        shape, order = (pages, heads, size, content), (0, 1, 2, 3)
    cache = torch.randint(0, 200, shape, generator=generator).to(DEVICE, dtype)
    return cache.permute(order)


def random_slots(case: Case, rng: random.Random, pages: int, size: int) -> torch.Tensor:
    table = rng.sample(range(pages), pages)
    slots = []
    for req, (seq_len, count) in enumerate(
        zip(case.seq_lens.tolist(), case.query_lens, strict=True)
    ):
        places = range(seq_len - count, seq_len)
        slots += [table[16 * req + place // size] * size + place % size for place in places]
    return numbers(slots, torch.int64)


def test_accept_takes_the_first_of_equal_siblings() -> None:
    case = random_case(1, num_reqs=1, num_drafts=4, kinds=("tree",))
    case.parents[:] = numbers([0, 0, 0, 1, 2], torch.int64)
    case.prepare()
    drafts, targets = numbers([9, 5, 5, 6, 6]), numbers([5, 6, 7, 8, 9], torch.int64)
    path, tokens, length = accept(
        case.parents, case.idx_mapping, case.base, drafts, targets, case.cu_num_logits, 3
    )
    assert path.tolist() == [[0, 1, 3, 3]]
    assert tokens[0, :3].tolist() == [5, 6, 8]
    assert length.tolist() == [2]


@pytest.mark.parametrize("num_drafts", [1, 8, 63])
def test_random_trees_are_trees(num_drafts: int) -> None:
    parents = random_parents(random.Random(num_drafts), num_drafts)
    assert all(parents[node] < node for node in range(1, num_drafts + 1))
