"""The margin of a classifier: one scalar field whose zero level set is the decision boundary.

For K logits f and a class j the margin is ``F^j = f_j - max_{i != j} f_i`` (Section 5.2):

    F^j > 0    the network says j, and no other class ties with it
    F^j = 0    a tie: the point lies on the decision boundary of class j
    F^j < 0    the network says something else

A tie counts as wrong everywhere in this package, so that no figure hangs on the order in which the
classes are numbered. Two logits are the case K = 2. A network with one logit f says 1 where f > 0
and 0 (or -1) where f < 0; its margin is +f for the label 1 and -f for the other one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "as_int64",
    "check_labels",
    "margin",
    "prediction",
    "rival",
    "targeted_margin",
    "two_logits",
]


def margin(logits: Tensor, labels: Tensor, *, check: bool = True) -> Tensor:
    """``F^j = f_j - max_{i != j} f_i`` of each row for j its label.

    Args:
        logits: (n, K) with K >= 2; or (n,) or (n, 1) for a binary network with one logit.
        labels: (n,) integers: 0 <= label < K; with one logit 0 and 1, or -1 and 1.
        check: whether to look for labels out of range. It makes a GPU wait; loops that have
            checked their labels once with :func:`check_labels` leave it out.

    Returns:
        (n,) in the dtype of the logits, differentiable. Where several classes tie for the largest
        of the others, the gradient is that of the one with the smallest number: a vertex of the
        subdifferential, so a descent step still moves away from one definite class. NaN logits give
        NaN, which is neither correct nor on the boundary.

    Raises:
        ValueError: shapes that do not belong together, or a label out of range.
    """
    logits, labels = _prepare(logits, labels, check)
    if logits.shape[1] == 1:
        return torch.where(labels > 0, logits[:, 0], -logits[:, 0])
    index = labels[:, None]
    others = logits.scatter(1, index, float("-inf"))
    # max(dim) and not amax: amax would split the gradient between classes that tie.
    return logits.gather(1, index)[:, 0] - others.max(1).values


def rival(logits: Tensor, labels: Tensor, *, check: bool = True) -> Tensor:
    """(n,) int64: the class with the largest logit among those that are not the row's label.

    Arguments as for :func:`margin`. Of classes that tie, the smallest number. With one logit it is
    the other label, 1 or 0.
    """
    logits, labels = _prepare(logits, labels, check)
    if logits.shape[1] == 1:
        return (labels <= 0).long()
    found = logits.detach().scatter(1, labels[:, None], float("-inf")).max(1).indices
    # Where the others are -inf, the label ties with them.
    return torch.where(found == labels, (labels == 0).long(), found)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """``f_j - f_t`` (n,): the margin against one class t per row alone; it is >= F^j.

    Args:
        logits: (n, K), K >= 2.
        labels, targets: (n,) int64, in range (not checked).
    """
    return (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0]


def prediction(logits: Tensor) -> Tensor:
    """(n,) int64: the class with the largest logit, the first of those that tie; for one logit,
    1 where it is positive and 0 elsewhere. Logits as for :func:`margin`."""
    logits = _in_rows(logits)
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.max(1).indices


def two_logits(logit: Tensor) -> Tensor:
    """One logit, (n,) or (n, 1), as the equivalent two (n, 2): (-f/2, f/2), whose margin is +-f and
    whose cross entropy is the binary one."""
    half = logit.reshape(-1, 1) / 2
    return torch.cat([-half, half], 1)


def check_labels(labels: Tensor, classes: int, name: str = "labels") -> None:
    """Raises ValueError unless every label is one of ``classes`` classes.

    Args:
        labels: (n,) integers.
        classes: K >= 2; or 1 for a binary network with one logit, whose labels are 0 and 1 or -1
            and 1.
        name: how the message calls the labels.
    """
    if labels.dim() != 1:
        raise ValueError(f"{name}: expected shape (n,), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, got {labels.dtype}")
    if labels.numel() == 0:
        return
    labels = as_int64(labels)
    low, high = (int(v) for v in torch.aminmax(labels))
    if classes == 1:
        both_conventions = low == -1 and bool((labels == 0).any())
        if low < -1 or high > 1 or both_conventions:
            raise ValueError(
                f"{name}: expected 0 and 1, or -1 and 1, for a network with one logit, got values "
                f"from {low} to {high}{', with both 0 and -1' if both_conventions else ''}"
            )
    elif low < 0 or high >= classes:
        raise ValueError(
            f"{name}: expected values in 0 ... {classes - 1} for {classes} classes, got values "
            f"from {low} to {high}"
        )


def as_int64(labels: Tensor) -> Tensor:
    """Integers as int64, since torch compares no wide unsigned ones. Those of uint64 that are too
    large become the largest, and not -1, which is a label."""
    wide = labels.to(torch.int64)
    if labels.dtype == torch.uint64:
        wide = torch.where(wide < 0, torch.iinfo(torch.int64).max, wide)
    return wide


def _prepare(logits: Tensor, labels: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    """Logits as (n, K) and labels as int64 on the same device, with the shapes checked."""
    logits = _in_rows(logits)
    if labels.dim() != 1 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels: expected shape (n,) = ({logits.shape[0]},), got {tuple(labels.shape)}"
        )
    if check:
        check_labels(labels, logits.shape[1])
    return logits, labels.to(logits.device, torch.int64)


def _in_rows(logits: Tensor) -> Tensor:
    if logits.dim() == 1:
        logits = logits[:, None]
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected shape (n, K) or (n,), got {tuple(logits.shape)}")
    return logits
