"""The engine's end of `bench.process`: reads commands, runs them, replies with measurements."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from typing import Any


def main(reply_fd: int) -> None:
    """Serve commands from standard input until it is closed; reply to ``reply_fd``."""
    with os.fdopen(reply_fd, "w", encoding="utf-8") as replies:
        start = json.loads(sys.stdin.readline())
        if start["prepare"]:
            runpy.run_path(start["prepare"])
        llm = _make_engine(start["options"])
        _reply(replies, {})
        for line in sys.stdin:
            _reply(replies, _run(llm, json.loads(line)))


def _make_engine(options: dict[str, Any]) -> Any:
    from vllm import LLM

    defaults = {"distributed_executor_backend": "uni", "disable_log_stats": False}
    return LLM(**{**defaults, **options})


def _reply(replies: Any, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def _run(llm: Any, command: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(
        **{"temperature": 0, "max_tokens": command["max_tokens"], **command["sampling"]}
    )
    before = _spec_counts(llm)
    for index, prompt in enumerate(command["prompts"]):
        given = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        engine.add_request(f"{time.monotonic_ns()}-{index}", given, params)
    outputs, step_ms = {}, []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        finished = engine.step()
        step_ms.append(1000 * (time.perf_counter() - begin))
        for output in finished:
            if output.finished:
                outputs[int(output.request_id.rsplit("-", 1)[1])] = output.outputs[0]
    ordered = [outputs[index] for index in range(len(command["prompts"]))]
    drafts, accepted = (now - was for now, was in zip(_spec_counts(llm), before, strict=True))
    return {
        "token_ids": [list(output.token_ids) for output in ordered],
        "texts": [output.text for output in ordered],
        "step_ms": step_ms,
        "num_drafts": drafts,
        "num_accepted": accepted,
    }


def _spec_counts(llm: Any) -> tuple[int, int]:
    counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return (
        int(counts.get("vllm:spec_decode_num_drafts", 0)),
        int(counts.get("vllm:spec_decode_num_accepted_tokens", 0)),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
