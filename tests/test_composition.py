"""The sample network inside torch: functional calls, transforms, checkpoints, compile, DDP."""

import copy

import problems
import pytest
import torch
from problems import same_bits
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes

import levelset_ext as ls

F64 = torch.float64


def problem(l=1, n=6, **options):  # noqa: E741
    net = problems.mlp(l)
    return net, ls.project(net, problems.points(n), tol=1e-10, **options)


def gradients(net, p):
    return torch.autograd.grad(p.sin().sum(), list(net.parameters()))


def assert_all_close(a, b, **kwargs):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, **kwargs)


# --- the module -----------------------------------------------------------------------------------


def test_the_module_is_the_function():
    net, r = problem()
    module = ls.SampleNetwork(net)
    assert dict(module.named_parameters()).keys() == {f"network.{k}" for k in parameters(net)}
    assert set(module.state_dict()) == {f"network.{k}" for k in net.state_dict()}
    for frozen in (False, True):
        module = ls.SampleNetwork(net, frozen=frozen)
        for v in (None, torch.ones_like(r.points)):
            expected = ls.sample_network(net, r, frozen=frozen, direction=v)
            got = module(r) if v is None else module(r, v)
            assert same_bits(got, expected)
            assert_all_close(gradients(net, got), gradients(net, expected))
    other = ls.SampleNetwork(problems.mlp(seed=5))
    other.load_state_dict(module.state_dict())
    assert_all_close(gradients(other, other(r)), gradients(net, module(r)))


def parameters(net):
    return {k: v.detach() for k, v in net.named_parameters()}


def test_training_moves_the_level_set_to_a_target():
    """The whole loop: project, p(theta), loss, step. A sphere learns the radius of its loss."""
    fn = problems.Sphere(0.5)
    optimizer = torch.optim.SGD([fn.radius], lr=0.3)
    for _ in range(40):
        r = ls.project(fn, problems.points(30))
        loss = (ls.sample_network(fn, r).norm(dim=1) - 0.8).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(fn.radius.item() - 0.8) < 1e-6


# --- functional calls and transforms --------------------------------------------------------------


@pytest.mark.parametrize("l", [1, 2, 3])
def test_functional_call(l):  # noqa: E741
    net, r = problem(l)
    other = problems.mlp(l, seed=9)
    expected = gradients(other, ls.sample_network(other, r))
    theta = {k: v.clone().requires_grad_() for k, v in parameters(other).items()}
    p = functional_call(ls.SampleNetwork(net), {f"network.{k}": v for k, v in theta.items()}, (r,))
    assert_all_close(torch.autograd.grad(p.sin().sum(), list(theta.values())), expected)
    p = ls.sample_network(lambda x: functional_call(net, theta, (x,)), r)
    assert_all_close(torch.autograd.grad(p.sin().sum(), list(theta.values())), expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("l", [1, 2, 3])
def test_func_grad_and_jacrev(l, frozen):  # noqa: E741
    net, r = problem(l, 3)
    module = ls.SampleNetwork(net, frozen=frozen)
    theta = parameters(module)

    def p(theta):
        return functional_call(module, theta, (r,))

    got = torch.func.grad(lambda theta: p(theta).sin().sum())(theta)
    assert_all_close(got.values(), gradients(net, module(r)))
    full = torch.func.jacrev(p)(theta)["network.0.bias"]
    one_by_one = [
        torch.autograd.grad(out, net[0].bias, retain_graph=True)[0] for out in module(r).flatten()
    ]
    torch.testing.assert_close(full.flatten(0, 1), torch.stack(one_by_one))


@pytest.mark.parametrize("l", [1, 2])
def test_an_ensemble_by_vmap(l):  # noqa: E741
    nets = [problems.mlp(l, seed=k) for k in range(3)]
    r = ls.project(nets[0], problems.points(5))
    theta, _ = torch.func.stack_module_state(nets)

    def p(theta):
        return ls.sample_network(lambda x: functional_call(nets[0], theta, (x,)), r, frozen=True)

    with torch.no_grad():
        points = torch.vmap(p)(theta)
    got = torch.vmap(torch.func.grad(lambda theta: p(theta).sin().sum()))(theta)
    for k, net in enumerate(nets):
        expected = ls.sample_network(net, r, frozen=True)
        torch.testing.assert_close(points[k], expected.detach())
        assert_all_close([v[k] for v in got.values()], gradients(net, expected))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("l", [1, 2])
def test_an_ensemble_is_trained_through_vmap(l, frozen):  # noqa: E741
    nets = [problems.mlp(l, seed=k) for k in range(3)]
    r = ls.project(nets[0], problems.points(5))
    theta, _ = torch.func.stack_module_state(nets)  # leaves, which require grad outside of vmap

    def p(theta):
        return ls.sample_network(lambda x: functional_call(nets[0], theta, (x,)), r, frozen=frozen)

    points = torch.vmap(p)(theta)
    got = torch.autograd.grad(points.sin().sum(), list(theta.values()))
    for k, net in enumerate(nets):
        expected = ls.sample_network(net, r, frozen=frozen)
        torch.testing.assert_close(points[k], expected)
        assert_all_close([v[k] for v in got], gradients(net, expected))


def test_forward_mode_is_refused():
    net, r = problem()
    module = ls.SampleNetwork(net)
    theta = parameters(module)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda t: functional_call(module, t, (r,)), (theta,), (theta,))


# --- checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_sample_network(reentrant):
    net = problems.batch_norm_net()
    r = ls.project(net, problems.points(6))
    expected = gradients(net, ls.sample_network(net, r))
    # The reentrant kind needs an input that asks for a gradient to keep a graph at all.
    switch = torch.ones(1, dtype=F64, requires_grad=True)
    p = checkpoint(lambda s: ls.sample_network(net, r) * s, switch, use_reentrant=reentrant)
    assert same_bits(p, r.points)
    net.zero_grad()
    p.sin().sum().backward()
    assert_all_close([q.grad for q in net.parameters()], expected)


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


def test_checkpoint_inside_the_network():
    net = problems.batch_norm_net()
    x = problems.points(6)
    inside = Checkpointed(net)
    plain, r = ls.project(net, x), ls.project(inside, x)
    assert same_bits(plain.points, r.points)
    assert same_bits(plain.jacobian, r.jacobian)
    expected = gradients(net, ls.sample_network(net, r))
    assert_all_close(gradients(inside, ls.sample_network(inside, r)), expected)


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("l", [1, 2])
def test_autocast(l, frozen):  # noqa: E741
    net = problems.mlp(l, dtype=torch.float32)
    x = problems.points(8, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        r = ls.project(net, x)
        p = ls.sample_network(net, r, frozen=frozen)
        assert p.dtype == r.points.dtype == r.jacobian.dtype == torch.float32
        if frozen:  # F is evaluated in float32, here by the module, there by its compiled field
            torch.testing.assert_close(p, r.points, rtol=0, atol=1e-5)
        else:
            assert same_bits(p, r.points)
        got = gradients(net, p)
    exact = copy.deepcopy(net)
    expected = gradients(exact, ls.sample_network(exact, r))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()  # bfloat16 has three digits
    # The rows' arithmetic itself stays in float32.
    points = ls.project(net, x, max_iters=3)
    assert_all_close(*both_ways(net, points), rtol=0, atol=0)


def both_ways(net, r):
    """Gradients of p through a network that leaves autocast, with autocast off and on around it."""

    def fn(x):
        with torch.autocast("cpu", enabled=False):
            return net(x)

    plain = gradients(net, ls.sample_network(fn, r))
    with torch.autocast("cpu", torch.bfloat16):
        p = ls.sample_network(fn, r)
    return plain, gradients(net, p)


# --- compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [problems.mlp, problems.batch_norm_net])
@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"direction": True}])
def test_compile_in_one_graph(make, options, fresh_compiler):
    net = make()
    net.train()
    x = problems.points(6)
    x[2] = torch.nan
    r = ls.project(net, x)
    options = dict(options)
    if "direction" in options:
        options["direction"] = torch.ones_like(x)

    def loss(r):
        return ls.sample_network(net, r, **options).nan_to_num().sin().sum()

    buffers = [b.clone() for b in net.buffers()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = compiled(r)
    torch.testing.assert_close(value, loss(r))
    got = torch.autograd.grad(value, list(net.parameters()))
    assert_all_close(got, torch.autograd.grad(loss(r), list(net.parameters())))
    assert all(m.training for m in net.modules())
    assert all(same_bits(a, b) for a, b in zip(net.buffers(), buffers, strict=True))


def test_compile_the_module_in_one_graph(fresh_compiler):
    net, r = problem(2)
    module = ls.SampleNetwork(net)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = gradients(net, module(r))
    assert_all_close(gradients(net, compiled(r)), expected)


# --- data parallel --------------------------------------------------------------------------------


def ddp_worker(rank):
    from torch.nn.parallel import DistributedDataParallel

    answers = {}
    x = problems.points(8)[4 * rank : 4 * rank + 4]
    net = problems.mlp()
    wrapped = DistributedDataParallel(ls.SampleNetwork(net))
    r = ls.project(net, x)
    wrapped(r).sin().sum().backward()
    answers["module"] = [p.grad for p in net.parameters()]
    # A rank without a usable row takes part all the same, and the next step still works.
    for step in range(2):
        net.zero_grad()
        r = ls.project(net, x)
        if rank == 0:
            r = r[:0] if step == 0 else ls.project(net, torch.full_like(x, torch.nan))
        wrapped(r).nan_to_num().sin().sum().backward()
    answers["one rank"] = [p.grad for p in net.parameters()]
    net = problems.mlp()
    data_parallel = DistributedDataParallel(net)
    r = ls.project(data_parallel.module, x)
    ls.sample_network(data_parallel, r).sin().sum().backward()
    answers["network"] = [p.grad for p in net.parameters()]
    return answers


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    answers = in_two_processes(ddp_worker, tmp_path)
    net = problems.mlp()
    whole = gradients(net, ls.sample_network(net, ls.project(net, problems.points(8))))
    half = gradients(net, ls.sample_network(net, ls.project(net, problems.points(8)[4:])))
    for rank in range(2):
        for case, expected in (("module", whole), ("network", whole), ("one rank", half)):
            assert_all_close(answers[rank][case], [g / 2 for g in expected])
