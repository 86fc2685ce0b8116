"""`vllm-medusa inspect` and `convert`, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import (
    assert_same_heads,
    backbone_tensors,
    make_heads,
    write,
    write_fasterdecoding,
    write_native,
    write_tgi,
    write_vllm,
)
from tests.sequential_checkpoints import make_hydra, write_hydra
from vllm_medusa import __version__
from vllm_medusa.cli import main as cli
from vllm_medusa.heads import load_heads
from vllm_medusa.tree.schedule import TreeSchedule, write_schedule_file


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Standard output of a call that succeeds."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on standard error of a call that fails with exit status 2."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exc:  # argparse
        status = exc.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("vllm-medusa")
    return captured.err


def make_target(directory: Path, **config: Any) -> Path:
    """A directory with what the tools read of a model: sizes and the lm_head or the embedding."""
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 20} | config
    tensors = backbone_tensors()
    tensors["model.embed_tokens.weight"] = torch.full((20, 8), 2.0)
    tensors["lm_head.weight"] = torch.arange(160.0).reshape(20, 8)
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    return write(directory, tensors, config, "model.safetensors")


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fasterdecoding(tmp_path / "heads", make_heads(num_heads=5))
    tree = {"format": "vllm_medusa.tree/1", "paths": [[0], [1], [0, 0]]}
    (tmp_path / "heads" / "medusa_tree.json").write_text(json.dumps(tree))
    schedule = TreeSchedule.from_entries([(1, tree["paths"]), (8, [[0]]), (None, [])])
    write_schedule_file(tmp_path / "heads" / "medusa_tree_schedule.json", schedule)
    out = run(capsys, "inspect", tmp_path / "heads", "--model", make_target(tmp_path / "model"))
    assert out.splitlines() == [
        "format:           FasterDecoding, lm_heads of their own (F1)",
        "made for:         lmsys/vicuna-7b-v1.3",
        "heads:            5",
        "layers per head:  1, with biases",
        "hidden size:      8",
        "vocabulary:       20",
        "lm_head:          one matrix per head",
        "dtype:            float32",
        "size:             0.0 MiB",
        "tree:             3 nodes, 2 deep",
        "tree schedule:    3 nodes at batch 1, 1 node at batch 2-8, none at batch 9 and more",
        "note:             config.json says 2 heads but the tensors hold 5, which are used",
        f"fits:             {tmp_path / 'model'} (hidden size 8, vocabulary 20)",
    ]


def test_inspect_low_rank_with_a_token_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = make_heads(
        lm_head="low_rank", draft_vocab_size=6, rank=2, has_bias=False, logit_scale=0.5
    )
    out = run(capsys, "inspect", write_native(tmp_path, heads))
    assert (
        "lm_head:          two low-rank factors per head of rank 2, for 6 tokens of the vocabulary"
        in out
    )
    assert "logit scale:      0.5" in out
    assert "without biases" in out
    assert "tree:             none" in out


def test_inspect_heads_that_see_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = make_heads(root_size=6, selector_rank=2, prefix_window=7)
    out = run(capsys, "inspect", write_native(tmp_path, heads))
    assert "root-aware:       yes, by embeddings of size 6" in out
    assert "selector:         of rank 2, among 16 guesses" in out
    assert "prefix attention: over 7 positions" in out


def test_inspect_hydra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = make_hydra(num_layers=2, has_lm_head_bias=True)
    out = run(capsys, "inspect", write_hydra(tmp_path / "heads", heads))
    assert "format:           Hydra, MLP form" in out
    assert "heads:            3, which run in turn and read all tokens of a path (Hydra)" in out
    assert "layers per head:  2, with biases" in out
    assert "lm_head:          one matrix per head, with biases" in out
    assert "root-aware" not in out
    refused = fail(capsys, "convert", tmp_path / "heads", tmp_path / "out", "--to", "vllm")
    assert "the layers with which hydra heads read the tokens of a path would be lost" in refused


def test_inspect_heads_for_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tgi(tmp_path / "heads", make_heads(lm_head="target"))
    target = make_target(tmp_path / "model", hidden_size=16)
    message = fail(capsys, "inspect", tmp_path / "heads", "--model", target)
    assert "the heads are for hidden size 8, the target model has 16" in message


def test_inspect_reads_sizes_of_a_multimodal_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_vllm(tmp_path / "heads", make_heads())
    target = tmp_path / "model"
    target.mkdir()
    config = {"vocab_size": 9, "text_config": {"n_embd": 8, "vocab_size": 20}}
    (target / "config.json").write_text(json.dumps(config))
    assert "hidden size 8, vocabulary 20" in run(
        capsys, "inspect", tmp_path / "heads", "--model", target
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [(None, "no config.json, so no model"), ({"a": 1}, "gives no hidden_size and vocab_size")],
)
def test_model_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, expected: str
) -> None:
    write_vllm(tmp_path / "heads", make_heads())
    (tmp_path / "model").mkdir()
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert expected in fail(capsys, "inspect", tmp_path / "heads", "--model", tmp_path / "model")


def test_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_vllm(tmp_path, make_heads())
    message = fail(capsys, "inspect", tmp_path, "--model", tmp_path / "nothing")
    assert "model '" in message
    assert "no such file or directory" in message


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fasterdecoding(tmp_path / "in", make_heads())
    out = run(capsys, "convert", tmp_path / "in", tmp_path / "out", "--to", "vllm")
    assert out == f"wrote 3 heads, read as fasterdecoding, as vllm to {tmp_path / 'out'}\n"
    assert_same_heads(load_heads(tmp_path / "out"), make_heads(), source_format="vllm")


@pytest.mark.parametrize(
    ("write_format", "num_layers"), [("vllm", 1), ("fasterdecoding", 1), ("tgi", 2)]
)
@pytest.mark.parametrize("tied", [True, False, None])
def test_convert_reads_the_targets_lm_head(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write_format: str,
    num_layers: int,
    tied: bool | None,
) -> None:
    write_tgi(tmp_path / "in", make_heads(lm_head="target", num_layers=num_layers))
    target = make_target(tmp_path / "model", tie_word_embeddings=tied)
    run(
        capsys,
        "convert",
        tmp_path / "in",
        tmp_path / "out",
        "--to",
        write_format,
        "--model",
        target,
    )
    loaded = load_heads(tmp_path / "out")
    expected = torch.full((20, 8), 2.0) if tied else torch.arange(160.0).reshape(20, 8)
    lm_head = loaded.tensors["lm_head.weight"]
    assert torch.equal(lm_head, expected.expand_as(lm_head))
    assert loaded.base_model == str(target)


def test_convert_takes_the_embedding_of_a_model_that_stores_no_lm_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tgi(tmp_path / "in", make_heads(lm_head="target"))
    target = make_target(tmp_path / "model", tie_word_embeddings=True)
    config = json.loads((target / "config.json").read_text())
    del config["tie_word_embeddings"]  # a default of some configs, which are then not written
    (target / "config.json").write_text(json.dumps(config))
    run(capsys, "convert", tmp_path / "in", tmp_path / "out", "--to", "vllm", "--model", target)
    weight = load_heads(tmp_path / "out").tensors["lm_head.weight"]
    assert torch.equal(weight, torch.full((20, 8), 2.0))


def test_convert_takes_the_embedding_of_a_tied_model_that_stores_an_lm_head_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers and vLLM ignore such an lm_head."""
    write_tgi(tmp_path / "in", make_heads(lm_head="target"))
    target = make_target(tmp_path / "model", tie_word_embeddings=True)
    stored = {"lm_head.weight": torch.zeros(20, 8)}
    save_file(backbone_tensors() | stored, target / "model.safetensors")
    run(capsys, "convert", tmp_path / "in", tmp_path / "out", "--to", "vllm", "--model", target)
    weight = load_heads(tmp_path / "out").tensors["lm_head.weight"]
    assert torch.equal(weight, torch.ones(20, 8))


def test_convert_does_not_take_another_heads_lm_head_for_the_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tgi(tmp_path / "in", make_heads(lm_head="target"))
    target = make_target(tmp_path / "model")
    of_heads = {"medusa_heads.lm_head.weight": torch.zeros(20, 8)}
    save_file(backbone_tensors() | of_heads, target / "model.safetensors")
    run(capsys, "convert", tmp_path / "in", tmp_path / "out", "--to", "vllm", "--model", target)
    weight = load_heads(tmp_path / "out").tensors["lm_head.weight"]
    assert torch.equal(weight, torch.ones(20, 8))


def test_convert_does_not_guess_the_lm_head_of_an_untied_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tgi(tmp_path / "in", make_heads(lm_head="target"))
    target = make_target(tmp_path / "model", tie_word_embeddings=False)
    tensors = backbone_tensors()
    del tensors["lm_head.weight"]
    save_file(tensors, target / "model.safetensors")
    arguments = ["convert", tmp_path / "in", tmp_path / "out", "--to", "vllm", "--model", target]
    assert "found 0 tensors that may be the lm_head (none)" in fail(capsys, *arguments)


def test_convert_leaves_the_targets_lm_head_where_the_format_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tgi(tmp_path / "in", make_heads(lm_head="target"))
    target = make_target(tmp_path / "model")
    arguments = ["convert", tmp_path / "in", tmp_path / "out", "--to", "tgi"]
    run(capsys, *arguments, "--model", target)
    assert load_heads(tmp_path / "out").spec.lm_head == "target"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(target)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"lm_head.bias": torch.zeros(20)}, "the lm_head has a bias"),
        ({"vision.lm_head.weight": torch.zeros(20, 8)}, "found 2 tensors that may be the lm_head"),
        ({"lm_head.weight": torch.zeros(20, 8, dtype=torch.int8)}, "torch.int8 of shape [20, 8]"),
        ({"lm_head.weight": torch.zeros(24, 8)}, "shape [24, 8], expected floating point of"),
    ],
)
def test_convert_with_an_lm_head_that_cannot_be_copied(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tensors: dict[str, torch.Tensor],
    expected: str,
) -> None:
    write_tgi(tmp_path / "in", make_heads(lm_head="target"))
    target = make_target(tmp_path / "model", tie_word_embeddings=False)
    save_file(backbone_tensors() | tensors, target / "model.safetensors")
    message = fail(
        capsys, "convert", tmp_path / "in", tmp_path / "out", "--to", "vllm", "--model", target
    )
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_convert_refuses_and_keeps_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_vllm(tmp_path / "in", make_heads())
    arguments = ["convert", tmp_path / "in", tmp_path / "out", "--to", "vllm"]
    run(capsys, *arguments)
    assert "is not empty; name another directory or give --force" in fail(capsys, *arguments)
    run(capsys, *arguments, "--force")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["conjure"], "invalid choice: 'conjure'"),
        (["inspect"], "the following arguments are required: HEADS"),
        (["convert", "a", "b", "--to", "gguf"], "invalid choice: 'gguf'"),
        (["inspect", "/nothing", "--modle", "x"], "unrecognized arguments: --modle"),
        (["inspect", "/nothing"], "no such file or directory"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert expected in fail(capsys, *arguments)


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> str:
        raise ValueError("a bug")

    monkeypatch.setattr("vllm_medusa.cli.inspect.run", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["inspect", "x"])


def test_as_a_program() -> None:
    """Help needs neither torch nor vLLM, and a mistake ends with status 2 and one line."""
    script = "import sys\nfrom vllm_medusa.cli.main import main\nsys.argv[1:] = {0}\n"
    check = "assert not {'torch', 'vllm'} & set(sys.modules)"
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            script.format(["convert", "--help"]) + f"try: main()\nfinally: {check}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "{vllm,fasterdecoding,tgi}" in shown.stdout
    version = subprocess.run(
        [sys.executable, "-m", "vllm_medusa.cli.main", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout == f"vllm-medusa {__version__}\n"
    mistake = subprocess.run(
        [sys.executable, "-m", "vllm_medusa.cli.main", "inspect", "/nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert mistake.returncode == 2
    assert mistake.stderr.count("\n") == 1
