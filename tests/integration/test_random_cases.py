"""Random engines, trees, batches, prompts and parameters: outputs are those without speculation.

A case is a request with its parameters, one of 40 on an engine drawn from a seed, with drafts that
are right up to a random node (`tests.tiny.Oracle`). Greedy and seeded requests are compared token
for token: seeded draws belong to positions (`plugin.worker.v1.noise`). A failure tells the seed:
``pytest -m slow "tests/integration/test_random_cases.py::test_random_cases[SEED]"`` runs it alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests import tiny
from tests.integration.conftest import counters, draft_with, open_engine
from tests.integration.test_sampling_parameters import ForbidRecent
from tests.oracles.tree import random_order, random_subtree
from vllm_medusa.config import MedusaConfig
from vllm_medusa.heads.checkpoint import SCHEDULE_FILE
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.forks import ForkGeometry
from vllm_medusa.tree.limits import DynamicTrees, TreeLimits
from vllm_medusa.tree.named import named_tree, tree_names
from vllm_medusa.tree.schedule import TreeSchedule, write_schedule_file

pytestmark = pytest.mark.engine

NUM_HEADS = 5
NUM_REQUESTS = 40
MAX_MODEL_LEN = 288
REFERENCE_OPTIONS: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16}


@dataclass(frozen=True)
class Request:
    """One request of a case.

    Attributes:
        prompt: its token ids.
        values: its ``SamplingParams``; ``bad_words`` as token ids.
        abort_after: abort it once it has so many tokens; None: let it finish.

    """

    prompt: list[int]
    values: dict[str, Any]
    abort_after: int | None = None

    def params(self) -> SamplingParams:
        """Return new parameters: vLLM changes those it is given."""
        values = dict(self.values)
        bad_words = values.pop("bad_words", None)
        params = SamplingParams(detokenize=False, **values)
        if bad_words is not None:
            params._bad_words_token_ids = bad_words
        return params


@dataclass(frozen=True)
class Completion:
    """What one completion of a request came to."""

    tokens: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, float]]


@dataclass
class EngineCase:
    """An engine drawn from a seed, and the requests it gets."""

    seed: int
    rng: random.Random = field(init=False)
    windowed: bool = field(init=False)
    schedule: TreeSchedule | None = field(init=False)
    tree: DraftTree = field(init=False)
    dynamic: DynamicTrees | None = field(init=False)
    options: dict[str, Any] = field(init=False)
    arrival_rate: float = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.windowed = self.seed % 5 == 4
        tree = random_tree(rng)
        self.schedule = random_schedule(rng, tree) if self.seed % 3 == 1 else None
        self.tree = self.schedule.tree() if self.schedule else tree
        self.dynamic = random_bounds(rng) if self.seed % 3 == 2 else None
        block_size = rng.choice([32, 32, 64, 128])
        tree_requests = rng.randint(1, 6)
        max_num_seqs = rng.randint(2, 10)
        self.arrival_rate = rng.choice([0.2, 0.5, 0.9])
        nodes = self.limits.max_nodes + 1
        # From barely one tree a step to more than the batch can use.
        budget = rng.choice([nodes, nodes + rng.randint(1, 30), 128, 512])
        self.options = {
            "block_size": block_size,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(budget, nodes, max_num_seqs),
            "enable_prefix_caching": rng.random() < 0.6,
            "max_model_len": MAX_MODEL_LEN,
            "num_gpu_blocks_override": self._num_blocks(block_size, tree_requests),
            "max_tree_requests": tree_requests,
            "logits_processors": [ForbidRecent] if rng.random() < 0.3 else None,
        }

    @property
    def limits(self) -> TreeLimits:
        return MedusaConfig(
            heads="", revision=None, tree=self.tree, tree_name="", dynamic=self.dynamic
        ).limits

    def _num_blocks(self, block_size: int, tree_requests: int) -> int:
        """Return the forks' blocks, those of one full sequence, and none to many more."""
        num_groups = 2 if self.windowed else 1
        limits = self.limits
        geometry = ForkGeometry.of(limits.max_paths, limits.max_depth, block_size)
        forks = geometry.blocks_per_request
        one_sequence = 1 + num_groups * (-(-MAX_MODEL_LEN // block_size) + 1)
        spare = self.rng.choice([0, 1, 3, 60]) * num_groups
        return tree_requests * forks * num_groups + one_sequence + spare

    def engine_options(self, heads: Path) -> dict[str, Any]:
        options = dict(self.options)
        spec = {
            "method": "medusa",
            "model": str(heads),
            "max_tree_requests": options.pop("max_tree_requests"),
        }
        if self.dynamic is not None:
            bounds = {"max_nodes": self.dynamic.max_nodes, "max_depth": self.dynamic.max_depth}
            spec |= {"tree": "dynamic", "measure_costs": False, **bounds}
        elif self.schedule is None:
            spec["tree"] = [list(path) for path in self.tree.paths]
        else:
            # In the place of the one before: an engine reads it when it starts.
            write_schedule_file(heads / SCHEDULE_FILE, self.schedule)
            spec["tree"] = "static"
        return {**options, "speculative_config": spec}

    def prompts(self, count: int) -> list[list[int]]:
        """Prompts of random tokens; some begin like another one, or are another one."""
        drawn: list[list[int]] = []
        for _ in range(count):
            begin = self.rng.choice(drawn) if drawn and self.rng.random() < 0.4 else []
            more = random_tokens(self.rng, self.rng.randint(0 if begin else 1, 90))
            drawn.append(self._cut((begin + more)[: MAX_MODEL_LEN - 20]))
        return drawn

    def next_turn(self, request: Request, said: Completion) -> list[int]:
        """A prompt that goes on from a request's text, as in a chat."""
        more = random_tokens(self.rng, self.rng.randint(1, 40))
        turn = [*request.prompt, *said.tokens, *more]
        return self._cut(turn) if len(turn) < MAX_MODEL_LEN - 20 else more

    def _cut(self, prompt: list[int]) -> list[int]:
        """Sometimes cut a prompt so that one token is left to compute behind cached blocks.

        If others are decoding, the scheduler pads it with placeholders for drafts.
        """
        size = self.options["block_size"]
        return prompt[: (len(prompt) - 1) // size * size + 1] if self.rng.random() < 0.2 else prompt

    def requests(self, prompts: list[list[int]]) -> list[Request]:
        custom = self.options["logits_processors"] is not None
        return [
            Request(
                prompt,
                random_parameters(self.rng, MAX_MODEL_LEN - len(prompt), custom),
                self.rng.randint(1, 30) if self.rng.random() < 0.1 else None,
            )
            for prompt in prompts
        ]


def random_tree(rng: random.Random) -> DraftTree:
    if rng.random() < 0.3:
        return named_tree(rng.choice(["chain", *tree_names()]), NUM_HEADS)
    num_nodes = rng.choice([3, 8, 16, 32, 63])
    return random_subtree(rng.randrange, num_nodes, rng.randint(1, NUM_HEADS), rng.randint(1, 6))


def random_bounds(rng: random.Random) -> DynamicTrees:
    """Bounds of trees that have another shape at every step."""
    return DynamicTrees(max_nodes=rng.randint(1, 24), max_depth=rng.randint(1, 12))


def random_schedule(rng: random.Random, tree: DraftTree) -> TreeSchedule:
    """A schedule of up to three trees within ``tree``, and sometimes of none for large batches."""
    order = random_order(rng.randrange, tree)
    sizes = [len(order), *sorted((rng.randint(1, len(order)) for _ in range(2)), reverse=True)]
    if rng.random() < 0.5:
        sizes.append(0)
    return TreeSchedule.from_entries(
        [(2 * index + 1, order[:size]) for index, size in enumerate(sizes)]
    )


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(tiny.VOCAB_SIZE - 1) for _ in range(count)]


def random_parameters(rng: random.Random, room: int, custom: bool) -> dict[str, Any]:
    """Draw ``SamplingParams`` for a request with ``room`` tokens up to ``max_model_len``."""
    at_limit = rng.random() < 0.1
    values: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": room - rng.randint(0, 3) if at_limit else rng.randint(1, min(80, room)),
        "ignore_eos": rng.random() < 0.8,
    }
    if rng.random() < 0.5:
        values.update(temperature=rng.uniform(0.2, 1.3), seed=rng.randrange(1000))
        values.update(sometimes(rng, 0.2, n=rng.randint(2, 3)))
    alphabet = rng.sample(range(tiny.VOCAB_SIZE), rng.randint(4, 30))
    values.update(sometimes(rng, 0.2, allowed_token_ids=alphabet))
    # Words of a small alphabet, so that they would be said.
    words = [rng.choices(alphabet, k=rng.randint(1, 3)) for _ in range(rng.randint(1, 12))]
    optional = {
        "bad_words": words,
        "top_k": rng.randint(1, 40),
        "top_p": rng.uniform(0.3, 1.0),
        "min_p": rng.uniform(0.0, 0.3),
        "presence_penalty": rng.uniform(-1.0, 2.0),
        "frequency_penalty": rng.uniform(-1.0, 2.0),
        "repetition_penalty": rng.uniform(0.7, 2.0),
        "logit_bias": {token: rng.uniform(-5.0, 8.0) for token in alphabet[:4]},
        "stop_token_ids": rng.sample(range(tiny.VOCAB_SIZE), rng.randint(1, 20)),
        "min_tokens": rng.randint(0, values["max_tokens"]),
        "logprobs": rng.randint(0, 5),
        "prompt_logprobs": rng.randint(0, 2),
    }
    for name, value in optional.items():
        values.update(sometimes(rng, 0.15, **{name: value}))
    if custom:
        values.update(sometimes(rng, 0.3, extra_args={"forbid_repeats_of_last": rng.randint(1, 5)}))
    return values


def sometimes(rng: random.Random, chance: float, **values: Any) -> dict[str, Any]:
    return values if rng.random() < chance else {}


def completion(output: Any, prompt_logprobs: Any) -> Completion:
    places = [place for place in [*(prompt_logprobs or []), *(output.logprobs or [])] if place]
    return Completion(
        list(output.token_ids),
        output.finish_reason,
        [{token: entry.logprob for token, entry in place.items()} for place in places],
    )


def run_reference(model: Path, case: EngineCase) -> tuple[list[Request], list[list[Completion]]]:
    """Draw the requests and generate for them without speculation.

    The second half of the prompts go on from the texts of the first half.
    """
    options = {**REFERENCE_OPTIONS, "logits_processors": case.options["logits_processors"]}
    with open_engine(model, **options) as llm:

        def generate(requests: list[Request]) -> list[list[Completion]]:
            prompts = [{"prompt_token_ids": request.prompt} for request in requests]
            params = [request.params() for request in requests]
            return [
                [completion(output, result.prompt_logprobs) for output in result.outputs]
                for result in llm.generate(prompts, params, use_tqdm=False)
            ]

        first = case.requests(case.prompts(NUM_REQUESTS // 2))
        results = generate(first)
        second = case.requests(
            [
                case.next_turn(request, said)
                for request, (said, *_) in zip(first, results, strict=True)
            ]
        )
        return first + second, results + generate(second)


def run_with_tree(llm: Any, case: EngineCase, requests: list[Request]) -> list[list[Completion]]:
    """Let the requests arrive at random steps; those aborted end where they are."""
    core = llm.llm_engine
    results: list[dict[int, Completion]] = [{} for _ in requests]
    running: set[str] = set()
    arrivals = list(range(len(requests)))
    case.rng.shuffle(arrivals)
    # The second turns mostly come when the first ones are over.
    arrivals.sort(key=lambda index: index >= len(requests) // 2 and case.rng.random() < 0.8)
    pending = iter(arrivals)
    left = len(requests)
    while left or running:
        while left and case.rng.random() < case.arrival_rate:
            index = next(pending)
            left -= 1
            prompt = {"prompt_token_ids": requests[index].prompt}
            core.add_request(str(index), prompt, requests[index].params())
            running.add(str(index))
        for output in core.step():
            index = int(output.request_id)
            for part in output.outputs:
                prompt_logprobs = output.prompt_logprobs
                results[index][part.index] = completion(part, prompt_logprobs)
                limit = requests[index].abort_after
                if limit is not None and len(part.token_ids) >= limit and not output.finished:
                    core.abort_request([output.request_id])
                    running.discard(output.request_id)
            if output.finished:
                running.discard(output.request_id)
    # The runner hears of the last ones' end with the next step.
    core.engine_core.engine_core.step()
    return [[parts[index] for index in sorted(parts)] for parts in results]


def check_case(
    case: EngineCase, index: int, request: Request, expected: list[Completion], got: list[Any]
) -> None:
    told = f"engine {case.seed}, request {index}: {case.options}, {case.tree}, {request}"
    aborted = request.abort_after is not None
    assert aborted or len(got) == len(expected), told
    for output, reference in zip(got, expected, strict=False):
        if aborted and output.finish_reason is None:
            assert output.tokens == reference.tokens[: len(output.tokens)], told
            continue
        assert output.tokens == reference.tokens, told
        assert output.finish_reason == reference.finish_reason, told
        assert len(output.logprobs) == len(reference.logprobs), told
        for place, expected_place in zip(output.logprobs, reference.logprobs, strict=True):
            assert place == pytest.approx(expected_place, abs=1e-3), told


def leaks(llm: Any, free_before: int) -> Iterator[str]:
    """What is still held after all requests have ended."""
    engine_core = llm.llm_engine.engine_core.engine_core
    free = engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    if free != free_before:
        yield f"{free_before - free} KV blocks"
    runner = engine_core.model_executor.driver_worker.worker.model_runner
    if runner.forks is not None and runner.forks.grants.num_granted:
        yield f"{runner.forks.grants.num_granted} grants of fork blocks"
    if runner.rejection_sampler.noise._waiting:
        yield f"draws of {list(runner.rejection_sampler.noise._waiting)}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The tiny model, and under True the one with windowed attention."""
    folder = tmp_path_factory.mktemp("models")
    return {
        False: tiny.make_model(folder / "plain"),
        True: tiny.make_windowed_model(folder / "windowed"),
    }


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_heads(tmp_path_factory.mktemp("heads"), NUM_HEADS)


@pytest.fixture
def run_engine_case(models: dict[bool, Path], heads: Path) -> Callable[[int], dict[str, Any]]:
    def run(seed: int) -> dict[str, Any]:
        case = EngineCase(seed)
        requests, expected = run_reference(models[case.windowed], case)
        oracle = tiny.OracleOfMany(seed)
        for request, completions in zip(requests, expected, strict=True):
            for said in completions:
                oracle.add(request.prompt, said.tokens)
        with open_engine(models[case.windowed], **case.engine_options(heads)) as llm:
            draft_with(llm, lambda runner: tiny.OracleDrafter(oracle, runner))
            pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
            free = pool.get_num_free_blocks()
            outputs = run_with_tree(llm, case, requests)
            for index, request in enumerate(requests):
                check_case(case, index, request, expected[index], outputs[index])
            assert not list(leaks(llm, free)), f"engine {seed}"
            preempted = next(m.value for m in llm.get_metrics() if m.name.endswith("preemptions"))
            counted = {**counters(llm), "preempted": preempted}
        assert len(oracle.chosen) > 2
        assert case.limits.max_paths == 1 or counted["forks_accepted"] > 20
        return counted

    return run


def test_forty_random_cases(run_engine_case: Callable[[int], dict[str, Any]]) -> None:
    counted = run_engine_case(16)
    assert counted["preempted"] > 0
    assert counted["chain_fallbacks"] > 0


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(25))
def test_random_cases(run_engine_case: Callable[[int], dict[str, Any]], seed: int) -> None:
    print(run_engine_case(seed))
