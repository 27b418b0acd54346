"""What a network costs as it is compressed, and what it would cost dense, hashed or pruned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfh.costs import cost_formulas as formulas
from hfh.costs.cost_formulas import MethodCost, Use, Weight
from hfh.text_table import short, text_table
from hfh_kernels.nn import HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool
from hfh_kernels.nn.dense_rows import DenseRows
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.spec import HashSpec, Reconstruction

DENSE = "dense"
HASHED_NETS = "HashedNets"
HFH = "HFH"
SPARSE = "CSR"
METHODS = (DENSE, HASHED_NETS, HFH, SPARSE)

Shape = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One layer, or parameters that no counted layer has.

    Args:
        name: the layer's path in the model.
        kind: its class.
        shape: (rows, cols) of its weight as a matrix; None where it has more than one or none.
        use: what the pass did with it.
        costs: by method.
    """

    name: str
    kind: str
    shape: Shape | None
    use: Use
    costs: dict[str, MethodCost]


@dataclass(frozen=True)
class Cost:
    """Rows and their sums, by method: those of METHODS, or dense alone for a model that is dense.

    HFH is the model as it is. The others store as many numbers: HashedNets a pool a layer in
    proportion to its weight, one hash and no g; CSR as many elements of each weight, chosen once.
    """

    rows: list[Row]

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(method for method in METHODS if method in self.rows[0].costs)

    @property
    def totals(self) -> dict[str, MethodCost]:
        return {
            method: sum((row.costs[method] for row in self.rows), MethodCost())
            for method in self.methods
        }

    def table(self) -> str:
        """Plain text: a line a layer, then the totals of each method."""
        method = HFH if HFH in self.methods else DENSE
        layers, methods = [], []
        for row in self.rows:
            shape = "" if row.shape is None else " x ".join(map(str, row.shape))
            own = row.costs[method]
            numbers = (own.parameters, *dataclasses.astuple(own.forward))
            layers.append((row.name, row.kind, shape, *map(short, numbers)))
        for name, total in self.totals.items():
            storage = map(short, (total.parameters, total.bytes, total.optimizer_bytes))
            forward, training = (
                map(short, dataclasses.astuple(work)) for work in (total.forward, total.training)
            )
            methods.append((name, *storage, "forward", *forward))
            methods.append(("", "", "", "", "training", *training))
        operations = ("multiply-adds", "hash", "gathers", "g")
        of_layer = ("layer", "kind", "shape", "parameters", *operations)
        of_method = ("method", "parameters", "bytes", "Adam's bytes", "pass", *operations)
        by_layer = text_table(of_layer, layers, left=range(3))
        return (
            f"Each layer, {method}, forward pass:\n\n{by_layer}\n\n"
            f"All layers:\n\n{text_table(of_method, methods)}\n\n"
            "Counted, not timed. Hash: operations on 32-bit integers. Gathers: runs of neighbours\n"
            "read at a hashed or stored place. G: operations of signs, g and scale."
        )

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Rows and totals, of training too, as one JSON object."""
        totals = {
            method: {**dataclasses.asdict(total), "training": dataclasses.asdict(total.training)}
            for method, total in self.totals.items()
        }
        return json.dumps(
            {"rows": [dataclasses.asdict(row) for row in self.rows], "totals": totals}
        )


def cost(
    model: nn.Module,
    inputs: Sequence[int] | Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """Parameters, bytes and operations of a network, by layer and method; COST.md says of what.

    The model runs once, in evaluation mode and without gradients, to see what its layers do.
    Counted are operations on weights: of linear, convolutional, embedding, recurrent and attention
    layers of torch.nn, and of all layers over a pool. The rest (norms, activations, products of
    activations among themselves) is the same in every method.

    Args:
        model: any; not changed.
        inputs: the shape of its only argument, which is then zeros, or that argument; or a sequence
            of its arguments, or a mapping of those it takes by name.
        dtype: of zeros, where inputs is a shape; an integer one for a model that looks up rows.

    Raises:
        TypeError: inputs is none of these.
        ValueError: inputs is empty, or a size in it negative; or the model has no parameters.
        Whatever the model raises for these inputs.
    """
    arguments, keywords = _arguments(inputs, dtype, model)
    uses: dict[nn.Module, Use] = {}
    with _watched(model, uses), torch.no_grad():
        model(*arguments, **keywords)
    return _cost(model, uses)


def weight_cost(model: nn.Module, positions: int = 1) -> Cost:
    """:func:`cost` without running the model: every matrix multiplied with ``positions`` vectors.

    Embeddings look up as many rows. For weights whose forward pass is elsewhere, as in a file.

    Raises:
        ValueError: positions is less than 1, or the model has no parameters.
    """
    if positions < 1:
        raise ValueError(f"positions must be at least 1, received {positions}")
    uses: dict[nn.Module, Use] = {}
    for layer in model.modules():
        weight = _weight(layer)
        if isinstance(layer, _TABLES):
            uses[layer] = Use(1, lookups=positions)
        elif weight is not None:
            rows = weight.rows - weight.dense_rows
            uses[layer] = Use(1, rows=rows, multiply_adds=positions * weight.size)
        elif isinstance(layer, _SEVERAL_WEIGHTS):
            # The output projection of attention is a layer of its own.
            own = layer.parameters(recurse=False)
            size = sum(parameter.numel() for parameter in own if parameter.dim() == 2)
            uses[layer] = Use(1, multiply_adds=positions * size)
    return _cost(model, uses)


_LINEAR = (nn.Linear, HFHLinear)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TABLES = (nn.Embedding, nn.EmbeddingBag, HFHEmbedding, HFHEmbeddingBag)
_ONE_WEIGHT = (*_LINEAR, *_CONVOLUTIONS, *_TRANSPOSED, *_TABLES, HFHLayer)
_SEVERAL_WEIGHTS = (nn.RNNBase, nn.MultiheadAttention)


def _virtual_weight(layer: HFHLayer) -> Weight:
    return Weight(*layer.weight_shape, layer.dense_rows if isinstance(layer, DenseRows) else 0)


def _weight(layer: nn.Module) -> Weight | None:
    """The layer's only weight as a matrix; None where it has none or several."""
    if isinstance(layer, HFHLayer):
        return _virtual_weight(layer)
    if isinstance(layer, _ONE_WEIGHT):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return Weight(len(weight), weight[0].numel())
    return None


def _shape(layer: nn.Module) -> Shape | None:
    weight = _weight(layer)
    return None if weight is None else (weight.rows, weight.cols)


def _use(layer: nn.Module, arguments: Sequence[Any], output: Any) -> Use:
    """What one call of a counted layer does."""
    if isinstance(layer, nn.RNNBase):
        packed_or_padded = output[0]
        steps = getattr(packed_or_padded, "data", packed_or_padded).shape[:-1].numel()
        sizes = [parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1]
        return Use(1, multiply_adds=steps * sum(sizes))
    if isinstance(layer, nn.MultiheadAttention):
        query, key, value = (tensor.numel() for tensor in arguments[:3])
        # Of each vector to embed_dim features, and of the heads' outputs again.
        return Use(1, multiply_adds=(2 * query + key + value) * layer.embed_dim)
    weight = _weight(layer)
    assert weight is not None
    if isinstance(layer, nn.EmbeddingBag | HFHEmbeddingBag):
        return Use(1, lookups=arguments[0].numel())
    if isinstance(layer, _TABLES):
        return Use(1, lookups=output.numel() // weight.cols)
    if isinstance(layer, _TRANSPOSED):
        return Use(1, weight.rows, arguments[0].numel() * weight.cols)
    # A projection may be asked for some of its features only.
    rows = output.shape[-1] if isinstance(layer, _LINEAR) else weight.rows
    return Use(1, rows - weight.dense_rows, output.numel() * weight.cols)


@contextmanager
def _watched(model: nn.Module, uses: dict[nn.Module, Use]) -> Iterator[None]:
    """Adds up the uses of layers that are called in the context, in evaluation mode."""

    def add(
        layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        names = ("query", "key", "value", "input")
        arguments = (*positional, *(named[name] for name in names if name in named))
        use = _use(layer, arguments, output)
        uses[layer] = uses.get(layer, Use()) + use

    counted = (*_ONE_WEIGHT, *_SEVERAL_WEIGHTS)
    layers = [layer for layer in model.modules() if isinstance(layer, counted)]
    handles = [layer.register_forward_hook(add, with_kwargs=True) for layer in layers]
    training = {module: module.training for module in model.modules()}
    # torch.nn's encoders otherwise hand nested tensors to their layers, or do not call them.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def _arguments(
    inputs: Any, dtype: torch.dtype, model: nn.Module
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and named arguments of the model."""
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if not isinstance(inputs, Sequence):
        raise TypeError(
            "inputs must be a shape, a tensor, or a sequence or mapping of arguments, "
            f"received {inputs!r}"
        )
    if len(inputs) == 0:
        raise ValueError(f"inputs must not be empty, received {inputs!r}")
    if all(isinstance(size, int) for size in inputs):
        if min(inputs) < 0:
            raise ValueError(f"inputs must not have negative sizes, received {list(inputs)}")
        device = next((parameter.device for parameter in model.parameters()), None)
        return (torch.zeros(*inputs, dtype=dtype, device=device),), {}
    return inputs, {}


def _cost(model: nn.Module, uses: Mapping[nn.Module, Use]) -> Cost:
    rows = list(_rows(model, uses))
    if not rows:
        raise ValueError("model has no parameters")
    return Cost(rows)


def _rows(model: nn.Module, uses: Mapping[nn.Module, Use]) -> Iterator[Row]:
    """Every counted layer, then the pools, then all parameters that are in none of these."""
    pools = {
        module.weight: name for name, module in model.named_modules() if isinstance(module, Pool)
    }
    methods = METHODS if pools else (DENSE,)
    num_stored = _num_stored(model)
    unclaimed = dict.fromkeys(model.parameters())
    seen: set[Hashable] = set()

    def claim(parameters: Iterable[nn.Parameter]) -> MethodCost:
        """The storage of those parameters that no row has yet."""
        total = MethodCost()
        for parameter in parameters:
            if parameter in unclaimed:
                del unclaimed[parameter]
                total += formulas.stored(parameter.numel(), parameter.element_size())
        return total

    def alike(name: str, kind: str, shape: Shape | None, use: Use, cost: MethodCost) -> Row:
        return Row(name, kind, shape, use, dict.fromkeys(methods, cost))

    for name, layer in model.named_modules():
        use = uses.get(layer, Use())
        kind = type(layer).__name__
        if isinstance(layer, HFHLayer):
            weight = _virtual_weight(layer)
            is_first = _identity(layer) not in seen
            seen.add(_identity(layer))
            costs = _costs_of_weight(layer, weight, use, num_stored(weight), is_first)
            costs[HFH] += claim([layer.theta])
            others = claim(value for value in layer.parameters() if value not in pools)
            costs = {method: others + cost for method, cost in costs.items()}
            yield Row(name, kind, layer.weight_shape, use, costs)
        elif isinstance(layer, (*_ONE_WEIGHT, *_SEVERAL_WEIGHTS)):
            storage = claim(layer.parameters())
            # A part of an attention layer, which computes by itself, has neither.
            if use.calls or storage.parameters:
                yield alike(name, kind, _shape(layer), use, storage + formulas.dense(use))
    for pool, name in pools.items():
        row = alike(name, Pool.__name__, None, Use(), MethodCost())
        row.costs[HFH] = claim([pool])
        yield row
    if unclaimed:
        yield alike("other parameters", "", None, Use(), claim(list(unclaimed)))


def _costs_of_weight(
    layer: HFHLayer, weight: Weight, use: Use, num_stored: int, is_first: bool
) -> dict[str, MethodCost]:
    """Of the weight by each method, but for its pool and theta.

    In HashedNets and CSR ``num_stored`` numbers take its place. The first of tied layers has the
    storage, all have the passes.
    """
    itemsize = layer.pool.weight.element_size()
    hashed_nets = HashSpec(num_hashes=1, pool_size=max(1, num_stored))
    costs = {
        DENSE: formulas.dense(use),
        HASHED_NETS: formulas.virtual(weight, use, hashed_nets, Reconstruction(depth=0)),
        HFH: formulas.virtual(weight, use, layer.hash_spec, layer.reconstruction),
        SPARSE: formulas.sparse(weight, use, num_stored),
    }
    if is_first:
        costs[DENSE] += formulas.stored(weight.compressible, itemsize)
        costs[HASHED_NETS] += formulas.stored(num_stored, itemsize)
        index_bytes = formulas.sparse_index_bytes(weight, num_stored)
        costs[SPARSE] += formulas.stored(num_stored, itemsize, index_bytes)
    return costs


def _num_stored(model: nn.Module) -> Callable[[Weight], int]:
    """Of a weight's elements, the share that pools and thetas are of all virtual weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, HFHLayer)]
    parameters = {layer.theta for layer in layers} | {layer.pool.weight for layer in layers}
    numbers = sum(parameter.numel() for parameter in parameters)
    sizes = {_identity(layer): _virtual_weight(layer).compressible for layer in layers}
    total = max(1, sum(sizes.values()))
    return lambda weight: min(weight.compressible, weight.compressible * numbers // total)


def _identity(layer: HFHLayer) -> Hashable:
    """Equal for tied layers, whose weight is one."""
    return (id(layer.pool), id(layer.theta), layer.hash_spec, layer.reconstruction, layer.scale)
