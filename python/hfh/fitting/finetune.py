"""Training a compressed model: plainly, or distilled from the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfh.progress import progress_bar
from hfh_kernels.nn import Pool
from hfh_kernels.spec import require_int


def finetune(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    steps: int,
    *,
    pool_learning_rate: float = 0.01,
    learning_rate: float = 3e-4,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    teacher_weight: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train a model in place for some steps of Adam, its learning rates falling along a cosine.

    With a teacher, the loss is (1 - teacher_weight) loss + teacher_weight
    :func:`distillation_loss`: the output of both models must be logits [..., classes].

    Args:
        model: with hashed layers; each :class:`hfh_kernels.nn.Pool` gets a learning rate of its
            own, as its elements are of size 1 and each layer scales them down to its weights.
        batches: of (input, target), gone through again and again. Their order is theirs to choose;
            where they draw it from torch's generator, seed decides it.
        loss: of the model's output and a target, a 0-d tensor.
        steps: at least 1.
        pool_learning_rate: the defaults suited fitted networks in bench/fit.py; from scratch,
            thirty times as much did.
        learning_rate: of all other parameters.
        teacher: the dense model to distil from, unchanged; None to train plainly.
        temperature: that both models' logits are divided by.
        teacher_weight: 0 to 1.
        seed: of torch's generators, whose state is restored in the end.
        progress: show progress on standard error.

    Returns:
        The loss at each step.

    Raises:
        TypeError: steps is not an int.
        ValueError: a number is out of range, or batches run out and cannot be gone through again.
    """
    require_int("steps", steps, 1, 2**31)
    for name, number, low, high in (
        ("pool_learning_rate", pool_learning_rate, 0, math.inf),
        ("learning_rate", learning_rate, 0, math.inf),
        ("teacher_weight", teacher_weight, 0, 1),
    ):
        if not low <= number <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], received {number}")
    optimizer = torch.optim.Adam(
        parameter_groups(model, pool_learning_rate, learning_rate), lr=learning_rate
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    modes = [(module, module.training) for module in _modules(model, teacher)]
    losses: list[float] = []
    try:
        model.train()
        if teacher is not None:
            teacher.eval()
        with torch.random.fork_rng(), progress_bar("training", steps, progress) as show:
            torch.manual_seed(seed)
            for input, target in _repeated(batches, steps):
                output = model(input)
                value = loss(output, target)
                if teacher is not None:
                    with torch.no_grad():
                        taught = teacher(input)
                    value = torch.lerp(
                        value, distillation_loss(output, taught, temperature), teacher_weight
                    )
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                losses.append(value.item())
                show(len(losses), f"loss {losses[-1]:.4f}")
    finally:
        for module, was_training in modes:
            module.training = was_training
    return losses


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(model / T)), mean over all but the last dimension.

    The factor keeps gradients comparable across temperatures T (Hinton, Vinyals and Dean, 2015,
    arXiv 1503.02531).

    Args:
        logits, teacher_logits: [..., classes]
        temperature: > 0.

    Raises:
        ValueError: the shapes differ, or temperature is out of range.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits must have the shape of teacher_logits, {list(teacher_logits.shape)}, "
            f"received {list(logits.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be greater than 0, received {temperature}")
    divergence = functional.kl_div(
        (logits / temperature).log_softmax(dim=-1).flatten(0, -2),
        (teacher_logits / temperature).log_softmax(dim=-1).flatten(0, -2),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def parameter_groups(
    model: nn.Module, pool_learning_rate: float, learning_rate: float
) -> list[dict[str, Any]]:
    """For an optimiser: the pools' parameters, and all others that require a gradient."""
    pools = {module.weight for module in model.modules() if isinstance(module, Pool)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p in pools], "lr": pool_learning_rate},
        {"params": [p for p in trained if p not in pools], "lr": learning_rate},
    ]


def _modules(model: nn.Module, teacher: nn.Module | None) -> Iterator[nn.Module]:
    yield from model.modules()
    if teacher is not None:
        yield from teacher.modules()


def _repeated(batches: Iterable[tuple[Any, Any]], count: int) -> Iterator[tuple[Any, Any]]:
    """The first ``count`` batches, starting over at the end."""
    num_seen = 0
    while num_seen < count:
        num_before = num_seen
        for batch in batches:
            yield batch
            num_seen += 1
            if num_seen == count:
                return
        if num_seen == num_before:
            raise ValueError(f"batches must last for steps={count}, received only {num_seen}")
