"""Highway backpropagation: gradients by iterative propagation along the residual path.

Fagnou, Caillon, Delattre, Allauzen, ICLR 2025. The forward pass is exact; ``method`` chooses how
the backward pass is solved::

    chain = hb.ResidualChain(layers, method=hb.Highway(k=3))
    head(chain(x)).backward()
"""

from highway_bp.carry import Carry, Diagonal, Identity, LinearMap, Permutation, Scalar
from highway_bp.chain import ResidualChain, set_method
from highway_bp.gru import GRU
from highway_bp.methods import Backprop, FixedPoint, Highway, Method
from highway_bp.scan import cumsumprod

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "Backprop",
    "Carry",
    "Diagonal",
    "FixedPoint",
    "Highway",
    "Identity",
    "LinearMap",
    "Method",
    "Permutation",
    "ResidualChain",
    "Scalar",
    "cumsumprod",
    "set_method",
]
