"""Highway backpropagation: gradients by iterative propagation along the residual path.

Fagnou, Caillon, Delattre, Allauzen, ICLR 2025. The forward pass is exact; ``method`` chooses how
the backward pass is solved:

    >>> layers = [nn.TransformerEncoderLayer(8, 2, norm_first=True) for _ in range(3)]
    >>> chain = hb.ResidualChain(layers, method=hb.Highway(k=1))
    >>> chain(torch.randn(5, 4, 8)).square().mean().backward()
"""

from highway_bp import compiler as _compiler  # noqa: F401  has an effect
from highway_bp import schedules
from highway_bp.auto_gamma import AutoGamma
from highway_bp.carry import Carry, Diagonal, Identity, LinearMap, Permutation, Scalar
from highway_bp.chain import ResidualChain, ResidualLayer
from highway_bp.diagnostics.advice import Advice
from highway_bp.diagnostics.advise import advise
from highway_bp.diagnostics.estimated_error import EstimatedError, estimated_error
from highway_bp.diagnostics.gradient_error import GradientError, gradient_error
from highway_bp.method_state import chains, load_method_state, method_state
from highway_bp.methods import Backprop, FixedPoint, Highway, Method, TruncatedBPTT
from highway_bp.mgrit import MGRIT
from highway_bp.parallel.owners import load_whole_state_dict, total_norm, whole_state_dict
from highway_bp.parallel.shard import replicate, shard
from highway_bp.parallel.sharded_chain import ShardedChain
from highway_bp.rnn.gru import GRU
from highway_bp.rnn.lstm import LSTM
from highway_bp.rnn.recurrent import Recurrent
from highway_bp.scan import cumsumprod
from highway_bp.schedules.trainer_callback import trainer_callback
from highway_bp.set_method import chain_length, current_method, iterations, set_method
from highway_bp.trunks.convert import convert

__version__ = "0.2.0"

__all__ = [
    "GRU",
    "LSTM",
    "MGRIT",
    "Advice",
    "AutoGamma",
    "Backprop",
    "Carry",
    "Diagonal",
    "EstimatedError",
    "FixedPoint",
    "GradientError",
    "Highway",
    "Identity",
    "LinearMap",
    "Method",
    "Permutation",
    "Recurrent",
    "ResidualChain",
    "ResidualLayer",
    "Scalar",
    "ShardedChain",
    "TruncatedBPTT",
    "advise",
    "chain_length",
    "chains",
    "convert",
    "cumsumprod",
    "current_method",
    "estimated_error",
    "gradient_error",
    "iterations",
    "load_method_state",
    "load_whole_state_dict",
    "method_state",
    "replicate",
    "schedules",
    "set_method",
    "shard",
    "total_norm",
    "trainer_callback",
    "whole_state_dict",
]


def __dir__() -> list[str]:
    return __all__
