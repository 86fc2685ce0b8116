"""An engine's process without vLLM: its model's name is what it does."""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def answer(prompts: list[list[int]]) -> dict[str, object]:
    """What a run replies: each prompt's length and a line's end."""
    return {
        "token_ids": [[len(prompt), 10] for prompt in prompts],
        "texts": ["" for _ in prompts],
        "step_ms": [1.0],
        "full_steps": [0, 1],
        "requests": [],
        "num_drafts": 0,
        "num_accepted": 0,
        "accepted_by_depth": [],
        "num_preemptions": 0,
        "peak_memory_bytes": 1,
        "device_memory_bytes": None,
    }


num_prepared = 0


def prepare() -> None:
    """Count the calls in this process and those that it was forked from."""
    global num_prepared
    num_prepared += 1


def main(reply_fd: int) -> None:
    """Serve as `vllm_medusa.engines.worker` does."""
    with os.fdopen(reply_fd, "w") as replies:

        def reply(**message: object) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        conduct = json.loads(sys.stdin.readline())["options"]["model"]
        if conduct == "refuses":
            reply(error="no such\ndtype")
            return
        if conduct == "starts slowly":
            time.sleep(0.2)
        told = [os.environ.get("WORD"), os.getcwd(), os.getppid(), num_prepared]
        info = {"device": "cpu", "device_name": json.dumps(told)}
        reply(value={**info, "peak_memory_bytes": 1, "private_memory_bytes": 1})
        for line in sys.stdin:
            command = json.loads(line)
            if "reset_prefix_cache" in command:
                reply(value=True)
                continue
            if conduct == "crashes":
                print("Fatal: out of luck", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGKILL)
            if conduct == "gives up":
                reply(error="cache too small")
                return
            reply(progress=[len(command["prompts"]), 7])
            reply(value=answer(command["prompts"]))
        if conduct == "lingers":
            time.sleep(1000)
