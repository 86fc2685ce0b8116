"""Every published format of Medusa heads loads into the same canonical tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import (
    assert_same_heads,
    backbone_tensors,
    make_heads,
    sequential_tensors,
    vllm_tensors,
    write,
    write_fasterdecoding,
    write_merged,
    write_modelopt,
    write_native,
    write_shards,
    write_tgi,
    write_vllm,
)
from tests.sequential_checkpoints import make_hydra, write_hydra
from vllm_medusa.heads import load_heads

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PREFIXES = ["", "medusa_heads.", "medusa_head.", "medusa."]


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "heads.bin", "any.safetensors"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fasterdecoding(tmp_path: Path, file: str, num_layers: int, dtype: torch.dtype) -> None:
    heads = make_heads(num_heads=5, num_layers=num_layers, dtype=dtype)
    loaded = load_heads(write_fasterdecoding(tmp_path, heads, file))
    assert_same_heads(loaded, heads, source_format="fasterdecoding")
    assert loaded.base_model == "lmsys/vicuna-7b-v1.3"


def test_fasterdecoding_with_wrong_head_count_in_config_loads_all_and_says_so(
    tmp_path: Path,
) -> None:
    loaded = load_heads(write_fasterdecoding(tmp_path, make_heads(num_heads=5)))
    assert loaded.spec.num_heads == 5
    assert loaded.notes == ("config.json says 2 heads but the tensors hold 5, which are used",)


def test_tgi(tmp_path: Path) -> None:
    heads = make_heads(lm_head="target")
    loaded = load_heads(write_tgi(tmp_path, heads))
    assert_same_heads(loaded, heads, source_format="tgi", vocab_size=None)
    assert load_heads(tmp_path, target_vocab_size=20).spec.vocab_size == 20


@pytest.mark.parametrize("lm_head", ["own", "target"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_merged(tmp_path: Path, lm_head: str, file: str) -> None:
    heads = make_heads(lm_head=lm_head)
    loaded = load_heads(write_merged(tmp_path, heads, file))
    assert_same_heads(loaded, heads, source_format="merged")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("lm_head", ["own", "common", "target"])
@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_vllm(tmp_path: Path, has_bias: bool, lm_head: str, prefix: str) -> None:
    heads = make_heads(lm_head=lm_head, has_bias=has_bias, num_layers=2, logit_scale=0.5)
    loaded = load_heads(write_vllm(tmp_path, heads, prefix))
    assert_same_heads(loaded, heads, source_format="vllm")
    assert loaded.notes == ()


def test_vllm_keeps_biases_that_its_config_does_not_announce(tmp_path: Path) -> None:
    heads = make_heads()
    write_vllm(tmp_path, heads)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["medusa_fc_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_heads(tmp_path)
    assert_same_heads(loaded, heads, source_format="vllm")
    assert "vLLM itself would drop the biases" in loaded.notes[0]


def test_vllm_original_lm_head_given_as_the_first_heads(tmp_path: Path) -> None:
    heads = make_heads(lm_head="common")
    write_vllm(tmp_path, heads)
    tensors = vllm_tensors(heads)
    tensors["lm_heads.0.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_heads(load_heads(tmp_path), heads, source_format="vllm")


@pytest.mark.parametrize("lm_head", ["own", "common"])
def test_vllm_token_map(tmp_path: Path, lm_head: str) -> None:
    heads = make_heads(lm_head=lm_head, draft_vocab_size=6)
    loaded = load_heads(write_vllm(tmp_path, heads), target_vocab_size=20)
    assert_same_heads(loaded, heads, source_format="vllm")


def test_vllm_token_map_selects_rows_of_full_lm_heads(tmp_path: Path) -> None:
    full = make_heads(lm_head="own")
    truncated = make_heads(lm_head="own", draft_vocab_size=6)
    token_map = truncated.tensors["token_map"]
    write_vllm(tmp_path, truncated)
    tensors = vllm_tensors(full) | {"token_map": token_map}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_heads(tmp_path)
    assert loaded.spec.vocab_size == 20
    assert loaded.spec.draft_vocab_size == 6
    assert torch.equal(
        loaded.tensors["lm_head.weight"], full.tensors["lm_head.weight"][:, token_map]
    )


def test_speculators_token_map(tmp_path: Path) -> None:
    heads = make_heads(draft_vocab_size=6)
    order = heads.tensors["token_map"].argsort()
    token_map = heads.tensors["token_map"][order]
    tensors = vllm_tensors(heads)
    del tensors["token_map"]
    for h in range(3):
        tensors[f"lm_heads.{h}.weight"] = tensors[f"lm_heads.{h}.weight"][order]
    tensors["d2t"] = token_map - torch.arange(6)
    tensors["t2d"] = torch.zeros(20, dtype=torch.bool).index_fill(0, token_map, True)
    config = {"num_heads": 3, "medusa_vocab_size": 20, "truncated_vocab_size": 6}
    loaded = load_heads(write(tmp_path, tensors, config, "model.safetensors"))
    assert torch.equal(loaded.tensors["token_map"], token_map)
    assert loaded.tensors.keys() == heads.tensors.keys()
    assert torch.equal(loaded.tensors["lm_head.weight"], heads.tensors["lm_head.weight"][:, order])


@pytest.mark.parametrize("lm_head", ["own", "target"])
def test_modelopt_in_shards(tmp_path: Path, lm_head: str) -> None:
    heads = make_heads(lm_head=lm_head, num_layers=2)
    loaded = load_heads(write_modelopt(tmp_path, heads, num_shards=3))
    assert_same_heads(loaded, heads, source_format="modelopt")


@pytest.mark.parametrize(
    ("lm_head", "draft_vocab_size"),
    [
        *((kind, size) for kind in ("own", "common", "low_rank") for size in (None, 6)),
        ("target", None),
    ],
)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_native(tmp_path: Path, lm_head: str, prefix: str, draft_vocab_size: int | None) -> None:
    heads = make_heads(lm_head=lm_head, draft_vocab_size=draft_vocab_size, logit_scale=2.0)
    assert_same_heads(load_heads(write_native(tmp_path, heads, prefix)), heads)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_without_a_backbone(tmp_path: Path, prefix: str) -> None:
    heads = make_heads()
    write(tmp_path, sequential_tensors(heads, prefix), None, "heads.safetensors")
    assert_same_heads(load_heads(tmp_path), heads, source_format="fasterdecoding")


def test_format_is_told_by_names_not_by_the_file(tmp_path: Path) -> None:
    heads = make_heads(lm_head="common")
    write(tmp_path, vllm_tensors(heads), None, "medusa_lm_head.pt")
    loaded = load_heads(tmp_path / "medusa_lm_head.pt")
    assert_same_heads(loaded, heads, source_format="vllm")


def test_one_file_takes_config_and_tree_from_beside_it(tmp_path: Path) -> None:
    write_vllm(tmp_path, make_heads(lm_head="target"))
    (tmp_path / "medusa_tree.json").write_text('{"format": "vllm_medusa.tree/1", "paths": [[0]]}')
    loaded = load_heads(tmp_path / "model.safetensors")
    assert loaded.spec.vocab_size == 20
    assert loaded.tree_paths == [[0]]


def test_heads_in_a_file_of_their_own_beside_a_model(tmp_path: Path) -> None:
    heads = make_heads()
    write(tmp_path, backbone_tensors(), None, "model.safetensors")
    torch.save(sequential_tensors(heads), tmp_path / "medusa_lm_head.pt")
    assert_same_heads(load_heads(tmp_path), heads, source_format="fasterdecoding")


def test_shards_without_heads_are_not_needed(tmp_path: Path) -> None:
    heads = make_heads()
    write_modelopt(tmp_path, heads, num_shards=4)
    (tmp_path / "model-00001-of-00004.safetensors").unlink()  # backbone alone
    assert_same_heads(load_heads(tmp_path), heads, source_format="modelopt")


def test_index_decides_over_a_consolidated_copy(tmp_path: Path) -> None:
    heads = make_heads()
    write_modelopt(tmp_path, heads)
    other = {
        name: torch.zeros_like(t) for name, t in sequential_tensors(heads, "medusa_heads.").items()
    }
    save_file(other, tmp_path / "consolidated.safetensors")
    assert_same_heads(load_heads(tmp_path), heads, source_format="modelopt")


def test_trainer_pickles_are_not_opened(tmp_path: Path) -> None:
    heads = make_heads()
    write_fasterdecoding(tmp_path, heads)
    torch.save({"args": object}, tmp_path / "training_args.bin")
    assert_same_heads(load_heads(tmp_path), heads, source_format="fasterdecoding")


def test_legacy_torch_file(tmp_path: Path) -> None:
    heads = make_heads()
    torch.save(
        sequential_tensors(heads),
        tmp_path / "medusa_lm_head.pt",
        _use_new_zipfile_serialization=False,
    )
    assert_same_heads(load_heads(tmp_path), heads, source_format="fasterdecoding")


def test_layers_tied_by_save_model_are_found_through_the_metadata(tmp_path: Path) -> None:
    heads = make_heads(num_layers=2)
    for kind in ("weight", "bias"):
        heads.tensors[f"blocks.{kind}"][:, 1] = heads.tensors[f"blocks.{kind}"][:, 0]
    tensors = sequential_tensors(heads)
    dropped = {}
    for h in range(3):
        for kind in ("weight", "bias"):
            del tensors[f"{h}.1.linear.{kind}"]
            dropped[f"{h}.1.linear.{kind}"] = f"{h}.0.linear.{kind}"
    save_file(tensors, tmp_path / "heads.safetensors", metadata={"format": "pt", **dropped})
    assert_same_heads(load_heads(tmp_path), heads, source_format="fasterdecoding")


def test_mixed_dtypes_become_their_common_one(tmp_path: Path) -> None:
    heads = make_heads(dtype=torch.bfloat16)
    tensors = sequential_tensors(heads)
    tensors["1.0.linear.bias"] = tensors["1.0.linear.bias"].half()
    write(tmp_path, tensors, None, "heads.safetensors")
    loaded = load_heads(tmp_path)
    assert loaded.spec.dtype == torch.float32
    for name, tensor in heads.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor.float())


def test_tree(tmp_path: Path) -> None:
    write_fasterdecoding(tmp_path, make_heads())
    paths = [[0], [0, 0], [1], [0, 0, 3], [0, 1]]
    tree = {"format": "vllm_medusa.tree/1", "paths": paths}
    (tmp_path / "medusa_tree.json").write_text(json.dumps(tree))
    assert load_heads(tmp_path).tree_paths == paths


def test_no_tree(tmp_path: Path) -> None:
    assert load_heads(write_fasterdecoding(tmp_path, make_heads())).tree_paths is None


def test_reading_heads_of_a_merged_model_does_not_read_the_backbone(tmp_path: Path) -> None:
    heads = make_heads()
    backbone = backbone_tensors() | {"model.layers.0.big": torch.full((4,), float("nan"))}
    tensors = backbone | sequential_tensors(heads, "medusa_head.")
    write_shards(tmp_path, tensors, {"hidden_size": 8}, 1)
    assert_same_heads(load_heads(tmp_path), heads, source_format="merged")


@pytest.mark.parametrize("file", ["hydra_lm_head.pt", "any.safetensors"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_hydra(tmp_path: Path, file: str, num_layers: int) -> None:
    heads = make_hydra(num_layers=num_layers, has_lm_head_bias=True, dtype=torch.float16)
    loaded = load_heads(write_hydra(tmp_path, heads, file))
    assert_same_heads(loaded, heads, source_format="hydra")
    assert loaded.base_model == "lmsys/vicuna-7b-v1.3"
    assert loaded.notes == ()


def test_hydra_beside_its_model(tmp_path: Path) -> None:
    heads = make_hydra(has_lm_head_bias=True)
    write_hydra(tmp_path, heads)
    write(tmp_path, backbone_tensors(), None, "model.safetensors")
    assert_same_heads(load_heads(tmp_path), heads, source_format="hydra")


@pytest.mark.parametrize("lm_head", ["own", "common", "target", "low_rank"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_native_hydra(tmp_path: Path, lm_head: str, num_layers: int) -> None:
    heads = make_hydra(lm_head=lm_head, num_layers=num_layers, root_size=4)
    assert_same_heads(load_heads(write_native(tmp_path, heads)), heads)
