from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hfh import cli, machine, timing
from hfh.demo import accuracy, command, report, run, tuning
from hfh.demo.methods import CASES, NUM_BIASES, NUM_DENSE, SIZES, Case, num_parameters
from hfh.demo.run import QUICK, REPEATS, Results, num_steps
from hfh.demo.speed import KINDS
from hfh_kernels import build_info
from hfh_kernels.nn import HFHLinear, Pool


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Of the quick demo, on one thread, which other processes disturb least."""
    steps: list[str] = []
    threads = torch.get_num_threads()
    settings = replace(QUICK, threads=1)
    yield run.run(settings, steps.append)
    torch.set_num_threads(threads)
    assert len(steps) == num_steps(settings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_network_fills_its_budget(case: Case) -> None:
    network = case.build()
    budget = NUM_DENSE // case.compression
    assert 0.94 * budget < num_parameters(network) <= budget
    layers = [layer for layer in network if isinstance(layer, HFHLinear)]
    if layers:
        assert [(layer.in_features, layer.out_features) for layer in layers] == [*pairwise(SIZES)]
        pools = {module for module in network.modules() if isinstance(module, Pool)}
        counted = sum(pool.weight.numel() for pool in pools)
        counted += sum(layer.theta.numel() for layer in layers) + NUM_BIASES
        assert num_parameters(network) == counted
        assert len(pools) == (3 if case.method.name == "HashedNets" else 1)


def test_parameters_of_the_dense_network() -> None:
    assert NUM_DENSE == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    hidden = {case.compression: case.build()[0].out_features for case in CASES[1::6]}
    assert hidden == {16: 44, 64: 14}


def test_every_case_has_learning_rates_from_the_grid() -> None:
    assert tuning.CHOSEN.keys() == {case.key for case in CASES}
    assert set(tuning.CHOSEN.values()) <= set(tuning.GRID)


def test_results(results: Results) -> None:
    assert [(result.method, result.compression) for result in results.accuracies] == [
        case.key for case in CASES
    ]
    assert all(0 <= result.mean <= 100 for result in results.accuracies)
    assert results.accuracies[0].mean < 50
    assert all(result.standard_error is None for result in results.accuracies)
    if build_info()["extension"]:
        batches = [(layers, batch) for layers in (1, 2) for batch in REPEATS]
        assert [(timing.num_layers, timing.batch) for timing in results.timings] == batches
        assert all(timing.ratio(kind) > 0 for timing in results.timings for kind in KINDS)
    else:
        assert results.timings == []


def test_same_seed_gives_the_same_network(results: Results) -> None:
    case, result = CASES[-1], results.accuracies[-1]
    split, epochs = accuracy.digits(), results.settings.epochs
    error = accuracy.held_out_error(case, split, result.learning_rates, epochs, seed=0)
    assert error == result.test_errors[0]


def test_tables_show_every_row(results: Results) -> None:
    console = Console(width=80, record=True, quiet=True)
    tables = [report.accuracy_table(results.accuracies)]
    if results.timings:
        tables.append(report.speed_table(results.timings, results.settings.features))
    for table in tables:
        console.print(table)
    assert [table.row_count for table in tables] == [
        len(rows) for rows in (results.accuracies, results.timings) if rows
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_command_writes_its_files(
    results: Results,
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "run", lambda settings, on_step: results)
    output = tmp_path / "new" / "folder"
    options = ["--json"] if as_json else []
    assert cli.main(["demo", "--quick", "--output", str(output), *options]) == 0
    written = json.loads((output / "demo.json").read_text())
    printed = capsys.readouterr().out
    if as_json:
        assert json.loads(printed) == written
    else:
        assert "HFH U4 depth 2, block 32" in printed
        assert "1,301" in printed
    assert written["machine"]["packages"]["torch"] == written["machine"]["hfh_kernels"]["torch"]
    assert written["accuracy"][0]["num_parameters"] == NUM_DENSE
    assert written["accuracy"][-1]["ratio"] == 1301 / NUM_DENSE
    assert len(written["speed"]) == len(results.timings)
    png = (output / "demo.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(png[16:20], "big") >= 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "hfh: error: Missing command."),
        (["demo", "--quick", "--seeds", "0"], "seeds must be at least 1, received 0"),
        (["demo", "--threads", "-1"], "threads must be at least 1, received -1"),
        (["demo", "--seeds", "two"], "must be an integer, received 'two'"),
        (["demo", "--slow"], "No such option: --slow"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unusable_output_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["demo", "--quick", "--output", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hfh: error: ")
    assert error.count("\n") == 1


def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "hfh.demo.command")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "rich.progress" in error
    assert "hfh-kernels[demo]" in error
    assert error.count("\n") == 1


def test_interleaved_medians() -> None:
    calls: list[str] = []
    medians = timing.interleaved_medians(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=5, warmup=2
    )
    assert medians.keys() == {"a", "b"}
    assert all(seconds >= 0 for seconds in medians.values())
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(0, 14, 2))
    assert len(calls) == 14


def test_interleaved_medians_rejects() -> None:
    with pytest.raises(ValueError, match="functions"):
        timing.interleaved_medians({}, repeats=1, warmup=0)
    with pytest.raises(ValueError, match="repeats must be at least 1, received 0"):
        timing.interleaved_medians({"a": list}, repeats=0, warmup=0)
    with pytest.raises(ValueError, match="warmup must be at least 0, received -1"):
        timing.interleaved_medians({"a": list}, repeats=1, warmup=-1)


def test_machine_description_is_json() -> None:
    description = machine.describe()
    assert json.loads(json.dumps(description)) == description
    assert description["cpus"] >= 1
