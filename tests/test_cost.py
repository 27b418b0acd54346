"""The cost model against operations counted while PyTorch runs them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hfh.costs import cost_model
from hfh.costs.cost_formulas import MethodCost, Operations
from hfh.costs.cost_model import Cost, cost, weight_cost
from hfh.text_table import short
from hfh_kernels.functional.weight import weight_fields
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.ops.embedding.reference import embedding
from hfh_kernels.ops.hash_index.reference import reference_slots
from hfh_kernels.ops.library import Weight
from hfh_kernels.ops.materialize.reference import virtual_weight
from tests.models import make_model

aten = torch.ops.aten
EMULATION = 0xFFFFFFFF
"""The reference computes modulo 2**32 in int64 with this mask, which counts as no operation."""
INTEGER = (
    *(aten.mul, aten.add, aten.sub, aten.floor_divide),
    *(aten.__xor__, aten.__and__, aten.__rshift__, aten.bitwise_xor, aten.bitwise_and),
    *(aten.bitwise_right_shift, aten.ge, aten.where),
)
# Signs, the scale, activations, and forward the biases, whose gradients are sums.
FORWARD = (aten.neg, aten.mul, aten.relu, aten.tanh, aten.add)
BACKWARD = (aten.neg, aten.mul, aten.threshold_backward, aten.tanh_backward)


class Counted(TorchDispatchMode):
    """Counts, by the names of the fields of Operations, what the reference does in the context."""

    def __init__(self, num_hashes: int, pointwise: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants = (num_hashes, 1, 1)
        self.counts: Counter[str] = Counter()
        self.pointwise = pointwise
        self.hashing = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.hfh.reference_slots.default:
            self.hashing = True
            with self:
                output = reference_slots(*args)
            self.hashing = False
            return output
        output = func(*args, **(kwargs or {}))
        self.count(func.overloadpacket, args, output)
        return output

    def count(self, operator: Any, args: tuple[Any, ...], output: Any) -> None:
        if self.hashing:
            # What is computed once a hash function is a constant of the hash.
            is_emulation = any(isinstance(value, int) and value == EMULATION for value in args)
            if operator in INTEGER and not is_emulation and output.shape != self.constants:
                self.counts["hash_operations"] += output.numel()
        elif operator in (aten.embedding, aten.embedding_dense_backward):
            self.counts["gathers"] += args[1].numel()
        elif operator is aten.mm:
            self.counts["reconstruction_operations"] += args[0].numel() * args[1].shape[1]
        elif operator is aten.sum:
            self.counts["reconstruction_operations"] += args[0].numel()
        elif operator in self.pointwise and output.is_floating_point():
            self.counts["reconstruction_operations"] += output.numel()

    def operations(self) -> Operations:
        return Operations(**self.counts)


HASHES: dict[str, dict[str, Any]] = {
    "HashedNets": {"num_hashes": 1, "depth": 0, "block": 1},
    "one hash": {"num_hashes": 1, "depth": 2, "block": 4},
    "linear g": {"depth": 1, "block": 8},
    "block 1": {"num_hashes": 3, "block": 1, "width": 5},
    "tanh": {"num_hashes": 2, "block": 2, "activation": "tanh"},
    "three layers": {"depth": 3, "block": 8, "width": 3},
    "window": {"block": 8, "window": 64, "rows_per_window": 3},
}


def count_reference(layer: HFHLayer) -> tuple[Operations, Operations]:
    """Of the layer's weight, forward and backward, apart from products with activations."""
    pool, theta = layer.pool.weight, layer.theta
    fields = weight_fields(layer.hash_spec, layer.reconstruction, layer.scale, 0, 0)
    num_hashes = layer.hash_spec.num_hashes
    forward, backward = Counted(num_hashes, FORWARD), Counted(num_hashes, BACKWARD)
    with forward:
        weight = virtual_weight(pool, theta, *layer.weight_shape, Weight(*fields))
    gradient = torch.ones_like(weight)
    with backward:
        torch.autograd.grad(weight, (pool, theta), gradient, allow_unused=True)
    return forward.operations(), backward.operations()


def hfh(result: Cost) -> MethodCost:
    return result.totals[cost_model.HFH]


def dense_flops(model: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """Of the forward pass, and of both; a multiply-add is two."""
    with FlopCounterMode(display=False) as forward:
        model(*inputs)
    differentiable = [
        input.requires_grad_() if input.is_floating_point() else input for input in inputs
    ]
    with FlopCounterMode(display=False) as both:
        model(*differentiable).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize("arguments", HASHES.values(), ids=HASHES)
def test_operations_on_a_virtual_weight(arguments: dict[str, Any]) -> None:
    layer = HFHLinear(24, 7, bias=False, pool=Pool(256), **arguments)
    forward, backward = count_reference(layer)
    product = Operations(multiply_adds=5 * 24 * 7)
    computed = hfh(cost(layer, (5, 24)))
    assert computed.forward == computed.backward_input == product + forward
    if layer.reconstruction.depth == 0:
        # Signs and slots alone: without g's parameters the pool's gradient needs no elements.
        forward = Operations(hash_operations=forward.hash_operations)
    assert computed.backward_weight == product + forward + backward
    passes = (computed.forward, computed.backward_input, computed.backward_weight)
    assert computed.training.hash_operations == sum(one.hash_operations for one in passes)


def test_operations_on_a_virtual_kernel() -> None:
    layer = HFHConv2d(4, 6, 3, groups=2, bias=False, pool=Pool(256), block=2)
    forward, backward = count_reference(layer)
    computed = hfh(cost(layer, (2, 4, 8, 7)))
    product = Operations(multiply_adds=2 * 6 * 6 * 5 * 2 * 9)
    assert computed.forward == computed.backward_input == product + forward
    assert computed.backward_weight == product + forward + backward


def test_operations_of_the_default_g() -> None:
    """As COST.md says."""
    layer = HFHLinear(1, 1, bias=False, pool=Pool(32))
    computed = hfh(cost(layer, (1, 1)))
    assert computed.forward.reconstruction_operations == 34
    assert computed.backward_weight.reconstruction_operations == 34 + 54


def test_rows_that_end_within_a_block() -> None:
    layer = HFHLinear(13, 7, bias=False, pool=Pool(256), block=8)
    counted, _ = count_reference(layer)
    computed = hfh(cost(layer, (5, 13))).forward
    assert computed.hash_operations == counted.hash_operations
    assert computed.gathers == counted.gathers == 7 * 2 * 4


def test_lookups() -> None:
    """Rows looked up are computed as rows of a weight of that height."""
    indices = torch.tensor([[3, 0, 3], [9, 1, 2]])
    layer = HFHEmbedding(10, 16, pool=Pool(256), block=8)
    fields = weight_fields(layer.hash_spec, layer.reconstruction, layer.scale, 0, 0)
    counted = Counted(layer.hash_spec.num_hashes, FORWARD)
    with counted:
        embedding(indices, layer.pool.weight, layer.theta, None, None, 10, 16, -1, *fields)
    for table in (layer, HFHEmbeddingBag(10, 16, pool=layer.pool, block=8)):
        computed = hfh(cost(table, indices))
        assert computed.forward == counted.operations()
        assert computed.backward_input == Operations()
        assert computed.backward_weight.gathers == 2 * counted.counts["gathers"]
    dense = cost(nn.Embedding(10, 16), indices).totals[cost_model.DENSE]
    assert dense.forward == dense.backward_weight == Operations(gathers=6)


def hashed_network() -> nn.Sequential:
    pool = Pool(512)
    return nn.Sequential(
        HFHConv2d(4, 8, 3, stride=2, padding=1, groups=2, pool=pool, block=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(2),
        HFHConv1d(8, 6, 5, dilation=2, pool=pool, block=8, depth=1),
        nn.Flatten(),
        HFHLinear(48, 16, pool=pool, dense_rows=4, window=128, rows_per_window=4, block=16),
        nn.Linear(16, 3),
    )


def dense_network(groups: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 5, dilation=2),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.Linear(16, 3),
    )


INPUT = (2, 4, 8, 8)


def test_dense_of_a_hashed_network() -> None:
    """Its column is the cost of the network that it stands for."""
    dense = cost(dense_network(), INPUT).totals
    assert dense.keys() == {cost_model.DENSE}
    assert cost(hashed_network(), INPUT).totals[cost_model.DENSE] == dense[cost_model.DENSE]


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: dense_network(groups=1), [torch.ones(INPUT)]),
        (dense_network, [torch.ones(INPUT)]),
        (lambda: nn.Conv3d(2, 4, 3), [torch.ones(2, 2, 5, 6, 7)]),
        (lambda: nn.ConvTranspose2d(6, 4, 3, 2), [torch.ones(2, 6, 5, 5)]),
        (lambda: nn.Linear(7, 5), [torch.ones(2, 3, 7)]),
        (lambda: nn.Bilinear(2, 3, 4), [torch.ones(5, 2), torch.ones(5, 3)]),
    ],
    ids=["network", "groups", "conv3d", "transposed", "linear", "uncounted"],
)
def test_multiply_adds_of_dense_layers(
    build: Callable[[], nn.Module], inputs: list[Tensor]
) -> None:
    model = build()
    forward, both = dense_flops(model, *inputs)
    computed = cost(model, [input.detach() for input in inputs]).totals[cost_model.DENSE]
    if isinstance(model, nn.Bilinear):
        assert computed.forward == Operations()
        return
    assert 2 * computed.forward.multiply_adds == forward > 0
    if not any(getattr(layer, "groups", 1) > 1 for layer in model.modules()):
        # PyTorch's counter takes the gradient of a grouped weight for that of a whole one.
        assert 2 * computed.training.multiply_adds == both


class Attention(nn.Module):
    """Attention to a sequence of another length and width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = self.attention(query, value=value, key=key, need_weights=False)[0]
        return output


def test_multiply_adds_of_attention() -> None:
    inputs = [torch.ones(3, 5, 8), torch.ones(3, 7, 6), torch.ones(3, 7, 4)]
    with FlopCounterMode(display=False) as counter:
        Attention()(*inputs)
    operators = counter.get_flop_counts()["Global"]
    projections = operators[aten.addmm] + operators.get(aten.mm, 0)
    result = cost(Attention(), inputs)
    assert 2 * result.totals[cost_model.DENSE].forward.multiply_adds == projections
    assert [row.name for row in result.rows] == ["attention"]
    parameters = sum(value.numel() for value in Attention().parameters())
    assert result.totals[cost_model.DENSE].parameters == parameters


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_multiply_adds_of_recurrent_layers(kind: type[nn.LSTM | nn.GRU], is_packed: bool) -> None:
    layer = kind(input_size=6, hidden_size=4, num_layers=2, bidirectional=True)
    input = torch.ones(7, 3, 6)
    example: Any = [nn.utils.rnn.pack_padded_sequence(input, [7, 4, 1])] if is_packed else input
    # A fused operator would hide its products from the counter.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        layer(example[0] if is_packed else example)
    computed = cost(layer, example).totals[cost_model.DENSE]
    assert 2 * computed.forward.multiply_adds == counter.get_total_flops() > 0


def test_hashed_nets_column() -> None:
    """It is the cost of such a network as it is."""
    layers = [HFHLinear(24, 30, pool=Pool(416)), HFHLinear(30, 18, pool=Pool(192))]
    computed = cost(nn.Sequential(*layers), (3, 24)).totals[cost_model.HASHED_NETS]
    numbers = 416 + 192 + 2 * layers[0].theta.numel()
    num_weights = 24 * 30 + 30 * 18
    sizes = [numbers * 24 * 30 // num_weights, numbers * 30 * 18 // num_weights]
    same = nn.Sequential(
        *(
            HFHLinear(cols, rows, pool=Pool(size), num_hashes=1, depth=0, block=1)
            for cols, rows, size in zip((24, 30), (30, 18), sizes, strict=True)
        )
    )
    assert computed == hfh(cost(same, (3, 24)))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_pruned_column() -> None:
    layer = HFHLinear(24, 30, pool=Pool(96))
    numbers = 96 + layer.theta.numel()
    computed = cost(layer, (5, 24)).totals[cost_model.SPARSE]
    weight = torch.zeros(30 * 24)
    weight[torch.randperm(30 * 24)[:numbers]] = 1
    sparse = weight.view(30, 24).to_sparse_csr()
    indices = [sparse.col_indices().int(), sparse.crow_indices().int()]
    num_bytes = sum(part.nbytes for part in (sparse.values(), *indices))
    assert computed.parameters == numbers + 30
    assert computed.bytes == num_bytes + 4 * 30
    passes = Operations(multiply_adds=5 * numbers, gathers=numbers)
    assert computed.forward == computed.backward_input == computed.backward_weight == passes


def test_pruned_table() -> None:
    computed = cost(HFHEmbedding(50, 8, pool=Pool(96), depth=1), torch.zeros(20).int())
    forward = computed.totals[cost_model.SPARSE].forward
    assert forward == Operations(gathers=20 * 8 * (96 + 4) // (50 * 8))


def test_all_methods_store_as_many_numbers() -> None:
    totals = cost(hashed_network(), INPUT).totals
    numbers = sum(parameter.numel() for parameter in hashed_network().parameters())
    assert totals[cost_model.HFH].parameters == numbers
    for method in (cost_model.HASHED_NETS, cost_model.SPARSE):
        assert numbers - 3 <= totals[method].parameters <= numbers
    assert totals[cost_model.SPARSE].bytes > totals[cost_model.HFH].bytes == 4 * numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_moments(dtype: torch.dtype) -> None:
    model = hashed_network().to(dtype)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(INPUT, dtype=dtype)).sum().backward()
    optimizer.step()
    moments = [
        moment
        for state in optimizer.state.values()
        for name, moment in state.items()
        if name != "step"
    ]
    computed = hfh(cost(model, INPUT, dtype=dtype))
    assert computed.optimizer_bytes == sum(moment.nbytes for moment in moments)
    assert computed.bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_tied_layers_are_stored_once() -> None:
    table = HFHEmbedding(40, 16, pool=Pool(96), dense_rows=5)
    model = nn.Sequential(table, HFHLinear.tied_to(table))
    totals = cost(model, torch.zeros(2, 3, dtype=torch.int64)).totals
    assert totals[cost_model.DENSE].parameters == 40 * 16 + 40
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert {totals[method].parameters for method in cost_model.METHODS[1:]} == {numbers}
    assert totals[cost_model.DENSE].forward == Operations(6 * 40 * 16, gathers=6)


def test_every_call_computes_the_weight_anew() -> None:
    layer = HFHLinear(8, 8, pool=Pool(64))
    once, twice = cost(layer, (3, 8)), cost(nn.Sequential(layer, layer), (3, 8))
    assert hfh(twice).forward == hfh(once).forward + hfh(once).forward
    assert hfh(twice).parameters == hfh(once).parameters


def test_shared_theta_counts_once() -> None:
    first = HFHLinear(8, 8, pool=Pool(64))
    second = HFHLinear(8, 8, pool=first.pool, theta=first.theta)
    model = nn.Sequential(first, second)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert hfh(cost(model, (1, 8))).parameters == numbers


def test_rows() -> None:
    result = cost(hashed_network(), INPUT)
    assert [(row.name, row.kind, row.shape) for row in result.rows] == [
        ("0", "HFHConv2d", (8, 18)),
        ("4", "HFHConv1d", (6, 40)),
        ("6", "HFHLinear", (16, 48)),
        ("7", "Linear", (3, 16)),
        ("0.pool", "Pool", None),
        ("other parameters", "", None),
    ]
    assert result.rows[-1].costs[cost_model.HFH].parameters == 2 * 8


def test_without_running() -> None:
    model = nn.Sequential(HFHLinear(8, 6, pool=Pool(64)), nn.Linear(6, 2))
    assert weight_cost(model, positions=3) == cost(model, (3, 8))
    table = HFHEmbedding(9, 4, pool=Pool(64))
    assert weight_cost(table, 5) == cost(table, torch.zeros(5).int())
    with pytest.raises(ValueError, match="positions must be at least 1, received 0"):
        weight_cost(model, positions=0)


def test_leaves_the_model_alone() -> None:
    model = hashed_network()
    model[1].eval()
    statistics = model[1].state_dict()
    before = {name: value.clone() for name, value in statistics.items()}
    cost(model, INPUT)
    assert [module.training for module in model] == [index != 1 for index in range(len(model))]
    assert all(torch.equal(value, statistics[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_inside_torchs_transformer_are_seen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert [row.name for row in cost(layer, (2, 3, 8)).rows if row.use.calls] == [
        "self_attn",
        "linear1",
        "linear2",
    ]


def test_forms_of_inputs() -> None:
    layer = nn.Linear(8, 2)
    expected = cost(layer, (3, 8))
    input = torch.ones(3, 8)
    assert cost(layer, input) == cost(layer, [input]) == cost(layer, {"input": input}) == expected
    table = nn.Embedding(5, 2)
    assert cost(table, (4,), dtype=torch.int64) == cost(table, torch.zeros(4).long())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [((), "inputs must not be empty"), ((2, -1), r"must not have negative sizes, .* \[2, -1\]")],
)
def test_wrong_inputs(inputs: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost(nn.Linear(8, 2), inputs)


def test_inputs_of_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"inputs must be a shape, .* received 8"):
        cost(nn.Linear(8, 2), 8)  # type: ignore[arg-type]


def test_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="model has no parameters"):
        cost(nn.ReLU(), (2,))


def test_json() -> None:
    result = cost(make_model(), (3, 12))
    written = json.loads(result.to_json())
    assert written["totals"]["HFH"]["parameters"] == hfh(result).parameters
    assert written["totals"]["CSR"]["training"]["gathers"] == (
        result.totals[cost_model.SPARSE].training.gathers
    )
    assert written["rows"][0]["use"]["multiply_adds"] == 3 * 12 * 16


def test_table() -> None:
    text = str(cost(hashed_network(), INPUT))
    _, layers, _, totals, _ = text.split("\n\n")
    assert len(layers.splitlines()) == 1 + 6
    assert [line.split()[0] for line in totals.splitlines()[1::2]] == list(cost_model.METHODS)
    assert "16 x 48" in layers
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9999, "9,999"), (10_000, "10k"), (999_499, "999k"), (999_600, "1M"),
     (12_345_678, "12.3M"), (4_560_000_000_000, "4.56T")],
)  # fmt: skip
def test_short_numbers(number: int, text: str) -> None:
    assert short(number) == text
