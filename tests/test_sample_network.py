"""p(theta): its value, its gradient (Eq. 8), Eq. 9, directions, rows that cannot move."""

import copy
import math

import problems
import pytest
import torch
from problems import same_bits
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacrev

import levelset_ext as ls

F64 = torch.float64
FIELDS = {
    "affine": (lambda: problems.Affine(1), 3),
    "two planes": (lambda: problems.Affine(2, 4), 4),
    "sphere": (problems.Sphere, 3),
    "torus": (problems.Torus, 3),
    "circle": (problems.Circle, 3),
    "three": (problems.Three, 5),
    "mlp": (lambda: problems.mlp(1, 3, 5), 3),
    "mlp 2": (lambda: problems.mlp(2, 4, 5), 4),
    "mlp 3": (lambda: problems.mlp(3, 6, 8), 6),
}


def found(name, n=5, **options):
    make, d = FIELDS[name]
    fn, x, level = make(), problems.points(n, d), 0.0
    if name.startswith("mlp"):  # a level that the network has, near where the points start
        x, level = 0.3 * x, fn(torch.zeros(1, d, dtype=F64))[0].detach()
    return fn, ls.project(fn, x, level, **({"tol": 1e-12, "max_iters": 100} | options))


def parameters_of(fn):
    return {name: p.detach() for name, p in fn.named_parameters()}


def velocity(fn, points):
    """D_theta p of Eq. 8 for every parameter, (n, d, *parameter), by jacrev and pinv."""
    theta = parameters_of(fn)

    def values(theta, x):
        return functional_call(fn, theta, (x[None],)).reshape(-1)

    result = {name: [] for name in theta}
    for x in points:
        inverse = torch.linalg.pinv(jacrev(values, argnums=1)(theta, x))
        for name, d_theta in jacrev(values, argnums=0)(theta, x).items():
            result[name].append(-torch.tensordot(inverse, d_theta, dims=1))
    return {name: torch.stack(rows) for name, rows in result.items()}


def sample_jacobian(fn, result, **options):
    """D_theta p as the sample network gives it, one backward for every coordinate."""
    params = dict(fn.named_parameters())
    p = ls.sample_network(fn, result, **options)
    rows = [
        torch.autograd.grad(out, list(params.values()), retain_graph=True, allow_unused=True)
        for out in p.flatten()
    ]
    return {
        name: torch.stack([torch.zeros_like(t) if row[k] is None else row[k] for row in rows]).view(
            *p.shape, *t.shape
        )
        for k, (name, t) in enumerate(params.items())
    }


# --- value ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", FIELDS)
def test_the_value_is_the_points_to_the_bit_at_any_theta(name, dtype):
    make, d = FIELDS[name]
    fn, x = make(), problems.points(20, d, dtype)
    if name.startswith("mlp"):
        fn.to(dtype)
    x[0] = -0.0
    for result in (ls.project(fn, x, 0.1, max_iters=3), ls.level_points(fn, x)):
        before = result.points.clone()
        p = ls.sample_network(fn, result)
        assert p.requires_grad
        assert p.dtype == dtype
        assert same_bits(p, before)
        with torch.no_grad():
            for parameter in fn.parameters():
                parameter.add_(0.05)
        assert same_bits(ls.sample_network(fn, result), before)
        assert same_bits(result.points, before)


def test_the_sign_of_zero_survives():
    fn = problems.Affine(1)
    for sign in (1.0, -1.0):
        r = ls.level_points(fn, torch.full((4, 3), sign * 0.0, dtype=F64))
        assert same_bits(ls.sample_network(fn, r), r.points)
        v = torch.ones(4, 3, dtype=F64)
        assert same_bits(ls.sample_network(fn, r, direction=-v), r.points)


def test_frozen_is_equation_9():
    fn, r = found("mlp 2", max_iters=2)
    assert not r.converged.all()
    # c = F(p), converged or not; the compiled field that found F(p) rounds in another order.
    torch.testing.assert_close(ls.sample_network(fn, r, frozen=True), r.points, rtol=0, atol=1e-14)
    with torch.no_grad():
        for parameter in fn.parameters():
            parameter.mul_(1.02)
    inverse = torch.linalg.pinv(r.jacobian)
    change = fn(r.points).detach() - r.values
    expected = r.points - (inverse @ change[:, :, None])[:, :, 0]
    torch.testing.assert_close(ls.sample_network(fn, r, frozen=True).detach(), expected)
    assert same_bits(ls.sample_network(fn, r), r.points)


@pytest.mark.parametrize("name", ["sphere", "circle", "mlp", "mlp 3"])
def test_frozen_follows_the_level_set_to_first_order(name):
    fn, r = found(name, 5)
    r = r[r.converged]
    assert len(r) > 2
    start = {k: v.clone() for k, v in parameters_of(fn).items()}
    direction = {k: torch.randn_like(v) for k, v in start.items()}
    misses = []
    for size in (1e-2, 1e-3, 1e-4):
        fn.load_state_dict({k: start[k] + size * direction[k] for k in start})
        moved = ls.sample_network(fn, r, frozen=True)
        misses.append((fn(moved).reshape(len(r), -1) - r.values).abs().max().item())
    assert misses[1] < misses[0] / 50  # quadratic: a factor of 100 each time
    assert misses[2] < misses[1] / 50


# --- gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"frozen": True}])
@pytest.mark.parametrize("name", FIELDS)
def test_the_gradient_is_equation_8(name, options):
    fn, r = found(name)
    got, expected = sample_jacobian(fn, r, **options), velocity(fn, r.points)
    for parameter in expected:
        torch.testing.assert_close(got[parameter], expected[parameter], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["two planes", "circle", "three", "mlp", "mlp 2"])
def test_rows_that_did_not_converge_have_the_gradient_of_their_own_level(name):
    fn, r = found(name, max_iters=1, max_step=0.05)
    assert not r.converged.any()
    got, expected = sample_jacobian(fn, r), velocity(fn, r.points)
    for parameter in expected:
        torch.testing.assert_close(got[parameter], expected[parameter], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["sphere", "circle", "three", "mlp", "mlp 2", "mlp 3"])
def test_the_gradient_is_the_velocity_of_the_level_set(name):
    """Moving theta and projecting again moves the point, in the normal space, as Eq. 8 says."""
    fn, r = found(name, 4)
    r = r[r.converged]
    got = sample_jacobian(fn, r)
    normal = torch.linalg.pinv(r.jacobian) @ r.jacobian  # projector onto the row space of J
    start = {k: v.clone() for k, v in parameters_of(fn).items()}
    step = 1e-5
    for parameter in start:
        flat = got[parameter].reshape(*r.points.shape, -1)
        for k in {0, flat.shape[2] - 1}:
            ends = []
            for sign in (1, -1):
                theta = {key: v.clone() for key, v in start.items()}
                theta[parameter].view(-1)[k] += sign * step
                fn.load_state_dict(theta)
                again = ls.project(fn, r.points, r.values, tol=1e-14, max_iters=20)
                assert again.residual.max() < 1e-12
                ends.append(again.points)
            difference = (ends[0] - ends[1]) / (2 * step)
            across = (normal @ difference[:, :, None])[:, :, 0]
            torch.testing.assert_close(flat[:, :, k], across, rtol=1e-5, atol=1e-6)
    fn.load_state_dict(start)


@pytest.mark.parametrize("name", FIELDS)
def test_lemma_2_the_velocity_lies_in_the_normal_space(name):
    fn, r = found(name)
    tangent = torch.eye(r.points.shape[1], dtype=F64) - torch.linalg.pinv(r.jacobian) @ r.jacobian
    for part in sample_jacobian(fn, r).values():
        part = part.reshape(*r.points.shape, -1)
        assert (tangent @ part).abs().max() < 1e-9 * (1 + part.abs().max())


def test_the_radius_of_a_sphere_moves_its_points_outwards():
    fn, r = found("sphere")
    got = sample_jacobian(fn, r)
    unit = r.points / r.points.norm(dim=1, keepdim=True)
    torch.testing.assert_close(got["radius"], unit)
    torch.testing.assert_close(got["centre"], unit[:, :, None] * unit[:, None])


def test_images_move_as_equation_8_says():
    fn = problems.Classifier(2)
    r = ls.project(fn, problems.points(3, 784).view(3, 1, 28, 28), tol=1e-10)
    p = ls.sample_network(fn, r)
    assert p.shape == (3, 1, 28, 28)
    (got,) = torch.autograd.grad(p[0, 0, 3, 4], fn.linear.bias)
    normal = (fn.linear.weight[0] - fn.linear.weight[1]).detach()
    expected = -normal[3 * 28 + 4] / normal.square().sum()
    torch.testing.assert_close(got, torch.stack([expected, -expected]))


@pytest.mark.parametrize("options", [{}, {"frozen": True}])
@pytest.mark.parametrize("name", ["circle", "three", "mlp", "mlp 2"])
def test_second_derivatives_are_those_of_equation_9_with_j_held(name, options):
    fn, r = found(name, 3)
    theta = [p.detach().clone().requires_grad_() for p in fn.parameters()]
    keys = list(parameters_of(fn))

    def p_of(*theta, form):
        field = lambda x: functional_call(fn, dict(zip(keys, theta, strict=True)), (x,))  # noqa: E731
        if form == "equation 9":
            change = field(r.points).reshape(r.values.shape) - r.values
            return r.points - (torch.linalg.pinv(r.jacobian) @ change[:, :, None])[:, :, 0]
        return ls.sample_network(field, r, **options)

    def second(form):
        loss = p_of(*theta, form=form).sin().sum()
        grads = torch.autograd.grad(loss, theta, create_graph=True)
        return torch.autograd.grad(sum(g.cos().sum() for g in grads), theta)

    for a, b in zip(second("sample network"), second("equation 9"), strict=True):
        torch.testing.assert_close(a, b)
    if options:  # finite differences need the value to move
        assert gradcheck(lambda *t: p_of(*t, form="ours"), theta)
        assert gradgradcheck(lambda *t: p_of(*t, form="ours"), theta)


def test_a_network_without_a_double_backward():
    fn = problems.OnceDifferentiable()
    r = ls.project(fn, problems.points(5), tol=1e-10)
    got, expected = sample_jacobian(fn, r), velocity(_smooth_twin(fn), r.points)
    for a, b in zip(got.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b)
    loss = ls.sample_network(fn, r).square().sum()
    grads = torch.autograd.grad(loss, list(fn.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        grads[0].sum().backward()


def _smooth_twin(fn):
    return torch.nn.Sequential(fn.first, torch.nn.Tanh(), fn.last)


# --- along a direction ----------------------------------------------------------------------------


def test_a_ray_on_a_sphere_has_the_analytic_derivative():
    fn = problems.Sphere(0.7)
    origin = torch.tensor([[0.2, 0.1, -2.0], [-0.3, 0.3, -1.5], [0.0, 0.0, -1.0]], dtype=F64)
    ray = torch.tensor([[0.0, 0.0, 1.0], [0.1, 0.0, 1.0], [0.0, 0.2, 1.0]], dtype=F64)
    ray = ray / ray.norm(dim=1, keepdim=True)

    def hit(radius, centre):
        o = origin - centre
        along = (o * ray).sum(1)
        return origin + ray * (-along - (along**2 - o.square().sum(1) + radius**2).sqrt())[:, None]

    r = ls.level_points(fn, hit(fn.radius.detach(), fn.centre.detach()))
    radius, centre = torch.autograd.functional.jacobian(
        hit, (fn.radius.detach(), fn.centre.detach())
    )
    for v in (ray, -3.0 * ray):  # neither the sign nor the length of v matters
        got = sample_jacobian(fn, r, direction=v)
        torch.testing.assert_close(got["radius"], radius)
        torch.testing.assert_close(got["centre"], centre)
    assert same_bits(ls.sample_network(fn, r, direction=ray), r.points)
    with torch.no_grad():
        fn.radius.add_(1e-4)
    moved = ls.sample_network(fn, r, direction=ray, frozen=True)
    torch.testing.assert_close(moved, hit(fn.radius, fn.centre).detach(), rtol=0, atol=1e-7)


def test_the_gradient_as_direction_is_the_default():
    fn, r = found("mlp")
    plain, along = sample_jacobian(fn, r), sample_jacobian(fn, r, direction=r.jacobian[:, 0])
    for name in plain:
        torch.testing.assert_close(plain[name], along[name])


def test_rows_with_a_tangent_zero_or_nan_direction_stay():
    fn, r = found("sphere", 5)
    v = r.points.clone()
    v[1] = torch.linalg.cross(r.points[1], torch.ones(3, dtype=F64))
    v[2] = 0.0
    v[3, 0] = math.nan
    got = sample_jacobian(fn, r, direction=v)["radius"]
    assert not got[[1, 2, 3]].any()
    assert got[[0, 4]].all()
    assert same_bits(ls.sample_network(fn, r, direction=v), r.points)


def test_direction_keeps_the_shape_of_events():
    fn = problems.Classifier(2)
    r = ls.project(fn, problems.points(3, 784).view(3, 1, 28, 28))
    p = ls.sample_network(fn, r, direction=torch.ones(3, 1, 28, 28))
    assert same_bits(p, r.points)
    p.sum().backward()
    assert fn.linear.bias.grad.any()


# --- rows that cannot move ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"direction": True}])
@pytest.mark.parametrize("wrap", [False, True])
def test_bad_rows_do_not_poison_the_parameters(wrap, options):
    net = problems.mlp()
    x = problems.points(8)
    x[0], x[3, 1] = math.nan, math.inf
    good = [1, 2, 4, 5, 6, 7]
    r = ls.project(net, x)
    seen = problems.RowCounter(net)
    fn = seen if wrap else net
    options = dict(options)
    if options.pop("direction", None):
        options["direction"] = torch.ones_like(x)
    p = ls.sample_network(fn, r, **options)
    torch.testing.assert_close(p.detach(), r.points, rtol=0, atol=1e-12, equal_nan=True)
    assert options.get("frozen") or same_bits(p, r.points)
    got = torch.autograd.grad(
        p[good].sin().sum() + p.nan_to_num(0, 0, 0).sum(), list(net.parameters())
    )
    if "direction" in options:
        options["direction"] = options["direction"][good]
    p = ls.sample_network(net, r[good], **options)
    expected = torch.autograd.grad(p.sin().sum() + p.sum(), list(net.parameters()))
    torch.testing.assert_close(got, expected)
    assert all(batch.isfinite().all() for batch in seen.batches)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("case", ["empty", "nan", "flat"])
def test_a_batch_without_a_usable_row_has_gradient_zero(case, wrap):
    net = problems.batch_norm_net()
    x = problems.points(0 if case == "empty" else 4)
    r = ls.level_points(net, x)
    if case == "nan":
        r.points.fill_(math.nan)
    if case == "flat":
        r.jacobian.zero_()
    p = ls.sample_network((lambda y: net.eval()(y)) if wrap else net, r)
    assert same_bits(p, r.points)
    p.nan_to_num().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_rank_deficient_rows_stay():
    fn = problems.Quadric()
    x = problems.points(4)
    x[2] = 0.0
    r = ls.project(fn, x)
    assert r.status[2] == ls.Status.RANK_DEFICIENT
    got = sample_jacobian(fn, r)["radius"]
    assert not got[2].any()
    assert got[[0, 1, 3]].any(1).all()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["points", "values", "jacobian"])
def test_a_constant_that_asks_for_a_gradient_is_refused(name):
    fn, r = found("mlp")
    tensors = {k: getattr(r, k) for k in ("points", "values", "jacobian", "level", "status")}
    tensors[name] = tensors[name].clone().requires_grad_()
    wrong = ls.LevelSetResult(**tensors, iterations=r.iterations)
    with pytest.raises(RuntimeError, match=rf"^result.{name}: expected a constant"):
        ls.sample_network(fn, wrong)


def test_refusals():
    fn, r = found("mlp")
    v = torch.ones_like(r.points)
    with pytest.raises(RuntimeError, match=r"^direction: expected a constant"):
        ls.sample_network(fn, r, direction=v.clone().requires_grad_())
    with pytest.raises(
        ValueError, match=r"^direction: expected the shape of result.points, \(5, 3\)"
    ):
        ls.sample_network(fn, r, direction=v[0])
    with pytest.raises(TypeError, match=r"^network: expected an nn.Module, got MLP"):
        # A compiled field is no module, and its parameters would be nobody's.
        ls.SampleNetwork(ls.networks.MLP.from_module(problems.mlp()))
    with pytest.raises(TypeError, match=r"^fn: expected a module or a callable"):
        ls.sample_network(None, r)
    two, other = found("circle")
    with pytest.raises(
        ValueError, match=r"^direction: expected a network with l = 1 output, got l = 2"
    ):
        ls.sample_network(two, other, direction=other.points)
    for frozen in (True, False):
        with pytest.raises(
            ValueError, match=r"^fn: expected the l = 1 outputs of result.values, got 2"
        ):
            ls.sample_network(problems.mlp(2), r, frozen=frozen)


def test_a_network_without_a_gradient_is_refused_where_one_is_expected():
    fn, r = found("mlp")
    frozen = copy.deepcopy(fn).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"^fn: .*all parameters frozen"):
        ls.sample_network(frozen, r)
    with pytest.raises(RuntimeError, match=r"^fn: expected an output with a gradient"):
        ls.sample_network(lambda x: fn(x).detach(), r)
    with torch.no_grad():
        assert same_bits(ls.sample_network(frozen, r), r.points)
        assert not ls.sample_network(fn, r).requires_grad
    # One trainable parameter is enough.
    frozen[0].bias.requires_grad_(True)
    ls.sample_network(frozen, r).sum().backward()
    assert frozen[0].bias.grad.any()
    assert frozen[0].weight.grad is None


def test_gradients_reach_parameters_once_and_only_when_asked():
    fn, r = found("mlp")
    p = ls.sample_network(fn, r)
    assert all(parameter.grad is None for parameter in fn.parameters())
    p.sum().backward()
    first = [parameter.grad.clone() for parameter in fn.parameters()]
    ls.sample_network(fn, r).sum().backward()
    for parameter, gradient in zip(fn.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
