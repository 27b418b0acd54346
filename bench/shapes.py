"""The one table of what is measured: the layer of the published figures, and their rows."""

from __future__ import annotations

import dataclasses
import functools

import torch

from hfh_kernels.nn import HFHConv2d, HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool

IN_FEATURES = OUT_FEATURES = 4096
NUM_WEIGHTS = IN_FEATURES * OUT_FEATURES
BATCHES = (1, 8, 32, 128, 512)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a layer, how it is run, and what to reach at which batch."""

    name: str
    depth: int = 2
    block: int = 64
    backward: bool = False
    dtype: torch.dtype = torch.float32
    num_hashes: int = 4
    width: int = 4
    compression: int = 16
    targets: dict[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """Time relative to the dense layer, by batch."""

    @property
    def pool_size(self) -> int:
        return NUM_WEIGHTS // self.compression

    def pool(self) -> Pool:
        return Pool(self.pool_size, dtype=self.dtype)

    def layer(self, pool: Pool) -> HFHLinear:
        """relu, no bias."""
        return HFHLinear(
            IN_FEATURES,
            OUT_FEATURES,
            bias=False,
            pool=pool,
            num_hashes=self.num_hashes,
            depth=self.depth,
            width=self.width,
            block=self.block,
        )

    def dense_weight(self) -> torch.nn.Parameter:
        weight = torch.empty(OUT_FEATURES, IN_FEATURES, dtype=self.dtype)
        return torch.nn.Parameter(weight.normal_(std=(3 * IN_FEATURES) ** -0.5))


FORWARD = Row(
    "forward, depth 2",
    targets={1: 0.70, 8: 0.75, 32: 0.95, 128: 1.00, 512: 1.05},
)
FORWARD_BACKWARD = Row(
    "forward + backward, depth 2",
    backward=True,
    targets={128: 1.25, 512: 1.12},
)
ROWS = (
    FORWARD,
    Row(
        "forward, depth 1",
        depth=1,
        targets={1: 0.38, 8: 0.55, 32: 0.90, 128: 0.98, 512: 1.03},
    ),
    Row("forward, depth 1, block 256, 1/64", depth=1, block=256, compression=64),
    Row("forward, depth 1, block 256, 1/256", depth=1, block=256, compression=256),
    Row("forward, depth 2, block 1", block=1, targets={512: 1.30}),
    FORWARD_BACKWARD,
    Row(
        "forward + backward, depth 1, block 256, 1/64",
        depth=1,
        block=256,
        compression=64,
        backward=True,
    ),
    Row("forward, depth 2, bfloat16", dtype=torch.bfloat16, targets={1: 1.00}),
    Row("forward, depth 1, bfloat16", depth=1, dtype=torch.bfloat16, targets={1: 1.00}),
    Row(
        "forward, depth 1, block 256, 1/64, bfloat16",
        depth=1,
        block=256,
        compression=64,
        dtype=torch.bfloat16,
    ),
)


@dataclasses.dataclass(frozen=True)
class Images:
    """A convolution that keeps the images' size, U 4, depth 2, width 4, relu, block 32, 1/16."""

    kernel: int
    channels: int
    size: int
    batch: int
    forward_target: float
    backward_target: float
    """Time relative to the dense layer; of forward and backward together."""

    @property
    def name(self) -> str:
        return (
            f"{self.kernel}x{self.kernel}, {self.channels} channels, {self.size} x {self.size}, "
            f"batch {self.batch}"
        )

    def layer(self) -> HFHConv2d:
        num_weights = self.channels**2 * self.kernel**2
        return HFHConv2d(
            self.channels,
            self.channels,
            self.kernel,
            padding=self.kernel // 2,
            bias=False,
            pool=Pool(num_weights // 16),
            block=32,
        )


CONVOLUTIONS = (
    Images(3, 256, 14, 1, forward_target=1.15, backward_target=1.30),
    Images(3, 256, 14, 16, forward_target=1.04, backward_target=1.15),
    Images(1, 512, 14, 1, forward_target=1.15, backward_target=1.30),
    Images(1, 512, 14, 16, forward_target=1.04, backward_target=1.15),
    Images(3, 512, 7, 1, forward_target=0.90, backward_target=1.30),
)


NUM_EMBEDDINGS, EMBEDDING_DIM = 1_000_000, 64
LARGE_NUM_EMBEDDINGS = 10_000_000
"""2.4 GiB in float32: more than a last-level cache holds."""
NUM_INDICES = 65_536


@dataclasses.dataclass(frozen=True)
class LookupRow:
    """A table, and whether its rows are wanted or sums of bags of them; float32, relu."""

    name: str
    bag_size: int = 0
    depth: int = 2
    num_hashes: int = 4
    width: int = 4
    block: int = 32
    num_embeddings: int = NUM_EMBEDDINGS
    targets: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
    """Time relative to the dense operator, by what is timed."""

    def pool(self) -> Pool:
        """Of 1/100 of the smaller table, whatever the table."""
        return Pool(NUM_EMBEDDINGS * EMBEDDING_DIM // 100)

    def layer(self, pool: Pool) -> HFHEmbedding | HFHEmbeddingBag:
        kind = functools.partial(HFHEmbeddingBag, mode="sum") if self.bag_size else HFHEmbedding
        return kind(
            self.num_embeddings,
            EMBEDDING_DIM,
            pool=pool,
            num_hashes=self.num_hashes,
            depth=self.depth,
            width=self.width,
            block=self.block,
        )

    def indices(self) -> torch.Tensor:
        return torch.randint(self.num_embeddings, (NUM_INDICES,))

    def arguments(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A layer's: the indices, and where bags begin."""
        if not self.bag_size:
            return (indices,)
        return indices, torch.arange(0, len(indices), self.bag_size)

    def grad_output(self) -> torch.Tensor:
        return torch.randn(NUM_INDICES // (self.bag_size or 1), EMBEDDING_DIM)


EMBEDDING = LookupRow("embedding, depth 2", targets={"forward": 0.45, "forward + backward": 0.6})
BAG = LookupRow(
    "bags of 32, sum, depth 2",
    bag_size=32,
    targets={"forward": 0.30, "forward + backward": 0.5, "training step": 0.05},
)
LOOKUP_ROWS = (
    EMBEDDING,
    LookupRow("embedding, depth 1", depth=1),
    BAG,
    LookupRow("bags of 32, sum, depth 1", bag_size=32, depth=1),
    LookupRow("embedding, depth 2, 10,000,000 rows", num_embeddings=LARGE_NUM_EMBEDDINGS),
    LookupRow(
        "bags of 32, sum, depth 2, 10,000,000 rows",
        bag_size=32,
        num_embeddings=LARGE_NUM_EMBEDDINGS,
    ),
)


GPU_BATCHES = (1, 16, 64, 256, 1024, 4096)


@dataclasses.dataclass(frozen=True)
class GPULinear:
    """A linear layer on a GPU: bfloat16, relu, no bias."""

    in_features: int
    out_features: int
    block: int = 32
    depth: int = 2
    num_hashes: int = 4
    compression: int = 16
    width: int = 4
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    rows_per_window: int | None = None
    num_layers: int = 1
    """Over one pool."""

    @property
    def name(self) -> str:
        window = f", window {self.window} of {self.rows_per_window} rows" if self.window else ""
        compression = "" if self.compression == 16 else f", 1/{self.compression}"
        layers = "" if self.num_layers == 1 else f", {self.num_layers} layers"
        return (
            f"{self.in_features} x {self.out_features}, U{self.num_hashes} depth {self.depth}, "
            f"block {self.block}{window}{compression}{layers}"
        )

    @property
    def num_weights(self) -> int:
        """Of a layer."""
        return self.in_features * self.out_features

    def layer(self, device: str) -> HFHLinear:
        return self.layers(device)[0]

    def layers(self, device: str) -> list[HFHLinear]:
        size = self.num_layers * self.num_weights // self.compression
        pool = Pool(size, dtype=self.dtype, device=device)
        return [
            HFHLinear(
                self.in_features,
                self.out_features,
                bias=False,
                pool=pool,
                num_hashes=self.num_hashes,
                depth=self.depth,
                width=self.width,
                block=self.block,
                window=self.window,
                rows_per_window=self.rows_per_window,
                device=device,
            )
            for _ in range(self.num_layers)
        ]

    def dense_weight(self, device: str) -> torch.Tensor:
        weight = torch.randn(self.out_features, self.in_features, device=device, dtype=self.dtype)
        return weight.mul_((3 * self.in_features) ** -0.5)

    def input(self, batch: int, device: str) -> torch.Tensor:
        return torch.randn(batch, self.in_features, device=device, dtype=self.dtype)


GPU_LINEARS = (
    GPULinear(4096, 4096),
    GPULinear(4096, 4096, block=64),
    GPULinear(8192, 28672),
    GPULinear(8192, 28672, block=64),
    GPULinear(4096, 4096, depth=1),
    GPULinear(4096, 4096, dtype=torch.float32),
    GPULinear(4096, 4096, block=1, depth=0, num_hashes=1),
)
"""The last is HashedNets."""
SMALL_BATCHES = (1, 2, 4, 8, 16, 32, 64)
WINDOW = 2**15
"""64 KiB of bfloat16."""
GPU_SMALL_BATCH_LINEARS = tuple(
    GPULinear(
        in_features,
        out_features,
        block=64,
        depth=depth,
        num_hashes=num_hashes,
        window=WINDOW,
        rows_per_window=rows,
    )
    for in_features, out_features in ((8192, 28672), (4096, 14336))
    for num_hashes, depth, rows in ((4, 1, 32), (4, 1, 256), (2, 1, 32), (4, 2, 32))
)
TRAINING_BATCH = 4096
GPU_TRAINING_LINEARS = (
    GPULinear(4096, 4096),
    GPULinear(4096, 4096, block=64, window=WINDOW, rows_per_window=256),
    GPULinear(4096, 4096, block=1, depth=0, num_hashes=1, compression=512),
)
"""The last is HashedNets with a pool of 64 KiB."""
GPU_DECODERS = tuple(
    GPULinear(4096, 4096, block=64, depth=depth, window=WINDOW, rows_per_window=32, num_layers=64)
    for depth in (1, 2)
)
"""Layers that one token goes through, one after the other."""


PLAIN = "U4 depth 2, block 32, bf16"
"""The kind of layer, by name, that every table of compiled kernels has."""


@dataclasses.dataclass(frozen=True)
class GPUImages:
    """A 3 x 3 convolution that keeps the images' size: bfloat16, U 4, depth 2, block 32, 1/16."""

    channels: int = 256
    size: int = 14
    batch: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"3x3, {self.channels} channels, {self.size} x {self.size}, batch {self.batch}"

    def layer(self, device: str) -> HFHConv2d:
        pool = Pool(self.channels**2 * 9 // 16, dtype=self.dtype, device=device)
        return HFHConv2d(
            self.channels, self.channels, 3, padding=1, bias=False, pool=pool, device=device
        )

    def input(self, device: str) -> torch.Tensor:
        images = torch.randn(
            self.batch, self.channels, self.size, self.size, device=device, dtype=self.dtype
        )
        return images.contiguous(memory_format=torch.channels_last)


@dataclasses.dataclass(frozen=True)
class GPULookups:
    """Rows of a table, or sums of bags of them: float32, U 4, depth 2, block 32, 1/100."""

    bag_size: int = 0
    num_embeddings: int = 10_000_000
    embedding_dim: int = 128
    num_indices: int = 2**20
    dtype: torch.dtype = torch.float32
    zipf: float = 0.0
    """Index i is drawn as often as (i + 1) ** -zipf says; 0 draws all alike."""

    @property
    def name(self) -> str:
        kind = f"bags of {self.bag_size}" if self.bag_size else "embedding"
        zipf = f", Zipf({self.zipf})" if self.zipf else ""
        return (
            f"{kind}, {self.num_indices:,} of {self.num_embeddings:,} x {self.embedding_dim}{zipf}"
        )

    def layer(self, device: str) -> HFHEmbedding | HFHEmbeddingBag:
        kind = functools.partial(HFHEmbeddingBag, mode="sum") if self.bag_size else HFHEmbedding
        size = self.num_embeddings * self.embedding_dim // 100
        pool = Pool(size, dtype=self.dtype, device=device)
        return kind(self.num_embeddings, self.embedding_dim, pool=pool, device=device)

    def arguments(self, device: str) -> tuple[torch.Tensor, ...]:
        indices = self._indices(device)
        if not self.bag_size:
            return (indices,)
        return indices, torch.arange(0, self.num_indices, self.bag_size, device=device)

    def _indices(self, device: str) -> torch.Tensor:
        if not self.zipf:
            return torch.randint(self.num_embeddings, (self.num_indices,), device=device)
        ranks = torch.arange(1, self.num_embeddings + 1, dtype=torch.float64, device=device)
        sums = ranks.pow_(-self.zipf).cumsum(0)
        drawn = torch.rand(self.num_indices, dtype=torch.float64, device=device).mul_(sums[-1])
        return torch.searchsorted(sums, drawn).clamp_(max=self.num_embeddings - 1)


GPU_CONVOLUTIONS = (GPUImages(),)
GPU_LOOKUPS = (GPULookups(), GPULookups(bag_size=32))
ZIPF = 1.1
