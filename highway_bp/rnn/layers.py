"""What `GRU` and `LSTM` share: layers, directions, lengths, and the gradient method."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from highway_bp.first_order import refuse_transforms
from highway_bp.has_method import CountedMethod, HasMethod
from highway_bp.methods import Backprop, Method, check_fixed_gamma
from highway_bp.rnn import lengths as by_length
from highway_bp.rnn.steps import Cell, Steps
from highway_bp.surroundings import autocast

CUDNN_WITH_BFLOAT16 = 91300  # first version with such recurrent layers
TILE_BYTES = 2**21  # of one state tensor (L, tile, H); the tensors in use then fit a CPU's cache
States = Tensor | tuple[Tensor, ...]


class MethodRNN(HasMethod, nn.RNNBase):
    """A recurrent network of torch whose backward pass is solved by a gradient method.

    Subclasses inherit from this class first, then from their ``torch.nn`` class. They set ``cells``
    (the cell for each value of ``carry``) and ``n_states`` (the number of states per layer).
    """

    cells: dict[str, Cell]
    n_states: int

    def set_up(self, method: Method | None, carry: str) -> None:
        if carry not in self.cells:
            raise ValueError(f"carry={carry!r}; expected one of {', '.join(self.cells)}")
        self.carry = carry
        self.length = 0  # steps of the last input
        self.iterations: list[int] = []  # for every layer, direction and tile of the batch
        self.method = Backprop() if method is None else method

    def check_method(self, method: Method) -> None:
        super().check_method(method)
        check_fixed_gamma(method)
        if self.proj_size and method.group_size is not None:
            raise ValueError(
                f"proj_size={self.proj_size}; expected 0 with {method}: with a projection no "
                "carry is diagonal"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method}, carry={self.carry!r}"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, States]:
        """As in ``torch.nn``, with one more argument.

        Args:
            input: (L, B, I), (B, L, I) with ``batch_first``, (L, I), or a packed sequence.
            hx: the initial state (layers * directions, B, H); for an LSTM the pair (h_0, c_0).
            lengths: whole numbers (B,), the steps of each sequence of a padded input, in any
                order. Outputs after a sequence's end are zero; its last state is that at its end.

        Returns:
            The outputs (L, B, directions * H), in the form of the input, and the last state, in
            the form of hx.

        Raises:
            TypeError, ValueError, RuntimeError: inputs do not fit (as in ``torch.nn``); lengths
                are not whole numbers from 1 to L, one for each sequence; the call is within a
                transform of ``torch.func``, with a method other than ``Backprop()``.
        """
        packed = isinstance(input, PackedSequence)
        if not packed and input.dim() not in (2, 3):
            return self._library(input, hx)  # torch raises the error
        time = 1 if self.batch_first and not packed and input.dim() == 3 else 0
        self.length = len(input.batch_sizes) if packed else input.shape[time]
        if lengths is not None:
            return self._padded(input, hx, lengths)
        by_autograd = not torch.is_grad_enabled() or self.method.group_size is None
        if by_autograd or not self._fits(hx, 3 if packed else input.dim()):
            return self._library(input, hx)
        refuse_transforms(type(self).__name__)
        if packed:
            return self._packed(input, hx)
        if input.dim() == 3:
            x = input.movedim(0, 1) if self.batch_first else input  # (L, B, I)
            output, states = self._layers(x, self._start(x, hx), None)
            return output.movedim(1, 0) if self.batch_first else output, self._in_torch_form(states)
        if hx is not None:
            hx = self._in_torch_form([s.unsqueeze(1) for s in self._listed(hx)])
        x = input.unsqueeze(1)
        output, states = self._layers(x, self._start(x, hx), None)
        return output.squeeze(1), self._in_torch_form([s.squeeze(1) for s in states])

    def _padded(self, input, hx, lengths: Tensor | Sequence[int]):
        """Run a padded input as a packed one; the tensor of lengths is copied to the CPU."""
        if isinstance(input, PackedSequence) or input.dim() != 3:
            raise ValueError("lengths are given; expected a padded input of 3 dimensions with them")
        L, batch = self.length, 0 if self.batch_first else 1
        lengths = by_length.check_lengths(lengths, L, input.shape[batch])
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=False)
        (data, sizes, _, back), states = self.forward(packed, hx)
        output, _ = pad_packed_sequence(PackedSequence(data, sizes), self.batch_first, 0.0, L)
        return output.index_select(batch, back), states

    def _library(self, input, hx):
        """Run ``torch.nn``'s forward pass. Under autocast on CUDA, it uses the gradient
        methods' dtype: torch's own autocast wrapper of cuDNN supports float16 only."""
        dtype = self._autocast_dtype(input.data.device)
        if dtype is None:
            return super().forward(input, hx)
        weights = self._flat_weights
        try:
            self._flat_weights = [w.to(dtype) for w in weights]
            with torch.autocast("cuda", enabled=False):
                if hx is not None:
                    hx = self._in_torch_form([s.to(dtype) for s in self._listed(hx)])
                return super().forward(input.to(dtype), hx)
        finally:
            self._flat_weights = weights

    def _autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """The autocast region's dtype on CUDA, float32 if cuDNN lacks it; None outside a region."""
        if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
            return None
        dtype = torch.get_autocast_dtype("cuda")
        has_it = dtype != torch.bfloat16 or torch.backends.cudnn.version() >= CUDNN_WITH_BFLOAT16
        return dtype if has_it else torch.float32

    def _packed(self, input: PackedSequence, hx):
        """As in torch, rows are sorted by length, and no indices are copied to the CPU."""
        data, sizes, order, back = input
        x, lengths = pad_packed_sequence(PackedSequence(data, sizes))
        start = self._start(x, hx)
        if hx is not None and order is not None:
            start = [s.index_select(1, order) for s in start]
        output, states = self._layers(x, start, lengths)
        if back is not None:
            states = [s.index_select(1, back) for s in states]
        data = pack_padded_sequence(output, lengths).data
        return PackedSequence(data, sizes, order, back), self._in_torch_form(states)

    def _start(self, x: Tensor, hx) -> list[Tensor]:
        """Initial states that fit x (L, B, I); zeros if none are given."""
        if hx is None:
            D = 1 + self.bidirectional
            zeros = x.new_zeros(self.num_layers * D, x.shape[1], self.hidden_size)
            hx = self._in_torch_form([zeros] * self.n_states)
        self.check_forward_args(x.movedim(1, 0) if self.batch_first else x, hx, None)
        return self._listed(hx)

    def _fits(self, hx: States | None, dims: int) -> bool:
        """Whether number and dimensions of the states are right; if not, torch raises the error."""
        given = [] if hx is None else self._listed(hx)
        return len(given) in (0, self.n_states) and all(s.dim() == dims for s in given)

    def _listed(self, hx: States) -> list[Tensor]:
        return [hx] if self.n_states == 1 else list(hx)

    def _in_torch_form(self, states: Sequence[Tensor]) -> States:
        return states[0] if self.n_states == 1 else tuple(states)

    def _layers(self, x: Tensor, start: list[Tensor], lengths: Tensor | None):
        """Output (L, B, D * H) and last states (D * num_layers, B, H) of all layers."""
        on_cpu = lengths  # for packing
        if lengths is not None:
            lengths = lengths.to(x.device, non_blocking=True)
        dtype = self._autocast_dtype(x.device)
        if dtype is not None:
            x, start = x.to(dtype), [s.to(dtype) for s in start]
        method = CountedMethod(self.method, self)
        self._update_flat_weights()  # as torch does: it evaluates parametrized weights
        weights = dict(zip(self._flat_weights_names, self._flat_weights, strict=True))
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = self._dropped(x, on_cpu)
            outputs = []
            for suffix in ("", "_reverse")[: 1 + self.bidirectional]:
                way_in = by_length.reverse(x, lengths) if suffix else x
                own = [s[len(last)] for s in start]  # last: one entry per layer and direction
                of_layer = [w for name, w in weights.items() if name.endswith(f"_l{layer}{suffix}")]
                h, states = self._direction(method, way_in, own, of_layer, lengths)
                outputs.append(by_length.reverse(h, lengths) if suffix else h)
                last.append(states)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        # A node of its own: hooks on the output do not see the gradient of the last states.
        return x.view_as(x), [torch.stack(states) for states in zip(*last, strict=True)]

    def _dropped(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Dropout between layers. With lengths, of packed data: it draws torch's random numbers."""
        if lengths is None or not (self.training and self.dropout):
            return nn.functional.dropout(x, self.dropout, self.training)
        data, sizes, *_ = pack_padded_sequence(x, lengths)
        data = nn.functional.dropout(data, self.dropout)
        return pad_packed_sequence(PackedSequence(data, sizes), total_length=len(x))[0]

    @torch.compiler.disable  # as the compiler does with torch's own recurrent layers
    def _direction(self, method: Method, x, start, weights: list, lengths: Tensor | None):
        """Outputs (L, B, H), arbitrary after a sequence's end, and last states (B, H)."""
        dtype = self._autocast_dtype(x.device)
        # Views: an assignment to ``.data`` before the backward pass does not change them.
        weights = [w.view_as(w) if dtype is None else w.to(dtype) for w in weights]
        ends = None if lengths is None else lengths - 1
        L, B = x.shape[:2]
        row = max(L * self.hidden_size * x.element_size(), 1)
        tile = B if x.is_cuda else max(1, min(B, TILE_BYTES // row))
        cell = self.cells[self.carry]
        with autocast(x.device, enabled=False if x.is_cuda else None):
            found = Steps.apply(cell, method, tile, ends, self.n_states, x, *start, *weights)
        h, *states = found if isinstance(found, tuple) else (found,)
        if lengths is not None:  # torch's dtype of packed sequences under autocast on the CPU
            dtype = torch.promote_types(h.dtype, start[0].dtype)
            h, states = h.to(dtype), [s.to(dtype) for s in states]
        return h, (by_length.last(h, lengths), *states)
