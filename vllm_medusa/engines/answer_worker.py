"""vLLM's end of `distill`: answers shards of prompts, in a process of its own or a Ray actor."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from vllm_medusa.data.prompts import Prompt
from vllm_medusa.target.conversations import answer_prompts
from vllm_medusa.target.settings import AnswerSettings
from vllm_medusa.target.text import load_answering_model

_REPORT_SECONDS = 1.0
_SECONDS_TO_END = 5.0

#: Told how many answers have ended and how many tokens were made, since it was last told.
Report = Callable[[int, int], None]


class Answerer:
    """An engine that answers shards of prompts.

    A shard's rows depend on nothing but the shard and the settings: it has the engine to itself,
    and the prefix cache is emptied before it, so that its batches are the same whenever it runs.

    Args:
        settings: `AnswerSettings.as_dict`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from vllm import LLM

        self._settings = AnswerSettings(**settings)
        self._model = load_answering_model(self._settings)
        options = dict(self._settings.llm_options)
        backend = "uni" if self._settings.world_size == 1 else "mp"
        options.setdefault("distributed_executor_backend", backend)
        options.setdefault("tokenizer_revision", self._settings.revision)
        if self._settings.batch_size is not None:
            options["max_num_seqs"] = self._settings.batch_size
        self._llm = LLM(
            model=self._settings.model,
            revision=self._settings.revision,
            seed=self._settings.seed,
            disable_log_stats=False,  # the progress is read from them
            **{**options, "max_model_len": self._model.max_model_len},
        )

    def answer(self, prompts: list[dict[str, Any]], report: Report) -> list[dict[str, Any]]:
        """Answer a shard.

        Args:
            prompts: records of `Prompt.as_record`.
            report: called about once a second.

        Returns:
            Records of `Row.as_record`.
        """
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache cannot be emptied: blocks of it are still in use")
        rows = answer_prompts(
            [Prompt.from_record(record) for record in prompts],
            self._model,
            lambda requests, seeds: self._generate(requests, seeds, report),
            self._settings.seed,
        )
        return [row.as_record() for row in rows]

    def _generate(
        self, requests: list[list[int]], seeds: list[int], report: Report
    ) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for index, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
            params = SamplingParams(
                temperature=self._settings.temperature,
                top_p=self._settings.top_p,
                max_tokens=self._settings.max_tokens,
                seed=seed if self._settings.temperature else None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": request}, params)
        answers: dict[int, list[int]] = {}
        progress = _Progress(self._llm, report)
        while engine.has_unfinished_requests():
            for output in engine.step():
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
            progress.tell(len(answers))
        progress.tell(len(answers), at_once=True)
        return [answers[index] for index in range(len(requests))]


class _Progress:
    """Tells of finished answers and of tokens made, not too often."""

    def __init__(self, llm: Any, report: Report) -> None:
        self._llm = llm
        self._report = report
        self._answers = 0
        self._tokens = self._num_tokens()
        self._time = time.monotonic()

    def tell(self, num_answers: int, at_once: bool = False) -> None:
        now = time.monotonic()
        if now - self._time < _REPORT_SECONDS and not at_once:
            return
        num_tokens = self._num_tokens()
        self._report(num_answers - self._answers, num_tokens - self._tokens)
        self._answers, self._tokens, self._time = num_answers, num_tokens, now

    def _num_tokens(self) -> int:
        metrics = self._llm.get_metrics()
        return sum(int(m.value) for m in metrics if m.name == "vllm:generation_tokens")


def main(reply_fd: int) -> None:
    """Be the other end of `distill.answerers.answer_locally`.

    Standard input gives the settings, then a shard's prompts a line. The replies are, a line each:
    `{}` when the engine is up, `{"num_answers", "num_tokens"}` as a shard goes on, `{"rows"}` at
    its end, and `{"error"}` as the last.
    """
    with os.fdopen(reply_fd, "w", encoding="utf-8") as replies:

        def reply(**message: Any) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        messages = _read_ahead(sys.stdin)
        try:
            answerer = Answerer(next(messages))
            reply()
            for prompts in messages:
                rows = answerer.answer(
                    prompts, lambda answers, tokens: reply(num_answers=answers, num_tokens=tokens)
                )
                reply(rows=rows)
        except BrokenPipeError:
            raise
        except Exception as exc:
            traceback.print_exc()
            reply(error=reason_of(exc))


def reason_of(error: Exception) -> str:
    """Return what went wrong; of pydantic's reports only what the user is to know."""
    if hasattr(error, "errors"):
        return "; ".join(str(entry["msg"]) for entry in error.errors())
    return str(error).strip() or type(error).__name__


def _read_ahead(lines: TextIO) -> Iterator[Any]:
    """Parse lines as they come, until their writer is gone.

    A shard takes minutes. For a caller that was killed the process does not finish it.
    """
    read: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read_all() -> None:
        for line in lines:
            read.put(line)
        read.put("")
        time.sleep(_SECONDS_TO_END)
        os._exit(1)

    threading.Thread(target=read_all, daemon=True).start()
    while line := read.get():
        yield json.loads(line)


if __name__ == "__main__":
    main(int(sys.argv[1]))
