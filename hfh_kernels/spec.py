"""What defines a virtual weight apart from its parameters: the hash and the reconstruction network.

Nothing here needs torch. Both classes validate on construction, so every other module may
rely on the ranges below.
"""

from __future__ import annotations

import dataclasses
import json

HASH_VERSION = 1
MAX_HASHES = 16
MAX_BLOCK = 256
MAX_DEPTH = 3
MAX_WIDTH = 16
ACTIVATIONS = ("relu", "tanh")
COORDINATES = 2**32
"""Rows and columns of a virtual weight are unsigned 32-bit numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashSpec:
    """The hash, version 1: which pool elements, with which signs, make up a weight.

    Args:
        seed: 0 <= seed < 2**32. Layers that share a pool take distinct seeds.
        num_hashes: pool elements behind one weight, 1 to 16.
        pool_size: elements of the pool, 1 <= pool_size < 2**31, a multiple of ``block``.
        block: neighbouring columns that read neighbouring pool elements, a power of two, 1 to 256.
        window: pool elements that a group of rows draws from, a multiple of ``block`` and at most
            ``pool_size``; None for the whole pool.
        rows_per_window: rows in such a group, 1 <= rows_per_window < 2**32; None exactly where
            ``window`` is None.
        version: of the hash formula. Only 1 exists.

    Raises:
        TypeError: a field is not an int.
        ValueError: a field is out of range.
    """

    seed: int = 0
    num_hashes: int = 4
    pool_size: int
    block: int = 1
    window: int | None = None
    rows_per_window: int | None = None
    version: int = HASH_VERSION

    def __post_init__(self) -> None:
        require_int("version", self.version, HASH_VERSION, HASH_VERSION)
        require_int("seed", self.seed, 0, 2**32 - 1)
        require_int("num_hashes", self.num_hashes, 1, MAX_HASHES)
        require_int("pool_size", self.pool_size, 1, 2**31 - 1)
        require_int("block", self.block, 1, MAX_BLOCK)
        if self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two, received {self.block}")
        if self.pool_size % self.block:
            raise ValueError(
                f"pool_size must be a multiple of block={self.block}, received {self.pool_size}"
            )
        if (self.window is None) != (self.rows_per_window is None):
            raise ValueError(
                "window and rows_per_window must be given together, received "
                f"window={self.window} and rows_per_window={self.rows_per_window}"
            )
        if self.window is not None and self.rows_per_window is not None:
            require_int("window", self.window, self.block, self.pool_size)
            if self.window % self.block:
                raise ValueError(
                    f"window must be a multiple of block={self.block}, received {self.window}"
                )
            require_int("rows_per_window", self.rows_per_window, 1, 2**32 - 1)

    def to_json(self) -> str:
        """All fields as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HashSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            TypeError: a field is not an int.
            ValueError: ``text`` is not a JSON object of exactly the fields, or one is out of range.
        """
        fields = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or fields.keys() != names:
            raise ValueError(f"text must be a JSON object with the fields {sorted(names)}: {text}")
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The shape of g, the network that turns hashed pool elements into one weight.

    Args:
        depth: 0 takes the first element as it is (HashedNets), 1 mixes the elements linearly
            without a bias, d > 1 has d - 1 hidden layers, a linear output and biases on all; to 3.
        width: units of a hidden layer, 1 to 16; without effect below depth 2.
        activation: of hidden layers, "relu" or "tanh"; without effect below depth 2.

    Raises:
        TypeError: depth or width is not an int.
        ValueError: an argument is out of range.
    """

    depth: int = 2
    width: int = 4
    activation: str = "relu"

    def __post_init__(self) -> None:
        require_int("depth", self.depth, 0, MAX_DEPTH)
        require_int("width", self.width, 1, MAX_WIDTH)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {ACTIVATIONS}, received {self.activation!r}"
            )

    def layer_shapes(self, num_hashes: int) -> list[tuple[int, int]]:
        """(outputs, inputs) of each layer of g, first to last."""
        if self.depth == 0:
            return []
        sizes = [num_hashes] + [self.width] * (self.depth - 1) + [1]
        return [(sizes[i + 1], sizes[i]) for i in range(self.depth)]

    def num_parameters(self, num_hashes: int) -> int:
        """Elements of theta: every layer's weight, row-major, each followed by its bias."""
        has_bias = self.depth > 1
        return sum(rows * (cols + has_bias) for rows, cols in self.layer_shapes(num_hashes))


def require_int(name: str, value: object, low: int, high: int) -> None:
    """Raise unless ``value`` is an int, not a bool, in [low, high]; ``name`` leads the message."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, received {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], received {value}")
