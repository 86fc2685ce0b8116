"""The draft tree's own interface: shape, cuts, checks, files, names; the layout's cuts."""

import itertools
import json
import random
from pathlib import Path

import pytest

from tests.oracles.tree import random_subtree
from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import (
    MAX_DRAFT_TOKENS,
    TREE_FILE_FORMAT,
    DraftTree,
    read_tree_file,
    write_tree_file,
)
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.named import (
    _DEPTH_DECAY,
    _RANK_PROBABILITIES,
    default_paths,
    named_tree,
    tree_names,
)

#: 1 (0), 2 (0, 0), 3 (0, 2), 4 (0, 2, 1), 5 (1), 6 (4), 7 (4, 0)
PATHS = [[4], [0, 2], [1], [0], [0, 2, 1], [4, 0], [0, 0]]


def random_trees(count: int = 100) -> list[DraftTree]:
    rng = random.Random(0)
    return [random_subtree(rng.randrange, rng.randint(1, 40), 6, 4) for _ in range(count)]


def test_shape_of_a_tree() -> None:
    tree = DraftTree.from_paths(PATHS)
    assert tree.paths == ((0,), (0, 0), (0, 2), (0, 2, 1), (1,), (4,), (4, 0))
    assert tree.num_draft_tokens == 7
    assert tree.depth == 3
    assert tree.top_k == 5
    assert tree.parents == (-1, 0, 1, 1, 3, 0, 0, 6)
    assert tree.leaves == (2, 4, 5, 7)


def test_chain() -> None:
    tree = DraftTree.chain(3)
    assert tree.paths == ((0,), (0, 0), (0, 0, 0))
    assert (tree.depth, tree.top_k, tree.leaves) == (3, 1, (3,))


def test_trees_of_the_same_paths_are_equal() -> None:
    first, second = DraftTree.from_paths(PATHS), DraftTree.from_paths(reversed(PATHS))
    assert first == second
    assert hash(first) == hash(second)


def test_largest_tree() -> None:
    paths = [[rank] for rank in range(MAX_DRAFT_TOKENS)]
    assert DraftTree.from_paths(paths).num_draft_tokens == MAX_DRAFT_TOKENS
    with pytest.raises(UserError, match="128 nodes; vLLM verifies at most 127"):
        DraftTree.from_paths([*paths, [MAX_DRAFT_TOKENS]])


@pytest.mark.parametrize("rank", [True, "0", None, 1.0])
def test_ranks_are_integers(rank: object) -> None:
    with pytest.raises(UserError, match=f"has rank {rank!r};"):
        DraftTree.from_paths([[rank]])  # type: ignore[list-item]


def test_check_heads() -> None:
    tree = DraftTree.from_paths(PATHS)
    tree.check_heads(3)
    with pytest.raises(UserError, match=r"3 deep \(path \[0, 2, 1\]\) but the heads are 2; use"):
        tree.check_heads(2)


def test_check_vocab() -> None:
    tree = DraftTree.from_paths(PATHS)
    tree.check_vocab(5)
    with pytest.raises(UserError, match="asks for rank 4 but a head knows 4 tokens; remove"):
        tree.check_vocab(4)


def test_every_prefix_is_a_tree_whose_paths_are_the_live_ones() -> None:
    """What the scheduler leaves of a tree is one, with the full tree's first leaf paths."""
    for tree in random_trees():
        layout = TreeLayout.build(tree)
        length = tree.leaves[0]
        first = [path for path in tree.paths if path == tree.paths[length - 1][: len(path)]]
        assert first == list(tree.paths[:length])
        assert (*layout.path_starts, len(tree.paths) + 1)[1] == length + 1
        for count in range(1, tree.num_draft_tokens + 1):
            cut = TreeLayout.build(DraftTree.from_paths(tree.paths[:count]))
            num_paths = len(cut.path_starts)
            assert layout.path_starts[:num_paths] == cut.path_starts
            assert all(start > count for start in layout.path_starts[num_paths:])
            assert layout.parents[:count] == cut.parents


def test_tree_file_keeps_the_order(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    write_tree_file(file, PATHS)
    assert json.loads(file.read_text())["format"] == TREE_FILE_FORMAT
    assert read_tree_file(file) == PATHS
    file.write_text(json.dumps(PATHS))
    assert read_tree_file(file) == PATHS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0], [1]", "is not JSON"),
        ('{"format": "other/1", "paths": [[0]]}', "has format 'other/1'; use 'vllm_medusa.tree/1'"),
        ('{"paths": [[0]]}', "has format None; use"),
        (json.dumps({"format": TREE_FILE_FORMAT}), "holds no list of paths; give"),
        ('"cpu-16"', "holds no list of paths; give"),
        ("[" * 100_000, "is not JSON .*nested too deeply"),
        (json.dumps({"format": "x" * 3000}), "has format 'xx.*xx'; use 'vllm_medusa.tree/1'"),
    ],
)
def test_bad_tree_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tree.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_tree_file(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(file))


def test_missing_tree_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the tree file .*: No such file"):
        read_tree_file(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot read the tree file .*: Is a directory"):
        read_tree_file(tmp_path)


def test_binary_tree_file(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON"):
        read_tree_file(file)


def test_named_trees() -> None:
    for name in tree_names():
        tree = named_tree(name, 5)
        assert tree.depth <= 5, name
        if name.startswith("cpu-"):
            assert tree.num_draft_tokens == int(name[4:])
    assert named_tree("chain", 3) == DraftTree.chain(3)
    assert named_tree("cpu-32", 2).depth == 2


@pytest.mark.parametrize("name", ["cpu-", "cpu-9", "auto", "", "Chain"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        UserError,
        match=f"there is no tree named {name!r}; use 'auto', 'dynamic', 'static', one of ch",
    ):
        named_tree(name, 4)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_default_paths_are_the_most_probable(num_heads: int) -> None:
    """Against all paths of the model that the default documents, sorted."""

    def probability(path: tuple[int, ...]) -> float:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= _RANK_PROBABILITIES[rank] * _DEPTH_DECAY**depth
        return product

    ranks = range(len(_RANK_PROBABILITIES))
    every = [p for n in range(num_heads) for p in itertools.product(ranks, repeat=n + 1)]
    best = sorted(map(probability, every), reverse=True)
    paths = default_paths(num_heads, 100)
    assert len(paths) == min(100, len(every))
    assert [probability(path) for path in paths] == pytest.approx(best[: len(paths)])
    for count in range(1, len(paths) + 1):
        DraftTree.from_paths(paths[:count])
