"""An engine for `distill.answerers` without vLLM: its model's name is what it does."""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def main(reply_fd: int) -> None:
    """Answer each prompt with its id's length."""
    with os.fdopen(reply_fd, "w") as replies:

        def reply(**message: object) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        conduct = json.loads(sys.stdin.readline())["model"]
        if conduct == "refuses":
            reply(error="no such\ndtype")
            return
        reply()
        for line in sys.stdin:
            prompts = json.loads(line)
            if conduct == "crashes":
                print("Fatal: out of luck", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGKILL)
            if conduct == "gives up":
                reply(error="cache too small")
                return
            reply(num_answers=len(prompts), num_tokens=7)
            reply(
                rows=[
                    {"id": p["id"], "token_ids": [1, len(p["id"])], "loss_mask": [False, True]}
                    for p in prompts
                ]
            )
        if conduct == "lingers":
            time.sleep(1000)


if __name__ == "__main__":
    main(int(sys.argv[1]))
