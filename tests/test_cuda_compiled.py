"""Compiled fields on a CUDA device against the modules they were made of, in float64."""

import math

import pytest
import torch
from test_compiled import NETWORKS, SkipIn, close, points, with_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import levelset_ext as ls
from levelset_ext import _C
from levelset_ext.networks import MLP, ImplicitMLP, compiled_fields, fc1, fc2
from levelset_ext.result import Status

pytestmark = pytest.mark.cuda

LARGE = {
    "FC-1": lambda: fc1(1),
    "128 x 4": lambda: ImplicitMLP(3, 1, 128, 4, activation="softplus", beta=100.0),
    "FC-2": fc2,
    "256 x 3": lambda: ImplicitMLP(3, 2, 256, 3, activation="relu", skip=True),
}
FUSED = {**NETWORKS, **LARGE}
UNFIT = {"five outputs"}  # l = 5


def network(name, device="cuda"):
    net = with_weights(FUSED[name]()).to(device)
    return net, MLP.from_module(net)


def exact(net, x):
    """F and D_xF in float64 on the CPU."""
    import copy

    with torch.no_grad():
        net(x)  # the old weight norm then holds a leaf, which can be copied
    with compiled_fields(False):
        return ls.value_and_jacobian(copy.deepcopy(net).cpu().double(), x.cpu().double())


@pytest.mark.parametrize("name", sorted(set(FUSED) - UNFIT))
def test_values_and_jacobian_are_those_of_the_module(name):
    net, field = network(name)
    x = points(333, field.dimension, torch.float32).cuda()
    assert field.takes(x)
    F, J = exact(net, x)
    found = field.evaluate(x)
    close(found.values.cpu(), F.float())
    close(found.jacobian.cpu(), J.float())
    assert torch.equal(field.values(x), found.values)
    with torch.no_grad():
        assert field(x).shape == net(x).shape


@pytest.mark.parametrize("name", sorted(set(FUSED) - UNFIT))
def test_projection_is_newtons_on_the_module(name):
    net, field = network(name)
    x = points(1500, field.dimension, torch.float32).cuda()
    # A wave of the siren is 0.007 long: the last digit of a start decides where a few steps lead.
    steps = 1 if name == "siren" else 5
    options = {"max_iters": steps, "tol": 1e-4, "max_step": 0.5, "box": (-3.0, 2.5)}
    with compiled_fields(False):
        level = field.values(0.3 * x[:5]).mean(0)
        slow = ls.project(net, x, level, **options)
    fast = ls.project(net, x, level, **options)
    assert torch.equal(fast.points, ls.project(field, x, level, **options).points)
    alike = (fast.status == slow.status) & (fast.points - slow.points).abs().amax(1).le(1e-3)
    # A rounding at a kink of ReLU, or at the tolerance, sends a few rows another way.
    assert alike.float().mean() > 0.97
    torch.testing.assert_close(fast.level, slow.level)
    F, J = exact(net, fast.points)
    close(fast.values.cpu(), F.float())
    close(fast.jacobian.cpu(), J.float())
    assert (fast.residual[fast.converged] <= 1e-4).all()


class Launched(TorchDispatchMode):
    """The names of the project's own ops that are called within it."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "levelset_ext":
            self.names.append(str(func.overloadpacket).removeprefix("levelset_ext."))
        return func(*args, **(kwargs or {}))


def test_the_kernel_is_what_runs_and_not_something_that_agrees_with_it():
    net = ImplicitMLP(3, 1, 128, 4).cuda()
    x = points(100, 3, torch.float32).cuda()
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    room = _C.mlp_cuda_room(index)
    assert room >= MLP.from_module(net)._cuda_plan[1]
    assert room <= getattr(properties, "shared_memory_per_multiprocessor", room)
    with Launched() as launched:
        ls.project(net, x, max_iters=3)
    assert launched.names.count("mlp_project") == 1
    assert set(launched.names) <= {"mlp_pack_", "mlp_project", "mlp_values"}
    with compiled_fields(False), Launched() as launched:
        ls.project(net, x, max_iters=3)
    assert set(launched.names) == {"newton_update_"}


def test_packed_parameters_that_begin_between_two_vectors_are_refused():
    _, field = network("skip")
    with field.packed() as pack:
        packed, *rest = pack.tensors
    shifted = torch.empty(len(packed) + 1, device="cuda")[1:].copy_(packed)
    x = points(3, 3, torch.float32).cuda()
    with pytest.raises(RuntimeError, match="packed: expected memory at a multiple of 16"):
        torch.ops.levelset_ext.mlp_values(shifted, *rest, x, 1)


def test_streams_share_the_packed_parameters():
    net, field = network("128 x 4")
    x = points(2000, 3, torch.float32).cuda()
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.no_grad():
            net._layers()[0].weight.mul_(1.01)
        side.wait_stream(torch.cuda.current_stream())
        here = ls.project(field, x, max_iters=6)
        with torch.cuda.stream(side):
            there = ls.project(field, x, max_iters=6)
        torch.cuda.current_stream().wait_stream(side)
        expected = ls.project(MLP.from_module(net), x, max_iters=6)
        assert torch.equal(here.points, expected.points)
        assert torch.equal(there.points, expected.points)


def test_every_status():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).cuda()
    with torch.no_grad():  # F = relu(x) + relu(y) - 1
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
        net[2].bias.fill_(-1.0)
    x = torch.tensor([[0.5, 0.5], [3.0, 3.0], [-1.0, -1.0], [math.nan, 1.0], [math.inf, 0.0]])
    x = x.cuda()
    S = Status
    r = ls.project(MLP.from_module(net), x, max_iters=1)
    expected = [S.CONVERGED, S.CONVERGED, S.RANK_DEFICIENT, S.NON_FINITE, S.NON_FINITE]
    assert r.status.tolist() == expected
    assert r.iterations.tolist() == [0, 1, 0, 0, 0]
    assert ls.project(net, x[:2], max_iters=0).status.tolist() == [S.CONVERGED, S.MAX_ITERATIONS]
    r = ls.project(net, x[1:2], box=(2.9, 3.0), max_iters=5)
    assert r.status.tolist() == [S.STALLED]


@pytest.mark.parametrize("name", ["silu, skip True", "128 x 4", "256 x 3", "FC-2"])
def test_rows_do_not_depend_on_rows_beside_them(name):
    _, field = network(name)
    x = points(70_000, 3, torch.float32).cuda()  # more than all slots
    x[13] = math.nan
    together = ls.project(field, x, max_iters=6)
    for _ in range(3):
        again = ls.project(field, x, max_iters=6)
        for part in ("points", "values", "jacobian", "status", "iterations"):
            a, b = getattr(again, part), getattr(together, part)
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), part
    for i in (0, 12, 14, 33_333, 69_999):
        alone = ls.project(field, x[i : i + 1], max_iters=6)
        assert torch.equal(alone.points[0], together.points[i])
        assert torch.equal(alone.jacobian[0], together.jacobian[i])


def test_activations_far_out():
    z = torch.cat([torch.linspace(-120, 120, 997), torch.tensor([0.0, 1e-30, 1e5, -1e5])]).cuda()
    for layer in (nn.ReLU(), nn.SiLU(), nn.Softplus(2.0), nn.Tanh()):
        net = nn.Sequential(nn.Linear(1, 1), layer, nn.Linear(1, 1)).cuda()
        with torch.no_grad():
            for linear in (net[0], net[2]):
                linear.weight.fill_(1.0)
                linear.bias.zero_()
        found = MLP.from_module(net).evaluate(z[:, None])
        F, J = exact(net, z[:, None])
        torch.testing.assert_close(found.values.double().cpu(), F, rtol=2e-6, atol=1e-30)
        torch.testing.assert_close(found.jacobian.double().cpu(), J, rtol=1e-5, atol=1e-6)


def test_a_changed_parameter_is_noticed_also_on_another_device():
    net, field = network("skip")
    x = points(30, 3, torch.float32).cuda()
    before = field.values(x)
    with torch.no_grad():
        net.lin1.weight.data.mul_(1.5)
    assert not torch.equal(field.values(x), before)
    close(field.values(x), net(x).detach(), 1e5)
    net.cpu()
    close(field.values(x.cpu()), net(x.cpu()).detach())
    net.cuda()
    close(field.values(x), net(x).detach(), 1e5)


def test_gradients_go_through_the_module():
    net, field = network("skip")
    x = points(40, 3, torch.float32).cuda()
    result = ls.project(field, x, 0.1, 4)
    assert result.tape is None
    fast = torch.autograd.grad(ls.sample_network(field, result).sum(), net.lin1.weight)[0]
    slow = torch.autograd.grad(ls.sample_network(net, result).sum(), net.lin1.weight)[0]
    torch.testing.assert_close(fast, slow)


FLOAT32, TENSOR_CORES = 1, 2


def by_product(name, product, mixed=False):
    net = with_weights(FUSED[name]()).cuda()
    field = MLP.from_module(net, mixed=mixed)
    field._product = product
    return net, field


@pytest.mark.parametrize("name", ["silu, skip True", "FC-1", "128 x 4", "256 x 3", "FC-2"])
def test_tensor_cores_are_about_as_exact_as_float32(name):
    errors = {}
    for product in (FLOAT32, TENSOR_CORES):
        net, field = by_product(name, product)
        x = points(700, field.dimension, torch.float32).cuda()
        F, J = exact(net, x)
        found = field.evaluate(x)
        assert torch.equal(field.values(x), found.values)
        errors[product] = [
            float((a.double().cpu() - b).norm() / b.norm())
            for a, b in ((found.values, F), (found.jacobian, J))
        ]
    for a, b in zip(errors[TENSOR_CORES], errors[FLOAT32], strict=True):
        assert a < 4 * b + 1e-7, errors
    assert errors[TENSOR_CORES] != errors[FLOAT32]  # they are two ways


def test_tensor_cores_are_what_runs_by_itself():
    x = points(300, 3, torch.float32).cuda()
    _, automatic = by_product("128 x 4", 0)
    found = automatic.evaluate(x).values
    assert torch.equal(found, by_product("128 x 4", TENSOR_CORES)[1].evaluate(x).values)
    assert not torch.equal(found, by_product("128 x 4", FLOAT32)[1].evaluate(x).values)


@pytest.mark.parametrize("name", ["silu, skip True", "128 x 4", "256 x 3", "FC-2"])
def test_mixed_precision_ends_with_exact_numbers(name):
    net, mixed = by_product(name, 0, mixed=True)
    plain = MLP.from_module(net)
    x = points(3000, 3, torch.float32).cuda()
    options = {"max_iters": 12, "tol": 1e-4, "max_step": 0.5}
    level = plain.values(0.3 * x[:5]).mean(0)
    a, b = ls.project(plain, x, level, **options), ls.project(mixed, x, level, **options)
    assert not torch.equal(a.points, b.points)
    again = plain.evaluate(b.points)
    assert torch.equal(again.values, b.values)
    assert torch.equal(again.jacobian, b.jacobian)
    assert abs(int(a.converged.sum()) - int(b.converged.sum())) < 0.03 * len(x)
    assert (b.residual[b.converged] <= 1e-4).all()
    alone = ls.project(mixed, x[7:8], level, **options)
    assert torch.equal(alone.points[0], b.points[7])
    at_once = ls.project(mixed, x, level, max_iters=0)
    assert torch.equal(at_once.points, x)


def test_a_coarse_step_that_fails_is_not_taken():
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float(parameter.dim() > 1))
    x = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.5, math.nan]]).cuda()
    found = ls.project(MLP.from_module(net.cuda(), mixed=True), x, 256.0, max_iters=5)
    S = Status
    assert found.status.tolist() == [S.RANK_DEFICIENT, S.CONVERGED, S.NON_FINITE]
    assert found.iterations.tolist() == [0, 1, 0]
    assert torch.equal(found.points[0], x[0])


def test_a_product_that_is_none_is_an_error():
    _, field = by_product("128 x 4", 3)
    with pytest.raises(RuntimeError, match="product: expected 0"):
        field.values(points(3, 3, torch.float32).cuda())


def test_what_does_not_fit_runs_as_the_module():
    for net, d in (
        (with_weights(NETWORKS["five outputs"]()), 6),
        (ImplicitMLP(3, 1, 600, 2), 3),
        (SkipIn(lambda layer: layer).double(), 3),
    ):
        net = net.cuda()
        x = points(5, d, next(net.parameters()).dtype).cuda()
        assert not MLP.from_module(net).takes(x)
        result = ls.project(net, x, max_iters=1)
        close(result.values, ls.value_and_jacobian(net, result.points)[0], 1e5)


def test_meshes_and_pictures_of_a_compiled_field():
    pytest.importorskip("PIL")  # for pictures
    from levelset_ext.geometry import Camera, extract_mesh, render, surface_area

    net = ImplicitMLP(3, 1, 32, 2, activation="softplus", beta=100.0).init_sphere_(
        0.6, torch.Generator().manual_seed(0)
    )
    net, bounds = net.cuda(), ([-1.0] * 3, [1.0] * 3)
    field = MLP.from_module(net)
    mesh, same = extract_mesh(field, bounds, 24), extract_mesh(net, bounds, 24)
    assert len(mesh.vertices) == len(same.vertices) > 0
    assert abs(mesh.vertices - same.vertices).max() < 1e-6
    assert surface_area(field, bounds, seed=0).value > 0
    camera = Camera.look_at((0, 0, 3.0), width=24, height=24, fov=40)
    picture = render(field, camera)
    assert picture.min() < picture.max()


def test_empty_batch_and_another_stream():
    _, field = network("skip")
    assert ls.project(field, torch.zeros(0, 3, device="cuda")).jacobian.shape == (0, 1, 3)
    x = points(500, 3, torch.float32).cuda()
    expected = ls.project(field, x, max_iters=3).points
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = ls.project(field, late, max_iters=3).points
    stream.synchronize()
    assert torch.equal(found, expected)
