"""Results as JSON: one document at the end, and one line for each measurement as it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.variants import Variant
from vllm_medusa.errors import UserError
from vllm_medusa.files import read_json

FORMAT = "vllm_medusa.bench/1"
RESULTS, LINES, REPORT = "results.json", "results.jsonl", "report.md"
STEP_COSTS = "step_costs.json"
PLOTS = (
    "speedup_by_batch.png",
    "speedup_by_tokens_per_step.png",
    "acceptance_by_depth.png",
    "latency_by_throughput.png",
)
_OURS = {RESULTS, LINES, REPORT, STEP_COSTS, *PLOTS}


def variant_to_json(variant: Variant, state: VariantState) -> dict[str, Any]:
    """A variant and its state as JSON."""
    speculative = variant.speculative
    if speculative is not None and variant.converted_from is not None:
        # Their directory is removed when the run ends.
        speculative = {**speculative, "model": f"{variant.converted_from}, converted"}
    return {
        "name": variant.name,
        "speculative_config": speculative,
        "llm_options": dict(variant.llm_options),
        "environment": dict(variant.environment),
        "is_lossless": variant.is_lossless,
        "unavailable": state.unavailable,
        "failed": state.failed,
        "startup_s": [info.startup_s for info in state.starts],
    }


def add_line(out: Path, header: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """Append a measurement to the JSON lines, whose first one is a header with the provenance.

    So the measurements of an interrupted run are kept, line by line.
    """
    with (out / LINES).open("a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps({"format": FORMAT, **header}) + "\n")
        file.write(json.dumps(line) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Read the document of a run.

    Raises:
        UserError: it is not such a document.
    """
    if path.is_dir():
        path = path / RESULTS
    results = read_json(path, "the results.json of a run")
    if results.get("format") != FORMAT:
        raise UserError(
            f"{path}: its format is {results.get('format')!r}, not {FORMAT!r}; give a results.json"
        )
    return results


def prepare_out(out: Path, overwrite: bool) -> None:
    """Make the directory of the results, without those of an earlier run.

    Raises:
        UserError: it holds such results and may not be overwritten, or it cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = [path for path in out.iterdir() if path.name in _OURS]
        if earlier and not overwrite:
            raise UserError(
                f"--out {out}: holds the results of a run; name another directory, or overwrite "
                "them with --overwrite"
            )
        for path in earlier:
            path.unlink()
    except OSError as exc:
        raise UserError(f"--out {out}: {exc.strerror}; name another directory") from None
