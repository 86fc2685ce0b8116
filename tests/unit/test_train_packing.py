"""Packed documents: seen by the target as if alone, learnt from where they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training import (
    counting_rows,
    document,
    make_settings,
    make_target,
    random_documents,
    save_llama,
    write_rows,
)
from vllm_medusa.errors import UserError
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.loop import Training
from vllm_medusa.training.packing import Batches, build_batch


def test_packed_hidden_states_are_those_of_single_documents() -> None:
    target = make_target()
    rows = [random_documents(3, seed=1), random_documents(1, seed=2), random_documents(2, seed=3)]
    batch = build_batch(rows, 95)
    hidden = target.hidden(batch.tokens, batch.position_ids)
    for row, documents in enumerate(rows):
        start = 0
        for item in documents:
            tokens = torch.from_numpy(item.token_ids).long()[None]
            alone = target.model.model(input_ids=tokens).last_hidden_state[0]
            packed = hidden[row, start : start + len(item.token_ids)]
            torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
            start += len(item.token_ids)


def test_neighbours_do_not_matter_but_earlier_tokens_do() -> None:
    """Would fail if documents saw each other, or if a document did not see itself."""
    target = make_target()
    first, second = random_documents(2, seed=4)
    other = document(((first.token_ids + 1) % 50).tolist(), first.loss_mask.tolist())
    states = [
        target.hidden(batch.tokens, batch.position_ids)[0, len(first.token_ids) :]
        for batch in (build_batch([[first, second]], 70), build_batch([[other, second]], 70))
    ]
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=1e-6)
    changed = document(
        [(second.token_ids[0] + 1) % 50, *second.token_ids[1:].tolist()], second.loss_mask.tolist()
    )
    batch = build_batch([[first, changed]], 70)
    moved = target.hidden(batch.tokens, batch.position_ids)[0, len(first.token_ids) :]
    last = len(second.token_ids) - 1
    assert (moved[last] - states[0][last]).abs().max() > 1e-3


def test_batch_of_one_by_hand() -> None:
    a = document([5, 6, 7, 8], [0, 0, 1, 1])
    b = document([1, 2, 3], [1, 0, 1])
    batch = build_batch([[a, b]], 9)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 1, 2, 3, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    # u = 1 and 2 are followed by answer tokens 7 and 8, u = 5 by 3; b's first token by none of b.
    assert batch.learnt.tolist() == [1, 2, 5]
    assert batch.depth.tolist() == [1, 2, 1]


def test_stream_goes_on_where_a_killed_run_stopped() -> None:
    batches = Batches(random_documents(23), batch_tokens=100, seed=1)
    stream = batches.from_batch(0)
    whole = [next(stream) for _ in range(40)]  # several epochs
    for first in (1, 7, 29):
        resumed = batches.from_batch(first)
        assert [next(resumed) for _ in range(40 - first)] == whole[first:]
    assert len({str(batch) for batch in whole}) == 40


def test_epochs_differ_and_seeds_differ() -> None:
    documents = random_documents(23)
    batches = Batches(documents, batch_tokens=100, seed=1)
    assert batches.epoch(0) != batches.epoch(1)
    assert batches.epoch(0) != Batches(documents, batch_tokens=100, seed=2).epoch(0)
    assert batches.epoch(0) == Batches(documents, batch_tokens=100, seed=1).epoch(0)


def test_document_longer_than_the_batch_is_a_batch() -> None:
    batches = Batches(random_documents(5, longest=30), batch_tokens=8, seed=0)
    assert batches.num_sequences == 1
    batch = batches.build(next(batches.from_batch(0)))
    assert batch.tokens.shape[0] == 1


def test_target_that_lets_documents_see_each_other_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = make_target()
    target.check(needs_distribution=True)
    body = target._body

    def blind(input_ids: torch.Tensor, position_ids: torch.Tensor, **options: object) -> object:
        mask = torch.ones_like(input_ids)  # a mask turns the detection of documents off
        return body(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        )

    monkeypatch.setattr(target, "_body", blind)
    with pytest.raises(UserError, match="see each other"):
        target.check(needs_distribution=True)


def test_target_that_caps_its_logits_is_refused_for_kl() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.05,
        sliding_window=4,
    )
    target = FrozenTarget(Gemma2ForCausalLM(config))
    target.check(needs_distribution=False)  # its windows are packed rightly too
    with pytest.raises(UserError, match="--loss ce"):
        target.check(needs_distribution=True)


def test_model_without_lm_head_is_refused() -> None:
    with pytest.raises(UserError, match="causal language model"):
        FrozenTarget(make_target().model.model)


def test_prompts_are_learnt_too(tmp_path: Path) -> None:
    """The same rows and steps; the rows held out are measured on their answers."""
    paths = {
        "model": str(save_llama(tmp_path / "model")),
        "data": str(write_rows(tmp_path / "data", counting_rows(60))),
    }
    alone, whole = (Training(make_settings(**paths, learn_prompts=p)) for p in (False, True))
    sequences, same = (next(training._batches.from_batch(0)) for training in (alone, whole))
    assert sequences == same
    answers, tokens = (t._batches.build(sequences).learnt.tolist() for t in (alone, whole))
    assert set(answers) < set(tokens)
    lengths = [len(whole.dataset.train[i].token_ids) for row in sequences for i in row]
    assert len(tokens) == sum(lengths) - len(lengths)
    assert whole._batches.num_learnt(sequences) == len(tokens)
    pairs = zip(alone.dataset.held_out, whole.dataset.held_out, strict=True)
    assert all((a.loss_mask == b.loss_mask).all() for a, b in pairs)
