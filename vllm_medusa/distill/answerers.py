"""Engines that answer shards: one on this machine, or actors on a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vllm_medusa.data.prompts import Prompt
from vllm_medusa.data.rows import Row
from vllm_medusa.engines.engine import EngineProcess
from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.engines.ray_cluster import engine_resources, ray_cluster
from vllm_medusa.errors import UserError
from vllm_medusa.target.conversations import answer_prompts
from vllm_medusa.target.settings import AnswerSettings
from vllm_medusa.target.text import AnsweringModel, load_answering_model

#: For a Ray worker whose process or machine dies; Ray Data's default is to restart it for ever. Its
#: shard is tried again as long as there are restarts: while the worker moves to another machine,
#: Ray reports it as "unavailable" any number of times.
_RESTARTS = {"max_restarts": 3, "max_task_retries": -1}
_KEPT = "finished shards are kept: run the same command again to continue"

T = TypeVar("T")
#: A shard's index and prompts.
Shard = tuple[int, Sequence[Prompt]]
#: Called with the numbers of answers that have ended and of tokens since the last call; the first
#: call, with zeros, is when the work begins.
Report = Callable[[int, int], None]


class Answerer(AbstractContextManager["Answerer"]):
    """An engine that answers shards of prompts; use as a context manager.

    A shard's rows depend only on the shard and the settings. The engine answers one shard at a
    time, with an empty prefix cache at its start, so its batches are always the same.

    Args:
        settings: how to answer.
        model: whose answers.
    """

    def __init__(self, settings: AnswerSettings, model: AnsweringModel) -> None:
        self._settings = settings
        self._model = model
        options = {
            "tokenizer_revision": settings.revision,
            **settings.llm_options,
            "model": settings.model,
            "revision": settings.revision,
            "seed": settings.seed,
            "max_model_len": model.max_model_len,
        }
        if settings.temperature and not torch.cuda.is_available():
            # After a part of a prompt vLLM rewinds its request's generator, which ends with an
            # error on a CPU (docs/vllm-bugs.md).
            options.setdefault("enable_chunked_prefill", False)
        if settings.batch_size is not None:
            options["max_num_seqs"] = settings.batch_size
        self._engine = EngineProcess(options)

    def wait(self) -> None:
        """Wait until the engine is up."""
        self._engine.wait()

    def answer(self, prompts: Sequence[Prompt], report: Report) -> list[Row]:
        """Answer a shard."""
        if not self._engine.reset_prefix_cache():
            raise EngineProcessError("the prefix cache cannot be emptied: blocks are still in use")
        settings = self._settings

        def generate(requests: list[list[int]], seeds: list[int]) -> list[list[int]]:
            return self._engine.run(
                requests,
                settings.max_tokens,
                seeds=seeds if settings.temperature else None,
                report=report,
                temperature=settings.temperature,
                top_p=settings.top_p,
                detokenize=False,
            ).token_ids

        return answer_prompts(prompts, self._model, generate, settings.seed)

    def __exit__(self, *error: Any) -> None:
        self._engine.__exit__(*error)


def answer_locally(
    settings: AnswerSettings, model: AnsweringModel, shards: Sequence[Shard], report: Report
) -> Iterator[tuple[int, list[Row]]]:
    """Answer shards one after the other, with one engine in a process of its own.

    Args:
        settings: how to answer.
        model: the model that answers.
        shards: the shards to answer.
        report: called about once a second.

    Yields:
        Index and rows of each shard, in order.

    Raises:
        UserError: the engine does not start, or fails.
    """
    try:
        with Answerer(settings, model) as answerer:
            answerer.wait()
            report(0, 0)
            for index, prompts in shards:
                yield index, answerer.answer(prompts, report)
    except EngineProcessError as exc:
        if exc.ending is None:
            raise _refused(settings, exc.reason) from None
        raise UserError(
            f"vLLM failed on {settings.model}: the process {exc.ending}; its last message: "
            f"{exc.reason!r}; {_KEPT}"
        ) from None


def _refused(settings: AnswerSettings, reason: str) -> UserError:
    return UserError(f"vLLM refuses {settings.model} with these options: {reason}")


class _ShardActor:
    """A Ray actor that answers shards.

    If vLLM refuses, the actor returns the error: if it raised it, Ray would retry, and print the
    error several times. If its engine dies, the actor dies too, and Ray starts another one.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        given = AnswerSettings(**settings)
        self._answerer = Answerer(given, load_answering_model(given))
        self._refusal: str | None = None
        self._try(self._answerer.wait)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        prompts = [Prompt.from_record(record) for record in json.loads(shard["prompts"])]
        rows = None
        if self._refusal is None:
            rows = self._try(lambda: self._answerer.answer(prompts, lambda *_: None))
        if rows is None:
            return {"reply": json.dumps({"error": self._refusal})}
        records = [row.as_record() for row in rows]
        return {"reply": json.dumps({"index": shard["index"], "rows": records})}

    def _try(self, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except EngineProcessError as exc:
            if exc.ending is not None:
                os._exit(1)
            self._refusal = exc.reason
            return None


def answer_on_ray(
    settings: AnswerSettings,
    shards: Sequence[Shard],
    report: Report,
    *,
    address: str,
    num_workers: int,
) -> Iterator[tuple[int, list[Row]]]:
    """Answer shards on a Ray cluster, one engine a worker, with Ray Data.

    Args:
        settings: the model must have the same name on every machine.
        shards: the shards to answer.
        report: called at the end of a shard.
        address: address of the cluster; `local` starts one on this machine.
        num_workers: number of engines. Each gets as many GPUs as its model is split over, or one
            CPU if the cluster has no GPUs.

    Yields:
        Index and rows of each shard, as they end.

    Raises:
        UserError: Ray or an engine does not start, or fails.
    """
    if Path(settings.model).exists():
        settings = replace(settings, model=str(Path(settings.model).absolute()))
    with ray_cluster(address, num_workers) as ray:
        from ray.data import ActorPoolStrategy, DataContext, from_items
        from ray.exceptions import RayError

        report(0, 0)
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [
            {"index": index, "prompts": json.dumps([prompt.as_record() for prompt in prompts])}
            for index, prompts in shards
        ]
        answered = from_items(items, override_num_blocks=len(items)).map(
            _ShardActor,
            fn_constructor_args=(asdict(settings),),
            compute=ActorPoolStrategy(size=min(num_workers, len(items))),
            **_RESTARTS,
            **engine_resources(ray, settings.world_size),
        )
        try:
            yield from _rows_of(answered.iter_rows(), settings, report)
        except RayError as exc:
            raise UserError(
                f"Ray failed on {settings.model}: {str(exc).strip().splitlines()[-1]}; {_KEPT}"
            ) from None


def _rows_of(
    answers: Iterable[Mapping[str, str]], settings: AnswerSettings, report: Report
) -> Iterator[tuple[int, list[Row]]]:
    refusal: str | None = None
    for answer in answers:
        reply = json.loads(answer["reply"])
        if "error" in reply:
            # Not raised here: what other workers answer is kept, and Ray, stopped while tasks are
            # under way, would print that it lost them.
            refusal = refusal or reply["error"]
            continue
        rows = [Row.from_record(record) for record in reply["rows"]]
        report(sum(r.num_answers for r in rows), sum(r.num_answer_tokens for r in rows))
        yield reply["index"], rows
    if refusal is not None:
        raise _refused(settings, refusal)
