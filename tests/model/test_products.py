"""Matrix products against float64, by every way this processor has for them: views, chosen rows, wider results, odd sizes."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pellucid.model.kernels import native, products
from pellucid.model.kernels.products import batched_product, linear, product, transposed_product

DTYPES = list(native.SUFFIXES)
OWN_SERVES = {dtype: native.fits(torch.ones(1, dtype=dtype)) and native.has("product", dtype) for dtype in DTYPES}
WAYS = ["torch", "emulated", *(["own"] if any(OWN_SERVES.values()) else [])]


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@contextmanager
def served_by(way):
    """torch's libraries, fp32 in bf16's place, or products.cpp where it was built (whosever the processor is)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_lacks_bf16", lambda: way == "emulated")
        patch.setattr(products, "own_serves", lambda dtype: way == "own" and OWN_SERVES[dtype])
        yield


@pytest.fixture(params=WAYS)
def way(request):
    with served_by(request.param):
        yield request.param


def rounded(way, dtype):
    """To what a product is rounded before it is widened: torch's bf16 products are."""
    return dtype if way == "torch" or (way == "own" and not OWN_SERVES[dtype]) else torch.float32


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def assert_close(found, left, right, added=0.0, rounded=torch.float32):
    """found = left @ right + added, of [.., M, K] and [.., K, N]: sums within their rounding in fp32, each rounded once; the
    product to `rounded` before."""
    left, right = left.double(), right.to(left.dtype).double()
    before = torch.finfo(rounded).eps / 2 * (left @ right).abs()
    exact, size = left @ right + added, left.abs() @ right.abs() + abs(added)
    assert found.shape == exact.shape and not found.isnan().any()
    within = 2**-23 * (left.shape[-1] + 2) ** 0.5 * size + torch.finfo(found.dtype).eps / 2 * exact.abs() + before + 1e-30
    assert ((found.double() - exact).abs() <= 1.01 * within).all(), ((found.double() - exact).abs() / size).max()


def inside(tensor, memory):
    """The same numbers as a part of a larger matrix that is NaN around them."""
    whole = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    part = whole[tuple(slice(1, size + 1) for size in tensor.shape)]
    part.copy_(tensor)
    return part if memory == "inside" else tensor


sizes = st.integers(1, 70)


@settings(deadline=None, max_examples=150)
@given(sizes, sizes, sizes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["own", "inside"]))
@example(2100, 33, 40, torch.float32, False, False, True, "own")  # sums in two pieces
@example(33, 2100, 4200, torch.bfloat16, False, True, False, "own")  # the same in bf16, more columns than rows
@example(530, 540, 2050, torch.float32, False, False, False, "own")  # more columns than are shared at once
@example(1, 1, 1, torch.bfloat16, True, True, True, "inside")
def test_product_of_views_and_masters_and_chosen_rows(M, N, K, dtype, turned_x, turned_weight, choose, memory):
    torch.manual_seed(M * N + K)
    x = inside(random(K, M, dtype=dtype), memory).t() if turned_x else inside(random(M, K, dtype=dtype), memory)
    weight = inside(random(K, N), memory).t() if turned_weight else inside(random(N, K), memory)
    for way in WAYS:
        with served_by(way):
            rows = torch.randint(0, M, (M + 20,)) if choose else None
            meant = x if rows is None else x[rows]
            assert_close(product(x, weight, rows=rows), meant, weight.t())
            into = inside(torch.zeros(len(meant), N, dtype=dtype), "inside")
            assert_close(product(x, weight.to(dtype), out=into, rows=rows), meant, weight.t())
            assert into._base.isnan().sum() == into._base.numel() - into.numel(), "nothing is written around it"


@settings(deadline=None, max_examples=100)
@given(sizes, sizes, st.integers(0, 90), st.sampled_from(DTYPES), st.booleans(), st.booleans())
@example(40, 33, 5000, torch.bfloat16, True, False)
@example(33, 40, 2100, torch.float32, True, True)
@example(700, 400, 20, torch.float32, False, False)  # written past the caches, by whole lines
@example(400, 700, 4200, torch.bfloat16, False, False)  # the same in two pieces; not all lines are whole
def test_gradient_of_a_weight(O, I, M, dtype, choose, add):
    torch.manual_seed(O * I + M)
    for way in WAYS:
        with served_by(way):
            left, right, rows = random(M + 5, O, dtype=dtype), random(M + 5, I, dtype=dtype), torch.randint(0, M + 5, (M,))
            before = random(O, I) if add else torch.zeros(O, I)
            for chosen in ("left_rows", "right_rows") if choose else ("none",):
                factors = [(left[rows], right[:M]), (left[:M], right[rows]), (left[:M], right[:M])]
                meant = factors[["left_rows", "right_rows", "none"].index(chosen)]
                given = (left if chosen == "left_rows" else left[:M], right if chosen == "right_rows" else right[:M])
                names = {chosen: rows} if choose else {}
                out = transposed_product(*given, out=before.clone(), add=add, **names)
                assert_close(out, meant[0].t(), meant[1], before.double(), rounded(way, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_batched_products_of_views_into_views(way, dtype, B):
    a, b = random(B, 40, 24, dtype=dtype), random(B, 33, 24, dtype=dtype).mT
    assert_close(batched_product(a, b), a, b)
    assert_close(batched_product(a.mT[:, :, 3:30], a[:, 3:30]), a.mT[:, :, 3:30], a[:, 3:30])
    whole = torch.zeros(B, 70, 33, dtype=dtype)
    assert_close(batched_product(a, b, out=whole[:, 10:50]), a, b)
    assert not whole[:, :10].any() and not whole[:, 50:].any()
    total = torch.ones(B, 50, 33)
    batched_product(a, b, out=total[:, 5:45], add=True)
    assert_close(total[:, 5:45], a, b, 1.0, dtype if way == "emulated" else rounded(way, dtype))
    assert (total[:, :5] == 1).all() and (total[:, 45:] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_its_gradients_with_an_fp32_master(way, dtype):
    x, weight = random(3, 9, 24, dtype=dtype).requires_grad_(), random(40, 24).requires_grad_()
    slope = random(3, 9, 40, dtype=dtype)
    y = linear(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), slope)
    assert y.dtype == grad_x.dtype == dtype and grad_weight.dtype == torch.float32
    assert_close(y.detach(), x.detach(), weight.detach().t())
    assert_close(grad_x, slope, weight.detach())
    exact = torch.einsum("abo,abi->oi", slope.double(), x.detach().double())
    assert (grad_weight - exact).norm() < {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_company_and_on_any_number_of_threads(way, dtype):
    x, weight = random(200, 90, dtype=dtype), random(150, 90)
    exact = way == "own" and OWN_SERVES[dtype]  # to the bit; torch's libraries split sums as they like
    within = {"rtol": 0, "atol": 0} if exact else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    whole = product(x, weight)
    torch.testing.assert_close(product(x[50:70], weight), whole[50:70], **within)
    torch.testing.assert_close(product(x, weight[30:]), whole[:, 30:], **within)
    torch.set_num_threads(1)
    torch.testing.assert_close(product(x, weight), whole, **within)


def test_what_products_cpp_does_not_take_is_torchs(way):
    x, none = random(20, 24), random(0, 24)
    assert linear(none.requires_grad_(), random(40, 24)).shape == (0, 40)
    half = random(40, 24).bfloat16().requires_grad_()  # weights held in bf16 under fp32 activations
    y = linear(x, half)
    y.sum().backward()
    assert_close(y.detach(), x, half.detach().float().t())
    assert half.grad.dtype == torch.bfloat16
    left, turned = random(20, 24), torch.zeros(24, 24).t()
    assert_close(transposed_product(left, x, out=turned), left.t(), x)
    with pytest.raises((ValueError, RuntimeError)):
        product(x, random(40, 25))


@pytest.mark.skipif(not native.fits(torch.ones(1)), reason="no compiled kernels here")
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), *[st.sampled_from(DTYPES)] * 2, st.integers(0, 9), st.integers(0, 2**31))
@example(1200, 130, torch.bfloat16, torch.float32, 0, 1)
def test_one_row_is_the_product_in_every_pair_of_dtypes_and_on_any_number_of_threads(O, K, dtype, held, gap, seed):
    torch.manual_seed(seed)
    x, weight = random(1, 1, K, dtype=dtype), random(O, K + gap, dtype=held)[:, gap:]
    with torch.no_grad():
        found = linear(x, weight)
        assert found.dtype == dtype and found.shape == (1, 1, O)
        assert_close(found.view(1, O), x.view(1, K), weight.t())
        torch.set_num_threads(1)
        assert torch.equal(linear(x, weight), found)
        torch.set_num_threads(2)
        weight[O // 2, K // 2] = torch.nan
        assert linear(x, weight).isnan().view(O).nonzero().tolist() == [[O // 2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row(way, dtype):
    x, weight = random(40, 20, dtype=dtype), random(24, 20)
    x[7, 3] = torch.nan
    assert product(x, weight).isnan().all(1).nonzero().tolist() == [[7]] and product(x, weight).isnan().sum() == 24
