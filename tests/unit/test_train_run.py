"""Whole runs on a tiny model: what they write, and that cut short they end the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import counting_rows, make_settings, save_llama, write_rows
from vllm_medusa import files
from vllm_medusa.cli import main as cli
from vllm_medusa.errors import UserError
from vllm_medusa.heads import load_heads
from vllm_medusa.training import run_directory
from vllm_medusa.training.loop import Training
from vllm_medusa.training.run import train
from vllm_medusa.training.settings import TrainSettings

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("train")
    model = save_llama(directory / "model")
    data = write_rows(directory / "data", counting_rows(60))
    return {"model": str(model), "data": str(data)}


def settings_of(inputs: dict[str, str], **changes: Any) -> TrainSettings:
    return make_settings(**{**inputs, **changes})


def weights(heads: Path) -> dict[str, torch.Tensor]:
    return load_file(next(heads.glob("*.safetensors")))


def result(heads: Path) -> tuple[bytes, dict[str, Any]]:
    report = json.loads((heads / "report.json").read_text())
    return next(heads.glob("*.safetensors")).read_bytes(), report


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours may catch it."""


def test_heads_learn_and_all_files_are_there(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = settings_of(inputs, loss="ce", steps=60, eval_every=20, num_heads=2, lr=2e-2)
    report = train(settings, tmp_path / "heads")
    losses = [sum(point["heads"]) for point in report["loss"]]
    assert losses[-1] < 0.8 * losses[0]
    assert {path.name for path in (tmp_path / "heads").iterdir()} == {
        "config.json",
        "medusa_lm_head.safetensors",
        "medusa_tree.json",
        "provenance.json",
        "report.json",
        "report.md",
        "report.png",
    }
    assert not (tmp_path / "heads.partial").exists()
    heads = load_heads(tmp_path / "heads", target_hidden_size=32, target_vocab_size=50)
    assert (heads.spec.num_heads, heads.spec.lm_head) == (2, "target")
    assert heads.base_model == inputs["model"]
    assert heads.tree_paths is not None
    provenance = json.loads((tmp_path / "heads" / "provenance.json").read_text())
    assert provenance["rows_held_out"] == 6
    assert provenance["identity"]["steps"] == 60
    assert (tmp_path / "heads" / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert len({path.stat().st_mode for path in (tmp_path / "heads").iterdir()}) == 1
    page = (tmp_path / "heads" / "report.md").read_text()
    assert "| top-1 accuracy, head by head |" in page


@pytest.mark.parametrize(
    ("kind", "file", "lm_head"),
    [
        ({"lm_head": "own"}, "medusa_lm_head.safetensors", "own"),
        ({"lm_head": "low-rank", "rank": 4}, "medusa_heads.safetensors", "low_rank"),
        ({"num_layers": 2}, "medusa_heads.safetensors", "target"),
        ({"dtype": "bfloat16"}, "medusa_lm_head.safetensors", "target"),
    ],
)
def test_kinds_of_heads_are_written_and_load(
    inputs: dict[str, str], tmp_path: Path, kind: dict[str, Any], file: str, lm_head: str
) -> None:
    settings = settings_of(inputs, steps=2, **kind)
    train(settings, tmp_path / "heads")
    assert (tmp_path / "heads" / file).exists()
    spec = load_heads(tmp_path / "heads", target_vocab_size=50).spec
    assert (spec.lm_head, spec.dtype) == (lm_head, getattr(torch, settings.dtype))
    assert (spec.num_heads, spec.num_layers) == (3, settings.num_layers)


@pytest.mark.parametrize(
    "kind",
    [
        {"recurrent": True},
        {"optimizer": "muon", "hydra": True, "num_layers": 2},
        {"optimizer": "muon", "prefix_attention": True, "selector": True, "selector_rank": 4},
        {"joint": "lora", "lora_rank": 4, "heads_warmup": 0.25, "lora_dropout": 0.5},
        {"joint": "full", "heads_warmup": 0.25},
    ],
    ids=str,
)
def test_run_cut_anywhere_ends_as_if_it_had_not_been(
    inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
) -> None:
    """Die at every write in turn, before and after it, and go on each time."""
    settings = settings_of(inputs, steps=8, grad_accumulation=2, **kind)
    train(settings, tmp_path / "undisturbed", save_every=1)
    write, deaths = run_directory.write_atomically, iter(range(100))
    fatal, num_writes = 0, 0

    def dying_write(*arguments: Any) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == fatal // 2 + 1 and fatal % 2 == 0:
            raise Killed
        write(*arguments)
        if num_writes == fatal // 2 + 1:
            raise Killed

    for module in (files, run_directory):
        monkeypatch.setattr(module, "write_atomically", dying_write)
    for fatal in deaths:  # noqa: B007
        num_writes = 0
        try:
            train(settings, tmp_path / "killed", save_every=1)
            break
        except Killed:
            assert not (tmp_path / "killed").exists()
    assert next(deaths) > 5
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")


def test_resumed_run_does_not_start_anew(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(inputs, steps=6, eval_every=6)
    step, steps = Training._step, []

    def counted(self: Training, number: int, *arguments: Any) -> Any:
        if number == 4 and 4 not in steps:
            steps.append(number)
            raise Killed
        steps.append(number)
        return step(self, number, *arguments)

    monkeypatch.setattr(Training, "_step", counted)
    with pytest.raises(Killed):
        train(settings, tmp_path / "heads", save_every=3)
    train(settings, tmp_path / "heads", save_every=3)
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5]


def test_selector_alone_by_the_command_line(
    inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For heads of a published format, which stay as they are; cut short, the run goes on."""
    train(settings_of(inputs, steps=2, lm_head="own"), tmp_path / "heads")
    command = ["train", "--model", inputs["model"], "--data", inputs["data"], "--selector-only"]
    command += ["--heads", str(tmp_path / "heads"), "--selector-rank", "4", "--lr", "0.02"]
    command += ["--steps", "4", "--batch-tokens", "96", "--dtype", "float32", "--save-every", "1"]
    step = Training._step

    def dies_once(self: Training, number: int, *arguments: Any) -> Any:
        if number == 2 and dying.pop():
            raise Killed
        return step(self, number, *arguments)

    reports = {}
    for name, dying in (("undisturbed", [False]), ("killed", [False, True])):
        out = tmp_path / name
        monkeypatch.setattr(Training, "_step", dies_once)
        if len(dying) > 1:
            with pytest.raises(Killed):
                cli.main([*command, "--out", str(out)])
        assert cli.main([*command, "--out", str(out)]) == 0
        assert f"wrote heads to {out}" in capsys.readouterr().out
        reports[name] = result(out)
    assert reports["killed"] == reports["undisturbed"]
    spec = load_heads(tmp_path / "killed").spec
    assert (spec.selector_rank, spec.num_heads, spec.lm_head) == (4, 3, "own")
    tensors = load_heads(tmp_path / "killed").tensors
    assert tensors["selector.child"].abs().max() > 0
    kept = load_heads(tmp_path / "heads").tensors
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_second_run_on_the_same_directory_is_refused(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, step, refused = settings_of(inputs, steps=2), Training._step, []

    def disturbed(self: Training, *arguments: Any) -> Any:
        if not refused:
            refused.append(True)
            with pytest.raises(UserError, match=r"heads\.partial: another train is writing it"):
                train(settings, tmp_path / "heads")
        return step(self, *arguments)

    train(settings, tmp_path / "undisturbed")
    monkeypatch.setattr(Training, "_step", disturbed)
    train(settings, tmp_path / "heads")
    assert refused
    assert result(tmp_path / "heads") == result(tmp_path / "undisturbed")


def test_finished_run_is_left_alone(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = settings_of(inputs, steps=2)
    report = train(settings, tmp_path / "heads")
    before = result(tmp_path / "heads")
    (tmp_path / "heads.partial").mkdir()  # killed between the last two acts
    assert train(settings, tmp_path / "heads") == report
    assert result(tmp_path / "heads") == before
    assert not (tmp_path / "heads.partial").exists()


def test_other_settings_are_refused_by_name(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(inputs, steps=3)
    train(settings, tmp_path / "done")
    with pytest.raises(UserError, match=r"done: .* with lr 0\.01, this one has 0\.02"):
        train(dataclasses.replace(settings, lr=0.02), tmp_path / "done")
    monkeypatch.setattr(Training, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(settings, tmp_path / "cut")
    with pytest.raises(UserError, match=r"cut\.partial: .* with steps 3, this one has 4"):
        train(dataclasses.replace(settings, steps=4), tmp_path / "cut")
    other = write_rows(tmp_path / "data", counting_rows(60, seed=1))
    with pytest.raises(UserError, match="with data fingerprint"):
        train(dataclasses.replace(settings, data=str(other)), tmp_path / "cut")
    model = save_llama(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="with target fingerprint"):
        train(dataclasses.replace(settings, model=str(model)), tmp_path / "cut")


def test_moved_inputs_are_the_same_run(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(inputs, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(settings, tmp_path / "heads")
    moved = write_rows(tmp_path / "moved", counting_rows(60), per_shard=7)
    train(dataclasses.replace(settings, data=str(moved)), tmp_path / "heads")


def test_foreign_directory_and_damaged_checkpoint_are_refused(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(inputs, steps=3)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(UserError, match="was not made by vllm-medusa train"):
        train(settings, tmp_path / "foreign")
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(settings, tmp_path / "heads")
    (tmp_path / "heads.partial" / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"checkpoint\.pt: is damaged .*; remove"):
        train(settings, tmp_path / "heads")


def test_full_disk_leaves_the_last_checkpoint(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(inputs, steps=6, eval_every=2)
    train(settings, tmp_path / "undisturbed")
    save, saved = torch.save, []

    def full(value: object, file: Any) -> None:
        saved.append(file)
        if len(saved) in (1, 5):
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(value, file)

    monkeypatch.setattr(torch, "save", full)
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
            train(settings, tmp_path / "heads")
        assert not (tmp_path / "heads").exists()
        assert not list((tmp_path / "heads.partial").glob(".*"))
    train(settings, tmp_path / "heads")
    assert result(tmp_path / "heads") == result(tmp_path / "undisturbed")


def test_best_heads_are_kept_not_the_last(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_medusa.training import loop

    lengths = iter([1.2, 1.9, 1.5])
    monkeypatch.setattr(loop, "expected_acceptance", lambda _: next(lengths))
    report = train(settings_of(inputs, steps=9), tmp_path / "heads")
    assert report["best_step"] == 6
    # The same six steps, of a run that then loses its way.
    lengths = iter([1.2, 1.9, 2.5])
    train(settings_of(inputs, steps=9), tmp_path / "last")
    best, last = (weights(tmp_path / name) for name in ("heads", "last"))
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_epochs_count_the_rows(inputs: dict[str, str]) -> None:
    one, three = (Training(settings_of(inputs, epochs=epochs)).num_steps for epochs in (1, 3))
    rows = 54
    per_step = make_settings().batch_tokens // 30
    assert rows / per_step / 2 < one <= rows / per_step + 1
    assert three == pytest.approx(3 * one, abs=3)


def test_loss_positions_learn_from_a_share(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = settings_of(inputs, loss_positions=0.25)
    train(settings, tmp_path / "some")
    train(dataclasses.replace(settings, loss_positions=1.0), tmp_path / "all")
    assert not torch.equal(
        weights(tmp_path / "some")["0.0.linear.weight"],
        weights(tmp_path / "all")["0.0.linear.weight"],
    )


def test_full_disk_at_the_very_end(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_medusa.training import report

    settings = settings_of(inputs, steps=3)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "plot_report", full)
        with pytest.raises(UserError, match=r"No space left on device.* give the same command"):
            train(settings, tmp_path / "heads")
    assert not (tmp_path / "heads").exists()
    train(settings, tmp_path / "heads")
    assert (tmp_path / "heads" / "report.png").exists()


def test_missing_package_is_said_before_training(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_medusa.reporting import plots

    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs matplotlib: pip install"):
        train(settings_of(inputs), tmp_path / "heads")
    assert not list(tmp_path.iterdir())


def test_command_line_and_relative_target(
    inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The heads name a target given by a relative path relative to themselves."""
    monkeypatch.chdir(Path(inputs["model"]).parent)
    out = tmp_path / "deep" / "heads"
    options = ["--num-heads", "2", "--dtype", "float32", "--batch-tokens", "96", "--steps", "2"]
    command = ["train", "--model", "model", "--data", "data", "--out", str(out), *options]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote heads to {out}")
    assert "without looping text: chain of 2 " in said
    base_model = load_heads(out).base_model
    assert base_model is not None
    assert (out / base_model).resolve() == Path(inputs["model"]).resolve()


def test_rows_that_are_cut_are_said(
    inputs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_llama(tmp_path / "model", max_position_embeddings=20)
    training = Training(settings_of(inputs, model=str(model)))
    num_cut = training.dataset.num_cut
    assert num_cut > 5
    assert f"{num_cut} rows are longer than the target's 20 positions" in caplog.text
    caplog.clear()
    Training(settings_of(inputs))
    assert not caplog.records
