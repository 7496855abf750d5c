"""The algebra of the updates: constraints are met, limits are reached, what is to be kept is kept."""

import logging
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from errata import ErrataError
from errata.parts.solve import factor, null_space, projector, ridge, whiten

D_IN, D_OUT, N = 24, 10, 5


@pytest.fixture
def problem():
    draw = torch.Generator().manual_seed(0)
    K, R = torch.randn(N, D_IN, generator=draw), torch.randn(N, D_OUT, generator=draw)
    text = torch.randn(400, D_IN, generator=draw) @ torch.randn(D_IN, D_IN, generator=draw)
    return K, R, text.T @ text / len(text)


def test_whitening_is_the_inverse(problem):
    K, _, C = problem
    assert torch.allclose(whiten(factor(C), K) @ C.double(), K.double(), atol=1e-8)


def test_factoring_and_solving_hold_no_matrix_besides_the_factor():
    C = torch.eye(256) + 0.1
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        whiten(factor(C), C[:1])
    assert seen.profiler is not None
    found = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = accumulate(event.nbytes() for event in found if event.name() == "[memory]")
    assert max(held) < 1.1 * C.numel() * 8


def test_weight_0_meets_the_constraints(problem):
    K, R, C = problem
    assert torch.allclose(K @ ridge(K, R, factor(C)).delta.T, R, atol=1e-4)


def test_weight_0_disturbs_c_least(problem):
    """Any other update that meets the constraints changes what text gives by more."""
    K, R, C = problem
    best = ridge(K, R, factor(C)).delta
    other = best + torch.randn(D_OUT, D_IN) @ (torch.eye(D_IN) - torch.linalg.pinv(K) @ K)
    assert torch.allclose(K @ other.T, R, atol=1e-3)
    assert (best @ C @ best.T).trace() < (other @ C @ other.T).trace()


def test_weight_0_for_one_key_is_romes_formula(problem):
    K, R, C = problem
    k, r = K[0].double(), R[0].double()
    u = torch.linalg.solve(C.double(), k)
    assert torch.allclose(ridge(K[:1], R[:1], factor(C)).delta.double(), torch.outer(r, u) / (k @ u), atol=1e-5)


@pytest.mark.parametrize("times", [1, 8])
def test_ridge_equals_the_direct_solution(problem, times):
    """Woodbury's n x n system is the paper's d x d one, for fewer and for more keys than they have entries."""
    K, R, C = (t.double() for t in problem)
    K, R = (t.repeat(times, 1) + 0.1 * torch.randn(times * N, t.shape[1]) for t in (K, R))
    direct = R.T @ K @ torch.linalg.inv(7.0 * C + K.T @ K)
    assert torch.allclose(ridge(K, R, factor(C), 7.0).delta.double(), direct, atol=1e-6)


def test_ridge_tends_to_its_limit_as_its_weight_goes_to_0(problem):
    K, R, C = problem
    L, goal = factor(C), ridge(*problem[:2], factor(C)).delta
    far = [(ridge(K, R, L, weight).delta - goal).norm() for weight in (1.0, 1e-2, 1e-4, 1e-6)]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-4 * goal.norm()


def test_the_null_space_update_leaves_what_is_preserved_alone(problem):
    K, R, _ = problem
    kept = torch.randn(N, D_IN)
    P = torch.eye(D_IN).double() - torch.linalg.pinv(kept.double()) @ kept.double()
    delta = null_space(K, R, P, torch.zeros(0, D_IN), 1e-6).delta
    assert (kept @ delta.T).abs().max() < 1e-4
    assert torch.allclose(K @ delta.T, R, atol=1e-2)


@pytest.mark.parametrize("earlier", [0, 3, 40])
def test_the_null_space_update_equals_the_direct_solution(problem, earlier):
    """The dual is AlphaEdit's d_in x d_in system."""
    K, R, C = (t.double() for t in problem)
    P = projector(C, float(torch.linalg.eigvalsh(C).median()))
    past = torch.randn(earlier, D_IN).double()
    A = P @ (K.T @ K + past.T @ past) + 2.0 * torch.eye(D_IN)
    direct = torch.linalg.solve(A, P @ K.T @ R).T
    assert torch.allclose(null_space(K, R, P, past, 2.0).delta.double(), direct, atol=1e-6)


def test_the_null_space_update_moves_earlier_keys_less_when_it_knows_them(problem):
    K, R, _ = problem
    past, P = K + 0.3 * torch.randn(N, D_IN), torch.eye(D_IN)
    moved = [(past @ null_space(K, R, P, p, 1.0).delta.T).norm() for p in (past[:0], past)]
    assert moved[1] < 0.5 * moved[0]


def test_a_projector_spans_the_small_eigenvalues(problem):
    C = problem[2].double()
    values, vectors = torch.linalg.eigh(C)
    P = projector(C, float(values[7]) + 1e-9)
    assert torch.allclose(P, vectors[:, :8] @ vectors[:, :8].T, atol=1e-8)


def test_a_singular_moment_is_regularised_and_said_so(caplog):
    """Dead units (ReLU) give C a zero row."""
    keys = torch.randn(50, D_IN)
    keys[:, 3] = 0
    with caplog.at_level(logging.INFO, logger="errata"):
        L = factor(keys.T @ keys)
    assert whiten(L, keys).isfinite().all()
    assert "singular" in caplog.text


def test_what_is_no_second_moment_is_refused():
    with pytest.raises(ErrataError, match="negative direction"):
        factor(-torch.eye(4))


def test_each_edit_owns_one_column_and_row(problem):
    K, R, C = problem
    change = ridge(K, R, factor(C), 1.0)
    assert change.owners.tolist() == list(range(N))
    assert torch.equal(change.left, R.T)
    assert change.without(2).delta.allclose(change.delta - torch.outer(change.left[:, 2], change.right[2]), atol=1e-6)
