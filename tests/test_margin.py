"""The margin: values, ties, labels of every convention, gradients."""

from __future__ import annotations

import pytest
import torch

from levelset_ext.margin import margin, prediction, rival, targeted_margin, two_logits

LOGITS = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)


def test_values_of_three_classes() -> None:
    labels = torch.tensor([0, 2, 1])
    assert margin(LOGITS, labels).tolist() == [1.0, -6.0, 0.0]
    assert rival(LOGITS, labels).tolist() == [2, 1, 0]
    assert prediction(LOGITS).tolist() == [0, 1, 0]
    assert targeted_margin(LOGITS, labels, torch.tensor([1, 0, 2])).tolist() == [2.0, -1.0, 1.0]


def test_two_logits_and_one_logit_agree() -> None:
    logit = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    labels = torch.tensor([1, 1, 0])
    expected = [1.5, -0.5, 0.0]
    assert margin(logit, labels).tolist() == expected
    assert margin(logit[:, None], labels).tolist() == expected
    assert margin(two_logits(logit), labels).tolist() == expected
    assert margin(logit, torch.tensor([1, 1, -1])).tolist() == expected
    assert rival(logit, labels).tolist() == [0, 0, 1]
    assert prediction(logit).tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels(dtype: torch.dtype) -> None:
    assert margin(LOGITS, torch.tensor([0, 2, 1]).to(dtype)).tolist() == [1.0, -6.0, 0.0]
    assert margin(LOGITS[:, 0], torch.tensor([1, 0, 1]).to(dtype)).tolist() == [3.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"labels: expected values in 0 ... 2 .*got .* 0 to 3"):
        margin(LOGITS, torch.tensor([0, 3, 1]).to(dtype))


def test_the_largest_unsigned_labels_are_no_negative_ones() -> None:
    labels = torch.tensor([1, -1, 1]).view(torch.uint64)
    for logits in (LOGITS, LOGITS[:, 0]):
        with pytest.raises(ValueError, match=r"labels: expected .* got values from 1 to 9"):
            margin(logits, labels)


def test_cross_entropy_of_two_logits_is_the_binary_one() -> None:
    logit = torch.linspace(-5, 5, 11, dtype=torch.float64)
    labels = torch.arange(11) % 2
    binary = torch.nn.functional.binary_cross_entropy_with_logits(logit, labels.double())
    assert torch.allclose(torch.nn.functional.cross_entropy(two_logits(logit), labels), binary)


def test_gradient_and_second_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda f: margin(f, labels), logits)
    assert torch.autograd.gradgradcheck(lambda f: margin(f, labels).square(), logits)


def test_a_tie_has_the_gradient_of_one_class() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(logits, torch.tensor([0])).sum(), logits)
    assert gradient.tolist() == [[1.0, -1.0, 0.0, 0.0]]


def test_nan_is_not_a_margin() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")]])
    assert margin(logits, torch.tensor([0, 0])).isnan().all()


def test_no_rows() -> None:
    assert margin(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (LOGITS, torch.tensor([0, 1, 3]), r"labels: expected values in 0 ... 2 .*got .* 0 to 3"),
        (LOGITS, torch.tensor([0, 1, -1]), "labels: expected values in 0 ... 2"),
        (LOGITS, torch.tensor([0, 1]), r"labels: expected shape \(n,\) = \(3,\)"),
        (LOGITS, torch.tensor([0.0, 1.0, 2.0]), "labels: expected an integer dtype"),
        (LOGITS[:, 0], torch.tensor([0, 1, 2]), "network with one logit"),
        (LOGITS[:, 0], torch.tensor([0, 1, -1]), "both 0 and -1"),
        (LOGITS[None], torch.tensor([0]), r"logits: expected shape \(n, K\)"),
    ],
)
def test_bad_input(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        margin(logits, labels)


def test_the_rival_is_another_class_even_where_the_others_are_infinitely_small() -> None:
    logits = torch.tensor([[1.0, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, 1.0]])
    assert rival(logits, torch.tensor([0, 2])).tolist() == [1, 0]


def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits: expected shape \(n, K\)"):
        prediction(torch.zeros(3, 0))
