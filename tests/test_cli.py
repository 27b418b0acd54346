"""The command line: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hfh import cli
from hfh.command import sources
from hfh.command.model_speed import compare
from hfh.compression.compress import compress
from hfh.files import checkpoint
from tests.models import make_model

MODELS = """
import torch
from torch import Tensor, nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 5),
    )

def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.output = nn.Linear(32, 60)
        self.output.weight = self.embedding.weight

    def forward(self, indices):
        return self.output(self.lstm(self.embedding(indices))[0])

def attention():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 4, 64)

instance = network()
number = 3

def broken():
    raise RuntimeError("two\\nlines")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a module some_models, and a plain file of one of its networks."""
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    network = sources.load_model("some_models:network")
    safetensors.torch.save_file(network.state_dict(), "plain.safetensors")
    return tmp_path


def succeed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """The one line the command reports an error in."""
    capsys.readouterr()
    try:
        returned: object = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        returned = exit_.code
    captured = capsys.readouterr()
    assert returned == status
    assert captured.out == ""
    assert captured.err.startswith("hfh")
    assert captured.err.count("\n") == 1
    return captured.err


def compressed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Path:
    output = Path("compressed.safetensors")
    options = ("--output", output, "--init", "scratch", "--ratio", "1/4")
    succeed(capsys, "compress", *(arguments or ("plain.safetensors",)), *options)
    return output


def run(*arguments: str, missing: str = "nothing") -> subprocess.CompletedProcess[str]:
    """In a new interpreter, which says on standard error whether torch was imported."""
    command = (
        f"import sys; sys.modules[{missing!r}] = None; from hfh.cli import main; status = main();"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize("command", ["compress", "inspect", "cost", "bench"])
def test_help_shows_how_a_factory_is_named(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich takes a name between colons for an emoji."""
    text = "".join(succeed(capsys, command, "--help").replace("│", "").split())
    assert "package.module:factory" in text or "MODULE:FACTORY" in text
    assert all(ord(character) < 0x1F000 for character in text)


def test_help_needs_no_torch() -> None:
    result = run("compress", "--help")
    assert result.returncode == 0
    assert "Usage: hfh" in result.stdout
    assert result.stderr == "False\n"


def test_in_a_process_of_its_own(folder: Path) -> None:
    options = ["--ratio", "1/4", "--init", "scratch", "-o", "small.safetensors"]
    result = run("compress", "plain.safetensors", *options)
    assert result.returncode == 0
    assert "ratio: 0.2" in result.stdout
    assert result.stderr.splitlines()[0].startswith("Wrote small.safetensors, ")
    assert (folder / "small.safetensors").stat().st_size < 20_000


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert succeed(capsys, "--version").startswith("hfh 0.")


def test_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("_HFH_COMPLETE", "complete_bash"), ("COMP_WORDS", "hfh in")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.split() == ["inspect"]


def test_file_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, shapes and dtypes return; what was not compressed returns bit for bit."""
    output = compressed(capsys)
    succeed(capsys, "materialize", output, "-o", "dense.safetensors")
    before = safetensors.torch.load_file("plain.safetensors")
    after = safetensors.torch.load_file("dense.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    hashed = {f"{path}.weight" for path in checkpoint.read(output).layers}
    assert hashed == {"4.weight"}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == hashed
    numbers = sum(value.numel() for value in safetensors.torch.load_file(output).values())
    assert numbers == pytest.approx(sum(value.numel() for value in before.values()) / 4, rel=0.03)


def test_materialized_file_is_the_compressed_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = compressed(capsys)
    succeed(capsys, "materialize", output, "-o", "dense.safetensors")
    dense = sources.load_model("some_models:network", Path("dense.safetensors")).eval()
    hashed = checkpoint.load(output, sources.load_model("some_models:network")).eval()
    input = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(dense(input), hashed(input))


def test_recurrent_model_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights have torch's names again, and ties are stored once."""
    output = compressed(capsys, "some_models:Recurrent")
    succeed(capsys, "materialize", output, "-o", "dense.safetensors")
    dense = sources.load_model("some_models:Recurrent", Path("dense.safetensors"))
    safetensors.torch.load_model(sources.load_model("some_models:Recurrent"), "dense.safetensors")
    hashed = checkpoint.load(output, sources.load_model("some_models:Recurrent"))
    indices = torch.arange(12).view(3, 4)
    torch.testing.assert_close(dense(indices), hashed(indices))
    names = safetensors.torch.load_file("dense.safetensors").keys()
    assert len({"embedding.weight", "output.weight"} & names) == 1
    assert "lstm.weight_hh_l0" in names


def test_attention_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = compressed(capsys, "some_models:attention")
    succeed(capsys, "materialize", output, "-o", "dense.safetensors")
    dense = sources.load_model("some_models:attention", Path("dense.safetensors")).eval()
    hashed = checkpoint.load(output, sources.load_model("some_models:attention")).eval()
    input = torch.randn(3, 2, 32)
    torch.testing.assert_close(dense(input), hashed(input))


@pytest.mark.parametrize("has_noted_ties", [True, False])
def test_tied_weights_of_a_plain_file(
    has_noted_ties: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are there by one name, and safetensors' save_model notes the other."""
    model = sources.load_model("some_models:Recurrent")
    torch.nn.init.normal_(model.get_parameter("embedding.weight"))
    tensors = {name: value for name, value in model.state_dict().items() if name != "output.weight"}
    ties = {"output.weight": "embedding.weight"} if has_noted_ties else {}
    safetensors.torch.save_file(tensors, "tied.safetensors", {"format": "pt", **ties})
    loaded = sources.load_model("some_models:Recurrent", Path("tied.safetensors"))
    assert torch.equal(loaded.get_parameter("output.weight"), tensors["embedding.weight"])
    of_file = sources.load_model("tied.safetensors")
    names = {name for name, _ in of_file.named_parameters(remove_duplicate=False)}
    assert ("output.weight" in names) is has_noted_ties


def test_weights_go_into_what_the_factory_makes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Path("plain.safetensors")
    tensors = safetensors.torch.load_file(plain)
    safetensors.torch.save_file({**tensors, "6.bias": torch.full((5,), 7.0)}, plain)
    for source in (("plain.safetensors",), ("some_models:network", "--weights", plain)):
        output = compressed(capsys, *source)
        assert safetensors.torch.load_file(output)["6.bias"].tolist() == [7.0] * 5


def test_options_reach_the_hash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--num-hashes", 2, "--depth", 1, "--block", 8, "--seed", 1, "--min-size", 200)
    output = compressed(capsys, "plain.safetensors", *options, "--skip", "6")
    layers = checkpoint.read(output).layers
    assert layers.keys() == {"0", "4"}
    for layer in layers.values():
        assert {"num_hashes": 2, "depth": 1}.items() <= layer["state"].items()
        assert layer["state"]["block"] == 8


def test_fit_is_the_default(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}

    def record(model: nn.Module, ratio: float, **options: Any) -> Any:
        received.update(options)
        compressed, report = compress(model, ratio)
        return compressed, replace(report, fit=Fitted())

    class Fitted:
        def table(self) -> str:
            return "error of each layer"

    monkeypatch.setattr("hfh.compression.compress.compress", record)
    options = ("--ratio", "0.25", "--checkpoint", "fit.st")
    text = succeed(capsys, "compress", "plain.safetensors", "-o", "out.safetensors", *options)
    assert "error of each layer" in text
    assert received["init"] == "fit"
    assert received["fit_options"] == {"progress": True, "checkpoint": Path("fit.st")}


def test_calibration_fits_the_outputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hfh.fitting.moments")
    # Few directions, so that outputs can be fitted though weights cannot.
    inputs = torch.randn(64, 3) @ torch.randn(3, 32)
    safetensors.torch.save_file({"a": inputs[:32], "b": inputs[32:].clone()}, "inputs.safetensors")
    errors = []
    for options in ((), ("--calibration", "inputs.safetensors")):
        arguments = ("some_models:wide", "-o", "out.safetensors", "--ratio", "1/4", "--block", 1)
        assert cli.main(["compress", *map(str, arguments), *options]) == 0
        assert ("fitted to the weights alone" in capsys.readouterr().err) is (not options)
        dense = sources.load_model("some_models:wide")
        hashed = checkpoint.load("out.safetensors", sources.load_model("some_models:wide"))
        errors.append((hashed(inputs) - dense(inputs)).norm() / dense(inputs).norm())
    assert errors[1] < 0.1 * errors[0]


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--init", "scratch", "--ratio", "1/4", "-o", "out.safetensors", "--json")
    report = json.loads(succeed(capsys, "compress", "plain.safetensors", *options))
    assert report["ratio_asked"] == 0.25
    for name in ("out.safetensors", "plain.safetensors", "some_models:network"):
        found = json.loads(succeed(capsys, "inspect", name, "--json"))
        is_hashed = name == "out.safetensors"
        assert [layer["name"] for layer in found["layers"]] == ["4"] * is_hashed
        assert found["totals"]["virtual_weights"] == 48 * 256 * is_hashed
        assert found["totals"]["bytes"] == sum(tensor["bytes"] for tensor in found["tensors"])
        counted = ("--input", "1,2,4,4") if ":" in name else ("--positions", 3)
        cost = json.loads(succeed(capsys, "cost", name, *counted, "--ratio", "1/4", "--json"))
        assert cost["totals"].keys() == {"dense", "HashedNets", "HFH", "CSR"}
    back = ("out.safetensors", "-o", "dense.safetensors", "--json")
    assert json.loads(succeed(capsys, "materialize", *back))["tensors"] == 11
    timed = ("some_models:network", "--input", "1,2,4,4", "--repeats", 2, "--ratio", "1/4")
    for training in ((), ("--training",)):
        speed = json.loads(succeed(capsys, "bench", *timed, *training, "--json"))
        assert speed["ratio"] == speed["compressed_seconds"] / speed["dense_seconds"] > 0
        assert speed["training"] is bool(training)


def test_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = compressed(capsys)
    text = succeed(capsys, "inspect", output)
    (line,) = (line for line in text.splitlines() if "HFHLinear" in line)
    state = checkpoint.read(output).layers["4"]["state"]
    assert line.startswith(f"4      HFHLinear  depth {state['depth']}")
    assert "  48 x 256  " in line
    assert line.split()[-4:-1] == [str(state["num_hashes"]), str(state["block"]), "all"]
    assert int(line.split()[-1], 16) == state["seed"]
    assert "behind 12,288 virtual weights" in text
    assert "4.weight" in succeed(capsys, "inspect", "plain.safetensors")
    text = succeed(capsys, "cost", "some_models:Recurrent", "--input", "2,7", "--dtype", "int64")
    assert "lstm.recurrent_l0" in text
    options = ("--input", "1,2,4,4", "--repeats", 1, "--ratio", "1/4")
    text = succeed(capsys, "bench", "some_models:instance", *options)
    assert "compressed" in text


@pytest.mark.parametrize("training", [False, True])
def test_both_models_run_in_the_mode_that_is_timed(training: bool) -> None:
    modes: dict[str, list[tuple[bool, bool]]] = {"dense": [], "compressed": []}

    class Recorded(nn.Linear):
        def __init__(self, name: str) -> None:
            super().__init__(3, 2)
            self.name = name

        def forward(self, input: Tensor) -> Tensor:
            modes[self.name].append((self.training, torch.is_inference_mode_enabled()))
            return super().forward(input)

    repeats: list[None] = []
    dense, compressed = Recorded("dense"), Recorded("compressed")
    dense.train(not training)
    input = torch.ones(1, 3)
    speed = compare(dense, compressed, input, training, 3, lambda: repeats.append(None))
    assert len(repeats) == speed.repeats == 3
    assert modes["dense"] == modes["compressed"]
    assert set(modes["dense"]) == {(training, not training)}
    assert dense.weight.grad is None


def test_cost_of_a_file_and_of_its_model_agree(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = compressed(capsys)
    of_file = json.loads(succeed(capsys, "cost", output, "--json"))
    weights = ("--weights", output, "--input", "1,2,4,4")
    of_model = json.loads(succeed(capsys, "cost", "some_models:network", *weights, "--json"))
    parameters = [cost["totals"]["HFH"]["parameters"] for cost in (of_file, of_model)]
    # Of a file nobody knows which tensors are statistics of a norm.
    assert parameters[0] == parameters[1] + 2 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "hfh: error: Missing command."),
        ("squeeze", "No such command 'squeeze'"),
        ("compress", "hfh compress: error: Missing argument 'SOURCE'"),
        ("compress plain.safetensors", "Missing option '--output'"),
        ("compress plain.safetensors -o x --ratio 3", "'--ratio': must be between 0 and 1, such"),
        ("compress plain.safetensors -o x --ratio 1/0", "received '1/0'"),
        ("compress plain.safetensors -o x --depth deep", "an integer, received 'deep'"),
        ("compress plain.safetensors -o no/x", "Invalid value for --output: no folder no"),
        ("compress plain.safetensors -o plain.safetensors", "must not be a file that is read"),
        ("materialize plain.safetensors -o plain.safetensors", "must not be a file that is read"),
        ("compress plain.safetensors -o x --init scratch --checkpoint y", "goes with --init fit"),
        ("compress plain.safetensors -o x --calibration y", "a model that runs, package.module"),
        ("compress plain.safetensors -o x --init best", "'best' is not one of 'fit', 'scratch'"),
        ("cost plain.safetensors --input 1,2", "--input: goes with package.module:factory"),
        ("cost plain.safetensors --positions 0", "must be at least 1, received 0"),
        ("cost some_models:network", "the shape of the model's input is needed"),
        ("cost some_models:network --input 1x2", "1,3,224,224, received '1x2'"),
        ("cost some_models:network --input 1 --positions 1", "goes with a safetensors file"),
        ("cost some_models:network --input 1 --dtype int65", "received 'int65'"),
        ("bench some_models:network", "the shape of the model's input is needed"),
        ("bench plain.safetensors --input 1", "a file has no forward pass to time"),
        ("bench some_models:network --input 1 --repeats 0", "must be at least 1, received 0"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fail(capsys, 2, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect nothing.safetensors", "hfh: error: nothing.safetensors: No such file"),
        ("inspect some_models.py", "some_models.py: not a whole safetensors file"),
        ("inspect no_models:network", "no_models:network: no module named no_models"),
        ("inspect some_models.more:network", "some_models.more:network: no module named"),
        ("inspect some_models:missing", "some_models:missing: some_models has no 'missing'"),
        ("inspect some_models:", "given as package.module:factory, received some_models:"),
        ("inspect :network", "given as package.module:factory, received :network"),
        ("inspect some_models:number", "must give a torch.nn.Module, received int"),
        ("inspect some_models:broken", "hfh: error: RuntimeError: two lines"),
        ("inspect plain.safetensors --weights plain.safetensors", "--weights goes with package"),
        ("inspect some_models:Recurrent --weights plain.safetensors", "does not fit"),
        ("compress plain.safetensors -o x --skip nowhere", "matches no module: 'nowhere'"),
        ("compress plain.safetensors -o x --block 3 --init scratch", "block must be a power"),
        ("materialize nothing.safetensors -o x", "nothing.safetensors: No such file"),
        ("materialize plain.safetensors -o x", "plain.safetensors: a safetensors file, but"),
        ("compress some_models:network -o x --calibration plain.safetensors",
         "plain.safetensors does not hold inputs of the model"),
        ("cost some_models:network --input 1,7,4,4 --ratio 1/4", "to have 2 channels, but got 7"),
    ],
)  # fmt: skip
def test_failures(
    arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fail(capsys, 1, *arguments.split())
    assert {path.name for path in folder.iterdir()} <= {
        "some_models.py",
        "plain.safetensors",
        "__pycache__",
    }


@pytest.mark.parametrize("command", ["inspect", "cost", "materialize -o out.safetensors"])
def test_damaged_file(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = compressed(capsys)
    content = bytearray(output.read_bytes())
    content[-5] ^= 4
    output.write_bytes(content)
    name, *options = command.split()
    assert f"{output}: damaged" in fail(capsys, 1, name, output, *options)
    assert not Path("out.safetensors").exists()


def test_file_of_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(make_model(), "other.safetensors")
    message = fail(capsys, 1, "inspect", "some_models:network", "--weights", "other.safetensors")
    assert message.startswith("hfh: error: other.safetensors: ")


@pytest.mark.parametrize("package", ["safetensors", "typer"])
def test_missing_package(package: str) -> None:
    result = run("inspect", "file.safetensors", missing=package)
    assert result.returncode == 1
    error, _ = result.stderr.splitlines()
    assert error.startswith("hfh: error: ")
    assert package in error
    assert error.endswith("; pip install 'hfh-kernels[toolkit]'")


def test_interrupt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "load_model", interrupt)
    assert fail(capsys, 130, "inspect", "plain.safetensors") == "hfh: interrupted\n"


def test_traceback(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="two\nlines"):
        cli.main(["--traceback", "inspect", "some_models:broken"])
