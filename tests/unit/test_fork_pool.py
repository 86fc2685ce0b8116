"""The fork pool's size, and who holds which slot of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_medusa.config import MedusaConfig
from vllm_medusa.errors import UserError
from vllm_medusa.plugin.core import memory
from vllm_medusa.plugin.fork_pool import CacheShape, divide, fork_pool_of, plan_fork_pool
from vllm_medusa.plugin.worker.v1.fork_grants import ForkGrants
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.limits import TreeLimits
from vllm_medusa.tree.typical import TypicalRule

#: Three leaf paths, hence two forks; of two blocks each, since three nodes can straddle two.
TREE = DraftTree.from_paths([[0], [1], [0, 0], [0, 1]])


def plan(tree: DraftTree = TREE, **changed: Any) -> Any:
    values: dict[str, Any] = {
        "num_blocks": 1000,
        "block_sizes": [16],
        "max_model_len": 160,
        "max_num_seqs": 256,
        "max_tree_requests": None,
        **changed,
    }
    length = values["max_model_len"]
    cache = CacheShape(
        num_blocks=values["num_blocks"],
        block_sizes=values["block_sizes"],
        sequence_blocks=[-(-(length or 1) // size) for size in values["block_sizes"]],
        max_model_len=length,
    )
    num_paths = len(TreeLayout.build(tree).path_starts)
    limits = TreeLimits(len(tree.paths), tree.depth, num_paths)
    return plan_fork_pool(limits, cache, values["max_num_seqs"], values["max_tree_requests"])


def test_an_eighth_of_the_cache_by_default() -> None:
    pool = plan()
    assert pool.num_requests == 1000 // 8 // 4
    assert pool.num_blocks == pool.num_requests * 4
    assert pool.first_block == 1000 - pool.num_blocks


def test_never_more_than_64_requests_by_default() -> None:
    assert plan(num_blocks=100_000).num_requests == 64
    assert plan(num_blocks=100_000, max_tree_requests=200).num_requests == 200


def test_no_more_than_are_in_a_batch() -> None:
    assert plan(max_num_seqs=3).num_requests == 3
    assert plan(max_num_seqs=3, max_tree_requests=7).num_requests == 3


def test_one_request_at_least() -> None:
    assert plan(num_blocks=20).num_requests == 1


def test_what_the_user_asks_for_leaves_room_for_one_sequence() -> None:
    # The null block, ten blocks of a sequence, and one for the tree behind it.
    assert plan(num_blocks=12 + 4 * 5, max_tree_requests=9).num_requests == 5


def test_blocks_of_several_groups_are_disjoint() -> None:
    pool = plan(block_sizes=[16, 32], max_tree_requests=2)
    assert [geometry.blocks_per_request for geometry in pool.geometries] == [4, 4]
    assert [pool.group_base(group) for group in (0, 1)] == [1000 - 16, 1000 - 8]


def test_a_chain_needs_no_pool() -> None:
    pool = plan(DraftTree.chain(4), num_blocks=2)
    assert (pool.num_requests, pool.num_blocks, pool.first_block) == (0, 0, 2)


def test_a_cache_too_small_is_refused_with_the_remedy() -> None:
    message = (
        r"^the KV cache of 15 blocks has no room for the 4 fork blocks of one request beside a "
        r"sequence of max_model_len=160; .*lower max_model_len.*tree='chain'.*$"
    )
    with pytest.raises(UserError, match=message):
        plan(num_blocks=15)
    assert plan(num_blocks=16).num_requests == 1


def test_half_of_the_cache_is_left_where_the_longest_sequence_is_yet_to_be_fitted() -> None:
    assert plan(num_blocks=80, max_model_len=None, max_tree_requests=64).num_requests == 10
    assert plan(num_blocks=80, max_model_len=None).num_requests == 2
    # One request's forks at least, beside the null block and a sequence's first two.
    assert plan(num_blocks=7, max_model_len=None).num_requests == 1
    with pytest.raises(UserError, match="the 4 fork blocks of one request beside any sequence"):
        plan(num_blocks=6, max_model_len=None)


def test_workers_are_told_of_the_plan() -> None:
    spec = SimpleNamespace(
        block_size=16, page_size_bytes=64, max_memory_usage_bytes=lambda config: 10 * 64
    )
    groups = [SimpleNamespace(kv_cache_spec=spec)] * 2
    caches = [SimpleNamespace(num_blocks=100, kv_cache_groups=groups) for _ in range(2)]
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=160),
        scheduler_config=SimpleNamespace(max_num_seqs=256),
    )
    config = MedusaConfig(heads="h", revision=None, tree=TREE, tree_name="t", max_tree_requests=3)
    pool = divide(vllm_config, caches, config)
    assert (pool.num_requests, pool.num_blocks, pool.first_block) == (3, 24, 76)
    for cache in caches:
        assert fork_pool_of(cache, config) == pool


def test_a_grant_is_kept_until_it_is_released() -> None:
    grants = ForkGrants(2)
    assert grants.acquire("a")
    assert grants.acquire("b")
    assert grants.place_of("a") != grants.place_of("b")
    assert not grants.acquire("c")
    assert grants.acquire("a")
    assert grants.num_granted == 2
    grants.release(["a", "unknown"])
    assert grants.acquire("c")
    assert grants.place_of("c") != grants.place_of("b")


def test_a_new_grant_has_nothing_mirrored() -> None:
    grants = ForkGrants(1)
    grants.acquire("a")
    assert grants.num_mirrored("a", 7) == 1
    grants.set_mirrored("a", 7, 3)
    assert grants.num_mirrored("a", 7) == 3
    assert grants.num_mirrored("a", 8) == 1
    assert grants.num_mirrored("b", 7) == 1
    grants.release(["a"])
    grants.acquire("a")
    assert grants.num_mirrored("a", 7) == 1


@pytest.mark.parametrize(("rule", "name"), [(None, "lossless"), (TypicalRule(), "typical")])
def test_the_log_line_names_the_acceptance(rule: TypicalRule | None, name: str) -> None:
    config = MedusaConfig(heads="h", revision=None, tree=TREE, tree_name="t", typical=rule)
    assert memory._described(config).endswith(f"acceptance {name}")
