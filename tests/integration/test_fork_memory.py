"""What forks take of the KV cache, and what is said of it at start-up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.integration.conftest import counters, greedy, open_engine, random_prompts
from vllm_medusa.errors import UserError
from vllm_medusa.tree.named import named_tree

pytestmark = pytest.mark.engine

PROMPTS = random_prompts(4, seed=8)
#: Fork blocks of one request: two for each leaf but the first.
PER_REQUEST = 2 * (len(named_tree("cpu-32", 4).leaves) - 1)


def medusa(heads: Path, tree: str = "cpu-32", **keys: Any) -> dict[str, Any]:
    return {"method": "medusa", "model": str(heads), "tree": tree, **keys}


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Gives the warnings of ours so far, and forgets them."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)

    def take() -> list[str]:
        records, ours = caplog.records.copy(), []
        caplog.clear()
        for record in records:
            if record.levelno == logging.WARNING and record.getMessage().startswith("Medusa: "):
                ours.append(record.getMessage())
        return ours

    yield take
    logger.removeHandler(caplog.handler)


def max_model_len(llm: Any) -> int:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    lengths = {
        llm.llm_engine.vllm_config.model_config.max_model_len,
        worker.model_runner.max_model_len,
    }
    assert len(lengths) == 1
    return lengths.pop()


@pytest.mark.parametrize(
    ("make", "num_blocks", "least"),
    # A sequence of the second model takes blocks for each of its two layers, and so do its forks.
    [
        (tiny.make_model, 14 + 2 * PER_REQUEST, 32 * (10 + PER_REQUEST)),
        (tiny.make_windowed_model, 60 + 2 * PER_REQUEST, 32 * 28),
    ],
)
@pytest.mark.parametrize("max_tree_requests", [None, 2, 100])
def test_the_longest_sequence_is_fitted_into_what_forks_leave(
    tiny_heads: Path,
    tmp_path: Path,
    make: Any,
    num_blocks: int,
    least: int,
    max_tree_requests: int | None,
) -> None:
    """vLLM's `auto`, where the cache is the limit."""
    model = make(tmp_path / "model")
    options = {"max_model_len": -1, "num_gpu_blocks_override": num_blocks}
    with open_engine(model, **options) as llm:
        without = max_model_len(llm)
        reference = greedy(llm, PROMPTS, 60)
    spec = medusa(tiny_heads, max_tree_requests=max_tree_requests)
    with open_engine(model, speculative_config=spec, **options) as llm:
        length = max_model_len(llm)
        assert greedy(llm, PROMPTS, 60) == reference
        assert counters(llm)["fork_paths"] > 0
        # The longest sequence that is allowed runs to its end.
        prompt = {"prompt_token_ids": [1] * (length - 4)}
        assert len(greedy(llm, [prompt], 10)[0]) == 4
    # Forks of one request are taken from the cache, no more.
    assert least <= length < without


def test_a_length_that_fits_beside_forks_is_kept(tiny_model: Path, tiny_heads: Path) -> None:
    spec = medusa(tiny_heads)
    with open_engine(tiny_model, speculative_config=spec, max_model_len=-1) as llm:
        assert max_model_len(llm) == tiny.SIZES["max_position_embeddings"]


@pytest.mark.parametrize(("length", "named"), [(-1, "any sequence"), (64, "a sequence of max_mo")])
def test_no_room_names_what_the_user_gave(
    tiny_model: Path, tiny_heads: Path, length: int, named: str
) -> None:
    options = {"max_model_len": length, "num_gpu_blocks_override": PER_REQUEST}
    with (
        pytest.raises(UserError, match=f"has no room .* of one request beside {named}.*; give"),
        open_engine(tiny_model, speculative_config=medusa(tiny_heads), **options),
    ):
        pass


@pytest.mark.parametrize(
    ("num_blocks", "keys", "expected"),
    [
        # An eighth of the cache, or less than half of it as asked for: nothing to be said.
        (20 * PER_REQUEST, {}, None),
        (20 * PER_REQUEST, {"max_tree_requests": 8}, None),
        (20 * PER_REQUEST, {"tree": "chain", "max_tree_requests": 8}, None),
        (
            5 * PER_REQUEST,
            {},
            "the forks of 1 requests take {per_request} of {total} KV blocks (20 %). The scheduler "
            "has {left} left, enough for {sequences} sequences of max_model_len=512 at once. One "
            "request's forks take more than the eighth",
        ),
        (
            5 * PER_REQUEST,
            {"max_tree_requests": 4},
            "the forks of 4 requests take {taken} of {total} KV blocks (80 %). The scheduler has "
            "{left} left, enough for {sequences} sequences of max_model_len=512 at once. Lower "
            "max_tree_requests",
        ),
        (
            5 * PER_REQUEST,
            {"max_tree_requests": 9},
            "max_tree_requests=9, but the KV cache of {total} blocks has room for the forks of 4 "
            "requests ({per_request} blocks each) beside one sequence of max_model_len=512. Lower",
        ),
    ],
)
def test_what_is_said_of_the_size(
    tiny_model: Path,
    tiny_heads: Path,
    messages: Callable[[], list[str]],
    num_blocks: int,
    keys: dict[str, Any],
    expected: str | None,
) -> None:
    options = {"num_gpu_blocks_override": num_blocks}
    with open_engine(tiny_model, speculative_config=medusa(tiny_heads, **keys), **options):
        said = messages()
    if expected is None:
        assert said == []
        return
    taken = PER_REQUEST * (4 if keys else 1)
    values = {
        "per_request": PER_REQUEST,
        "taken": taken,
        "total": num_blocks,
        "left": num_blocks - taken,
        # Sixteen blocks each, and the null block.
        "sequences": f"{(num_blocks - taken - 1) / 16:.1f}",
    }
    assert any(expected.format(**values) in message for message in said), said
