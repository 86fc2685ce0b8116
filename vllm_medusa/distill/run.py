"""`distill`: a target model's own answers to prompts, as shards of rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_medusa.data.prompts import BadLine, Prompt, parse_prompts, settle_bad_lines
from vllm_medusa.data.rows import (
    Row,
    list_shards,
    read_shard,
    shard_path,
    write_shard,
)
from vllm_medusa.distill.answerers import Report, Shard, answer_locally, answer_on_ray
from vllm_medusa.distill.output import open_output, write_provenance
from vllm_medusa.distill.settings import DistillSettings
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.progress import Bar
from vllm_medusa.reporting.provenance import now, software
from vllm_medusa.target.conversations import first_request
from vllm_medusa.target.text import AnsweringModel, TemplateError, load_answering_model


@dataclass(frozen=True)
class Distilled:
    """The result of a run; its counts include earlier runs.

    Attributes:
        num_rows: of all shards.
        num_tokens: of all rows.
        num_answer_tokens: of these that the loss mask covers.
        num_answers: one for each turn.
        num_unanswered: turns that left no room for an answer.
        num_left_out: lines of the prompt file that could not be used.
    """

    num_rows: int
    num_tokens: int
    num_answer_tokens: int
    num_answers: int
    num_unanswered: int
    num_left_out: int


def distill(settings: DistillSettings) -> Distilled:
    """Write the target model's answers to all prompts; continue where an earlier run ended.

    Shard i holds the answers to the usable prompts i * S to (i + 1) * S - 1 in the order of the
    file. A shard is first written under a temporary name, so it is complete or absent. If the run
    is killed, another call makes the missing shards, with the same result.

    Raises:
        UserError: a fault of the prompts, the settings, the model, the engine or the disk. Finished
            shards stay.
    """
    model = load_answering_model(settings.answers)
    prompts, bad = _usable_prompts(settings, model)
    shards: list[Shard] = [
        (index, prompts[start : start + settings.shard_size])
        for index, start in enumerate(range(0, len(prompts), settings.shard_size))
    ]
    made_from = _made_from(settings, model, prompts)
    with open_output(settings.out, made_from) as earlier:
        present = list_shards(settings.out)
        missing = [shard for shard in shards if shard[0] not in present]
        if not missing and earlier.get("complete"):
            return Distilled(**earlier["counts"])
        provenance = {
            "made_from": made_from,
            "model": settings.answers.model,
            "revision": settings.answers.revision,
            "prompts": str(settings.prompts),
            "left_out": [f"line {line.line}: {line.reason}" for line in bad],
            "num_shards": len(shards),
            "complete": False,
            **software(),
            "started": earlier.get("started") or now(),
            "seconds": earlier.get("seconds", 0.0),
        }
        _make_shards(settings, model, shards, missing, provenance)
        counts = _count(settings, shards, len(bad))
        finished = {"complete": True, "finished": now(), "counts": asdict(counts)}
        write_provenance(settings.out, provenance | finished)
    return counts


def _make_shards(
    settings: DistillSettings,
    model: AnsweringModel,
    shards: Sequence[Shard],
    missing: Sequence[Shard],
    provenance: dict[str, Any],
) -> None:
    """Write the missing shards; update the seconds in the provenance."""
    before, begin = provenance["seconds"], time.monotonic()
    num_all, num_missing = (sum(map(_num_turns, some)) for some in (shards, missing))
    with Bar("distill", "answers", num_all, num_all - num_missing) as bar:
        for index, rows in _answer(settings, model, missing, _report_to(bar)):
            provenance["seconds"] = round(before + time.monotonic() - begin, 1)
            write_provenance(settings.out, provenance)
            write_shard(shard_path(settings.out, index, settings.shard_format), rows)


def _report_to(bar: Bar) -> Report:
    """Count answers on a bar, with the rate in tokens since the first call."""
    begin = time.monotonic()
    num_tokens = 0

    def report(answers: int, tokens: int) -> None:
        nonlocal begin, num_tokens
        if not num_tokens + tokens:
            begin = time.monotonic()
        num_tokens += tokens
        seconds = time.monotonic() - begin
        bar.advance(
            answers, f"{num_tokens / max(seconds, 1e-3):.0f} tokens/s" if num_tokens else None
        )

    return report


def _answer(
    settings: DistillSettings, model: AnsweringModel, shards: Sequence[Shard], report: Report
) -> Iterator[tuple[int, list[Row]]]:
    if not shards:
        return iter(())
    if settings.ray_address is None:
        return answer_locally(settings.answers, model, shards, report)
    return answer_on_ray(
        settings.answers,
        shards,
        report,
        address=settings.ray_address,
        num_workers=settings.num_workers,
    )


def _usable_prompts(
    settings: DistillSettings, model: AnsweringModel
) -> tuple[list[Prompt], list[BadLine]]:
    """Read the usable prompts; refuse the other lines or warn about them."""
    prompts, bad = parse_prompts(settings.prompts)
    usable = []
    for prompt in prompts:
        if prompt.turns and not model.tokenizer.chat_template:
            raise UserError(
                f"{settings.prompts}: line {prompt.line} is a conversation, and "
                f"{settings.answers.model} has no chat template; give texts, or a chat model"
            )
        reason = _reason_against(prompt, model)
        if reason is None:
            usable.append(prompt)
        else:
            bad.append(BadLine(prompt.line, reason))
    bad.sort(key=lambda line: line.line)
    settle_bad_lines(settings.prompts, bad, settings.on_bad)
    if not usable:
        raise UserError(f"{settings.prompts}: no usable prompt in it; give at least one line")
    return usable, bad


def _reason_against(prompt: Prompt, model: AnsweringModel) -> str | None:
    try:
        token_ids = first_request(prompt, model)
    except TemplateError as exc:
        return str(exc)
    if not token_ids:
        return "no token"
    if len(token_ids) > model.max_prompt_tokens:
        return f"{len(token_ids)} tokens, over the limit of {model.max_prompt_tokens}"
    if max(token_ids) >= model.vocab_size:
        return (
            f"token {max(token_ids)} of the tokenizer is beyond the model's vocabulary of "
            f"{model.vocab_size}"
        )
    return None


def _made_from(
    settings: DistillSettings, model: AnsweringModel, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Return everything that decides the rows."""
    digest = hashlib.sha256()
    for prompt in prompts:
        # A category counts only where there is one, so that rows of before stay the same.
        category = [] if prompt.category is None else [prompt.category]
        turns = prompt.as_record()["turns"]
        digest.update(json.dumps([prompt.id, prompt.text, turns, *category]).encode())
    answers = asdict(settings.answers) | {"max_prompt_tokens": model.max_prompt_tokens}
    del answers["model"], answers["revision"]  # the fingerprint is more precise
    return {
        "model_fingerprint": model.fingerprint,
        "num_prompts": len(prompts),
        "prompts_sha256": digest.hexdigest(),
        "shard_size": settings.shard_size,
        "format": settings.shard_format,
        **answers,
    }


def _count(settings: DistillSettings, shards: Sequence[Shard], num_left_out: int) -> Distilled:
    """Count what the shards hold.

    Raises:
        UserError: a shard does not hold its prompts' rows, each once and in order.
    """
    num_rows = num_tokens = num_answer_tokens = num_answers = 0
    for index, prompts in shards:
        path = shard_path(settings.out, index, settings.shard_format)
        expected = [prompt.id for prompt in prompts]
        seen: list[str] = []
        for row in read_shard(path):
            if row.id in expected[len(seen) : len(seen) + 1]:
                seen.append(row.id)
            elif not seen or not row.id.startswith(f"{seen[-1]}#"):
                raise UserError(
                    f"{path}: row {row.id!r} is not in order; remove the file and run again"
                )
            num_rows += 1
            num_tokens += len(row.token_ids)
            num_answer_tokens += row.num_answer_tokens
            num_answers += row.num_answers
        if seen != expected:
            raise UserError(f"{path}: lacks rows of its prompts; remove the file and run again")
    return Distilled(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_answer_tokens=num_answer_tokens,
        num_answers=num_answers,
        num_unanswered=sum(map(_num_turns, shards)) - num_answers,
        num_left_out=num_left_out,
    )


def _num_turns(shard: Shard) -> int:
    """Number of answers that a shard's prompts ask for."""
    return sum(
        1 if prompt.text is not None else sum(turn.role == "user" for turn in prompt.turns)
        for prompt in shard[1]
    )
