"""The target's own continuations of the prompts, written by vLLM in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_medusa.bench.process import EngineProcess, EngineProcessError
from vllm_medusa.calibration.errors import CalibrationError
from vllm_medusa.data.conversations import first_request
from vllm_medusa.data.prompts import Prompt
from vllm_medusa.data.target import AnsweringModel, TemplateError

#: Told how many more of the things that a stage counts are done.
Progress = Callable[[int], object]

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


@dataclass(frozen=True)
class Text:
    """A prompt and the target's continuation of it.

    Attributes:
        prompt_id: of the prompt.
        temperature: of the continuation; 0 is greedy.
        token_ids: the prompt's tokens and the continuation's.
        num_prompt_tokens: how many of them are the prompt's.
        has_ended: whether the target ended it, or the limit of tokens did.

    """

    prompt_id: str
    temperature: float
    token_ids: list[int]
    num_prompt_tokens: int
    has_ended: bool

    @property
    def continuation(self) -> list[int]:
        """The target's tokens."""
        return self.token_ids[self.num_prompt_tokens :]


def encode_prompts(prompts: Iterable[Prompt], model: AnsweringModel) -> list[Request]:
    """Tokenize prompts, of conversations up to the first answer.

    Raises:
        CalibrationError: the chat template refuses a prompt, or it leaves no room to continue it.

    """
    requests = []
    for prompt in prompts:
        try:
            token_ids = first_request(prompt, model)
        except TemplateError as error:
            raise CalibrationError(f"prompt {prompt.id!r}: {error}") from None
        if not 1 <= len(token_ids) <= model.max_prompt_tokens:
            raise CalibrationError(
                f"prompt {prompt.id!r} is {len(token_ids)} tokens, but the model's context of "
                f"{model.max_model_len} leaves room for 1 to {model.max_prompt_tokens}; shorten "
                "it, leave it out or lower --max-tokens"
            )
        requests.append(Request(prompt.id, token_ids))
    return requests


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
        texts += [
            Text(
                request.prompt_id,
                temperature,
                request.token_ids + tokens,
                len(request.token_ids),
                len(tokens) < max_tokens,
            )
            for request, tokens in zip(batch, run.token_ids, strict=True)
        ]
        progress(len(batch))
    return texts


def start_engine(
    options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> EngineProcess:
    """Start an engine and wait until it is up.

    Args:
        options: arguments of ``vllm.LLM``.
        environment: environment variables beside the caller's own.

    Raises:
        CalibrationError: it does not come up; in one line why.

    """
    engine = EngineProcess(options, environment)
    try:
        engine.wait()
    except EngineProcessError as error:
        engine.close()
        raise CalibrationError(
            f"vLLM does not start with {dict(options)}: {error.reason}; correct --llm-options"
        ) from None
    except BaseException:
        engine.close(patience_s=0)
        raise
    return engine


def batches(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    """Return the requests in batches that one run takes."""
    for start in range(0, len(requests), _PROMPTS_AT_ONCE):
        yield requests[start : start + _PROMPTS_AT_ONCE]
