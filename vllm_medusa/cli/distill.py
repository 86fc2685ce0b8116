"""`vllm-medusa distill`: the target model's own answers to a file of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_medusa.cli.arguments import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, help="target model: directory or hub name")
    parser.add_argument("--revision", help="of the model, if a hub name")
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help="JSON lines of texts, chats, ShareGPT conversations or MT-Bench questions",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where the rows go; an interrupted run in it is completed",
    )
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument(
        "--shard-size", type=int, default=256, metavar="N", help="prompts a file (default 256)"
    )
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="what to do about lines that are malformed or too long (default: error)",
    )
    _add_answer_arguments(parser)
    group = parser.add_argument_group("on a Ray cluster")
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="use Ray: of that address, 'auto' for the running one, nothing to start one here",
    )
    group.add_argument(
        "--num-workers", type=int, default=1, metavar="N", help="engines at once (default 1)"
    )


def _add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    group.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="of an answer (default 512)"
    )
    group.add_argument(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help="a longer prompt is bad (default: what --max-tokens leaves of the model's context)",
    )
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts at once (default: vLLM's)"
    )
    group.add_argument(
        "--llm-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="""further arguments of vllm.LLM, such as '{"dtype": "float32"}'""",
    )


def run(arguments: argparse.Namespace) -> str:
    """Make the rows, and say what they are.

    Raises:
        UserError: unusable prompts, settings or output.
        UserError: no such model.
    """
    from vllm_medusa.distill.run import DistillSettings, distill
    from vllm_medusa.target.settings import AnswerSettings

    answers = AnswerSettings(
        model=arguments.model,
        revision=arguments.revision,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        max_prompt_tokens=arguments.max_prompt_tokens,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        llm_options=arguments.llm_options,
    )
    done = distill(
        DistillSettings(
            answers=answers,
            prompts=arguments.prompts,
            out=arguments.out,
            shard_size=arguments.shard_size,
            shard_format=arguments.format,
            on_bad=arguments.on_bad,
            ray_address=arguments.ray,
            num_workers=arguments.num_workers,
        )
    )
    text = (
        f"{arguments.out}: {done.num_rows} rows, {done.num_answers} answers of "
        f"{done.num_answer_tokens} tokens"
    )
    if done.num_unanswered:
        text += f"; {done.num_unanswered} later turns without room for an answer"
    if done.num_left_out:
        text += f"; {done.num_left_out} lines left out"
    return text
