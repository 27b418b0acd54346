"""``compress``: any model to one ratio, its layers hashed from one pool."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hfh.compression import defaults, fast_path, kinds
from hfh.compression.candidates import Candidate, Rule, Selection, select
from hfh.compression.defaults import Window
from hfh.compression.report import Report, Row
from hfh_kernels.nn import Pool
from hfh_kernels.nn.layer import HFHLayer
from hfh_kernels.spec import Reconstruction, require_int

TOLERANCE = 0.02
"""How far the ratio may be from the one asked for, relative to it."""

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def compress(
    model: ModuleType,
    ratio: float = 1 / 16,
    *,
    skip: Rule | Iterable[Rule] = (),
    min_size: int = defaults.MIN_SIZE,
    num_hashes: int = defaults.NUM_HASHES,
    depth: int = defaults.DEPTH,
    width: int = defaults.WIDTH,
    activation: str = defaults.ACTIVATION,
    block: int = defaults.BLOCK,
    window: int | Literal["auto"] | None = "auto",
    rows_per_window: int | None = None,
    init: Literal["scratch", "fit"] = "scratch",
    seed: int | torch.Generator | None = None,
    inplace: bool = False,
    importance: Mapping[nn.Module, Tensor] | None = None,
    fit_options: Mapping[str, Any] | None = None,
) -> tuple[ModuleType, Report]:
    """A model of ``ratio`` times the parameters: its weights are hashed from one pool.

    Linear, Conv1d, Conv2d, Embedding, EmbeddingBag, LSTM, GRU and MultiheadAttention become their
    counterparts of :mod:`hfh_kernels.nn` and :mod:`hfh`, under the same names. Everything that
    stays as it is counts: biases, norms, layers that cannot be compressed, and g of every layer.
    The pool has the size that is left. Biases keep their values; ties among weights, the training
    mode, device and dtype stay.

    A layer stays dense, with its reason in the report, where ``skip`` says so, where it is small,
    and where a hashed one could not stand in for it: a subclass with its own forward, a
    parametrised, quantised, complex or integer weight, hooks on the layer itself, sparse
    gradients, max_norm, weights of another device, dtype or requires_grad than most, or a weight
    that a dense layer has too. What cannot be seen from outside is code that reads ``weight`` of
    a layer instead of calling it: skip that layer.

    Args:
        model: left as it is, unless ``inplace``.
        ratio: parameters after / before, between 0 and 1.
        skip: layers to leave: patterns of module names as of :mod:`fnmatch` ("head", "*.norm*"),
            classes, or functions of name and module; one or several. What holds for a module holds
            for all within it.
        min_size: weights that a layer must have to be compressed.
        num_hashes, depth, width, activation: of every layer, see
            :class:`hfh_kernels.nn.HFHLinear`.
        block: the longest; a layer whose rows are shorter takes the largest power of two in them.
        window: pool elements that a group of rows draws from; None for the whole pool. "auto" is
            the whole pool where it fits the shared memory of a GPU, and what fits it elsewhere:
            :mod:`hfh.compression.defaults` says why.
        rows_per_window: rows in such a group; by default from the network, see the same place.
        init: "scratch" for a random network, whose weights have the root mean square of those they
            replace; "fit" for virtual weights close to the model's own, by :func:`hfh.fit`.
        seed: of the pool and every g: an int, or a generator to draw it from; by default torch's
            own random numbers.
        inplace: change ``model`` itself instead of a copy.
        importance: for init="fit", second moments of the inputs of layers of ``model``, as
            :func:`hfh.second_moments` measures them.
        fit_options: other keyword arguments of :func:`hfh.fit`: progress, checkpoint ...

    Returns:
        The model and a report: a row a layer, and totals.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; importance is of another model; no layer can be
            compressed; no pool meets the ratio within 2%, with the smallest one that can be met; or
            the model cannot be copied.
    """
    _check(model, ratio, min_size, init, inplace)
    if init != "fit" and (importance or fit_options):
        raise ValueError(f"importance and fit_options go with init='fit', received init={init!r}")
    strangers = set(importance or ()) - set(model.modules())
    if strangers:
        raise ValueError(f"importance must be of layers of model, received {strangers.pop()}")
    reconstruction = Reconstruction(depth, width, activation)
    rules = list(skip) if isinstance(skip, Iterable) and not isinstance(skip, str) else [skip]
    selection = select(model, rules, min_size)
    if not selection.candidates:
        rows = "; ".join(f"{row.name}: {row.skipped}" for row in selection.skipped[:5])
        raise ValueError(f"model has no layer that can be compressed ({rows or 'no weights'})")
    weights = {
        weight: None for candidate in selection.candidates for weight in candidate.weights.values()
    }
    blocks = [defaults.layer_block(block, _cols(weight)) for weight in weights]
    dense_parameters = sum(parameter.numel() for parameter in model.parameters())
    kept = dense_parameters - sum(weight.numel() for weight in weights)
    kept += len(weights) * reconstruction.num_parameters(num_hashes)
    pool_size = _pool_size(ratio, dense_parameters, kept, max(blocks), selection.skipped)
    dtype = next(iter(weights)).dtype
    chosen = _window(window, rows_per_window, weights, pool_size, dtype)
    hash_arguments = {
        "num_hashes": num_hashes,
        "depth": depth,
        "width": width,
        "activation": activation,
        **chosen._asdict(),
    }
    with _random_numbers(seed):
        builder = _Builder(pool_size, next(iter(weights)), block, hash_arguments)
        replacements = {
            candidate.module: builder.replacement(candidate) for candidate in selection.candidates
        }
    fitted = None
    if init == "fit":
        fitted = builder.fit(selection.candidates, importance or {}, fit_options or {})
    report = Report(
        rows=_rows(selection, replacements),
        dense_parameters=dense_parameters,
        compressed_parameters=kept + pool_size,
        pool_size=pool_size,
        window=chosen.window,
        rows_per_window=chosen.rows_per_window,
        ratio_asked=ratio,
        fit=fitted,
    )
    return _replaced(model, replacements, inplace), report


def _check(
    model: object,
    ratio: object,
    min_size: object,
    init: object,
    inplace: bool,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, received {type(model).__name__}")
    if not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a number, received {ratio!r}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be between 0 and 1, received {ratio}")
    require_int("min_size", min_size, 0, 2**63)
    if init not in ("scratch", "fit"):
        raise ValueError(f"init must be 'scratch' or 'fit', received {init!r}")
    if inplace and kinds.of_dense(model) is not None:
        raise ValueError("inplace must be False for a model that is itself the layer to replace")


def _cols(weight: Tensor) -> int:
    return weight.numel() // len(weight)


def _pool_size(
    ratio: float, dense_parameters: int, kept: int, block: int, skipped: Iterable[Row]
) -> int:
    """The multiple of block that comes closest to the ratio."""
    budget = ratio * dense_parameters
    pool_size = max(1, round((budget - kept) / block)) * block
    if abs(kept + pool_size - budget) > TOLERANCE * budget:
        nearest, smallest = ((kept + size) / dense_parameters for size in (pool_size, block))
        largest = max(skipped, key=lambda row: row.dense_parameters, default=None)
        example = "" if largest is None else f", such as {largest.name!r}: {largest.skipped}"
        raise ValueError(
            f"ratio must be one that a pool can meet within {TOLERANCE:.0%}, received {ratio:.5g}: "
            f"the nearest is {nearest:.5g} and the smallest {smallest:.5g}, as {kept:,} of "
            f"{dense_parameters:,} parameters are not the pool's (biases, norms, every g, layers "
            f"left dense{example}) and a pool is a multiple of block={block}"
        )
    require_int("ratio times the parameters", pool_size, 1, 2**31 - 1)
    return pool_size


def _window(
    window: int | str | None,
    rows_per_window: int | None,
    weights: Iterable[Tensor],
    pool_size: int,
    dtype: torch.dtype,
) -> Window:
    size = defaults.window_size(pool_size, dtype) if window == "auto" else window
    if size is None:
        if rows_per_window is not None:
            raise ValueError(
                f"rows_per_window must be None without a window, received {rows_per_window}"
            )
        return Window(None, None)
    if not isinstance(size, int):
        raise TypeError(f"window must be an int, None or 'auto', received {window!r}")
    require_int("window", size, 1, pool_size)
    if rows_per_window is None:
        rows = [len(weight) for weight in weights]
        rows_per_window = defaults.rows_per_window(rows, pool_size, size)
    return Window(size, rows_per_window)


@contextmanager
def _random_numbers(seed: int | torch.Generator | None) -> Iterator[None]:
    """Torch's random numbers on the CPU from this seed; unchanged after it."""
    if seed is None:
        yield
        return
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    require_int("seed", seed, 0, 2**64 - 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class _Builder:
    """Makes hashed layers over one pool, one g for each weight of the model."""

    def __init__(
        self, pool_size: int, like: nn.Parameter, block: int, hash_arguments: dict[str, Any]
    ) -> None:
        self.layers: dict[nn.Parameter, HFHLayer] = {}
        self.block = block
        self.hash_arguments = hash_arguments
        # Drawn on the CPU, so that a seed means the same on every device.
        self.pool = Pool(pool_size, dtype=like.dtype, device="cpu").to(like.device)
        self.pool.requires_grad_(like.requires_grad)

    def replacement(self, candidate: Candidate) -> nn.Module:
        """The hashed counterpart, with the other parameters of the layer itself."""
        module, kind = candidate.module, candidate.kind
        block = self.block
        if "" in candidate.weights:
            block = defaults.layer_block(block, _cols(candidate.weights[""]))
        hashed = kind.hashed(
            **kind.arguments(module),
            pool=self.pool,
            block=block,
            device="cpu",
            dtype=self.pool.weight.dtype,
            **self.hash_arguments,
        )
        for place, path in kind.others(module).items():
            kinds.set_attribute(hashed, place, kinds.attribute(module, path))
        for place, weight in candidate.weights.items():
            layer = hashed.get_submodule(place)
            assert isinstance(layer, HFHLayer)
            self._take_place_of(weight, layer)
        return hashed.train(module.training)

    def _take_place_of(self, weight: nn.Parameter, layer: HFHLayer) -> None:
        """Share all that makes up the weight with the layer that stands for it already, if any."""
        other = self.layers.setdefault(weight, layer)
        if other is layer:
            theta = layer.theta.detach().to(weight.device)
            layer.theta = nn.Parameter(theta, weight.requires_grad)
            layer.scale = _scale(weight) or layer.scale
        else:
            layer.theta, layer.hash_spec = other.theta, other.hash_spec
            layer.scale = other.scale

    def fit(
        self,
        candidates: Iterable[Candidate],
        importance: Mapping[nn.Module, Tensor],
        options: Mapping[str, Any],
    ) -> Any:
        """Fit the layers to the weights they stand for; those of a tied one count once."""
        from hfh.fitting.fit import fit

        names: dict[HFHLayer, str] = {}
        moments: dict[HFHLayer, Tensor] = {}
        for candidate in candidates:
            for place, weight in candidate.weights.items():
                layer = self.layers[weight]
                names.setdefault(layer, _path(candidate, place))
                if place == "" and candidate.module in importance:
                    moments.setdefault(layer, importance[candidate.module])
        matrices = {layer: weight.detach().flatten(1) for weight, layer in self.layers.items()}
        return fit(matrices, importance=moments, names=names, **options)


def _path(candidate: Candidate, place: str) -> str:
    """Of a submodule of the layer that takes the candidate's place."""
    return ".".join(part for part in (candidate.name, place) if part)


def _scale(weight: Tensor) -> float | None:
    """The root mean square; None where it is no scale: zeros, no data, or not finite."""
    if weight.is_meta:
        return None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight.detach(), dtype=dtype)
    scale = norm.item() / weight.numel() ** 0.5
    return scale if 0 < scale < float("inf") else None


def _rows(selection: Selection, replacements: Mapping[nn.Module, nn.Module]) -> list[Row]:
    """In the order of the model."""
    rows = [(selection.order[row.name], row) for row in selection.skipped]
    counted: set[nn.Parameter] = set()
    for candidate in selection.candidates:
        for place, weight in candidate.weights.items():
            layer = replacements[candidate.module].get_submodule(place)
            assert isinstance(layer, HFHLayer)
            row = Row.of_layer(
                _path(candidate, place),
                type(candidate.module).__name__,
                layer,
                tuple(weight.shape),
                is_tied=weight in counted,
            )
            counted.add(weight)
            rows.append((selection.order[candidate.name], row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _replaced(
    model: ModuleType, replacements: Mapping[nn.Module, nn.Module], inplace: bool
) -> ModuleType:
    if inplace:
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module in replacements:
                kinds.set_attribute(model, name, replacements[module])
    else:
        # The parameters that replacements share with the model are copied, ties among them kept;
        # the weights they replace are not.
        copies: dict[int, Any] = {}
        for module, hashed in replacements.items():
            _copy_others(module, hashed, copies)
        copies.update((id(module), hashed) for module, hashed in replacements.items())
        try:
            model = copy.deepcopy(model, copies)
        except RuntimeError as error:
            raise ValueError(
                f"inplace must be True for a model without deepcopy: {error}"
            ) from error
    fast_path.disable(model)
    return model


def _copy_others(module: nn.Module, hashed: nn.Module, copies: dict[int, Any]) -> None:
    kind = kinds.of_dense(module)
    assert kind is not None
    for place in kind.others(module):
        kinds.set_attribute(hashed, place, copy.deepcopy(kinds.attribute(hashed, place), copies))
