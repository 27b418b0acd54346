"""Files of compressed models go into dense ones; so do files that were made from tensors alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hfh.compression.compress import compress
from hfh.compression.dense import materialize
from hfh.costs.cost_model import HFH, METHODS, cost, weight_cost
from hfh.files import checkpoint
from hfh.files.checkpoint import load, save
from hfh.files.checkpoint_contents import Checkpoint, describe, hashed_layers
from hfh.files.state_dict_model import state_dict_model
from hfh.files.tensor_file import CheckpointError
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool
from hfh_kernels.nn.layer import HFHLayer
from tests.toolkit_models import SAMPLES, LanguageModel, Sample, TransformerClassifier


@torch.no_grad()
def outputs(model: nn.Module, sample: Sample) -> Tensor:
    output: Tensor = model.eval()(*sample.inputs)
    return output


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_round_trip(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, report = compress(sample.build(), sample.ratio)
    save(model, path)
    expected = outputs(model, sample)
    for other in (compress(sample.build(), sample.ratio)[0], sample.build()):
        assert not torch.equal(outputs(other, sample), expected)
        assert load(path, other) is other
        assert torch.equal(outputs(other, sample), expected)
        numbers = sum(parameter.numel() for parameter in other.parameters())
        assert numbers == report.compressed_parameters
    tensors = checkpoint.read(path).tensors
    buffers = sum(buffer.numel() for buffer in model.buffers())
    assert sum(tensor.numel() for tensor in tensors.values()) == numbers + buffers


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_loaded_dense_model_trains(name: str, tmp_path: Path) -> None:
    """As the compressed one does: the layers share one pool, and everything has a gradient."""
    sample = SAMPLES[name]
    path = tmp_path / "model.safetensors"
    model = compress(sample.build(), sample.ratio)[0]
    save(model, path)
    other = load(path, sample.build())
    torch.autograd.backward(sample.loss(model))
    torch.autograd.backward(sample.loss(other))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == dict(other.named_parameters()).keys()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_cost_of_whole_models(sample: Sample) -> None:
    model, report = compress(sample.build(), sample.ratio)
    result = cost(model, sample.inputs)
    dense, own = result.totals["dense"], result.totals[HFH]
    assert set(result.totals) == set(METHODS)
    assert own.parameters == report.compressed_parameters
    assert dense.parameters == report.dense_parameters
    of_dense = cost(sample.build(), sample.inputs).totals["dense"]
    assert dense == of_dense
    assert own.forward.multiply_adds == dense.forward.multiply_adds
    assert all(row.use.calls for row in result.rows if row.shape is not None)


def test_model_stays_dense_where_the_file_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(compress(TransformerClassifier(), 1 / 8)[0], path)
    for other in (TransformerClassifier(num_classes=9), TransformerClassifier(size=64)):
        before = copy.deepcopy(other)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            load(path, other)
        assert repr(other) == repr(before)
        assert all(
            torch.equal(value, other.state_dict()[name])
            for name, value in before.state_dict().items()
        )
        layers = zip(other.encoder.layers, before.encoder.layers, strict=True)
        assert all(vars(one).keys() == vars(two).keys() for one, two in layers)


def test_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(compress(TransformerClassifier(), 1 / 8)[0], path)
    with pytest.raises(CheckpointError, match=r"has the hashed layers encoder\.layers\.0"):
        load(path, LanguageModel())


def test_layer_alone_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(HFHLinear(8, 8, pool=Pool(64)), path)
    with pytest.raises(CheckpointError, match="has the hashed layer , which the model has not"):
        load(path, nn.Linear(8, 8))


class Varied(nn.Module):
    """What the names of its tensors do not tell: embeddings, groups, ties, padding, strides."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 32, padding_idx=3)
        self.bag = nn.EmbeddingBag(40, 32, mode="max")
        self.line = nn.Conv1d(32, 64, 3, padding=1, groups=4)
        self.image = nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.blocks = nn.ModuleList(nn.Linear(64, 32) for _ in range(11))
        self.output = nn.Linear(32, 60)
        self.output.weight = self.table.weight
        self.register_buffer("steps", torch.arange(4))

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.table(indices) + self.bag(indices % 40).unsqueeze(1)
        hidden = self.line(hidden.mT)
        hidden = self.norm(self.image(hidden.unsqueeze(2).expand(-1, -1, 4, -1))).mean(dim=(2, 3))
        output: Tensor = self.output(sum(block(hidden) for block in self.blocks))
        return output


def without_ties(model: nn.Module, dropped: str) -> dict[str, Tensor]:
    """As a program writes them that knows tensors alone."""
    state = {name: value for name, value in model.state_dict().items()}
    del state[dropped]
    return state


INDICES = torch.arange(24).view(4, 6)


@pytest.mark.parametrize("dropped", ["output.weight", "table.weight"])
def test_file_made_from_tensors_alone(dropped: str, tmp_path: Path) -> None:
    """It goes into the model, whose layers know of what sort they are."""
    path = tmp_path / "model.safetensors"
    tensors = without_ties(Varied(), dropped)
    hashed, _ = compress(state_dict_model(Checkpoint(tensors, {}, {}, {})), 1 / 4)
    save(hashed, path)
    model = load(path, Varied()).eval()
    kinds = {name: type(layer) for name, layer in hashed_layers(model)}
    assert kinds == {
        "table": HFHEmbedding,
        "bag": HFHEmbeddingBag,
        "line": HFHConv1d,
        "image": HFHConv2d,
        **{f"blocks.{index}": HFHLinear for index in range(11)},
        "output": HFHLinear,
    }
    matrices = dict(hashed_layers(hashed))
    for name, layer in hashed_layers(model):
        tied = "table" if name == "output" else "output"
        expected = matrices.get(name, matrices.get(tied))
        assert expected is not None
        weight = layer.materialize().flatten(1)
        if name == "table":
            assert not weight[3].any()
            weight[3] = expected.materialize()[3]
        assert torch.equal(weight, expected.materialize().flatten(1))
    assert model.table.theta is model.output.theta
    assert model(INDICES).isfinite().all()
    again = tmp_path / "again.safetensors"
    save(model, again)
    assert torch.equal(load(again, Varied()).eval()(INDICES), model(INDICES))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(24, 32),
        nn.LSTM(24, 32, num_layers=2, bidirectional=True, proj_size=16),
        nn.LSTM(24, 32, bias=False),
        nn.GRU(24, 32, num_layers=2),
        nn.MultiheadAttention(32, 4),
        nn.MultiheadAttention(32, 4, bias=False, add_bias_kv=True),
        nn.MultiheadAttention(32, 4, kdim=24, vdim=16),
        nn.MultiheadAttention(32, 4, kdim=32, vdim=16),
    ],
    ids=str,
)
def test_layers_of_several_weights_from_tensors_alone(layer: nn.Module, tmp_path: Path) -> None:
    """All weights are compressed, go into the model, and come back under torch's names."""
    path = tmp_path / "model.safetensors"
    tensors = {f"inner.layer.{name}": value for name, value in layer.state_dict().items()}
    tree = state_dict_model(Checkpoint({**tensors, "inner.more": torch.ones(3)}, {}, {}, {}))
    assert type(tree.get_submodule("inner.layer")) is type(layer)
    matrices = sum(value.numel() for value in tensors.values() if value.dim() == 2)
    assert sum(row.use.multiply_adds for row in weight_cost(tree, 2).rows) == 2 * matrices
    hashed, report = compress(tree, 1 / 2, min_size=1)
    assert all(row.skipped is None for row in report.rows)
    save(hashed, path)
    contents = checkpoint.read(path)
    back = describe(materialize(state_dict_model(contents))).renamed(contents.dense_names)
    assert back.names == [*back.tensors]
    assert {name: value.shape for name, value in back.tensors.items()} == {
        **{name: value.shape for name, value in tensors.items()},
        "inner.more": (3,),
    }
    inner = nn.Module()
    inner.layer = copy.deepcopy(layer)
    inner.more = nn.Parameter(torch.zeros(3))
    model = nn.Module()
    model.inner = inner
    state = materialize(load(path, model)).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.tensors.items())


def test_nearly_layers_of_several_weights() -> None:
    """Their matrices stay parameters, but for those that are a Linear's."""
    lstm, attention = nn.LSTM(4, 5).state_dict(), nn.MultiheadAttention(4, 2).state_dict()
    groups = {
        "lacks_one": {name: value for name, value in lstm.items() if name != "bias_hh_l0"},
        "projects": {**nn.GRU(4, 5).state_dict(), "weight_hr_l0": torch.ones(2, 5)},
        "plain": nn.RNN(4, 5).state_dict(),
        "flat": {"weight_ih_l0": torch.ones(4), "weight_hh_l0": torch.ones(4)},
        "mixed": {**attention, "in_proj_bias": torch.zeros(12).half()},
        "scalar": {"k_proj_weight": torch.tensor(1.0), "out_proj.weight": torch.ones(2, 2)},
    }
    tensors = {f"{a}.{b}": value for a, group in groups.items() for b, value in group.items()}
    model = state_dict_model(Checkpoint(tensors, {}, {}, {}))
    layers = {name for name, module in model.named_modules() if type(module) is not nn.Module}
    assert layers == {"", "mixed.out_proj", "scalar.out_proj"}
    assert model.state_dict().keys() == tensors.keys()


def test_tree_of_tensors() -> None:
    """Every name, dtype and value is there, and layers are only made of what can be one."""
    tensors = {
        "weight": torch.randn(64, 64),
        "10.weight": torch.randn(4, 5).half(),
        "10.bias": torch.randn(4).half(),
        "9.weight": torch.randn(4, 5, 3),
        "9.bias": torch.randn(4),
        "a.b.weight": torch.randn(4, 5, 3, 3),
        "with_child.weight": torch.randn(4, 5),
        "with_child.inner.weight": torch.randn(4, 5),
        "with_more.weight": torch.randn(4, 5),
        "with_more.scale": torch.randn(4),
        "of_other_bias.weight": torch.randn(4, 5),
        "of_other_bias.bias": torch.randn(5),
        "of_five.weight": torch.randn(2, 2, 2, 2, 2),
        "of_one.weight": torch.randn(4),
        "of_integers.weight": torch.arange(6).view(2, 3),
        "of_nothing.weight": torch.empty(0, 3),
        "norm.running_mean": torch.randn(4),
    }
    model = state_dict_model(Checkpoint(tensors, {}, {}, {}))
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    layers = {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    assert layers == {
        "9": nn.Conv1d,
        "10": nn.Linear,
        "a.b": nn.Conv2d,
        "with_child.inner": nn.Linear,
    }


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_tree_of_a_compressed_model(sample: Sample, tmp_path: Path) -> None:
    """It has the layers, and saving it gives the same file but for the states of other modules."""
    path = tmp_path / "model.safetensors"
    model = compress(sample.build(), sample.ratio)[0]
    save(model, path)
    contents = checkpoint.read(path)
    tree = state_dict_model(contents)
    again = describe(tree)
    assert again.layers == contents.layers
    assert again.aliases == contents.aliases
    assert again.tensors.keys() == contents.tensors.keys()
    for name, layer in hashed_layers(model):
        same = tree.get_submodule(name)
        assert isinstance(same, HFHLayer)
        assert torch.equal(same.materialize(), layer.materialize())


@pytest.mark.parametrize("name", ["train", "a.forward", "weight.half"])
def test_name_that_no_parameter_can_have(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be the name of a parameter"):
        state_dict_model(Checkpoint({f"{name}.weight": torch.ones(2)}, {}, {}, {}))


def test_layer_of_unknown_class() -> None:
    contents = describe(nn.Sequential(HFHLinear(8, 8, pool=Pool(64))))
    contents.layers["0"]["class"] = "HFHBilinear"
    with pytest.raises(ValueError, match="unknown class, 0: HFHBilinear"):
        state_dict_model(contents)
