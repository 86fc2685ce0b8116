"""Constraints of every node against vLLM's own, one row at a time with the node's history."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from tests.oracles.tree import ancestor_tokens, random_subtree
from vllm_medusa.plugin.worker.v1.constraints import NodeConstraints
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.rows import NodeRows
from vllm_medusa.tree.step_trees import StepTrees

# Not the engine, but its logits processing: to be run again on the next vLLM.
pytestmark = pytest.mark.engine

VOCAB = 6
MAX_NUM_SEQS = 5
TOKENS = st.integers(0, VOCAB - 1)
WEIGHTS = st.floats(-3.0, 3.0, width=16)


class ForbidSums(AdapterLogitsProcessor):
    """A user's processor that depends on the whole output."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        modulus = (params.extra_args or {}).get("modulus")
        if modulus is None:
            return None

        def process(output: list[int], logits: Tensor) -> Tensor:
            logits[(sum(output) + len(output)) % modulus] = float("-inf")
            return logits

        return process


@dataclass
class Request:
    """A request of a batch; ``drafts`` has a token for every node of the tree."""

    prompt: list[int]
    output: list[int]
    drafts: list[int]
    num_drafts: int
    params: SamplingParams
    allowed: set[int] | None
    bad_words: list[list[int]] = field(default_factory=list)

    def history(self, tree: DraftTree, node: int) -> list[int]:
        return self.output + ancestor_tokens(tree, [-1, *self.drafts], node)[1:]


def maybe(values: st.SearchStrategy[Any], otherwise: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(otherwise), values)


@st.composite
def requests(draw: st.DrawFn, tree: DraftTree) -> Request:
    num_nodes = tree.num_draft_tokens
    params = SamplingParams(
        max_tokens=50,
        presence_penalty=draw(maybe(st.floats(-2.0, 2.0, width=16), 0.0)),
        frequency_penalty=draw(maybe(st.floats(-2.0, 2.0, width=16), 0.0)),
        repetition_penalty=draw(maybe(st.floats(0.5, 2.0, width=16), 1.0)),
        min_tokens=draw(maybe(st.integers(0, 9), 0)),
        stop_token_ids=draw(maybe(st.lists(TOKENS, max_size=3, unique=True), None)),
        logit_bias=draw(maybe(st.dictionaries(TOKENS, WEIGHTS, max_size=3), None)),
        min_p=draw(maybe(st.floats(0.0, 1.0, width=16), 0.0)),
        extra_args=draw(maybe(st.builds(dict, modulus=st.integers(1, VOCAB)), None)),
    )
    if draw(st.booleans()):
        params.structured_outputs = StructuredOutputsParams(regex="a")
    words = st.lists(TOKENS, min_size=1, max_size=4)
    return Request(
        prompt=draw(st.lists(TOKENS, min_size=1, max_size=5)),
        output=draw(st.lists(TOKENS, max_size=7)),
        drafts=draw(st.lists(TOKENS, min_size=num_nodes, max_size=num_nodes)),
        num_drafts=draw(st.integers(0, num_nodes)),
        params=params,
        allowed=draw(maybe(st.sets(TOKENS, min_size=1, max_size=3), None)),
        bad_words=draw(maybe(st.lists(words, max_size=4), [])),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[DraftTree, list[Request]]:
    tree = random_subtree(
        lambda n: draw(st.integers(0, n - 1)), draw(st.integers(1, 8)), draw(st.integers(1, 3)), 2
    )
    return tree, draw(st.lists(requests(tree), min_size=1, max_size=MAX_NUM_SEQS - 1))


def sampling_of(batch: list[Request], outputs: list[list[int]]) -> SamplingMetadata:
    """What vLLM's runner tells its sampler of a batch with these outputs so far."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MAX_NUM_SEQS))
    kinds = [
        MinTokensLogitsProcessor,
        LogitBiasLogitsProcessor,
        MinPLogitsProcessor,
        ForbidSums,
    ]
    processors = [kind(config, torch.device("cpu"), False) for kind in kinds]
    added = [
        (index, request.params, request.prompt, output)
        for index, (request, output) in enumerate(zip(batch, outputs, strict=True))
    ]
    for processor in processors:
        processor.update_state(BatchUpdate(len(batch), removed=[], added=added, moved=[]))
    prompts = torch.full((len(batch), 5), VOCAB)
    forbidden = torch.zeros(len(batch), VOCAB, dtype=torch.bool)
    for index, request in enumerate(batch):
        prompts[index, : len(request.prompt)] = torch.tensor(request.prompt)
        if request.allowed is not None:
            forbidden[index] = torch.tensor([t not in request.allowed for t in range(VOCAB)])
    params = [request.params for request in batch]
    penalties = {
        "presence_penalties": torch.tensor([p.presence_penalty for p in params]),
        "frequency_penalties": torch.tensor([p.frequency_penalty for p in params]),
        "repetition_penalties": torch.tensor([p.repetition_penalty for p in params]),
    }
    idle = [0.0, 0.0, 1.0]
    return SamplingMetadata(
        temperature=None,
        all_greedy=False,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=all(
            [float(v[i]) for v in penalties.values()] == idle for i in range(len(batch))
        ),
        prompt_token_ids=prompts,
        **penalties,
        output_token_ids=outputs,
        allowed_token_ids_mask=forbidden if any(r.allowed is not None for r in batch) else None,
        bad_words_token_ids={i: r.bad_words for i, r in enumerate(batch) if r.bad_words},
        logitsprocs=LogitsProcessors(processors),
    )


def expected_row(logits: Tensor, request: Request, history: list[int]) -> tuple[Tensor, Tensor]:
    """Process one row with vLLM's own sampler: for greedy and, from there, for random sampling."""
    sampling = sampling_of([request], [history])
    row = Sampler().apply_logits_processors(logits[None].clone(), sampling, False)
    greedy = row[0].clone()
    for processor in sampling.logitsprocs.argmax_invariant:
        row = processor.apply(row)
    return greedy, row[0]


def process(
    tree: DraftTree, batch: list[Request], logits: Tensor
) -> tuple[NodeRows, Tensor, Tensor]:
    parents = [tree.parents[1 : request.num_drafts + 1] for request in batch]
    rows = NodeRows.build(StepTrees.build(parents))
    verified = [token for r in batch for token in r.drafts[: r.num_drafts]]
    drafts = torch.tensor(verified)[rows.draft] if verified else rows.draft
    outputs = [list(request.output) for request in batch]
    sampling = sampling_of(batch, outputs)
    constraints = NodeConstraints(rows, drafts, outputs)
    greedy = constraints.apply(logits.clone(), sampling)
    random = constraints.apply_argmax_invariant(greedy.clone(), sampling)
    assert outputs == [request.output for request in batch]
    return rows, greedy, random


@given(batch=batches(), seed=st.integers(0, 1000))
def test_each_node_is_processed_for_its_own_history(
    batch: tuple[DraftTree, list[Request]], seed: int
) -> None:
    tree, members = batch
    num_rows = sum(request.num_drafts + 1 for request in members)
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    rows, greedy, random = process(tree, members, logits)
    assert len(rows.req) == num_rows
    for row in range(num_rows):
        request = members[rows.req[row]]
        history = request.history(tree, int(rows.node[row]))
        expected = expected_row(logits[row], request, history)
        told = f"row {row}, history {history}"
        torch.testing.assert_close(greedy[row], expected[0], msg=lambda m, told=told: told + m)
        torch.testing.assert_close(random[row], expected[1], msg=lambda m, told=told: told + m)


@given(batch=batches(), seed=st.integers(0, 1000))
def test_placeholders_count_for_nothing(batch: tuple[DraftTree, list[Request]], seed: int) -> None:
    """The scheduler's placeholders (-1) for drafts: the root is processed as if they were not."""
    tree, members = batch
    for request in members:
        request.drafts = [-1] * tree.num_draft_tokens
    num_rows = sum(request.num_drafts + 1 for request in members)
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    rows, greedy, _ = process(tree, members, logits)
    for row in rows.row[:, 0].tolist():
        request = members[rows.req[row]]
        expected, _ = expected_row(logits[row], request, request.output)
        torch.testing.assert_close(greedy[row], expected)
