"""Each Triton kernel against float64 on fresh random inputs, forward and backward: odd sizes, nobody, one token, all to one."""

import math

import pytest
import torch
from torch.nn import functional as F

from pellucid import doctor
from pellucid.model.kernels import gpu
from pellucid.training.losses import plain_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LARGE = lambda *values: pytest.param(*values, marks=pytest.mark.gpu)
EPS = {torch.float32: 2**-18, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # sums of hundreds of products; e^30 costs 30 ulp
TANH = 2**-10 if DEVICE == "cuda" else 0.0  # what the hardware's tanh may add


def both(function, reference, tensors, grad_like=None):
    """Outputs and gradients of the kernel and of the float64 reference, for the same random incoming gradient."""
    ours = [t.detach().clone().requires_grad_() for t in tensors]
    theirs = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = function(*ours), reference(*theirs)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    return (y, *(t.grad for t in ours)), (expected, *(t.grad for t in theirs))


def assert_close(ours, expected, bound):
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.isfinite(a).all()
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
        assert error < bound, (number, float(error))


def plain_attention(q, k, v, key_document, query_document, multiplier, cap):
    T = q.shape[2]
    logits = cap * torch.tanh(torch.einsum("bktgd,bksd->bkgts", q, k) * multiplier / cap)
    visible = torch.ones(T, T, device=q.device).tril().bool() & (query_document[:, :, None] == key_document[:, None])
    weights = logits.exp() * visible[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("bkgts,bksd->bktgd", weights, v)


@pytest.mark.parametrize(("shape", "dtype", "scale", "length"), [
    ((1, 2, 70, 3, 16), torch.float32, 6.0, 10),  # logits deep in the cap; blocks cut documents and heads
    ((1, 1, 33, 1, 24), torch.float32, 1.0, 10),
    ((1, 2, 1, 6, 32), torch.float32, 1.0, 10),
    ((2, 1, 260, 2, 16), torch.float32, 1.0, 150),  # blocks that see everything beside blocks that a document ends in
    ((1, 1, 45, 2, 32), torch.bfloat16, 1.0, 10),
    ((1, 1, 40, 2, 32), torch.float16, 1.0, 10),
    LARGE((2, 2, 2048, 6, 128), torch.bfloat16, 1.0, 10),
    LARGE((2, 2, 2048, 6, 128), torch.bfloat16, 1.0, 500),
    LARGE((1, 1, 8192, 6, 128), torch.bfloat16, 1.0, 10**9),
    LARGE((1, 3, 1000, 4, 64), torch.float32, 2.0, 100),
])  # fmt: skip
def test_attention(shape, dtype, scale, length):
    """length: of a document, on average; a pad in two of them."""
    from pellucid.model.kernels.gpu.attention import capped_attention, ranges

    torch.manual_seed(0)
    B, K, T, G, d = shape
    q, k, v = (torch.randn(s, dtype=dtype, device=DEVICE) for s in ((B, K, T, G, d), (B, K, T, d), (B, K, T, d)))
    query_document = (torch.rand(B, T, device=DEVICE) < 1 / length).cumsum(1).int()
    key_document = query_document.masked_fill(torch.rand(B, T, device=DEVICE) < 0.5 / length, -1)  # pads in the text
    settings = {"multiplier": d**-0.5, "cap": 30.0}
    of = ranges(key_document, query_document)
    results = both(lambda *x: capped_attention(*x, key_document, query_document, of, **settings),
                   lambda *x: plain_attention(*x, key_document, query_document, **settings), (q * scale, k * scale, v))  # fmt: skip
    if T == 1:  # softmax over one key has no gradient for q and k: rounding is all there is
        assert_close(results[0][:1] + results[0][3:], results[1][:1] + results[1][3:], EPS[dtype] + TANH)
        assert results[0][1].abs().max() < 1e-5 and results[0][2].abs().max() < 1e-5
    else:
        assert_close(*results, EPS[dtype] * (4 if dtype != torch.float32 else 1) + TANH)


def test_attention_with_documents_out_of_order():
    from pellucid.model.kernels.gpu.attention import capped_attention, ranges

    torch.manual_seed(1)
    q, k, v = torch.randn(1, 1, 50, 2, 16, device=DEVICE), *torch.randn(2, 1, 1, 50, 16, device=DEVICE)
    document = torch.tensor([[3] * 20 + [1] * 15 + [3] * 15], dtype=torch.int32, device=DEVICE)
    ours = capped_attention(q, k, v, document, document, ranges(document, document), multiplier=1.0, cap=30.0)
    expected = plain_attention(q.double(), k.double(), v.double(), document, document, 1.0, 30.0)
    assert_close([ours], [expected], EPS[torch.float32] + TANH)


def test_a_query_that_may_read_nothing_gives_zeros():
    from pellucid.model.kernels.gpu.attention import capped_attention, ranges

    q, k, v = torch.randn(1, 1, 4, 1, 16, device=DEVICE), *torch.randn(2, 1, 1, 4, 16, device=DEVICE)
    documents = torch.tensor([[-1, -1, 0, 0]], dtype=torch.int32, device=DEVICE), torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
    out = capped_attention(q, k, v, *documents, ranges(*documents), multiplier=1.0, cap=30.0)
    assert (out[0, 0, :2] == 0).all() and (out[0, 0, 2:] != 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 70, 2, 16), LARGE((1, 2, 1024, 6, 128))])
def test_gradients_where_every_row_reads_one_key_almost_alone(shape):
    """An attention sink in bf16: the gradient of a logit is a difference with the output, whose rounding is larger than it."""
    from pellucid.model.kernels.gpu.attention import capped_attention, ranges

    torch.manual_seed(2)
    B, K, T, G, d = shape
    q, k, v = (torch.randn(s, device=DEVICE) for s in ((B, K, T, G, d), (B, K, T, d), (B, K, T, d)))
    pull = ((math.log(T) + 4) / d**0.5) ** 0.5  # along all d: the first key's logit is about log T + 4, the others' around 0
    k[:, :, 0], q = pull, q + pull
    document, settings = torch.zeros(B, T, dtype=torch.int32, device=DEVICE), {"multiplier": d**-0.5, "cap": 30.0}
    (_, *ours), (_, *expected) = both(
        lambda *x: capped_attention(*x, document, document, ranges(document, document), **settings),
        lambda *x: plain_attention(*x, document, document, **settings), [x.bfloat16() for x in (q, k, v)])  # fmt: skip
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 3, 2, 16), (1, 5, 1, 1, 6), (1, 4, 3, 6, 128), LARGE((2, 2048, 8, 6, 128))])
def test_rotary(shape, dtype):
    from pellucid.model.kernels.gpu.rotary import rotate
    from pellucid.model.kernels.rotary import rotate_plain
    from pellucid.model.layers import rotary_phases

    torch.manual_seed(0)
    phases = rotary_phases(torch.randint(0, 4096, shape[:2], device=DEVICE), shape[-1], 10000.0)
    x = torch.randn(shape, dtype=dtype, device=DEVICE)
    wide = lambda x: rotate_plain_in_double(x, *phases)
    assert rotate_plain(x, *phases).shape == rotate(x, *phases).shape
    assert_close(*both(lambda x: rotate(x, *phases), wide, (x,)), EPS[dtype])


def rotate_plain_in_double(x, cos, sin):
    first, second = x.chunk(2, -1)
    c, s = (t.double()[:, :, None, None, : x.shape[-1] // 2] for t in (cos, sin))
    return torch.cat([first * c - second * s, second * c + first * s], -1).transpose(1, 2)


@pytest.mark.parametrize("N", [1, 64, 200])
@pytest.mark.parametrize(("E", "k"), [(8, 2), (5, 3), (2, 2)])
def test_routing(N, E, k):
    from pellucid.model.kernels.gpu.routing import route, sort_by_expert

    torch.manual_seed(N)
    logits, bias = torch.randn(N, E, device=DEVICE) * 3, torch.randn(E, device=DEVICE) / 10
    logits[0], bias[0] = 1.0, bias[1]  # equals: the lower index comes first
    chosen = route(logits, bias, k)[1]
    expected = torch.sort(logits.softmax(-1) + bias, dim=-1, descending=True, stable=True).indices[:, :k]
    assert (chosen == expected).all()
    weight, other = torch.randn(N, E, device=DEVICE), torch.randn(N, k, device=DEVICE)

    def reference(x):
        p = x.softmax(-1)
        return torch.cat([p * weight, p.gather(1, chosen) * other], 1)

    def ours(x):
        p, _, gate = route(x, bias, k)
        return torch.cat([p * weight, gate * other], 1)

    assert_close(*both(ours, reference, (logits,)), 1e-5)
    order = sort_by_expert(chosen, E)
    assert order.tokens_E.tolist() == chosen.flatten().bincount(minlength=E).tolist()
    at = torch.cat([torch.arange(int(f), int(f + n)) for f, n in zip(order.first_E, order.tokens_E, strict=True)]).to(DEVICE)
    stable = torch.sort(chosen.flatten(), stable=True).indices
    assert (order.token_M[at] == stable // k).all() and int((order.token_M >= 0).sum()) == N * k
    assert (order.row_Nk.flatten()[stable] == at).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "D", "E"), [(1, 16, 8), (70, 40, 5), (33, 130, 2), LARGE(5000, 6144, 8), LARGE(777, 1536, 64)])
def test_router_scores(N, D, E, dtype):
    from pellucid.model.kernels.gpu.router import router_scores

    torch.manual_seed(N)
    x, weight = torch.randn(N, D, device=DEVICE).to(dtype), torch.randn(E, D, device=DEVICE) / D**0.5
    (y, grad_x, grad_weight), expected = both(router_scores, lambda x, w: x @ w.T, (x, weight))
    assert y.dtype == grad_weight.dtype == torch.float32 and grad_x.dtype == dtype
    assert_close((y, grad_weight), (expected[0], expected[2]), 2**-18)  # in fp32, whatever x is
    assert_close((grad_x,), (expected[1],), EPS[dtype])


@pytest.mark.parametrize("rule", ["adam", "adamw"])
@pytest.mark.parametrize("numel", [1, 300, LARGE(5_000_001)])
def test_update_is_the_plain_rule_s(rule, numel):
    """Four steps with the gradient scaled on the way, against the rule in float64."""
    from pellucid.model.kernels.gpu.update import adam_
    from pellucid.training.optimizers import RULES

    torch.manual_seed(numel)
    settings = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    weight = torch.randn(numel, device=DEVICE)
    exp_avg, exp_avg_sq = torch.zeros(2, numel, device=DEVICE)
    copy, expected, state = torch.empty(numel, dtype=torch.bfloat16, device=DEVICE), weight.double(), {}
    for step in range(1, 5):
        grad = torch.randn(numel, device=DEVICE) * 10 ** torch.randint(-6, 3, (numel,), device=DEVICE)
        update = RULES[rule](expected, grad.double() * 0.3, state, weight_decay=0.1, **settings)
        expected, state = update.weight_after, update.state
        decay = {"decay": 0.1, "l2": 0.0} if rule == "adamw" else {"decay": 0.0, "l2": 0.1}
        adam_(weight, grad, exp_avg, exp_avg_sq, copy, clip=0.3, step=step, **settings, **decay)
        assert_close((weight, exp_avg, exp_avg_sq), (expected, state["exp_avg"], state["exp_avg_sq"]), 1e-6)
        rounded = weight.bfloat16()  # the interpreter cuts off instead
        assert torch.equal(copy, rounded) if DEVICE == "cuda" else ((copy - weight).abs() <= weight.abs() * 2**-7).all()


@pytest.mark.parametrize(("numel", "first"), [(1, 0), (700, 2**33 + 5), LARGE(5_000_001, 2**34)])
def test_moments_are_rounded_as_by_the_plain_function_bit_for_bit(numel, first):
    from pellucid.model.kernels.gpu.update import round_up_or_down
    from pellucid.training.optimizers.rounding import round_plain

    torch.manual_seed(numel)
    x = torch.randn(numel, device=DEVICE) * 10.0 ** torch.randint(-44, 38, (numel,), device=DEVICE)
    x[::97] = float("nan")
    x[1::97] = float("inf")
    for key in (-(2**63) + 1, 2**62 + 1, 12345):
        found, expected = round_up_or_down(x, key, first), round_plain(x, key, first)
        assert torch.equal(found.isnan(), x.isnan())
        assert torch.equal(found.view(torch.int16)[~x.isnan()], expected.view(torch.int16)[~x.isnan()])


def test_a_token_that_is_not_a_number_chooses_experts_that_exist():
    from pellucid.model.kernels.gpu.routing import route, sort_by_expert

    logits = torch.randn(9, 6, device=DEVICE)
    logits[4, 2] = float("nan")
    probs, chosen, gate = route(logits, torch.zeros(6, device=DEVICE), 2)
    assert chosen[4].tolist() == [0, 1] and gate[4].isnan().all() and probs[4].isnan().all()
    assert int((sort_by_expert(chosen, 6).token_M >= 0).sum()) == 18 and not gate[5].isnan().any()


@pytest.mark.gpu
def test_a_weight_s_gradient_is_summed_in_fp32():
    """Also onto what is there: cuBLAS adds bf16 products to fp32 without rounding them between."""
    from pellucid.model.kernels.products import transposed_product

    left, right = torch.randn(999, 64, device="cuda").bfloat16(), torch.randn(999, 48, device="cuda").bfloat16()
    exact = left.double().t() @ right.double()
    out = transposed_product(left, right, torch.full((64, 48), float("nan"), device="cuda"))
    assert (out - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (transposed_product(left, right, out, add=True) - 2 * exact).abs().max() < 1e-5 * exact.abs().max()


def plain_experts(x, gate, index, gate_up_proj, down_proj):
    y = torch.zeros_like(x)
    for e, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        opened, up = (x @ gate_up.T).chunk(2, -1)
        y = y + (gate * (index == e)).sum(1, keepdim=True) * ((F.gelu(opened, approximate="tanh") * up) @ down.T)
    return y


@pytest.mark.parametrize(("N", "D", "width", "E", "k", "dtype", "to_one"), [
    (70, 24, 40, 8, 2, torch.float32, False),
    (1, 24, 40, 8, 2, torch.float32, False),  # six experts without a token
    (33, 48, 36, 4, 3, torch.float32, True),
    (50, 32, 32, 8, 2, torch.bfloat16, False),
    LARGE(4096, 1536, 8192, 8, 2, torch.bfloat16, False),
    LARGE(1000, 512, 1024, 8, 2, torch.bfloat16, True),
    LARGE(777, 256, 680, 8, 2, torch.float32, False),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value")  # in rows that fill up a tile, which nobody reads
@pytest.mark.parametrize("by_expert", [False, True])  # one grouped product, or one of each expert
def test_experts(N, D, width, E, k, dtype, to_one, by_expert, monkeypatch):
    from pellucid.model.kernels.gpu import experts as kernels

    monkeypatch.setattr(kernels, "MUCH", 0 if by_expert else float("inf"))
    experts = kernels.experts
    torch.manual_seed(0)
    scores = torch.randn(N, E, device=DEVICE)
    if to_one:
        scores[:, 1] += 100.0
    gate, index = scores.softmax(-1).topk(k)
    x = torch.randn(N, D, dtype=dtype, device=DEVICE)
    weights = torch.randn(E, 2 * width, D, device=DEVICE) / D**0.5, torch.randn(E, D, width, device=DEVICE) / width**0.5
    ours, expected = both(lambda x, gate, up, down: experts(x, gate, index, up, down),
                          lambda x, gate, up, down: plain_experts(x, gate, index, up, down), (x, gate, *weights))  # fmt: skip
    assert_close(ours, expected, EPS[dtype] * 2 + TANH)
    idle = index.flatten().bincount(minlength=E) == 0
    assert (ours[3][idle] == 0).all() and (ours[4][idle] == 0).all()
    assert ours[3].dtype == torch.float32  # the master's gradient is summed in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 1, 17), LARGE((4, 2048, 6144))])
def test_norm_with_and_without_residual(shape, dtype):
    from pellucid.model.kernels.gpu.norm import rms_norm

    torch.manual_seed(0)
    x, residual, weight = torch.randn(shape, dtype=dtype, device=DEVICE), torch.randn(shape, dtype=dtype, device=DEVICE), None
    weight = torch.rand(shape[-1], device=DEVICE) + 0.5
    plain = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w
    assert_close(*both(lambda x, w: rms_norm(x, w, 1e-5), plain, (x, weight)), EPS[dtype])
    assert_close(*both(lambda x, w, r: rms_norm(x, w, 1e-5, r), lambda x, w, r: r + plain(x, w), (x, weight, residual)), EPS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 600), (1, 7), LARGE((64, 131072))])
@pytest.mark.parametrize("want_slope", [True, False])
def test_loss_rows(shape, dtype, want_slope):
    from pellucid.model.kernels.gpu.loss import loss_rows

    torch.manual_seed(0)
    products = (torch.randn(shape, device=DEVICE) * 4).to(dtype)
    targets = torch.randint(0, shape[1], shape[:1], device=DEVICE)
    targets[0] = -100
    expected = plain_rows(products.double(), targets, 0.577, 1e-3, -100, want_slope)
    ours = loss_rows(products.clone(), targets, 0.577, 1e-3, -100, want_slope)
    for a, b in zip(ours[: 2 + want_slope], expected, strict=False):
        assert (a.double() - b).abs().max() <= (EPS[dtype] if a.dtype == dtype else 2**-18) * b.abs().max().clamp_min(1)
    assert ours[2] is None or (ours[2][0] == 0).all()


def test_unasked_a_kernel_serves_on_the_card_that_it_was_proven_on_and_says_so(monkeypatch):
    monkeypatch.delenv("PELLUCID_KERNELS")
    for here in (True, False):
        monkeypatch.setattr(gpu, "_is_proven_here", lambda here=here: here)
        proven = {name for name, dtypes in gpu.PROVEN.items() if dtypes}
        assert {name for name in gpu.KERNELS if gpu.chosen(name, torch.bfloat16)} == (proven if here else set())
        assert not gpu.chosen("attention", torch.float32) and gpu.chosen("norm", torch.float32) == here
        lines = gpu.status()
        assert all(("our Triton kernel (" if here else "is proven on Hopper cards only") in lines[name] for name in proven)
        assert all("has not run on a card yet (PELLUCID_KERNELS=triton" in lines[name] for name in gpu.KERNELS.keys() - proven)
        assert lines["experts"].endswith("in fp32 plain PyTorch") == here
        assert set(gpu.KERNELS) <= set(doctor._on_gpu(torch.device("cuda")))
