"""The attention kernel against its oracle."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import oracles
from tests.kernels.cases import DEVICE, Case, cases, numbers, random_case
from vllm_medusa.kernels import NO_TREE
from vllm_medusa.kernels.attention import Features, Scales, Step, Workspace, tree_attention

seeds = st.integers(0, 2**32 - 1)


def random_features(rng: random.Random, num_heads: int) -> dict[str, Any]:
    def per_head(values: list[float]) -> torch.Tensor:
        return numbers(values, torch.float32)

    slopes = per_head([2.0 ** -(1 + i) for i in range(num_heads)])
    return {
        "window": rng.choice([0, 0, 1, 2, 5, 40, 70]),
        "softcap": rng.choice([0.0, 0.0, 5.0]),
        "slopes": rng.choice([None, None, slopes]),
        "slopes_of_root": rng.random() < 0.5,
        "sinks": rng.choice([None, per_head([rng.uniform(-2, 2) for _ in range(num_heads)])]),
    }


def random_tensors(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Queries, a cache in a random layout, and the step."""
    rng = case.rng
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    size, kv_heads = rng.choice([16, 32]), rng.choice([1, 2, 3])
    group, head_size = rng.choice([1, 2, 4, 7]), rng.choice([32, 64, 80])
    pages = 16 * case.num_reqs
    is_nhd = rng.random() < 0.5
    shape = (pages, size, kv_heads) if is_nhd else (pages, kv_heads, size)
    cache = torch.randn(*shape, 2 * head_size, generator=generator).to(DEVICE, dtype)
    cache = cache if is_nhd else cache.transpose(1, 2)
    table = torch.randperm(pages, generator=generator).view(case.num_reqs, 16)
    query = torch.randn(case.num_tokens, kv_heads * group, head_size, generator=generator)
    return {
        "query": query.to(DEVICE, dtype),
        "key_cache": cache[..., :head_size],
        "value_cache": cache[..., head_size:],
        "step": Step(
            query_start_loc=case.query_start_loc,
            seq_lens=case.seq_lens,
            block_table=table.to(DEVICE, torch.int32),
            positions=case.positions,
            ancestors=case.token_ancestors,
            base=case.base,
            max_query_len=max(case.query_lens),
        ),
        "scale": head_size**-0.5,
    }


def difference(tensors: dict[str, Any], **options: Any) -> float:
    outs = []
    for attend in (tree_attention, oracles.attention):
        out = torch.full_like(tensors["query"], 7.0)
        attend(out=out, **tensors, **options)
        outs.append(out.float())
    return float((outs[0] - outs[1]).abs().max())


@cases(15, is_small=False)
@given(seeds, st.integers(1, 4), st.sampled_from([1, 8, 16, 63]), st.sampled_from([1, 2, 8]))
def test_attention(seed: int, num_reqs: int, num_drafts: int, splits: int) -> None:
    case = random_case(seed, num_reqs, num_drafts)
    case.prepare()
    tensors = random_tensors(case)
    _, num_heads, head_size = tensors["query"].shape
    workspace = Workspace.make(case.num_tokens * splits, num_heads, head_size, DEVICE)
    features = Features(**random_features(case.rng, num_heads))
    options = {"workspace": workspace, "wanted_programs": 10**6}
    assert difference(tensors, features=features, **options) < 1e-5


def attend_to_context(tensors: dict[str, Any], case: Case, softcap: float) -> tuple[Any, Any]:
    """What FlashAttention would do: attention to the keys before the queries, and log-sum-exps."""
    step, out = tensors["step"], torch.full_like(tensors["query"], float("nan"))
    lse = oracles.paged_attention(
        *(tensors["query"], tensors["key_cache"], tensors["value_cache"], out),
        *(step.query_start_loc, case.context_lens, step.block_table, tensors["scale"], softcap),
    )
    return out, lse


@cases(15, is_small=False)
@given(seeds, st.integers(1, 4), st.sampled_from([1, 8, 16, 63]), st.booleans())
def test_context_by_another_kernel(
    seed: int, num_reqs: int, num_drafts: int, is_version_2: bool
) -> None:
    """Merged it is what the whole kernel computes, and both are the oracle's."""
    case = random_case(seed, num_reqs, num_drafts)
    rng = case.rng
    for req, kind in enumerate(case.kinds):
        if kind == "prefill" and rng.random() < 0.5:  # the first part of a prompt has no context
            case.seq_lens[req] = case.query_lens[req]
    case.prepare()
    tensors = random_tensors(case)
    features = random_features(rng, tensors["query"].shape[1])
    features = Features(softcap=features["softcap"], sinks=features["sinks"])
    out, lse = attend_to_context(tensors, case, features.softcap)
    lse = torch.where(lse.isinf() & is_version_2, -lse, lse)
    if rng.random() < 0.5:  # in other strides
        lse = lse.T.contiguous().T
    by_oracle = out.clone()
    oracles.attention(out=by_oracle, features=features, context_lse=lse, **tensors)
    tree_attention(out=out, features=features, context_lse=lse, **tensors)
    whole = torch.full_like(out, 7.0)
    tree_attention(out=whole, features=features, **tensors)
    assert (out - whole).abs().max() < 1e-5
    assert (out - by_oracle).abs().max() < 1e-5


def test_fewer_keys_than_queries() -> None:
    """As when a graph is captured: no key is read that is not there."""
    case = random_case(1, 2, 16, kinds=("tree",))
    case.prepare()
    tensors = random_tensors(case)
    case.seq_lens.fill_(1)
    case.base.fill_(NO_TREE)
    step = tensors["step"]
    rows = torch.full((len(step.block_table), 2), -1, dtype=torch.int32, device=DEVICE)
    rows[:, 1] = step.block_table[:, 0]  # before the first page is one that does not exist
    tensors["step"] = dataclasses.replace(step, block_table=rows[:, 1:])
    outs = []
    for lse in (None, torch.full((tensors["query"].shape[1], case.num_tokens), float("-inf"))):
        outs.append(torch.zeros_like(tensors["query"]))
        lse = None if lse is None else lse.to(DEVICE)
        tree_attention(out=outs[-1], context_lse=lse, **tensors)
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()
    assert outs[0].any()


@pytest.mark.parametrize("features", [Features(window=3), Features(slopes=torch.ones(1))])
def test_positions_count_only_where_one_kernel_attends_to_all(features: Features) -> None:
    case = random_case(1, 1, 8)
    case.prepare()
    tensors = random_tensors(case)
    out, lse = attend_to_context(tensors, case, 0.0)
    with pytest.raises(AssertionError):
        tree_attention(out=out, features=features, context_lse=lse, **tensors)


@cases(10, is_small=False)
@given(seeds, st.sampled_from(["fp8", "fp8 by token and head", "int8 by token and head"]))
def test_quantised_cache(seed: int, kind: str) -> None:
    case = random_case(seed, 2, 16)
    case.prepare()
    tensors = random_tensors(case)
    dtype = torch.int8 if kind.startswith("int8") else torch.float8_e4m3fn
    for name in ("key_cache", "value_cache"):
        values = tensors[name] * (30 if dtype == torch.int8 else 1)
        tensors[name] = values.to(dtype)
    shape = tensors["key_cache"].shape[:3] if "token" in kind else (1,)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(2, *shape, generator=generator).to(DEVICE) / 30
    features = Features(scales=Scales(factors[0], factors[1]))
    assert difference(tensors, features=features) < 1e-5


def test_half_precision() -> None:
    case = random_case(3, 3, 16)
    case.prepare()
    # The interpreter multiplies bfloat16 as if it were integers.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    assert difference(random_tensors(case, dtype)) < 2e-2


@pytest.mark.parametrize("wrong", ["mask", "positions", "base"])
def test_oracle_sees_what_is_wrong(wrong: str) -> None:
    """The comparison would find a kernel that ignores one of its inputs."""
    case = random_case(5, 2, 16, kinds=("tree",))
    case.prepare()
    tensors = random_tensors(case)
    right = torch.zeros_like(tensors["query"])
    features = Features(window=3)
    tree_attention(out=right, features=features, **tensors)
    if wrong == "mask":
        case.token_ancestors.fill_(-1)
    elif wrong == "positions":
        case.positions += torch.arange(case.num_tokens, device=DEVICE) % 5
    else:
        case.base.fill_(NO_TREE)
    out = torch.zeros_like(right)
    oracles.attention(out=out, features=features, **tensors)
    assert (out - right).abs().max() > 1e-2


def test_padding_of_a_graph_is_left_alone() -> None:
    """A captured step has more requests and tokens than the one that replays it."""
    case = random_case(7, 3, 8, kinds=("tree", "cut"))
    case.prepare()
    tensors = random_tensors(case)
    wanted = torch.zeros_like(tensors["query"])
    tree_attention(out=wanted, **tensors)
    extra_reqs, extra_tokens = 2, 5
    step = tensors["step"]
    ends = step.query_start_loc[-1:].expand(extra_reqs)
    padded = Step(
        query_start_loc=torch.cat([step.query_start_loc, ends]),
        seq_lens=torch.cat([step.seq_lens, step.seq_lens.new_zeros(extra_reqs)]),
        block_table=torch.cat([step.block_table, step.block_table[:extra_reqs]]),
        positions=torch.cat([step.positions, step.positions.new_zeros(extra_tokens)]),
        ancestors=torch.cat([step.ancestors, step.ancestors.new_zeros(extra_tokens)]),
        base=case.base,
        max_query_len=step.max_query_len + 9,
    )
    query = tensors["query"]
    query = torch.cat([query, query.new_zeros(extra_tokens, *query.shape[1:])])
    out = torch.full_like(query, 7.0)
    tree_attention(**{**tensors, "query": query, "step": padded, "out": out})
    torch.testing.assert_close(out[: case.num_tokens], wanted)
    assert (out[case.num_tokens :] == 7.0).all()
