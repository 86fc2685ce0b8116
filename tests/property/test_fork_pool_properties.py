"""The fork pool's plan and slots, over random trees, caches and orders of events."""

import random

from hypothesis import example, given
from hypothesis import strategies as st

from tests.oracles.tree import random_subtree
from vllm_medusa.errors import UserError
from vllm_medusa.plugin.fork_pool import CacheShape, plan_fork_pool
from vllm_medusa.plugin.worker.v1.fork_grants import ForkGrants
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.limits import TreeLimits


@example(
    seed=0, num_blocks=9, block_sizes=[2], max_model_len=1, max_num_seqs=1, max_tree_requests=1
)
@given(
    seed=st.integers(0, 10_000),
    num_blocks=st.integers(1, 3000),
    block_sizes=st.lists(st.sampled_from([1, 2, 16, 32, 128]), min_size=1, max_size=3),
    max_model_len=st.integers(1, 2000),
    max_num_seqs=st.integers(1, 300),
    max_tree_requests=st.none() | st.integers(1, 400),
)
def test_the_pool_is_bounded_and_shared_by_nobody(
    seed: int,
    num_blocks: int,
    block_sizes: list[int],
    max_model_len: int,
    max_num_seqs: int,
    max_tree_requests: int | None,
) -> None:
    rng = random.Random(seed)
    tree = random_subtree(rng.randrange, rng.randint(1, 40), 5, 4)
    num_paths = len(TreeLayout.build(tree).path_starts)
    # What the scheduler must keep: the null block, and a full sequence with a block behind it.
    needed = 1 + sum(-(-max_model_len // size) + 1 for size in block_sizes)
    # A fork holds the tokens of a path from anywhere in a block on, the root's among them.
    forks = [
        (num_paths - 1) * max(-(-(start + tree.depth + 1) // size) for start in range(size))
        for size in block_sizes
    ]
    try:
        pool = plan_fork_pool(
            TreeLimits(len(tree.paths), tree.depth, num_paths),
            CacheShape(
                num_blocks,
                block_sizes,
                [-(-max_model_len // size) for size in block_sizes],
                max_model_len,
            ),
            max_num_seqs,
            max_tree_requests,
        )
    except UserError:
        assert num_blocks < needed + sum(forks)
        return
    owners: dict[int, tuple[int, int]] = {}
    for group, geometry in enumerate(pool.geometries):
        assert geometry.blocks_per_request == forks[group]
        for place in range(pool.num_requests):
            first = pool.group_base(group) + place * geometry.blocks_per_request
            for block in range(first, first + geometry.blocks_per_request):
                assert block not in owners
                owners[block] = (group, place)
    assert sorted(owners) == list(range(pool.first_block, num_blocks))
    assert pool.num_blocks == len(owners)
    if num_paths > 1:
        assert pool.first_block >= needed
        assert 1 <= pool.num_requests <= max_num_seqs
        assert max_tree_requests is None or pool.num_requests <= max_tree_requests
    else:
        assert pool.num_blocks == 0


@given(
    num_places=st.integers(0, 4),
    events=st.lists(
        st.tuples(st.sampled_from(["acquire", "release", "mirror"]), st.integers(0, 5)), max_size=60
    ),
)
def test_grants_follow_the_obvious_model(num_places: int, events: list[tuple[str, int]]) -> None:
    grants = ForkGrants(num_places)
    holders: dict[str, tuple[int, int] | None] = {}
    for count, (event, number) in enumerate(events):
        req_id = f"request-{number}"
        if event == "acquire":
            fits = req_id in holders or len(holders) < num_places
            assert grants.acquire(req_id) == fits
            if fits:
                holders.setdefault(req_id, None)
        elif event == "release":
            grants.release([req_id])
            holders.pop(req_id, None)
        elif req_id in holders:
            grants.set_mirrored(req_id, count, 1 + count % 3)
            holders[req_id] = (count, 1 + count % 3)
        assert grants.num_granted == len(holders)
        held = [grants.place_of(holder) for holder in holders]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_places))
        for number in range(6):
            mirrored = holders.get(f"request-{number}")
            for tokens in range(count + 1):
                is_there = mirrored is not None and mirrored[0] == tokens
                expected = mirrored[1] if is_there else 1
                assert grants.num_mirrored(f"request-{number}", tokens) == expected
