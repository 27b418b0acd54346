"""Which layers of a model can be compressed, and why the others cannot."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from hfh.compression import kinds
from hfh.compression.kinds import Kind
from hfh.compression.report import Row
from hfh_kernels.nn.layer import HFHLayer

Rule = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""What to skip: a pattern of names as of :mod:`fnmatch`, a class, or a function of name and module.

A rule that holds for a module holds for all within it.
"""


@dataclass(frozen=True)
class Candidate:
    """A layer that can be compressed."""

    name: str
    module: nn.Module
    kind: Kind
    weights: dict[str, nn.Parameter]
    """By the submodule of the hashed layer that is to have it, "" for the layer itself."""

    @property
    def size(self) -> int:
        """Elements of all weights."""
        return sum(weight.numel() for weight in self.weights.values())

    def refuse(self, reason: str) -> Row:
        """The row that says why it stays dense after all."""
        shapes = [tuple(weight.shape) for weight in self.weights.values()]
        return Row.of_skipped(
            self.name,
            type(self.module).__name__,
            shapes[0] if len(shapes) == 1 else (),
            self.size,
            reason,
        )


@dataclass(frozen=True)
class Selection:
    """The layers to compress, all with weights of one device, dtype and requires_grad."""

    candidates: list[Candidate]
    skipped: list[Row]
    order: dict[str, int]
    """Places of the names in the model."""


def select(model: nn.Module, skip: Iterable[Rule], min_size: int) -> Selection:
    """Walk the model; every layer with a matrix of weights is a candidate or a row that says why.

    Raises:
        TypeError: a rule is none of the three.
        ValueError: a pattern matches no module, or a parameter has no size yet.
    """
    names = _all_names(model)
    reasons = _skip_reasons(names, skip)
    for module, (name, *_) in names.items():
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"model has a lazy layer, {name}: run it once first")
    candidates: list[Candidate] = []
    skipped: list[Row] = []
    for found in _walk(model, names, reasons, min_size):
        if isinstance(found, Candidate):
            candidates.append(found)
        else:
            skipped.append(found)
    for refuse in (_split_by_place, _split_ties):
        candidates, refused = refuse(candidates, names)
        skipped += refused
    order = {name: index for index, (name, *_) in enumerate(names.values())}
    return Selection(candidates, skipped, order)


def _all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module once, with each name it has."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _skip_reasons(names: dict[nn.Module, list[str]], skip: Iterable[Rule]) -> dict[nn.Module, str]:
    """Modules that a rule holds for themselves."""
    reasons: dict[nn.Module, str] = {}
    for rule in skip:
        matches, reason = _rule(rule)
        matched = [
            module for module, own in names.items() if any(matches(name, module) for name in own)
        ]
        if isinstance(rule, str) and not matched:
            raise ValueError(f"skip has a pattern that matches no module: {rule!r}")
        for module in matched:
            reasons.setdefault(module, reason)
    return reasons


def _rule(rule: Rule) -> tuple[Callable[[str, nn.Module], bool], str]:
    if isinstance(rule, str):
        return lambda name, module: fnmatch.fnmatchcase(name, rule), f"skip={rule!r}"
    if isinstance(rule, type) and issubclass(rule, nn.Module):
        return lambda name, module: isinstance(module, rule), f"skip={rule.__name__}"
    if callable(rule) and not isinstance(rule, type):
        return rule, f"skip={getattr(rule, '__name__', 'a function')}"
    raise TypeError(
        "skip must hold patterns of names, subclasses of torch.nn.Module or functions of name and "
        f"module, received {rule!r}"
    )


def _walk(
    root: nn.Module, names: dict[nn.Module, list[str]], reasons: dict[nn.Module, str], min_size: int
) -> Iterator[Candidate | Row]:
    visited: set[nn.Module] = set()

    def visit(module: nn.Module, inherited: str | None) -> Iterator[Candidate | Row]:
        if module in visited:
            return
        visited.add(module)
        reason = inherited or reasons.get(module)
        kind = kinds.of_dense(module)
        if kind is None and not _is_quantised(module) and not isinstance(module, HFHLayer):
            yield from _own_matrices(names[module][0], module, reason)
            for child in module.children():
                yield from visit(child, reason)
            return
        # Such a layer is compressed whole or not at all: it reads its children's weights itself.
        visited.update(module.modules())
        reason = reason or next(
            (reasons[inner] for inner in module.modules() if inner in reasons), None
        )
        if kind is None:
            own = "quantised" if _is_quantised(module) else "hashed already"
            yield _row(names[module][0], module, reason or own)
            return
        reason = reason or _refusal(module, kind)
        if reason is not None:
            yield _row(names[module][0], module, reason)
            return
        weights = {
            place: kinds.attribute(module, path) for place, path in kind.weights(module).items()
        }
        candidate = Candidate(names[module][0], module, kind, weights)
        if candidate.size < min_size:
            reason = f"fewer weights than min_size={min_size}"
        else:
            reason = _refusal_of_weights(weights.values())
        yield candidate if reason is None else candidate.refuse(reason)

    return visit(root, None)


def _own_matrices(name: str, module: nn.Module, reason: str | None) -> Iterator[Row]:
    """A row for a module that itself holds a parameter of two or more dimensions."""
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        yield _row(name, module, reason or f"there is no hashed {type(module).__name__}")


def _row(name: str, module: nn.Module, reason: str) -> Row:
    shapes = [tuple(value.shape) for value in module.parameters() if value.dim() > 1]
    size = sum(value.numel() for value in module.parameters() if value.dim() > 1)
    shape = shapes[0] if len(shapes) == 1 else ()
    return Row.of_skipped(name, type(module).__name__, shape, size, reason)


def _is_quantised(module: nn.Module) -> bool:
    is_of_package = "quantized" in type(module).__module__.split(".")
    return is_of_package and (hasattr(module, "weight") or hasattr(module, "get_weight"))


def _refusal(module: nn.Module, kind: Kind) -> str | None:
    """Why a layer of this kind cannot be replaced; None where it can."""
    dense = f"torch.nn.{kind.dense.__name__}"
    if any(parametrize.is_parametrized(inner) for inner in module.modules()):
        return "a parameter is parametrised"
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(kind.dense, method, None):
            return f"{type(module).__name__} overrides {method} of {dense}"
        if method in vars(module):
            return f"its {method} has been replaced"
    weights = set(kind.weights(module).values())
    present = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if weights - present:
        return f"{min(weights - present)} is computed from other tensors"
    more = present - weights - set(kind.others(module).values())
    more |= {name for name, _ in module.named_buffers()}
    if more:
        return f"it holds {min(more)}, which {dense} does not"
    if any(getattr(inner, hooks, None) for inner in module.modules() for hooks in _HOOKS):
        return "it has hooks, which may read its weight"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"{option} needs stored rows"
    return None


def _refusal_of_weights(weights: Iterable[nn.Parameter]) -> str | None:
    places = set()
    for weight in weights:
        if type(weight) is not nn.Parameter:
            return f"its weight is a {type(weight).__name__}"
        if weight.layout != torch.strided:
            return f"its weight is of layout {weight.layout}"
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype}"
        if weight.numel() == 0:
            return "its weight is empty"
        places.add(_place(weight))
    return "its weights differ in device, dtype or requires_grad" if len(places) > 1 else None


def _place(weight: nn.Parameter) -> tuple[Any, ...]:
    """What all weights behind one pool have in common."""
    return (weight.device, weight.dtype, weight.requires_grad)


def _split_by_place(
    candidates: list[Candidate], names: dict[nn.Module, list[str]]
) -> tuple[list[Candidate], list[Row]]:
    """Keep the device, dtype and requires_grad that most weights have."""
    if not candidates:
        return [], []
    sizes: Counter[tuple[Any, ...]] = Counter()
    for candidate in candidates:
        sizes[_place_of(candidate)] += candidate.size
    chosen = sizes.most_common(1)[0][0]
    kept = [candidate for candidate in candidates if _place_of(candidate) == chosen]
    refused = []
    for candidate in candidates:
        place = _place_of(candidate)
        if place != chosen:
            words = ("on {}", "{}", "requires_grad={}")
            differing = ", ".join(
                word.format(own)
                for word, own, other in zip(words, place, chosen, strict=True)
                if own != other
            )
            refused.append(candidate.refuse(f"unlike most weights, its own is {differing}"))
    return kept, refused


def _place_of(candidate: Candidate) -> tuple[Any, ...]:
    return _place(next(iter(candidate.weights.values())))


def _split_ties(
    candidates: list[Candidate], names: dict[nn.Module, list[str]]
) -> tuple[list[Candidate], list[Row]]:
    """Refuse layers whose weight is also one that stays dense, until there is none."""
    uses: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in names:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(parameter, []).append((module, name))
    refused: list[Row] = []
    while True:
        virtual = {use for candidate in candidates for use in _uses_as_weight(candidate)}
        kept = []
        for candidate in candidates:
            others = (
                use
                for weight in candidate.weights.values()
                for use in uses[weight]
                if use not in virtual
            )
            other = next(others, None)
            if other is None:
                kept.append(candidate)
            else:
                module, name = other
                path = f"{names[module][0]}.{name}".lstrip(".")
                refused.append(candidate.refuse(f"its weight is also {path}, which stays dense"))
        if len(kept) == len(candidates):
            return kept, refused
        candidates = kept


def _uses_as_weight(candidate: Candidate) -> Iterator[tuple[nn.Module, str]]:
    for path in candidate.kind.weights(candidate.module).values():
        owner, _, name = path.rpartition(".")
        yield candidate.module.get_submodule(owner), name


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
