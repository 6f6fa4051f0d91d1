"""Models built from transformers and torchvision."""

import pytest
import torch

import highway_bp as hb
from models.decoder import Decoder
from models.image_models import VisionTransformer, torchvision_resnet
from models.pretrained import quiet_transformers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_look_back_alone(family):
    model = Decoder(30, family, layers=2, hidden=16, heads=2, length=8).eval()
    x = torch.randint(0, 30, (2, 8))
    y = x.clone()
    y[:, 5:] = 0
    torch.testing.assert_close(model(x)[:, :5], model(y)[:, :5])


def test_a_decoder_is_saved_as_transformers_does(tmp_path):
    model = Decoder(30, "llama", layers=1, hidden=16, heads=2, length=8).eval()
    model.save_pretrained(tmp_path)
    back = quiet_transformers().AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randint(0, 30, (2, 8))
    torch.testing.assert_close(back(input_ids=x).logits, model(x))


def test_image_models():
    vit = VisionTransformer(10, layers=2, hidden=12, heads=2)
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    resnet = torchvision_resnet(7, "resnet50")
    assert [chain.length for chain in hb.chains(resnet)] == [16]
