"""``HFHEmbedding``, ``HFHEmbeddingBag``, dense rows, and projections tied to an embedding."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfh_kernels.nn import HFHEmbedding, HFHEmbeddingBag, HFHLinear, Pool

LAYERS = [HFHEmbedding, HFHEmbeddingBag]


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("dense_rows", [0, 5])
@pytest.mark.parametrize("permuted", [False, True])
def test_embedding_is_a_look_up_in_the_table(
    permuted: bool, dense_rows: int, padding_idx: int | None
) -> None:
    permutation = torch.randperm(20) if permuted else None
    layer = HFHEmbedding(
        20, 8, padding_idx, pool=Pool(128), dense_rows=dense_rows, permutation=permutation
    )
    indices = torch.randint(20, (3, 7))
    table = layer.materialize()
    torch.testing.assert_close(layer(indices), nn.functional.embedding(indices, table))
    zero = torch.zeros(20, dtype=torch.bool)
    if padding_idx is not None:
        zero[padding_idx] = True
    assert torch.equal((table == 0).all(1), zero)
    if layer.dense is not None:
        rank = torch.arange(20) if permutation is None else permutation
        kept = (rank < dense_rows) & ~zero
        assert torch.equal(table[kept], layer.dense[rank[kept]])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_is_torchs_on_the_table(mode: str) -> None:
    layer = HFHEmbeddingBag(20, 8, mode=mode, padding_idx=2, pool=Pool(128), dense_rows=4)
    indices, offsets = torch.randint(20, (30,)), torch.tensor([0, 5, 5, 11])
    weights = torch.randn(30) if mode == "sum" else None
    expected = nn.functional.embedding_bag(
        indices, layer.materialize(), offsets, mode=mode, per_sample_weights=weights, padding_idx=2
    )
    torch.testing.assert_close(layer(indices, offsets, weights), expected, rtol=1e-4, atol=1e-5)
    two = layer(indices.view(5, 6))
    last = HFHEmbeddingBag(
        20, 8, mode=mode, padding_idx=2, pool=layer.pool, include_last_offset=True,
        seed=layer.hash_spec.seed, theta=layer.theta, dense_rows=4,
    )  # fmt: skip
    last.dense = layer.dense
    torch.testing.assert_close(last(indices, torch.arange(0, 31, 6)), two)


@pytest.mark.parametrize("kind", LAYERS)
def test_initial_rows_have_the_variance_of_torchs(kind: Any) -> None:
    table = kind(2000, 64, pool=Pool(16384), dense_rows=1000).materialize()
    for rows in (table[:1000], table[1000:]):
        assert abs(rows.mean()) < 0.1
        assert 0.8 < rows.std() < 1.25


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_norm": 1.0}, ValueError, "max_norm must be None"),
        ({"scale_grad_by_freq": True}, ValueError, "scale_grad_by_freq must be False"),
        ({"sparse": True}, ValueError, "sparse must be False"),
        ({"padding_idx": 20}, ValueError, "padding_idx .*received 20"),
        ({"num_embeddings": -1}, ValueError, "num_embeddings .*received -1"),
        ({"num_embeddings": 2**32 + 1}, ValueError, "num_embeddings .*received 4294967297"),
        ({"embedding_dim": 2.0}, TypeError, "embedding_dim must be an int, received 2.0"),
        ({"pool": nn.Linear(1, 1)}, TypeError, "pool must be a .*Pool, received Linear"),
        ({"dense_rows": 21}, ValueError, r"dense_rows must be in \[0, 20\], received 21"),
        ({"permutation": torch.zeros(20)}, TypeError, "permutation must be an int64 tensor"),
        ({"permutation": [0]}, TypeError, "permutation must be an int64 tensor"),
        ({"permutation": torch.arange(3)}, ValueError, r"permutation .*\[20\], received \[3\]"),
        ({"permutation": torch.zeros(20).long()}, ValueError, "permutation must hold each"),
        ({"permutation": torch.arange(20) - 1}, ValueError, "permutation must hold each"),
    ],
    ids=str,
)
def test_invalid(kind: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"num_embeddings": 20, "embedding_dim": 8, "pool": Pool(128), **changes}
    with pytest.raises(error, match=message):
        kind(**arguments)


def test_invalid_mode() -> None:
    with pytest.raises(ValueError, match=r"mode must be .* received 'min'"):
        HFHEmbeddingBag(20, 8, mode="min", pool=Pool(128))


def test_repr() -> None:
    pool = Pool(128)
    layer = HFHEmbedding(20, 8, -1, pool=pool, dense_rows=4, permutation=torch.arange(20), seed=7)
    assert "(20, 8, padding_idx=19, dense_rows=4, permuted, num_hashes=4" in repr(layer).replace(
        "\n  ", ""
    )
    assert "mode='max'" in repr(HFHEmbeddingBag(20, 8, mode="max", pool=pool))
    assert "dense_rows=3" in repr(HFHLinear(8, 20, pool=pool, dense_rows=3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dense_rows", [0, 4, 20])
def test_linear_with_dense_rows(dense_rows: int, permuted: bool, bias: bool) -> None:
    layer = HFHLinear(
        8,
        20,
        bias,
        pool=Pool(128),
        dense_rows=dense_rows,
        permutation=torch.randperm(20) if permuted else None,
    )
    input = torch.randn(3, 8)
    torch.testing.assert_close(
        layer(input), nn.functional.linear(input, layer.materialize(), layer.bias)
    )
    if layer.dense is not None:
        assert layer.dense.shape == (dense_rows, 8)
        layer(input).sum().backward()
        assert layer.dense.grad is not None
        assert layer.dense.grad.all()


class LanguageModel(nn.Module):
    """The next token from the ones before: embedding, hidden layer, tied projection, one pool."""

    def __init__(self, vocabulary: int = 60, dim: int = 32, permutation: Tensor | None = None):
        super().__init__()
        pool = Pool(1024)
        self.embedding = HFHEmbedding(
            vocabulary, dim, pool=pool, dense_rows=8, permutation=permutation, block=8
        )
        self.hidden = HFHLinear(2 * dim, dim, pool=pool, block=8)
        self.output = HFHLinear.tied_to(self.embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(torch.relu(self.hidden(self.embedding(tokens).flatten(-2))))
        return logits


@pytest.mark.parametrize("permuted", [False, True])
def test_tied_projection_multiplies_by_the_table(permuted: bool) -> None:
    model = LanguageModel(permutation=torch.randperm(60) if permuted else None)
    input = torch.randn(5, 32)
    expected = nn.functional.linear(input, model.embedding.materialize(), model.output.bias)
    torch.testing.assert_close(model.output(input), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.output.materialize(), model.embedding.materialize())


def is_tied(model: LanguageModel) -> bool:
    embedding, output = model.embedding, model.output
    return (
        embedding.theta is output.theta
        and embedding.dense is output.dense
        and embedding.pool is output.pool is model.hidden.pool
        and embedding.hash_spec == output.hash_spec
    )


def test_tied_parameters_are_one() -> None:
    model = LanguageModel(permutation=torch.randperm(60))
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        "embedding.theta", "embedding.dense", "embedding.pool.weight", "hidden.theta",
        "hidden.bias", "output.bias",
    ]  # fmt: skip
    assert is_tied(model)
    assert is_tied(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert is_tied(torch.load(file, weights_only=False))


def test_state_dict_round_trip() -> None:
    model = LanguageModel(permutation=torch.randperm(60))
    other = LanguageModel(permutation=torch.arange(60))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert is_tied(other)
    tokens = torch.randint(60, (4, 2))
    assert torch.equal(other(tokens), model(tokens))


def test_checkpoint_of_other_dense_rows_is_refused() -> None:
    state = HFHEmbedding(20, 8, pool=Pool(128), dense_rows=4).get_extra_state()
    with pytest.raises(ValueError, match=r"dense_rows=4.*dense_rows=None"):
        HFHEmbedding(20, 8, pool=Pool(128)).set_extra_state(state)


def test_language_model_trains() -> None:
    """Each token follows from the two before it; 60 x 60 pairs, a 9th of the dense parameters."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(60, (256, 2), generator=generator)
    target = (tokens[:, 0] + tokens[:, 1]) % 3 + 3 * (tokens[:, 1] % 4)
    model = LanguageModel()
    optimizer = torch.optim.Adam(
        [
            {"params": [model.embedding.pool.weight], "lr": 0.05},
            {"params": [p for n, p in model.named_parameters() if "pool" not in n], "lr": 0.01},
        ]
    )
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert losses[-1] < 1.0


def test_bag_classifier_trains_with_only_the_pool() -> None:
    layer = HFHEmbeddingBag(10**9, 16, mode="mean", pool=Pool(2048), block=16)
    tokens = torch.randint(10**9, (64, 8))
    target = torch.randn(64, 16)
    assert sum(p.numel() for p in layer.parameters()) == 2048 + 25
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(tokens) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
