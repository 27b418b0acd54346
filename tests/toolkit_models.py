"""Whole models of the shapes that users have, small enough to train in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 one where shapes change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(input)).relu()))
        output: Tensor = (hidden + self.shortcut(input)).relu()
        return output


class ResNet18(nn.Module):
    """ResNet-18 (He et al., arXiv 1512.03385) with an eighth of its channels."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        widths = (8, 8, 16, 32, 64)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    ResidualBlock(widths[stage], widths[stage + 1], 1 + (stage > 0)),
                    ResidualBlock(widths[stage + 1], widths[stage + 1], 1),
                )
                for stage in range(4)
            )
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))
        return output


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, and the embedding's table again as output projection."""

    def __init__(self, num_tokens: int = 200, size: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, size)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.lstm = nn.LSTM(size, size, num_layers=2, batch_first=True)
        self.output = nn.Linear(size, num_tokens)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.lstm(self.embedding(tokens))[0])
        return logits


class TransformerClassifier(nn.Module):
    """torch.nn's transformer encoder over an embedding, a class a token."""

    def __init__(self, num_tokens: int = 100, size: int = 32, num_classes: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, size, padding_idx=0)
        layer = nn.TransformerEncoderLayer(size, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(size, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        output: Tensor = self.head(hidden)
        return output


class DLRM(nn.Module):
    """Deep learning recommendation model (arXiv 1906.00091): tables, dot products, two MLPs."""

    def __init__(self, num_tables: int = 26, size: int = 16) -> None:
        super().__init__()
        self.rows = [3 * 2 ** (table % 10) for table in range(num_tables)]
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, size, mode="sum") for rows in self.rows)
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, size), nn.ReLU())
        num_pairs = (num_tables + 1) * num_tables // 2
        self.top = nn.Sequential(nn.Linear(size + num_pairs, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, features: Tensor, indices: Tensor) -> Tensor:
        dense = self.bottom(features)
        bags = [
            table(indices[:, i] % rows)
            for i, (table, rows) in enumerate(zip(self.tables, self.rows, strict=True))
        ]
        vectors = torch.stack([dense, *bags], dim=1)
        products = vectors @ vectors.mT
        rows, cols = torch.tril_indices(len(bags) + 1, len(bags) + 1, offset=-1)
        output: Tensor = self.top(torch.cat((dense, products[:, rows, cols]), dim=1))
        return output


class Sample(NamedTuple):
    """A model, what goes in, the classes that should come out, and a ratio it can meet."""

    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    targets: Tensor
    ratio: float

    def loss(self, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(*self.inputs).flatten(0, -2), self.targets)


def samples() -> dict[str, Sample]:
    generator = torch.Generator().manual_seed(0)

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    tokens = ints(100, 4, 9)
    tokens[1, 6:] = 0
    return {
        "resnet18": Sample(
            ResNet18, (torch.randn(8, 3, 16, 16, generator=generator),), ints(10, 8), 1 / 8
        ),
        "lstm": Sample(LanguageModel, (ints(200, 4, 12),), ints(200, 48), 1 / 8),
        "transformer": Sample(TransformerClassifier, (tokens,), ints(8, 36), 1 / 8),
        "dlrm": Sample(
            DLRM,
            (torch.randn(16, 13, generator=generator), ints(2**16, 16, 26, 3)),
            ints(2, 16),
            1 / 8,
        ),
    }


SAMPLES = samples()
