"""LevelSetResult and Status."""

import copy
import pickle

import numpy as np
import problems
import pytest
import torch
from problems import same_bits

import levelset_ext as ls

S = ls.Status
FIELDS = ("points", "values", "jacobian", "level", "status", "iterations")


def result(n=6, event=(3,), l=1):  # noqa: E741
    x = problems.points(n, 3).view(n, *event) if event == (3,) else problems.points(n, 784)
    x = x.view(n, *event)
    fn = problems.mlp(l) if event == (3,) else problems.Classifier()
    return ls.project(fn, x, 0.1, max_iters=3)


def test_status_codes_are_those_of_the_compiled_module():
    from levelset_ext import _C

    assert {s.name: int(s) for s in S} == _C.status_codes
    assert [s.name for s in S] == [
        "CONVERGED", "RUNNING", "MAX_ITERATIONS", "RANK_DEFICIENT", "NON_FINITE", "NOT_BRACKETED",
        "STALLED",
    ]  # fmt: skip
    assert len({int(s) for s in S}) == len(S)
    for status in S:
        assert status.name in S.__doc__
    assert pickle.loads(pickle.dumps(S.STALLED)) is S.STALLED


@pytest.mark.parametrize(("event", "l"), [((3,), 1), ((3,), 2), ((1, 28, 28), 1)])
def test_shapes_and_dtypes(event, l):  # noqa: E741
    r = result(6, event, l)
    assert len(r) == 6
    assert r.points.shape == (6, *event)
    assert r.values.shape == r.level.shape == (6, l)
    assert r.jacobian.shape == (6, l, *event)
    assert r.status.shape == r.iterations.shape == (6,)
    assert r.status.dtype == torch.int8
    assert r.iterations.dtype == torch.int32
    assert r.converged.dtype == r.usable.dtype == torch.bool
    assert r.residual.shape == r.distance.shape == r.converged.shape == r.usable.shape == (6,)
    assert not any(getattr(r, name).requires_grad for name in FIELDS)


def test_residual_is_the_largest_output_and_distance_the_step_still_to_go():
    values = torch.tensor([[3.0, -5.0], [0.5, 0.25]])
    jacobian = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.5, 0.0], [0.0, 0.5]]])
    zeros = torch.zeros(2, dtype=torch.int8)
    r = ls.LevelSetResult(torch.zeros(2, 2), values, jacobian, torch.zeros(2, 2), zeros, zeros)
    assert r.residual.tolist() == [5.0, 0.5]
    torch.testing.assert_close(r.distance, torch.tensor([(1 + 25 / 16) ** 0.5, 1.25**0.5]))
    one = ls.project(problems.Quadric(), problems.points(5), 0.3, max_iters=1)
    length = torch.linalg.vector_norm(one.jacobian[:, 0], dim=1)
    torch.testing.assert_close(one.distance, (one.values - one.level).abs()[:, 0] / length)


def test_distance_and_usable_of_bad_rows():
    x = problems.points(5)
    x[1], x[2, 0] = 0.0, torch.nan
    r = ls.level_points(problems.Quadric(), x)
    assert r.status.tolist() == [0, S.RANK_DEFICIENT, S.NON_FINITE, 0, 0]
    assert r.usable.tolist() == [True, False, False, True, True]
    assert r.rank_status.tolist() == r.status.tolist()
    assert r.distance[1] == torch.inf
    assert r.distance[2].isnan()
    assert r.distance[[0, 3, 4]].tolist() == [0.0, 0.0, 0.0]
    assert r.counts() == {"CONVERGED": 3, "RANK_DEFICIENT": 1, "NON_FINITE": 1}
    spoiled = ls.LevelSetResult(x * 0 + 1, r.values, r.jacobian, r.level, r.status, r.iterations)
    spoiled.values[0] = torch.inf
    assert spoiled.usable.tolist() == [False, False, False, True, True]


def test_rows_of_a_result():
    r = result()
    mask = torch.tensor([True, False, True, False, False, True])
    for rows, index in (
        (slice(1, 4), [1, 2, 3]),
        (mask, [0, 2, 5]),
        (torch.tensor([4, 0, 4]), [4, 0, 4]),
        ([2, 1], [2, 1]),
        (3, [3]),
        (-1, [5]),
        (-6, [0]),
        (np.int64(2), [2]),
        (torch.tensor(-2), [4]),
        (r.residual.argmax(), [int(r.residual.argmax())]),
    ):
        part = r[rows]
        assert isinstance(part, ls.LevelSetResult)
        for name in (*FIELDS, "residual", "converged", "distance", "usable"):
            assert same_bits(getattr(part, name), getattr(r, name)[index]), name
    for row in (6, -7):
        with pytest.raises(IndexError, match=f"row {row} of a result with 6 rows"):
            r[row]


def test_iteration_ends():
    r = result(3)
    assert [len(row) for row in r] == [1, 1, 1]
    assert list(r[:0]) == []


def test_cat_is_undone_by_slices():
    a, b = result(2), result(4)
    both = ls.LevelSetResult.cat([a, b])
    for name in FIELDS:
        assert same_bits(getattr(both[:2], name), getattr(a, name))
        assert same_bits(getattr(both[2:], name), getattr(b, name))


def test_cat_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^results: expected at least one"):
        ls.LevelSetResult.cat([])


def test_the_way_to_disk_and_back_of_the_docstring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"r": result(4), "torch": torch, "LevelSetResult": ls.LevelSetResult}
    before = names["r"]
    lines = ls.LevelSetResult.__doc__.split("::")[-1].strip().splitlines()
    exec("\n".join(line.strip() for line in lines), names)
    assert names["r"] is not before
    for name in FIELDS:
        assert same_bits(getattr(names["r"], name), getattr(before, name))


def test_empty_results():
    r = result()[:0]
    assert len(r) == 0
    assert r.counts() == {}
    assert r.residual.shape == r.distance.shape == r.usable.shape == (0,)


def test_a_result_can_be_pickled_and_copied_and_not_assigned_to():
    r = result()
    _ = r.residual
    for other in (pickle.loads(pickle.dumps(r)), copy.deepcopy(r), copy.copy(r)):
        assert all(same_bits(getattr(other, n), getattr(r, n)) for n in FIELDS)
    with pytest.raises(AttributeError):
        r.points = r.points + 1


def test_level_points_stay_where_they_are():
    fn, x = problems.mlp(2), problems.points(5).requires_grad_()
    r = ls.level_points(fn, x)
    assert same_bits(r.points, x.detach())
    assert r.points.data_ptr() != x.data_ptr()
    assert same_bits(r.level, r.values)
    assert same_bits(r.values, ls.value_and_jacobian(fn, x)[0])
    assert same_bits(r.jacobian, ls.value_and_jacobian(fn, x)[1])
    assert r.converged.all()
    assert not r.iterations.any()
    assert not r.residual.any()
    assert len(ls.level_points(fn, x[:0])) == 0
