"""Who answers the shards: an engine on this machine, or actors on a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_medusa.data.prompts import Prompt
from vllm_medusa.data.rows import Row
from vllm_medusa.engines.process import ProcessEndedError, WorkerProcess
from vllm_medusa.errors import UserError
from vllm_medusa.target.settings import AnswerSettings

_ENGINE = "vllm_medusa.engines.answer_worker"
#: The engine in the caller's own process: requests then arrive all before the first step, so that
#: a shard's batches are the same each time.
_ENGINE_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_ENGINE_DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING"}
#: Of a Ray worker whose process dies; Ray Data's own default is to go on for ever.
_RESTARTS = {"max_restarts": 3, "max_task_retries": 3}
_SECONDS_TO_KNOCK = 10
_KEPT = "finished shards are kept: run the same command again to go on"

#: A shard's index and prompts.
Shard = tuple[int, Sequence[Prompt]]
#: Told of answers that have ended, and of tokens made, since it was last told; first, with zeros,
#: when work begins.
Report = Callable[[int, int], None]


def answer_locally(
    settings: AnswerSettings, shards: Sequence[Shard], report: Report
) -> Iterator[tuple[int, list[Row]]]:
    """Answer shards one after the other, with one engine in a process of its own.

    Yields:
        Index and rows of each shard, in order.

    Raises:
        UserError: the engine does not start, or fails.
    """
    defaults = {name: value for name, value in _ENGINE_DEFAULTS.items() if name not in os.environ}
    try:
        with WorkerProcess(_ENGINE, _ENGINE_ENVIRONMENT | defaults) as process:
            process.send(asdict(settings))
            _checked(process.receive(), settings)
            report(0, 0)
            for index, prompts in shards:
                process.send([prompt.as_record() for prompt in prompts])
                while "rows" not in (reply := _checked(process.receive(), settings)):
                    report(reply["num_answers"], reply["num_tokens"])
                yield index, [Row.from_record(record) for record in reply["rows"]]
    except ProcessEndedError as exc:
        last_line = (exc.log.strip().splitlines() or ["nothing"])[-1]
        raise UserError(
            f"vLLM failed on {settings.model}: {exc}, its last words {last_line!r}; {_KEPT}"
        ) from None


def _checked(reply: dict[str, Any], settings: AnswerSettings) -> dict[str, Any]:
    if "error" in reply:
        raise UserError(f"vLLM refuses {settings.model} with these options: {reply['error']}")
    return reply


class _ShardActor:
    """A Ray actor that answers shards; takes the engine's module by name.

    What vLLM raises it returns: raised, Ray would retry it, and print it several times over.
    """

    def __init__(self, module: str, settings: Mapping[str, Any]) -> None:
        os.environ.update(_ENGINE_ENVIRONMENT)
        for name, value in _ENGINE_DEFAULTS.items():
            os.environ.setdefault(name, value)
        self._engine = import_module(module)
        try:
            self._answerer = self._engine.Answerer(settings)
        except Exception as exc:
            self._answerer = None
            self._error = self._engine.reason_of(exc)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        if self._answerer is None:
            return {"reply": json.dumps({"error": self._error})}
        try:
            rows = self._answerer.answer(json.loads(shard["prompts"]), lambda answers, tokens: None)
        except Exception as exc:
            return {"reply": json.dumps({"error": self._engine.reason_of(exc)})}
        return {"reply": json.dumps({"index": shard["index"], "rows": rows})}


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
        settings: the model must be found under its name on every machine.
        shards: to answer.
        report: told of a shard at its end.
        address: of the cluster; `local` starts one on this machine.
        num_workers: engines at once. Each gets as many GPUs as its model is split over, or one CPU
            of a cluster without GPUs.

    Yields:
        Index and rows of each shard, as they end.

    Raises:
        UserError: Ray or an engine does not start, or fails.
    """
    if Path(settings.model).exists():
        settings = replace(settings, model=str(Path(settings.model).absolute()))
    ray = _start_ray(address, num_workers)
    try:
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
            fn_constructor_args=(_ENGINE, asdict(settings)),
            compute=ActorPoolStrategy(size=min(num_workers, len(items))),
            ray_remote_args_fn=lambda: _RESTARTS,
            **_resources(ray, settings),
        )
        try:
            yield from _rows_of(answered.iter_rows(), settings, report)
        except RayError as exc:
            raise UserError(
                f"Ray failed on {settings.model}: {str(exc).strip().splitlines()[-1]}; {_KEPT}"
            ) from None
    finally:
        ray.shutdown()


def _rows_of(
    answers: Iterable[Mapping[str, str]], settings: AnswerSettings, report: Report
) -> Iterator[tuple[int, list[Row]]]:
    failure: UserError | None = None
    for answer in answers:
        try:
            reply = _checked(json.loads(answer["reply"]), settings)
        except UserError as exc:
            # Not raised here: what other workers answer is kept, and Ray, stopped while tasks are
            # under way, would print that it lost them.
            failure = failure or exc
            continue
        rows = [Row.from_record(record) for record in reply["rows"]]
        report(sum(r.num_answers for r in rows), sum(r.num_answer_tokens for r in rows))
        yield reply["index"], rows
    if failure is not None:
        raise failure


def _start_ray(address: str, num_workers: int) -> Any:
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise UserError(f'--ray needs Ray Data ({exc}): pip install "vllm-medusa[ray]"') from None
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        num_cpus = max(num_workers, os.cpu_count() or 1)
        options |= {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        _knock(address)
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as exc:
        reason = str(exc).strip().splitlines()[0]
        raise UserError(f"--ray {address}: no Ray cluster to be had there ({reason})") from None
    return ray


def _knock(address: str) -> None:
    """Connect to an address, as Ray would go on trying for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_KNOCK).close()


def _resources(ray: Any, settings: AnswerSettings) -> dict[str, int]:
    """What each worker takes of the cluster."""
    if not ray.cluster_resources().get("GPU"):
        return {"num_cpus": 1}
    return {"num_gpus": settings.world_size}
