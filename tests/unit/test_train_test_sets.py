"""Finished heads measured on other prompts: `--test-data`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training import counting_rows, make_settings, save_llama, write_rows
from vllm_medusa.acceptance.ranks import RankMeter
from vllm_medusa.acceptance.statistics import simulate
from vllm_medusa.acceptance.texts import text_of_row
from vllm_medusa.cli import main as cli
from vllm_medusa.data.rows import Row, read_rows
from vllm_medusa.errors import UserError
from vllm_medusa.training.loop import Training
from vllm_medusa.training.run import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("train")
    model = save_llama(directory / "model")
    return {"model": str(model), "data": str(write_rows(directory / "data", counting_rows(60)))}


def rows_by_threes(count: int, step: int = 1) -> list[Row]:
    """Rows of two categories that count by threes, so no prompt is one of `counting_rows`."""
    return [
        Row(
            f"row {index}",
            ((step * index + 3 * np.arange(20)) % 50).astype(np.int32),
            np.arange(20) >= 4,
            "ab"[index % 2],
        )
        for index in range(count)
    ]


def write_test_data(directory: Path, rows: list[Row], temperature: float) -> Path:
    """A data set as `distill` leaves it."""
    write_rows(directory, rows)
    made = {"num_shards": -(-len(rows) // 16), "made_from": {"temperature": temperature}}
    (directory / "distill.json").write_text(json.dumps(made))
    return directory


def test_finished_heads_are_measured_on_test_data(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By temperature and category; heads and trees are those of a run without test data."""
    greedy = write_test_data(tmp_path / "greedy", rows_by_threes(20), 0.0)
    sampled = write_test_data(tmp_path / "sampled", rows_by_threes(20, step=2), 0.8)
    settings = make_settings(**inputs, steps=3)
    train(settings, tmp_path / "alone")
    command = ["train", "--model", inputs["model"], "--data", inputs["data"], "--steps", "3"]
    command += ["--num-heads", "3", "--batch-tokens", "96", "--lr", "0.01", "--eval-every", "3"]
    command += ["--held-out", "0.1", "--dtype", "float32"]
    command += ["--test-data", str(greedy), str(sampled), "--out", str(tmp_path / "heads")]
    assert cli.main(command) == 0
    assert f"on {sampled}, temperature 0.8:" in capsys.readouterr().out
    for name in ("medusa_tree.json", "medusa_lm_head.safetensors"):
        same = [(tmp_path / heads / name).read_bytes() for heads in ("alone", "heads")]
        assert same[0] == same[1]
    report = json.loads((tmp_path / "heads" / "report.json").read_text())
    first, second = report["tested"]
    assert (first["data"], first["temperature"]) == (str(greedy), 0.0)
    assert (second["data"], second["temperature"]) == (str(sampled), 0.8)
    assert first["with_loops"]["prompts"] == 20
    for figures in report["tested"]:
        parts = figures["categories"]
        assert list(parts) == ["a", "b"]
        for key in ("with_loops", "without_loops"):
            positions = [part[key]["positions"] for part in parts.values()]
            assert sum(positions) == figures[key]["positions"]
            lengths = [part[key]["acceptance_length"]["tree of 4"] for part in parts.values()]
            low, high = sorted(lengths)
            assert low <= figures[key]["acceptance_length"]["tree of 4"] <= high
    page = (tmp_path / "heads" / "report.md").read_text()
    assert f"## `{sampled}`" in page
    assert "| category | prompts |" in page
    # The figures are those of the test rows themselves, along the trees of the held-out rows.
    tree = json.loads((tmp_path / "heads" / "medusa_tree.json").read_text())
    paths = [tuple(path) for path in tree["paths"]]
    training = Training(settings)
    written = load_file(tmp_path / "heads" / "medusa_lm_head.safetensors")
    with torch.no_grad():
        for head in range(3):
            training._heads.blocks.weight[0, head] = written[f"{head}.0.linear.weight"]
            training._heads.blocks.bias[0, head] = written[f"{head}.0.linear.bias"]
    texts = [text_of_row(row, set()) for row in read_rows(greedy)]
    found = RankMeter(training.target, training._heads).measure(texts, lambda _: None)
    length = simulate([item.ranks for item in found], paths[:4])
    assert first["with_loops"]["acceptance_length"]["tree of 4"] == round(length, 4)


def test_prompts_of_the_training_are_not_measured(
    inputs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = counting_rows(60)[:7]
    both = write_test_data(tmp_path / "both", known + rows_by_threes(9), 0.0)
    report = train(make_settings(**inputs, steps=2, test_data=(both,)), tmp_path / "heads")
    (test,) = report["tested"]
    assert (test["rows_left_out"], test["with_loops"]["prompts"]) == (7, 9)
    assert "7 of 16 rows left out" in caplog.text
    only_known = write_test_data(tmp_path / "known", known, 0.0)
    with pytest.raises(UserError, match=r"--test-data .*known: --data has the prompts of all 7"):
        train(make_settings(**inputs, test_data=(only_known,)), tmp_path / "other")
    with pytest.raises(UserError, match="with test data fingerprints"):
        train(make_settings(**inputs, steps=2), tmp_path / "heads")


def test_unusable_test_data_is_refused_before_training(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    rows = rows_by_threes(4)
    beyond = [dataclasses.replace(row, token_ids=row.token_ids + 50) for row in rows]
    short = [
        Row(str(n), np.array([n, 3 + n, 1, 2], np.int32), np.array([False, False, True, True]))
        for n in range(3)
    ]
    for name, data, reason in (
        ("beyond", beyond, r"row 'row 0' holds token \d+, the target has 50 tokens"),
        ("short", short, r"--test-data .*short: none of its 3 answers is long enough"),
    ):
        directory = write_test_data(tmp_path / name, data, 0.0)
        with pytest.raises(UserError, match=reason):
            train(make_settings(**inputs, test_data=(directory,)), tmp_path / "heads")
    (directory / "distill.json").write_text('{"num_shards": 1, "made_from": {"temperature": "x"}}')
    with pytest.raises(UserError, match="has no temperature that can be read"):
        train(make_settings(**inputs, test_data=(directory,)), tmp_path / "heads")
    assert not (tmp_path / "heads").exists()
