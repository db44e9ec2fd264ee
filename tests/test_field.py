"""value_and_jacobian: right numbers, and nothing left behind on the network."""

import contextlib
import copy
import threading

import problems
import pytest
import torch
from problems import same_bits
from torch import nn

import levelset_ext as ls
from levelset_ext.field import evaluation_copy

F64 = torch.float64


def state_of(module):
    """Everything about a module that its owner can look at, as values and identities."""
    return {
        "modes": [m.training for m in module.modules()],
        "modules": [id(m) for m in module.modules()],
        "parameters": [(k, id(p), p.requires_grad) for k, p in module.named_parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "numbers": [t.detach().clone() for t in module.state_dict().values()],
        "versions": [t._version for t in [*module.parameters(), *module.buffers()]],
        "attributes": [sorted(m.__dict__) for m in module.modules()],
    }


def assert_same_state(a, b):
    for key in ("modes", "modules", "parameters", "versions", "attributes"):
        assert a[key] == b[key], key
    for key in ("grads", "numbers"):
        for one, other in zip(a[key], b[key], strict=True):
            assert (one is None) == (other is None)
            assert one is None or same_bits(one, other)


def uses(fn, x):
    """Every function that evaluates a field, and the sample network on top."""
    ls.value_and_jacobian(fn, x)
    ls.level_points(fn, x)
    for method in ("newton", "gradient_descent", "lbfgs"):
        result = ls.project(fn, x, max_iters=4, method=method)
    ls.sample_network(fn, result)
    ls.sample_network(fn, result, frozen=True)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "d"),
    [
        (problems.Affine(1), 3),
        (problems.Affine(3, 5), 5),
        (problems.Sphere(), 3),
        (problems.Torus(), 3),
        (problems.Circle(), 3),
        (problems.Three(), 5),
        (problems.mlp(2), 3),
        (problems.batch_norm_net(2), 3),
        (problems.weight_norm_net(), 3),
        (problems.OnceDifferentiable(), 3),
    ],
)
def test_values_and_jacobian(fn, d):
    x = problems.points(6, d)
    values, jacobian = ls.value_and_jacobian(fn, x)
    # A deep copy does not exist of every network; only one with batch norm needs it.
    plain = copy.deepcopy(fn).eval() if list(fn.buffers()) else fn

    def one(row):
        return plain(row[None]).reshape(-1)

    expected = torch.stack([torch.autograd.functional.jacobian(one, row) for row in x])
    assert values.shape == expected.shape[:2]
    torch.testing.assert_close(values, torch.stack([one(row) for row in x]).detach())
    torch.testing.assert_close(jacobian, expected)
    assert not values.requires_grad
    assert not jacobian.requires_grad


def test_jacobian_of_an_affine_map_is_its_matrix():
    fn = problems.Affine(2, 4)
    _, jacobian = ls.value_and_jacobian(fn, problems.points(3, 4))
    assert same_bits(jacobian, fn.A.detach().expand(3, 2, 4).contiguous())


def test_event_shapes_one_dimensional_outputs_and_empty_batches():
    fn = problems.Classifier()
    images = problems.points(4, 784).view(4, 1, 28, 28)
    values, jacobian = ls.value_and_jacobian(fn, images)
    assert values.shape == (4, 1)
    assert jacobian.shape == (4, 1, 1, 28, 28)
    flat = ls.value_and_jacobian(
        lambda x: fn(x), images.transpose(2, 3).contiguous().transpose(2, 3)
    )
    assert same_bits(flat[1], jacobian)
    for n, l, net in ((0, 1, fn), (0, 2, problems.mlp(2, d=784))):  # noqa: E741
        x = images[:n] if l == 1 else images[:n].flatten(1)
        values, jacobian = ls.value_and_jacobian(net, x)
        assert values.shape == (0, l)
        assert jacobian.shape == (0, l, *x.shape[1:])
    one, _ = ls.value_and_jacobian(lambda x: x.sum(1), problems.points(1, 3))
    assert one.shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_x(dtype):
    x = problems.points(3, 3, dtype)
    values, jacobian = ls.value_and_jacobian(lambda x: problems.mlp()(x.double()), x)
    assert values.dtype == jacobian.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        values, jacobian = ls.value_and_jacobian(problems.mlp(dtype=torch.float32), x.float())
    assert values.dtype == jacobian.dtype == torch.float32


def test_an_output_that_does_not_depend_on_x_has_a_zero_row():
    fn = problems.mlp(1)
    _, jacobian = ls.value_and_jacobian(
        lambda x: torch.cat([fn(x), fn[0].bias.sum().expand(len(x), 1)], 1), problems.points(3)
    )
    assert jacobian[:, 0].any()
    assert not jacobian[:, 1].any()


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, contextlib.nullcontext]
)
def test_under_every_gradient_mode(mode):
    fn, x = problems.batch_norm_net(), problems.points(5)
    expected = ls.value_and_jacobian(fn, x)
    with mode():
        inside = x.clone()  # under inference mode an inference tensor
        for point in (x, inside):
            got = ls.value_and_jacobian(fn, point)
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
        assert torch.is_grad_enabled() == (mode in (torch.enable_grad, contextlib.nullcontext))
    (got[1] * torch.ones(1, dtype=F64, requires_grad=True)).sum().backward()


# --- nothing is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "make",
    [problems.mlp, problems.batch_norm_net, problems.weight_norm_net, problems.OnceDifferentiable],
)
def test_the_network_is_left_alone(make, train):
    fn, x = make(), problems.points(6)
    fn.train(train)
    first, *rest = fn.parameters()
    first.grad = torch.full_like(first, 3.0)
    rest[-1].requires_grad_(False)
    list(fn.modules())[1].train(not train)
    before, kept = state_of(fn), first.grad
    uses(fn, x)
    assert_same_state(before, state_of(fn))
    assert first.grad is kept


class Viewing(nn.Module):
    """Flattens by view, as many networks of convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Softplus(), nn.Conv2d(6, 4, 3))
        self.last = nn.Linear(64, 2)

    def forward(self, x):
        return self.last(self.features(x).view(-1, 64))


def test_networks_that_cannot_take_channels_last_get_images_as_they_come():
    torch.manual_seed(0)
    net = Viewing().double()
    x = torch.rand(300, 1, 8, 8, dtype=F64)
    layouts = [p.stride() for p in net.parameters()]
    found = ls.project(net, x, net(x).detach() + 0.01, tol=1e-9)
    assert found.converged.all()
    torch.testing.assert_close(found.values, net(found.points).detach())
    torch.testing.assert_close(found.jacobian, ls.value_and_jacobian(net, found.points)[1])
    boundary = ls.find_boundary(net, x, torch.zeros(300, dtype=torch.int64), iters=3)
    torch.testing.assert_close(
        boundary.margins, net(x).detach() @ torch.tensor([1.0, -1.0], dtype=F64)
    )
    assert [p.stride() for p in net.parameters()] == layouts
    # What is really wrong is still said.
    net.last = nn.Linear(63, 2).double()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ls.project(net, x)


def test_a_network_that_ends_with_squeeze_and_a_single_row():
    net = problems.mlp()
    x = problems.points(30)
    squeezed = lambda x: net(x).squeeze()  # noqa: E731
    values, jacobian = ls.value_and_jacobian(squeezed, x[:1])
    assert values.shape == (1, 1)
    assert jacobian.shape == (1, 1, 3)
    one = ls.project(squeezed, x, 0.1, tol=1e-12)
    torch.testing.assert_close(one.points, ls.project(net, x, 0.1, tol=1e-12).points)
    with pytest.raises(ValueError, match=r"fn: expected \(n,\) = \(2,\)"):
        ls.value_and_jacobian(lambda x: net(x).sum(), x[:2])


def test_images_in_chunks_of_which_the_last_has_one_row():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.filters, self.last = nn.Conv2d(1, 3, 3), nn.Linear(3 * 16, 1)

        def forward(self, x):
            return self.last(torch.tanh(self.filters(x)).flatten(1)).squeeze()

    net, x = Squeezed(), torch.rand(129, 1, 6, 6)
    found = ls.project(net, x, max_iters=2)
    torch.testing.assert_close(found.values[:, 0], net(found.points).detach())


def test_a_network_may_have_a_method_of_any_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 1)

        def forward(self, x):
            return self.last(torch.sigmoid(self.first(x)))

        def evaluate(self, loader):
            raise AssertionError("not ours to call")

        takes = values = evaluate

    net, x = Named(), torch.randn(5, 3)
    values, jacobian = ls.value_and_jacobian(net, x)
    plain = ls.value_and_jacobian(lambda x: net(x), x)
    assert torch.equal(values, plain[0])
    assert torch.equal(jacobian, plain[1])
    assert ls.level_points(net, x).converged.all()


def test_a_network_made_in_inference_mode():
    with torch.inference_mode():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 1))
    torch.manual_seed(0)
    usual = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 1))
    x = torch.randn(5, 3)
    for a, b in zip(ls.value_and_jacobian(net, x), ls.value_and_jacobian(usual, x), strict=True):
        assert torch.equal(a, b)
    assert ls.level_points(net, x).converged.all()
    assert all(p.is_inference() for p in net.parameters())  # the network itself stays as it is


def test_the_callers_tensors_are_left_alone():
    x = problems.points(6).requires_grad_()
    level, box = torch.full((6, 1), 0.1, dtype=F64), (x.detach() - 9, x.detach() + 9)
    box = (box[0].amin(0), box[1].amax(0))
    kept = [t.detach().clone() for t in (x, level, *box)]
    versions = [t._version for t in (x, level, *box)]
    fn = problems.mlp()
    ls.value_and_jacobian(fn, x)
    result = ls.project(fn, x, level, box=box)
    result.points.zero_()
    result.level.zero_()
    assert all(same_bits(a, b) for a, b in zip((x, level, *box), kept, strict=True))
    assert versions == [t._version for t in (x, level, *box)]
    assert x.requires_grad
    assert x.grad is None


def test_a_first_layer_that_works_in_place_touches_nothing():
    inner = problems.mlp()
    fn = nn.Sequential(nn.ReLU(inplace=True), inner)
    x = problems.points(6)
    kept = x.clone()
    values, _ = ls.value_and_jacobian(fn, x)
    torch.testing.assert_close(values, inner(x.relu()).detach())
    for method in ("newton", "lbfgs"):
        result = ls.project(fn, x, 0.2, max_iters=5, method=method)
        points = result.points.clone()
        p = ls.sample_network(fn, result)
        assert same_bits(p, points)
        assert same_bits(result.points, points)
        torch.testing.assert_close(result.values, inner(points.relu()).detach())
    assert same_bits(x, kept)


class Failing(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.inner, self.calls = problems.batch_norm_net(), [calls]

    def forward(self, x):
        self.calls[0] -= 1
        if self.calls[0] < 0:
            raise KeyError("broken")
        return self.inner(x)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_exception_leaves_the_network_alone_and_comes_through(calls):
    fn = Failing(calls)
    before = state_of(fn)
    with pytest.raises(KeyError, match="broken"):
        uses(fn, problems.points(5))
    assert_same_state(before, state_of(fn))
    assert torch.is_grad_enabled()


class Counting(nn.Module):
    """Sets attributes and counts in a buffer in forward."""

    def __init__(self):
        super().__init__()
        self.inner = problems.mlp()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("also", self.calls)
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last, self.extra = x, True
        return self.inner(x) + 0.0 * (self.calls - self.also)


def test_what_forward_sets_and_counts_stays_in_the_clone():
    fn = Counting()
    before = state_of(fn)
    uses(fn, problems.points(4))
    assert_same_state(before, state_of(fn))
    assert fn.last is None
    assert fn.calls.item() == 0
    assert not hasattr(fn, "extra")
    clone = evaluation_copy(fn)
    assert clone.calls is clone.also


def test_batch_norm_uses_its_running_statistics_everywhere():
    fn, x = problems.batch_norm_net(), problems.points(6)
    plain = copy.deepcopy(fn).eval()
    result = ls.project(fn, x, max_iters=10, tol=1e-10)
    again = ls.project(plain, x, max_iters=10, tol=1e-10)
    assert same_bits(result.points, again.points)
    assert same_bits(result.values, plain(result.points).detach())
    p = ls.sample_network(fn, result, frozen=True)
    assert same_bits(p, result.points)
    got = torch.autograd.grad(p.square().sum(), list(fn.parameters()))
    p = ls.sample_network(plain, result, frozen=True)
    expected = torch.autograd.grad(p.square().sum(), list(plain.parameters()))
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.again = self.first
        self.norm = nn.BatchNorm1d(3).double()
        self.listed = [self.norm, self.first]
        self.named = {"norm": self.norm}
        self.call = self.body

    def body(self, x):
        assert not self.training
        return self.named["norm"](self.again(self.listed[0](self.first(x)))).sum(1)

    def forward(self, x):
        return self.call(x)


def test_submodules_used_twice_in_lists_and_through_bound_methods():
    fn = Tied()
    before = state_of(fn)
    clone = evaluation_copy(fn)
    assert clone.first is clone.again is clone.listed[1]
    assert clone.first is not fn.first
    assert clone.first.weight is fn.first.weight
    assert clone.norm is clone.listed[0] is clone.named["norm"]
    assert not any(m.training for m in clone.modules())
    uses(fn, problems.points(5))
    assert_same_state(before, state_of(fn))


@pytest.mark.parametrize("how", ["module.compile", "torch.compile", "child", "fx"])
def test_compiled_and_traced_modules_run_in_eval_mode(how, fresh_compiler):
    net, x = problems.batch_norm_net(), problems.points(5)
    expected = ls.value_and_jacobian(copy.deepcopy(net).eval(), x)
    fn = net
    if how == "module.compile":
        net.compile(backend="eager")
    elif how == "torch.compile":
        fn = torch.compile(net, backend="eager")
    elif how == "child":
        fn = nn.Sequential(torch.compile(net, backend="eager"))
    else:
        fn = torch.fx.symbolic_trace(net)
    before = state_of(net)
    got = ls.value_and_jacobian(fn, x)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    assert_same_state(before, state_of(net))


def test_a_forward_replaced_on_the_instance_runs_on_the_clone():
    import types

    net = problems.batch_norm_net()
    plain = type(net).forward

    def wrapped(self, x):
        assert not self.training
        return plain(self, x)

    net.forward = types.MethodType(wrapped, net)
    before = state_of(net)
    uses(net, problems.points(5))
    assert_same_state(before, state_of(net))


def test_hooks_of_the_caller_run_and_stay():
    net, seen = problems.mlp(), []
    handle = net.register_forward_hook(lambda module, args, out: seen.append(module.training))
    net[0].weight.register_hook(lambda g: seen.append("parameter gradient"))
    ls.value_and_jacobian(net, problems.points(3))
    assert seen == [False]
    handle.remove()
    ls.value_and_jacobian(net, problems.points(3))
    assert seen == [False]


def test_a_plain_callable_is_called_as_it_is():
    net, modes = problems.batch_norm_net(), []

    def fn(x):
        modes.append(net.training)
        return net(x)

    ls.value_and_jacobian(fn, problems.points(5))
    assert modes == [True]
    assert net.training


def test_inside_functional_call():
    net, x = problems.mlp(), problems.points(4)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return ls.value_and_jacobian(self.net, x)

    other = problems.mlp(seed=7)
    swapped = {f"net.{k}": v for k, v in other.named_parameters()}
    values, jacobian = torch.func.functional_call(Wrapper(), swapped, (x,))
    expected = ls.value_and_jacobian(other, x)
    assert same_bits(values, expected[0])
    assert same_bits(jacobian, expected[1])


def test_another_thread_trains_the_same_network_undisturbed():
    """Training in one thread ends with the same numbers whether or not another one samples."""

    def train(net, sampling=None):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        data = problems.points(16, seed=20)
        for step in range(60):
            net.train(step % 3 != 0)
            mode = net.training
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = net(data).square().mean()
            loss.backward()
            optimizer.step()
            assert all(m.training == mode for m in net.modules())
        return net

    def network():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 1)
        ).double()

    alone = train(network())
    net, stop, failures, samples = network(), threading.Event(), [], [0]

    def sample():
        while not stop.is_set():
            try:
                uses(net, problems.points(8))
                samples[0] += 1
            except RuntimeError as error:
                # The optimizer may change a parameter between F and D_xF; torch notices.
                if "modified by an inplace operation" not in str(error):
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        train(net)
        while samples[0] == 0 and thread.is_alive() and not failures:
            stop.wait(0.01)
    finally:
        stop.set()
        thread.join()
    assert not failures
    for (name, a), b in zip(net.state_dict().items(), alone.state_dict().values(), strict=True):
        assert same_bits(a, b), name
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        assert same_bits(p.grad, q.grad)


# ruff: noqa: E501 (the table of refusals)

# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "x", "error", "message"),
    [
        ("net", problems.points(3), TypeError, r"^fn: expected a module or a callable, got str"),
        (problems.mlp(), [[0.0] * 3], TypeError, r"^x: expected a tensor .*, got list"),
        (problems.mlp(), torch.zeros(3), ValueError, r"^x: expected .*, got shape \(3,\)"),
        (problems.mlp(), torch.zeros(3, 3).long(), TypeError, r"^x: .* floating dtype, got torch.int64"),
        (lambda x: x.detach(), problems.points(3), ValueError, r"^fn: .* differentiable operations"),
        (lambda x: torch.zeros(len(x)), problems.points(3), ValueError, r"^fn: .* without a graph"),
        (lambda x: x.sum(), problems.points(3), ValueError, r"^fn: expected \(n,\) = \(3,\) or .* got \(\)"),
        (lambda x: x[:2], problems.points(3), ValueError, r"^fn: expected \(n,\) = \(3,\) or .* got \(2, 3\)"),
        (lambda x: x[:, None], problems.points(3), ValueError, r"^fn: expected .* got \(3, 1, 3\)"),
        (lambda x: x[:, :0], problems.points(3), ValueError, r"^fn: expected .* got \(3, 0\)"),
        (lambda x: (x, x), problems.points(3), TypeError, r"^fn: expected a tensor .*, got tuple"),
        (lambda x: None, problems.points(3), TypeError, r"^fn: expected a tensor .*, got NoneType"),
    ],
)  # fmt: skip
def test_refusals(fn, x, error, message):
    with pytest.raises(error, match=message):
        ls.value_and_jacobian(fn, x)
    with pytest.raises(error, match=message):
        ls.project(fn, x)
    with pytest.raises(error, match=message):
        ls.level_points(fn, x)


def test_no_gradient_of_parameters_is_computed():
    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            assert ctx.needs_input_grad[0]
            return grad * 2.0, grad.new_zeros(3).fill_(float("nan"))

    weight = torch.full((3,), 2.0, dtype=F64, requires_grad=True)
    _, jacobian = ls.value_and_jacobian(lambda x: Probe.apply(x, weight).sum(1), problems.points(2))
    assert (jacobian == 2).all()
    assert weight.grad is None
