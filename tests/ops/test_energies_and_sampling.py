"""Band energies and sampled gradients, by every backend, against the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from curvfast import ops
from curvfast.errors import ShapeError
from curvfast.ops import reference

BACKENDS = ["torch", "triton"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edges", [[0, 48], [0, 1, 33, 48], [5, 5, 40], [0, 32, 48]])
def test_integers_have_exact_energies(backend: str, dtype: torch.dtype, edges: list[int]) -> None:
    x = torch.randint(-3, 4, (37, 40)).to(dtype)
    vectors = torch.randint(-1, 2, (40, 48)).to(dtype)
    with ops.use_backend(backend):
        found = ops.band_energies(x, vectors, edges)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), reference.band_energies(x, vectors, edges))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bands_of_an_orthonormal_basis_divide_the_energy(backend: str) -> None:
    x = torch.randn(2, 9, 64)
    vectors = torch.linalg.qr(torch.randn(64, 64))[0]
    with ops.use_backend(backend):
        found = ops.band_energies(x, vectors, [0, 10, 40, 64])
    assert found.shape == (2, 9, 3)
    torch.testing.assert_close(found.sum(-1), x.square().sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_activations_and_vectors_do_not_matter(backend: str) -> None:
    x = torch.randint(-3, 4, (40, 37)).float().T
    vectors = torch.randint(-1, 2, (64, 40)).float().T[:, ::2]
    with ops.use_backend(backend):
        found = ops.band_energies(x, vectors, [0, 7, 32])
    assert torch.equal(found.double(), reference.band_energies(x, vectors, [0, 7, 32]))


@pytest.mark.parametrize("edges", [[0], [3, 2], [-1, 4], [0, 9]])
def test_edges_that_are_no_bands_are_refused(edges: list[int]) -> None:
    with pytest.raises(ShapeError, match="edges="):
        ops.band_energies(torch.zeros(3, 8), torch.eye(8), edges)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chosen", [None, [0, 3, 4, 18]])
@pytest.mark.parametrize("classes", [5, 300, 1000])
def test_the_gradient_is_of_the_labels_drawn(
    backend: str, dtype: torch.dtype, chosen: Any, classes: int
) -> None:
    logits = (3 * torch.randn(19, classes)).to(dtype)
    rows = None if chosen is None else torch.tensor(chosen)
    values = logits.clone()
    with ops.use_backend(backend):
        labels = ops.sampled_gradient_(values, rows, generator())
    drawn = torch.arange(19) if rows is None else rows
    assert (labels[drawn] >= 0).all()
    assert (labels[drawn] < classes).all()
    assert int((labels < 0).sum()) == 19 - len(drawn)
    expected = reference.nll_gradient(logits, labels)
    bound = 4 * torch.finfo(dtype).eps
    assert (values.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_follow_the_models_distribution(backend: str) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -float("inf"), 0.5])
    draws = 4000 if backend == "torch" else 500
    with ops.use_backend(backend):
        labels = ops.sampled_gradient_(logits.repeat(draws, 1), None, generator(3))
    counts = torch.bincount(labels, minlength=6).double()
    expected = draws * logits.double().softmax(0)
    assert counts[4] == 0
    likely = expected > 0
    chi_square = ((counts - expected)[likely].square() / expected[likely]).sum()
    assert chi_square < 20.5  # 4 degrees of freedom: exceeded once in 2,500 seeds


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_seed_gives_one_draw(backend: str) -> None:
    logits = torch.randn(6, 400)
    with ops.use_backend(backend):
        one, two, other = (
            ops.sampled_gradient_(logits.clone(), None, generator(seed)) for seed in (1, 1, 2)
        )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_global_generator_is_not_drawn_from(backend: str) -> None:
    state = torch.get_rng_state()
    with ops.use_backend(backend):
        ops.sampled_gradient_(torch.randn(4, 50, generator=generator()), None, generator())
    assert torch.equal(torch.get_rng_state(), state)


def philox(seed: int, row: int, classes: int) -> np.ndarray:
    """Philox 4x32-10 (Salmon et al., 2011) at counters (class, row, row >> 31, 0), first word."""
    low = 0xFFFFFFFF
    c = [np.arange(classes, dtype=np.uint64), row & 0x7FFFFFFF, row >> 31, 0]
    c = [np.asarray(word, np.uint64) + np.zeros(classes, np.uint64) for word in c]
    k = [seed & low, seed >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c = [
            high_b ^ c[1] ^ np.uint64(k[0]), b & np.uint64(low),
            high_a ^ c[3] ^ np.uint64(k[1]), a & np.uint64(low),
        ]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c[0]


def test_the_kernels_labels_are_the_largest_noisy_logits() -> None:
    logits = torch.randn(5, 700)
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator(8)))
    with ops.use_backend("triton"):
        labels = ops.sampled_gradient_(logits.clone(), None, generator(8))
    for row in range(5):
        uniform = (philox(seed, row, 700).astype(np.float64) + 0.5) / 2**32
        noisy = logits[row].double().numpy() - np.log(-np.log1p(-uniform))
        assert int(labels[row]) == int(noisy.argmax())


def test_autograd_notices_the_overwritten_logits() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    logits = torch.tanh(x)
    total = logits.sum()
    with ops.use_backend("triton"):
        ops.sampled_gradient_(logits.detach(), None, generator())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_rows_must_be_flattened() -> None:
    with pytest.raises(ShapeError, match="rows, classes"):
        ops.sampled_gradient_(torch.zeros(2, 3, 4), None, generator())
