"""A converted model is copied, saved, and trained by other people's programs."""

import copy
import io

import pytest
import torch

import highway_bp as hb
from tests.highway_bp.converted import asserts_same, gradients, logits_loss
from tests.highway_bp.families import tf


@asserts_same()
def test_copies_and_pickles_train_on_their_own(model):
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    logits_loss(other).backward()
    assert not gradients(model)
    logits_loss(model).backward()
    return list(gradients(other).values())


def logged(model, rows, folder, callbacks=(), **how) -> list[dict]:
    """What the Trainer of transformers logs of the loss, trained on rows of tokens."""
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in rows]
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8)
    arguments = tf.TrainingArguments(str(folder), **quiet, **how)
    trainer = tf.Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path):
    sizes = dict(vocab_size=16, hidden_size=32, num_hidden_layers=3, intermediate_size=64)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=2))
    hb.convert(model, hb.Highway(k=1))
    rows = [(torch.arange(12) + i) % 16 for i in range(64)]
    how = dict(max_steps=60, save_steps=60, learning_rate=5e-3, logging_steps=10)
    log = logged(model, rows, tmp_path, **how)
    assert log[-1]["loss"] < 0.3 < 2 < log[0]["loss"]
    asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    out = model.eval().generate(torch.tensor([[3, 4, 5]]), **asked)
    assert out[0].tolist() == list(range(3, 11))
    back = tf.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-60")
    assert torch.equal(back.generate(torch.tensor([[3, 4, 5]]), **asked), out)


def rows_of_real_text() -> torch.Tensor:
    """64 sequences of 32 characters of Python's own documentation, below code point 128."""
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics)).encode("ascii", "ignore")
    return torch.tensor(list(text[: 64 * 32])).view(64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "adaptive"])
def test_a_schedule_in_the_trainer_of_transformers(kind, tmp_path):
    sizes = dict(vocab_size=128, n_embd=32, n_layer=4, n_head=2, n_positions=32)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    hb.convert(model, hb.Highway(0))
    rows = rows_of_real_text()
    if kind == "linear":
        callback = hb.trainer_callback(hb.schedules.Linear(hb.Highway(0), 0, 3, exact_from=0.9))
    else:
        callback = hb.trainer_callback(
            hb.schedules.Adaptive(hb.Highway(0), tolerance=0.2, ks=(0, 1, 2, 3), exact_from=0.9),
            lambda model: model(input_ids=rows[:8], labels=rows[:8]).loss,
        )
    how = dict(max_steps=20, learning_rate=1e-2, logging_steps=2, save_strategy="no")
    log = logged(model, rows, tmp_path, [callback], **how)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    ks = [entry["k"] for entry in log]
    assert ks[-1] == "bp" and hb.current_method(model) == hb.Backprop()
    if kind == "linear":
        assert ks[:-1] == sorted(ks[:-1]) and ks[0] == 0 and ks[-2] == 3
    else:
        assert {*ks[:-1]} & {1, 2, 3}  # no k = 0 once it was measured
