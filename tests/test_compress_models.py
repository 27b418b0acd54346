"""Whole models compressed, trained, saved and materialised."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfh_kernels.nn import Pool
from hfh_kernels.nn.layer import HFHLayer
from tests.models import pools
from tests.tolerances import TOLERANCE, relative_error
from tests.toolkit_checks import compress, materialize
from tests.toolkit_models import SAMPLES, LanguageModel, Sample

each_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
HASHES: list[dict[str, int]] = [{}, {"depth": 2, "block": 32, "window": 256}]
each_hash = pytest.mark.parametrize("hash", HASHES, ids=["default", "depth 2, windows"])


def run(model: nn.Module, sample: Sample) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(*sample.inputs)
    return output


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_close(output: Tensor, expected: Tensor, times: float = 1) -> None:
    tolerance = times * TOLERANCE[output.dtype]
    assert relative_error(output, expected.double()) < tolerance


@each_sample
class TestEachModel:
    @each_hash
    def test_ratio(self, sample: Sample, hash: dict[str, int]) -> None:
        dense = sample.build()
        before = num_parameters(dense)
        model, report = compress(dense, sample.ratio, **hash)
        assert num_parameters(model) == report.compressed_parameters
        assert before == report.dense_parameters == num_parameters(dense)
        assert num_parameters(model) / before == pytest.approx(sample.ratio, rel=0.02)
        assert len(pools(model)) == 1
        layers = [module for module in model.modules() if isinstance(module, HFHLayer)]
        assert len(layers) == sum(row.skipped is None for row in report.rows)
        seeds = {layer.hash_spec.seed for layer in layers}
        assert len(seeds) == len({id(layer.theta) for layer in layers})

    @each_hash
    def test_training_lowers_the_loss(self, sample: Sample, hash: dict[str, int]) -> None:
        model, _ = compress(sample.build(), sample.ratio, seed=1, **hash)
        (pool,) = pools(model)
        others = [value for value in model.parameters() if value is not pool.weight]
        groups = [{"params": others, "lr": 0.01}, {"params": [pool.weight], "lr": 0.1}]
        optimizer = torch.optim.Adam(groups)
        losses = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = sample.loss(model)
            torch.autograd.backward(loss)
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_state_dict_round_trip(self, sample: Sample) -> None:
        """Into another model of the same class and arguments, whose random numbers differ."""
        model, _ = compress(sample.build(), sample.ratio)
        other, _ = compress(sample.build(), sample.ratio)
        model.eval()
        other.eval()
        assert not torch.equal(run(other, sample), run(model, sample))
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(run(other, sample), run(model, sample))

    @pytest.mark.parametrize("training", [False, True])
    def test_materialize(self, sample: Sample, training: bool) -> None:
        dense = sample.build()
        model, _ = compress(dense, sample.ratio)
        model.train(training)
        state = {name: str(value) for name, value in model.state_dict().items()}
        plain = materialize(model)
        assert {name: str(value) for name, value in model.state_dict().items()} == state
        assert [(name, type(module)) for name, module in plain.named_modules()] == [
            (name, type(module)) for name, module in dense.named_modules()
        ]
        assert plain.state_dict().keys() == dense.state_dict().keys()
        assert num_parameters(plain) == num_parameters(dense)
        # Torch's encoder in inference, not in training, puts zeros where there is padding.
        shown = sample.inputs[0] != 0 if sample is SAMPLES["transformer"] else slice(None)
        output, expected = run(plain, sample), run(copy.deepcopy(model), sample)
        assert_close(output[shown], expected[shown], times=10)
        plain.load_state_dict(dense.state_dict())
        assert_close(run(plain.eval(), sample), run(dense.eval(), sample))

    def test_gradients_are_those_of_the_materialized(self, sample: Sample) -> None:
        model, _ = compress(sample.build().double(), sample.ratio)
        plain = materialize(model)
        kept = dict(plain.named_parameters())
        names = [name for name, _ in model.named_parameters() if name in kept]
        assert names or sample is SAMPLES["lstm"]
        mine = dict(model.named_parameters())
        inputs = tuple(
            part.double() if part.is_floating_point() else part for part in sample.inputs
        )
        sample = sample._replace(inputs=inputs)
        grads = torch.autograd.grad(sample.loss(model), [mine[name] for name in names])
        expected = torch.autograd.grad(sample.loss(plain), [kept[name] for name in names])
        for grad, reference in zip(grads, expected, strict=True):
            assert_close(grad, reference, times=1000)

    def test_copies_and_pickles(self, sample: Sample) -> None:
        model, _ = compress(sample.build(), sample.ratio)
        model.eval()
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(pools(clone)) == 1
            assert torch.equal(run(clone, sample), run(model, sample))

    def test_in_place(self, sample: Sample) -> None:
        dense = sample.build().eval()
        copied, _ = compress(dense, sample.ratio, seed=3)
        kept = {id(module) for module in dense.modules()}
        changed, _ = compress(dense, sample.ratio, seed=3, inplace=True)
        assert changed is dense
        assert id(dense) in kept
        assert torch.equal(run(changed, sample), run(copied, sample))

    @pytest.mark.slow
    def test_compile(self, sample: Sample) -> None:
        """One graph: nothing in it is left to Python."""
        model, _ = compress(sample.build(), sample.ratio)
        model.eval()
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(run(compiled, sample), run(model, sample))

    def test_without_gradients(self, sample: Sample) -> None:
        """Where torch's transformer encoder would pass dense weights to a function of its own."""
        model, _ = compress(sample.build(), sample.ratio)
        model.eval()
        expected = model(*sample.inputs)
        assert expected.requires_grad
        with torch.inference_mode():
            assert_close(model(*sample.inputs), expected.detach())


def test_meta_device() -> None:
    with torch.device("meta"):
        dense = LanguageModel()
    model, report = compress(dense, 1 / 8)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    on_cpu = compress(LanguageModel(), 1 / 8)[1]
    assert report.compressed_parameters == on_cpu.compressed_parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model, _ = compress(LanguageModel().to(dtype), 1 / 8)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model(SAMPLES["lstm"].inputs[0])
    assert output.dtype == dtype
    torch.autograd.backward(output.float().square().mean())
    (pool,) = pools(model)
    assert pool.weight.grad is not None
    assert pool.weight.grad.isfinite().all()


@pytest.mark.gpu
def test_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    sample = SAMPLES["transformer"]
    model, _ = compress(sample.build().cuda(), sample.ratio, seed=0)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    torch.manual_seed(0)
    on_cpu, _ = compress(sample.build(), sample.ratio, seed=0)
    (pool,), (same,) = pools(model), pools(on_cpu)
    assert torch.equal(pool.weight.cpu(), same.weight)
    assert model(*(part.cuda() for part in sample.inputs)).isfinite().all()


def test_tied_weights_stay_tied() -> None:
    dense: Any = LanguageModel()
    model, report = compress(dense, 1 / 8)
    assert model.embedding.theta is model.output.theta
    assert torch.equal(model.embedding.materialize(), model.output.materialize())
    assert model.output.bias is not dense.output.bias
    assert torch.equal(model.output.bias, dense.output.bias)
    plain = materialize(model)
    assert plain.output.weight is plain.embedding.weight
    rows = {row.name: row for row in report.rows}
    assert rows["embedding"].dense_parameters == dense.embedding.weight.numel()
    assert rows["output"].dense_parameters == 0
    assert report.virtual_parameters == num_parameters(dense) - sum(
        parameter.numel() for parameter in dense.parameters() if parameter.dim() == 1
    )


def test_pool_is_one_module_of_the_copy() -> None:
    model, _ = compress(LanguageModel(), 1 / 8)
    assert sum(isinstance(module, Pool) for module in model.modules()) == 1
