"""The block algebra against closed forms and float64."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch

from fura_rl.adapters import blocks, frames


@pytest.mark.parametrize(
    ("in_features", "out_features", "expected"),
    [(2048, 2048, 64), (6144, 2048, 96), (2560, 2560, 64), (20, 2, 2), (10, 20, 5), (127, 300, 127), (7, 2, 1)],
)
def test_default_block_size_is_the_factor_pair_nearest_a_square_that_fits_the_rows(in_features, out_features, expected):
    pairs = [(in_features // b, b) for b in range(1, in_features + 1) if in_features % b == 0]
    fitting = [(n, b) for n, b in pairs if b <= out_features]
    square = min((b for n, b in pairs if n <= b), key=lambda b: b)
    nearest = square if square <= out_features else max(b for _, b in fitting)
    assert blocks.default_block_size(in_features, out_features) == nearest == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("out_features", "block_size"), [(24, 8), (23, 4), (24, 24), (6, 12), (12, 12)])
def test_frame_agrees_with_a_float64_svd(out_features, block_size, transposed, monkeypatch):
    monkeypatch.setattr(frames, "WORKSPACE_BYTES", {"cpu": 1})  # one block at a time: the batches must join in order
    monkeypatch.setattr(frames, "PANEL_BYTES", 1)  # panels of block_size rows, the last one shorter
    weight = torch.randn(out_features, 24, dtype=torch.float64)
    frame = frames.svd_frame(weight.mT.contiguous().mT if transposed else weight, block_size)
    for i, block in enumerate(weight.split(block_size, dim=1)):
        _, singular_values, right = torch.linalg.svd(block, full_matrices=False)
        assert torch.allclose(frame.singular_values[i], singular_values, rtol=1e-6)
        overlap = (right @ frame.right[i]).abs()
        assert torch.allclose(overlap, torch.eye(len(right), dtype=torch.float64), atol=1e-6)


def ill_conditioned(condition, out_features=512, in_features=256, size=32):
    """Blocks with geometric spectra from 1 to 1 / condition, rounded to float32."""
    pieces = []
    for _ in range(in_features // size):
        left, _ = torch.linalg.qr(torch.randn(out_features, size, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
        pieces.append(left * condition ** -torch.linspace(0, 1, size, dtype=torch.float64) @ right)
    return torch.cat(pieces, dim=1).float()


def test_frame_of_ill_conditioned_blocks_is_as_good_as_a_float64_svd():
    """Condition number 400, float32 weights: values to 1e-6 of the largest, every direction to float32 rounding."""
    weight = ill_conditioned(400)
    frame = frames.svd_frame(weight, 32)
    for i, block in enumerate(weight.double().split(32, dim=1)):
        _, singular_values, right = torch.linalg.svd(block, full_matrices=False)
        assert (frame.singular_values[i] - singular_values).abs().max() < 1e-6 * singular_values[0]
        assert ((right @ frame.right[i].double()).abs() - torch.eye(32)).abs().max() < 1e-6
        assert (frame.right[i].T @ frame.right[i] - torch.eye(32)).abs().max() < 1e-6


def test_conversion_does_not_depend_on_the_number_of_threads_and_leaves_it_alone():
    """In a process of its own: where vLLM's CPU engine was started, torch's number of threads stays as it is."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(convert_with_one_and_with_two_threads).result()


def convert_with_one_and_with_two_threads():
    frames.THREADED_WORK = 0
    weight, found = ill_conditioned(50), {}

    def of_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    for threads in (1, 2):
        torch.set_num_threads(threads)
        found[threads] = frames.svd_frame(weight, 32)
        assert torch.get_num_threads() == threads
        assert of_a_new_thread() == threads, "a new thread starts as before"
    assert torch.equal(found[1].right, found[2].right)
    assert torch.equal(found[1].singular_values, found[2].singular_values)


def test_signs_are_fixed_so_that_two_conversions_agree():
    frame = frames.svd_frame(torch.randn(16, 12), 4)
    assert torch.equal(frames.fix_signs(-frame.right), frame.right)


def update_of(frame, delta_r, delta_s):
    change = blocks.core_change(frame.right, frame.singular_values, delta_r, delta_s, "train")
    return blocks.block_update(change, frame.right, frame.singular_values)


def test_rank_deficient_directions_are_counted_and_stay_still():
    weight = torch.randn(16, 8, dtype=torch.float64)
    weight[:, 3] = weight[:, 2]  # one direction of block 0 has no column
    frame = frames.svd_frame(weight, 4)
    assert frame.dropped == 1
    update = update_of(frame, torch.randn(2, 4, 4).double(), torch.randn(2, 4).double())
    assert torch.isfinite(update).all()
    missing = torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=torch.float64) / 2**0.5  # the direction x with W_0 x = 0
    assert (missing @ update[0]).abs().max() < 1e-6


def test_update_is_exactly_zero_at_the_start():
    frame = frames.svd_frame(torch.randn(16, 12), 4)
    assert torch.equal(update_of(frame, torch.zeros(3, 4, 4), torch.zeros(3, 4)), torch.zeros(3, 4, 4))


@pytest.mark.parametrize("block_size", [3, 4, 12])
def test_base_form_is_the_papers_formula(block_size):
    """W_i (I + D_i) = U_i diag(S_i) R_i, the right side written from an SVD."""
    weight = torch.randn(16, 12, dtype=torch.float64)
    frame = frames.svd_frame(weight, block_size)
    n = 12 // block_size
    delta_r = 0.1 * torch.randn(n, block_size, block_size, dtype=torch.float64)
    delta_s = 0.1 * torch.randn(n, block_size, dtype=torch.float64)
    update = update_of(frame, delta_r, delta_s)
    folded = weight + blocks.fold(weight, update)
    for i, block in enumerate(weight.split(block_size, dim=1)):
        left = block @ frame.right[i] / frame.singular_values[i]  # U_i
        small_core = frame.right[i].T + delta_r[i]
        expected = left @ torch.diag(frame.singular_values[i] + delta_s[i]) @ small_core
        assert torch.allclose(folded[:, i * block_size : (i + 1) * block_size], expected, atol=1e-8)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(blocks.add_update(x, update) @ weight.T, x @ folded.T, atol=1e-10)


@pytest.mark.parametrize("onto", [False, True])
def test_add_update_has_the_gradients_of_the_plain_formula(onto):
    x, target = torch.randn(2, 3, 12).double().requires_grad_(), torch.randn(2, 3, 12).double().requires_grad_()
    update = torch.randn(3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: blocks.add_update(t[0], t[1], t[2] if onto else None), (x, update, target)
    )
    dense = torch.block_diag(*update)
    assert torch.allclose(blocks.add_update(x, update, target if onto else None), (target if onto else x) + x @ dense.T)


def test_the_random_basis_is_orthonormal_and_fits_by_least_squares():
    weight = torch.randn(16, 8, dtype=torch.float64)
    large, small = frames.random_cores(weight, 4, seed=3)
    for i in range(2):
        left = large[:, 4 * i : 4 * i + 4]
        assert torch.allclose(left.T @ left, torch.eye(4).double(), atol=1e-12)
        assert torch.allclose(small[i], torch.linalg.lstsq(left, weight[:, 4 * i : 4 * i + 4]).solution, atol=1e-12)


def test_the_random_basis_does_not_depend_on_how_many_blocks_are_in_memory_at_once(monkeypatch):
    """A GPU takes more at once than a CPU, and an adapter without its large core must find it again on either."""
    weight = torch.randn(5, 12)
    expected, _ = frames.random_cores(weight, 3, seed=1)
    monkeypatch.setitem(frames.WORKSPACE_BYTES, "cpu", 1)
    large, _ = frames.random_cores(weight, 3, seed=1)
    assert torch.equal(large, expected)


@pytest.mark.parametrize(("rows", "size"), [(50, 12), (8, 12)])
def test_spectral_update_is_the_general_formula_and_its_gradients(rows, size):
    """Also where a block is wider than high, and a direction has no pretrained column: it stays still."""
    weight = torch.randn(rows, 3 * size, dtype=torch.float64)
    weight[:, 0] = weight[:, 1]
    frame = frames.svd_frame(weight, size)
    right, values = frame.right, frame.singular_values
    assert frame.dropped == (rows > size)
    deltas = 0.1 * torch.randn_like(right.mT.contiguous()), 0.1 * torch.randn_like(values)
    ours, plain = ([t.clone().requires_grad_() for t in deltas] for _ in range(2))
    update = blocks.spectral_update(*ours, right, blocks.pseudo_inverse(values))
    expected = blocks.block_update(blocks.core_change(right, values, *plain, "train"), right, values)
    assert torch.allclose(update, expected, atol=1e-12)
    grad = torch.randn_like(update)
    update.backward(grad)
    expected.backward(grad)
    for actual, reference in zip(ours, plain, strict=True):
        assert torch.allclose(actual.grad, reference.grad, atol=1e-10)
    still = values == 0
    assert not ours[1].grad[still].any()
    assert not ours[0].grad[still].any()
