"""Curvature of level sets {F = c} from first and second derivatives of F.

With g = D_xF, n = g / |g| and T (d - 1, d) an orthonormal basis of the tangent space, the shape
operator is the derivative of n along the surface (Goldman, "Curvature formulas for implicit curves
and surfaces", CAGD 2005):

    S = T H T^T / |g|,    H the Hessian of F

Its eigenvalues are the principal curvatures, a (d - 1)-th of its trace the mean curvature, its
determinant the Gaussian curvature. S takes d - 1 products of H with a vector, not H itself.

Signs: curvature is positive where the surface bends away from n, the side where F grows. For an F
that is negative inside, a sphere of radius r has mean curvature +1/r and div n = (d - 1)/r. -F has
the opposite principal and mean curvatures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from levelset_ext.field import Field, as_field, check_points, evaluate

__all__ = ["Curvature", "curvature", "curvature_penalty"]

KINDS = ("total", "mean", "gaussian")


@dataclass(frozen=True, eq=False)
class Curvature:
    """Curvature at n points in d dimensions. Rows without a gradient or not finite are NaN.

    Attributes:
        mean: (n,), the mean of the principal curvatures.
        gaussian: (n,), their product (Gauss-Kronecker for d > 3; for d = 2 the curvature itself).
        principal: (n, d - 1), descending.
        directions: (n, d - 1, d), the unit tangents that belong to them; where two principal
            curvatures are equal, any pair of that plane. Constants.
        normals: (n, d), D_xF / |D_xF|.
        shape: (n, d - 1, d - 1), S in an orthonormal tangent basis of no special orientation.
    """

    mean: Tensor
    gaussian: Tensor
    principal: Tensor
    directions: Tensor
    normals: Tensor
    shape: Tensor


def curvature(fn: Field, points: Tensor, *, create_graph: bool = False) -> Curvature:
    """Curvature, at each point, of the level set of F that passes through it.

    A piecewise linear network (ReLU) has H = 0 almost everywhere, and so curvature 0: its level
    sets bend only at creases, which a derivative at a point does not see. Use a smooth activation.

    Args:
        fn: module or callable (n, d) -> (n,) or (n, 1), twice differentiable. A module runs as its
            eval-mode clone, which shares its parameters.
        points: (n, d), d >= 2, floating point; on the level set of interest, as from
            :func:`levelset_ext.project`.
        create_graph: keep the graph, for a loss: ``mean``, ``gaussian``, ``principal``, ``normals``
            and ``shape`` follow the parameters, and the points if they ask for a gradient (a sample
            p(theta) does). The gradient of ``principal`` is not finite where two are equal; the
            others are smooth there.

    Returns:
        :class:`Curvature`, detached unless ``create_graph``.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    points = check_points("points", points)
    if points.dim() != 2 or points.shape[1] < 2:
        raise ValueError(f"points: expected (n, d) with d >= 2, got {tuple(points.shape)}")
    with torch.inference_mode(False), torch.enable_grad():
        normals, tangents, shape = _shape_operator(as_field(fn), points, create_graph)
        if not create_graph:
            normals, tangents, shape = normals.detach(), tangents.detach(), shape.detach()
        trace = shape.diagonal(dim1=1, dim2=2).sum(1)
        principal, inner = _eigen(shape)
        return Curvature(
            mean=trace / shape.shape[1],
            gaussian=_determinant(shape),
            principal=principal,
            directions=(inner.mT @ tangents.detach()),
            normals=normals,
            shape=shape,
        )


def curvature_penalty(
    fn: Field, points: Tensor, kind: str = "total", *, limit: float | None = None
) -> Tensor:
    """The mean over the points of a measure of bending, to be added to a loss.

    Differentiable in the parameters of ``fn``, and in the points if they ask for a gradient. Third
    derivatives of F with respect to x and theta enter; it costs about 3 d evaluations of F.

    Args:
        fn, points: as for :func:`curvature`.
        kind: "total" is the sum of the squared principal curvatures, |S|^2, which only planes
            make 0; "mean" is the squared mean curvature, which minimal surfaces make 0 too;
            "gaussian" is |K|, which cylinders and cones make 0 too.
        limit: most a single point counts, so that a crease does not outweigh everything; None for
            no limit. Points at the limit have no gradient.

    Returns:
        A scalar >= 0. Points where the curvature is not finite count as 0; no points give 0.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: expected a number > 0, got {limit!r}")
    points = check_points("points", points)
    if points.dim() != 2 or points.shape[1] < 2:
        raise ValueError(f"points: expected (n, d) with d >= 2, got {tuple(points.shape)}")
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        # Bad rows leave before anything is computed with them: 0 x NaN is NaN in a backward pass.
        count = max(points.shape[0], 1)
        points = points[torch.isfinite(points).all(1)]
        field = as_field(fn)
        if gradients:  # also where F has no second derivative
            still = points.detach()
            _, _, shape = _shape_operator(field, still, create_graph=False)
            points = points[torch.isfinite(shape).flatten(1).all(1)]
        _, _, shape = _shape_operator(field, points, create_graph=gradients)
        shape = shape[torch.isfinite(shape).flatten(1).all(1)]
        if kind == "total":
            each = shape.square().sum((1, 2))
        elif kind == "mean":
            each = (shape.diagonal(dim1=1, dim2=2).sum(1) / shape.shape[1]).square()
        else:
            each = _determinant(shape).abs()
        if limit is not None:
            each = each.clamp(max=limit)
        penalty = each.sum() / count
        return penalty if gradients else penalty.detach()


def _shape_operator(
    field: Field, points: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normals (n, d), tangents (n, d - 1, d) and S (n, d - 1, d - 1)."""
    n, d = points.shape
    follows = create_graph and points.requires_grad
    x = points if follows else points.detach().clone().requires_grad_()
    if n == 0:
        return x, x.new_zeros(0, d - 1, d), x.new_zeros(0, d - 1, d - 1)
    values = evaluate(field, x)
    if values.shape[1] != 1:
        raise ValueError(f"fn: expected one output, (n,) or (n, 1), got {tuple(values.shape)}")
    if not values.requires_grad:
        raise ValueError(
            "fn: expected an output that depends on x through differentiable operations, got one "
            "without a graph (a detach(), a no_grad() or a non-torch function inside?)"
        )
    gradient = _derivative(values.sum(), x, None, True)
    length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    good = (length > 0) & torch.isfinite(length)
    # A stand-in keeps the backward pass of the other rows free of NaN.
    stand_in = torch.zeros_like(gradient)
    stand_in[:, 0] = 1.0
    safe = torch.where(good, gradient, stand_in)
    length = torch.linalg.vector_norm(safe, dim=1, keepdim=True)
    normals = safe / length
    tangents = _tangents(normals if create_graph else normals.detach())
    rows = [
        _derivative(gradient, x, tangents[:, k], create_graph, last=k == d - 2)
        for k in range(d - 1)
    ]
    products = torch.stack(rows, 1)  # T H, (n, d - 1, d)
    shape = (products[:, :, None, :] * tangents[:, None, :, :]).sum(3) / length[:, :, None]
    shape = (shape + shape.mT) / 2
    nan = torch.full((), torch.nan, dtype=x.dtype, device=x.device)
    shape = torch.where(good[:, :, None], shape, nan)
    return torch.where(good, normals, nan), tangents, shape


def _derivative(
    output: Tensor, x: Tensor, weight: Tensor | None, create_graph: bool, last: bool = False
) -> Tensor:
    """d(weight . output)/dx; zeros where there is no dependence, as for a ReLU network's H."""
    if not output.requires_grad:
        return torch.zeros_like(x)
    (row,) = torch.autograd.grad(
        output,
        x,
        weight,
        create_graph=create_graph,
        retain_graph=create_graph or not last,
        allow_unused=True,
    )
    return torch.zeros_like(x) if row is None else row


def _tangents(normals: Tensor) -> Tensor:
    """Orthonormal bases (n, d - 1, d) of the planes across unit normals (n, d).

    The Householder reflection that takes n to an axis takes the other axes to such a basis. It is
    part of the graph: when n turns, its tangents turn with it.
    """
    d = normals.shape[1]
    sign = torch.where(normals[:, :1] < 0, -1.0, 1.0).to(normals)
    axis = torch.zeros_like(normals[0])
    axis[0] = 1.0
    v = normals + sign * axis
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    others = torch.eye(d, dtype=normals.dtype, device=normals.device)[1:]
    return others - 2 * v[:, 1:, None] * v[:, None, :]


def _determinant(shape: Tensor) -> Tensor:
    """Written out up to 2 x 2: the gradient of torch's is not defined for singular matrices."""
    if shape.shape[1] == 1:
        return shape[:, 0, 0]
    if shape.shape[1] == 2:
        return shape[:, 0, 0] * shape[:, 1, 1] - shape[:, 0, 1] * shape[:, 1, 0]
    return torch.linalg.det(shape)


def _eigen(shape: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and constant eigenvectors in columns. Rows of NaN stay NaN."""
    if shape.shape[1] == 1:
        along = torch.ones_like(shape).masked_fill(~torch.isfinite(shape), torch.nan)
        return shape[:, :, 0], along.detach()
    bad = ~torch.isfinite(shape).flatten(1).all(1)[:, None]
    finite = torch.where(bad[:, :, None], 0.0, shape)
    values, vectors = torch.linalg.eigh(finite.detach())
    if shape.requires_grad:
        values = torch.linalg.eigvalsh(finite)
    nan = torch.full((), torch.nan, dtype=shape.dtype, device=shape.device)
    vectors = torch.where(bad[:, :, None], nan, vectors).flip(2)
    return torch.where(bad, nan, values).flip(1), vectors
