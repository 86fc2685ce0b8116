"""How large the dynamic trees are while the number of requests jumps: 1, then 32, then 1 again.

    python examples/bench_load_steps.py [--parameters 152e6] [--out results.json] [--plot sizes.png]

An engine in this process decodes one long request. After a third of its text 31 short ones come
at once; when they are done, it goes on alone. The plot has one point for each step in which all
requests decode: the draft nodes of a request, on average. Give it the machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from inflate import inflate
from transformers import AutoModelForCausalLM

from vllm_medusa.reporting.plots import new_figure, save_figure
from vllm_medusa.reporting.provenance import cpu_name

DEMO = Path(__file__).resolve().parents[1] / "demo"
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True)
class DecodingStep:
    """A step in which no request had a prompt to compute.

    Attributes:
        at_s: seconds since the first request was added.
        ms: that the step took.
        num_requests: that decoded.
        num_nodes: draft nodes of all of them together, for the next step.

    """

    at_s: float
    ms: float
    num_requests: int
    num_nodes: int


def main() -> None:
    """Measure, print and draw."""
    args = arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        small = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
        inflate(small, args.parameters).save_pretrained(folder)
        steps = measure(folder, args)
    for name, phase in phases(steps):
        nodes = [step.num_nodes / step.num_requests for step in phase]
        ms = statistics.median(step.ms for step in phase)
        print(f"{name:14} {len(phase):4} steps of {ms:.1f} ms, {statistics.mean(nodes):.1f} nodes")
    if args.out:
        settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
        rows = [asdict(step) for step in steps]
        result = {"cpu": cpu_name(), "settings": settings, "steps": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(steps, args.plot)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=152e6)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--long", type=int, default=600, help="tokens of the long request")
    parser.add_argument("--short", type=int, default=96, help="tokens of the others")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def measure(model: str, args: argparse.Namespace) -> list[DecodingStep]:
    """Run the requests; return the steps that decoded."""
    from vllm import LLM, SamplingParams

    with (DEMO / "prompts.jsonl").open(encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines][: args.requests]
    llm = LLM(
        model,
        tokenizer=str(DEMO / "model"),
        dtype=args.dtype,
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=2**29,
        max_num_seqs=args.requests,
        speculative_config={"method": "medusa", "model": str(DEMO / "heads")},
    )
    engine: Any = llm.llm_engine
    engine.add_request("long", prompts[0], SamplingParams(max_tokens=args.long, **GREEDY))
    short = SamplingParams(max_tokens=args.short, **GREEDY)
    waiting = dict(enumerate(prompts[1:]))
    steps: list[DecodingStep] = []
    num_emitted: dict[str, int] = {}
    start, nodes_before = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        if waiting and num_emitted.get("long", 0) >= args.long // 3:
            for index, prompt in waiting.items():
                engine.add_request(str(index), prompt, short)
            waiting.clear()
        begin = time.perf_counter()
        outputs = engine.step()
        end = time.perf_counter()
        is_decoding = all(num_emitted.get(output.request_id) for output in outputs)
        num_emitted |= {o.request_id: len(o.outputs[0].token_ids) for o in outputs}
        (counted,) = llm.collective_rpc("medusa_counters")
        num_nodes = counted["nodes_drafted"] - nodes_before
        nodes_before = counted["nodes_drafted"]
        if is_decoding and outputs:
            steps.append(DecodingStep(end - start, 1000 * (end - begin), len(outputs), num_nodes))
    return steps


def phases(steps: list[DecodingStep]) -> list[tuple[str, list[DecodingStep]]]:
    """Return the steps before the other requests came, with all, with some, and after them."""
    most = max(step.num_requests for step in steps)
    crowded = [index for index, step in enumerate(steps) if step.num_requests > 1]
    first, last = (crowded[0], crowded[-1]) if crowded else (len(steps), len(steps))
    found = {
        "alone": steps[:first],
        f"{most} requests": [step for step in steps if step.num_requests == most > 1],
        "fewer": [step for step in steps[first:last] if 1 < step.num_requests < most],
        "alone again": steps[last + 1 :],
    }
    return [(name, phase) for name, phase in found.items() if phase]


def draw(steps: list[DecodingStep], path: Path) -> None:
    """Plot requests and nodes over the time."""
    figure, (axes,) = new_figure(("seconds", "draft nodes of a request"), size=(8, 4))
    times = [step.at_s for step in steps]
    nodes = [step.num_nodes / step.num_requests for step in steps]
    axes.plot(times, nodes, ".", ms=3, color="tab:blue", label="draft nodes of a request")
    others = axes.twinx()
    others.set_ylabel("requests")
    requests = [step.num_requests for step in steps]
    others.step(times, requests, where="post", color="tab:orange", label="requests")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
