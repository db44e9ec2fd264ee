"""The package inside other people's training code: each row of docs/compatibility.md.

What test_composition.py, test_ops_autograd.py and test_compiled.py hold already is not repeated.
"""

import copy
import dataclasses
import importlib
import io
import pickle
import threading
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import problems
import pytest
import torch
from test_composition import assert_all_close, gradients
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes

import levelset_ext as ls
from levelset_ext.compiled import compiled_field
from levelset_ext.networks import MLP, compiled_fields

F64 = torch.float64
FAR = {"eps_correct": 3.0, "eps_wrong": 3.0, "step": 0.2}


def classifier(classes=3, dtype=F64):
    return problems.mlp(classes, dtype=dtype, seed=3)


def labels(n, classes=3):
    return torch.arange(n) % classes


def three_losses(net=None, binary=None, multi=None):
    """(name, network, closure of the loss) for Eq. 11, 12 and 13 on fixed samples."""
    x = problems.points(24)
    net, binary, multi = (
        net or problems.mlp(),
        binary or problems.mlp(seed=4),
        multi or classifier(),
    )
    sets = [ls.project(net, x), ls.level_points(net, 0.5 * x)]
    svm = ls.losses.svm_samples(binary, x)
    found = ls.find_boundary(multi, x, labels(24), box=None, random_start=False, **FAR)
    assert len(found) > 8
    return [
        ("Eq. 11", binary, lambda fn: ls.losses.geometric_svm(fn, x, labels(24, 2), svm).total),
        ("Eq. 12", multi, lambda fn: ls.losses.robust(fn, x, labels(24), found).total),
        ("Eq. 13", net, lambda fn: ls.losses.reconstruction(fn, sets, 0.7 * x).total),
    ]


def gradients_of(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


# --- compile --------------------------------------------------------------------------------------


def test_the_robust_loss_in_one_graph(fresh_compiler):
    _, net, loss = three_losses()[1]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = compiled(net)
    torch.testing.assert_close(value, loss(net))
    assert_all_close(gradients_of(net, value), gradients_of(net, loss(net)))


def test_samplers_beside_compiled_code(fresh_compiler):
    """A sampler loops until its rows are done: it breaks the graph of a compiled step, and a step
    that must be one graph refuses it."""
    net, x = problems.mlp(), problems.points(12)
    steps = []

    def step(x):
        p = ls.sample_network(net, ls.project(net, 2 * x))
        steps.append(len(p))
        return p.square().sum()

    compiled = torch.compile(step, backend="aot_eager")
    expected = ls.sample_network(net, ls.project(net, 2 * x)).square().sum()
    torch.testing.assert_close(compiled(x), expected)
    assert_all_close(gradients_of(net, compiled(x)), gradients_of(net, expected))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(lambda x: ls.project(net, x).points, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("where", ["whole", "inside", "in place"])
def test_samplers_take_compiled_modules(where, fresh_compiler):
    net, x = problems.mlp(), problems.points(12)
    plain = copy.deepcopy(net)
    if where == "whole":
        net = torch.compile(net, backend="eager")
    elif where == "inside":
        net = nn.Sequential(torch.compile(net[:2], backend="eager"), net[2:])
    else:
        net.compile(backend="eager")
    found, expected = ls.project(net, x), ls.project(plain, x)
    torch.testing.assert_close(found.points, expected.points)
    got = gradients_of(net, ls.sample_network(net, found).sin().sum())
    assert_all_close(got, gradients(plain, ls.sample_network(plain, expected)))
    multi = torch.compile(classifier(), backend="eager")
    assert len(ls.find_boundary(multi, x, labels(12), box=None, random_start=False, **FAR)) > 3


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    """Scaled, unscaled and clipped gradients of all three losses are those without a scaler, and
    within the digits of the dtype those of float32."""
    x = problems.points(24, dtype=torch.float32)
    nets = [m.float() for m in (problems.mlp(), problems.mlp(seed=4), classifier())]

    def losses():
        net, binary, multi = nets
        found = ls.find_boundary(multi, x, labels(24), box=None, random_start=False, **FAR)
        r = ls.project(net, x, max_iters=10)
        assert r.converged.all()  # not in bfloat16
        assert r.points.dtype == found.result.points.dtype == torch.float32
        return [
            ls.losses.geometric_svm(binary, x, labels(24, 2)).total,
            ls.losses.robust(multi, x, labels(24), found).total,
            ls.losses.reconstruction(net, r, 0.7 * x).total,
        ]

    def backward(scaler=None):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype):
            values = losses()
        assert all(v.dtype == torch.float32 for v in values)
        answers = []
        order = [nets[1], nets[2], nets[0]]
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.0) for net in order]
        for net, value, optimizer in zip(order, values, optimizers, strict=True):
            optimizer.zero_grad()
            (value if scaler is None else scaler.scale(value)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
            answers.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        if scaler is not None:
            scaler.update()
        return answers

    # A power of two scales without rounding, but float16's range is small: 2^4 keeps within it.
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    plain, scaled = backward(), backward(scaler)
    assert scaler.get_scale() == 16.0  # no overflow was seen
    for a, b in zip(plain, scaled, strict=True):
        assert torch.isfinite(a).all()
        assert a.norm() > 0
        assert (a - b).norm() <= 0.03 * a.norm()


# --- torch.func -----------------------------------------------------------------------------------


def test_func_grad_of_the_losses():
    for _, net, loss in three_losses():
        theta = {k: v.detach() for k, v in net.named_parameters()}
        got = torch.func.grad(
            lambda theta, net=net, loss=loss: loss(lambda x: functional_call(net, theta, (x,)))
        )(theta)
        assert_all_close(got.values(), gradients_of(net, loss(net)))


def test_samplers_are_refused_inside_transforms():
    """Samples are constants: find them outside, transform the sample network."""
    net, x = problems.mlp(), problems.points(6)
    theta = {k: v.detach() for k, v in net.named_parameters()}

    def length(theta):
        return ls.project(lambda x: functional_call(net, theta, (x,)), x).points.sum()

    for transform in (torch.func.grad, lambda f: torch.vmap(f, randomness="same")):
        stacked = theta if transform is torch.func.grad else {k: v[None] for k, v in theta.items()}
        with pytest.raises(RuntimeError, match="transform"):
            transform(length)(stacked)


# --- export ---------------------------------------------------------------------------------------


class Sampler(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return ls.project(self.net, x).points


class Residual(nn.Module):
    """What Eq. 9 adds to given samples: an inference path with an op of the package in it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, points, values, jacobian):
        return points - ls.ops.pinv_apply(jacobian, self.net(points) - values)


def test_export():
    net, x = problems.mlp(), problems.points(9)
    rows = torch.export.Dim("rows")
    # A trained network, exported for any number of rows, is a field as any other.
    program = torch.export.export(net, (x,), dynamic_shapes=({0: rows},))
    again = torch.export.load(_through_bytes(program))
    expected = ls.project(net, x)
    found = ls.project(again.module(), x)
    torch.testing.assert_close(found.points, expected.points)
    # A module that calls an op of the package is exported with it.
    shapes = ({0: rows},) * 3
    given = (expected.points, expected.values, expected.jacobian)
    moved = torch.export.export(Residual(net), given, dynamic_shapes=shapes)
    names = {str(node.target) for node in moved.graph.nodes}
    assert any("levelset_ext.pinv_apply" in name for name in names)
    torch.testing.assert_close(
        moved.module()(*(t[:4] for t in given)), expected.points[:4], rtol=0, atol=1e-5
    )


def test_export_refuses_a_sampler(caplog):
    """How many steps a sampler takes is decided by numbers, which a graph has not got."""
    with pytest.raises(Exception, match=r"data-dependent|Unsupported|is_inference"):
        torch.export.export(Sampler(problems.mlp()), (problems.points(5),))


def _through_bytes(program):
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return stream


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_losses(reentrant):
    switch = torch.ones(1, dtype=F64, requires_grad=True)
    for _, net, loss in three_losses():
        expected = gradients_of(net, loss(net))
        value = checkpoint(
            lambda s, loss=loss, net=net: loss(net) * s, switch, use_reentrant=reentrant
        )
        net.zero_grad()
        value.sum().backward()
        assert_all_close([p.grad for p in net.parameters()], expected)


# --- first derivatives only -----------------------------------------------------------------------


class OnceOnly(nn.Module):
    """A classifier whose double backward raises, whatever comes after."""

    def __init__(self, outputs):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8).double(), nn.Linear(8, outputs).double()

    def forward(self, x):
        return self.last(problems._OnceOnly.apply(self.first(x)))


def test_first_derivatives_are_enough():
    """Samplers, sample network and Eq. 11-13 never differentiate a gradient of the network."""
    x = problems.points(24)
    nets = [OnceOnly(1), OnceOnly(1), OnceOnly(3)]
    r = ls.project(nets[0], x, method="lbfgs", max_iters=40)
    assert r.converged.any()
    assert ls.false_position(nets[0], -3 * x, 3 * x).converged.any()
    assert torch.isfinite(gradients(nets[0], ls.sample_network(nets[0], r))[0]).all()
    for (_, net, loss), twin in zip(three_losses(*nets), (nets[1], nets[2], nets[0]), strict=True):
        assert net is twin
        smooth = nn.Sequential(net.first, nn.Tanh(), net.last)
        assert_all_close(gradients_of(net, loss(net)), gradients_of(net, loss(smooth)))
        grads = torch.autograd.grad(loss(net), list(net.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
            grads[0].sum().backward()


# --- several processes ----------------------------------------------------------------------------


def worker(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    def loss_of(fn, sampled):
        x = problems.points(16)[rank::2]
        r = ls.project(sampled, x, max_iters=3)
        return ls.losses.reconstruction(fn, r, 0.7 * x).total

    answers = {}
    net = problems.mlp()
    wrapped = DistributedDataParallel(net)
    loss_of(wrapped, net).backward()
    answers["ddp"] = [p.grad for p in net.parameters()]
    net = problems.mlp()
    for part in (net[0], net[2], net[4], net):
        fully_shard(part)
    # As a callable: a copy of the module would not be unsharded with it. Its collectives run in
    # every call, so all ranks have to evaluate it equally often, as level_points does.
    fn = partial(nn.Module.__call__, net)
    x = problems.points(16)[rank::2]
    ls.losses.reconstruction(fn, ls.level_points(fn, x), 0.7 * x).total.backward()
    answers["fsdp"] = [
        p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in net.parameters()
    ]
    return answers


@pytest.mark.slow
def test_data_parallel_and_fully_sharded(tmp_path):
    """The mean over ranks of Eq. 13's gradient is that of one process with both ranks' terms."""
    answers = in_two_processes(worker, tmp_path)
    for way in ("ddp", "fsdp"):
        net, total = problems.mlp(), 0.0
        for rank in range(2):
            x = problems.points(16)[rank::2]
            r = ls.project(net, x, max_iters=3) if way == "ddp" else ls.level_points(net, x)
            total = total + ls.losses.reconstruction(net, r, 0.7 * x).total / 2
        expected = gradients_of(net, total)
        for rank in range(2):
            assert_all_close(answers[rank][way], expected)


# --- the compiled field: never stale --------------------------------------------------------------


def right(net, x, plain=None):
    """``project`` is that of the module itself, and so is the gradient of its samples."""
    with compiled_fields(False):
        expected = ls.project(plain or net, x)
    found = ls.project(net, x)
    assert torch.equal(found.status, expected.status)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(found.points, expected.points, rtol=1e6 * eps, atol=1e6 * eps)
    return found


def is_compiled(net, x):
    return compiled_field(net, x) is not None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@dataclasses.dataclass(slots=True)
class Slotted:
    scale: float = 1.0


class Scaled(nn.Module):
    """Numbers kept in the places where people keep them."""

    per_class = 1.0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1).double()
        self.public, self._private, self.options = 1.0, 1.0, SimpleNamespace(scale=1.0)
        self.nested = {"model": SimpleNamespace(shift=[0.0])}
        self.slotted, self.kept, self.array = Slotted(), torch.ones(()), np.ones(1)
        self.tree = SimpleNamespace(model=SimpleNamespace(head=SimpleNamespace(scale=1.0)))
        self.register_buffer("offset", torch.zeros(1, dtype=F64))

    def forward(self, x):
        scale = self.public * self._private * self.options.scale * self.per_class
        scale *= self.slotted.scale * float(self.kept) * float(self.array[0])
        scale *= self.tree.model.head.scale
        return self.layer(scale * x) + self.nested["model"].shift[0] + self.offset


def _double_the_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else 2 * g for g in grad_input)


def _set_buffer(m):
    m.offset = torch.full((1,), 0.3, dtype=F64)


CHANGES = {
    "a public number": lambda m: setattr(m, "public", 2.0),
    "a private number": lambda m: setattr(m, "_private", 2.0),
    "a number in a configuration": lambda m: setattr(m.options, "scale", 2.0),
    "a number deep in one": lambda m: m.nested["model"].shift.__setitem__(0, 0.5),
    "a number three namespaces deep": lambda m: setattr(m.tree.model.head, "scale", 2.0),
    "a number in slots": lambda m: setattr(m.slotted, "scale", 2.0),
    "a number of the class": lambda m: setattr(type(m), "per_class", 2.0),
    "a tensor that is no buffer": lambda m: m.kept.fill_(2.0),
    "an array": lambda m: m.array.fill(2.0),
    "a hook on the whole": lambda m: m.register_forward_hook(lambda module, x, out: out + 1e-3),
    "a backward hook": lambda m: m.layer.register_full_backward_hook(_double_the_gradient),
    "a buffer in place": lambda m: m.offset.fill_(0.3),
    "another buffer": _set_buffer,
    "a parameter through .data": lambda m: m.layer.weight.data.mul_(2),
    "another parameter": lambda m: setattr(m.layer, "weight", nn.Parameter(m.layer.weight + 1)),
    "the forward of the instance": lambda m: setattr(m, "forward", lambda x: m.layer(2 * x)),
    "a hook": lambda m: m.layer.register_forward_hook(lambda module, args, out: out + 0.2),
    "a parametrization": lambda m: parametrize.register_parametrization(
        m.layer, "weight", Doubled()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_compiled_field_follows(change, monkeypatch):
    monkeypatch.setattr(Scaled, "per_class", 1.0)
    net, x = Scaled(), problems.points(7)
    before = right(net, x)
    assert is_compiled(net, x)
    CHANGES[change](net)
    assert not torch.equal(right(net, x).points, before.points)


def test_a_buffer_that_is_read_as_a_number():
    class Sharpened(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 1)
            self.register_buffer("beta", torch.tensor(1.0))

        def forward(self, x):
            return self.last(nn.functional.softplus(self.first(x), beta=self.beta.item()))

    net, x = Sharpened().double(), problems.points(7)
    before = right(net, x)
    net.beta.fill_(20.0)
    assert not torch.equal(right(net, x).points, before.points)


def test_a_linear_layer_whose_weight_is_a_plain_tensor():
    layer = nn.Linear(3, 1).double()
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = weight
    net, x = nn.Sequential(layer), problems.points(7)
    before = right(net, x)
    weight.mul_(2)
    assert not torch.equal(right(net, x).points, before.points)


def test_compiled_fields_are_switched_off_in_one_thread():
    net, x = problems.mlp(), problems.points(7)
    inside, done = threading.Event(), threading.Event()

    def elsewhere():
        with compiled_fields(False):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    inside.wait(10)
    with compiled_fields(False):
        assert not is_compiled(net, x)
        done.set()
        thread.join()
        assert not is_compiled(net, x)
    assert is_compiled(net, x)


def test_the_compiled_field_follows_its_class(monkeypatch):
    net, x = Scaled(), problems.points(7)
    before = right(net, x)
    monkeypatch.setattr(Scaled, "forward", lambda self, x: self.layer(x) + 1)
    assert not torch.equal(right(net, x).points, before.points)


def test_the_compiled_field_under_functional_call():
    net, other, x = problems.mlp(), problems.mlp(seed=9), problems.points(9)
    right(net, x)
    assert is_compiled(net, x)
    theta = {f"net.{k}": v for k, v in other.named_parameters()}
    for _ in range(2):
        points = functional_call(Sampler(net), theta, (x,))
        torch.testing.assert_close(points, right(other, x).points)
        right(net, x)


def test_the_compiled_field_under_parametrizations_that_are_cached():
    net, x = problems.mlp(), problems.points(9)
    nn.utils.parametrizations.weight_norm(net[0])
    with parametrize.cached():
        right(net, x)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.5)
        assert not is_compiled(net, x)
    right(net, x)
    assert is_compiled(net, x)
    parametrize.remove_parametrizations(net[0], "weight")
    right(net, x)


def test_the_compiled_field_after_a_change_of_dtype():
    net, x = problems.mlp(), problems.points(9)
    right(net, x)
    for dtype in (torch.float32, F64, torch.float32):
        net.to(dtype)
        with torch.no_grad():
            net[0].weight.mul_(1.1)
        right(net, x.to(dtype))
        assert is_compiled(net, x.to(dtype))
        assert not is_compiled(net, x.to(torch.float32 if dtype == F64 else F64))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_module_that_was_projected_are_independent(way):
    net, x = problems.mlp(), problems.points(9)
    right(net, x)
    if way == "deepcopy":
        twin = copy.deepcopy(net)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    else:
        stream = io.BytesIO()
        torch.save(net, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert not torch.equal(right(twin, x).points, right(net, x).points)


def test_threads_share_a_compiled_field():
    nets = [problems.mlp(seed=k) for k in range(2)]
    x = problems.points(40)
    expected = [right(net, x).points for net in nets]
    wrong = []

    def loop(k):
        for step in range(20):
            net = (k + step) % 2
            if k == 0:
                with torch.no_grad():
                    nets[net][0].weight.mul_(1.0)  # another version of the same numbers
            if not torch.equal(ls.project(nets[net], x).points, expected[net]):
                wrong.append((k, step))

    threads = [threading.Thread(target=loop, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Special(torch.Tensor):
    pass


def test_where_the_module_is_called_instead():
    net, x = problems.mlp(), problems.points(9)
    assert is_compiled(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_compiled(net, x)
    assert not is_compiled(net, x.as_subclass(Special))
    right(net, x.as_subclass(Special))
    assert not is_compiled(net, x.float())
    assert not is_compiled(net, torch.empty(9, 3, dtype=F64, device="meta"))
    assert not is_compiled(copy.deepcopy(net).to("meta"), x)
    odd = copy.deepcopy(net)
    odd[0].weight = nn.Parameter(odd[0].weight.detach().as_subclass(Special))
    assert not is_compiled(odd, x)
    right(odd, x, net)
    assert not is_compiled(nn.Sequential(torch.compile(net[:2], backend="eager"), net[2:]), x)
    with torch.device("meta"):
        assert not is_compiled(net, x)
        found = ls.project(net, x)
    torch.testing.assert_close(found.points, right(net, x).points)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: out + 0.1)
    try:
        assert not is_compiled(net, x)
        right(net, x)
    finally:
        handle.remove()
    seen = []
    torch.func.grad(lambda x: seen.append(is_compiled(net, x.detach())) or x.sum())(x)
    assert seen == [False]
    assert is_compiled(net, x)


def test_scripted_modules_are_called():
    net, x = problems.mlp(), problems.points(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(net.eval())
    assert not is_compiled(scripted, x)
    right(scripted, x, net)


# --- networks written elsewhere -------------------------------------------------------------------


@pytest.fixture
def foreign(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "python_examples"))
    return importlib.import_module("foreign_models")


def test_foreign_models(foreign, capsys, monkeypatch):
    for name, (train, _, many) in foreign.DEMONSTRATIONS.items():
        monkeypatch.setitem(foreign.DEMONSTRATIONS, name, (train, 5, many))
    assert foreign.main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in foreign.DEMONSTRATIONS)
    rows = [line.split() for line in said.splitlines() if " alone " in line]
    assert len(rows) == 5
    # So few steps say nothing but that the samples reach the parameters.
    assert all(row[-6] != row[-4] for row in rows[:3])
    assert "nan" not in said


def test_the_sdf_network_is_a_compiled_field(foreign):
    net = foreign.SDFNetwork(width=32).eval()
    field = MLP.from_module(net, 3)
    x = problems.points(30, dtype=torch.float32)
    F, J = ls.value_and_jacobian(field, x)
    with compiled_fields(False):
        exact = ls.value_and_jacobian(copy.deepcopy(net).double(), x.double())
    torch.testing.assert_close(F, exact[0].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(J, exact[1].float(), rtol=1e-3, atol=1e-3)
