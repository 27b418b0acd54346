from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hfh_kernels.nn import HFHLinear, Pool
from hfh_kernels.ops.materialize.reference import reconstruct
from tests.models import make_model, pool_names, pools, run, seeds
from tests.tolerances import TOLERANCE, relative_error

KINDS: list[dict[str, Any]] = [
    {"num_hashes": 1, "depth": 0, "block": 1},
    {"depth": 1},
    {"depth": 2},
    {"depth": 2, "activation": "tanh", "width": 1},
    {"depth": 3, "num_hashes": 8, "width": 16, "window": 256, "rows_per_window": 16},
    {"depth": 3, "num_hashes": 1, "width": 1},
]
each_kind = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values())
)


class TestPool:
    def test_standard_normal(self) -> None:
        weight = Pool(10**5).weight
        assert abs(weight.mean().item()) < 0.02
        assert abs(weight.std().item() - 1) < 0.02

    def test_generator(self) -> None:
        def draw(seed: int) -> Tensor:
            return Pool(64, generator=torch.Generator().manual_seed(seed)).weight

        state = torch.get_rng_state()
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        assert torch.equal(torch.get_rng_state(), state)

    def test_factory_arguments(self) -> None:
        assert Pool(64, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
        assert Pool(64, device="meta").weight.is_meta
        assert nn.utils.skip_init(Pool, 64).weight.device.type == "cpu"
        assert repr(Pool(64)) == "Pool(size=64)"

    def test_seeds(self) -> None:
        pool = Pool(64)
        first = [pool.next_seed() for _ in range(1000)]
        assert len(set(first)) == 1000
        assert all(0 <= seed < 2**32 for seed in first)
        other = Pool(128)
        assert [other.next_seed() for _ in range(10)] == first[:10]
        assert copy.deepcopy(other).next_seed() == first[10]
        assert pickle.loads(pickle.dumps(other)).next_seed() == first[10]

    @pytest.mark.parametrize(
        ("size", "error"), [(0, ValueError), (2**31, ValueError), (1.0, TypeError)]
    )
    def test_invalid_size(self, size: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match=rf"size .* received {size}"):
            Pool(size)


class TestLayer:
    @each_kind
    def test_forward_is_the_materialized_weight(self, kind: dict[str, Any]) -> None:
        layer = HFHLinear(40, 24, pool=Pool(1024), **kind)
        input = torch.randn(2, 3, 40)
        assert layer.bias is not None
        weight = layer.materialize()
        assert weight.shape == (24, 40)
        expected = nn.functional.linear(input.double(), weight.double(), layer.bias.double())
        assert relative_error(layer(input), expected) < TOLERANCE[torch.float32]

    @each_kind
    def test_materialize_is_differentiable(self, kind: dict[str, Any]) -> None:
        layer = HFHLinear(40, 24, pool=Pool(1024), **kind)
        input = torch.randn(6, 40)
        outputs = (layer(input), nn.functional.linear(input, layer.materialize(), layer.bias))
        parameters = (layer.pool.weight, layer.theta)
        grads, expected = (
            torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True)
            for out in outputs
        )
        for grad, reference in zip(grads, expected, strict=True):
            assert relative_error(grad, reference.double()) < 10 * TOLERANCE[torch.float32]

    def test_hashed_nets(self) -> None:
        """Chen et al. 2015, written independently: w_ij = sign(i, j) * pool[h(i, j)]."""
        layer = HFHLinear(30, 20, pool=Pool(97), num_hashes=1, depth=0, block=1, seed=7)

        def mix(x: int) -> int:
            x = (x ^ x >> 16) * 0x7FEB352D % 2**32
            x = (x ^ x >> 15) * 0x846CA68B % 2**32
            return x ^ x >> 16

        def weight(row: int, col: int) -> Tensor:
            h = mix((mix(mix(row) ^ 7) + col * 0x9E3779B9) % 2**32) * 33350995 % 2**32
            h = (h ^ h >> 15) * 0x2C1B3C6D % 2**32 * 97
            return layer.pool.weight[h >> 32] * (-1 if h >> 31 & 1 else 1) / math.sqrt(3 * 30)

        hashed = torch.stack([torch.stack([weight(i, j) for j in range(30)]) for i in range(20)])
        assert relative_error(layer.materialize(), hashed.double()) < TOLERANCE[torch.float32]
        input = torch.randn(4, 30)
        expected = nn.functional.linear(input, hashed, layer.bias).double()
        assert relative_error(layer(input), expected) < TOLERANCE[torch.float32]
        (grad,) = torch.autograd.grad(layer(input).sum(), layer.pool.weight)
        (reference,) = torch.autograd.grad(expected.sum(), layer.pool.weight)
        assert relative_error(grad, reference.double()) < TOLERANCE[torch.float32]

    def test_distinct_seeds(self) -> None:
        assert len(set(seeds(make_model()))) == 3
        assert seeds(make_model()) == seeds(make_model())
        assert HFHLinear(4, 4, pool=Pool(32), seed=5).hash_spec.seed == 5

    def test_repr(self) -> None:
        layer = HFHLinear(
            4, 8, bias=False, pool=Pool(64), seed=3, block=4, window=16, rows_per_window=2
        )
        assert layer.extra_repr() == (
            "in_features=4, out_features=8, bias=False, num_hashes=4, depth=2, width=4, "
            "activation='relu', block=4, window=16, rows_per_window=2, seed=3"
        )
        assert "window" not in HFHLinear(4, 8, pool=Pool(64)).extra_repr()

    def test_factory_arguments(self) -> None:
        layer = HFHLinear(8, 8, pool=Pool(64, dtype=torch.bfloat16), dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
        assert layer(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
        double = layer.double()
        assert double(torch.ones(2, 8).double()).dtype == torch.float64

    def test_meta_device(self) -> None:
        with torch.device("meta"):
            pool = Pool(64)
            layer = HFHLinear(8, 5, pool=pool)
        assert layer(torch.ones(2, 8, device="meta")).shape == (2, 5)
        assert all(parameter.is_meta for parameter in layer.parameters())
        layer.to_empty(device="cpu")
        pool.reset_parameters()
        layer.reset_parameters()
        assert layer(torch.ones(2, 8)).isfinite().all()

    def test_skip_init(self) -> None:
        pool = Pool(64, device="meta")
        layer = nn.utils.skip_init(HFHLinear, 8, 5, pool=pool)
        assert layer.pool is pool
        assert not any(parameter.is_meta for parameter in layer.parameters())

    def test_reset_parameters(self) -> None:
        layer = HFHLinear(8, 8, pool=Pool(64))
        before = {name: value.clone() for name, value in layer.named_parameters()}
        layer.reset_parameters()
        changed = [n for n, value in layer.named_parameters() if not torch.equal(value, before[n])]
        assert changed == ["theta", "bias"]

    def test_shared_theta(self) -> None:
        pool = Pool(64)
        first = HFHLinear(8, 8, pool=pool)
        values = first.theta.clone()
        second = HFHLinear(8, 8, pool=pool, theta=first.theta)
        model = nn.Sequential(first, second)
        assert torch.equal(first.theta, values)
        assert len(list(model.parameters())) == 4
        assert copy.deepcopy(model)[1].theta is not first.theta
        clone = copy.deepcopy(model)
        assert clone[0].theta is clone[1].theta

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"pool": nn.Linear(2, 2)}, TypeError, "pool must be .*received Linear"),
            ({"in_features": -1}, ValueError, "in_features .* received -1"),
            ({"out_features": 2.0}, TypeError, "out_features .* received 2.0"),
            ({"block": 3}, ValueError, "block .* received 3"),
            ({"block": 64}, ValueError, "pool_size must be a multiple of block=64, received 96"),
            ({"window": 128, "rows_per_window": 1}, ValueError, "window .* received 128"),
            ({"seed": 2**32}, ValueError, "seed"),
            ({"depth": 4}, ValueError, "depth"),
            ({"theta": nn.Parameter(torch.ones(3))}, ValueError, r"theta .* received shape \[3\]"),
        ],
    )
    def test_invalid_arguments(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        valid = {"in_features": 4, "out_features": 4, "pool": Pool(96)}
        with pytest.raises(error, match=message):
            HFHLinear(**{**valid, **arguments})

    def test_input_of_another_width(self) -> None:
        layer = HFHLinear(4, 4, pool=Pool(64))
        for shape in ([2, 5], [5], [], [4, 0]):
            with pytest.raises(ValueError, match="input must have 4 features, received shape"):
                layer(torch.ones(shape))

    def test_zero_features(self) -> None:
        pool = Pool(64)
        layer = HFHLinear(0, 3, pool=pool)
        assert layer.bias is not None
        assert torch.equal(layer(torch.ones(2, 0)), layer.bias.expand(2, 3))
        assert HFHLinear(3, 0, pool=pool)(torch.ones(2, 3)).shape == (2, 0)


class TestInitialisation:
    @each_kind
    def test_reconstruction_is_standardised(self, kind: dict[str, Any]) -> None:
        for _ in range(5):
            layer = HFHLinear(4, 4, pool=Pool(1024), **kind)
            elements = torch.randn(layer.hash_spec.num_hashes, 2**17)
            with torch.no_grad():
                values = reconstruct(elements, layer.theta, layer.reconstruction)
            assert abs(values.mean().item()) < 0.02
            assert abs(values.std().item() - 1) < 0.02

    def test_mix_has_unit_norm(self) -> None:
        theta = HFHLinear(4, 4, pool=Pool(64), depth=1, num_hashes=8).theta
        assert theta.norm().item() == pytest.approx(1)

    @each_kind
    def test_variance_of_nn_linear(self, kind: dict[str, Any]) -> None:
        weight = HFHLinear(300, 200, pool=Pool(2**14), **kind).materialize()
        assert weight.var().item() == pytest.approx(1 / (3 * 300), rel=0.15)
        bias = HFHLinear(300, 4000, pool=Pool(64)).bias
        assert bias is not None
        assert bias.abs().max().item() == pytest.approx(300**-0.5, rel=0.01)

    @each_kind
    def test_ten_layers(self, kind: dict[str, Any]) -> None:
        width, input = 128, torch.randn(256, 128)

        def output_variance(pool: Pool | None) -> float:
            """Geometric mean over a few networks, whose single outputs scatter."""
            logs = []
            for _ in range(4):
                values = input
                for _ in range(10):
                    layer = nn.Linear(width, width, bias=False)
                    hashed = pool and HFHLinear(width, width, bias=False, pool=pool, **kind)
                    values = (hashed or layer)(values) * 3**0.5
                logs.append(values.var().log().item())
            return math.exp(sum(logs) / len(logs))

        with torch.no_grad():
            ratio = output_variance(Pool(2**14)) / output_variance(None)
        assert 0.5 < ratio < 2

    def test_draws_from_the_default_generator(self) -> None:
        def theta(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return HFHLinear(4, 4, pool=Pool(64)).theta

        assert torch.equal(theta(1), theta(1))
        assert not torch.equal(theta(1), theta(2))


class TestSharing:
    def test_one_parameter(self) -> None:
        model = make_model()
        names = [name for name, _ in model.named_parameters()]
        assert [name for name in names if "pool" in name] == ["0.pool.weight"]
        assert pool_names(model) == ["0.pool.weight"]
        assert len(pools(model)) == 1
        optimizer = torch.optim.Adam(model.parameters())
        torch.autograd.backward(run(model).sum())
        optimizer.step()
        assert len(optimizer.state) == len(names)

    def test_gradient_is_the_sum_over_layers(self) -> None:
        model = make_model()
        (pool,) = pools(model)
        (shared,) = torch.autograd.grad(run(model).sum(), pool.weight)
        apart = copy.deepcopy(model)
        for layer in apart:
            if isinstance(layer, HFHLinear):
                layer.pool = copy.deepcopy(layer.pool)
        torch.autograd.backward(run(apart).sum())
        grads = [part.weight.grad for part in pools(apart) if part.weight.grad is not None]
        assert len(grads) == 3
        torch.testing.assert_close(shared, torch.stack(grads).sum(0))

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies_stay_shared(self, how: str) -> None:
        model = make_model()
        model.state_dict()
        model.load_state_dict(model.state_dict())
        if how == "deepcopy":
            clone = copy.deepcopy(model)
        elif how == "pickle":
            clone = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            clone = torch.load(buffer, weights_only=False)
        assert len(pools(clone)) == 1
        assert pools(clone) != pools(model)
        assert seeds(clone) == seeds(model)
        assert torch.equal(run(clone), run(model))
        assert pool_names(clone) == ["0.pool.weight"]
        assert pool_names(model) == ["0.pool.weight"]

    def test_moving_stays_shared(self) -> None:
        model = make_model()
        pool = pools(model)
        model.to(torch.float64).float().to("meta").to_empty(device="cpu")
        assert pools(model) == pool
        assert len([name for name, _ in model.named_parameters() if "pool" in name]) == 1

    def test_distributed_data_parallel(self, process_group: None) -> None:
        model = make_model()
        (pool,) = pools(model)
        expected = torch.autograd.grad(run(model).sum(), list(model.parameters()))
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            torch.autograd.backward(run(wrapped).sum())
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        assert pools(wrapped) == {pool}
        assert pool_names(wrapped) == ["module.0.pool.weight"]
        wrapped.load_state_dict(wrapped.state_dict())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_reduces_the_loss() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    input, target = torch.randn(64, 12), torch.randint(5, (64,))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(input), target)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
