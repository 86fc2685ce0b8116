"""What a user may write, what it resolves to, and what is said of a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.config import (
    ConfigError,
    MedusaConfig,
    MedusaRequest,
    TreeError,
    resolve_tree,
)
from vllm_medusa.tree.draft_tree import DraftTree, write_tree_file
from vllm_medusa.tree.named import default_paths

HEADS_TREE = [[0], [1], [0, 0], [1, 0], [0, 0, 0]]


def request(**values: Any) -> MedusaRequest:
    return MedusaRequest.from_dict({"method": "medusa", **values})


def test_defaults() -> None:
    assert request() == MedusaRequest()
    assert (MedusaRequest().tree, MedusaRequest().acceptance) == ("auto", "lossless")


def test_keys_may_have_dashes_and_values_may_be_none() -> None:
    got = request(**{"num-speculative-tokens": 7, "max_tree_requests": None, "model": "heads"})
    assert got == MedusaRequest(num_speculative_tokens=7, model="heads")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"treee": "chain"},
            r"has 'treee', which method 'medusa' does not know; use model, revision, tree",
        ),
        ({"acceptance": "typical"}, "acceptance='typical' is not supported; use 'lossless'"),
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
        ({"tree": 16}, "tree=16 must be 'auto', a tree's name, a tree file or a list of paths"),
        ({"tree": {"paths": [[0]]}}, "must be 'auto', a tree's name"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        request(**values)
    assert "\n" not in str(caught.value)


def test_resolved_configuration_travels_as_json() -> None:
    config = MedusaConfig(
        heads="heads",
        revision=None,
        tree=DraftTree.from_paths(HEADS_TREE),
        tree_name="given as paths",
        max_tree_requests=3,
    )
    assert MedusaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_auto_takes_the_tree_of_the_heads() -> None:
    tree, name = resolve_tree(request(), 3, HEADS_TREE)
    assert tree == DraftTree.from_paths(HEADS_TREE)
    assert name == "auto: 5 nodes from the heads' checkpoint"


def test_auto_cuts_the_tree_of_the_heads_from_its_front() -> None:
    tree, name = resolve_tree(request(num_speculative_tokens=3), 3, HEADS_TREE)
    assert tree == DraftTree.from_paths(HEADS_TREE[:3])
    assert name == "auto: 3 nodes from the heads' checkpoint"
    with pytest.raises(
        ConfigError, match=r"num_speculative_tokens=6 asks for more nodes than the 5 of the tree"
    ):
        resolve_tree(request(num_speculative_tokens=6), 3, HEADS_TREE)


def test_auto_takes_the_default_without_one() -> None:
    tree, name = resolve_tree(request(), 4, None)
    assert tree == DraftTree.from_paths(default_paths(4, 16))
    assert name == "auto: 16 nodes default"
    assert resolve_tree(request(), 2, None)[0].depth == 2
    assert resolve_tree(request(num_speculative_tokens=127), 4, None)[0].num_draft_tokens == 127
    with pytest.raises(TreeError, match="128 nodes; vLLM verifies at most 127"):
        resolve_tree(request(num_speculative_tokens=128), 4, None)
    with pytest.raises(ConfigError, match="than the 10 of the tree default; ask for fewer"):
        resolve_tree(request(num_speculative_tokens=11), 1, None)
    # One head knows no more than ten guesses of the default.
    assert resolve_tree(request(), 1, None)[0].num_draft_tokens == 10


def test_auto_tree_deeper_than_the_heads() -> None:
    with pytest.raises(TreeError, match=r"3 deep .* but the heads are 2"):
        resolve_tree(request(), 2, HEADS_TREE)


def test_chain_of_a_given_length() -> None:
    assert resolve_tree(request(tree="chain"), 4, None) == (DraftTree.chain(4), "chain")
    short = resolve_tree(request(tree="chain", num_speculative_tokens=2), 4, HEADS_TREE)
    assert short == (DraftTree.chain(2), "chain")
    with pytest.raises(ConfigError, match=r"num_speculative_tokens=5 does not agree .* 4 nodes"):
        resolve_tree(request(tree="chain", num_speculative_tokens=5), 4, None)


def test_given_trees(tmp_path: Path) -> None:
    tree = DraftTree.from_paths(HEADS_TREE)
    assert resolve_tree(request(tree=HEADS_TREE), 3, None) == (tree, "given as paths")
    for name in ("tree.json", "without-suffix"):
        write_tree_file(tmp_path / name, HEADS_TREE)
        given = str(tmp_path / name)
        assert resolve_tree(request(tree=given), 3, None) == (tree, given)
    assert resolve_tree(request(tree="cpu-8", num_speculative_tokens=8), 4, None)[1] == "cpu-8"


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"tree": HEADS_TREE}, TreeError, "3 deep .* but the heads are 2"),
        ({"tree": "mc_sim_7b_63"}, TreeError, "but the heads are 2"),
        ({"tree": "cpu-9"}, TreeError, "there is no tree named 'cpu-9'"),
        ({"tree": "none.json"}, TreeError, "cannot read the tree file none.json"),
        ({"tree": [[0, 0]]}, TreeError, r"\[0, 0\] has no parent"),
        ({"tree": []}, TreeError, "no paths"),
        (
            {"tree": [[0], [1]], "num_speculative_tokens": 3},
            ConfigError,
            "num_speculative_tokens=3 does not agree with the tree given as paths, which has 2",
        ),
    ],
)
def test_trees_that_cannot_be(values: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        resolve_tree(request(**values), 2, None)
    assert "\n" not in str(caught.value)
