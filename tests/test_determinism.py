"""The same bits again: with one and two threads, under torch's deterministic mode, from several
Python threads at once, and for a whole training."""

import sys
import threading
from pathlib import Path

import problems
import pytest
import torch
from problems import same_bits

import levelset_ext as ls
from levelset_ext import ops
from levelset_ext.geometry import (
    curvature,
    intersect_rays,
    ray_crossings,
    sample_level_set,
    trace_curve,
)
from levelset_ext.networks import MLP
from levelset_ext.samplers.pool import SamplePool

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import kill_runs

F32 = torch.float32
NET = problems.mlp(1, 3, 24, F32)


def pinv(l):  # noqa: E741
    jacobian = problems.well_conditioned(4000, l, 5)
    r, g = problems.points(4000, l), problems.points(4000, 5)
    return [*ops.pinv_apply(jacobian, r, return_status=True), ops.pinv_adjoint(jacobian, g)]


def newton(dtype):
    p, values = problems.points(4000, 3, dtype), problems.points(4000, 1, dtype, seed=1)
    jacobian = problems.points(4000, 3, dtype, seed=2)[:, None]
    return list(ops.newton_update(p, values, jacobian, max_step=0.7))


def bracket():
    start, end = problems.points(4000, 3, seed=1), problems.points(4000, 3, seed=2)
    points, status = start.clone(), torch.ones(4000, dtype=torch.int8)
    state = ops.bracket_state(4000)
    ops.bracket_update_(points, status, state, start, end, problems.points(4000, 2, seed=3))
    ops.bracket_update_(points, status, state, start, end, problems.points(4000, 1, seed=4))
    return [points, status, state]


def nearest():
    return list(ops.nearest_distance(problems.points(3000, 3), problems.points(2000, 3, seed=3)))


def parts(result):
    return [result.points, result.values, result.jacobian, result.status, result.iterations]


def compiled():
    """Nothing but the package's own kernels: a network of torch's depends on its matrix product."""
    return parts(ls.project(MLP.from_module(NET), problems.points(700, 3, F32), max_iters=6))


def segments():
    return parts(
        ls.false_position(problems.Torus(), problems.points(900), problems.points(900, seed=2))
    )


def boundary():
    x = problems.points(200, 3)
    labels = (x[:, 0] > 0).long()
    generator = torch.Generator().manual_seed(3)
    samples = ls.find_boundary(
        problems.Sphere(), x, labels, iters=8, step=0.2, box=None, generator=generator
    )
    return [samples.rows, *parts(samples.result)]


def theta():
    fn = problems.Torus()
    result = ls.level_points(fn, problems.points(500))
    loss = ls.sample_network(fn, result).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(fn.parameters()))]


def rays():
    origins, directions = problems.points(300), problems.points(300, seed=5)
    hits = intersect_rays(problems.Torus(), origins, directions, far=4.0)
    crossings = ray_crossings(problems.Torus(), origins, directions, far=4.0)
    return [hits.t, hits.normals, hits.mask, crossings.rows, crossings.t, crossings.length_below]


def curved():
    found = curvature(problems.Torus(), problems.points(200))
    return [found.mean, found.gaussian, found.normals]


def sampled():
    generator = torch.Generator().manual_seed(3)
    box = (torch.full((3,), -2.0), torch.full((3,), 2.0))
    return parts(sample_level_set(problems.Torus(), 60, box, rounds=3, generator=generator))


def pooled():
    generator = torch.Generator().manual_seed(3)
    pool = SamplePool(200, problems.points, jitter=0.05, generator=generator)
    return [pool.draw(problems.Torus(), 60).points for _ in range(5)]


def traced():
    curve = trace_curve(problems.Circle(), problems.points(20), box=(-2.0, 2.0), step=0.05)
    return [torch.from_numpy(part.vertices) for part in curve]


WORK = {
    **{f"pinv, l = {l}": lambda l=l: pinv(l) for l in (1, 2, 4)},  # noqa: E741
    "newton, float32": lambda: newton(F32),
    "newton, float64": lambda: newton(torch.float64),
    **{f.__name__: f for f in (bracket, nearest, compiled, segments, boundary, theta)},
    **{f.__name__: f for f in (rays, curved, sampled, pooled, traced)},
}


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        same = same_bits(a, b) if a.is_floating_point() else torch.equal(a, b)
        assert same, f"{(a != b).sum()} of {a.numel()} numbers differ"


@pytest.fixture
def deterministic():
    """torch's mode: ops without a fixed order raise, and empty memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", list(WORK))
def test_one_thread_and_two_and_the_deterministic_mode_give_the_same_bits(name, request):
    expected = WORK[name]()
    assert_same(WORK[name](), expected)
    torch.set_num_threads(2)
    assert_same(WORK[name](), expected)
    request.getfixturevalue("deterministic")
    assert_same(WORK[name](), expected)


def test_everything_at_once_from_several_python_threads():
    expected = {name: work() for name, work in WORK.items()}
    torch.set_num_threads(2)
    failures = []

    def run(first):
        names = [*expected][first:] + [*expected][:first]
        try:
            for name in names:
                assert_same(WORK[name](), expected[name])
        except BaseException as error:  # a thread's exception would be lost
            failures.append((first, repr(error)))

    threads = [threading.Thread(target=run, args=(4 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_trace_in_one_thread_does_not_touch_the_modules_of_another():
    """torch.fx replaces nn.Module.__call__ and __getattr__ of all threads while it traces."""
    call = torch.nn.Module.__call__
    x = problems.points(50, 3, F32)
    expected = NET(x)
    failures, stop = [], threading.Event()

    def other():
        try:
            while not stop.is_set():
                assert isinstance(NET[0].weight, torch.nn.Parameter)
                assert torch.equal(NET(x), expected)
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=other) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(20):
        MLP.from_module(problems.mlp(1, 3, 8, F32, seed))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert torch.nn.Module.__call__ is call


@pytest.mark.parametrize("name", list(kill_runs.COMMANDS))
def test_a_training_of_the_same_seed_ends_with_the_same_bits(tmp_path, deterministic, name):
    command = kill_runs.COMMANDS[name]
    for folder in ("one", "two"):
        command.run(tmp_path / folder)
    one, two = (kill_runs.results(tmp_path / folder, command) for folder in ("one", "two"))
    assert one == two
