"""Heads that see the last token and have a selector, on Model Runner V2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.integration.command_line import DEMO_MODEL
from tests.integration.conftest import greedy, open_engine, spec_metrics, token_ids
from tests.integration.seeing_heads import SlowHeads, write_seeing_heads
from tests.oracles import heads as slow_heads
from tests.oracles.best_first import RankPath, by_parent
from tests.v2.accepted import accepted
from tests.v2.conftest import MAX_TOKENS
from tests.v2.guesser import guesser
from tests.v2.trees import dynamic, spec

pytestmark = pytest.mark.usefixtures("fast_attention")


def sampling(temperatures: Sequence[float], **options: Any) -> list[SamplingParams]:
    settings = {"max_tokens": MAX_TOKENS, "ignore_eos": True, **options}
    return [
        SamplingParams(temperature=temperature, seed=seed, **settings)
        for seed, temperature in enumerate(temperatures)
    ]


def test_static_trees(
    engine: Callable[..., Any], seeing_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    with engine(speculative_config=spec(seeing_heads)) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        assert greedy(llm, prompts[:2], 8) == [text[:8] for text in reference[:2]]
        assert spec_metrics(llm)["num_draft_tokens"] > 0


def test_dynamic_trees(engine: Callable[..., Any], seeing_heads: Path, prompts: list[Any]) -> None:
    """Trees of guesses in a table for each parent, of which only those below right tokens help."""
    prompts, params = prompts[:4], sampling([0, 0, 0.8, 0.8], detokenize=False)
    with engine() as llm:
        reference = token_ids(llm.generate(prompts, params, use_tqdm=False))
    with (
        guesser(prompts, reference, by_parent) as guesses,
        accepted() as taken,
        engine(speculative_config=dynamic(seeing_heads)) as llm,
    ):
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        assert token_ids(llm.generate(prompts, params, use_tqdm=False)) == reference
    assert len(guesses.shapes) > 10
    assert len(taken.nodes) > 5
    assert taken.num_forks > 5


@dataclasses.dataclass
class Drafted:
    """One request's draft, what it was made of, and whether it is the fixed tree."""

    hidden: Tensor
    root: int
    is_fixed: bool
    parents: list[int]
    tokens: list[int]


@contextmanager
def drafts_kept() -> Iterator[tuple[list[Drafted], list[Any]]]:
    """Keep what engines of this process draft, and their speculators."""
    from vllm_medusa.plugin.worker.v2 import speculator
    from vllm_medusa.plugin.worker.v2.shapes import Shape

    kept: list[Drafted] = []
    speculators: list[Any] = []
    original = speculator.TreeSpeculator._chosen

    def chosen(self: Any, num_reqs: int, shapes: Any) -> Any:
        drafts = original(self, num_reqs, shapes)
        hidden = self._buffers.hidden_states[:num_reqs]
        roots = self._buffers.roots[:num_reqs]
        is_fixed = [shape == Shape.TREE for shape in shapes.tolist()]
        rows = zip(roots.tolist(), is_fixed, *map(Tensor.tolist, drafts), strict=True)
        kept.extend(Drafted(h.clone(), *row) for h, row in zip(hidden, rows, strict=True))
        speculators.append(self)
        return drafts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator.TreeSpeculator, "_chosen", chosen)
        yield kept, speculators


def test_dynamic_trees_of_real_heads(tmp_path: Path) -> None:
    """Greedy, seeded, and with a grammar, whose tree is a fixed one."""
    lines = (DEMO_MODEL.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"][-120:] for line in lines[:3]]
    params = sampling([0, 0.8, 0], max_tokens=16)
    params[2].structured_outputs = StructuredOutputsParams(regex=r"(def|class) [a-z_]{30}")
    options = {"skip_tokenizer_init": False, "max_model_len": 256, "max_num_seqs": 4}
    with open_engine(DEMO_MODEL, **options) as llm:
        reference = token_ids(llm.generate(prompts, params, use_tqdm=False))
    path = write_seeing_heads(tmp_path / "heads")
    with (
        drafts_kept() as (kept, speculators),
        accepted() as taken,
        open_engine(DEMO_MODEL, speculative_config=dynamic(path), **options) as llm,
    ):
        assert token_ids(llm.generate(prompts, params, use_tqdm=False)) == reference
    assert taken.num_forks > 3
    tree, paths = speculators[-1].tree, speculators[-1].proposer.superset().paths()
    slow = SlowHeads(path)
    assert sum(draft.is_fixed for draft in kept) > 3
    assert sum(not draft.is_fixed for draft in kept) > 6
    for draft in kept[:: max(1, len(kept) // 24)]:
        logits = slow.logits(draft.hidden, draft.root)
        if draft.is_fixed:
            assert draft.parents[1:] == list(tree.parents[1:])
            wanted = slow_heads.draft(slow.checkpoint, logits, draft.root, tree.paths)
            assert draft.tokens == wanted
        else:
            check_likeliest(slow.checkpoint, logits, draft, paths)


def check_likeliest(heads: Any, logits: Tensor, draft: Drafted, paths: list[RankPath]) -> None:
    """The nodes are the likeliest of the paths, by the slow heads, in falling order."""
    score: dict[RankPath, float] = {(): 0.0}
    text: dict[RankPath, tuple[int, ...]] = {(): (draft.root,)}
    guesses: dict[RankPath, list[tuple[int, float]]] = {}
    for path in paths:
        above, head = path[:-1], len(path) - 1
        if above not in guesses:
            below = slow_heads.below(heads, head, logits[head], text[above][-1])
            guesses[above] = list(below.items())
        token, step = guesses[above][path[-1]]
        score[path], text[path] = score[above] + step, (*text[above], token)
    # Siblings have different tokens, so a node's text tells its path.
    path_of = {tokens: path for path, tokens in text.items()}
    texts = [(draft.root,)]
    for parent, token in zip(draft.parents[1:], draft.tokens, strict=True):
        texts.append((*texts[parent], token))
    found = [score[path_of[tokens]] for tokens in texts[1:]]
    best = sorted((score[path] for path in paths), reverse=True)
    assert len(set(texts)) == len(texts)
    assert found == pytest.approx(best[: len(found)], abs=1e-3)
