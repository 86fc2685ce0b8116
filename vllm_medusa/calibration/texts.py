"""The target's own continuations of the prompts, written by vLLM in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllm_medusa.acceptance.texts import Answer, Text
from vllm_medusa.data.prompts import Prompt
from vllm_medusa.engines.engine import EngineProcess
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.target.conversations import first_request
from vllm_medusa.target.text import AnsweringModel, TemplateError

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Request:
    """A prompt as the target reads it.

    Attributes:
        prompt_id: of the prompt.
        token_ids: with the chat template and special tokens, as vLLM's server would feed them.

    """

    prompt_id: str
    token_ids: list[int]


def encode_prompts(prompts: Iterable[Prompt], model: AnsweringModel) -> list[Request]:
    """Tokenize prompts, of conversations up to the first answer.

    Raises:
        UserError: the chat template refuses a prompt, or it leaves no room to continue it.

    """
    requests = []
    for prompt in prompts:
        try:
            token_ids = first_request(prompt, model)
        except TemplateError as error:
            raise UserError(f"prompt {prompt.id!r}: {error}") from None
        if not 1 <= len(token_ids) <= model.max_prompt_tokens:
            raise UserError(
                f"prompt {prompt.id!r} is {len(token_ids)} tokens, but the model's context of "
                f"{model.max_model_len} leaves room for 1 to {model.max_prompt_tokens}; shorten "
                "it, leave it out or lower --max-tokens"
            )
        requests.append(Request(prompt.id, token_ids))
    return requests


def tokens_to_generate(max_tokens: int, num_heads: int) -> int:
    """Return how many tokens to ask for, so that steps count at the first ``max_tokens`` - 1.

    Steps that the limit of tokens could cut do not count (`acceptance.texts.counted_positions`).
    """
    return max_tokens + num_heads


def continue_requests(
    engine: EngineProcess,
    requests: Sequence[Request],
    max_tokens: int,
    temperature: float,
    progress: Progress,
) -> list[Text]:
    """Continue every request; ``progress`` counts requests."""
    texts = []
    for batch in batches(requests):
        prompts = [request.token_ids for request in batch]
        run = engine.run(prompts, max_tokens, temperature=temperature)
        for request, tokens, times in zip(batch, run.token_ids, run.requests, strict=True):
            both = request.token_ids + tokens
            answer = Answer(len(request.token_ids), len(both), times.has_ended)
            texts.append(Text(request.prompt_id, temperature, both, [answer]))
        progress(len(batch))
    return texts


def batches(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    """Return the requests in batches, one for each run."""
    for start in range(0, len(requests), _PROMPTS_AT_ONCE):
        yield requests[start : start + _PROMPTS_AT_ONCE]
