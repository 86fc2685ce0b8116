"""What typical acceptance gains, and what it changes in the text, against lossless sampling.

    python examples/bench_typical.py [--temperature 0.8] [--max-tokens 128] [--out results.json]

One engine answers the demo's prompts; each rule is a request's own option. Printed are tokens per
step with quartiles over the prompts; the mean log-likelihood of a token under the target at that
temperature; distinct n-grams over all texts; and the share of 4-grams that their text had before.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_medusa.engines.engine import Run, start_engine
from vllm_medusa.reporting.provenance import cpu_name

DEMO = Path(__file__).resolve().parents[1] / "demo"
RULES: dict[str, dict[str, Any]] = {
    "lossless": {"acceptance": "lossless"},
    "typical (0.09, 0.3)": {"acceptance": "typical"},
    "typical (0.3, 0.6)": {
        "acceptance": "typical",
        "posterior_threshold": 0.3,
        "posterior_alpha": 0.6,
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tree", default="cpu-16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with (DEMO / "prompts.jsonl").open(encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines][: args.prompts]
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    options = {
        "model": str(DEMO / "model"),
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "speculative_config": {"method": "medusa", "model": str(DEMO / "heads"), "tree": args.tree},
    }
    found = {}
    sampling = {"temperature": args.temperature, "seed": 0, "ignore_eos": True}
    with start_engine(options, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as engine:
        for name, rule in RULES.items():
            run = engine.run(prompts, args.max_tokens, **sampling, extra_args={"medusa": rule})
            found[name] = {
                "tokens_per_step": quartiles(per_prompt(run)),
                "log_likelihood": log_likelihood(model, prompts, run, args.temperature),
                **{f"distinct_{n}": distinct(run.token_ids, n) for n in (1, 2, 3)},
                "repetition": repetition(run.token_ids),
            }
            print(f"{name:20} " + "  ".join(f"{k} {shown(v)}" for k, v in found[name].items()))
    if args.out:
        settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
        result = {"cpu": cpu_name(), "settings": settings, "rules": found}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def per_prompt(run: Run) -> list[float]:
    """Tokens per step of each prompt, the prompt's own step left out."""
    return [sum(times.emitted[1:]) / len(times.emitted[1:]) for times in run.requests]


def quartiles(values: Sequence[float]) -> list[float]:
    """Mean, lower and upper quartile."""
    low, _, high = statistics.quantiles(values, n=4)
    return [statistics.mean(values), low, high]


@torch.inference_mode()
def log_likelihood(model: Any, prompts: Sequence[str], run: Run, temperature: float) -> float:
    """Mean log-likelihood of an emitted token under the target at that temperature."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    total = 0.0
    for prompt, tokens in zip(prompts, run.token_ids, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids + tokens])
        logits = model(ids).logits[0, -len(tokens) - 1 : -1] / temperature
        logprobs = logits.log_softmax(dim=-1)
        total += float(logprobs[torch.arange(len(tokens)), torch.tensor(tokens)].sum())
    return total / run.num_tokens


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts over all their n-grams."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams)


def repetition(texts: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of the n-grams that came before in the same text."""
    all_grams = [ngrams(text, n) for text in texts]
    return 1 - sum(len(set(grams)) for grams in all_grams) / sum(map(len, all_grams))


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return all n-grams of a text."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def shown(value: Any) -> str:
    """Return a figure, or a mean with its quartiles."""
    if isinstance(value, list):
        return "{:.2f} ({:.2f} to {:.2f})".format(*value)
    return f"{value:.3f}"


if __name__ == "__main__":
    main()
