"""Every compiled CPU kernel against its plain twin in float64, forward and backward, at odd sizes."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from pellucid.config import ModelConfig
from pellucid.model.attention import Visibility, capped_attention
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.kernels import capped, native, products
from pellucid.model.kernels.capped import fused_capped_attention
from pellucid.model.kernels.experts import fused_experts, sort_by_expert
from pellucid.model.kernels.norm import rms_norm, rms_norm_plain
from pellucid.model.kernels.rotary import rotate, rotate_plain
from pellucid.model.layers import rotary_phases
from pellucid.model.moe import MoE, Routing
from pellucid.training.losses import fused_rows, plain_rows

# One rounding is 2^-24 in fp32 and 2^-9 in bf16; sums of some hundred terms and gradients take a few of them.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _kernels():
    if native._load()[0] is None:
        pytest.skip(f"the CPU kernels are not built: {native.status()}")
    torch.manual_seed(0)


@pytest.fixture(params=["torch's products", *(["own products"] if products.own_serves(torch.float32) else [])])
def way(request, monkeypatch):
    if request.param == "torch's products":
        monkeypatch.setattr(products, "own_serves", lambda dtype: False)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def assert_agree(fast, plain, inputs, *, dtype, cancelled=1):
    """fast(*inputs) against plain(*inputs in float64), results and gradients, relative to the tensor's norm.

    cancelled: how much larger than a gradient the numbers are whose difference it is.
    """
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, exact = fast(*inputs), plain(*wide)
    slope = torch.randn(exact.shape, dtype=torch.float64)
    pairs = [(found, exact)]
    pairs += zip(
        torch.autograd.grad(found, inputs, slope.to(found.dtype)),
        torch.autograd.grad(exact, wide, slope.to(found.dtype).double()), strict=True,
    )  # fmt: skip
    for number, (ours, theirs) in enumerate(pairs):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        allowed = TOLERANCE[dtype] * (cancelled if number else 1)
        assert error < allowed, f"{'result' if number == 0 else f'gradient {number - 1}'}: {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (130, 96), (65, 33)])
def test_rms_norm(dtype, shape):
    def exact(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    assert_agree(lambda x, w: rms_norm(x, w, 1e-5), exact, [random(*shape, dtype=dtype), random(shape[1])], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_its_plain_twin_to_the_last_rounding(dtype):
    x, weight = random(40, 48, dtype=dtype), random(48)
    ulp = 1 if dtype == torch.bfloat16 else 4
    step = torch.finfo(dtype).eps * ulp
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_plain(x, weight, 1e-5), rtol=step, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3)])
def test_rotate(dtype, heads, group):
    cos, sin = rotary_phases(torch.arange(11).expand(2, 11), 10, 10_000.0)

    def exact(x):
        first, second = x.chunk(2, dim=-1)
        wide = [t.double()[:, :, None, None] for t in (cos, sin)]
        return (x * wide[0] + torch.cat((-second, first), dim=-1) * wide[1]).transpose(1, 2)

    x = random(2, 11, heads, group, 10, dtype=dtype)
    assert_agree(lambda x: rotate(x, cos, sin), exact, [x], dtype=dtype)
    torch.testing.assert_close(rotate(x, cos, sin), rotate_plain(x, cos, sin), rtol=2e-2, atol=1e-6)


def exact_attention(q, k, v, mask_BTS, multiplier, cap):
    logits = cap * torch.tanh(torch.einsum("bktgd,bksd->bktgs", q, k) * (multiplier / cap))
    weights = torch.softmax(logits.masked_fill(~mask_BTS[:, None, :, None], -1e30), dim=-1)
    return torch.einsum("bktgs,bksd->bktgd", weights, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "chunk", "G"), [(9, 128, 1), (37, 8, 3), (64, 16, 2)])
def test_capped_attention_with_pads_and_documents(way, monkeypatch, dtype, T, chunk, G):
    monkeypatch.setattr(capped, "CHUNK", chunk)
    B, K, d = 2, 2, 8
    q, k, v = random(B, K, T, G, d, dtype=dtype, scale=3), random(B, K, T, d, dtype=dtype, scale=3), random(B, K, T, d, dtype=dtype)
    valid = torch.rand(B, T) > 0.2
    valid[:, 0] = True
    segments = (torch.arange(T) >= T // 3).int().expand(B, T).contiguous()
    visibility = Visibility(valid, segments)
    mask = visibility.chunk(0, T)
    seen = mask.any(-1)[:, None, :, None, None]  # rows that see nothing are tested below
    settings = {"multiplier": d**-0.5, "cap": 5.0}

    def fast(q, k, v):
        return fused_capped_attention(q, k, v, *visibility.documents, **settings) * seen

    assert_agree(fast, lambda q, k, v: exact_attention(q, k, v, mask, **settings) * seen, [q, k, v], dtype=dtype)
    plain = capped_attention(q.transpose(2, 3), k, v, mask, exact=True, **settings).transpose(2, 3)
    torch.testing.assert_close(fast(q, k, v), plain * seen, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_capped_attention_over_several_blocks_of_queries_and_keys(way, dtype, threads):
    """Documents that begin and end within blocks, one longer than two blocks of keys, and logits near the cap."""
    B, K, T, G, d = 1, 2, 1300, 2, 16
    q, k, v = random(B, K, T, G, d, dtype=dtype, scale=3), random(B, K, T, d, dtype=dtype, scale=3), random(B, K, T, d, dtype=dtype)
    segments = torch.cat([torch.full((length,), number) for number, length in enumerate((30, 7, 1100, 163))]).int()[None]
    visibility = Visibility(torch.ones(B, T, dtype=torch.bool), segments)
    settings = {"multiplier": 0.8, "cap": 30.0}
    torch.set_num_threads(threads)  # more than there are heads: each head's work is divided

    def fast(q, k, v):
        return fused_capped_attention(q, k, v, *visibility.documents, **settings)

    assert_agree(fast, lambda q, k, v: exact_attention(q, k, v, visibility.chunk(0, T), **settings), [q, k, v], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_one_key_gives_its_value_and_pulls_at_no_logit(way, dtype):
    q, k, v = random(1, 1, 9, 1, 16, dtype=dtype, scale=3), random(1, 1, 9, 16, dtype=dtype, scale=3), random(1, 1, 9, 16, dtype=dtype)
    documents = torch.arange(9, dtype=torch.int32)[None]
    out = fused_capped_attention(q, k, v, documents, documents, multiplier=0.25, cap=30.0)
    torch.testing.assert_close(out[:, :, :, 0], v, rtol=1e-6, atol=0)
    for grad in torch.autograd.grad(out, (q, k), torch.randn(out.shape).to(dtype)):
        assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_where_all_attend_to_the_first_token(way, dtype):
    """Logits of 11 there and about 0 elsewhere, so that weights of 1e-5 move the others; the result's own rounding must not."""
    T, d = 96, 32
    q, k, v = random(1, 1, T, 2, d, dtype=dtype, scale=0.3), random(1, 1, T, d, dtype=dtype, scale=0.3), random(1, 1, T, d, dtype=dtype)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 1.0, 0.0
        k[:, :, 0, 0] = 11.0
    visibility = Visibility(torch.ones(1, T, dtype=torch.bool))
    settings = {"multiplier": 1.0, "cap": 30.0}

    def fast(q, k, v):
        return fused_capped_attention(q, k, v, *visibility.documents, **settings)

    assert_agree(fast, lambda q, k, v: exact_attention(q, k, v, visibility.chunk(0, T), **settings), [q, k, v], dtype=dtype,
                 cancelled=100 if dtype == torch.float32 else 1)  # fmt: skip


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(way):
    q, k, v = random(1, 1, 4, 1, 8), random(1, 1, 4, 8), random(1, 1, 4, 8)
    documents = torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)
    out = fused_capped_attention(q, k, v, *documents, multiplier=0.3, cap=30.0)
    assert not out[0, 0, 0].any() and out[0, 0, 1:].all()
    assert not any(grad.any() for grad in torch.autograd.grad(out[0, 0, 0].sum(), (q, k, v)))


def moe_of(D, size, E, k):
    config = ModelConfig(
        vocab_size=8, hidden_size=D, intermediate_size=size, num_attention_heads=1, num_experts=E, num_experts_per_tok=k
    )
    return MoE(config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", ["spread", "all to one", "one token", "an expert without tokens"])
def test_experts(way, dtype, choice):
    D, size, E, k = 24, 20, 4, 2
    N = 1 if choice == "one token" else 53
    index = torch.stack([torch.randperm(E)[:k] for _ in range(N)])
    if choice == "all to one":
        index = torch.tensor([2, 0]).expand(N, k).contiguous()
    if choice == "an expert without tokens":
        index = torch.stack([torch.randperm(E - 1)[:k] for _ in range(N)])
    moe = moe_of(D, size, E, k)
    weights = [random(E, 2 * size, D, scale=D**-0.5), random(E, D, size, scale=size**-0.5)]
    x, gate = random(N, D, dtype=dtype), torch.rand(N, k).requires_grad_()

    def exact(x, gate, gate_up_proj, down_proj):
        gates, up = torch.einsum("nd,nkfd->nkf", x, gate_up_proj[index]).chunk(2, dim=-1)
        inner = F.gelu(gates, approximate="tanh") * up
        return torch.einsum("nkf,nkdf,nk->nd", inner, down_proj[index], gate)

    assert_agree(lambda x, g, a, b: fused_experts(x, g, index, a, b), exact, [x, gate, *weights], dtype=dtype)
    moe.gate_up_proj.data, moe.down_proj.data = (w.detach() for w in weights)
    plain = moe.mix_plain(x, Routing(None, None, index, gate))
    fast = fused_experts(x, gate, index, *weights)
    assert (fast.double() - plain.double()).norm() < TOLERANCE[dtype] * plain.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_is_mixed_as_many_are(dtype):
    moe = moe_of(24, 20, 4, 2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = random(1, 24, dtype=dtype).detach()
    routing = moe.route(x)
    with torch.no_grad():
        for parity in (False, True):
            one, plain = moe.mix_one(x, routing, parity), moe.mix_plain(x, routing, parity)
            assert one.dtype == dtype and (one.double() - plain.double()).norm() < TOLERANCE[dtype] * plain.double().norm()


def test_without_gradients_the_same_bits():
    x, weight = random(2, 3, 4, 5, 16), random(16)
    cos, sin = rotary_phases(torch.arange(3).expand(2, 3), 16, 10_000.0)
    graded = rms_norm(x, weight, 1e-5), rotate(x, cos, sin)
    with torch.no_grad():
        assert all(map(torch.equal, graded, (rms_norm(x, weight, 1e-5), rotate(x, cos, sin))))


def test_rows_of_an_expert_are_its_tokens_in_order_and_padding_belongs_to_nobody():
    index = torch.tensor([[2, 0], [2, 1], [0, 2], *[[2, 3]] * 15])
    row_Nk, rows_E, token_M = sort_by_expert(index, 5, True)
    assert rows_E == [2, 1, 32, 15, 0]  # a handful as they are, 18 rounded up
    assert row_Nk[:3].tolist() == [[3, 0], [4, 2], [1, 5]]
    assert torch.equal(token_M[row_Nk], torch.arange(18)[:, None].expand(18, 2))
    assert row_Nk.unique().numel() == 36


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_cross_entropy_rows(dtype, z_loss_weight):
    scores, targets = random(19, 301, dtype=dtype, scale=8).detach(), torch.randint(0, 301, (19,))
    targets[::4] = -100
    exact = plain_rows(scores.double(), targets, 0.7, z_loss_weight, -100, True)
    found = fused_rows(scores.clone(), targets, 0.7, z_loss_weight, -100, True)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() < TOLERANCE[dtype] * theirs.norm()
    assert not found[0][::4].any() and not found[2][::4].any()


@pytest.mark.parametrize("name", ["rms_norm", "cross_entropy", "attention"])
def test_a_nan_that_comes_in_comes_out(way, name):
    x = torch.randn(3, 16)
    x[1, 5] = torch.nan
    if name == "rms_norm":
        rows = rms_norm(x, torch.ones(16), 1e-5).sum(-1)
    elif name == "attention":
        document, other = torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 1, 3, 16)
        out = fused_capped_attention(x[None, None, :, None], other, other, document, document, multiplier=1.0, cap=30.0)
        rows = out.sum(-1).flatten()
    else:
        rows = fused_rows(x, torch.tensor([1, 2, 3]), 1.0, 0.0, -100, False)[0]
    assert rows.isnan().tolist() == [False, True, False]


def test_results_do_not_depend_on_the_number_of_threads():
    model = initialize(Grok1(ModelConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2)))
    tokens = torch.randint(3, 96, (4, 48))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model.zero_grad()
        model(tokens, segment_ids=torch.ones_like(tokens)).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.set_num_threads(1)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)  # the libraries' products split their sums differently


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_and_its_gradients(way, dtype):
    x, weight = random(3, 5, 24, dtype=dtype), random(40, 24, dtype=dtype)
    assert_agree(products.linear, F.linear, [x, weight], dtype=dtype)


def test_bf16_products_without_bf16_instructions_round_once(monkeypatch):
    monkeypatch.setattr(products, "_lacks_bf16", lambda: True)
    a, b = random(33, 70, dtype=torch.bfloat16).detach(), random(20, 70, dtype=torch.bfloat16).detach()
    exact = a.double() @ b.double().T
    for found in (products.product(a, b), products.product(b, a).T, products.batched_product(a[None], b.T[None])[0]):
        torch.testing.assert_close(found, exact.to(torch.bfloat16), rtol=2**-8, atol=1e-5)  # one rounding may fall elsewhere
    into_master = products.transposed_product(a[:20], b, out=torch.empty(70, 70))
    torch.testing.assert_close(into_master, (a[:20].double().T @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_without_a_compiler_the_plain_functions_serve_and_say_so():
    code = "from pellucid.model.kernels import native; import torch; print(native.status(), native.fits(torch.ones(1)))"
    environment = {**os.environ, "PATH": "/nonexistent", "CXX": "no-such-compiler"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "plain PyTorch: no C++ compiler (g++ or clang++) was found False" and not found.stderr


def test_a_compiler_that_fails_is_survived(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo broken 1.0 && exit 0\necho out of disk >&2\nexit 1\n")
    broken.chmod(0o755)
    code = "from pellucid.model.kernels import native; print(native.status())"
    environment = {**os.environ, "CXX": str(broken), "XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "plain PyTorch: the kernels could not be built (out of disk)"
    assert not list((tmp_path / "pellucid").glob("*.so"))
