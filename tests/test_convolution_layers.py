"""HFHConv1d and HFHConv2d, their errors, and a network of them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hfh_kernels import HashSpec, Reconstruction, functional
from hfh_kernels.nn import HFHConv1d, HFHConv2d, HFHLinear, Pool
from tests.tolerances import TOLERANCE, relative_error

OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 2, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "replicate", "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
]
KINDS = [(HFHConv1d, nn.Conv1d, (11,)), (HFHConv2d, nn.Conv2d, (11, 9))]
each_kind = pytest.mark.parametrize(("layer_type", "dense_type", "size"), KINDS)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each_kind
def test_forward_is_that_of_torch(
    layer_type: Any, dense_type: Any, size: tuple[int, ...], options: dict[str, Any]
) -> None:
    layer = layer_type(6, 8, pool=Pool(1024), **options)
    dense = dense_type(6, 8, **options).double()
    weight = layer.materialize()
    assert weight.shape == dense.weight.shape
    dense.weight.data = weight.detach().double()
    if layer.bias is not None:
        dense.bias.data = layer.bias.detach().double()
    for input in (torch.randn(3, 6, *size), torch.randn(6, *size)):
        assert relative_error(layer(input), dense(input.double())) < TOLERANCE[torch.float32]


@each_kind
def test_materialize_is_differentiable(
    layer_type: Any, dense_type: Any, size: tuple[int, ...]
) -> None:
    layer = layer_type(6, 8, 3, groups=2, pool=Pool(1024))
    function = nn.functional.conv1d if len(size) == 1 else nn.functional.conv2d
    input = torch.randn(3, 6, *size)
    parameters = (layer.pool.weight, layer.theta)
    grads, expected = (
        torch.autograd.grad(output.square().sum(), parameters)
        for output in (layer(input), function(input, layer.materialize(), layer.bias, groups=2))
    )
    for grad, reference in zip(grads, expected, strict=True):
        assert relative_error(grad, reference.double()) < 10 * TOLERANCE[torch.float32]


@each_kind
def test_initial_variance_is_that_of_torch(
    layer_type: Any, dense_type: Any, size: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    layer = layer_type(64, 512, 5, groups=2, pool=Pool(2**14))
    dense = dense_type(64, 512, 5, groups=2)
    assert layer.materialize().var().item() == pytest.approx(dense.weight.var().item(), rel=0.15)
    bound = dense.weight[0].numel() ** -0.5
    assert layer.bias.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_state() -> None:
    def make(**changes: Any) -> HFHConv2d:
        return HFHConv2d(
            **{"in_channels": 4, "out_channels": 8, "kernel_size": 3, "pool": Pool(64), **changes}
        )

    layer, buffer = make(seed=5), io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = make(seed=6)
    other.load_state_dict(state)
    assert other.hash_spec.seed == 5
    assert torch.equal(other.materialize(), layer.materialize())
    for changes, message in (
        ({"kernel_size": (1, 9)}, "kernel_size='3x3', this one has kernel_size='1x9'"),
        ({"groups": 2, "in_channels": 8}, "groups=1, this one has groups=2"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            make(**changes).load_state_dict(state)


def test_repr() -> None:
    layer = HFHConv2d(4, 8, 3, stride=2, padding="valid", groups=2, pool=Pool(64), seed=3)
    assert layer.extra_repr() == (
        "4, 8, kernel_size=(3, 3), stride=(2, 2), padding='valid', groups=2, bias=True, "
        "num_hashes=4, depth=2, width=4, activation='relu', block=32, seed=3"
    )


def test_factories() -> None:
    pool = Pool(64, device="meta")
    layer = nn.utils.skip_init(HFHConv2d, 4, 8, 3, pool=pool)
    assert not any(parameter.is_meta for parameter in layer.parameters())
    with torch.device("meta"):
        layer = HFHConv2d(4, 8, 3, pool=Pool(64))
    assert layer(torch.ones(2, 4, 5, 6, device="meta")).shape == (2, 8, 3, 4)
    layer = HFHConv2d(4, 8, 3, pool=Pool(64))
    before = {name: value.clone() for name, value in layer.named_parameters()}
    layer.reset_parameters()
    changed = [n for n, value in layer.named_parameters() if not torch.equal(value, before[n])]
    assert changed == ["theta", "bias"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels .* received 0"),
        ({"in_channels": 3, "groups": 2}, ValueError, "in_channels .* groups=2, received 3"),
        ({"out_channels": 3, "groups": 2}, ValueError, "out_channels .* groups=2, received 3"),
        ({"groups": 0}, ValueError, "groups .* received 0"),
        ({"kernel_size": 0}, ValueError, "kernel_size .* received 0"),
        ({"kernel_size": (3, 3, 3)}, TypeError, r"kernel_size .* received \(3, 3, 3\)"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size .* received 2.0"),
        ({"stride": 0}, ValueError, "stride .* received 0"),
        ({"dilation": (1, 0)}, ValueError, "dilation .* received 0"),
        ({"padding": -1}, ValueError, "padding .* received -1"),
        ({"padding": "full"}, ValueError, "padding .* received 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, r"stride of 1, received \(2, 2\)"),
        ({"padding_mode": "wrap"}, ValueError, "padding_mode .* received 'wrap'"),
        ({"pool": nn.Linear(2, 2)}, TypeError, "pool must be .*received Linear"),
        ({"block": 64}, ValueError, "block=64"),
    ],
    ids=str,
)
def test_invalid_layers(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    valid = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "pool": Pool(96)}
    with pytest.raises(error, match=message):
        HFHConv2d(**{**valid, **changes})


def test_input_of_other_channels() -> None:
    layer = HFHConv2d(4, 4, 3, pool=Pool(64))
    for shape in ([2, 5, 8, 8], [5, 8, 8], [8, 8], []):
        with pytest.raises(ValueError, match="input must have 4 channels, received shape"):
            layer(torch.ones(shape))


SPEC = HashSpec(pool_size=256, block=8)
NETWORK = Reconstruction()


def make_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "input": torch.randn(2, 4, 6, 5),
        "pool": torch.randn(256),
        "theta": torch.randn(25),
        "bias": torch.randn(6),
        "out_channels": 6,
        "kernel_size": 3,
        "hash_spec": SPEC,
        "reconstruction": NETWORK,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.ones(6, 5)}, ValueError, r"input must have 4 .* received shape \[6, 5\]"),
        ({"input": torch.ones(1, 1, 4, 6, 5)}, ValueError, "input must have 4 dimensions"),
        ({"input": torch.ones(2, 4, 2, 5)}, ValueError, r"input must be as large as the kernel"),
        ({"input": torch.ones(2, 0, 6, 5)}, ValueError, r"input must have channels"),
        ({"input": torch.ones(2, 4, 6, 0)}, ValueError, r"input must have channels"),
        ({"input": torch.ones(2, 3, 6, 5), "groups": 2}, ValueError, r"groups=2 channels.* 3, 6"),
        ({"pool": torch.ones(255)}, ValueError, "pool .*256.* received 255"),
        ({"pool": torch.ones(16, 16)}, ValueError, "pool must be 1-d"),
        ({"theta": torch.ones(24)}, ValueError, r"theta must have shape \[25\].*24"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[6\].*5"),
        ({"bias": torch.ones(6).double()}, TypeError, "bias .* dtype"),
        ({"bias": torch.ones(5), "scale": torch.tensor(1.0)}, ValueError, r"bias .* \[6\]"),
        ({"scale": torch.ones(1)}, ValueError, r"scale .* received shape \[1\]"),
        ({"out_channels": 0, "bias": None}, ValueError, "out_channels .* received 0"),
        ({"out_channels": 5, "groups": 2, "bias": None}, ValueError, "out_channels .* received 5"),
        ({"groups": 0}, ValueError, "groups must be at least 1, received 0"),
        ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1, received \[0, 0\]"),
        ({"kernel_size": (3,)}, TypeError, r"kernel_size must be an int or 2 ints, .*\(3,\)"),
        ({"stride": (1, 0)}, ValueError, r"stride must be at least 1, received \[1, 0\]"),
        ({"stride": (1, 1.5)}, TypeError, r"stride must be .* received \(1, 1.5\)"),
        ({"padding": -1}, ValueError, r"padding must be at least 0, received \[-1, -1\]"),
        ({"padding": "full"}, ValueError, "padding must be .* received 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, r"stride of 1, received \[2, 2\]"),
        ({"dilation": 0}, ValueError, r"dilation must be at least 1, received \[0, 0\]"),
        ({"row_offset": 2**32 - 5}, ValueError, "row_offset.*4294967291"),
        ({"col_offset": 2**32 - 35}, ValueError, "col_offset.*4294967261"),
    ],
    ids=str,
)
def test_invalid_convolution(
    changes: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=message):
        functional.conv2d(**make_arguments(**changes), backend=backend)


@pytest.mark.parametrize("name", ["input", "pool", "theta", "bias"])
def test_integers_are_not_weights(name: str) -> None:
    integers = make_arguments()[name].to(torch.int32)
    with pytest.raises(TypeError, match=rf"{name} must .*(torch\.int32|Int)"):
        functional.conv2d(**make_arguments(**{name: integers}))


@pytest.mark.parametrize("name", ["input", "pool", "theta", "bias"])
def test_another_device(name: str, backend: str) -> None:
    elsewhere = make_arguments()[name].to("meta")
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        functional.conv2d(**make_arguments(**{name: elsewhere}), backend=backend)


def test_gradient_of_another_shape() -> None:
    arguments = make_arguments()
    weight = (3, 4, 8, 0, 0, 2, 4, "relu", 1.0, 0, 0)
    geometry = ([3, 3], [1, 1], [0, 0], [1, 1], 1)
    grad = torch.ones(2, 6, 4, 4)
    tensors = arguments["pool"], arguments["theta"]
    with pytest.raises(ValueError, match=r"grad_output must have shape \[2, 6, 4, 3\], received"):
        torch.ops.hfh.conv2d_backward_weight(grad, arguments["input"], *tensors, *geometry, *weight)
    with pytest.raises(ValueError, match=r"grad_output must have shape \[2, 6, 4, 3\], received"):
        torch.ops.hfh.conv2d_backward_input(grad, *tensors, [2, 4, 6, 5], *geometry, *weight)


class DigitsNetwork(nn.Module):
    """Convolutions and a linear layer over one pool."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            HFHConv2d(1, 16, 3, padding="same", pool=pool),
            nn.ReLU(),
            HFHConv2d(16, 32, 3, stride=2, padding=1, pool=pool),
            nn.ReLU(),
            HFHConv2d(32, 32, 3, padding=1, groups=4, pool=pool),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.classifier = HFHLinear(32 * 16, 10, pool=pool)

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(input))
        return logits


def test_digits() -> None:
    """A network stored in an eighth of its weights learns to read."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None]
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split([1300, len(labels) - 1300])
    pool = Pool(1536)
    network = DigitsNetwork(pool)
    dense_size = sum(
        layer.materialize().numel()
        for layer in network.modules()
        if isinstance(layer, (HFHConv2d, HFHLinear))
    )
    assert pool.weight.numel() * 7 < dense_size
    own = [parameter for name, parameter in network.named_parameters() if "pool" not in name]
    optimizer = torch.optim.Adam(
        [{"params": [pool.weight], "lr": 0.05}, {"params": own, "lr": 0.005}]
    )
    for _ in range(12):
        for batch in torch.randperm(1300).split(65):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[train][batch]), labels[train][batch])
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        accuracy = (network(images[test]).argmax(1) == labels[test]).double().mean().item()
    assert accuracy > 0.92


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_image_larger_than_what_one_call_takes(kernel_size: int) -> None:
    """3 MiB of channels: more than the platform's convolution is given at a time."""
    layer = HFHConv2d(256, 64, kernel_size, padding="same", pool=Pool(4096))
    image = torch.randn(1, 256, 56, 56)
    assert layer.bias is not None
    expected = nn.functional.conv2d(
        image.double(), layer.materialize().double(), layer.bias.double(), padding="same"
    )
    assert relative_error(layer(image), expected) <= TOLERANCE[torch.float32]
