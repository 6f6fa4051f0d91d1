"""The paper's recurrent networks against the same built of torch's layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import highway_bp as hb
from models.rnn import PixelGRU, RNNLanguageModel

V, H, L, B = 11, 6, 7, 3


class Plain(nn.Module):
    """`RNNLanguageModel` in torch's own layers."""

    def __init__(self, ours: RNNLanguageModel):
        super().__init__()
        self.ours = ours
        kinds = {hb.GRU: nn.GRU, hb.LSTM: nn.LSTM}
        self.layers = nn.ModuleList(
            kinds[type(layer)](H, H, dtype=torch.float64) for layer in ours.layers
        )
        self.layers.load_state_dict(ours.layers.state_dict())

    def forward(self, x):
        one_hot = F.one_hot(x.T, V).double()
        h = F.linear(one_hot, self.ours.project.weight.T, self.ours.project.bias)
        for layer in self.layers:
            h = layer(h)[0] + (h if len(self.layers) > 1 else 0)
        return F.linear(h, self.ours.classify.weight, self.ours.classify.bias).transpose(0, 1)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("layers", [1, 3])
def test_language_models_equal_torchs(cell, layers):
    ours = RNNLanguageModel(V, cell, H, layers).double()
    plain = Plain(ours)
    hb.set_method(ours, hb.Highway(L))
    x, y = torch.randint(V, (B, L)), torch.randint(V, (B, L))
    grads = []
    for model, own in ((ours, ours.layers), (plain, plain.layers)):
        logits = model(x)
        assert logits.shape == (B, L, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        shared = [*ours.project.parameters(), *ours.classify.parameters()]
        grads.append([loss, *torch.autograd.grad(loss, [*shared, *own.parameters()])])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_pixel_gru_reads_row_by_row_and_has_one_bias_per_gate():
    model = PixelGRU(10, H).double()
    x = torch.randn(B, 3, 4, 4, dtype=torch.float64)
    plain = nn.GRU(H, H, dtype=torch.float64)
    plain.load_state_dict(model.rnn.state_dict())
    assert not plain.bias_hh_l0.any()
    pixels = torch.stack([x[:, :, i, j] for i in range(4) for j in range(4)])
    torch.testing.assert_close(model(x), model.classify(plain(model.project(pixels))[0][-1]))
    hb.set_method(model, hb.Highway(2))
    model(x).sum().backward()
    assert model.rnn.bias_hh_l0.grad is None and model.rnn.bias_ih_l0.grad is not None
