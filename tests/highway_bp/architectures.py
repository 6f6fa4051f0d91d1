"""Tiny float64 chains, one of each kind a user may bring.

Every layer is written as f(h) = r(h, g(h)) so that the oracle can hold the block's output; the
library sees only `forward`, `carry` and, in an `hb.ResidualLayer`, `block`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import highway_bp as hb


class Plain(nn.Module):
    """f(h) = h + inner(h); the carry is the identity, so nothing is declared."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def g(self, h: Tensor, *args, **kwargs) -> Tensor:
        return self.inner(h, *args, **kwargs)

    def r(self, h: Tensor, z: Tensor) -> Tensor:
        return h + z

    def forward(self, h: Tensor, *args, **kwargs) -> Tensor:
        return self.r(h, self.g(h, *args, **kwargs))


class Split(hb.ResidualLayer):
    """Mixed into a layer h + g(h): makes it an `hb.ResidualLayer`."""

    def block(self, h: Tensor, *args, **kwargs) -> Tensor:
        return self.g(h, *args, **kwargs)


def split(layer: type[Plain]) -> type[Plain]:
    return type(f"{layer.__name__}Split", (Split, layer), {})


class ReluAfterSum(Plain):
    def r(self, h, z):
        return F.relu(h + z)

    def carry(self, h_in, h_out):
        return (h_out > 0).to(h_out.dtype)


class InPlaceRelu(ReluAfterSum):
    """The carry is a mask of bool."""

    def r(self, h, z):
        return (h + z).relu_()

    def carry(self, h_in, h_out):
        return h_out > 0


class Scaled(Plain):
    """f(h) = s h + inner(h), s a number or learnt numbers; ``carry_of`` makes the carry of s."""

    def __init__(self, inner: nn.Module, s: float | nn.Parameter, carry_of=lambda s, h: s) -> None:
        super().__init__(inner)
        self.s, self.carry_of = s, carry_of

    def r(self, h, z):
        return self.s * h + z

    def carry(self, h_in, h_out):
        return self.carry_of(self.s, h_in)


def learnt(*shape: int) -> nn.Parameter:
    """A number per channel: a parameter on the residual path."""
    return nn.Parameter(0.5 + torch.rand(shape))


class Gated(Plain):
    """GRU-like: f(h) = a(h) h + b(h)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width))

    def g(self, h):
        a, b = self.inner(h).chunk(2, -1)
        return torch.stack([torch.sigmoid(a), torch.tanh(b)])

    def r(self, h, z):
        return z[0] * h + z[1]

    def carry(self, h_in, h_out):
        with torch.no_grad():
            return self.g(h_in)[0]


class Permuted(Plain):
    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__(inner)
        self.register_buffer("index", torch.randperm(channels))

    def r(self, h, z):
        return h.index_select(1, self.index) + z

    def carry(self, h_in, h_out):
        return hb.Permutation(self.index)


class Shortcut(Plain):
    """f(h) = shortcut(h) + inner(h), shortcut linear and learnt: the state may change its shape."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module) -> None:
        super().__init__(inner)
        self.shortcut = shortcut

    def r(self, h, z):
        return self.shortcut(h) + z

    def carry(self, h_in, h_out):
        return hb.LinearMap(self.shortcut, h_in)


class ShortcutRelu(Shortcut):
    def r(self, h, z):
        return F.relu(self.shortcut(h) + z)

    def carry(self, h_in, h_out):
        return hb.Diagonal((h_out > 0).to(h_out.dtype)) @ hb.LinearMap(self.shortcut, h_in)


class Constant(Plain):
    """f(h) = parameter: the state does not depend on the one before."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(nn.Identity())
        self.value = nn.Parameter(torch.randn(shape))

    def g(self, h):
        return self.value

    def r(self, h, z):
        return z + 0.0 * h

    def forward(self, h):
        return self.value * 1.0

    def carry(self, h_in, h_out):
        return 0.0


class BlockBlindToState(Plain):
    def g(self, h):
        return self.inner(h.detach())


class Masked(nn.Module):
    """Takes a positional mask and an optional keyword scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor, mask: Tensor, scale: Tensor | float | None = None) -> Tensor:
        y = torch.tanh(self.linear(h)) * mask
        return y if scale is None else y * scale


PlainSplit = split(Plain)


def linear(n: int = 4, m: int | None = None) -> nn.Module:
    return nn.Linear(n, m or n)


def tanh(n: int = 4, m: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(n, m or n), nn.Tanh())


def mlp(n: int = 4, m: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(n, 6), nn.GELU(), nn.Linear(6, m or n))


def pre_norm_mlp(n: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(n), mlp(n))


def conv(c: int = 2, out: int | None = None, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, 3, 3, stride, 1), nn.SiLU(), nn.Conv2d(3, out or c, 3, 1, 1))


def bn_conv(c: int = 2) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1, bias=False))


def strided(c: int, out: int) -> nn.Module:
    return nn.Conv2d(c, out, 1, 2, bias=False)


@dataclass
class Architecture:
    layers: list[nn.Module]
    x: Tensor
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    x_requires_grad: bool = True

    @property
    def leaves(self) -> list[Tensor]:
        """Parameters, then extra tensor arguments: everything that can get a gradient but x."""
        tensors = [*nn.ModuleList(self.layers).parameters(), *self.args, *self.kwargs.values()]
        return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def rows(n: int = 4, batch: int = 3) -> Tensor:
    return torch.randn(batch, n)


def images(c: int = 2, size: int = 3) -> Tensor:
    return torch.randn(2, c, size, size)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def with_unused_parameter(layer: nn.Module) -> nn.Module:
    layer.unused = nn.Parameter(torch.ones(2))
    return layer


def evaluating(layer: nn.Module) -> nn.Module:
    """Running statistics that are not 0 and 1, then eval mode."""
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    return layer.eval()


def tied() -> list[nn.Module]:
    first, second, third = (Plain(tanh()) for _ in range(3))
    third.inner[0].weight = first.inner[0].weight
    return [first, second, third]


def module_twice() -> list[nn.Module]:
    first, second = Plain(mlp()), PlainSplit(tanh())
    return [first, second, first, second]


def weight_norm_layer() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh())


def A(make: Callable, count: int, x: Callable = rows, **kwargs) -> Callable[[], Architecture]:
    return lambda: Architecture([make() for _ in range(count)], x(), **kwargs)


def L(layers: Callable, x: Callable = rows, **kwargs) -> Callable[[], Architecture]:
    return lambda: Architecture(list(layers()), x(), **kwargs)


def masked(layer: Callable, mask: Tensor, **kwargs) -> Architecture:
    return Architecture([layer(Masked(4)) for _ in range(3)], rows(), (mask,), kwargs)


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "linear-1": A(lambda: Plain(linear()), 1),
    "linear-6": A(lambda: Plain(linear()), 6),
    "channels-last-conv": A(
        lambda: Plain(conv()), 2, lambda: images().to(memory_format=torch.channels_last)
    ),
    "vector-state": A(lambda: Plain(tanh()), 3, lambda: torch.randn(4)),
    "split-mlp-4": A(lambda: PlainSplit(mlp()), 4),
    "split-conv-3": A(lambda: PlainSplit(conv()), 3, images),
    "split-and-opaque": L(lambda: [Plain(mlp()), PlainSplit(tanh()), Plain(linear())]),
    "batchnorm-eval": A(lambda: evaluating(Plain(bn_conv())), 4, images),
    "batchnorm-train": A(lambda: Plain(bn_conv()), 3, images),
    "batchnorm-train-split": A(lambda: PlainSplit(bn_conv()), 3, images),
    "relu-after-sum": A(lambda: ReluAfterSum(mlp()), 5),
    "relu-after-sum-in-place": A(lambda: InPlaceRelu(conv()), 3, images),
    "scalar": A(lambda: Scaled(tanh(), 0.7), 4),
    "scalar-mixed": L(lambda: [Scaled(mlp(), s) for s in (0.5, -1.3, 1.0)]),
    "gated": A(lambda: Gated(4), 5),
    "residual-parameter": A(lambda: Scaled(tanh(), learnt(4), torch.Tensor.expand_as), 3),
    "broadcast-diagonal": A(lambda: Scaled(conv(), learnt(2, 1, 1)), 3, images),
    "permutation": A(lambda: Permuted(tanh(), 4), 5),
    "permutation-channels": A(lambda: Permuted(conv(3), 3), 3, lambda: images(3, 2)),
    "strided-shortcut": L(
        lambda: [
            Plain(conv(2)),
            Shortcut(conv(2, 3, 2), strided(2, 3)),
            Plain(conv(3)),
            Shortcut(conv(3, 4, 2), strided(3, 4)),
            PlainSplit(conv(4)),
        ],
        lambda: images(2, 4),
    ),
    "strided-shortcut-relu": L(
        lambda: [
            ReluAfterSum(conv(2)),
            ShortcutRelu(conv(2, 3, 2), strided(2, 3)),
            ReluAfterSum(conv(3)),
            ShortcutRelu(conv(3, 4, 2), strided(3, 4)),
        ],
        lambda: images(2, 4),
    ),
    "linear-shortcut-widths": L(
        lambda: [
            Shortcut(mlp(n, m), nn.Linear(n, m, bias=False))
            for n, m in ((4, 6), (6, 3), (3, 3), (3, 5))
        ]
    ),
    "every-carry": L(
        lambda: [
            Plain(mlp()),
            Scaled(tanh(), 0.8, lambda s, h: hb.Scalar(s)),
            Permuted(mlp(), 4),
            ReluAfterSum(mlp()),
            Shortcut(mlp(), nn.Linear(4, 4, bias=False)),
            Gated(4),
        ]
    ),
    "no-residual": A(lambda: Scaled(mlp(), 0.0), 4),
    "constant-layer": L(lambda: [Plain(mlp()), Constant((3, 4)), Plain(mlp())]),
    "block-blind-to-state": L(lambda: [Plain(mlp()), BlockBlindToState(mlp()), Plain(mlp())]),
    "no-parameters": A(lambda: Plain(nn.Tanh()), 4),
    "unused-parameter": A(lambda: with_unused_parameter(Plain(tanh())), 2),
    "frozen-middle": L(
        lambda: [Plain(mlp()), frozen(Plain(mlp())), frozen(PlainSplit(mlp())), Plain(mlp())]
    ),
    "frozen-prefix": L(
        lambda: [frozen(Plain(mlp())), frozen(Plain(mlp())), Plain(mlp()), Plain(tanh())],
        x_requires_grad=False,
    ),
    "input-without-gradient": A(lambda: Plain(mlp()), 3, x_requires_grad=False),
    "shared-parameter": L(tied),
    "module-used-twice": L(module_twice),
    "argument-with-gradient": lambda: masked(Plain, torch.rand(4, requires_grad=True), scale=0.5),
    "keyword-with-gradient": lambda: masked(
        PlainSplit, torch.ones(4), scale=torch.rand(3, 1, requires_grad=True)
    ),
    "weight-norm": A(lambda: Plain(weight_norm_layer()), 3),
    "zero-block-split": L(
        lambda: [
            PlainSplit(mlp()),
            split(BlockBlindToState)(mlp()),
            PlainSplit(tanh()),
            split(BlockBlindToState)(tanh()),
        ]
    ),
}


def build(name: str) -> Architecture:
    """The architecture `name`, the same numbers at every call."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sorted(ARCHITECTURES).index(name))
            return ARCHITECTURES[name]()
    finally:
        torch.set_default_dtype(default)
