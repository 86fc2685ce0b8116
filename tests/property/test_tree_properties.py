"""The vectorised tree maths against slow oracles, over random trees."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.tree import (
    ReferenceCache,
    ancestor_tokens,
    random_order,
    random_subtree,
    walk,
)
from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.fork_step import make_fork_step
from vllm_medusa.tree.forks import (
    ForkGeometry,
    commit_writes,
    expand_block_table,
    mirror_copies,
    write_slots,
)
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.rows import NodeRows
from vllm_medusa.tree.step_trees import StepTrees
from vllm_medusa.tree.verify import PLACEHOLDER_TOKEN_ID, accept_lossless


def make_tree(seed: int, max_nodes: int = 24, max_depth: int = 5) -> DraftTree:
    """A random tree; of every other seed one of up to three stages."""
    rng = random.Random(seed)
    tree = random_subtree(rng.randrange, rng.randint(1, max_nodes), max_depth, 3)
    if seed % 2:
        return tree
    return DraftTree.from_stages([*random_stages(rng, tree), tree.paths])


def random_stages(rng: random.Random, tree: DraftTree) -> list[list[tuple[int, ...]]]:
    """Up to two trees within ``tree``, the smaller first."""
    order = random_order(rng.randrange, tree)
    sizes = sorted(rng.randint(1, len(order)) for _ in range(2))
    return [order[:size] for size in sizes]


@given(seed=st.integers(0, 10_000))
def test_every_stage_is_a_prefix(seed: int) -> None:
    rng = random.Random(seed)
    tree = random_subtree(rng.randrange, rng.randint(1, 24), 5, 3)
    stages = [*random_stages(rng, tree), list(tree.paths)]
    staged = DraftTree.from_stages(stages)
    for stage in stages:
        assert sorted(staged.paths[: len(stage)]) == sorted(stage)
    for prefix in range(1, len(staged.paths) + 1):
        DraftTree.from_paths(staged.paths[:prefix])
    assert DraftTree.from_stages([tree.paths]) == tree


def trees_of_a_step(
    rng: random.Random, max_nodes: int = 24, max_depth: int = 5
) -> tuple[list[DraftTree], list[tuple[int, ...]]]:
    """A few random trees and the parents of the nodes that are left of each after a cut."""
    trees = [make_tree(rng.randrange(10_000), max_nodes, max_depth) for _ in range(4)]
    trees = trees[: rng.randint(1, 4)]
    counts = [rng.choice([0, rng.randint(1, tree.num_draft_tokens)]) for tree in trees]
    return trees, [tree.parents[1 : n + 1] for tree, n in zip(trees, counts, strict=True)]


@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 5))
def test_acceptance_equals_the_walk(seed: int, vocab: int) -> None:
    trees, parents = trees_of_a_step(random.Random(seed))
    rows = NodeRows.build(StepTrees.build(parents))
    generator = torch.Generator().manual_seed(seed)
    num_nodes = max(map(len, parents)) + 1
    target = torch.randint(vocab, (len(trees), num_nodes), generator=generator)
    draft = torch.randint(vocab, (len(trees), num_nodes - 1), generator=generator)
    accepted = accept_lossless(rows, target, draft)
    for row, (tree, given_parents) in enumerate(zip(trees, parents, strict=True)):
        drafts = draft[row, : len(given_parents)].tolist()
        node, emitted = walk(tree, target[row].tolist(), drafts)
        assert accepted.node[row] == node
        assert accepted.length[row] == len(emitted) - 1
        padding = [PLACEHOLDER_TOKEN_ID] * (rows.max_depth + 1 - len(emitted))
        assert accepted.tokens[row].tolist() == emitted + padding
        path = accepted.path[row].tolist()
        assert path == [*path[: len(emitted)], *[node] * (len(path) - len(emitted))]


@given(seed=st.integers(0, 10_000))
def test_arrays_of_a_step(seed: int) -> None:
    trees, parents = trees_of_a_step(random.Random(seed))
    step = StepTrees.build(parents)
    assert step.num_drafts.tolist() == [len(row) for row in parents]
    depths = [
        len(tree.paths[n])
        for tree, row in zip(trees, parents, strict=True)
        for n in range(len(row))
    ]
    assert step.depth == max(depths, default=0)
    for row, (tree, given_parents) in enumerate(zip(trees, parents, strict=True)):
        paths = [(), *tree.paths[: len(given_parents)]]
        for node, path in enumerate(paths):
            assert step.depths[row, node] == len(path)
            assert paths[step.parents[row, node]] == path[:-1]
            ancestors = [paths[i] for i in step.ancestors[row, node].tolist()]
            assert ancestors == [path[: min(d, len(path))] for d in range(step.depth + 1)]
        first = step.first_path_lengths()[row]
        assert all(p == n for n, p in enumerate(given_parents[:first]))
        assert first == len(given_parents) or given_parents[first] != first


@given(seed=st.integers(0, 10_000))
def test_layout_tables(seed: int) -> None:
    tree = make_tree(seed)
    layout = TreeLayout.build(tree)
    paths = [(), *tree.paths]
    ends = [*(start - 1 for start in layout.path_starts[1:]), tree.num_draft_tokens]
    for start, end in zip(layout.path_starts, ends, strict=True):
        for node in range(start, end + 1):
            assert paths[end][: len(paths[node])] == paths[node]
            assert len(paths[end]) - len(paths[node]) == end - node
    assert [paths[parent] for parent in layout.parents] == [path[:-1] for path in tree.paths]
    if seed % 2:
        assert tuple(ends) == tree.leaves
    topk = torch.arange(tree.depth)[:, None, None] * 1000 + torch.arange(8) + torch.zeros(2, 1)
    tokens = layout.draft_tokens(topk.long())
    for column, path in enumerate(tree.paths):
        assert tokens[0, column] == (len(path) - 1) * 1000 + path[-1]


class Simulation:
    """A few requests that step through a paged cache of tokens, each with another tree a step."""

    MAX_NODES, MAX_DEPTH, MAX_PATHS = 12, 4, 12

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.block_size = self.rng.choice([2, 3, 4, 8])
        self.geometry = ForkGeometry.of(self.MAX_PATHS, self.MAX_DEPTH, self.block_size)
        self.num_reqs = self.rng.randint(1, 3)
        blocks_per_req = 60
        first_fork_block = self.num_reqs * blocks_per_req
        num_blocks = first_fork_block + self.num_reqs * self.geometry.blocks_per_request
        self.cache = ReferenceCache(num_blocks, self.block_size)
        ids = self.rng.sample(range(first_fork_block), first_fork_block)
        self.block_table = torch.tensor(ids, dtype=torch.int32).view(self.num_reqs, blocks_per_req)
        self.fork_base = first_fork_block + torch.arange(self.num_reqs) * (
            self.geometry.blocks_per_request
        )
        self.tokens: list[list[object]] = [[] for _ in range(self.num_reqs)]
        #: How many fork paths of each request hold its tail.
        self.mirrored = np.ones(self.num_reqs, dtype=np.int64)
        self.num_kept = 0

    def step(self) -> int:
        """Run one step; return how many requests had a path other than the first accepted."""
        trees = [
            make_tree(self.rng.randrange(10_000), self.MAX_NODES, self.MAX_DEPTH)
            for _ in range(self.num_reqs)
        ]
        drafts = [self.rng.choice([0, self.rng.randint(1, t.num_draft_tokens)]) for t in trees]
        counts = [n + 1 if n else self.rng.choice([1, 1, 3, 5]) for n in drafts]
        parents = [tree.parents[1 : n + 1] for tree, n in zip(trees, drafts, strict=True)]
        step_trees = StepTrees.build(parents)
        forks = make_fork_step(
            step_trees,
            np.array(drafts) > 0,
            np.array(counts),
            self.mirrored,
        )
        new = [f"{self.rng.random():.9f}" for _ in range(sum(counts))]
        starts = [sum(counts[:i]) for i in range(self.num_reqs)]
        node = np.array([self.rng.randint(0, n) for n in drafts])
        requests = np.arange(self.num_reqs)
        path = torch.from_numpy(step_trees.ancestors[requests, node])
        length = torch.from_numpy(step_trees.depths[requests, node])
        if forks is None:
            self._run_plainly(counts, new, starts)
        else:
            self._run_in_forks(forks, trees, drafts, new, starts, path, length)
        firsts = step_trees.first_path_lengths()
        for req, start in enumerate(starts):
            if drafts[req]:
                chosen = path[req, : length[req] + 1].tolist()
                self.tokens[req] += [new[start + i] for i in chosen]
            else:
                self.tokens[req] += new[start : start + counts[req]]
            table = self.block_table[req].tolist()
            assert self.cache.read(table, len(self.tokens[req])) == self.tokens[req]
        return sum(chosen > first for chosen, first in zip(node.tolist(), firsts, strict=True))

    def _run_plainly(self, counts, new, starts) -> None:
        """As vLLM does: tokens in a row; a chain's accepted ones need no commit."""
        for req, (count, start) in enumerate(zip(counts, starts, strict=True)):
            begin = len(self.tokens[req])
            table, size = self.block_table[req].tolist(), self.block_size
            places = range(begin, begin + count)
            slots = [table[i // size] * size + i % size for i in places]
            self.cache.write(new[start : start + count], slots)
        self.mirrored[:] = 1

    def _run_in_forks(self, forks, trees, drafts, new, starts, path, length) -> None:
        computed = torch.tensor([len(tokens) for tokens in self.tokens])
        self._mirror(forks, computed)
        rows = expand_block_table(
            forks.device, self.geometry, self.block_table, computed, self.fork_base
        )
        slots, commit_slots = write_slots(forks.device, self.block_size, rows, computed)
        written = [new[i] for i in forks.device.write_token.tolist()]
        self.cache.write(written, slots.tolist())
        self._check_reads(forks, rows, starts, new, drafts, trees, computed)
        source, slots = commit_writes(forks.device, commit_slots, path, length)
        self.cache.write([written[i] for i in source.tolist()], slots.tolist())
        self.num_kept += int((forks.num_live > forks.num_paths).sum())
        self.mirrored = forks.num_live

    def _mirror(self, forks, computed: torch.Tensor) -> None:
        for req in range(self.num_reqs):
            first, paths = int(self.mirrored[req]), int(forks.num_paths[req])
            if paths <= first or len(self.tokens[req]) % self.block_size == 0:
                continue
            block_idx = computed[[req]] // self.block_size
            source, destination = mirror_copies(
                self.geometry,
                torch.tensor([first]),
                torch.tensor([paths]),
                self.block_table[[req], block_idx].long(),
                block_idx,
                self.fork_base[[req]],
            )
            self.cache.copy_blocks(source.tolist(), destination.tolist())

    def _check_reads(self, forks, rows, starts, new, drafts, trees, computed) -> None:
        """Each query must see the request's tokens, then its own ancestors, in order."""
        indices = forks.device
        starts_of_seq = indices.query_start_loc.tolist()
        assert forks.max_query_len == max(
            stop - start for start, stop in itertools.pairwise(starts_of_seq)
        )
        for seq in range(forks.num_seqs):
            req = int(indices.seq_req[seq])
            queries = range(starts_of_seq[seq], starts_of_seq[seq + 1])
            length = int(computed[req] + indices.seq_length[seq])
            seen = self.cache.read(rows[seq].tolist(), length)
            for back, query in enumerate(reversed(queries)):
                node = query - starts[req]
                if drafts[req]:
                    own = ancestor_tokens(trees[req], new[starts[req] :] + [None] * 99, node)
                else:
                    own = new[starts[req] : query + 1]
                assert seen[: length - back] == self.tokens[req] + own
                assert computed[req] + indices.token_offset[query] == length - back - 1


@given(seed=st.integers(0, 100_000))
def test_forked_steps_see_and_keep_the_right_tokens(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(8):
        simulation.step()


def test_the_simulation_accepts_other_paths_and_keeps_mirrors() -> None:
    simulations = [Simulation(seed) for seed in range(50)]
    assert sum(simulation.step() for simulation in simulations for _ in range(4)) > 30
    assert sum(simulation.num_kept for simulation in simulations) > 30


def test_a_step_without_the_mirror_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Simulation, "_mirror", lambda *args: None)
    run = test_forked_steps_see_and_keep_the_right_tokens.hypothesis.inner_test
    with pytest.raises(AssertionError):
        _ = [run(seed) for seed in range(50)]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [0, 1, 0]], r"\[0, 1, 0\] has no parent; add the path \[0, 1\]"),
        ([[0], [0]], r"\[0\] is given twice"),
        ([[0], [-1]], "rank -1"),
        ([[0], [0.5]], "rank 0.5"),
        ([[]], "empty path"),
        ([], "no paths"),
        ([[i] for i in range(128)], "128 nodes"),
        (["00"], "must be a list of ranks"),
    ],
)
def test_invalid_trees_are_named(paths: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DraftTree.from_paths(paths)
