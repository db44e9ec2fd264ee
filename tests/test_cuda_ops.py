"""The ops on a CUDA device against float64 references: dtype x team x l x d, streams, capture."""

import math

import pytest
import reference
import torch

import levelset_ext as ls

pytestmark = pytest.mark.cuda

raw = torch.ops.levelset_ext
AUTO, THREAD, WARP, BLOCK = range(4)
CONVERGED, RUNNING = int(ls.Status.CONVERGED), int(ls.Status.RUNNING)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Relative, for random rows; the arithmetic behind the 16-bit types is float32.
TOLERANCE = {
    torch.float32: 2e-4,
    torch.float64: 1e-11,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
# d - l; around a warp and a block, and long rows.
EXTRA_COLUMNS = [2, 30, 33, 255, 784, 5000]


def rows(n, l, d, dtype, device="cuda", seed=0):  # noqa: E741
    """jacobian (n, l, d), residual (n, l) and gradient (n, d), the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, l, d), (n, l), (n, d)]
    numbers = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).to(device) for x in numbers]


def relative(x, reference):
    error = torch.linalg.vector_norm(x.double().cpu() - reference.cpu(), dim=1)
    return float((error / torch.linalg.vector_norm(reference.cpu(), dim=1)).max())


@pytest.mark.parametrize("extra", EXTRA_COLUMNS)
@pytest.mark.parametrize("l", [1, 2, 3, 8])
@pytest.mark.parametrize("team", [AUTO, THREAD, WARP, BLOCK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_adjoint_and_update_equal_the_reference(dtype, team, l, extra):  # noqa: E741
    n, d = 37, l + extra + (5 if l == 8 else 0)
    jacobian, residual, gradient = rows(n, l, d, dtype)
    if dtype == torch.float16:
        residual = residual * 64  # exact; J^+ r of a long row would have few digits left otherwise
    y, status = raw.pinv_apply(jacobian, residual, team)
    assert (status == CONVERGED).all()
    assert relative(y, reference.pinv_apply(jacobian.cpu(), residual.cpu())) < TOLERANCE[dtype]

    s, status = raw.pinv_adjoint(jacobian, gradient, team)
    assert (status == CONVERGED).all()
    assert (
        relative(s, reference.pinv_adjoint(jacobian.cpu(), gradient.cpu())) < 3 * TOLERANCE[dtype]
    )

    points, level = rows(n, l, d, dtype, seed=1)[2], torch.zeros(1, l, dtype=dtype, device="cuda")
    box = torch.full((d,), 1.5, dtype=dtype, device="cuda")
    moved, status = raw.newton_update(
        points, residual, jacobian, level, None, -box, box, 0.0, 0.25, team
    )
    assert (status == RUNNING).all()
    step = reference.pinv_apply(jacobian.cpu(), residual.cpu())
    length = torch.linalg.vector_norm(step, dim=1, keepdim=True)
    expected = points.double().cpu() - step * (0.25 / length).clamp(max=1.0)
    assert relative(moved, expected.clamp(-1.5, 1.5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("team", [AUTO, THREAD, WARP, BLOCK])
@pytest.mark.parametrize("l", [1, 2, 3])
def test_statuses_mask_and_index_agree_with_the_cpu(l, team):  # noqa: E741
    n, d = 64, 40
    jacobian, values, points = rows(n, l, d, torch.float32, "cpu")
    values[3, 0], jacobian[5, l - 1, 7], points[9, 0] = math.nan, math.inf, math.nan
    jacobian[11] = 0
    values[13] = 1e-4
    if l > 1:
        jacobian[15, 1] = 3 * jacobian[15, 0]
    level = torch.zeros(n + 6, l)
    index = torch.randperm(n + 6)[:n]
    all_points = torch.randn(n + 6, d)
    all_points[index] = points
    status = torch.full((n + 6,), RUNNING, dtype=torch.int8)
    status[index[20:24]] = int(ls.Status.STALLED)
    results = {}
    for device in ("cpu", "cuda"):
        p, s = all_points.to(device).clone(), status.to(device).clone()
        arguments = (t.to(device) for t in (values, jacobian, level, index))
        raw.newton_update_(p, s, *arguments, None, None, 1e-3, math.inf, team)
        results[device] = p.cpu(), s.cpu()
    assert torch.equal(results["cpu"][1], results["cuda"][1])
    torch.testing.assert_close(
        results["cuda"][0], results["cpu"][0], rtol=1e-4, atol=1e-4, equal_nan=True
    )


def test_index_outside_the_points_is_left_out():
    jacobian, values, points = rows(3, 1, 4, torch.float32)
    status = torch.full((3,), RUNNING, dtype=torch.int8, device="cuda")
    index = torch.tensor([-1, 3, 1], device="cuda")
    before = points.clone()
    ls.ops.newton_update_(
        points, status, values, jacobian, torch.zeros(1, device="cuda"), index=index
    )
    assert torch.equal((points != before).any(1).cpu(), torch.tensor([False, True, False]))


@pytest.mark.parametrize("team", [AUTO, THREAD, WARP, BLOCK])
def test_a_bad_row_leaves_the_others_bit_identical(team):
    jacobian, residual, _ = rows(600, 2, 70, torch.float32)
    good = raw.pinv_apply(jacobian, residual, team)[0]
    jacobian[::7] = math.nan
    bad, status = raw.pinv_apply(jacobian, residual, team)
    keep = torch.ones(600, dtype=torch.bool, device="cuda")
    keep[::7] = False
    assert torch.equal(bad[keep], good[keep])
    assert (status[~keep] == int(ls.Status.NON_FINITE)).all()
    assert (bad[~keep] == 0).all()


@pytest.mark.parametrize("team", [THREAD, WARP, BLOCK])
@pytest.mark.parametrize("l", [1, 2, 5])
def test_repeated_runs_give_the_same_bits(l, team):  # noqa: E741
    jacobian, residual, gradient = rows(1000, l, 300, torch.float32)
    first = (
        raw.pinv_apply(jacobian, residual, team)[0],
        raw.pinv_adjoint(jacobian, gradient, team)[0],
    )
    for _ in range(5):
        assert torch.equal(raw.pinv_apply(jacobian, residual, team)[0], first[0])
        assert torch.equal(raw.pinv_adjoint(jacobian, gradient, team)[0], first[1])


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("l", [2, 3])
def test_nearly_parallel_rows(l, angle):  # noqa: E741
    jacobian, residual, _ = rows(200, l, 50, torch.float32, "cpu")
    jacobian[:, -1] = jacobian[:, 0] + angle * jacobian[:, -1]
    y, status = raw.pinv_apply(jacobian.cuda(), residual.cuda())
    assert (status == CONVERGED).all()
    assert relative(y, reference.pinv_apply(jacobian, residual)) < 4e-5 / angle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 3), (300, 5000, 3), (1000, 700, 2), (70, 900, 5), (5, 40000, 3)]
)
def test_nearest_equals_all_pairs(n, m, d, dtype):
    x, cloud = torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype)
    distance, index = ls.ops.nearest_distance(x.cuda(), cloud.cuda())
    expected, _ = reference.nearest_distance(x, cloud)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(distance.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    own = torch.linalg.vector_norm(x.double() - cloud.double()[index.cpu()], dim=1)
    torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


def test_nearest_takes_the_smallest_index_and_shows_a_nan():
    cloud = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], device="cuda").repeat(4000, 1)
    x = torch.tensor([[0.0, 0.0], [-2.0, 0.0], [math.nan, 0.0]], device="cuda")
    distance, index = ls.ops.nearest_distance(x, cloud)
    assert index.tolist() == [0, 1, 0]
    assert distance[:2].tolist() == [1.0, 1.0]
    assert math.isnan(distance[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nearest_in_half_precision(dtype):
    x, cloud = torch.randn(50, 3).to(dtype), torch.randn(800, 3).to(dtype)
    distance, _ = ls.ops.nearest_distance(x.cuda(), cloud.cuda())
    assert distance.dtype == dtype
    expected, _ = reference.nearest_distance(x, cloud)
    torch.testing.assert_close(distance.double().cpu(), expected, rtol=1e-2, atol=1e-3)


def test_empty_batches():
    jacobian, residual, gradient = rows(0, 2, 5, torch.float32)
    assert ls.ops.pinv_apply(jacobian, residual).shape == (0, 5)
    assert ls.ops.pinv_adjoint(jacobian, gradient).shape == (0, 2)
    level = torch.zeros(2, device="cuda")
    assert ls.ops.newton_update(gradient, residual, jacobian, level)[0].shape == (0, 5)
    distance, index = ls.ops.nearest_distance(
        torch.zeros(0, 3, device="cuda"), torch.zeros(4, 3, device="cuda")
    )
    assert distance.shape == index.shape == (0,)


def test_strided_inputs():
    jacobian, residual, _ = rows(20, 2, 30, torch.float32)
    expected = ls.ops.pinv_apply(jacobian, residual)
    strided = jacobian.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.stack([residual, residual], 2)[:, :, 0]
    assert not strided.is_contiguous()
    assert not wide.is_contiguous()
    assert torch.equal(ls.ops.pinv_apply(strided, wide), expected)


def test_runs_on_the_current_stream():
    jacobian, residual, _ = rows(2000, 2, 100, torch.float32)
    expected = ls.ops.pinv_apply(jacobian, residual)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # On another stream the op would read the input long before this delay has passed.
        late = torch.zeros_like(jacobian)
        torch.cuda._sleep(20_000_000)
        late.copy_(jacobian)
        y = ls.ops.pinv_apply(late, residual)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors():
    jacobian, residual, _ = rows(50, 2, 40, torch.float32)
    y = ls.ops.pinv_apply(jacobian.to("cuda:1"), residual.to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.to("cuda:0"), ls.ops.pinv_apply(jacobian, residual))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("level", ["tensor", "number"])
def test_ops_never_wait_for_the_device(level):
    jacobian, values, points = rows(64, 2, 20, torch.float32)
    cloud = torch.randn(500, 3, device="cuda")
    c = torch.zeros(2, device="cuda") if level == "tensor" else 0.5
    status = torch.full((64,), RUNNING, dtype=torch.int8, device="cuda")
    index = torch.arange(64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ls.ops.pinv_apply(jacobian, values)
        ls.ops.pinv_adjoint(jacobian, points)
        ls.ops.newton_update(points, values, jacobian, c)
        ls.ops.newton_update_(points, status, values, jacobian, c, index=index)
        ls.ops.nearest_distance(points[:, :3], cloud)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_newton_update_in_place_can_be_captured_in_a_graph():
    jacobian, values, start = rows(200, 1, 30, torch.float32)
    level = torch.zeros(1, device="cuda")
    points, status = start.clone(), torch.full((200,), RUNNING, dtype=torch.int8, device="cuda")

    def update():
        ls.ops.newton_update_(points, status, values, jacobian, level)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        update()  # kernels are loaded before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    points.copy_(start)
    status.fill_(RUNNING)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    once, _ = ls.ops.newton_update(start, values, jacobian, level)
    twice, _ = ls.ops.newton_update(once, values, jacobian, level)
    assert torch.equal(points, twice)


def test_gradients_and_second_gradients():
    jacobian, residual, gradient = (t.requires_grad_() for t in rows(3, 2, 5, torch.float64))
    for op, other in ((ls.ops.pinv_apply, residual), (ls.ops.pinv_adjoint, gradient)):
        assert torch.autograd.gradcheck(op, (jacobian, other))
        assert torch.autograd.gradgradcheck(op, (jacobian, other))
    level = torch.zeros(2, dtype=torch.float64, device="cuda")

    def update(p, f, j):
        return ls.ops.newton_update(p, f, j, level)[0]

    assert torch.autograd.gradcheck(update, (gradient, residual, jacobian))
    x = torch.randn(4, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    cloud = torch.randn(9, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: ls.ops.nearest_distance(a, b)[0], (x, cloud))


def test_more_rows_than_a_grid_of_single_blocks_holds():
    n = (1 << 20) + 3  # a block per row loops over the rows beyond 2^20
    jacobian = torch.full((n, 1, 2), 2.0, device="cuda")
    residual = torch.arange(n, dtype=torch.float32, device="cuda")[:, None]
    for team in (THREAD, WARP, BLOCK):
        y, status = raw.pinv_apply(jacobian, residual, team)
        assert (status == CONVERGED).all()
        torch.testing.assert_close(y, (residual / 4).expand(n, 2), rtol=1e-5, atol=0)


def test_errors_name_the_argument_and_leave_the_device_usable():
    jacobian, residual, _ = rows(4, 2, 6, torch.float32)
    with pytest.raises(RuntimeError, match="residual"):
        raw.pinv_apply(jacobian, residual.cpu())
    with pytest.raises(RuntimeError, match="team"):
        raw.pinv_apply(jacobian, residual, 9)
    assert ls.ops.pinv_apply(jacobian, residual).shape == (4, 6)
