"""``HFHLSTM`` and ``HFHGRU``: torch.nn's layers with virtual projections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hfh.compression.defaults import layer_block
from hfh_kernels.nn import HFHLinear, Pool
from hfh_kernels.spec import require_int

State = tuple[Tensor, ...]
"""What a step hands to the next, each [batch, size]: h, and c of an LSTM."""


class _HFHRecurrent(nn.Module):
    """What both layers are; the step is theirs.

    Of each layer and direction, the projection of the inputs is the submodule ``input_l0`` (or
    ``input_l0_reverse``, ``input_l1`` ...), that of the hidden state ``recurrent_l0``, and with
    ``proj_size`` that of the output ``projection_l0``.
    """

    _GATES: ClassVar[int]
    _STATES: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        pool: Pool,
        block: int = 32,
        **hash_arguments: Any,
    ) -> None:
        super().__init__()
        require_int("input_size", input_size, 1, 2**32)
        require_int("hidden_size", hidden_size, 1, 2**32)
        require_int("num_layers", num_layers, 1, 2**31)
        require_int("proj_size", proj_size, 0, hidden_size - 1)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], received {dropout}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        gates, output = self._GATES * hidden_size, proj_size or hidden_size
        for layer in range(num_layers):
            inputs = output * (1 + bidirectional) if layer else input_size
            for suffix in self._suffixes(layer):
                shapes = {"input": (inputs, gates, bias), "recurrent": (output, gates, bias)}
                if proj_size:
                    shapes["projection"] = (hidden_size, output, False)
                for name, (cols, rows, has_bias) in shapes.items():
                    projection = HFHLinear(
                        cols,
                        rows,
                        has_bias,
                        pool=pool,
                        block=layer_block(block, cols),
                        **hash_arguments,
                    )
                    self.add_module(name + suffix, projection)
        self._reset()

    def reset_parameters(self) -> None:
        """Draw every theta and bias anew; the pool, which other layers read, stays as it is."""
        for projection in self.children():
            if isinstance(projection, HFHLinear):
                projection.reset_parameters()
        self._reset()

    def _reset(self) -> None:
        """torch.nn's distribution: variance 1 / (3 hidden_size) of weights and biases."""
        bound = 1 / math.sqrt(self.hidden_size)
        for projection in self.children():
            if isinstance(projection, HFHLinear):
                projection.scale = bound / math.sqrt(3)
                if projection.bias is not None:
                    nn.init.uniform_(projection.bias, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing, for code that calls it on torch.nn's layers: no weights lie apart."""

    def _suffixes(self, layer: int) -> list[str]:
        """Of the submodules of a layer, one a direction."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.bidirectional]

    @property
    def _state_sizes(self) -> list[int]:
        return [self.proj_size or self.hidden_size, self.hidden_size][: self._STATES]

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As torch.nn's layer: output, and the last state of every layer and direction.

        Args:
            input: [length, batch, input_size], [batch, length, input_size] with ``batch_first``,
                [length, input_size] without a batch, or a PackedSequence.
            hx: the first states, [num_layers * directions, batch, size], without the batch where
                input has none; zeros by default.

        Raises:
            ValueError: a shape is wrong.
        """
        if isinstance(input, PackedSequence):
            steps, batch_sizes = input.data, [int(size) for size in input.batch_sizes]
            states = self._initial_states(steps, batch_sizes[0], hx, input.sorted_indices)
            output, states = self._run(steps, batch_sizes, states)
            packed = PackedSequence(
                output, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            return packed, self._returned(_in_order(states, input.unsorted_indices))
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"input must be 2-d or 3-d with {self.input_size} features, "
                f"received shape {list(input.shape)}"
            )
        is_batch = input.dim() == 3
        if not is_batch:
            input = input.unsqueeze(1)
            hx = self._map_states(hx, lambda state: state.unsqueeze(1))
        elif self.batch_first:
            input = input.transpose(0, 1)
        length, batch = input.shape[:2]
        if length == 0:
            raise ValueError(f"input must have at least one step, received {list(input.shape)}")
        states = self._initial_states(input, batch, hx, None)
        output, states = self._run(input.flatten(0, 1), [batch] * length, states)
        output = output.unflatten(0, (length, batch))
        if not is_batch:
            return output.squeeze(1), self._returned(tuple(state.squeeze(1) for state in states))
        return output.transpose(0, 1) if self.batch_first else output, self._returned(states)

    def _run(
        self, steps: Tensor, batch_sizes: Sequence[int], states: State
    ) -> tuple[Tensor, State]:
        """All layers: outputs [sum(batch_sizes), size * directions] and last states."""
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                steps = nn.functional.dropout(steps, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes(layer):
                first = tuple(state[len(last)] for state in states)
                output, state = self._run_direction(steps, batch_sizes, first, suffix)
                outputs.append(output)
                last.append(state)
            steps = torch.cat(outputs, dim=-1)
        return steps, tuple(torch.stack(kind) for kind in zip(*last, strict=True))

    def _run_direction(
        self, steps: Tensor, batch_sizes: Sequence[int], state: State, suffix: str
    ) -> tuple[Tensor, State]:
        """One layer in one direction; longer sequences come first in the batch.

        Rows of the state beyond a step's batch wait: on the way forward they hold the last states
        of sequences that have ended, on the way back the first ones of those yet to come.
        """
        inputs = self.get_submodule(f"input{suffix}")(steps).split(list(batch_sizes))
        outputs: list[Tensor] = [steps] * len(inputs)
        for step in _order(len(inputs), reverse=suffix.endswith("_reverse")):
            size = batch_sizes[step]
            active = tuple(part[:size] for part in state)
            new = self._step(inputs[step], active, suffix)
            outputs[step] = new[0]
            if size < len(state[0]):
                new = tuple(torch.cat((n, s[size:])) for n, s in zip(new, state, strict=True))
            state = new
        return torch.cat(outputs), state

    def _step(self, input: Tensor, state: State, suffix: str) -> State:
        """The next state from the projected input [batch, gates * hidden_size]."""
        raise NotImplementedError

    def _initial_states(self, steps: Tensor, batch: int, hx: Any, order: Tensor | None) -> State:
        rows = self.num_layers * (1 + self.bidirectional)
        shapes = [(rows, batch, size) for size in self._state_sizes]
        if hx is None:
            return tuple(steps.new_zeros(shape) for shape in shapes)
        states: State = tuple(hx) if self._STATES > 1 else (hx,)
        for state, shape in zip(states, shapes, strict=True):
            if state.shape != shape:
                raise ValueError(
                    f"hx must have shape {list(shape)}, received shape {list(state.shape)}"
                )
        return _in_order(states, order)

    def _map_states(self, hx: Any, function: Any) -> Any:
        if hx is None:
            return None
        return tuple(function(state) for state in hx) if self._STATES > 1 else function(hx)

    def _returned(self, states: State) -> Any:
        return states if self._STATES > 1 else states[0]

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}={getattr(self, name)!r}"
            for name, default in (
                ("num_layers", 1),
                ("bias", True),
                ("batch_first", False),
                ("dropout", 0.0),
                ("bidirectional", False),
                ("proj_size", 0),
            )
            if getattr(self, name) != default
        )
        return f"{self.input_size}, {self.hidden_size}{options}"


class HFHLSTM(_HFHRecurrent):
    """torch.nn.LSTM with virtual projections; no weight is materialised.

    The inputs of a whole sequence are projected at once, the hidden state a step.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size:
            as of ``torch.nn.LSTM``.
        pool: that the projections read.
        block: the longest; a projection of fewer columns takes the largest power of two in them.
        hash_arguments: as of :class:`hfh_kernels.nn.HFHLinear`: num_hashes, depth, width,
            activation, window, rows_per_window, device, dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    _GATES = 4
    _STATES = 2

    def _step(self, input: Tensor, state: State, suffix: str) -> State:
        hidden, cell = state
        gates = input + self.get_submodule(f"recurrent{suffix}")(hidden)
        in_gate, forget_gate, candidate, out_gate = gates.chunk(4, dim=-1)
        cell = forget_gate.sigmoid() * cell + in_gate.sigmoid() * candidate.tanh()
        hidden = out_gate.sigmoid() * cell.tanh()
        if self.proj_size:
            hidden = self.get_submodule(f"projection{suffix}")(hidden)
        return hidden, cell


class HFHGRU(_HFHRecurrent):
    """torch.nn.GRU with virtual projections: arguments and errors as of :class:`HFHLSTM`."""

    _GATES = 3
    _STATES = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        pool: Pool,
        **hash_arguments: Any,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            pool=pool,
            **hash_arguments,
        )

    def _step(self, input: Tensor, state: State, suffix: str) -> State:
        (hidden,) = state
        of_input = input.chunk(3, dim=-1)
        of_hidden = self.get_submodule(f"recurrent{suffix}")(hidden).chunk(3, dim=-1)
        reset_gate = (of_input[0] + of_hidden[0]).sigmoid()
        update_gate = (of_input[1] + of_hidden[1]).sigmoid()
        candidate = (of_input[2] + reset_gate * of_hidden[2]).tanh()
        return (candidate + update_gate * (hidden - candidate),)


def weight_names(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Each projection of a recurrent layer, ours or torch's, and ending of torch's weight's name.

    For instance ("input_l0", "ih_l0"), of ``weight_ih_l0`` and ``bias_ih_l0``.
    """
    roles = {"input": "ih", "recurrent": "hh", **({"projection": "hr"} if layer.proj_size else {})}
    for index in range(int(layer.num_layers)):  # type: ignore[arg-type]
        for direction in ("", "_reverse")[: 1 + bool(layer.bidirectional)]:
            for role, ending in roles.items():
                yield f"{role}_l{index}{direction}", f"{ending}_l{index}{direction}"


def _order(length: int, reverse: bool) -> Sequence[int]:
    return range(length - 1, -1, -1) if reverse else range(length)


def _in_order(states: State, order: Tensor | None) -> State:
    return states if order is None else tuple(state.index_select(1, order) for state in states)
