"""The engine's heads, built of vLLM's layers and split over ranks, against one head at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from tests import checkpoints
from tests.integration.command_line import engine_config, run_vllm
from tests.integration.conftest import open_engine
from tests.oracles.heads import NUM_CANDIDATES
from tests.oracles.heads import below as slow_below
from tests.oracles.heads import draft as slow_draft
from tests.oracles.heads import features as slow_features
from tests.oracles.heads import logits as slow_logits
from vllm_medusa.config import CONFIG_KEY, MedusaConfig
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint
from vllm_medusa.heads.io import files
from vllm_medusa.plugin.worker import proposer
from vllm_medusa.tree.draft_tree import DraftTree

pytestmark = pytest.mark.engine

VOCAB_SIZE, HIDDEN_SIZE = 67, 8
#: Two of the heads' three depths, four ranks.
TREE = DraftTree.from_paths([[0], [1], [2], [3], [0, 0], [0, 1]])


def make_heads(**options: Any) -> HeadsCheckpoint:
    return checkpoints.make_heads(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, **options)


def some_states(num_rows: int = 5) -> torch.Tensor:
    return torch.randn(num_rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))


def some_roots(num_rows: int = 5) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (num_rows,), generator=torch.Generator().manual_seed(2))


#: Of the target's embeddings, by which root-aware heads see the root.
ROOT_SIZE = 6


def embedding() -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, ROOT_SIZE, generator=torch.Generator().manual_seed(3))


def make_model() -> torch.nn.Module:
    """A target with nothing but its embedding, which is whole on every rank."""
    model = torch.nn.Module()
    model.embed_tokens = VocabParallelEmbedding(VOCAB_SIZE, ROOT_SIZE, disable_tp=True)
    model.embed_tokens.weight.data[:VOCAB_SIZE] = embedding()
    return model


def load_rank(
    monkeypatch: pytest.MonkeyPatch, heads: Path, rank: int = 0, world_size: int = 1
) -> proposer.MedusaProposer:
    """One rank's proposer, outside an engine."""
    config = MedusaConfig(heads=str(heads), revision=None, tree=TREE, tree_name="test")
    model_config = SimpleNamespace(
        dtype=torch.float32,
        get_hidden_size=lambda: HIDDEN_SIZE,
        get_vocab_size=lambda: VOCAB_SIZE,
    )
    vllm_config = SimpleNamespace(
        additional_config={CONFIG_KEY: config.to_dict()},
        device_config=SimpleNamespace(device=torch.device("cpu")),
        model_config=model_config,
    )
    for what, value in (("rank", rank), ("world_size", world_size)):
        name = f"get_tensor_model_parallel_{what}"
        monkeypatch.setattr(proposer, name, lambda value=value: value)
        # vLLM's parameters ask for it even in layers that are not split.
        monkeypatch.setattr(f"vllm.model_executor.parameter.{name}", lambda value=value: value)
    loaded = proposer.MedusaProposer(vllm_config)  # type: ignore[arg-type]
    loaded.load_model(make_model())
    return loaded


KINDS: list[dict[str, Any]] = [
    {"lm_head": "own"},
    {"lm_head": "own", "num_layers": 2, "has_bias": False, "draft_vocab_size": 41},
    {"lm_head": "own", "logit_scale": 0.5},
    {"lm_head": "common", "draft_vocab_size": 9},
    {"lm_head": "common", "num_layers": 3},
    {"lm_head": "low_rank"},
    {"lm_head": "low_rank", "draft_vocab_size": 41, "rank": 5},
    {"lm_head": "own", "num_layers": 2, "root_size": ROOT_SIZE},
    {"lm_head": "common", "root_size": ROOT_SIZE, "selector_rank": 3},
    {"lm_head": "own", "draft_vocab_size": 41, "selector_rank": 3, "logit_scale": 0.5},
]


def slow_guesses(heads: HeadsCheckpoint, hidden: torch.Tensor) -> torch.Tensor:
    """The oracle's logits [K, B, V] of the states with `some_roots`."""
    roots = None
    if heads.spec.root_size is not None:
        roots = embedding()[some_roots(len(hidden))]
    return slow_logits(heads, slow_features(heads, hidden, roots))


def check_guesses(
    loaded: proposer.MedusaProposer, heads: HeadsCheckpoint, hidden: torch.Tensor
) -> None:
    """Logits, log-probabilities and tokens are the oracle's."""
    logits = slow_guesses(heads, hidden)[: TREE.depth] * heads.spec.logit_scale
    top_k = TREE.top_k
    if heads.spec.selector_rank is not None:
        top_k = min(NUM_CANDIDATES, logits.shape[-1])
    expected, tokens = logits.topk(top_k, dim=-1)
    tokens = heads.tensors.get("token_map", torch.arange(VOCAB_SIZE))[tokens]
    found_values, found_tokens = loaded.guesses(hidden, some_roots(len(hidden)))
    torch.testing.assert_close(found_values, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found_tokens, tokens)
    drafts = loaded.propose(hidden, some_roots(len(hidden))).tolist()
    log_probs, found_tokens = loaded.probable_guesses(hidden, some_roots(len(hidden)))
    # Of heads with a selector: below the root and below its first child.
    assert log_probs.shape == found_tokens.shape == (TREE.depth, len(hidden), TREE.top_k)
    for b, root in enumerate(some_roots(len(hidden)).tolist()):
        rows = slow_guesses(heads, hidden)[:, b]
        assert drafts[b] == slow_draft(heads, rows, root, TREE.paths)
        for head, parent in enumerate((root, drafts[b][0])):
            below = slow_below(heads, head, rows[head], parent)
            assert found_tokens[head, b].tolist() == list(below)[: TREE.top_k]
            wanted = torch.tensor(list(below.values())[: TREE.top_k])
            torch.testing.assert_close(log_probs[head, b], wanted, rtol=1e-4, atol=1e-4)


#: Fewer tokens than a selector would rank again.
FEW: dict[str, Any] = {"lm_head": "own", "draft_vocab_size": 9, "selector_rank": 3}


@pytest.mark.parametrize("kind", [*KINDS, FEW], ids=str)
def test_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]) -> None:
    heads = make_heads(**kind)
    loaded = load_rank(monkeypatch, checkpoints.write_native(tmp_path, heads))
    for num_rows in (1, 5):
        check_guesses(loaded, heads, some_states(num_rows))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_heads_split_over_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], world_size: int
) -> None:
    """Every rank guesses what one alone does, also where it has fewer rows than the tree ranks."""
    heads, hidden = make_heads(**kind), some_states()
    path = checkpoints.write_native(tmp_path, heads)
    ranks = [load_rank(monkeypatch, path, rank, world_size) for rank in range(world_size)]
    # The ranks' collective is played by going over them twice: what they give, by its kind (guesses
    # are [2, K, B, k], the sums of probabilities [K, B, 1]), and then what they get.
    given: dict[int, list[torch.Tensor]] = {3: [], 4: []}

    def record(part: torch.Tensor, dim: int) -> torch.Tensor:
        given[part.ndim].append(part)
        return torch.cat([part] * world_size, dim)

    monkeypatch.setattr(proposer, "tensor_model_parallel_all_gather", record)
    for rank in ranks:
        rank.probable_guesses(hidden, some_roots())
    for parts in given.values():
        assert len({part.shape for part in parts}) == 1  # what a collective needs
    monkeypatch.setattr(
        proposer,
        "tensor_model_parallel_all_gather",
        lambda part, dim: torch.cat(given[part.ndim], dim),
    )
    for rank in ranks:
        check_guesses(rank, heads, hidden)


def test_embedding_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.write_native(tmp_path, make_heads(root_size=ROOT_SIZE + 1))
    with pytest.raises(
        UserError, match="of 67 tokens and size 7, but Module exposes 0 of these; use heads"
    ):
        load_rank(monkeypatch, path)


def test_embedding_is_the_targets_own_and_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr(f"{__name__}.make_model", lambda: model)
    heads = make_heads(root_size=ROOT_SIZE)
    loaded = load_rank(monkeypatch, checkpoints.write_native(tmp_path, heads))
    before, _ = loaded.guesses(some_states(), some_roots())
    model.embed_tokens.weight.data.mul_(2)
    after, _ = loaded.guesses(some_states(), some_roots())
    assert not torch.allclose(before, after)


def test_heads_that_do_not_see_the_root_draft_the_same_below_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others do not: the tests above could not tell otherwise."""
    for number, (kind, is_same) in enumerate(
        [({}, True), ({"root_size": ROOT_SIZE}, False), ({"selector_rank": 3}, False)]
    ):
        path = checkpoints.write_native(tmp_path / str(number), make_heads(**kind))
        loaded = load_rank(monkeypatch, path)
        drafts = loaded.propose(some_states(), some_roots())
        assert torch.equal(drafts, loaded.propose(some_states(), some_roots() ^ 1)) == is_same


# Values that are not finite: refused by whoever reads them.


def spoil(directory: Path, head: int, row: int) -> Path:
    heads = make_heads()
    heads.tensors["lm_head.weight"][head, row, 3] = torch.nan
    return checkpoints.write_fasterdecoding(directory, heads)


def test_rank_refuses_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spoil(tmp_path, head=1, row=VOCAB_SIZE - 1)
    with pytest.raises(UserError, match=r"tensor '1.1.weight' holds NaN .* export the heads again"):
        load_rank(monkeypatch, path, rank=1, world_size=2)
    load_rank(monkeypatch, path, rank=0, world_size=2)


def test_rank_reads_no_heads_deeper_than_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_rank(monkeypatch, spoil(tmp_path, head=2, row=0))


@pytest.fixture
def spoiled(tiny_heads: Path, tmp_path: Path) -> dict[str, Any]:
    """The speculative configuration of heads with one value that is not finite."""
    tensors = load_file(tiny_heads / "medusa_lm_head.safetensors")
    tensors["2.1.weight"][-1, -1] = torch.nan
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    return {"method": "medusa", "model": str(tmp_path)}


def test_front_end_opens_the_heads_once_and_reads_no_values(
    tiny_model: Path, spoiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    original = files.open_tensor_file

    def record(path: Path) -> files.TensorFile:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(files, "open_tensor_file", record)
    engine_config(tiny_model, spoiled, skip_tokenizer_init=True)
    assert opened == [Path(spoiled["model"], "medusa_lm_head.safetensors")]


def test_engine_refuses_them(tiny_model: Path, spoiled: dict[str, Any]) -> None:
    with (
        pytest.raises(UserError, match=r"tensor '2.1.weight' holds NaN"),
        open_engine(tiny_model, speculative_config=spoiled),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_process_refuses_them_in_one_line(
    tiny_model: Path, spoiled: dict[str, Any], ranks: int
) -> None:
    argv = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--block-size", "32"]
    argv += ["--num-gpu-blocks-override", "200", "--skip-tokenizer-init"]
    argv += ["--tensor-parallel-size", str(ranks), "--gpu-memory-utilization", "0.1"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {}
    done = run_vllm(
        "serve", str(tiny_model), "--speculative-config", json.dumps(spoiled), *argv, **env
    )
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if "vllm_medusa" in line]
    assert len(ours) == 1, done.stderr[-3000:]
    assert "vllm_medusa: error: " in ours[0]
    assert "tensor '2.1.weight' holds NaN" in ours[0]
