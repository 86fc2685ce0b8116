"""Offline batches with draft trees on a Ray cluster: Ray Data's own vLLM processor.

Reads JSON lines or Parquet, and writes their columns with the answers. Nothing here is about trees
but `speculative_config`. Ray Data notes each file of finished rows (its checkpoints), so the same
command goes on where a killed one ended; and Ray starts engines again that die. How to use it, and
what was tried: docs/ray.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet

from vllm_medusa.engines.ray_cluster import LOCAL, ray_cluster
from vllm_medusa.errors import UserError, shown
from vllm_medusa.files import locked_directory, read_json, write_json

ID, PROMPT, ANSWER, TOKENS = "id", "prompt", "answer", "answer_token_ids"
SETTINGS_FILE, ROWS, FINISHED, NUMBERED = "batch.json", "rows", "finished", "prompts.parquet"
#: Of tasks that read, number or write rows: they take little beside an engine.
LIGHT = {"num_cpus": 0.25}


@dataclass(frozen=True)
class Batch:
    """What the command line asks for.

    Attributes:
        model: directory or hub name, the same on every machine.
        prompts: a file or folder of JSON lines or Parquet with a column `prompt`, on a file system
            that all machines share; `id` is made if it is not there.
        out: where to write, on such a file system.
        engine_kwargs: arguments of vLLM's engine, as of `vllm.LLM`.
        sampling: arguments of `vllm.SamplingParams`.
        engines: at once.
        rows_per_file: rows that are finished together.
        format: of the files, `jsonl` or `parquet`.
    """

    model: str
    prompts: Path
    out: Path
    engine_kwargs: dict[str, Any]
    sampling: dict[str, Any]
    engines: int
    rows_per_file: int
    format: str

    def decides_rows(self) -> dict[str, Any]:
        """What an interrupted run must share with the one that goes on."""
        return {
            "model": self.model,
            "prompts_sha256": sha256_of(self.prompts),
            "engine_kwargs": self.engine_kwargs,
            "sampling": self.sampling,
            "format": self.format,
        }


@dataclass(frozen=True)
class Prompts:
    """Rows to answer: where they are, their columns, and how many."""

    path: Path
    columns: list[str]
    num_rows: int


def main() -> None:
    """Answer what is not answered yet, then count what is there."""
    args = arguments()
    try:
        batch = Batch(**{name: vars(args)[name] for name in Batch.__dataclass_fields__})
        with locked_directory(batch.out, "batch"):
            check_settings(batch)
            prompts = prepared_prompts(batch)
            begin = time.monotonic()
            if num_written(batch) != prompts.num_rows:
                with ray_cluster(args.ray, batch.engines) as ray:
                    answer(ray, batch, prompts)
            num_tokens = check_rows(batch, prompts)
    except UserError as error:
        raise SystemExit(f"batch_on_ray: error: {error}") from None
    seconds = time.monotonic() - begin
    print(f"{batch.out / ROWS}: {prompts.num_rows} rows, {num_tokens} tokens; {seconds:.1f} s")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=absolute_if_here)
    parser.add_argument("--prompts", required=True, type=lambda text: Path(text).absolute())
    parser.add_argument("--out", required=True, type=lambda text: Path(text).absolute())
    parser.add_argument("--engine-kwargs", type=json.loads, default={}, help="as of vllm.LLM")
    parser.add_argument(
        "--sampling",
        type=json.loads,
        default={"temperature": 0, "max_tokens": 64},
        help="arguments of vllm.SamplingParams (greedy, 64 tokens)",
    )
    parser.add_argument("--engines", type=int, default=1, help="at once (1)")
    parser.add_argument("--rows-per-file", type=int, default=64, help="finished together (64)")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--ray", default=LOCAL, help="HOST:PORT or auto (a cluster started here)")
    return parser.parse_args()


def absolute_if_here(name: str) -> str:
    """A model's directory by its whole path, as workers run elsewhere; a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def check_settings(batch: Batch) -> None:
    """Go on only with the settings that the folder was begun with."""
    path, now = batch.out / SETTINGS_FILE, batch.decides_rows()
    if not path.exists():
        write_json(path, now)
        return
    before = read_json(path, "the settings of a batch")
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(
                f"{batch.out}: was begun with {name}={shown(before.get(name))}, now it is "
                f"{shown(now[name])}; name a new directory"
            )


def prepared_prompts(batch: Batch) -> Prompts:
    """The rows with ids of their own: by these Ray Data knows what is finished."""
    try:
        return with_ids(batch)
    except pyarrow.ArrowInvalid as exc:
        reason = str(exc).splitlines()[0]
        raise UserError(f"{batch.prompts}: cannot be read ({reason}); correct it") from None


def with_ids(batch: Batch) -> Prompts:
    """The rows as they are, if they have ids; else a numbered copy."""
    rows = pyarrow.dataset.dataset(batch.prompts, format=format_of(batch.prompts))
    if PROMPT not in rows.schema.names:
        raise UserError(f"{batch.prompts}: no column {PROMPT!r}, only {rows.schema.names}")
    if ID in rows.schema.names:
        ids = rows.to_table(columns=[ID])[ID]
        if len(pyarrow.compute.unique(ids)) < len(ids):
            raise UserError(f"{batch.prompts}: the same id twice; give each row an id of its own")
        return Prompts(batch.prompts, rows.schema.names, len(ids))
    num_rows = 0
    schema = rows.schema.insert(0, pyarrow.field(ID, pyarrow.string()))
    with pyarrow.parquet.ParquetWriter(batch.out / NUMBERED, schema) as writer:
        for some in rows.to_batches():
            ids = pyarrow.array([f"row-{num_rows + index}" for index in range(some.num_rows)])
            columns = [ids, *some.columns]
            writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))
            num_rows += some.num_rows
    return Prompts(batch.out / NUMBERED, schema.names, num_rows)


def files_of(path: Path) -> list[Path]:
    """A file, or those of a folder; at least one."""
    found = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    if not found:
        raise UserError(f"{path}: no such file, or an empty folder; give JSON lines or Parquet")
    return found


def format_of(path: Path) -> str:
    """`json` or `parquet`, of a file or of the first in a folder."""
    return "parquet" if files_of(path)[0].suffix == ".parquet" else "json"


def sha256_of(path: Path) -> str:
    """Of what a file holds, or the files of a folder."""
    digest = hashlib.sha256()
    for file in files_of(path):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def answer(ray: Any, batch: Batch, prompts: Prompts) -> None:
    """Write the rows that are not written yet, and a note of each file of them."""
    from ray.data import DataContext, read_json, read_parquet
    from ray.data.checkpoint import CheckpointConfig
    from ray.exceptions import RayError

    DataContext.get_current().checkpoint_config = CheckpointConfig(
        ID, str(batch.out / FINISHED), delete_checkpoint_on_success=False
    )
    path, out = str(prompts.path), str(batch.out / ROWS)
    if format_of(prompts.path) == "parquet":
        rows = read_parquet(path, **LIGHT)
    else:
        rows = read_json(path, lines=True, **LIGHT)
    answered = processor(ray, batch, prompts.columns)(
        rows.repartition(target_num_rows_per_block=batch.rows_per_file)
    )
    try:
        if batch.format == "parquet":
            answered.write_parquet(out, ray_remote_args=LIGHT)
        else:
            answered.write_json(out, ray_remote_args=LIGHT, orient="records", lines=True)
    except RayError as exc:
        raise UserError(
            f"Ray failed: {str(exc).strip().splitlines()[-1]}; finished rows are kept: run the "
            "same command again to continue"
        ) from None


def processor(ray: Any, batch: Batch, columns: list[str]) -> Any:
    """Ray Data's processor: a pool of vLLM engines, between a row's request and its result."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    has_gpus = bool(ray.cluster_resources().get("GPU"))
    config = vLLMEngineProcessorConfig(
        model_source=batch.model,
        engine_kwargs=batch.engine_kwargs,
        # Ray's default is a GPU for each.
        placement_group_config=None if has_gpus else {"bundles": [{"CPU": 1}]},
        concurrency=(batch.engines, batch.engines),
        batch_size=batch.rows_per_file,
        # vLLM can send metrics to Ray's endpoint only where `ray[serve]` is installed too.
        log_engine_metrics=False,
        # The engine itself makes tokens of prompts and texts of tokens.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    sampling = batch.sampling

    def request(row: dict[str, Any]) -> dict[str, Any]:
        return {PROMPT: row[PROMPT], "sampling_params": sampling}

    def result(row: dict[str, Any]) -> dict[str, Any]:
        given = {name: row[name] for name in columns}
        return {**given, ANSWER: row["generated_text"], TOKENS: row["generated_tokens"]}

    return build_processor(
        config,
        preprocess=request,
        postprocess=result,
        preprocess_map_kwargs=LIGHT,
        postprocess_map_kwargs=LIGHT,
    )


def num_written(batch: Batch) -> int:
    """Rows in finished files; others may be half written."""
    notes = batch.out / FINISHED
    if not notes.exists():
        return 0
    paths = [path for path in notes.iterdir() if ".pending" not in path.suffixes]
    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)


def check_rows(batch: Batch, prompts: Prompts) -> int:
    """Count the answers' tokens; every row must be there, and once."""
    format_ = "json" if batch.format == "jsonl" else "parquet"
    rows = pyarrow.dataset.dataset(batch.out / ROWS, format=format_)
    written = rows.to_table(columns=[ID, TOKENS])
    num_different = len(pyarrow.compute.unique(written[ID]))
    if not written.num_rows == num_different == prompts.num_rows:
        raise UserError(
            f"{batch.out / ROWS}: {written.num_rows} rows of {num_different} ids for "
            f"{prompts.num_rows} prompts; did something else write there? Name a new directory"
        )
    return sum(map(len, written[TOKENS].to_pylist()))


if __name__ == "__main__":
    main()
