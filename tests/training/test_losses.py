"""Cross-entropy against torch's, and the chunked one against the plain one, float64 and finite differences."""

import pytest
import torch
from torch.nn import functional as F

from pellucid.training.losses import cross_entropy, linear_cross_entropy

N, D, V = 23, 8, 37


def inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    table = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[0, 5, 6, 7, 8, 9, 22]] = -100  # with chunks of 5, chunk 1 is ignored entirely
    return hidden, table, targets


def test_plain_cross_entropy_equals_torchs():
    hidden, table, targets = inputs()
    logits = hidden @ table.T
    loss = cross_entropy(logits, targets)
    assert torch.allclose(loss.total, F.cross_entropy(logits, targets, reduction="sum"), rtol=1e-14)
    assert torch.allclose(loss.per_token_N, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-13)
    assert loss.count == 16
    assert loss.z_loss == 0


def test_z_loss_by_hand():
    # logsumexp(0, ln 3) = ln 4; the ignored row counts in nothing
    logits = torch.tensor([[0.0, 3.0], [9.0, 9.0]]).double()
    logits[0, 1] = torch.tensor(3.0).double().log()
    loss = cross_entropy(logits, torch.tensor([1, -100]), z_loss_weight=0.5)
    ln4 = torch.tensor(4.0).double().log()
    assert torch.allclose(loss.z_loss, 0.5 * ln4**2)
    assert torch.allclose(loss.total, torch.tensor(4 / 3).double().log() + 0.5 * ln4**2)


@pytest.mark.parametrize("chunk_size", [1, 5, 23, 100, None])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_chunked_equals_plain_in_float64(chunk_size, z_loss_weight):
    hidden, table, targets = inputs()
    plain = cross_entropy(0.7 * (hidden @ table.T), targets, z_loss_weight=z_loss_weight)
    expected = torch.autograd.grad(plain.total * 0.3, (hidden, table))
    chunked = linear_cross_entropy(
        hidden, table, targets, multiplier=0.7, z_loss_weight=z_loss_weight, chunk_size=chunk_size
    )
    found = torch.autograd.grad(chunked.total * 0.3, (hidden, table))
    for a, b in zip((*expected, plain.total, plain.per_token_N, plain.z_loss, plain.count),
                    (*found, chunked.total, chunked.per_token_N, chunked.z_loss, chunked.count), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)
    assert not chunked.per_token_N.requires_grad


def test_gradient_equals_finite_differences():
    hidden, table, targets = inputs()
    loss = lambda h, w: linear_cross_entropy(h, w, targets, multiplier=0.7, z_loss_weight=0.1, chunk_size=5).total
    gradients = torch.autograd.grad(loss(hidden, table), (hidden, table))
    step = 1e-5  # central differences: error about step² times the third derivative
    with torch.no_grad():
        for tensor, gradient in zip((hidden, table), gradients, strict=True):
            for place in range(tensor.numel()):
                values = []
                for sign in (1, -1):
                    tensor.view(-1)[place] += sign * step
                    values.append(loss(hidden, table))
                    tensor.view(-1)[place] -= sign * step
                slope = (values[0] - values[1]) / (2 * step)
                assert abs(slope - gradient.view(-1)[place]) < 1e-7


@pytest.mark.parametrize("frozen", ["hidden", "table"])
def test_gradient_of_one_operand_alone(frozen):
    hidden, table, targets = inputs()
    expected = torch.autograd.grad(cross_entropy(hidden @ table.T, targets).total, (hidden, table))
    (hidden if frozen == "hidden" else table).requires_grad_(False)
    linear_cross_entropy(hidden, table, targets, chunk_size=4).total.backward()
    found, wanted = (table.grad, expected[1]) if frozen == "hidden" else (hidden.grad, expected[0])
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_all_targets_ignored_gives_zero_loss_and_zero_gradients():
    hidden, table, targets = inputs()
    loss = linear_cross_entropy(hidden, table, torch.full_like(targets, -100), z_loss_weight=0.1, chunk_size=5)
    loss.total.backward()
    assert loss.total == 0 and loss.count == 0
    assert not hidden.grad.any() and not table.grad.any()


def test_a_nan_in_an_ignored_row_reaches_neither_loss_nor_other_rows():
    hidden, table, targets = inputs()
    with torch.no_grad():
        hidden[5] = torch.nan
    loss = linear_cross_entropy(hidden, table, targets, chunk_size=5)
    loss.total.backward()
    assert loss.total.isfinite()
    assert hidden.grad.isfinite().all()


def test_a_nan_in_a_real_row_is_not_hidden():
    hidden, table, targets = inputs()
    with torch.no_grad():
        hidden[1] = torch.nan
    loss = linear_cross_entropy(hidden, table, targets, chunk_size=5)
    loss.total.backward()
    assert loss.total.isnan() and loss.per_token_N[1].isnan() and loss.per_token_N[2].isfinite()
    assert table.grad.isnan().any()


def test_fp32_agrees_with_float64_to_rounding():
    hidden, table, targets = inputs()
    exact = torch.autograd.grad(linear_cross_entropy(hidden, table, targets).total, (hidden, table))
    hidden, table, targets = inputs(torch.float32)
    found = torch.autograd.grad(linear_cross_entropy(hidden, table, targets, chunk_size=5).total, (hidden, table))
    for a, b in zip(exact, found, strict=True):
        assert (a - b).norm() / a.norm() < 1e-6  # a few roundings of 6e-8


def test_bf16_products_with_an_fp32_master_table():
    hidden, table, targets = inputs(torch.bfloat16)
    table = table.detach().float().requires_grad_()
    loss = linear_cross_entropy(hidden, table, targets, multiplier=0.7, chunk_size=5)
    assert loss.total.dtype == torch.float32
    grad_hidden, grad_table = torch.autograd.grad(loss.total, (hidden, table))
    assert grad_hidden.dtype == torch.bfloat16 and grad_table.dtype == torch.float32
    h, w = hidden.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    exact = cross_entropy(0.7 * (h @ w.T), targets)
    wanted = torch.autograd.grad(exact.total, (h, w))
    # bf16 keeps 8 bits: 2^-9 = 0.2 % a rounding, of the logits, the slopes and the products
    assert abs(loss.total.item() / exact.total.item() - 1) < 5e-3
    for a, b in zip(wanted, (grad_hidden, grad_table), strict=True):
        assert (a - b).norm() / a.norm() < 1e-2


def test_without_gradients_the_same_loss():
    hidden, table, targets = inputs()
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, table, targets, chunk_size=5)
    assert quiet.total == linear_cross_entropy(hidden, table, targets, chunk_size=5).total
    assert not quiet.total.requires_grad


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    hidden, table, targets = inputs()
    total = linear_cross_entropy(hidden, table, targets).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward pass"):
        total.backward()


def test_all_logits_are_never_held():
    """The largest tensor made in forward and backward is the table's gradient, not N x V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    hidden, table = torch.randn(512, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    targets = torch.randint(0, 300, (512,))
    with Watch():
        linear_cross_entropy(hidden, table, targets, z_loss_weight=0.1, chunk_size=16).total.backward()
    assert max(sizes) == 16 * 300
