#!/usr/bin/env python3
"""Train the demo's target model: a 4 M parameter Llama that writes Python.

It learns the standard library of the interpreter that runs this script, from nothing, on a CPU.
Output: a Hugging Face model directory with its tokenizer, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    END_OF_TEXT,
    Progress,
    build_optimizers,
    encode_stream,
    keep_freed_memory,
    learning_rate_factor,
    provenance,
    read_corpus,
    run_script,
    write_json,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
MAX_POSITIONS = 2048


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo/model"), help="output directory")
    parser.add_argument("--tokens", type=int, default=7_400_000, help="training tokens")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--context", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--muon-lr", type=float, default=6e-3, help="peak rate, layer matrices")
    parser.add_argument("--adamw-lr", type=float, default=4e-3, help="peak rate, the rest")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.tokens < arguments.batch * arguments.context:
        parser.error(f"--tokens {arguments.tokens}: at least one step (batch x context) is needed")
    if not 2 <= arguments.context <= MAX_POSITIONS:
        parser.error(f"--context {arguments.context}: choose 2 to {MAX_POSITIONS}")
    return arguments


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; nothing is added to a prompt by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer so that Transformers 4 loads it too: it lacks the class 5 names."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    write_json(path, config)


def build_model(eos_token_id: int) -> LlamaForCausalLM:
    """A freshly initialised 4.0 M parameter Llama."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def sample_batch(
    stream: torch.Tensor, batch: int, context: int, generator: torch.Generator
) -> torch.Tensor:
    """Random windows of the stream: int64 [batch, context + 1]."""
    starts = torch.randint(len(stream) - context, (batch, 1), generator=generator)
    return stream[starts + torch.arange(context + 1)]


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, context: int) -> float:
    """exp(mean negative log likelihood) over consecutive windows of the stream, in float32."""
    num_windows = (len(stream) - 1) // context
    inputs = stream[: num_windows * context].view(num_windows, context)
    targets = stream[1 : num_windows * context + 1].view(num_windows, context)
    total = 0.0
    for x, y in zip(inputs.split(8), targets.split(8), strict=True):
        logits = model(input_ids=x, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return math.exp(total / targets.numel())


def train(model: LlamaForCausalLM, stream: torch.Tensor, arguments: argparse.Namespace) -> int:
    """Run the training steps; returns the number of tokens seen."""
    tokens_per_step = arguments.batch * arguments.context
    num_steps = arguments.tokens // tokens_per_step
    optimizers = build_optimizers(model, arguments.muon_lr, arguments.adamw_lr, ("embed_tokens",))
    generator = torch.Generator().manual_seed(arguments.seed)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if arguments.compile else loss_of
    progress = Progress(num_steps, "tokens", tokens_per_step, every=20)
    average = float("nan")
    for step in range(num_steps):
        factor = learning_rate_factor(step, num_steps, warmup=40)
        tokens = sample_batch(stream, arguments.batch, arguments.context, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not arguments.float32):
            loss = step_loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        progress.update(step + 1, f"loss {average:.3f}")
    return num_steps * tokens_per_step


def run(arguments: argparse.Namespace) -> None:
    """Train, write and evaluate."""
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    train_texts, held_out_texts = read_corpus()
    tokenizer = train_tokenizer(train_texts)
    stream = encode_stream(tokenizer, train_texts)
    held_out = encode_stream(tokenizer, held_out_texts)
    model = build_model(tokenizer.eos_token_id)
    print(
        f"{len(train_texts)} files, {len(stream)} training tokens, {len(held_out)} held out, "
        f"{model.num_parameters()} parameters",
        flush=True,
    )
    num_tokens = train(model, stream, arguments)

    model.bfloat16()
    model.generation_config.do_sample = False
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out)
    # Measured on the weights as stored, computed in float32.
    held_out_perplexity = perplexity(model.float().eval(), held_out, arguments.context)
    facts = provenance(
        seed=arguments.seed,
        training_files=len(train_texts),
        corpus_tokens=len(stream),
        held_out_tokens=len(held_out),
        tokens_seen=num_tokens,
        parameters=model.num_parameters(),
        held_out_perplexity=round(held_out_perplexity, 2),
        seconds=round(time.perf_counter() - started),
    )
    write_json(arguments.out / "provenance.json", facts)
    print(f"held-out perplexity {held_out_perplexity:.2f}, written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_script(lambda: run(parse_arguments())))
