"""Random numbers of sampling: the i-th draw of a request's generator is its i-th token's."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Generator, Tensor
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from vllm_medusa.plugin.worker.v1.noise import ExponentialDraws, PositionNoise

# Not the engine, but its numbers: to be run again on the next vLLM.
pytestmark = pytest.mark.engine

current_platform.import_kernels()

VOCAB = 11
DEPTH = 3
LOGITS = torch.zeros(1, VOCAB)
BOTH_KINDS = pytest.mark.parametrize("use_fp64_gumbel", [False, True])


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def draws_in_order(seed: int, count: int, use_fp64_gumbel: bool) -> list[Tensor]:
    """The generator's draws, taken one token after the other as without drafts."""
    noise = PositionNoise(use_fp64_gumbel)
    generator = seeded(seed)
    draws = []
    for _ in range(count):
        draws.append(noise.draw(["alone"], (1, 1), {0: generator}, LOGITS)[0, 0].clone())
        noise.use(["alone"], {0: generator}, torch.tensor([0]))
    return draws


def step(
    noise: PositionNoise,
    req_ids: Sequence[str],
    generators: dict[int, Generator],
    accepted: Sequence[int],
    depth: int = DEPTH,
) -> Tensor:
    draws = noise.draw(req_ids, (len(req_ids), depth + 1), generators, LOGITS)
    noise.use(req_ids, generators, torch.tensor(accepted))
    return draws


@BOTH_KINDS
@pytest.mark.parametrize("seed", range(5))
def test_draws_belong_to_positions(seed: int, use_fp64_gumbel: bool) -> None:
    """Whatever is accepted, whoever else is in the batch, at whatever place in it."""
    rng = random.Random(seed)
    noise = PositionNoise(use_fp64_gumbel)
    generators = {f"seeded-{i}": seeded(i) for i in range(3)}
    expected = {f"seeded-{i}": draws_in_order(i, 200, use_fp64_gumbel) for i in range(3)}
    num_emitted = dict.fromkeys(generators, 0)
    everyone = [*generators, "unseeded-0", "unseeded-1"]
    for _ in range(40):
        batch = rng.sample(everyone, rng.randint(1, len(everyone)))
        # A chunk of a prompt: its sample is thrown away, and its generator not handed over.
        discarded = {req_id for req_id in batch if rng.random() < 0.2}
        present = {
            index: generators[req_id]
            for index, req_id in enumerate(batch)
            if req_id in generators and req_id not in discarded
        }
        depth = rng.randint(0, DEPTH)  # of the step's deepest tree
        accepted = [rng.randint(0, depth) for _ in batch]
        draws = step(noise, batch, present, accepted, depth)
        assert len(draws) == len(batch)
        for index in present:
            first = num_emitted[batch[index]]
            mine = expected[batch[index]][first : first + depth + 1]
            assert torch.equal(draws[index], torch.stack(mine))
            num_emitted[batch[index]] += accepted[index] + 1
    assert all(count > 20 for count in num_emitted.values())


@BOTH_KINDS
def test_unseeded_draws_differ_everywhere_and_take_from_no_generator(use_fp64_gumbel: bool) -> None:
    noise = PositionNoise(use_fp64_gumbel)
    generator = seeded(1)
    state = generator.get_state()
    steps = [step(noise, ["a", "b"], {}, [1, 2]) for _ in range(3)]
    drawn = torch.cat([draws.reshape(2 * (DEPTH + 1), -1) for draws in steps])
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert torch.equal(generator.get_state(), state)


@BOTH_KINDS
def test_forgotten_draws_are_not_handed_to_a_later_request(use_fp64_gumbel: bool) -> None:
    noise = PositionNoise(use_fp64_gumbel)
    step(noise, ["a", "b"], {0: seeded(1), 1: seeded(2)}, [0, 0])
    noise.forget({"a", "unknown"})
    draws = step(noise, ["b", "a"], {0: seeded(2), 1: seeded(3)}, [0, 0])
    expected = draws_in_order(3, DEPTH + 1, use_fp64_gumbel)
    assert torch.equal(draws[1], torch.stack(expected))


def test_a_step_of_greedy_requests_between_changes_nothing() -> None:
    """Then nothing is drawn, and only `use` is called."""
    noise = PositionNoise(use_fp64_gumbel=False)
    generator = seeded(4)
    step(noise, ["a"], {0: generator}, [1])
    noise.use(["greedy"], {}, torch.tensor([3]))
    draws = step(noise, ["a"], {0: generator}, [0])
    assert torch.equal(draws[0], torch.stack(draws_in_order(4, DEPTH + 3, False)[2:]))


@BOTH_KINDS
def test_tokens_are_those_of_vllms_own_sampler(use_fp64_gumbel: bool) -> None:
    logits = torch.randn(60, VOCAB, generator=seeded(0)) * 2
    sampler = TopKTopPSampler(use_fp64_gumbel=use_fp64_gumbel)
    generator = seeded(9)
    expected = [sampler(row[None].clone(), {0: generator}, None, None)[0].item() for row in logits]
    noise = PositionNoise(use_fp64_gumbel)
    generator = seeded(9)
    tokens: list[int] = []
    for accepted in random.Random(0).choices(range(DEPTH + 1), k=60):
        if len(tokens) + DEPTH + 1 > len(logits):
            break
        rows = logits[len(tokens) : len(tokens) + DEPTH + 1].clone()
        draws = step(noise, ["a"], {0: generator}, [accepted])
        tokens += noise.sample(rows, draws[0]).tolist()[: accepted + 1]
    assert len(tokens) > 50
    assert tokens == expected[: len(tokens)]
    assert len(set(tokens)) > 5


def test_native_draws_are_those_of_vllms_native_sampler() -> None:
    """What a GPU without fp64 Gumbel noise draws."""
    logits = torch.randn(20, VOCAB, generator=seeded(0)) * 2
    sampler = TopKTopPSampler()
    generator = seeded(5)
    expected = [
        sampler.forward_native(row[None].clone(), {0: generator}, None, None)[0].item()
        for row in logits
    ]
    draws, generator = ExponentialDraws(use_fp64=False), seeded(5)
    assert draws.batch(2, DEPTH + 1, logits).shape == (2, DEPTH + 1, VOCAB)
    noise = torch.stack([draws.single(generator, logits) for _ in logits])
    assert draws.sample(logits.clone(), noise).tolist() == expected
