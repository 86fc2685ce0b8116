"""What the training of every other drafter shares: options, text, targets and the loop.

The text is the target's own greedy text and real text; what is learnt is the target's sharpened
distribution, as for the Medusa heads.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    DemoError,
    Progress,
    build_optimizers,
    encode_stream,
    learning_rate_factor,
    provenance,
    read_corpus,
    write_json,
)
from target import greedy_continue
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

GENERATION_BATCH = 128
# What the text depends on, besides the weights.
TEXT_SETTINGS = ("greedy_sequences", "real_sequences", "prompt_tokens", "new_tokens", "seed")

LossOf = Callable[[torch.Tensor], torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser, out: str, steps: int) -> None:
    """Add the options that every drafter has, with the defaults of one."""
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="the target")
    parser.add_argument("--out", type=Path, default=Path(out), help="output directory")
    parser.add_argument("--text", type=Path, help="file to keep the training text in")
    parser.add_argument("--greedy-sequences", type=int, default=4480)
    parser.add_argument("--real-sequences", type=int, default=1920)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--muon-lr", type=float, default=6e-3, help="peak rate, layer matrices")
    parser.add_argument("--adamw-lr", type=float, default=4e-3, help="peak rate, the rest")
    parser.add_argument(
        "--temperature", type=float, default=0.5, help="of the target's distribution that is learnt"
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--seed", type=int, default=0)


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options that no drafter can be trained with."""
    if arguments.temperature <= 0:
        parser.error(f"--temperature {arguments.temperature}: must be above 0")
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")


def training_text(model: PreTrainedModel, arguments: argparse.Namespace) -> torch.Tensor:
    """Token ids, int64 [sequences, prompt + new tokens], from the file if there is one.

    Greedy sequences are a window of training text and the target's continuation of it; real ones
    are windows of training text.
    """
    weights = (arguments.model / "model.safetensors").read_bytes()
    wanted = {name: getattr(arguments, name) for name in TEXT_SETTINGS}
    wanted["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    if arguments.text is None or not arguments.text.exists():
        text = _generate(model, arguments)
        if arguments.text is not None:
            torch.save({"settings": wanted, "text": text}, arguments.text)
        return text
    stored = torch.load(arguments.text, weights_only=True)
    for name, value in wanted.items():
        if stored["settings"][name] != value:
            raise DemoError(
                f"--text {arguments.text}: made with {name} {stored['settings'][name]}, "
                f"not {value}; remove the file"
            )
    kept: torch.Tensor = stored["text"]
    return kept


def _generate(model: PreTrainedModel, arguments: argparse.Namespace) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    stream = encode_stream(tokenizer, read_corpus()[0])
    generator = torch.Generator().manual_seed(arguments.seed)

    def windows(count: int, length: int) -> torch.Tensor:
        starts = torch.randint(len(stream) - length, (count, 1), generator=generator)
        return stream[starts + torch.arange(length)]

    prompts = windows(arguments.greedy_sequences, arguments.prompt_tokens).split(GENERATION_BATCH)
    per_batch = GENERATION_BATCH * arguments.new_tokens
    progress = Progress(len(prompts), "greedy tokens", per_batch, every=2)
    chunks = []
    for done, batch in enumerate(prompts, start=1):
        chunks.append(greedy_continue(model, batch, arguments.new_tokens)[0])
        progress.update(done, "generating")
    length = arguments.prompt_tokens + arguments.new_tokens
    return torch.cat([*chunks, windows(arguments.real_sequences, length)])


def target_distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The target's probabilities [..., vocab], sharpened by a temperature below 1."""
    return torch.softmax(logits.float() / temperature, dim=-1)


def distillation_loss(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits [..., vocab] to the target's probabilities [..., vocab]."""
    return -(target * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def train(
    drafter: nn.Module, loss_of: LossOf, text: torch.Tensor, arguments: argparse.Namespace
) -> int:
    """Minimise ``loss_of(tokens [batch, tokens])`` in bfloat16; returns the positions seen."""
    optimizers = build_optimizers(drafter, arguments.muon_lr, arguments.adamw_lr, ("embed_tokens",))
    generator = torch.Generator().manual_seed(arguments.seed)
    step_loss = torch.compile(loss_of) if arguments.compile else loss_of
    per_step = arguments.batch * text.shape[1]
    progress = Progress(arguments.steps, "positions", per_step, every=20)
    average = 0.0
    for step in range(arguments.steps):
        rows = torch.randint(len(text), (arguments.batch,), generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step_loss(text[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        factor = learning_rate_factor(step, arguments.steps, warmup=40)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average += (loss.item() - average) * max(0.02, 1 / (step + 1))
        progress.update(step + 1, f"loss {average:.3f}")
    return arguments.steps * per_step


def write_provenance(
    drafter: nn.Module,
    text: torch.Tensor,
    positions_seen: int,
    seconds: float,
    arguments: argparse.Namespace,
) -> None:
    """Write beside the drafter how it came to be."""
    facts = provenance(
        seed=arguments.seed,
        greedy_sequences=arguments.greedy_sequences,
        real_sequences=arguments.real_sequences,
        text_positions=text.numel(),
        positions_seen=positions_seen,
        parameters=sum(parameter.numel() for parameter in drafter.parameters()),
        seconds=round(seconds),
    )
    write_json(arguments.out / "provenance.json", facts)
