"""Random heads: the batched module equals the slow one, and formats hold what goes in."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.checkpoints import (
    assert_same_heads,
    make_heads,
    write_fasterdecoding,
    write_merged,
    write_modelopt,
    write_native,
    write_vllm,
)
from tests.draft_oracle import parents_of, rank_paths
from tests.oracles.heads import below as slow_below
from tests.oracles.heads import draft as slow_draft
from tests.oracles.heads import features as slow_features
from tests.oracles.heads import logits as slow_logits
from tests.unit.test_heads_module import fast_logits
from vllm_medusa.draft.superset import Superset
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads, load_heads
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.heads.selector import Selector, SelectorTree
from vllm_medusa.tree.layout import levels_of

OPTIONS = {
    "num_heads": st.integers(1, 5),
    "num_layers": st.integers(1, 3),
    "has_bias": st.booleans(),
    "seed": st.integers(0, 10_000),
}


@st.composite
def any_heads(draw: st.DrawFn, **fixed: Any) -> HeadsCheckpoint:
    options: dict[str, Any] = {name: draw(strategy) for name, strategy in OPTIONS.items()}
    options["hidden_size"] = draw(st.sampled_from([1, 4, 8]))
    options["vocab_size"] = draw(st.sampled_from([7, 20]))
    options["lm_head"] = draw(st.sampled_from(["own", "common", "target", "low_rank"]))
    if options["lm_head"] != "target":
        options["draft_vocab_size"] = draw(st.sampled_from([None, 1, 5]))
    options["logit_scale"] = draw(st.sampled_from([1.0, 0.25]))
    options["selector_rank"] = draw(st.sampled_from([None, 1, 3]))
    options["root_size"] = draw(st.sampled_from([None, 1, 6]))
    options["prefix_window"] = draw(st.sampled_from([None, 1, 9]))
    options["dtype"] = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return make_heads(**options | fixed)


@given(heads=any_heads(dtype=torch.float32), batch=st.integers(0, 9), seed=st.integers(0, 99))
def test_module_equals_the_oracle(heads: HeadsCheckpoint, batch: int, seed: int) -> None:
    hidden = torch.randn(
        batch, heads.spec.hidden_size, generator=torch.Generator().manual_seed(seed)
    )
    roots = None
    if "root.weight" in heads.tensors:
        assert heads.spec.root_size is not None
        roots = torch.randn(batch, heads.spec.root_size)
    features = MedusaHeads.from_checkpoint(heads, torch.float32)(hidden, roots)
    torch.testing.assert_close(features, slow_features(heads, hidden, roots), rtol=1e-4, atol=1e-4)
    if heads.spec.lm_head != "target" and batch:
        logits = fast_logits(heads, features)
        torch.testing.assert_close(logits, slow_logits(heads, features), rtol=1e-4, atol=1e-4)


@given(
    heads=any_heads(num_heads=3, selector_rank=2, vocab_size=20, dtype=torch.float32),
    paths=rank_paths(num_heads=3, num_guesses=5),
    top_k=st.sampled_from([16, 18]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_guesses_along_a_tree(
    heads: HeadsCheckpoint, paths: list[tuple[int, ...]], top_k: int, seed: int
) -> None:
    """Tokens and probabilities below every node of a superset, one node at a time."""
    num_tokens = heads.spec.draft_vocab_size or 20
    paths = [path for path in paths if max(path) < num_tokens]
    assume(paths)
    rows = torch.randn(3, 2, num_tokens, generator=torch.Generator().manual_seed(seed))
    roots = torch.tensor([4, 11])
    scaled = rows * heads.spec.logit_scale
    best = scaled.topk(min(top_k, num_tokens), dim=-1)
    tokens = heads.tensors.get("token_map", torch.arange(20))[best.indices]
    superset = Superset.from_paths(paths, 3, 5).by_parent()
    selector = Selector.from_tensors(heads.tensors, torch.float32)
    tree = SelectorTree(selector, levels_of(*map(torch.from_numpy, superset.as_nodes())))
    drafted = tree.draft(best.values, tokens, roots)
    log_probs = best.values - scaled.logsumexp(dim=-1, keepdim=True)
    found_log_probs, found_tokens = tree.probable(log_probs, tokens, roots)
    for b, root in enumerate(roots.tolist()):
        assert drafted[b].tolist() == slow_draft(heads, rows[:, b], root, superset.paths())
        token_of = dict(zip(superset.paths(), drafted[b].tolist(), strict=True)) | {(): root}
        for table, parent in enumerate(parents_of(paths)):
            expected = slow_below(heads, len(parent), rows[len(parent), b], token_of[parent])
            count = found_tokens.shape[-1]
            assert found_tokens[table, b].tolist() == list(expected)[:count]
            values = torch.tensor(list(expected.values())[:count])
            torch.testing.assert_close(found_log_probs[table, b], values, rtol=1e-3, atol=1e-3)


@given(heads=any_heads())
def test_native_holds_everything(heads: HeadsCheckpoint) -> None:
    with tempfile.TemporaryDirectory() as directory:
        save_heads(heads, Path(directory, "out"))
        assert_same_heads(load_heads(Path(directory, "out")), heads)


@given(
    lm_head=st.sampled_from(["own", "target"]),
    file=st.sampled_from(["heads.pt", "heads.safetensors"]),
    **OPTIONS,
)
def test_every_format_gives_the_same_tensors(lm_head: str, file: str, **options: Any) -> None:
    heads = make_heads(lm_head=lm_head, **options)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # A checkpoint of heads alone cannot tell the vocabulary if the lm_head is the target's.
        f1 = load_heads(write_fasterdecoding(directory / "f1", heads, file), target_vocab_size=20)
        assert_same_heads(
            f1, heads, source_format="tgi" if lm_head == "target" else "fasterdecoding"
        )
        f3 = load_heads(write_merged(directory / "f3", heads))
        assert_same_heads(f3, heads, source_format="merged")
        f4 = load_heads(write_vllm(directory / "f4", heads))
        assert_same_heads(f4, heads, source_format="vllm")
        f5 = load_heads(write_modelopt(directory / "f5", heads))
        assert_same_heads(f5, heads, source_format="modelopt")
        assert_same_heads(load_heads(write_native(directory / "own", heads)), heads)


@given(
    heads=any_heads(root_size=None, selector_rank=None, prefix_window=None),
    formats=st.lists(st.sampled_from(["vllm", "fasterdecoding", "tgi"]), min_size=1, max_size=4),
)
def test_conversion_loses_nothing_or_is_refused(heads: HeadsCheckpoint, formats: list[Any]) -> None:
    """Through any chain of formats the heads compute the same logits as at the start."""
    hidden = torch.randn(3, heads.spec.hidden_size, dtype=torch.float64)
    expected = all_logits(heads, hidden)
    current = HeadsCheckpoint(heads.spec, heads.tensors, base_model="owner/model")
    with tempfile.TemporaryDirectory() as directory:
        for number, write_format in enumerate(formats):
            out = Path(directory, str(number))
            if refused(current, write_format):
                with pytest.raises(UserError, match="cannot be written as"):
                    save_heads(current, out, write_format)
                assert not out.exists()
                continue
            save_heads(current, out, write_format)
            current = load_heads(out, target_vocab_size=heads.spec.vocab_size)
            assert current.spec.vocab_size == heads.spec.vocab_size
            torch.testing.assert_close(all_logits(current, hidden), expected)


def refused(heads: HeadsCheckpoint, write_format: str) -> bool:
    """What each format is known not to hold, said the other way round than the writer says it."""
    spec = heads.spec
    layers = heads.tensors["blocks.weight"].unbind(1)
    holds = {
        "vllm": spec.lm_head in ("own", "common"),
        "fasterdecoding": spec.lm_head in ("own", "common")
        and all(torch.equal(layer, layers[0]) for layer in layers),
        "tgi": spec.lm_head in ("own", "common")
        or (spec.lm_head == "target" and spec.num_layers == 1),
    }[write_format]
    if write_format in ("fasterdecoding", "tgi"):
        holds = holds and spec.logit_scale == 1
    return not holds or spec.draft_vocab_size is not None


def all_logits(heads: HeadsCheckpoint, hidden: torch.Tensor) -> torch.Tensor:
    """[K, B, vocab] in float64, -inf for tokens not drafted; the features without lm_heads."""
    tensors = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in heads.tensors.items()
    }
    heads = HeadsCheckpoint(heads.spec, tensors)
    features = slow_features(heads, hidden)
    if heads.spec.lm_head == "target":
        return features
    logits = slow_logits(heads, features) * heads.spec.logit_scale
    if heads.spec.draft_vocab_size is None:
        return logits
    assert heads.spec.vocab_size is not None
    full = torch.full((*logits.shape[:2], heads.spec.vocab_size), -torch.inf, dtype=logits.dtype)
    full[..., heads.tensors["token_map"]] = logits
    return full
