"""What a user may write, what it resolves to, and what is said of a mistake."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_medusa.config import MedusaConfig, MedusaOptions, TreeChoice, resolve_tree
from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import DraftTree, write_tree_file
from vllm_medusa.tree.limits import DynamicTrees
from vllm_medusa.tree.named import default_paths
from vllm_medusa.tree.schedule import TreeSchedule

HEADS_TREE = [[0], [1], [0, 0], [1, 0], [0, 0, 0]]


def nested(depth: int) -> Any:
    """A list within a list, and so on."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def request(**values: Any) -> MedusaOptions:
    return MedusaOptions.from_dict({"method": "medusa", **values})


def test_defaults() -> None:
    assert request() == MedusaOptions()
    assert (MedusaOptions().tree, MedusaOptions().acceptance) == ("auto", "lossless")


def test_keys_may_have_dashes_and_values_may_be_none() -> None:
    got = request(**{"num-speculative-tokens": 7, "max_tree_requests": None, "model": "heads"})
    assert got == MedusaOptions(num_speculative_tokens=7, model="heads")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"treee": "chain"},
            r"has 'treee', which method 'medusa' does not know; use model, revision, tree",
        ),
        ({"acceptance": "fast"}, "acceptance='fast' is not supported; use 'lossless'"),
        ({"model": 3}, "model=3 must be a string"),
        ({"revision": ["main"]}, r"revision=\['main'\] must be a string"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0 must be a positive integer"),
        ({"num_speculative_tokens": "8"}, "num_speculative_tokens='8' must be a positive integer"),
        (
            {"num_speculative_tokens": True},
            "num_speculative_tokens=True must be a positive integer",
        ),
        ({"max_tree_requests": -1}, "max_tree_requests=-1 must be a positive integer"),
        ({"max_tree_requests": 1.5}, "max_tree_requests=1.5 must be a positive integer"),
        *(
            ({"num_speculative_tokens_per_batch_size": sizes}, rf"per_batch_size has {named}; use")
            for sizes, named in (
                ([[1, 4]], r"\[1, 4\]"),
                ([[2, 4, 8]], r"\[2, 4, 8\]"),
                ([[1, 4, 8], [4, 5, 2]], r"\[4, 5, 2\]"),
                ([[1, 4, -1]], r"\[1, 4, -1\]"),
                ([[1, 4, "8"]], r"\[1, 4, '8'\]"),
                (7, "7"),
                ("[[1, 4, 8]]", r"'\[\[1, 4, 8\]\]'"),
            )
        ),
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 0]]}, "drafts nothing at any batch"),
        ({"tree": 16}, "tree=16 must be 'auto', a tree's name, a tree file or a list of paths"),
        ({"tree": {"paths": [[0]]}}, "must be 'auto', a tree's name"),
        ({"tree": "dynamic", "max_nodes": "9"}, "max_nodes='9' must be a positive integer"),
        ({"tree": "dynamic", "sources": [["heads"]]}, r"sources=\[\['heads'\]\] must be a list of"),
        ({"tree": "dynamic", "sources": np.array(["heads"])}, "sources=array.* must be a list of"),
        ({"shared_text": 1}, "shared_text=1 must be true or false"),
        ({"measure_costs": "no"}, "measure_costs='no' must be true or false"),
        ({"tree": "cpu-8", "learn": True}, "learn=True is for dynamic trees.* 'cpu-8'; use tree="),
        ({"tree": np.array([[0]]), "max_nodes": 2}, "max_nodes=2 is for dynamic trees"),
        ({"num_speculative_tokens": 4, "max_depth": 3}, "max_depth=3 .* 'auto' with a number of"),
        ({"tree": "dynamic", "num_speculative_tokens": 4}, "sizes static trees.*with max_nodes"),
        ({"tree": "dynamic", "learn": "x" * 3000}, "learn='xx.*xx' must be true or false"),
        ({3: "heads"}, "the key 3, which is not a string; use model, revision, tree"),
        ({None: "heads"}, "the key None, which is not a string"),
        (
            {"max-tree-requests": 4, "max_tree_requests": 4},
            "'max-tree-requests' and 'max_tree_requests', which are the same key; remove one",
        ),
        *(
            (
                {key: np.array([[0, 1], [2, 3]])},
                f"{key}=array.* is not supported|{key}=array.* must",
            )
            for key in ("acceptance", "model", "revision", "tree", "max_tree_requests")
        ),
        (
            {"num_speculative_tokens_per_batch_size": np.array([[1, 4, 8]])},
            "per_batch_size has array",
        ),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        MedusaOptions.from_dict({"method": "medusa", **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"k" * 3000: 1},
        {"acceptance": "x" * 3000},
        {"model": ["x" * 3000]},
        {"revision": "x" * 3000},
        {"num_speculative_tokens": "x" * 3000},
        {"max_tree_requests": [[0] * 1000] * 1000},
        {"num_speculative_tokens_per_batch_size": [["x" * 3000]]},
        {"num_speculative_tokens_per_batch_size": [[1, size, 0] for size in range(1, 1000)]},
        {"tree": {"x" * 3000: 1}},
        {"tree": "x" * 3000},
        {"tree": "x" * 3000 + ".json"},
        {"tree": [["x" * 3000]]},
        {"tree": [["x"] * 1000]},
        {"tree": [[0] * 3000]},
        {"tree": nested(400)},
        {
            "tree": [[rank] for rank in range(100)],
            "num_speculative_tokens_per_batch_size": [[n, n, 2] for n in range(1, 1000)],
        },
    ],
    ids=lambda values: next(iter(values))[:30],
)
def test_long_values_are_cut(values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_tree(request(**values), 2, None)
    assert len(str(caught.value)) < 500


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    write_tree_file(tmp_path / "tree.json", HEADS_TREE)
    given = request(model=tmp_path, tree=tmp_path / "tree.json")
    assert given == request(model=str(tmp_path), tree=str(tmp_path / "tree.json"))
    choice = resolve_tree(given, 3, None)
    assert choice == TreeChoice(DraftTree.from_paths(HEADS_TREE), str(tmp_path / "tree.json"))


def test_resolved_configuration_travels_as_json() -> None:
    config = MedusaConfig(
        heads="heads",
        revision=None,
        tree=DraftTree.from_paths(HEADS_TREE),
        tree_name="given as paths",
        sizes_by_batch=((1, 4, 5), (5, 64, 0)),
        max_tree_requests=3,
    )
    assert MedusaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("tree", ["auto", "dynamic"])
def test_auto_is_dynamic_where_no_size_is_given(tree: str) -> None:
    given = request(tree=tree, max_nodes=9, sources=["text"], measure_costs=False)
    schedule = TreeSchedule.from_entries([(None, HEADS_TREE)])
    choice = resolve_tree(given, 3, HEADS_TREE, schedule)
    bounds = DynamicTrees(max_nodes=9, sources=("text",), measure_costs=False)
    assert (choice.dynamic, choice.sizes_by_batch) == (bounds, None)
    assert choice.tree_name == "dynamic, up to 9 nodes of text"
    shared = resolve_tree(request(shared_text=True), 3, HEADS_TREE)
    assert shared.tree_name == "dynamic, up to 16 nodes of heads and text and shared text"
    for size in (
        {"num_speculative_tokens": 3},
        {"num_speculative_tokens_per_batch_size": [[1, 4, 3]]},
    ):
        assert resolve_tree(request(**size), 3, HEADS_TREE, schedule).dynamic is None


def test_dynamic_trees_survive_the_way_to_other_processes() -> None:
    bounds = DynamicTrees(max_nodes=9, max_depth=3, sources=("text",), shared_text=True)
    tree = DraftTree.from_paths(HEADS_TREE)
    config = MedusaConfig(heads="h", revision=None, tree=tree, tree_name="d", dynamic=bounds)
    assert MedusaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_static_takes_the_tree_of_the_heads() -> None:
    choice = resolve_tree(request(tree="static"), 3, HEADS_TREE)
    tree = DraftTree.from_paths(HEADS_TREE)
    assert choice == TreeChoice(tree, "static: 5 nodes from the heads' checkpoint")


def test_static_cuts_the_tree_of_the_heads_from_its_front() -> None:
    choice = resolve_tree(request(num_speculative_tokens=3), 3, HEADS_TREE)
    tree = DraftTree.from_paths(HEADS_TREE[:3])
    assert choice == TreeChoice(tree, "static: 3 nodes from the heads' checkpoint")
    with pytest.raises(
        UserError, match=r"num_speculative_tokens=6 asks for more nodes than the 5 of the tree"
    ):
        resolve_tree(request(num_speculative_tokens=6), 3, HEADS_TREE)


def test_static_takes_the_default_without_one() -> None:
    tree = DraftTree.from_paths(default_paths(4, 16))
    assert resolve_tree(request(tree="static"), 4, None) == TreeChoice(
        tree, "static: 16 nodes default"
    )
    assert resolve_tree(request(tree="static"), 2, None).tree.depth == 2
    largest = resolve_tree(request(num_speculative_tokens=127), 4, None)
    assert largest.tree.num_draft_tokens == 127
    with pytest.raises(UserError, match="128 nodes; vLLM verifies at most 127"):
        resolve_tree(request(num_speculative_tokens=128), 4, None)
    with pytest.raises(UserError, match="than the 10 of the tree default; ask for fewer"):
        resolve_tree(request(num_speculative_tokens=11), 1, None)
    # One head knows no more than ten guesses of the default.
    assert resolve_tree(request(tree="static"), 1, None).tree.num_draft_tokens == 10


def test_tree_deeper_than_the_heads() -> None:
    with pytest.raises(UserError, match=r"3 deep .* but the heads are 2"):
        resolve_tree(request(), 2, HEADS_TREE)


def test_chain_of_a_given_length() -> None:
    assert resolve_tree(request(tree="chain"), 4, None) == TreeChoice(DraftTree.chain(4), "chain")
    short = resolve_tree(request(tree="chain", num_speculative_tokens=2), 4, HEADS_TREE)
    assert short == TreeChoice(DraftTree.chain(2), "chain")
    with pytest.raises(UserError, match=r"num_speculative_tokens=5 does not agree .* 4 nodes"):
        resolve_tree(request(tree="chain", num_speculative_tokens=5), 4, None)


def test_given_trees(tmp_path: Path) -> None:
    tree = DraftTree.from_paths(HEADS_TREE)
    assert resolve_tree(request(tree=HEADS_TREE), 3, None) == TreeChoice(tree, "given as paths")
    for name in ("tree.json", "without-suffix"):
        write_tree_file(tmp_path / name, HEADS_TREE)
        given = str(tmp_path / name)
        assert resolve_tree(request(tree=given), 3, None) == TreeChoice(tree, given)
    named = resolve_tree(request(tree="cpu-8", num_speculative_tokens=8), 4, None)
    assert named.tree_name == "cpu-8"


def test_static_takes_the_schedule_of_the_heads() -> None:
    schedule = TreeSchedule.from_entries([(2, HEADS_TREE), (8, [[1], [0]]), (None, [])])
    choice = resolve_tree(request(tree="static"), 3, HEADS_TREE, schedule)
    small = DraftTree.from_paths([[0], [1]]).paths
    assert choice.tree == DraftTree.from_stages([small, HEADS_TREE])
    assert choice.tree.paths[:2] == small
    assert choice.sizes_by_batch == ((1, 2, 5), (3, 8, 2), (9, 9, 0))
    # A size or a tree that is asked for comes first.
    for values in ({"num_speculative_tokens": 5}, {"tree": HEADS_TREE}, {"tree": "chain"}):
        assert resolve_tree(request(**values), 3, HEADS_TREE, schedule).sizes_by_batch is None


def test_sizes_by_batch() -> None:
    sizes = [[1, 4, 5], [5, 16, 2], [17, 64, 0]]
    for tree, small in (
        ("auto", HEADS_TREE[:2]),
        ("static", HEADS_TREE[:2]),
        ("chain", [[0], [0, 0]]),
    ):
        given = request(tree=tree, num_speculative_tokens_per_batch_size=sizes)
        choice = resolve_tree(given, 5, HEADS_TREE)
        assert choice.sizes_by_batch == ((1, 4, 5), (5, 16, 2), (17, 64, 0))
        assert choice.tree.num_draft_tokens == 5
        assert choice.tree.paths[:2] == DraftTree.from_paths(small).paths
    given = request(num_speculative_tokens=5, num_speculative_tokens_per_batch_size=sizes)
    assert resolve_tree(given, 5, HEADS_TREE).tree.num_draft_tokens == 5


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"tree": "cpu-8", "num_speculative_tokens_per_batch_size": [[1, 4, 2]]},
            UserError,
            r"per_batch_size=\[\[1, 4, 2\]\] needs tree='static' or 'chain', not 'cpu-8'",
        ),
        (
            {"num_speculative_tokens": 7, "num_speculative_tokens_per_batch_size": [[1, 4, 2]]},
            UserError,
            "num_speculative_tokens=7 does not agree",
        ),
        ({"tree": HEADS_TREE}, UserError, "3 deep .* but the heads are 2"),
        ({"tree": "mc_sim_7b_63"}, UserError, "but the heads are 2"),
        ({"tree": "cpu-9"}, UserError, "there is no tree named 'cpu-9'"),
        ({"tree": "none.json"}, UserError, "cannot read the tree file none.json"),
        ({"tree": [[0, 0]]}, UserError, r"\[0, 0\] has no parent"),
        ({"tree": []}, UserError, "no paths"),
        (
            {"tree": [[0], [1]], "num_speculative_tokens": 3},
            UserError,
            "num_speculative_tokens=3 does not agree with the tree given as paths, which has 2",
        ),
    ],
)
def test_trees_that_cannot_be(values: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        resolve_tree(request(**values), 2, None)
    assert "\n" not in str(caught.value)
