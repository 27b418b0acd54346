from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hfh_kernels import HashSpec, Reconstruction

WINDOWED = HashSpec(
    seed=2**32 - 1, num_hashes=16, pool_size=1600, block=16, window=960, rows_per_window=32
)


def test_defaults() -> None:
    spec = HashSpec(pool_size=7)
    assert dataclasses.astuple(spec) == (0, 4, 7, 1, None, None, 1)
    assert Reconstruction() == Reconstruction(depth=2, width=4, activation="relu")


@pytest.mark.parametrize(
    "fields",
    [
        {"pool_size": 1},
        {"pool_size": 2**31 - 1},
        {"pool_size": 2**31 - 256, "block": 256},
        {"pool_size": 64, "block": 64, "window": 64, "rows_per_window": 1},
        {"pool_size": 64, "window": 1, "rows_per_window": 2**32 - 1},
        {"pool_size": 64, "seed": 2**32 - 1, "num_hashes": 16},
    ],
)
def test_limits_are_inclusive(fields: dict[str, Any]) -> None:
    HashSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, r"seed .* received -1"),
        ({"seed": 2**32}, r"seed .* received 4294967296"),
        ({"num_hashes": 0}, r"num_hashes .* received 0"),
        ({"num_hashes": 17}, r"num_hashes .* received 17"),
        ({"pool_size": 0}, r"pool_size .* received 0"),
        ({"pool_size": 2**31}, r"pool_size .* received 2147483648"),
        ({"pool_size": 100, "block": 8}, r"pool_size must be a multiple of block=8, received 100"),
        ({"block": 0}, r"block .* received 0"),
        ({"block": 3}, r"block must be a power of two, received 3"),
        ({"block": 512}, r"block .* received 512"),
        ({"window": 64}, r"window=64 and rows_per_window=None"),
        ({"rows_per_window": 4}, r"window=None and rows_per_window=4"),
        ({"window": 2048, "rows_per_window": 4}, r"window .* received 2048"),
        ({"window": 4, "rows_per_window": 4, "block": 8}, r"window .* received 4"),
        ({"window": 12, "rows_per_window": 4, "block": 8}, r"window .* received 12"),
        ({"window": 0, "rows_per_window": 4}, r"window .* received 0"),
        ({"window": 64, "rows_per_window": 0}, r"rows_per_window .* received 0"),
        ({"window": 64, "rows_per_window": 2**32}, r"rows_per_window .* received 4294967296"),
        ({"version": 2}, r"version .* received 2"),
    ],
)
def test_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashSpec(**{"pool_size": 1024, **fields})


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
@pytest.mark.parametrize("name", ["seed", "num_hashes", "pool_size", "block", "version"])
def test_not_an_int(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int, received {value!r}"):
        HashSpec(**{"pool_size": 1024, name: value})  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    for spec in (WINDOWED, HashSpec(pool_size=5)):
        assert HashSpec.from_json(spec.to_json()) == spec


def test_json_of_another_shape() -> None:
    fields = json.loads(WINDOWED.to_json())
    for wrong in ({**fields, "extra": 1}, {"pool_size": 5}, [1], 7):
        with pytest.raises(ValueError, match="JSON object with the fields"):
            HashSpec.from_json(json.dumps(wrong))
    with pytest.raises(ValueError, match="version"):
        HashSpec.from_json(json.dumps({**fields, "version": 2}))
    with pytest.raises(ValueError, match="Expecting"):
        HashSpec.from_json("{")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        WINDOWED.seed = 3  # type: ignore[misc]
    assert len({WINDOWED, dataclasses.replace(WINDOWED)}) == 1


@pytest.mark.parametrize(
    ("depth", "count"),
    [(0, 0), (1, 4), (2, 4 * 3 + 3 + 3 + 1), (3, 4 * 3 + 3 + 3 * 3 + 3 + 3 + 1)],
)
def test_num_parameters(depth: int, count: int) -> None:
    assert Reconstruction(depth, width=3).num_parameters(num_hashes=4) == count


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": -1}, ValueError, "depth .* received -1"),
        ({"depth": 4}, ValueError, "depth .* received 4"),
        ({"width": 0}, ValueError, "width .* received 0"),
        ({"width": 17, "depth": 0}, ValueError, "width .* received 17"),
        ({"activation": "gelu"}, ValueError, "activation .* received 'gelu'"),
        ({"depth": 2.0}, TypeError, "depth must be an int"),
        ({"width": True}, TypeError, "width must be an int"),
    ],
)
def test_invalid_reconstruction(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Reconstruction(**arguments)
