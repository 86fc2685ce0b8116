"""`vllm-medusa distill`: the target model's own answers to a file of prompts."""

from __future__ import annotations

import argparse

from vllm_medusa.cli.arguments import add_settings, given_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from vllm_medusa.distill.settings import DistillSettings
    from vllm_medusa.target.settings import AnswerSettings

    add_settings(parser, AnswerSettings, "model", "revision")
    names = ("prompts", "out", "shard_format", "shard_size", "on_bad")
    add_settings(parser, DistillSettings, *names)
    answers = parser.add_argument_group("answers")
    add_settings(answers, AnswerSettings, "temperature", "top_p", "seed", "max_tokens")
    add_settings(answers, AnswerSettings, "max_prompt_tokens", "batch_size", "llm_options")
    ray = parser.add_argument_group("on a Ray cluster")
    ray.add_argument(
        "--ray",
        dest="ray_address",
        nargs="?",
        const="local",
        default=argparse.SUPPRESS,
        metavar="ADDRESS",
        help="Use the Ray cluster at ADDRESS; 'auto': the running one; without ADDRESS: start one "
        "here",
    )
    add_settings(ray, DistillSettings, "num_workers")


def run(arguments: argparse.Namespace) -> str:
    """Make the rows, and say what they are.

    Raises:
        UserError: unusable prompts, settings or output.
        UserError: no such model.
    """
    from vllm_medusa.distill.run import distill
    from vllm_medusa.distill.settings import DistillSettings
    from vllm_medusa.target.settings import AnswerSettings

    answers = AnswerSettings(**given_settings(AnswerSettings, arguments))
    settings = DistillSettings(answers=answers, **given_settings(DistillSettings, arguments))
    done = distill(settings)
    text = (
        f"{settings.out}: {done.num_rows} rows, {done.num_answers} answers of "
        f"{done.num_answer_tokens} tokens"
    )
    if done.num_unanswered:
        text += f"; {done.num_unanswered} later turns without room for an answer"
    if done.num_left_out:
        text += f"; {done.num_left_out} lines left out"
    return text
