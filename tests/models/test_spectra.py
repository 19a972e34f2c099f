import pytest
import torch
from torch import Tensor

from models.spectra import Standard, limit_spectrum


def make_matrices(number: int = 4, num_regions: int = 20) -> Tensor:
    """Symmetric, indefinite, one eigenvalue far above the others, as connectivities are."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(number, num_regions, num_regions, generator=rng)
    common = torch.rand(number, num_regions, 1, generator=rng)
    return (x + x.transpose(1, 2)) / 2 + 3 * common @ common.transpose(1, 2)


@pytest.mark.parametrize("limit", [0.5, 2.0, 100.0])
def test_eigenvalues_are_held_back_and_eigenvectors_stay(limit: float) -> None:
    x = make_matrices()
    values, vectors = torch.linalg.eigh(x.double())
    assert values.abs().max() > 20
    assert values.min() < -1
    limited = values / (1 + (values / limit).square()).sqrt()
    expected = vectors @ limited.diag_embed() @ vectors.transpose(1, 2)
    # The largest eigenvalue is 40 to 60 times the smallest limit, where the iteration has all but ended.
    torch.testing.assert_close(limit_spectrum(x, limit).double(), expected, atol=1e-4, rtol=0)
    assert (torch.linalg.eigvalsh(limit_spectrum(x, limit)).abs() <= limit * (1 + 1e-4)).all()


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not limit_spectrum(torch.zeros(2, 5, 5), 2.0).any()


def test_an_eigenvalue_far_beyond_the_reach_of_the_iteration_is_finite_and_held_back() -> None:
    found = limit_spectrum(1e4 * torch.ones(1, 10, 10), 0.5)
    assert found.isfinite().all()
    assert torch.linalg.eigvalsh(found).abs().max() <= 0.5 * (1 + 1e-3)


def test_a_standard_is_what_it_says_in_training_and_of_what_it_saw_afterwards() -> None:
    standard, x = Standard(20, momentum=0.1), make_matrices(12)
    for found in standard.eval()(x):  # nothing seen, nothing done
        torch.testing.assert_close(found, x, atol=1e-6, rtol=0)
    whole, difference = standard.train()(x)
    torch.testing.assert_close(difference.mean(dim=0), torch.zeros(20, 20), atol=1e-5, rtol=0)
    torch.testing.assert_close(difference.var(dim=0, correction=0).mean(), torch.tensor(1.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole - difference, whole.mean(dim=0).expand(12, -1, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.eval()(x[:1]).difference, difference[:1], atol=1e-5, rtol=0)


def test_of_subjects_that_do_not_differ_rounding_is_not_blown_up() -> None:
    difference = Standard(20, momentum=0.1).train()(make_matrices(1).expand(3, -1, -1)).difference
    assert difference.abs().max() < 1  # a float32 of these is off by up to 1e-6, a spread of them
