"""Files of compressed models: round trips, and every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import stat
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hfh.files import checkpoint, tensor_file
from hfh.files.checkpoint import load, save
from hfh.files.checkpoint_contents import hashed_layers
from hfh.files.tensor_file import CheckpointError
from hfh_kernels.nn import HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool
from tests.models import make_model, seeds


class Tied(nn.Module):
    """A pool, theta, dense rows and a permutation that several layers share, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        pool = Pool(256)
        permutation = torch.randperm(11)
        self.table = HFHEmbedding(11, 8, pool=pool, dense_rows=3, permutation=permutation)
        self.output = HFHLinear.tied_to(self.table)
        self.again = HFHLinear(8, 8, pool=pool, theta=self.table.theta)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("temporary", torch.ones(3), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.output(self.norm(self.again(self.table(input))))
        return output


class Recurrent(nn.Module):
    """A cell whose projections are virtual, with a parameter and an extra state of its own."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        pool = Pool(64)
        self.input_projection = HFHLinear(3, 2 * hidden, pool=pool, depth=1)
        self.hidden_projection = HFHLinear(hidden, 2 * hidden, pool=pool, bias=False, depth=1)
        self.initial = nn.Parameter(torch.randn(hidden, 2).t())
        self.steps = 2

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "gates": ["update", "candidate"]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def forward(self, input: Tensor) -> Tensor:
        hidden: Tensor = self.initial
        for _ in range(self.steps):
            gates = self.input_projection(input) + self.hidden_projection(hidden)
            update, candidate = gates.chunk(2, dim=-1)
            hidden = torch.lerp(hidden, candidate.tanh(), update.sigmoid())
        return hidden


def convolutional() -> nn.Sequential:
    pool = Pool(128, dtype=torch.bfloat16)
    return nn.Sequential(
        HFHConv2d(2, 4, 3, stride=2, padding=1, pool=pool, num_hashes=1, depth=0),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        HFHLinear(16, 3, pool=pool, window=64, rows_per_window=2, block=8),
    )


def sums() -> nn.Module:
    return HFHEmbeddingBag(9, 6, mode="sum", padding_idx=2, pool=Pool(64))


INDICES = torch.tensor([[0, 3, 10], [2, 2, 5]])
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (make_model, torch.linspace(-1, 1, 36).view(3, 12)),
    "tied": (Tied, INDICES.flatten()),
    "recurrent": (Recurrent, torch.linspace(-1, 1, 6).view(2, 3)),
    "convolutional": (convolutional, torch.linspace(-1, 1, 64).view(2, 2, 4, 4)),
    "a layer alone": (sums, INDICES.clamp(max=8)),
    "dense": (lambda: nn.Linear(3, 2), torch.ones(1, 3)),
    "empty": (nn.Identity, torch.ones(1)),
}


@pytest.fixture(params=MODELS)
def build_and_input(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], Tensor]:
    return MODELS[request.param]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a model like those that make_model makes."""
    path = tmp_path / "model.safetensors"
    save(make_model(), path)
    return path


def test_round_trip(
    build_and_input: tuple[Callable[[], nn.Module], Tensor], tmp_path: Path
) -> None:
    build, input = build_and_input
    model, other = build().eval(), build().eval()
    parameters = dict(other.named_parameters())
    path = tmp_path / "model.safetensors"
    save(model, path)
    assert load(path, other) is other
    assert torch.equal(model(input), other(input))
    assert all(parameters[name] is value for name, value in other.named_parameters())
    saved, again = model.state_dict(), other.state_dict()
    assert saved.keys() == again.keys()
    assert all(
        torch.equal(value, again[name]) if isinstance(value, Tensor) else value == again[name]
        for name, value in saved.items()
    )


def test_every_tensor_is_stored_once(tmp_path: Path) -> None:
    model = Tied()
    save(model, tmp_path / "model.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    numbers = sum(tensor.numel() for tensor in model.parameters())
    # Besides parameters: the permutation, and mean, variance and count of the norm.
    assert sum(tensor.numel() for tensor in stored.values()) == numbers + 11 + 2 * 8 + 1
    assert checkpoint.read(tmp_path / "model.safetensors").aliases == {
        "output.pool.weight": "again.pool.weight",
        "output.theta": "again.theta",
        "table.dense": "output.dense",
        "table.permutation": "output.permutation",
        "table.pool.weight": "again.pool.weight",
        "table.theta": "again.theta",
    }


def test_ties_survive(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    save(model, tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors", other)
    assert other.output.theta is other.table.theta is other.again.theta
    assert other.output.dense is other.table.dense
    assert len({id(layer.pool) for _, layer in hashed_layers(other)}) == 1


def test_the_saved_model_keeps_its_state(tmp_path: Path) -> None:
    model = Tied()
    before = {name: value.clone() for name, value in model.named_parameters()}
    save(model, tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_seeds_are_those_of_the_file(file: Path) -> None:
    model = make_model()
    expected = seeds(model)
    for seed, (_, layer) in enumerate(hashed_layers(model)):
        layer.hash_spec = dataclasses.replace(layer.hash_spec, seed=seed)
    assert seeds(load(file, model)) == expected


def test_file_is_readable_as_others_are(tmp_path: Path) -> None:
    save(make_model(), tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("module", "function"), [(safetensors.torch, "save_file"), (tensor_file, "_flush")]
)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "^C"])
def test_failed_save_leaves_no_trace(
    file: Path,
    module: ModuleType,
    function: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    content = file.read_bytes()
    monkeypatch.setattr(module, function, fail)
    for path in (file, file.with_name("new.safetensors")):
        with pytest.raises(type(error)):
            save(make_model(), path)
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == content


def test_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    def record(path: Path) -> None:
        flushed.append((path, file.exists()))

    file.unlink()
    monkeypatch.setattr(tensor_file, "_flush", record)
    save(make_model(), file)
    (temporary, before), (folder, after) = flushed
    assert (temporary.parent, before) == (file.parent, False)
    assert (folder, after) == (file.parent, True)


def test_link_stays_a_link(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    content = file.read_bytes()
    save(make_model(), link)
    assert link.is_symlink()
    assert file.read_bytes() != content


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2, device="meta"), ValueError, "weight is on the meta device"),
        (nn.ParameterDict({"a": nn.Parameter(torch.eye(2).to_sparse())}), ValueError, "a is of"),
    ],
)
def test_model_that_cannot_be_saved(
    model: nn.Module, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [(1, 2), {1: 2}, torch.float32, float])
def test_extra_state_that_is_not_json(
    state: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recurrent, "get_extra_state", lambda self: state)
    with pytest.raises(TypeError, match="saved as JSON: _extra_state is"):
        save(Recurrent(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def require_refused(path: Path, model: nn.Module, message: str) -> None:
    """The error names the file and leaves the model as it was."""
    before = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    states = [layer.get_extra_state() for _, layer in hashed_layers(model)]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, model)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert states == [layer.get_extra_state() for _, layer in hashed_layers(model)]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save(HFHLinear(4, 2, pool=Pool(32), depth=1), file)
    content = bytearray(file.read_bytes())
    for place in range(len(content)):
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            checkpoint.read(file)
        content[place] ^= 1 << place % 8
    file.write_bytes(content)
    checkpoint.read(file)


def test_flipped_bit_in_a_tensor(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    require_refused(file, make_model(), "damaged, its checksum is not that of its contents")


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 0.1, 0.5, 0.9, -8, -1])
def test_truncated(file: Path, part: float) -> None:
    content = file.read_bytes()
    length = part if isinstance(part, int) else int(part * len(content))
    file.write_bytes(content[:length])
    require_refused(file, make_model(), "not a whole safetensors file")


def test_bytes_behind_the_end(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    require_refused(file, make_model(), "not a whole safetensors file")


def test_file_of_another_kind(file: Path) -> None:
    torch.save(make_model().state_dict(), file)
    require_refused(file, make_model(), "not a whole safetensors file")
    safetensors.torch.save_file(dict(nn.Linear(2, 2).state_dict()), file)
    require_refused(file, make_model(), "a safetensors file, but not one that hfh.save wrote")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no_folder.model\.safetensors'$"):
        save(make_model(), tmp_path / "no_folder" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors", make_model())


@pytest.mark.parametrize("name", ["format_version", "hash_version"])
@pytest.mark.parametrize("version", [0, 2, None])
def test_another_version(file: Path, name: str, version: int | None) -> None:
    tensors, metadata = tensor_file.read(file)
    fields = {**json.loads(metadata["hfh"]), name: version}
    tensor_file.write(file, tensors, {**metadata, "hfh": json.dumps(fields)})
    require_refused(file, make_model(), f"has {name}={version}, this version of hfh reads 1")


def without_bias() -> nn.Module:
    model = make_model()
    setattr(model[0], "bias", None)  # noqa: B010
    return model


def with_another(part: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = make_model()
        model[4] = part
        return model

    return build


def with_tied_theta() -> nn.Module:
    model = make_model()
    model[4].theta = model[0].theta
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (without_bias, r"has the tensor 0\.bias, which the model has not"),
        (lambda: make_model().append(nn.PReLU()), r"lacks the tensor 5\.weight"),
        (lambda: make_model().append(nn.BatchNorm1d(5)), r"lacks the tensors .* and 1 more"),
        (lambda: make_model()[:3], r"has the hashed layer 4, which"),
        (lambda: nn.Linear(2, 2), "has the hashed layers 0, 2, 4, which the model has not"),
        (lambda: make_model(512), "0: .* has pool_size=1024, this one has pool_size=512"),
        (
            with_another(HFHConv2d(16, 5, 1, pool=Pool(1024), block=8)),
            "4 is of class HFHLinear, in the model of HFHConv2d",
        ),
        (
            with_another(HFHLinear(16, 5, pool=Pool(1024), block=4)),
            "4: .* has block=8, this one has block=4",
        ),
        (
            with_another(HFHLinear(16, 5, pool=Pool(1024), block=8)),
            r"4\.pool\.weight is the same as 0\.pool\.weight in the file, not in the model",
        ),
        (with_tied_theta, r"4\.theta is the same as 0\.theta in the model, not in the file"),
        (lambda: make_model().bfloat16(), r"0\.bias is torch.float32, in the model torch.bfloat16"),
    ],
)  # fmt: skip
def test_another_model(build: Callable[[], nn.Module], message: str, file: Path) -> None:
    require_refused(file, build(), message)


def test_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(nn.Linear(2, 3), path)
    require_refused(path, nn.Linear(2, 4), r"bias has shape \[3\], in the model \[4\]")


def test_model_without_memory(file: Path) -> None:
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(CheckpointError, match=r"0\.bias is on the meta device in the model"):
        load(file, model)


def test_another_extra_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save(Recurrent(), path)
    monkeypatch.delattr(Recurrent, "get_extra_state")
    require_refused(path, Recurrent(), "has the extra state _extra_state, which the model has not")


def test_large_values_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = {
        "nothing": torch.empty(0, 3),
        "number": torch.tensor(float("nan")),
        "short": torch.randn(3, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "integers": torch.tensor([-(2**62), 2**62]),
        "transposed": torch.randn(3, 5).t(),
        "slice": torch.randn(9)[2:4],
    }
    model, other = nn.Module(), nn.Module()
    for name, value in values.items():
        model.register_buffer(name, value)
        other.register_buffer(name, torch.zeros_like(value))
    save(model, path)
    load(path, other)
    for name, value in values.items():
        torch.testing.assert_close(other.get_buffer(name), value, rtol=0, atol=0, equal_nan=True)
    assert path.stat().st_size < 2000
