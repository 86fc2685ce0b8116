"""Trees of heads that run in turn, against one node after another."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import heads as oracle
from tests.sequential_checkpoints import make_hydra
from vllm_medusa.heads import HeadsCheckpoint
from vllm_medusa.heads.hydra import HydraHeads
from vllm_medusa.heads.sequential import SequentialTree
from vllm_medusa.tree.draft_tree import DraftTree, TreePath
from vllm_medusa.tree.layout import TreeLayout

HEADS = make_hydra(num_heads=4, num_layers=2, root_size=6)
EMBEDDING = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))
NUM_GUESSES = 4


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Trees whose nodes hang below any earlier node, with ranks in any order."""
    paths: list[TreePath] = [()]
    for _ in range(draw(st.integers(1, 14))):
        above = draw(st.sampled_from([path for path in paths if len(path) < 4]))
        paths.append((*above, draw(st.integers(0, NUM_GUESSES - 1))))
    return DraftTree.from_paths(sorted({path for path in paths if path}, key=lambda p: (len(p), p)))


def slow_logits(heads: HeadsCheckpoint, hidden: Tensor, tokens: list[int]) -> Tensor:
    """[V] of what follows a path, whose tokens begin with the root."""
    head = len(tokens) - 1
    features = oracle.hydra_features(heads, head, hidden, EMBEDDING[torch.tensor(tokens)])
    return heads.tensors["lm_head.weight"][head] @ features


@given(tree=trees(), num_requests=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_every_node_follows_its_path(tree: DraftTree, num_requests: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_requests, 8, generator=generator)
    roots = torch.randint(20, (num_requests,), generator=generator)
    fast = HydraHeads.from_tensors(HEADS.tensors, lambda tokens: EMBEDDING[tokens], torch.float32)

    def guess(head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        best = (features @ HEADS.tensors["lm_head.weight"][head].T).topk(NUM_GUESSES)
        return best.values, best.indices

    levels = TreeLayout.build(tree).levels
    with torch.no_grad():
        made = SequentialTree.of(levels)
        drafted = made.draft(fast, hidden, roots, guess)
        scores, tokens = made.probable(fast, hidden, roots, guess)
    parents = [int(parent) for level in levels for parent in level.parents]
    assert len(scores) == len(tokens) == len(parents)
    for row in range(num_requests):
        path_tokens = {(): [int(roots[row])]}
        for node, path in enumerate(tree.paths):
            logits = slow_logits(HEADS, hidden[row], path_tokens[path[:-1]])
            best = logits.topk(NUM_GUESSES)
            path_tokens[path] = [*path_tokens[path[:-1]], int(best.indices[path[-1]])]
            assert int(drafted[row, node]) == path_tokens[path][-1]
            table = parents.index(0 if len(path) == 1 else 1 + tree.paths.index(path[:-1]))
            assert tokens[table, row].tolist() == best.indices.tolist()
            torch.testing.assert_close(scores[table, row], best.values, rtol=1e-3, atol=1e-3)


@given(tree=trees(), width=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_narrow_levels(tree: DraftTree, width: int, seed: int) -> None:
    """Of each level's parents the most probable go on, as if there were no others."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 8, generator=generator)
    roots = torch.randint(20, (3,), generator=generator)
    fast = HydraHeads.from_tensors(HEADS.tensors, lambda tokens: EMBEDDING[tokens], torch.float32)

    def guess(head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        logits = features @ HEADS.tensors["lm_head.weight"][head].T
        best = logits.log_softmax(dim=-1).topk(NUM_GUESSES)
        return best.values, best.indices

    levels = TreeLayout.build(tree).levels
    with torch.no_grad():
        made = SequentialTree.of(levels)
        whole = made.probable(fast, hidden, roots, guess)
        narrow = made.probable(fast, hidden, roots, guess, width)
    parents = [int(parent) for level in levels for parent in level.parents]
    for row in range(3):
        likelihood = {0: 0.0}
        for level in levels:
            found = level.parents.tolist()
            ranked = sorted(found, key=lambda node: -likelihood[node])
            # No other can be among them: it is less likely than `width` others.
            best = {n for n in ranked[:width] if likelihood[n] > -torch.inf}
            for node in found:
                table = parents.index(node)
                if node in best:
                    for part, of_whole in zip(narrow, whole, strict=True):
                        torch.testing.assert_close(part[table, row], of_whole[table, row])
                else:
                    assert narrow[0][table, row].isneginf().all()
            for node, place, rank in zip(
                level.nodes.tolist(),
                level.parent_places.tolist(),
                level.ranks.tolist(),
                strict=True,
            ):
                table = parents.index(found[place])
                score = float(narrow[0][table, row, rank])
                likelihood[node] = likelihood[found[place]] + score


@given(tree=trees(), num_levels=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_fewer_levels(tree: DraftTree, num_levels: int, seed: int) -> None:
    """The first levels are as they were, and nothing is known below the others."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 8, generator=generator)
    roots = torch.randint(20, (3,), generator=generator)
    fast = HydraHeads.from_tensors(HEADS.tensors, lambda tokens: EMBEDDING[tokens], torch.float32)

    def guess(head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        assert head < num_levels
        return tuple((features @ HEADS.tensors["lm_head.weight"][head].T).topk(NUM_GUESSES))

    made = SequentialTree.of(TreeLayout.build(tree).levels)
    num_first = sum(made.sizes[:num_levels])
    with torch.no_grad():
        cut = made.probable(fast, hidden, roots, guess, num_levels=num_levels)
        num_levels = len(made.sizes)
        whole = made.probable(fast, hidden, roots, guess)
    for part, of_whole in zip(cut, whole, strict=True):
        torch.testing.assert_close(part[:num_first], of_whole[:num_first])
    assert cut[0][num_first:].isneginf().all()
