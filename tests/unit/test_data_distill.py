"""Runs of `distill` with a stand-in for the engine: what is written, kept and refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data_fakes import DEMO_TEXTS, answer_without_engine, fork, make_model
from vllm_medusa import files
from vllm_medusa.data.rows import read_rows
from vllm_medusa.distill import run as module
from vllm_medusa.distill.run import Distilled, DistillSettings, distill
from vllm_medusa.errors import UserError
from vllm_medusa.target.settings import AnswerSettings

SHARD_SIZE = 4
ANSWER_SETTINGS = {field.name for field in dataclasses.fields(AnswerSettings)}


@pytest.fixture
def num_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fakes engine and model; holds the shards that were answered."""
    made: list[int] = []

    def answer(settings: AnswerSettings, *rest: Any) -> Iterator[Any]:
        for index, rows in answer_without_engine(settings, *rest):
            made.append(index)
            yield index, rows

    monkeypatch.setattr(module, "answer_locally", answer)
    monkeypatch.setattr(module, "load_answering_model", lambda settings: make_model())
    return made


Run = Callable[..., Distilled]


@pytest.fixture
def run(tmp_path: Path, num_made: list[int]) -> Run:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in DEMO_TEXTS))

    def start(out: str = "out", **changes: Any) -> Distilled:
        answers = {"model": "fake", "temperature": 1.0}
        own = {key: value for key, value in changes.items() if key in ANSWER_SETTINGS}
        rest = {key: value for key, value in changes.items() if key not in own}
        settings = {"prompts": prompts, "out": tmp_path / out, "shard_size": SHARD_SIZE, **rest}
        return distill(DistillSettings(answers=AnswerSettings(**{**answers, **own}), **settings))

    return start


def content(directory: Path) -> dict[str, Any]:
    """All files of a data set; of its provenance what a run's time does not change."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    provenance = json.loads(found["distill.json"])
    for name in ("seconds", "started", "finished"):
        del provenance[name]
    return found | {"distill.json": provenance}


@pytest.mark.parametrize("shard_format", ["parquet", "jsonl"])
def test_rows_are_the_answers_in_order(tmp_path: Path, run: Run, shard_format: str) -> None:
    done = run(shard_format=shard_format)
    rows = list(read_rows(tmp_path / "out"))
    assert [row.id for row in rows] == [f"line-{line + 1}" for line in range(len(DEMO_TEXTS))]
    for row, text in zip(rows, DEMO_TEXTS, strict=True):
        said = "".join(map(chr, row.token_ids))
        assert said.startswith(text)
        assert said == text + text.rpartition("U:")[2][::-1] + f"{row_seed(row.id)}\n"
        assert row.loss_mask.tolist() == [i >= len(text) for i in range(len(said))]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["distill.json", *(f"part-0000{i}.{shard_format}" for i in range(3))]
    assert done == Distilled(
        num_rows=10,
        num_tokens=sum(len(row.token_ids) for row in rows),
        num_answer_tokens=sum(int(row.loss_mask.sum()) for row in rows),
        num_answers=10,
        num_unanswered=0,
        num_left_out=0,
    )


def row_seed(identity: str) -> int:
    from vllm_medusa.target.settings import answer_seed

    return answer_seed(0, identity, 0) % 10


def test_provenance(tmp_path: Path, run: Run) -> None:
    done = run(top_p=0.5, llm_options={"dtype": "float32"})
    provenance = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert provenance["format"] == "vllm_medusa.distill/1"
    assert provenance["complete"] is True
    assert provenance["counts"] == vars(done)
    assert provenance["num_shards"] == 3
    assert provenance["made_from"]["top_p"] == 0.5
    assert provenance["made_from"]["llm_options"] == {"dtype": "float32"}
    assert {"python", "vllm", "torch", "transformers"} <= set(provenance["versions"])


def test_finished_run_is_not_repeated(tmp_path: Path, run: Run, num_made: list[int]) -> None:
    first = run()
    before = content(tmp_path / "out")
    assert run() == first
    assert num_made == [0, 1, 2]
    assert content(tmp_path / "out") == before


def test_only_missing_shards_are_made(tmp_path: Path, run: Run, num_made: list[int]) -> None:
    run()
    before = content(tmp_path / "out")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    provenance = json.loads((tmp_path / "out" / "distill.json").read_text())
    (tmp_path / "out" / "distill.json").write_text(json.dumps(provenance | {"complete": False}))
    (tmp_path / "out" / ".part-00001.parquet.medusa-tmp").write_text("half a shard")
    run()
    assert num_made == [0, 1, 2, 1]
    assert content(tmp_path / "out") == before


def wait_for_a_shard(folder: Path) -> None:
    until = time.monotonic() + 30
    while not list(folder.glob("part-*")) and time.monotonic() < until:
        time.sleep(0.0005)


def test_killed_at_random_points_the_result_is_the_same(tmp_path: Path, run: Run) -> None:
    """Ten runs in processes of their own are killed, from their first moment to their last."""
    begin = time.monotonic()
    run("undisturbed", shard_size=1, shard_format="jsonl")
    seconds = time.monotonic() - begin
    rng = random.Random(0)
    num_partial = 0
    for number in range(10):
        process = fork(lambda: run("killed", shard_size=1, shard_format="jsonl"))
        if number == 0:  # one at least in the middle of its work
            wait_for_a_shard(tmp_path / "killed")
        else:
            time.sleep(rng.uniform(0, seconds / 3))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if (tmp_path / "killed").exists():
            num_partial += 0 < len(list((tmp_path / "killed").glob("part-*"))) < len(DEMO_TEXTS)
    run("killed", shard_size=1, shard_format="jsonl")
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    assert num_partial  # else nothing was tried


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": 8}, "max_tokens was 512, is 8"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shard_size": 5}, "shard_size was 4, is 5"),
        ({"shard_format": "jsonl"}, "format was 'parquet', is 'jsonl'"),
        ({"llm_options": {"dtype": "half"}}, "llm_options.dtype was None, is 'half'"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, run: Run, change: dict[str, Any], named: str
) -> None:
    run()
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match=f"holds rows made from something else .*{named}"):
        run(**change)
    assert content(tmp_path / "out") == before


def test_other_prompts_or_weights_are_refused(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in DEMO_TEXTS[::-1]))
    with pytest.raises(UserError, match="prompts_sha256 was"):
        run(prompts=other)
    monkeypatch.setattr(module, "load_answering_model", lambda settings: make_model(weights="new"))
    with pytest.raises(UserError, match="model_fingerprint was 'fake', is 'new'"):
        run()


def test_name_of_the_model_and_place_of_the_prompts_may_change(
    tmp_path: Path, run: Run, num_made: list[int]
) -> None:
    run()
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "prompts.jsonl").rename(moved)
    run(prompts=moved, model="another/name")
    assert num_made == [0, 1, 2]


def test_other_content_is_left_alone(tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".thesis.tmp").write_text("precious")
    with pytest.raises(UserError, match=r"not empty and no distill\.json"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".thesis.tmp"]
    (tmp_path / "out" / "distill.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        run()
    with pytest.raises(UserError, match="cannot be written as a directory"):
        run(out="prompts.jsonl")


def test_second_run_on_the_same_directory_is_refused(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any) -> Iterator[Any]:
        with pytest.raises(UserError, match="another distill is writing it"):
            run()
        raise UserError("stop")
        yield

    monkeypatch.setattr(module, "answer_locally", answer)
    with pytest.raises(UserError, match="stop"):
        run()
    assert not (tmp_path / "out").exists()


def test_full_disk_keeps_the_finished_shards(
    tmp_path: Path, run: Run, num_made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("undisturbed")
    num_made.clear()
    sync = os.fsync
    num_calls = 0

    def full(descriptor: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        run()
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["distill.json", "part-00000.parquet"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="2 of 3 shards are missing"):
        read_rows(tmp_path / "out")


def test_bad_lines_are_settled_together(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "mixed.jsonl"
    long = json.dumps({"prompt": "U:" + "x" * 1000})
    far = json.dumps({"prompt": "U:é\u0411"})
    prompts.write_text(f'{{"prompt": "U:a"}}\n\n{long}\n{far}\n{{"prompt": "U:b"}}\n')
    with pytest.raises(UserError) as error:
        run(prompts=prompts)
    assert "line 2: empty; line 3: 1002 tokens, over the limit of 1000; " in str(error.value)
    assert "line 4: token 1041 of the tokenizer is beyond the model's vocabulary" in str(
        error.value
    )
    assert not (tmp_path / "out").exists()
    done = run(prompts=prompts, on_bad="skip")
    assert (done.num_rows, done.num_left_out) == (2, 3)
    assert [row.id for row in read_rows(tmp_path / "out")] == ["line-1", "line-5"]
    provenance = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert [text.partition(":")[0] for text in provenance["left_out"]] == [
        "line 2",
        "line 3",
        "line 4",
    ]
    prompts.write_text(long + "\n")
    with pytest.raises(UserError, match="no usable prompt"):
        run(prompts=prompts, on_bad="skip")


def test_conversation_needs_a_chat_template(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.tokenizer.chat_template = None
    monkeypatch.setattr(module, "load_answering_model", lambda settings: model)
    prompts = tmp_path / "chats.jsonl"
    prompts.write_text('{"prompt": "U:a"}\n{"turns": ["b", "c"]}\n')
    with pytest.raises(UserError, match="line 2 is a conversation, and fake has no chat template"):
        run(prompts=prompts)


def test_turns_without_room_are_counted(tmp_path: Path, run: Run) -> None:
    prompts = tmp_path / "chats.jsonl"
    turns = ["a", "b" * 900, "c" * 900, "d"]
    prompts.write_text(json.dumps({"turns": turns}) + "\n")
    done = run(prompts=prompts)
    assert (done.num_rows, done.num_answers, done.num_unanswered) == (1, 2, 2)


@pytest.mark.parametrize("break_it", ["swap", "drop", "double"])
def test_shard_with_lost_or_doubled_rows_is_noticed(
    tmp_path: Path, run: Run, break_it: str
) -> None:
    run(shard_format="jsonl")
    path = tmp_path / "out" / "part-00001.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines = {
        "swap": lines[::-1],
        "drop": lines[:-1],
        "double": [*lines, lines[-1]],
    }[break_it]
    path.write_text("".join(lines))
    provenance = json.loads((tmp_path / "out" / "distill.json").read_text())
    (tmp_path / "out" / "distill.json").write_text(json.dumps(provenance | {"complete": False}))
    with pytest.raises(UserError, match=r"part-00001.jsonl: .*remove the file and run again"):
        run(shard_format="jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"max_prompt_tokens": -3}, "--max-prompt-tokens -3"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"shard_size": 0}, "--shard-size 0"),
        ({"num_workers": 2}, "--num-workers 2: only with --ray"),
        ({"llm_options": {"tensor_parallel_size": "2"}}, "tensor_parallel_size is '2'"),
        ({"llm_options": {"seed": 1}}, "--llm-options: 'seed' is set by --seed"),
    ],
)
def test_setting_out_of_range_is_named(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(**change)
