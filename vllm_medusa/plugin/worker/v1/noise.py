"""Random numbers of sampling: one draw per request and position, not per node.

All nodes of one depth have the same position in the text, and at most one of them is on the
accepted path. So they can share that position's draw, and the distribution of the emitted tokens is
exact. A request with a seed takes a draw from its generator for each position, and keeps the draws
that a step did not use for the next step. So the i-th output token uses the i-th draw of the
generator, whatever was drafted and whatever else was in the batch: a seeded request gives the same
text as without speculation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import (
    empty_exponential_noise_like,
    sample_with_exponential_noise,
)


class SeedDraws:
    """Draws of vLLM's CPU sampler: an integer for each position; the kernel makes noise from it.

    Follows ``TopKTopPSampler.forward_cpu``.
    """

    def batch(self, num_requests: int, num_positions: int, logits: Tensor) -> Tensor:
        """Return [B, D + 1] unseeded draws."""
        return torch.randint(0, 2**31, (num_requests, num_positions), dtype=torch.long)

    def single(self, generator: Generator, logits: Tensor) -> Tensor:
        """Return the next draw of a request's generator."""
        return torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)[0]

    def sample(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Return [R] tokens sampled from [R, V] logits with one draw for each row."""
        return torch.ops._C.fused_gumbel_argmax(logits, draws)


class ExponentialDraws:
    """Draws of vLLM's native sampler: a vector of exponential noise for each position.

    Follows ``random_sample``.
    """

    def __init__(self, use_fp64: bool) -> None:
        self._use_fp64 = use_fp64

    def batch(self, num_requests: int, num_positions: int, logits: Tensor) -> Tensor:
        """Return [B, D + 1, V] unseeded draws."""
        like = logits.new_empty((num_requests * num_positions, logits.shape[-1]))
        noise = empty_exponential_noise_like(like, self._use_fp64).exponential_()
        return noise.view(num_requests, num_positions, -1)

    def single(self, generator: Generator, logits: Tensor) -> Tensor:
        """Return the next draw of a request's generator."""
        noise = empty_exponential_noise_like(logits[0], self._use_fp64)
        return noise.exponential_(generator=generator)

    def sample(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Return [R] tokens sampled from [R, V] logits with one draw for each row."""
        probs = logits.softmax(dim=-1, dtype=torch.float32)
        return sample_with_exponential_noise(probs, draws)


class PositionNoise:
    """Gives the draws of each request's next positions.

    Args:
        use_fp64_gumbel: vLLM's setting of that name.

    """

    def __init__(self, use_fp64_gumbel: bool) -> None:
        self._draws: SeedDraws | ExponentialDraws
        if current_platform.is_cpu() and not use_fp64_gumbel:
            self._draws = SeedDraws()
        else:
            self._draws = ExponentialDraws(use_fp64_gumbel)
        self._waiting: dict[str, list[Tensor]] = {}
        self._last_step: tuple[list[str], Tensor] | None = None
        # The draws that the last step of each request used.
        self._used: dict[str, list[Tensor]] = {}

    def draw(
        self,
        req_ids: Sequence[str],
        shape: tuple[int, int],
        generators: dict[int, Generator],
        logits: Tensor,
    ) -> Tensor:
        """Return the draws [B, D + 1, ...] of the step's positions.

        Args:
            req_ids: the batch's requests; not read where none has a generator.
            shape: B and D + 1, where D is the depth of the step's deepest tree.
            generators: generators of the seeded requests, by their index in the batch, without
                requests whose sample will be discarded.
            logits: [R, V] float32.

        """
        self._drop_used()
        draws = self._draws.batch(*shape, logits)
        for index, generator in generators.items():
            waiting = self._waiting.setdefault(req_ids[index], [])
            while len(waiting) < shape[1]:
                waiting.append(self._draws.single(generator, logits))
            draws[index] = torch.stack(waiting[: shape[1]])
        return draws

    def sample(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Return [R] tokens sampled from [R, V] logits with one draw for each row."""
        return self._draws.sample(logits, draws)

    def use(self, req_ids: Sequence[str], generators: dict[int, Generator], length: Tensor) -> None:
        """Record that a step emitted ``length + 1`` tokens of each request ([B])."""
        if generators:
            indices = list(generators)
            self._last_step = ([req_ids[index] for index in indices], length[indices])

    def forget(self, req_ids: set[str]) -> None:
        """Drop the unused draws of requests that have ended."""
        for req_id in req_ids & self._waiting.keys():
            del self._waiting[req_id]
            self._used.pop(req_id, None)

    def give_back(self, counts: Mapping[str, int]) -> None:
        """Make the last used draws of requests unused again, because tokens were left out.

        Args:
            counts: number of left-out tokens of each request's last step.

        """
        if not counts:
            return
        self._drop_used()
        for req_id, count in counts.items():
            if count and req_id in self._waiting:
                self._waiting[req_id][:0] = self._used[req_id][-count:]

    def _drop_used(self) -> None:
        # Read only when the next step needs it. Then the step is over, and nothing has to wait.
        if self._last_step is None:
            return
        req_ids, length = self._last_step
        self._last_step = None
        for req_id, accepted in zip(req_ids, length.tolist(), strict=True):
            if req_id in self._waiting:
                waiting = self._waiting[req_id]
                self._used[req_id] = waiting[: accepted + 1]
                del waiting[: accepted + 1]
