"""Constraints of a small tree's nodes, spelt out; the property test has all of them at random."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessor,
    LogitsProcessors,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_medusa.plugin.worker.v1.constraints import NodeConstraints
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.rows import NodeRows
from vllm_medusa.tree.step_trees import StepTrees

# Not the engine, but its logits processing: to be run again on the next vLLM.
pytestmark = pytest.mark.engine

VOCAB = 5
#: Nodes: root, (0), (0, 0), (1); with tokens 2, 3 and 4 below the output [0, 1].
TREE = DraftTree.from_paths([[0], [0, 0], [1]])
ROWS = NodeRows.build(StepTrees.build([TREE.parents[1:]]))
OUTPUT = [0, 1]
DRAFTS = torch.tensor([[2, 3, 4]])
HISTORIES = [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]


def sampling_of(processors: list[LogitsProcessor], **changed: Any) -> SamplingMetadata:
    values: dict[str, Any] = {
        "temperature": None,
        "all_greedy": True,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": torch.zeros(1),
        "presence_penalties": torch.zeros(1),
        "repetition_penalties": torch.ones(1),
        "output_token_ids": [OUTPUT],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(processors),
    }
    return SamplingMetadata(**{**values, **changed})


def apply(
    logits: Tensor,
    processors: list[LogitsProcessor] | None = None,
    params: SamplingParams | None = None,
    **changed: Any,
) -> Tensor:
    output = list(OUTPUT)
    for processor in processors or []:
        added = [(0, params, [0], output)]
        processor.update_state(BatchUpdate(1, removed=[], added=added, moved=[]))
    constraints = NodeConstraints(ROWS, DRAFTS, [output])
    try:
        return constraints.apply(logits, sampling_of(processors or [], **changed))
    finally:
        assert output == OUTPUT


def forbidden(logits: Tensor) -> list[list[int]]:
    """Tokens that each node may not take."""
    return [row.isneginf().nonzero().flatten().tolist() for row in logits]


def test_nothing_to_do() -> None:
    logits = torch.randn(4, VOCAB)
    before = logits.clone()
    assert apply(logits, [min_tokens_processor()], SamplingParams()) is logits
    assert torch.equal(logits, before)


def min_tokens_processor() -> MinTokensLogitsProcessor:
    return MinTokensLogitsProcessor(None, torch.device("cpu"), False)  # type: ignore[arg-type]


def test_presence_penalty_counts_the_nodes_own_path() -> None:
    logits = apply(
        torch.zeros(4, VOCAB),
        no_penalties=False,
        prompt_token_ids=torch.tensor([[0, 4]]),
        presence_penalties=torch.ones(1),
    )
    assert logits.tolist() == [
        [-float(t in history) for t in range(VOCAB)] for history in HISTORIES
    ]


def test_frequency_penalty_adds_the_path_to_the_output() -> None:
    sampling = sampling_of(
        [],
        no_penalties=False,
        prompt_token_ids=torch.tensor([[0]]),
        frequency_penalties=torch.ones(1),
    )
    constraints = NodeConstraints(ROWS, torch.tensor([[2, 2, 1]]), [[2, 2]])
    logits = constraints.apply(torch.zeros(4, VOCAB), sampling)
    assert (-logits[:, 2]).tolist() == [2, 3, 4, 2]
    assert (-logits[:, 1]).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([[3]], [[3], [3], [3], [3]]),
        ([[1, 0]], [[0], [], [], []]),
        ([[2, 0]], [[], [0], [], []]),
        ([[1, 2, 3, 0]], [[], [], [0], []]),
        ([[1, 4, 0], [4, 2]], [[], [], [], [0, 2]]),
        # Longer than any history.
        ([[0, 0, 1, 2, 3, 0]], [[], [], [], []]),
    ],
)
def test_bad_words_end_on_the_path(words: list[list[int]], expected: list[list[int]]) -> None:
    logits = apply(torch.zeros(4, VOCAB), bad_words_token_ids={0: words})
    assert forbidden(logits) == expected


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(2, [[], [], [], []]), (3, [[1], [], [], []]), (4, [[1], [1], [], [1]]), (9, [[1]] * 4)],
)
def test_min_tokens_counts_the_path(min_tokens: int, expected: list[list[int]]) -> None:
    params = SamplingParams(min_tokens=min_tokens, stop_token_ids=[1])
    logits = apply(torch.zeros(4, VOCAB), [min_tokens_processor()], params)
    assert forbidden(logits) == expected


def test_min_tokens_leaves_a_grammar_its_only_token() -> None:
    params = SamplingParams(min_tokens=4, stop_token_ids=[1, 2])
    only_stop = torch.tensor([[True, False, True, True, True]])
    forbid = {"allowed_token_ids_mask": only_stop}
    logits = apply(torch.zeros(4, VOCAB), [min_tokens_processor()], params, **forbid)
    assert forbidden(logits) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]]
    params.structured_outputs = StructuredOutputsParams(regex="a")
    logits = apply(torch.zeros(4, VOCAB), [min_tokens_processor()], params, **forbid)
    assert forbidden(logits) == [[0, 2, 3, 4]] * 4


class Recorder(AdapterLogitsProcessor):
    """A user's processor that tells what it is shown, and fails at a node if told to."""

    def __init__(self, fails_at: list[int] | None = None) -> None:
        super().__init__(None, torch.device("cpu"), False)  # type: ignore[arg-type]
        self.seen: list[list[int]] = []
        self.fails_at = fails_at

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        def process(output: list[int], logits: Tensor) -> Tensor:
            self.seen.append(list(output))
            if output == self.fails_at:
                raise ArithmeticError
            logits[len(output)] = float("-inf")
            return logits

        return process


def test_a_users_processor_sees_each_nodes_history() -> None:
    recorder = Recorder()
    logits = apply(torch.zeros(4, VOCAB), [recorder], SamplingParams())
    assert recorder.seen == HISTORIES
    assert forbidden(logits) == [[2], [3], [4], [3]]


def test_outputs_are_what_they_were_when_a_users_processor_fails() -> None:
    recorder = Recorder(fails_at=HISTORIES[2])
    with pytest.raises(ArithmeticError):
        apply(torch.zeros(4, VOCAB), [recorder], SamplingParams())
