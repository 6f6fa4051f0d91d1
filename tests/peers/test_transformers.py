"""transformers' own common tests, on models as they are and on converted ones: those that fail on a
converted model are those that fail on an untouched one."""

import unittest
from functools import wraps
from typing import Any

import pytest
import torch

import highway_bp as hb
from tests.highway_bp.families import tf
from tests.peers.suite import common_tests

NAMES = """
    training training_gradient_checkpointing training_gradient_checkpointing_use_reentrant_false
    gradient_checkpointing_enable_disable gradient_checkpointing_backward_compatibility
    enable_input_require_grads enable_input_require_grads_with_gradient_checkpointing
    hidden_states_output attention_outputs retain_grad_hidden_states_attentions
    model_outputs_equivalence inputs_embeds inputs_embeds_matches_input_ids determinism
    batching_equivalence problem_types save_load torch_save_load tied_weights_keys
    resize_tokens_embeddings can_capture_specific_layers_hidden_states capture_outputs_decorator
    format_of_can_record_outputs moe_models_record_router_logits output_router_logits_from_config
    causal_lm_loss_honors_shift_labels
"""
TESTS = [f"test_{name}" for name in NAMES.split()]
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TEXT = SIZES | dict(vocab_size=99, max_position_embeddings=64, pad_token_id=0)
DECODER = TEXT | dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "GPT2": (
        dict(vocab_size=99, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0),
        ["Model", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification"],
    ),
    "Llama": (DECODER, ["Model", "ForCausalLM", "ForSequenceClassification"]),
    "Gemma2": (DECODER | dict(head_dim=8), ["Model", "ForCausalLM"]),
    "Mixtral": (DECODER | dict(num_local_experts=2), ["Model", "ForCausalLM"]),
    "Bert": (TEXT, ["Model", "ForMaskedLM", "ForSequenceClassification"]),
    "Roberta": (TEXT, ["Model", "ForMaskedLM", "ForTokenClassification"]),
    "DistilBert": (
        dict(vocab_size=99, max_position_embeddings=64, pad_token_id=0)
        | dict(dim=16, hidden_dim=32, n_layers=2, n_heads=2),
        ["Model", "ForMaskedLM"],
    ),
    "ViT": (SIZES | dict(image_size=16, patch_size=8), ["Model", "ForImageClassification"]),
    "T5": (
        dict(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        | dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1),
        ["Model", "ForConditionalGeneration"],
    ),
}


class Tester:
    """What the tests ask of a family: a configuration, a batch and its sizes."""

    batch_size, seq_length, hidden_size, num_hidden_layers = 3, 7, 16, 2
    num_attention_heads, is_training, num_labels, type_sequence_label_size = 2, True, 2, 2

    def __init__(self, family: str):
        self.family = family
        if family == "ViT":
            self.seq_length = 5  # 4 patches and the class token

    def get_config(self):
        return getattr(tf, f"{self.family}Config")(**FAMILIES[self.family][0])

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        if self.family == "ViT":
            return config, {"pixel_values": torch.rand(3, 3, 16, 16)}
        tokens = torch.randint(3, 99, (3, 7))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.family == "T5":
            batch |= {"decoder_input_ids": tokens.flip(0)}
        return config, batch


def case_of(family: str) -> unittest.TestCase:
    _, heads = FAMILIES[family]
    classes = tuple(getattr(tf, f"{family}{head}") for head in heads)
    bases = (common_tests().ModelTesterMixin, unittest.TestCase)
    about = dict(all_model_classes=classes, is_encoder_decoder=family == "T5")
    case = type(f"{family}Test", bases, {**about, "runTest": lambda self: None})()
    case.model_tester = Tester(family)
    return case


def converting(init):
    """An ``__init__`` that converts the model as soon as it is built."""

    @wraps(init)
    def built(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self).__init__ is built and not list(hb.chains(self)):
            hb.convert(self, hb.Highway(1))

    return built


def outcome(family: str, test: str) -> str:
    """passed, skipped, or the type of the error."""
    case = case_of(family)
    if not hasattr(case, test):
        return "absent"
    torch.manual_seed(0)
    try:
        getattr(case, test)()
    except (unittest.SkipTest, pytest.skip.Exception):
        return "skipped"
    except Exception as error:
        return type(error).__name__
    return "passed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_fails_where_the_untouched_one_does(family, monkeypatch):
    untouched = {test: outcome(family, test) for test in TESTS}
    for cls in case_of(family).all_model_classes:
        monkeypatch.setattr(cls, "__init__", converting(cls.__init__))
    found = {test: outcome(family, test) for test in TESTS}
    assert found == untouched
    assert sum(each == "passed" for each in found.values()) > 0.7 * len(TESTS)
