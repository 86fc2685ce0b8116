"""The inputs of a calibration, read and checked before anything slow begins."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.acceptance.texts import Text, text_of_row
from vllm_medusa.calibration.settings import CalibrateSettings
from vllm_medusa.calibration.texts import Request, encode_prompts, tokens_to_generate
from vllm_medusa.data.prompts import read_prompts
from vllm_medusa.data.rows import read_rows, temperature_of
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, load_heads
from vllm_medusa.heads.io.files import read_json
from vllm_medusa.heads.io.resolve import resolve
from vllm_medusa.target.config import Target, read_target
from vllm_medusa.target.settings import AnswerSettings
from vllm_medusa.target.text import load_answering_model

#: KV cache of an engine where the caller sets none: enough for the batches that are timed, of a
#: model of a few hundred million parameters, and several engines still fit into memory.
_CPU_KV_CACHE_BYTES = 2**30
_MEMORY_OPTIONS = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
#: Options of ``vllm.LLM`` that decide the prompts' tokens and how many fit.
_TEXT_OPTIONS = ("tokenizer", "tokenizer_revision", "trust_remote_code", "max_model_len")


@dataclass(frozen=True)
class Inputs:
    """The checked inputs.

    Attributes:
        checkpoint: the heads.
        out: directory to write to.
        options: arguments of ``vllm.LLM``, without speculation.
        speculative: ``speculative_config`` of the heads, without a tree.
        requests: prompts to continue.
        texts: or existing continuations.
        check_requests: other prompts, for the check.

    """

    checkpoint: HeadsCheckpoint
    out: Path
    options: dict[str, Any]
    speculative: dict[str, Any]
    requests: list[Request]
    texts: list[Text]
    check_requests: list[Request]

    @property
    def num_heads(self) -> int:
        """Number of Medusa heads."""
        return self.checkpoint.spec.num_heads

    def cost_tokens(self) -> list[int]:
        """Return text for timed steps: all prompts, one after another."""
        sequences = [r.token_ids for r in self.requests] or [t.token_ids for t in self.texts]
        return [token for sequence in sequences for token in sequence]


def read_inputs(settings: CalibrateSettings) -> Inputs:
    """Read and check the inputs that the settings name.

    Raises:
        UserError: something cannot be used.

    """
    target = read_target(settings.model, revision=settings.model_revision)
    checkpoint = load_heads(
        settings.heads,
        revision=settings.revision,
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
    )
    requests, texts = _requests_or_texts(settings, target, checkpoint.spec.num_heads)
    check_requests: list[Request] = []
    if settings.check_prompts is not None:
        check_requests = _requests(settings, settings.check_prompts, checkpoint.spec.num_heads)
        known = {tuple(request.token_ids) for request in requests}
        for request in check_requests:
            if tuple(request.token_ids) in known:
                raise UserError(
                    f"--check-prompts {settings.check_prompts}: prompt {request.prompt_id!r} is "
                    "among --prompts too; the check needs prompts that no tree was made from"
                )
    return Inputs(
        checkpoint=checkpoint,
        out=_out(settings),
        options=_engine_options(settings),
        speculative={
            "method": "medusa",
            "model": settings.heads,
            **({"revision": settings.revision} if settings.revision else {}),
        },
        requests=requests,
        texts=texts,
        check_requests=check_requests,
    )


def _requests_or_texts(
    settings: CalibrateSettings, target: Target, num_heads: int
) -> tuple[list[Request], list[Text]]:
    if not settings.prompts.is_dir():
        return _requests(settings, settings.prompts, num_heads, settings.max_prompts), []
    if settings.temperature is not None:
        raise UserError(
            f"--temperature {settings.temperature}: --prompts {settings.prompts} is a directory of "
            "rows, whose answers are used as they are; leave the temperature out"
        )
    rows = list(read_rows(settings.prompts))[: settings.max_prompts]
    temperature = temperature_of(settings.prompts)
    if temperature and settings.check_sizes:
        raise UserError(
            f"--check: continues its prompts greedily, and the rows of {settings.prompts} were "
            f"sampled at temperature {temperature:g}; give greedy rows, or leave the check out"
        )
    texts = [text_of_row(row, target.end_tokens, temperature) for row in rows]
    return [], texts


def _requests(
    settings: CalibrateSettings, path: Path, num_heads: int, limit: int | None = None
) -> list[Request]:
    text_options = {k: v for k, v in settings.llm_options.items() if k in _TEXT_OPTIONS}
    answers = AnswerSettings(
        model=settings.model,
        revision=settings.model_revision,
        max_tokens=tokens_to_generate(settings.max_tokens, num_heads),
        llm_options=text_options,
    )
    return encode_prompts(read_prompts(path)[:limit], load_answering_model(answers))


def _engine_options(settings: CalibrateSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"model": settings.model, "dtype": settings.dtype, "seed": 0}
    if settings.model_revision:
        options["revision"] = settings.model_revision
    if settings.dtype == "auto":
        location = resolve(settings.model, "model", None, revision=settings.model_revision)
        config = read_json(location / "config.json")
        text = config.get("text_config", config)
        options["dtype"] = text.get("dtype") or text.get("torch_dtype") or "float32"
    if not torch.cuda.is_available() and not set(_MEMORY_OPTIONS) & set(settings.llm_options):
        options["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return {**options, **settings.llm_options}


def _out(settings: CalibrateSettings) -> Path:
    """Return the directory to write to.

    Files are written at the end only, but errors of the directory are found before the
    measurements, which can take an hour.
    """
    out = settings.out
    if out is None:
        heads = Path(settings.heads).expanduser()
        if not heads.exists():
            raise UserError(
                f"{settings.heads} is a hub name, where nothing can be written; give --out DIR"
            )
        out = heads.parent if heads.is_file() else heads
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} is no directory to write to; choose another")
    return out
