"""`vllm-medusa distill` with the real engine: whose answers the rows hold, and killed runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.command_line import DEMO_HEADS, DEMO_MODEL, REPO, environment, run_tool
from vllm_medusa.cli import main as cli
from vllm_medusa.data.prompts import Prompt, read_prompts
from vllm_medusa.data.rows import Row, read_rows

DEMO_PROMPTS = REPO / "demo" / "prompts.jsonl"
TEMPLATE = (
    "{% for m in messages %}"
    "{{ m['role'] }}:<|endoftext|>{{ m['content'] }}<|endoftext|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:<|endoftext|>{% endif %}"
)
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
MAX_TOKENS = 24
#: A second end token, so that some answers end before `MAX_TOKENS`.
END_TEXT = "."


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template, so that it answers, if not to the point."""
    directory = tmp_path_factory.mktemp("chat-model")
    for path in DEMO_MODEL.iterdir():
        (directory / path.name).symlink_to(path)
    (end_token,) = AutoTokenizer.from_pretrained(DEMO_MODEL)(END_TEXT)["input_ids"]
    (directory / "generation_config.json").unlink()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end_token]}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and conversations of one to three turns, some of them bad."""
    texts = [prompt.text or "" for prompt in read_prompts(DEMO_PROMPTS)]
    records: list[dict[str, Any]] = [{"prompt": text} for text in texts[:7]]
    records += [
        {"question_id": 81, "category": "coding", "turns": ["def add(", "class A:", "import"]},
        {"messages": [{"role": "user", "content": "def f(x):"}]},
        {
            "conversations": [
                {"from": "system", "value": "# Python"},
                {"from": "human", "value": "for i in"},
                {"from": "gpt", "value": "this is not the target's"},
                {"from": "human", "value": "while"},
            ]
        },
        {"prompt": texts[0] * 20},
    ]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n{}\n")
    return path


@pytest.fixture(scope="module")
def command(chat_model: Path, prompts: Path) -> Callable[..., list[str]]:
    """The command line of a run."""

    def build(out: Path, *extra: str, **options: Any) -> list[str]:
        line = f"distill --model {chat_model} --prompts {prompts} --out {out} --on-bad skip"
        line += f" --max-tokens {MAX_TOKENS} --shard-size 2"
        return [*line.split(), "--llm-options", json.dumps({**ENGINE, **options}), *extra]

    return build


def start(arguments: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_medusa.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
    )


def finish(arguments: list[str], **env: str) -> tuple[int, str, str]:
    """Exit status and outputs of a run."""
    with start(arguments, **env) as process:
        out, err = process.communicate()
    return process.returncode, out, err


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("part-*"))}


@pytest.fixture(scope="module")
def greedy(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., list[str]]
) -> tuple[Path, str, str]:
    """A run of greedy answers: its directory and what it said."""
    out = tmp_path_factory.mktemp("greedy") / "rows"
    done = run_tool(*command(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


def answers_of(rows: list[Row]) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Every answer, with all that came before it, by prompt."""
    found: dict[str, list[tuple[list[int], list[int]]]] = {}
    for row in rows:
        tokens, mask = row.token_ids.tolist(), row.loss_mask.astype(int)
        starts = np.flatnonzero(np.diff(mask, prepend=0) == 1)
        ends = np.flatnonzero(np.diff(mask, append=0) == -1) + 1
        found.setdefault(row.id.partition("#")[0], []).extend(
            (tokens[:start], tokens[start:end]) for start, end in zip(starts, ends, strict=True)
        )
    return found


def answers_of_transformers(
    directory: Path, prompt: Prompt
) -> Iterator[tuple[list[int], list[int]]]:
    """Oracle: the same by `transformers`, one request at a time."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def answer(token_ids: list[int]) -> list[int]:
        generated = model.generate(
            torch.tensor([token_ids]), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        return list(generated[0, len(token_ids) :].tolist())

    if prompt.text is not None:
        token_ids = tokenizer(prompt.text)["input_ids"]
        yield token_ids, answer(token_ids)
    messages: list[dict[str, str]] = []
    for turn in prompt.turns:
        if turn.role == "assistant":
            continue
        messages.append({"role": turn.role, "content": turn.content})
        if turn.role == "user":
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            said = answer(token_ids)
            yield token_ids, said
            text = tokenizer.decode(said, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": text})


@pytest.mark.engine
def test_rows_are_the_targets_own_answers(
    chat_model: Path, prompts: Path, greedy: tuple[Path, str, str]
) -> None:
    out, said, progress = greedy
    usable = read_prompts(prompts, on_bad="skip")[:-1]  # the last is over the length limit
    rows = list(read_rows(out))
    found = answers_of(rows)
    assert found == {
        prompt.id: list(answers_of_transformers(chat_model, prompt)) for prompt in usable
    }
    assert [len(found[identity]) for identity in ("81", "line-9", "line-10")] == [3, 1, 2]
    assert any(row.num_answers > 1 for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    said_last = [
        tokenizer.decode(answer[-1:])
        for answers in found.values()
        for _, answer in answers
        if len(answer) < MAX_TOKENS
    ]
    assert len(said_last) > 3
    assert set(said_last) == {END_TEXT}
    assert f"{out}: {len(rows)} rows, 13 answers of" in said
    assert said.endswith("; 3 lines left out\n")
    assert "line 12 left out: empty" in progress
    assert "line 13 left out: one of the keys" in progress
    assert "line 11 left out: " in progress
    assert "tokens, over the limit of 488" in progress
    assert "tokens/s" in progress
    assert "Traceback" not in progress


@pytest.mark.engine
def test_prompts_that_do_not_fit_into_one_step_are_sampled(tmp_path: Path) -> None:
    """vLLM ends if a CPU samples with a seed after a part of a prompt: prompts stay whole."""
    options = json.dumps({**ENGINE, "max_num_batched_tokens": ENGINE["max_model_len"]})
    done = run_tool(
        *("distill", "--model", DEMO_MODEL, "--prompts", DEMO_PROMPTS, "--out", tmp_path / "rows"),
        *("--temperature", "0.8", "--max-tokens", "4", "--llm-options", options),
    )
    assert done.returncode == 0, done.stderr
    assert "48 rows, 48 answers" in done.stdout


@pytest.mark.engine
@pytest.mark.slow
def test_trees_speed_up_distillation_without_changing_it(
    tmp_path: Path, command: Callable[..., list[str]], greedy: tuple[Path, str, str]
) -> None:
    tree = {"method": "medusa", "model": str(DEMO_HEADS), "tree": "cpu-8"}
    status, _, progress = finish(command(tmp_path / "rows", speculative_config=tree))
    assert status == 0, progress
    assert shards(tmp_path / "rows") == shards(greedy[0])


#: A run whose dozen shards take about a second each; of options given twice the last one counts.
SAMPLED = (
    *("--temperature", "0.8", "--top-p", "0.95", "--seed", "5", "--max-tokens", "96"),
    *("--model", str(DEMO_MODEL), "--prompts", str(DEMO_PROMPTS), "--shard-size", "4"),
)


@pytest.fixture(scope="module")
def sampled(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., list[str]]
) -> dict[str, bytes]:
    """The shards of an undisturbed run that samples its answers."""
    out = tmp_path_factory.mktemp("sampled") / "rows"
    status, _, progress = finish(command(out, *SAMPLED))
    assert status == 0, progress
    assert len(shards(out)) == 12
    return shards(out)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_ten_times_the_result_is_the_same(
    tmp_path: Path,
    command: Callable[..., list[str]],
    sampled: dict[str, bytes],
) -> None:
    out = tmp_path / "rows"
    rng = random.Random(1)
    arguments = command(out, *SAMPLED)
    for kill in range(10):
        with start(arguments) as process:
            present = len(shards(out))
            wait_for_shards = rng.random() < 0.5 and present < len(sampled) - 1
            deadline = time.monotonic() + 120
            while wait_for_shards and len(shards(out)) == present and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 2 if wait_for_shards else 20))
            engines = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
        _, left = psutil.wait_procs(engines, timeout=30)
        assert not left, f"kill {kill}: the engine outlived its caller"
        assert all(shards(out)[name] == sampled[name] for name in shards(out))
    status, _, progress = finish(arguments)
    assert status == 0, progress
    assert shards(out) == sampled
    assert sorted(path.name for path in out.iterdir()) == ["distill.json", *sampled]


@pytest.mark.engine
@pytest.mark.slow
def test_ray_gives_the_same_rows(
    tmp_path: Path, command: Callable[..., list[str]], sampled: dict[str, bytes]
) -> None:
    arguments = command(tmp_path / "rows", *SAMPLED, "--ray", "--num-workers", "2")
    status, _, progress = finish(arguments)
    assert status == 0, progress
    assert shards(tmp_path / "rows") == sampled
    assert "Traceback" not in progress


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--ray",)])
def test_option_that_vllm_refuses_is_one_line(
    tmp_path: Path, command: Callable[..., list[str]], extra: tuple[str, ...]
) -> None:
    status, said, err = finish(command(tmp_path / "rows", *extra, dtype="float33"))
    assert (status, said) == (2, "")
    (message,) = [line for line in err.splitlines() if "error:" in line]
    assert message.startswith("vllm-medusa distill: error: vLLM refuses ")
    assert "float" in message
    assert "Traceback" not in err
    assert not (tmp_path / "rows").exists()


@pytest.mark.engine
@pytest.mark.slow
def test_engine_that_dies_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, command: Callable[..., list[str]], sampled: dict[str, bytes]
) -> None:
    out = tmp_path / "rows"
    with start(command(out, *SAMPLED)) as process:
        while not shards(out) and process.poll() is None:
            time.sleep(0.01)
        for engine in psutil.Process(process.pid).children(recursive=True):
            engine.kill()
        _, err = process.communicate()
    assert process.returncode == 2
    assert "the process was killed by signal 9" in err
    assert "run the same command again to continue" in err
    assert "Traceback" not in err
    assert finish(command(out, *SAMPLED))[0] == 0
    assert shards(out) == sampled


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()


def other_vocabulary(model: Path) -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 4000}))


def no_context(model: Path) -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    del config["max_position_embeddings"]
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("break_model", "extra", "message"),
    [
        (None, ["--model", "absent/"], "model 'absent/': no such file or directory"),
        (no_tokenizer, [], "no tokenizer that can be loaded"),
        (other_vocabulary, [], "has 4096 tokens, the model 4000: it belongs to another model"),
        (no_context, [], "gives no length of the context"),
        (None, ["--max-tokens", "3000"], "exceed the context of"),
        (None, ["--max-prompt-tokens", "2000", "--max-tokens", "49"], "exceed the context of"),
        (None, ["--max-prompt-tokens", "20"], "line 1: 169 tokens, over the limit of 20; "),
        (None, ["--llm-options", '{"max_model_len": "2k"}'], "max_model_len is '2k'"),
        (None, ["--prompts", "absent.jsonl"], "prompts 'absent.jsonl': No such file"),
        (None, ["--ray", "127.0.0.1:1"], "no Ray cluster found there"),
        (None, ["--ray", "nowhere"], "no Ray cluster found there"),
        (None, ["--shard-size", "0"], "--shard-size 0"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    break_model: Callable[[Path], None] | None,
    extra: list[str],
    message: str,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in DEMO_MODEL.iterdir():
        (model / path.name).symlink_to(path)
    if break_model:
        break_model(model)
    out = tmp_path / "rows"
    given = ["--model", str(model), "--prompts", str(DEMO_PROMPTS)]
    assert cli.main(["distill", *given, "--out", str(out), *extra]) == 2
    err = capsys.readouterr().err.splitlines()
    (error,) = [line for line in err if "error:" in line]
    assert error.startswith("vllm-medusa distill: error: ")
    assert message in error
    assert not out.exists()


def test_mistake_on_the_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["distill", "--model", "m", "--format", "csv"])
    assert capsys.readouterr().err.count("\n") == 1
