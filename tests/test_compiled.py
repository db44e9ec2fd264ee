"""Compiled fields against the modules they were made of, called layer by layer in float64."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

import levelset_ext as ls
from levelset_ext import _C
from levelset_ext.compiled import compiled_field
from levelset_ext.networks import MLP, ImplicitMLP, compiled_fields, fc1, fc2
from levelset_ext.result import LevelSetResult, Status

DTYPES = [torch.float64, torch.float32]


def close(found, expected, ulps=1e4):
    scale = expected.detach().abs().amax().clamp(min=1.0) if expected.numel() else 1.0
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.detach(), expected.detach(), rtol=0, atol=float(ulps * eps * scale)
    )


def points(n, d=3, dtype=torch.float64, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def with_weights(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (2 / p.shape[-1]) ** 0.5)
    return net


class SkipIn(nn.Module):
    """The input again half way, after the hidden units and divided by sqrt(2), as SDF networks do;
    named and built unlike anything in the package."""

    def __init__(self, norm):
        super().__init__()
        widths = [3, 17, 14, 17, 1]
        for k, (a, b) in enumerate(pairwise(widths)):
            setattr(self, f"lin{k}", norm(nn.Linear(a if k != 2 else 17, b)))
        self.act = nn.Softplus(beta=100)

    def forward(self, input):
        x = input
        for k in range(4):
            if k == 2:
                x = torch.cat([x, input], -1) / 2**0.5
            x = getattr(self, f"lin{k}")(x)
            if k < 3:
                x = self.act(x)
        return x


class Siren(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(2, 19), nn.Linear(19, 33), nn.Linear(33, 3)

    def forward(self, p):
        h = torch.sin(30 * self.stem(p))
        return self.head(torch.sin(self.body(h) * 30.0))[:, :2]


class ByHand(nn.Module):
    """Matrices instead of layers, the input first, a scalar output of shape (n,)."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.randn(4, 21))
        self.a = nn.Parameter(torch.randn(21))
        self.B = nn.Parameter(torch.randn(9, 25))
        self.C = nn.Parameter(torch.randn(1, 9))
        self.register_buffer("shift", torch.tensor([0.25]))

    def forward(self, x):
        h = functional.relu((2.0 * x) @ self.A + self.a)
        h = torch.tanh(functional.linear(torch.cat((x, h), dim=1), self.B))
        return (functional.linear(h, self.C) - self.shift).squeeze(-1) * 0.5


class Closing(nn.Module):
    """Ends with an activation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 40), nn.SiLU(), nn.Dropout(0.5), nn.Linear(40, 1))

    def forward(self, x):
        return self.net(x).tanh()


def plain(layer):
    return layer


NETWORKS = {
    "sequential": lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)),
    "linear": lambda: nn.Linear(3, 2),
    "skip": lambda: SkipIn(plain),
    "weight norm": lambda: SkipIn(parametrizations.weight_norm),
    "old weight norm": lambda: SkipIn(old_weight_norm),
    "siren": Siren,
    "by hand": ByHand,
    "closing": Closing,
    "no bias": lambda: nn.Sequential(nn.Linear(3, 31, bias=False), nn.Tanh(), nn.Linear(31, 1)),
    "two linear": lambda: nn.Sequential(
        nn.Linear(3, 5), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1)
    ),
    "five outputs": lambda: nn.Sequential(nn.Linear(6, 50), nn.Softplus(3.0), nn.Linear(50, 5)),
    "FC-1, two outputs": lambda: fc1(2),
    "FC-2": fc2,
    **{
        f"{activation}, skip {skip}": (
            lambda activation=activation, skip=skip: ImplicitMLP(
                3, 1, 33, 3, activation=activation, skip=skip, beta=6.0
            )
        )
        for activation in ("relu", "silu", "softplus")
        for skip in (False, True)
    },
    "waves": lambda: ImplicitMLP(3, 2, 33, 3, beta=6.0, frequencies=(2.0, 5.0)),
    "waves, skip": lambda: ImplicitMLP(3, 1, 33, 3, beta=6.0, skip=True, frequencies=(3.0,)),
}


def network(name, dtype=torch.float64):
    net = with_weights(NETWORKS[name]()).to(dtype)
    return net, MLP.from_module(net)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_jacobian_are_those_of_the_module(name, dtype):
    net, field = network(name, dtype)
    x = points(83, field.dimension, dtype)
    with compiled_fields(False):
        F, J = ls.value_and_jacobian(net.double(), x.double())
    net.to(dtype)
    found = field.evaluate(x)
    close(found.values, F.to(dtype))
    close(found.jacobian, J.to(dtype))
    close(field.values(x), F.to(dtype))
    with torch.no_grad():
        assert field(x).shape == net(x).shape
    values, jacobian = ls.value_and_jacobian(field, x)
    assert torch.equal(values, found.values)
    assert torch.equal(jacobian, found.jacobian)


@pytest.mark.parametrize("name", NETWORKS)
def test_projection_is_newtons_on_the_module(name):
    net, field = network(name)
    x = points(201, field.dimension)
    box = (-3.0, 2.5)
    with compiled_fields(False):
        level = ls.value_and_jacobian(net, 0.3 * x)[0][:5].mean(0)
        slow = ls.project(net, x, level, 3, 1e-9, max_step=0.5, box=box)
    for fn in (net, field):
        fast = ls.project(fn, x, level, 3, 1e-9, max_step=0.5, box=box)
        assert torch.equal(fast.status, slow.status)
        assert torch.equal(fast.iterations, slow.iterations)
        torch.testing.assert_close(fast.points, slow.points, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(fast.level, slow.level)
        close(fast.values, ls.value_and_jacobian(net, fast.points)[0])


def test_every_status():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():  # F = relu(x) + relu(y) - 1
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
        net[2].bias.fill_(-1.0)
    x = torch.tensor([[0.5, 0.5], [3.0, 3.0], [-1.0, -1.0], [torch.nan, 1.0], [torch.inf, 0.0]])
    r = ls.project(MLP.from_module(net), x.double(), max_iters=1)
    S = Status
    expected = [S.CONVERGED, S.CONVERGED, S.RANK_DEFICIENT, S.NON_FINITE, S.NON_FINITE]
    assert r.status.tolist() == expected
    assert r.iterations.tolist() == [0, 1, 0, 0, 0]
    r = ls.project(MLP.from_module(net), x.double()[:2], max_iters=0)
    assert r.status.tolist() == [S.CONVERGED, S.MAX_ITERATIONS]
    r = ls.project(MLP.from_module(net), x.double()[1:2], box=(2.9, 3.0), max_iters=5)
    assert r.status.tolist() == [S.STALLED]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_rows_beside_them_or_on_threads(dtype):
    _, field = network("silu, skip True", dtype)
    x = points(700, 3, dtype)
    x[13] = torch.nan
    together = ls.project(field, x, max_iters=6)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = ls.project(field, x, max_iters=6)
            for name in ("points", "values", "jacobian", "status", "iterations"):
                a, b = getattr(again, name), getattr(together, name)
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
            close(field.values(x).nan_to_num(), field.evaluate(x).values.nan_to_num(), 0)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 12, 14, 333, 699):
        alone = ls.project(field, x[i : i + 1], max_iters=6)
        assert torch.equal(alone.points[0], together.points[i])
        assert torch.equal(alone.jacobian[0], together.jacobian[i])


SCRIPT = """
import json, torch, levelset_ext as ls
from levelset_ext.networks import MLP, ImplicitMLP
torch.manual_seed(0)
x = torch.randn(97, 3)
errors = {}
for activation in ("relu", "silu", "softplus"):
    net = ImplicitMLP(3, 2, 45, 3, activation=activation, skip=True, beta=5.0)
    with torch.no_grad():
        r = MLP.from_module(net).evaluate(x)
    F, J = ls.value_and_jacobian(net.double(), x.double())
    loss = MLP.from_module(net.float())(x).square().sum()
    g = torch.autograd.grad(loss, net.hidden[1].weight)[0]
    h = torch.autograd.grad(net.double()(x.double()).square().sum(), net.hidden[1].weight)[0]
    relative = (g - h).abs().max() / h.abs().max()
    worst = max((r.values - F).abs().max(), (r.jacobian - J).abs().max(), relative)
    errors[activation] = float(worst)
print(json.dumps(errors))
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    env = {**os.environ, "LEVELSET_ISA": isa}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    errors = json.loads(run.stdout)
    assert len(errors) == 3
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_far_out(dtype):
    z = torch.cat([torch.linspace(-120, 120, 997), torch.tensor([0.0, 1e-30, 1e5, -1e5])]).to(dtype)
    for layer in (nn.ReLU(), nn.SiLU(), nn.Softplus(2.0), nn.Tanh()):
        net = nn.Sequential(nn.Linear(1, 1), layer, nn.Linear(1, 1)).to(dtype)
        with torch.no_grad():
            for linear in (net[0], net[2]):
                linear.weight.fill_(1.0)
                linear.bias.zero_()
        found = MLP.from_module(net).evaluate(z[:, None])
        F, J = ls.value_and_jacobian(net.double(), z[:, None].double())
        relative = 1e-13 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(found.values.double(), F, rtol=relative, atol=1e-30)
        # Slopes below 1e-36 are rounded to nothing or to the smallest exponential there is.
        torch.testing.assert_close(found.jacobian.double(), J, rtol=1e-5, atol=1e-6)


# --- gradients --------------------------------------------------------------------------------


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_from_the_tape_is_that_of_the_module(name):
    net, field = network(name)
    net.eval()
    x = points(150, field.dimension)
    projected = ls.project(field, x, 0.1, 4)
    still = ls.level_points(field, 0.5 * x[:70])
    both = LevelSetResult.cat([projected, still])
    both = both[both.usable]
    assert both.tape is not None
    assert len(both.tape) == len(both)
    target = points(len(both), field.dimension, seed=5)

    def loss(fn, result):
        moved = (ls.sample_network(fn, result) - target).square().sum(1).mean()
        return moved + fn(x).abs().mean()

    fast = gradients(loss(field, both), net)
    slow = gradients(loss(net, both), net)
    for f, s in zip(fast, slow, strict=True):
        assert (f - s).abs().max() <= 1e-10 * s.abs().max().clamp(min=1e-3), name


def test_gradient_of_a_loss_with_levels_and_cloud():
    net, field = network("silu, skip True")
    cloud = functional.normalize(points(60), dim=1)
    results = [ls.project(field, points(40), 0.0, 5), ls.level_points(field, points(30, seed=3))]
    losses = [
        ls.losses.reconstruction(fn, results, cloud, lam=2.0, p=2.0, min_slope=0.1).total
        for fn in (field, net)
    ]
    close(losses[0], losses[1])
    for f, s in zip(gradients(losses[0], net), gradients(losses[1], net), strict=True):
        close(f, s)


def test_rows_of_a_tape_in_any_order():
    net, field = network("weight norm")
    a, b = ls.level_points(field, points(20)), ls.level_points(field, points(15, seed=2))
    both = LevelSetResult.cat([a, b])
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))[:30]
    for rows in (order, order.sort().values, slice(5, 25, 3), both.values[:, 0] > 0, 7):
        some = both[rows]
        weight = torch.linspace(1, 2, len(some), dtype=torch.float64)[:, None]
        assert torch.equal(some.tape.values(), some.values)
        fast = gradients((some.tape.values() * weight).sum(), net)
        slow = gradients((net(some.points) * weight).sum(), net)
        for f, s in zip(fast, slow, strict=True):
            close(f, s)


@pytest.mark.parametrize("new_first", [True, False])
def test_a_tape_of_which_a_part_is_of_other_parameters_is_not_used(new_first):
    net, field = network("skip")
    old = ls.level_points(field, points(20))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    new = ls.level_points(field, points(15, seed=2))
    both = LevelSetResult.cat([new, old] if new_first else [old, new])
    weight = torch.linspace(1, 2, 35, dtype=torch.float64)[:, None]
    fast = gradients((ls.sample_network(field, both) * weight).sum(), net)
    slow = gradients((ls.sample_network(net, both) * weight).sum(), net)
    for f, s in zip(fast, slow, strict=True):
        close(f, s)


@pytest.mark.parametrize("how", ["in place", "data", "loaded"])
def test_a_changed_parameter_is_noticed(how):
    net, field = network("skip")
    x = points(30)
    before, result = field.values(x), ls.level_points(field, x)
    with torch.no_grad():
        if how == "in place":
            net.lin1.weight.mul_(1.5)
        elif how == "data":
            net.lin1.weight.data.mul_(1.5)  # does not count in the version of the parameter
        else:
            net.load_state_dict({k: v * 1.1 for k, v in net.state_dict().items()})
    assert not torch.equal(field.values(x), before)
    close(field.values(x), net(x).detach())
    close(ls.project(net, x, max_iters=0).values, net(x).detach())
    # The tape is of other parameters: the network is evaluated again.
    moved = ls.sample_network(field, result)
    assert torch.equal(moved, result.points)
    for f, s in zip(
        gradients(moved.sum(), net),
        gradients(ls.sample_network(net, result).sum(), net),
        strict=True,
    ):
        close(f, s)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradient_that_has_a_gradient_is_that_of_the_module(name):
    """A penalty on the gradient in theta, along p(theta) and along F itself."""
    net, field = network(name)
    net.eval()
    x = points(40, field.dimension)
    found = ls.project(field, x, 0.1, 4)[::2]
    found = found[found.usable]

    def loss(fn):
        p = ls.sample_network(fn, found)
        slopes = torch.autograd.grad(p.sin().sum() + fn(x).square().mean(), parameters, **twice)
        return p.square().sum() + sum(g.square().sum() for g in slopes if g is not None)

    parameters = list(net.parameters())
    twice = {"create_graph": True, "allow_unused": True}
    fast = torch.autograd.grad(loss(field), parameters, allow_unused=True)
    slow = torch.autograd.grad(loss(net), parameters, allow_unused=True)
    for f, s in zip(fast, slow, strict=True):
        f, s = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (f, s))
        assert (f - s).abs().max() <= 1e-9 * s.abs().max().clamp(min=1e-3), name


def test_a_second_derivative_beside_frozen_layers():
    net, field = network("skip")
    net.lin1.weight.requires_grad_(False)
    x = points(20)
    for fn, collected in ((field, fast := []), (net, slow := [])):
        (slope,) = torch.autograd.grad(fn(x).exp().sum(), net.lin0.bias, create_graph=True)
        collected += torch.autograd.grad(slope.square().sum(), [net.lin0.weight, net.lin2.bias])
    for f, s in zip(fast, slow, strict=True):
        close(f, s)


@pytest.mark.parametrize("how", ["assigned", "a layer", "converted"])
def test_what_is_put_in_the_place_of_a_parameter_is_followed(how):
    net = ImplicitMLP(3, 1, 16, 2, activation="silu", frequencies=(2.0,))
    field = MLP.from_module(net)
    x = points(9, dtype=torch.float32)
    close(field(x), net(x))
    if how == "assigned":
        net.load_state_dict({k: v * 1.3 for k, v in net.state_dict().items()}, assign=True)
    elif how == "a layer":
        net.last = nn.Linear(16, 1)
    else:
        net, x = net.double(), x.double()
    close(field(x), net(x))
    r = ls.project(field, x, 0.1)
    close(r.points, ls.project(net, x, 0.1).points)
    assert r.tape is not None
    close(field(x.clone().requires_grad_()), net(x))


FOLLOWED = {
    "another activation": lambda net: net.__setitem__(1, nn.Tanh()),
    "one more layer": lambda net: net.append(nn.Tanh()),
    "a number": lambda net: setattr(net[3], "beta", 50.0),
    "a hook": lambda net: net.register_forward_hook(lambda module, x, out: out + 0.1),
    "what is no perceptron": lambda net: net.insert(2, nn.LayerNorm(8).double()),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_what_a_kept_field_is_made_of_is_followed(how):
    net = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1)
    ).double()
    field, x = MLP.from_module(net), points(9)
    before = ls.level_points(field, x)
    FOLLOWED[how](net)
    assert not torch.allclose(field(x), before.values)
    close(field(x), net(x))
    close(ls.project(field, x).points, ls.project(net, x).points, 1e6)
    found, expected = (ls.value_and_jacobian(f, x) for f in (field, net))
    close(found[1], expected[1])
    # What was recorded before is of another network.
    for a, b in zip(
        gradients(ls.sample_network(field, before).sum(), net),
        gradients(ls.sample_network(net, before).sum(), net),
        strict=True,
    ):
        close(a, b, 1e6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_huge_numbers(dtype):
    net = nn.Sequential(nn.Linear(1, 1), nn.SiLU(), nn.Linear(1, 1)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.0 if parameter.dim() == 1 else 1.0)
    x = torch.tensor([-1e38, -1e35, -1e30, -1e3, -100.0, -80.0, 80.0, 1e30], dtype=dtype)[:, None]
    found = MLP.from_module(net).evaluate(x)
    with compiled_fields(False):
        values, jacobian = ls.value_and_jacobian(net, x)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(found.jacobian, jacobian, rtol=1e-5, atol=1e-30)


def test_a_tape_is_not_that_of_assigned_parameters():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    field = MLP.from_module(net)
    result = ls.project(field, points(9))
    net.load_state_dict({k: v * 1.3 for k, v in net.state_dict().items()}, assign=True)
    moved = ls.sample_network(field, result, frozen=True)
    close(moved, ls.sample_network(net, result, frozen=True), 1e6)
    moved.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_memory_that_is_being_read_is_not_packed_into():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    field = MLP.from_module(net)
    with field.packed() as pack:
        kept, where = pack.tensors[0].clone(), pack.tensors[0].data_ptr()
        with torch.no_grad():
            net[0].weight.mul_(2)
        with field.packed() as other:
            assert other.tensors[0].data_ptr() != where
            where = other.tensors[0].data_ptr()
        assert torch.equal(pack.tensors[0], kept)
    with torch.no_grad():
        net[0].weight.mul_(2)
    with field.packed() as third:
        assert third.tensors[0].data_ptr() == where  # nobody was at it


def test_a_gradient_with_a_graph_where_a_row_overflows():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[0].weight.mul_(30)
    field, x = MLP.from_module(net), points(5, dtype=torch.float32)
    x[2] = 3e38
    result = ls.level_points(field, x)
    assert result.status[2] == Status.NON_FINITE
    where = ls.sample_network(field, result)
    good = torch.arange(5) != 2
    found = torch.autograd.grad(where[good].sum(), list(net.parameters()), create_graph=True)
    expected = torch.autograd.grad(
        ls.sample_network(net, result[good]).sum(), list(net.parameters())
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_a_tape_inside_transforms_and_whole_graphs(fresh_compiler):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    field = MLP.from_module(net)
    result = ls.project(field, points(9))
    assert result.tape is not None

    def total(scale):
        return (ls.sample_network(field, result) * scale).sum()

    found = torch.func.grad(total)(torch.ones((), dtype=torch.float64))
    close(found, result.points.sum())
    compiled = torch.compile(total, backend="eager", fullgraph=True)
    close(compiled(torch.ones((), dtype=torch.float64)), result.points.sum())


def test_the_field_of_a_module_that_is_gone_goes_on():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    x, field = points(5), MLP.from_module(net)
    expected = net(x)
    del net
    close(field(x), expected)


@pytest.mark.parametrize("name", ["level", "box"])
def test_nothing_of_a_result_has_a_gradient(name):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    if name == "level":
        r = ls.project(net, points(5), torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    else:
        r = ls.project(net, points(5), box=(torch.full((3,), -4.0, requires_grad=True), 4.0))
    assert not any(t.requires_grad for t in (r.points, r.values, r.jacobian, r.level))
    ls.sample_network(net, r).sum().backward()


def test_a_bad_row_leaves_the_gradient_alone():
    net, field = network("skip")
    x = points(12)
    good = ls.sample_network(field, ls.level_points(field, x)).square().sum()
    bad = x.clone()
    bad = torch.cat([bad, torch.full((1, 3), torch.nan, dtype=torch.float64)])
    moved = ls.sample_network(field, ls.level_points(field, bad))
    for f, s in zip(gradients(moved[:12].square().sum(), net), gradients(good, net), strict=True):
        close(f, s)


def test_no_tape_without_gradients_and_none_for_a_module():
    net, field = network("sequential")
    with torch.no_grad():
        assert ls.project(field, points(5)).tape is None
    assert ls.project(net, points(5)).tape is None
    assert ls.project(field, points(5)).tape is not None


def test_points_that_require_a_gradient_go_through_the_module():
    net, field = network("skip")
    x = points(6).requires_grad_()
    (g,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    close(g.detach(), expected)
    assert g.requires_grad


def test_empty_batch():
    net, field = network("five outputs")
    r = ls.project(field, points(0, 6))
    assert r.points.shape == (0, 6)
    assert r.jacobian.shape == (0, 5, 6)
    assert all(
        torch.equal(g, torch.zeros_like(g)) for g in gradients(field(points(0, 6)).sum(), net)
    )


# --- mixed precision ---------------------------------------------------------------------------

mixed_only = pytest.mark.skipif(
    _C.mlp_mixed is None, reason="this processor has no bfloat16 products"
)


@mixed_only
@pytest.mark.parametrize("name", ["skip", "FC-2", "siren", "silu, skip True", "five outputs"])
def test_mixed_precision_ends_with_exact_numbers(name):
    net, exact = network(name, torch.float32)
    mixed = MLP.from_module(net, mixed=True)
    x = points(333, exact.dimension, torch.float32)
    x[7] = torch.nan
    level = exact.values(0.3 * x[:5]).mean(0)
    a, b = ls.project(exact, x, level, 12, 1e-4), ls.project(mixed, x, level, 12, 1e-4)
    good = b.status != Status.NON_FINITE
    assert int(good.sum()) == 332
    # What comes back is F and D_xF of the returned points, to the bit.
    here = exact.evaluate(b.points)
    assert torch.equal(here.values[good], b.values[good])
    assert torch.equal(here.jacobian[good], b.jacobian[good])
    assert (b.residual[b.converged] <= 1e-4).all()
    # Which rows arrive from afar is chance: the last digit of a start decides as well. Those that
    # only one of the two brings home are then as many for both, up to four standard deviations.
    both = a.converged & b.converged
    lost, won = int((a.converged & ~both).sum()), int((b.converged & ~both).sum())
    assert abs(lost - won) <= 4 * max(lost + won, 1) ** 0.5
    # From nearby all arrive, and about as soon. A wave of the sine network is 0.007 long, and its
    # values there are known to little more than the tolerance.
    near, share = (1e-4, 0.95) if name == "siren" else (3e-3, 1.0)
    nearby = a.points + near * points(333, exact.dimension, torch.float32, seed=5)
    a, b = (ls.project(field, nearby[a.converged], level, 12, 1e-4) for field in (exact, mixed))
    assert len(a) > 200
    for found in (a, b):
        assert found.converged.float().mean() >= share
    assert (b.iterations - a.iterations).float().mean() < 2


COARSE_STEP = """
import torch, levelset_ext as ls
from levelset_ext import _C
from levelset_ext.networks import MLP, ImplicitMLP
torch.manual_seed(0)
net = ImplicitMLP(3, 1, 77, 4, activation="softplus", skip=True, beta=5.0).requires_grad_(False)
x = torch.randn(131, 3)
step = lambda field: ls.project(field, x, 0.5, max_iters=1, tol=0.0).points - x
exact, coarse = step(MLP.from_module(net)), step(MLP.from_module(net, mixed=True))
print(_C.mlp_mixed, float(((exact - coarse).norm(dim=1) / exact.norm(dim=1)).median()))
"""


@pytest.mark.parametrize("isa", ["", "avx512", "avx2"])
def test_a_coarse_step_is_near_the_exact_one(isa):
    env = {**os.environ, "LEVELSET_ISA": isa}
    run = subprocess.run(
        [sys.executable, "-c", COARSE_STEP], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-500:]
    name, error = run.stdout.split()
    assert name in {"": ("amx", "avx512bf16", "None"), "avx512": ("avx512bf16", "None"),
                    "avx2": ("None",)}[isa]  # fmt: skip
    assert float(error) == 0 if name == "None" else 1e-3 < float(error) < 3e-2


@mixed_only
def test_mixed_precision_rows_are_independent_and_trainable():
    net, _ = network("silu, skip True", torch.float32)
    field = MLP.from_module(net, mixed=True)
    x = points(400, 3, torch.float32)
    together = ls.project(field, x, max_iters=6)
    for i in (0, 113, 399):
        assert torch.equal(
            ls.project(field, x[i : i + 1], max_iters=6).points[0], together.points[i]
        )
    target = points(400, 3, torch.float32, seed=4)

    def loss(fn):
        return (ls.sample_network(fn, together) - target).square().sum(1).mean()

    for f, s in zip(gradients(loss(field), net), gradients(loss(net), net), strict=True):
        assert (f - s).abs().max() <= 1e-4 * s.abs().max().clamp(min=1e-3)


@mixed_only
def test_mixed_precision_on_a_field_without_curvature():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():  # F = relu(x) - relu(-x) - 0.3 = x - 0.3
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
        net[2].bias.fill_(-0.3)
    field = MLP.from_module(net, mixed=True)
    x = torch.tensor([[0.9, 0.0], [-0.4, 2.0], [0.3, 1.0]])
    result = ls.project(field, x, max_iters=8)
    assert result.converged.all()
    torch.testing.assert_close(result.points[:, 0], torch.full((3,), 0.3))
    # No update to spend: nothing but exact evaluations.
    still = ls.project(field, x, max_iters=0)
    assert torch.equal(still.points, x)
    assert torch.equal(still.values, field.evaluate(x).values)


# --- what is not a perceptron -------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) if x.sum() > 0 else x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(h + torch.relu(self.b(h)))


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 1)

    def forward(self, x):
        return self.a(x * x)


class Adapted(nn.Linear):
    """A layer with an adapter that is 0 at first, as LoRA has it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Bounded(nn.ReLU):
    def forward(self, x):
        return super().forward(x).clamp(max=4.0)


class Named(nn.Module):
    """Every argument by its name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = functional.linear(input=x, weight=self.a.weight, bias=self.a.bias)
        return self.b(input=torch.tanh(input=h))


class NamedOdd(Named):
    def forward(self, x):
        return torch.matmul(self.a(x).relu(), other=self.b.weight.t())


def hooked():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    net[1].register_forward_hook(lambda module, args, out: out + 1)
    return net


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Branching, "cannot trace"),
        (Residual, "add"),
        (Product, "mul"),
        (hooked, "hooks"),
        (NamedOdd, "cannot be read"),
        (lambda: nn.Sequential(Adapted(3, 8), nn.Tanh(), Adapted(8, 1)), ""),
        (lambda: nn.Sequential(nn.Linear(3, 8), Bounded(), nn.Linear(8, 1)), "clamp"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), ""),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 1)), ""),
    ],
)
def test_other_modules_are_refused_with_a_reason_and_projected_as_they_are(make, why):
    net = make().double()
    with pytest.raises(ValueError, match="module: expected a multilayer perceptron") as error:
        MLP.from_module(net)
    assert why in str(error.value)
    if not isinstance(net[0] if isinstance(net, nn.Sequential) else None, nn.Conv1d):
        x = points(4)
        r = ls.project(net, x, max_iters=0)
        close(r.values, net.eval()(x).detach())


def test_a_layer_with_a_forward_of_its_own_is_not_taken_for_its_class():
    """At first it computes what its class does, so that no comparison would tell."""
    net = nn.Sequential(Adapted(3, 16), nn.Tanh(), Adapted(16, 1)).double()
    assert ls.project(net, points(9)).converged.any()
    with torch.no_grad():
        net[0].up.normal_()
        net[2].up.normal_()
    r = ls.project(net, points(9), max_iters=50)
    close(r.values, net(r.points))
    net = nn.Sequential(nn.Linear(3, 8), Bounded(), nn.Linear(8, 1)).double()
    far = 1e3 * points(9)
    close(ls.project(net, far, max_iters=0).values, net(far))
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    net[1].forward = torch.sin
    close(ls.project(net, far, max_iters=0).values, net(far))


def test_derivatives_of_more_than_eight_outputs_are_those_of_the_module():
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 9)), torch.randn(4, 3)
    field = MLP.from_module(net)
    found, expected = (ls.value_and_jacobian(f, x) for f in (field, net))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    found, expected = (torch.autograd.grad(f(x).sum(), net[0].weight)[0] for f in (field, net))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(field(x), net(x))


def test_arguments_by_name():
    net = Named().double()
    assert isinstance(compiled_field(net, points(4)), MLP)
    close(MLP.from_module(net)(points(9)), net(points(9)))


def test_what_a_trace_depends_on_is_watched():
    net = ImplicitMLP(3, 1, 16, 2, activation="silu", beta=2.0).double()
    x = points(9)
    close(ls.project(net, x, max_iters=0).values, net(x).detach())
    net.beta = 5.0
    close(ls.project(net, x, max_iters=0).values, net(x).detach())
    net.last = nn.Linear(16, 1).double()
    close(ls.project(net, x, max_iters=0).values, net(x).detach())
    handle = net.last.register_forward_hook(lambda module, args, out: out + 1)
    close(ls.project(net, x, max_iters=0).values, net(x).detach())
    handle.remove()
    close(ls.project(net, x, max_iters=0).values, net(x).detach())


def test_a_call_with_points_that_do_not_fit_decides_nothing_about_others():
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    with pytest.raises(RuntimeError):
        ls.project(net, torch.zeros(4, 5).double())
    assert isinstance(compiled_field(net, points(9)), MLP)
    assert compiled_field(net, points(9)) is compiled_field(net, points(2))
    assert compiled_field(net, torch.zeros(4, 5).double()) is None


def test_from_module_names_what_it_was_given():
    with pytest.raises(TypeError, match=r"module: expected an nn\.Module, got function"):
        MLP.from_module(lambda x: x)


def test_nothing_about_the_module_changes():
    net = SkipIn(old_weight_norm).double().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    attributes = {k: dict(m.__dict__) for k, m in net.named_modules()}
    ls.project(net, points(10))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    for k, m in net.named_modules():
        assert m.__dict__.keys() == attributes[k].keys()
