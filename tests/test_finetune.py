from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hfh.fitting.finetune import distillation_loss, finetune, parameter_groups
from hfh_kernels.nn import HFHLinear
from tests.models import make_model

cross_entropy = functional.cross_entropy


pytestmark = pytest.mark.usefixtures("one_thread")


class Batches:
    """Of a task that a linear model solves, in an order from torch's generator."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(96, 12, generator=generator)
        self.targets = self.inputs[:, :5].argmax(dim=1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(96).split(32):
            yield self.inputs[batch], self.targets[batch]


def make_teacher() -> nn.Module:
    """Nearly sure of the right classes."""
    teacher = nn.Linear(12, 5, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(5 * torch.eye(5, 12))
    return teacher


def first_layer(model: nn.Sequential) -> HFHLinear:
    layer = model[0]
    assert isinstance(layer, HFHLinear)
    return layer


@pytest.mark.parametrize("teacher_weight", [None, 0.5, 1.0])
def test_learns(teacher_weight: float | None) -> None:
    model, batches = make_model(), Batches()
    options: dict[str, Any] = {"pool_learning_rate": 0.1, "learning_rate": 3e-3}
    if teacher_weight is not None:
        options |= {"teacher": make_teacher(), "teacher_weight": teacher_weight}
    losses = finetune(model, batches, cross_entropy, 60, **options)
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    accuracy = (model(batches.inputs).argmax(dim=1) == batches.targets).double().mean()
    assert accuracy > 0.6


def test_the_seed_decides_everything() -> None:
    def trained(seed: int, state_before: int) -> tuple[list[float], dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(make_model(), nn.Dropout(0.5))
        torch.manual_seed(state_before)
        before = torch.get_rng_state()
        losses = finetune(model, Batches(), cross_entropy, 5, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return losses, {name: p.detach() for name, p in model.named_parameters()}

    losses, parameters = trained(1, 3)
    again, same = trained(1, 4)
    assert losses == again
    assert all(torch.equal(parameters[name], same[name]) for name in parameters)
    assert trained(2, 3)[0] != losses


def test_pools_have_their_own_learning_rate() -> None:
    model = make_model()
    layer = first_layer(model)
    pools, others = parameter_groups(model, 0.5, 0.25)
    assert [p is layer.pool.weight for p in pools["params"]] == [True]
    assert len(others["params"]) == len(list(model.parameters())) - 1
    assert (pools["lr"], others["lr"]) == (0.5, 0.25)

    before = copy.deepcopy(model.state_dict())
    finetune(model, Batches(), cross_entropy, 3, pool_learning_rate=0.0)
    assert torch.equal(layer.pool.weight, before["0.pool.weight"])
    assert not torch.equal(layer.theta, before["0.theta"])


def test_frozen_parameters_stay() -> None:
    model = make_model()
    theta = first_layer(model).theta.requires_grad_(False)
    before = theta.clone()
    finetune(model, Batches(), cross_entropy, 3)
    assert torch.equal(theta, before)


@pytest.mark.parametrize("was_training", [True, False])
def test_modes_come_back_and_the_teacher_stays(was_training: bool) -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(self.training)
            return input

    model = nn.Sequential(make_model(), Spy()).train(was_training)
    teacher = nn.Sequential(make_teacher(), Spy()).train(was_training)
    model[0].eval()
    before = copy.deepcopy(teacher.state_dict())
    finetune(model, Batches(), cross_entropy, 2, teacher=teacher)
    assert seen == [True, False] * 2
    assert [model.training, model[0].training, teacher.training] == [
        was_training, False, was_training,
    ]  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_distillation_loss() -> None:
    """The definition, summed over classes one by one."""
    logits, taught = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    temperature = 2.5
    student = (logits / temperature).softmax(-1)
    teacher = (taught / temperature).softmax(-1)
    expected = temperature**2 * (teacher * (teacher / student).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(logits, taught, temperature), expected)
    assert distillation_loss(taught + 1, taught, temperature).item() == pytest.approx(0, abs=1e-6)


def test_batches_may_end_once_the_steps_are_done() -> None:
    two = iter(list(Batches())[:2])
    assert len(finetune(make_model(), two, cross_entropy, 2)) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.0}, TypeError, "steps must be an int"),
        ({"pool_learning_rate": -1.0}, ValueError, "pool_learning_rate .*-1.0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate .*nan"),
        ({"teacher_weight": 1.5}, ValueError, "teacher_weight .*1.5"),
        ({"temperature": 0.0}, ValueError, "temperature .*0.0"),
        ({"batches": []}, ValueError, "steps=7, received only 0"),
        ({"batches": iter(list(Batches())[:2])}, ValueError, "steps=7, received only 2"),
        ({"teacher": nn.Linear(12, 4)}, ValueError, "shape of teacher_logits"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"batches": Batches(), "steps": 7, "teacher": make_teacher(), **changes}
    model = make_model().eval()
    with pytest.raises(error, match=message):
        finetune(model, loss=cross_entropy, **arguments)
    assert not model.training
