"""Unseeded sampling with trees follows the target's law: chi-square against an exact enumeration.

The target is a random model of twelve tokens. transformers gives its next-token law after every
text of up to three tokens, `processed_law` applies a request's parameters to it one text at a time,
and the drafts are drawn with an eye to that law, so that all leaf paths are accepted often.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tests import tiny
from tests.integration.conftest import counters, draft_with, open_engine
from vllm_medusa.plugin.worker.v1.drafting import Draft
from vllm_medusa.tree.draft_tree import DraftTree

pytestmark = pytest.mark.engine

VOCAB = 12
LENGTH = 4
#: Short, so that every token's K/V weighs.
PROMPT = [3, 8, 5]
TREE = DraftTree.from_paths(
    [[0], [1], [2], [0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
)
BATCH = 64
#: A right sampler gives less than this once in ten thousand runs; the random numbers are fixed.
LEAST_P = 1e-4
#: What a wrong one must give.
TINY_P = 1e-10

CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 1.1, "top_p": 0.8},
    "top_k_top_p": {"temperature": 1.5, "top_k": 5, "top_p": 0.9},
    "penalties": {"temperature": 0.9, "presence_penalty": 1.5, "repetition_penalty": 1.8},
    "frequency": {"temperature": 1.0, "frequency_penalty": -0.9},
    "min_p": {"temperature": 1.2, "min_p": 0.15},
}

Text = tuple[int, ...]
Law = dict[Text, np.ndarray]


def enumerate_logits(model: Path) -> dict[Text, Tensor]:
    """Next-token logits, float64, after the prompt and every text shorter than LENGTH."""
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    logits = {}
    for length in range(LENGTH):
        texts = list(itertools.product(range(VOCAB), repeat=length))
        for start in range(0, len(texts), 256):
            some = texts[start : start + 256]
            with torch.no_grad():
                rows = target(torch.tensor([PROMPT + list(text) for text in some])).logits[:, -1]
            logits.update(zip(some, rows, strict=True))
    return logits


def processed_law(logits: Tensor, text: Text, params: dict[str, Any]) -> np.ndarray:
    """The law of the token after ``text``, as vLLM documents its sampling parameters."""
    values = logits.tolist()
    for token in range(VOCAB):
        if token in PROMPT or token in text:
            penalty = params.get("repetition_penalty", 1.0)
            values[token] *= 1 / penalty if values[token] > 0 else penalty
        values[token] -= params.get("frequency_penalty", 0.0) * text.count(token)
        values[token] -= params.get("presence_penalty", 0.0) * (token in text)
    probs = np.exp(np.array(values) / params["temperature"])
    probs /= probs.sum()
    probs[probs < params.get("min_p", 0.0) * probs.max()] = 0.0
    best_first = np.argsort(-probs)
    probs[best_first[params.get("top_k", VOCAB) :]] = 0.0
    probs /= probs.sum()
    # The fewest tokens that hold top_p of the probability.
    before = np.cumsum(probs[best_first]) - probs[best_first]
    probs[best_first[before >= params.get("top_p", 1.0)]] = 0.0
    return probs / probs.sum()


def text_probs(law: Law) -> dict[Text, float]:
    """Probability of each text of LENGTH tokens."""
    probs = {(): 1.0}
    for _ in range(LENGTH):
        probs = {
            (*text, token): prob * law[text][token]
            for text, prob in probs.items()
            for token in np.flatnonzero(law[text]).tolist()
        }
    return probs


def p_value(texts: list[Text], probs: dict[Text, float]) -> float:
    """Chi-square of the texts; rare ones are pooled by their last token, then all together."""
    num_texts = len(texts)

    def cell(text: Text) -> Any:
        return text if probs.get(text, 0.0) * num_texts >= 5 else text[-1]

    expected: Counter[Any] = Counter()
    for text, prob in probs.items():
        expected[cell(text)] += prob * num_texts
    observed = Counter(map(cell, texts))
    large = [key for key, count in expected.items() if count >= 5]
    rest_expected = num_texts - sum(expected[key] for key in large)
    rest_observed = num_texts - sum(observed[key] for key in large)
    if rest_expected < 1e-6:
        # Texts of probability zero.
        return 0.0 if rest_observed else chi_square(observed, expected, large)
    expected["rest"], observed["rest"] = rest_expected, rest_observed
    return chi_square(observed, expected, [*large, "rest"])


def chi_square(observed: Counter[Any], expected: Counter[Any], cells: list[Any]) -> float:
    return float(chisquare([observed[c] for c in cells], [expected[c] for c in cells]).pvalue)


class LawDrafts:
    """Random drafts, distinct below each node, likelier tokens likelier first.

    But by the root of their probabilities: a token drawn from the law itself might be accepted
    without any verification, and the law would be kept.
    """

    def __init__(self, law: Law, seed: int, runner: Any) -> None:
        self.runner = runner
        self.scores = {text: np.log(probs + 1e-6) / 2 for text, probs in law.items()}
        self.rng = np.random.default_rng(seed)

    def num_paths(self, batch_size: int) -> int:
        return len(TREE.leaves)

    def finish(self, req_ids: Any) -> None:
        """Nothing is held for requests."""

    def draft(self, batch: Any) -> list[Draft]:
        drafts = []
        for req_id in batch.req_ids:
            text = tuple(self.runner.requests[req_id].output_token_ids)
            order: dict[Text, np.ndarray] = {}
            tokens: dict[Text, Text] = {(): text}
            for path in TREE.paths:
                above = tokens[path[:-1]]
                if path[:-1] not in order:
                    order[path[:-1]] = self._order(above)
                tokens[path] = (*above, int(order[path[:-1]][path[-1]]))
            drafts.append(Draft([tokens[path][-1] for path in TREE.paths], TREE.parents[1:]))
        return drafts

    def _order(self, text: Text) -> np.ndarray:
        return np.argsort(-self.scores.get(text, 0.0) - self.rng.gumbel(size=VOCAB))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[Text, Tensor]]]:
    """An engine with trees on the model of few tokens, and that model's logits."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "VOCAB_SIZE", VOCAB)
        patch.setitem(tiny.SIZES, "vocab_size", VOCAB)
        patch.setitem(tiny.SIZES, "eos_token_id", VOCAB - 1)
        model, heads = tiny.make_model(folder / "model"), tiny.make_heads(folder / "heads")
    spec = {
        "method": "medusa",
        "model": str(heads),
        "tree": [list(path) for path in TREE.paths],
        "max_tree_requests": BATCH,
    }
    with open_engine(model, max_num_seqs=BATCH, speculative_config=spec) as llm:
        yield llm, enumerate_logits(model)


Measure = Callable[[str, int], float]


@pytest.fixture
def measure(small: tuple[Any, dict[Text, Tensor]]) -> Measure:
    """Return the p-value of a number of samples of a case of CASES."""
    llm, logits = small

    def run(name: str, num_samples: int) -> float:
        params = CASES[name]
        law = {text: processed_law(row, text, params) for text, row in logits.items()}
        draft_with(llm, lambda runner: LawDrafts(law, 0, runner))
        before = counters(llm)["forks_accepted"]
        torch.manual_seed(0)
        texts: list[Text] = []
        sampling = SamplingParams(
            n=BATCH, max_tokens=LENGTH, ignore_eos=True, detokenize=False, **params
        )
        while len(texts) < num_samples:
            (result,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
            texts += [tuple(output.token_ids) for output in result.outputs]
        # A path other than the first was accepted for every sixth text at least.
        assert counters(llm)["forks_accepted"] - before > len(texts) / 6
        return p_value(texts, text_probs(law))

    return run


@pytest.mark.parametrize("name", CASES)
def test_samples_follow_the_law(measure: Measure, name: str) -> None:
    assert measure(name, 2000) > LEAST_P


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", CASES)
def test_many_samples_follow_the_law(measure: Measure, name: str) -> None:
    assert measure(name, 60_000) > LEAST_P


def accept_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept a node's first draft whatever was sampled, as if it were in some top-k."""
    from vllm_medusa.plugin.worker.v1 import sampler

    accept = sampler.accept_lossless

    def accept_first(rows: Any, target: Tensor, drafts: Tensor) -> Any:
        target = target.clone()
        if drafts.numel():
            target[:, 0] = torch.where(rows.num_drafts > 0, drafts[:, 0], target[:, 0])
        return accept(rows, target, drafts)

    monkeypatch.setattr(sampler, "accept_lossless", accept_first)


def share_a_draw_between_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token right by itself, but not independent of the one before."""
    from vllm_medusa.plugin.worker.v1.noise import PositionNoise

    draw = PositionNoise.draw

    def draw_once(self: Any, *args: Any) -> Tensor:
        draws = draw(self, *args)
        return draws[:, :1].expand_as(draws)

    monkeypatch.setattr(PositionNoise, "draw", draw_once)


def sample_again_if_no_draft_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a tree that misses the root's token another chance."""
    from vllm_medusa.plugin.worker.v1.sampler import TreeSampler

    sample = TreeSampler._sample

    def sample_twice(self: Any, logits: Tensor, rows: Any, constraints: Any, params: Any) -> Any:
        tokens, processed = sample(self, logits, rows, constraints, params)
        again, _ = sample(self, processed.clone(), rows, constraints, params)
        roots, drafts = rows.row[:, 0], constraints._draft_tokens
        fits = (drafts[:, :3] == tokens[roots, None].to(drafts.dtype)).any(dim=1)
        tokens = tokens.clone()
        tokens[roots] = torch.where(fits, tokens[roots], again[roots])
        return tokens, processed

    monkeypatch.setattr(TreeSampler, "_sample", sample_twice)


def penalise_the_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the tokens of a node's own path out of its history."""
    from vllm_medusa.plugin.worker.v1.constraints import NodeConstraints

    path_tokens = NodeConstraints._path_tokens.func
    monkeypatch.setattr(
        NodeConstraints,
        "_path_tokens",
        property(lambda self: torch.full_like(path_tokens(self), -1)),
    )


def leave_out_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the first path's K/V, whatever path was accepted."""
    from vllm_medusa.plugin.worker.v1.path_forks import PathForks

    monkeypatch.setattr(PathForks, "commit", lambda self, acceptance: None)


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("temperature", accept_the_likeliest),
        ("temperature", share_a_draw_between_positions),
        ("temperature", sample_again_if_no_draft_fits),
        ("penalties", penalise_the_request_only),
        ("temperature", leave_out_the_commit),
    ],
)
def test_wrong_samplers_do_not(
    measure: Measure,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    break_it: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """That the test above can fail."""
    break_it(monkeypatch)
    assert measure(name, 2000) < TINY_P
