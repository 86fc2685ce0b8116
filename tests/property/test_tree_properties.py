"""The vectorised tree maths against slow oracles, over random trees."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.forks import (
    ForkGeometry,
    StepShapes,
    commit_writes,
    expand_block_table,
    mirror_copies,
    write_slots,
)
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.reference import (
    ReferenceCache,
    ancestor_tokens,
    random_order,
    random_subtree,
    walk,
)
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


@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 5), batch=st.integers(1, 4))
def test_acceptance_equals_the_walk(seed: int, vocab: int, batch: int) -> None:
    tree = make_tree(seed)
    layout = TreeLayout.build(tree)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(vocab, (batch, layout.num_nodes), generator=generator)
    draft = torch.randint(vocab, (batch, tree.num_draft_tokens), generator=generator)
    num_drafts = torch.randint(0, tree.num_draft_tokens + 1, (batch,), generator=generator)
    accepted = accept_lossless(layout, target, draft, num_drafts)
    for row in range(batch):
        drafts = draft[row, : num_drafts[row]].tolist()
        node, emitted = walk(tree, target[row].tolist(), drafts)
        assert accepted.node[row] == node
        assert accepted.length[row] == len(emitted) - 1
        padding = [PLACEHOLDER_TOKEN_ID] * (tree.depth + 1 - len(emitted))
        assert accepted.tokens[row].tolist() == emitted + padding


@given(seed=st.integers(0, 10_000))
def test_layout_tables(seed: int) -> None:
    tree = make_tree(seed)
    layout = TreeLayout.build(tree)
    paths = [(), *tree.paths]
    for node, path in enumerate(paths):
        assert layout.depths[node] == len(path)
        ancestors = [paths[i] for i in layout.ancestors[node].tolist()]
        assert ancestors == [path[: min(d, len(path))] for d in range(tree.depth + 1)]
    assert [paths[node] for node in layout.depth_first.tolist()] == sorted(paths)
    for path, (start, end) in enumerate(zip(layout.path_starts, layout.path_ends, strict=True)):
        for node in range(start, end + 1):
            assert layout.node_path[node] == path
            assert paths[end][: len(paths[node])] == paths[node]
            assert len(paths[end]) - len(paths[node]) == end - node
    added = [range(*bounds) for bounds in zip(layout.path_starts, layout.path_ends, strict=True)]
    assert sum(map(len, added)) + layout.num_paths == layout.num_nodes
    if seed % 2:
        assert layout.path_ends == tree.leaves
    topk = torch.arange(tree.depth)[:, None, None] * 1000 + torch.arange(8) + torch.zeros(2, 1)
    tokens = layout.draft_tokens(topk.long())
    for column, path in enumerate(tree.paths):
        assert tokens[0, column] == (len(path) - 1) * 1000 + path[-1]


class Simulation:
    """A few requests that step through a paged cache of tokens, with and without trees."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tree = make_tree(seed, max_nodes=12, max_depth=4)
        self.layout = TreeLayout.build(self.tree)
        self.block_size = self.rng.choice([2, 3, 4, 8])
        self.geometry = ForkGeometry.of(self.layout, self.block_size)
        self.shapes = StepShapes(self.layout)
        self.num_reqs = self.rng.randint(1, 3)
        blocks_per_req = 40
        first_fork_block = self.num_reqs * blocks_per_req
        num_blocks = first_fork_block + self.num_reqs * self.geometry.blocks_per_request
        self.cache = ReferenceCache(num_blocks, self.block_size)
        ids = self.rng.sample(range(first_fork_block), first_fork_block)
        self.block_table = torch.tensor(ids, dtype=torch.int32).view(self.num_reqs, blocks_per_req)
        self.fork_base = first_fork_block + torch.arange(self.num_reqs) * (
            self.geometry.blocks_per_request
        )
        self.tokens: list[list[object]] = [[] for _ in range(self.num_reqs)]
        #: For each request how many tokens its first so many paths hold.
        self.mirrored = [(0, 0)] * self.num_reqs

    def step(self) -> int:
        """Run one step; return how many requests had a path other than the first accepted."""
        drafts = [
            self.rng.choice([0, self.rng.randint(1, self.tree.num_draft_tokens)])
            for _ in range(self.num_reqs)
        ]
        counts = [n + 1 if n else self.rng.randint(1, 5) for n in drafts]
        shape = self.shapes.get(tuple(counts), tuple(drafts))
        computed = torch.tensor([len(tokens) for tokens in self.tokens])
        self._mirror(shape, computed)
        rows = expand_block_table(shape, self.geometry, self.block_table, computed, self.fork_base)
        slots, commit_slots = write_slots(shape, self.geometry, rows, computed)
        new = [f"{self.rng.random():.9f}" for _ in range(sum(counts))]
        stash = [new[i] for i in shape.write_token.tolist()]
        self.cache.write(stash, slots.tolist())
        starts = [sum(counts[:i]) for i in range(self.num_reqs)]
        self._check_reads(shape, rows, starts, new, drafts, computed)
        return self._commit(shape, commit_slots, stash, starts, new, drafts, counts)

    def _mirror(self, shape, computed: torch.Tensor) -> None:
        for req, num_paths in zip(
            shape.forked_reqs.tolist(), shape.num_paths.tolist(), strict=True
        ):
            tokens, paths = self.mirrored[req]
            if len(self.tokens[req]) % self.block_size == 0:
                continue
            if tokens == len(self.tokens[req]) and paths >= num_paths:
                continue
            reqs = torch.tensor([req])
            block_idx = computed[reqs] // self.block_size
            tails = self.block_table[reqs, block_idx]
            source, destination = mirror_copies(
                num_paths, self.geometry, tails, block_idx, self.fork_base[reqs]
            )
            self.cache.copy_blocks(source.tolist(), destination.tolist())

    def _check_reads(self, shape, rows, starts, new, drafts, computed) -> None:
        """Each query must see the request's tokens, then its own ancestors, in order."""
        starts_of_seq = shape.query_start_loc.tolist()
        for seq in range(shape.num_seqs):
            req = int(shape.seq_req[seq])
            queries = range(starts_of_seq[seq], starts_of_seq[seq + 1])
            length = int(computed[req] + shape.seq_length[seq])
            seen = self.cache.read(rows[seq].tolist(), length)
            for back, query in enumerate(reversed(queries)):
                node = query - starts[req]
                if drafts[req]:
                    own = ancestor_tokens(self.tree, new[starts[req] :] + [None] * 99, node)
                else:
                    own = new[starts[req] : query + 1]
                assert seen[: length - back] == self.tokens[req] + own
                assert computed[req] + shape.token_offset[query] == length - back - 1

    def _commit(self, shape, commit_slots, stash, starts, new, drafts, counts) -> int:
        node = torch.tensor([self.rng.randint(0, n) for n in drafts])
        path, length = self.layout.ancestors[node], self.layout.depths[node]
        if shape.is_forked:
            source, written = commit_writes(shape, commit_slots, path, length)
            self.cache.write([stash[i] for i in source.tolist()], written.tolist())
        forked = dict(zip(shape.forked_reqs.tolist(), shape.num_paths.tolist(), strict=True))
        for req, start in enumerate(starts):
            if drafts[req]:
                chosen = path[req, : length[req] + 1].tolist()
                self.tokens[req] += [new[start + i] for i in chosen]
            else:
                self.tokens[req] += new[start : start + counts[req]]
            if req in forked:
                self.mirrored[req] = (len(self.tokens[req]), forked[req])
            table = self.block_table[req].tolist()
            assert self.cache.read(table, len(self.tokens[req])) == self.tokens[req]
        return sum(int(self.layout.node_path[n]) > 0 for n in node.tolist())


@given(seed=st.integers(0, 100_000))
def test_forked_steps_see_and_keep_the_right_tokens(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(8):
        simulation.step()


def test_the_simulation_accepts_other_paths() -> None:
    assert sum(Simulation(seed).step() for seed in range(200)) > 30


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
