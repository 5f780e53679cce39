"""The rules that two fixtures cannot show, on small random models."""

import math

import pytest
import torch
from torch.nn import functional as F

from pellucid.config import ModelConfig, load_config
from pellucid.measure.memory import Ledger
from pellucid.model import attention
from pellucid.model.attention import Visibility, capped_attention, chunked_capped_attention
from pellucid.model.generate import filter_scores, generate, generate_ids
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.kernels.grouped import grouped_linear, grouped_linear_plain
from pellucid.model.moe import MoE
from pellucid.model.size import flops_per_token, parameter_counts


def small(**changes) -> ModelConfig:
    shape = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return ModelConfig(**{**shape, **changes})


def made(**changes) -> Grok1:
    return initialize(Grok1(small(**changes)), seed=1)


def tokens(*shape, low=3, high=97, seed=0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def test_grok_1_counts_exactly_the_published_parameters():
    config = ModelConfig(preset="grok-1")
    model = Grok1(config, device="meta")
    counts = parameter_counts(config)
    assert sum(p.numel() for p in model.parameters()) == counts["total"] == 315_684_820_992
    assert counts["active"] == 83_756_587_008
    assert counts["embedding"] == 805_306_368 and counts["attention"] == 5_637_144_576
    assert counts["experts"] == 309_237_645_312 and counts["routers"] == 3_145_728 and counts["norms"] == 1_579_008
    assert flops_per_token(config, 8192) == pytest.approx(521.8e9, rel=5e-4)


@pytest.mark.parametrize("name", ["tiny", "small", "base", "medium", "large"])
def test_first_loss_is_ln_vocabulary(name):
    settings = load_config(None, [f"model.preset={name}"])
    vocab_size = settings.data.tokenizer.vocab_size
    model = initialize(Grok1(ModelConfig(preset=name, vocab_size=vocab_size)), seed=0)
    text = tokens(2, 64, high=vocab_size)
    with torch.no_grad():
        scores = model(text)
    loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), text[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(vocab_size), rel=0.02)


@pytest.mark.parametrize("change", [dict(hidden_size=64), dict(hidden_size=256), dict(num_hidden_layers=8)])
def test_activation_and_gradient_scale_do_not_depend_on_width_or_depth(change):
    """A coordinate check (Yang & Hu 2021): RMS of the final state, and gradient at half depth against the end."""

    def scales(model: Grok1) -> tuple[float, float]:
        states = []
        for layer in model.layers:
            layer.register_forward_hook(lambda module, args, out: states.append(out[0]))
        text = tokens(4, 32)
        model(text)
        states[-1].retain_grad()
        loss = F.cross_entropy(model.logits(model.final_norm(states[-1]))[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        middle = states[len(states) // 2 - 1]
        middle.retain_grad()
        loss.backward()
        return states[-1].pow(2).mean().sqrt().item(), middle.grad.norm().item() / states[-1].grad.norm().item()

    reference, changed = scales(made()), scales(made(**change))
    assert changed[0] == pytest.approx(1.03, rel=0.1) and reference[0] == pytest.approx(1.03, rel=0.1)
    assert changed[1] == pytest.approx(reference[1], rel=0.3)


def test_equal_router_scores_go_to_the_lower_expert():
    moe = MoE(small())
    torch.nn.init.zeros_(moe.router.weight)
    routing = moe.route(torch.randn(5, 32))
    assert routing.expert_index_Nk.tolist() == [[0, 1]] * 5
    assert torch.equal(routing.gate_Nk, torch.full((5, 2), 1 / 8))


def test_balance_bias_moves_the_choice_but_not_the_weights():
    moe = MoE(small())
    torch.nn.init.zeros_(moe.router.weight)
    moe.balance_bias[6] = 1e-3
    routing = moe.route(torch.randn(5, 32))
    assert routing.expert_index_Nk.tolist() == [[6, 0]] * 5
    assert torch.equal(routing.gate_Nk, torch.full((5, 2), 1 / 8))


def test_mixture_equals_every_expert_on_every_token_weighted_by_its_gate():
    moe = made().layers[0].moe
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    out, routing = moe(x)
    flat, expected = x.view(-1, 32).double(), torch.zeros(18, 32, dtype=torch.float64)
    for expert in range(8):
        gate, up = (flat @ moe.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        y = (0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up) @ moe.down_proj[
            expert
        ].double().T
        chosen = (routing.expert_index_Nk == expert) * routing.gate_Nk.double()
        expected += chosen.sum(-1, keepdim=True) * y
    assert (out.view(-1, 32).double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [1, 0, 0, 0]])
def test_grouped_linear_equals_the_plain_loop_forward_and_backward(counts):
    rows, weight = torch.randn(sum(counts), 16, requires_grad=True), torch.randn(4, 24, 16, requires_grad=True)
    results = []
    for function in (grouped_linear_plain, grouped_linear):
        y = function(rows, weight, torch.tensor(counts))
        gradients = torch.autograd.grad(y.square().sum(), (rows, weight))
        results.append((y, *gradients))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64])
def test_chunked_attention_equals_the_formula_in_float64(chunk_size):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 3, 17, 8), torch.randn(2, 2, 17, 8), torch.randn(2, 2, 17, 8)
    segments = torch.tensor([[1] * 6 + [2] * 8 + [0] * 3, [1] * 17])
    visibility = Visibility(segments > 0, segments)
    ours = chunked_capped_attention(q, k, v, visibility, chunk_size=chunk_size, multiplier=2.0, cap=3.0, exact=False)
    logits = 3 * torch.tanh(torch.einsum("bkgtd,bksd->bkgts", q.double(), k.double()) * 2 / 3)
    visible = (torch.ones(17, 17).tril().bool() & (segments[:, :, None] == segments[:, None]))[:, None, None]
    weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), dim=-1)
    expected = torch.einsum("bkgts,bksd->bkgtd", weights, v.double())
    real = (segments > 0)[:, None, None, :, None].expand_as(expected)
    assert (ours.double() - expected)[real].abs().max() < 1e-5
    assert torch.isfinite(ours).all()


def test_chunked_attention_of_long_rows_keeps_no_table_and_gives_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 3, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)]
    visibility, results, kept = Visibility(torch.ones(1, 40, dtype=torch.bool)), [], []
    for longest in (64, 8):
        monkeypatch.setattr(attention, "LONG", longest)
        inputs = [x.clone().requires_grad_() for x in tensors]
        with Ledger() as ledger:
            out = chunked_capped_attention(*inputs, visibility, chunk_size=4, multiplier=2.0, cap=3.0, exact=False)
        kept.append(ledger.total)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for plain, anew in zip(*results, strict=True):
        assert torch.equal(plain, anew)
    assert kept[1] < kept[0] / 2


def test_fully_masked_query_reads_all_keys_evenly():
    q, k, v = torch.randn(1, 1, 1, 4, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    out = capped_attention(q, k, v, mask, multiplier=1.0, cap=30.0, exact=False)
    torch.testing.assert_close(out[0, 0, 0], v.mean(2)[0].expand(4, 8))


def test_rows_that_begin_with_pads_follow_the_official_rule():
    """Leading pads see all T keys evenly, also later ones: changing a later token must change a pad's output."""
    model = made()
    text = tokens(1, 8)
    text[0, :2] = 0
    other = text.clone()
    other[0, 7] = 50
    with torch.no_grad():
        a, b = model(text), model(other)
    assert not torch.equal(a[0, 0], b[0, 0])
    torch.testing.assert_close(a[0, 2:7], b[0, 2:7])


def test_documents_in_a_row_do_not_see_each_other():
    model = made()
    first, second = tokens(1, 6, seed=1), tokens(1, 7, seed=2)
    row = torch.cat((first, second), dim=1)
    segments = torch.tensor([[1] * 6 + [2] * 7])
    positions = torch.cat((torch.arange(6), torch.arange(7)))[None]
    with torch.no_grad():
        packed = model(row, segment_ids=segments, positions=positions)
        torch.testing.assert_close(packed[:, :6], model(first), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed[:, 6:], model(second), rtol=1e-4, atol=1e-5)


def test_positions_and_segments_of_one_row_serve_all_rows():
    model, text = made(), tokens(3, 9)
    positions, segments = (torch.arange(9) * 7)[None], torch.tensor([[1] * 4 + [2] * 5])
    with torch.no_grad():
        shared = model(text, positions=positions, segment_ids=segments)
        own = model(text, positions=positions.repeat(3, 1), segment_ids=segments.repeat(3, 1))
    assert torch.equal(shared, own)


def test_cached_generation_equals_full_recomputation():
    model = made()
    for sampling in (dict(temperature=0), dict(temperature=1.0, top_k=20, top_p=0.9, seed=5)):
        runs = [
            list(generate_ids(model, [5, 9, 3], max_new_tokens=80, use_cache=cached, **sampling)) for cached in (True, False)
        ]
        assert runs[0] == runs[1] and len(runs[0]) == 80


def test_cached_logits_equal_full_logits_in_uneven_steps():
    model, text = made(), tokens(2, 150)
    cache, pieces, start = model.new_cache(), [], 0
    with torch.no_grad():
        for length in (1, 70, 2, 77):
            pieces.append(model(text[:, start : start + length], cache=cache))
            start += length
        torch.testing.assert_close(torch.cat(pieces, 1), model(text), rtol=1e-4, atol=1e-5)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = filter_scores(scores, 1.0, None, 0.7)
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.3, 0, 0]) / 0.8)
    assert filter_scores(scores, 1.0, 1, 1.0).tolist() == [1, 0, 0, 0]
    assert filter_scores(scores, 1.0, None, 0.0).tolist() == [1, 0, 0, 0], "the likeliest always stays"


class Letters:
    eos_token_id = -1

    def encode(self, text):
        return [ord(c) - 32 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 32) for i in ids)


def test_stop_string_ends_the_text_before_it_and_pieces_join_to_the_whole():
    model = made()
    whole = "".join(generate(model, Letters(), "HELLO", max_new_tokens=60, temperature=0.8, seed=3))
    assert len(whole) > 20
    mark = whole[12:15]
    cut = "".join(generate(model, Letters(), "HELLO", max_new_tokens=60, temperature=0.8, seed=3, stop=[mark]))
    assert cut == whole[: whole.index(mark)]
    first = "".join(generate(model, Letters(), "HELLO", max_new_tokens=60, temperature=0.8, seed=3, stop=[mark, whole[5:7]]))
    assert first == whole[: min(whole.index(mark), whole.index(whole[5:7]))], "the one that comes first ends it"


def test_a_seed_means_the_same_weights():
    a, b, c = (initialize(Grok1(small()), seed=s) for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_moved_to_another_dtype_computes_as_before_with_the_weights_that_dtype_holds(dtype):
    rounded, model, text = made(), made().to(dtype), tokens(2, 24)
    for mine, theirs in zip(rounded.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    with torch.no_grad():
        torch.testing.assert_close(model(text), rounded(text), rtol=1e-5, atol=1e-5)  # fp32 sums in another order
        cache = model.new_cache()
        one_by_one = torch.cat([model(text[:1, t : t + 1], cache=cache) for t in range(24)], dim=1)
    torch.testing.assert_close(one_by_one, rounded(text[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", ["attention", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit_and_keeps_less(recompute, dtype):
    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_experts=4)
    tokens = torch.randint(3, 64, (2, 48), generator=torch.Generator().manual_seed(0))
    gradients, kept = [], []
    for choice in ("none", recompute):
        model = initialize(Grok1(config))
        model.compute_dtype, model.recompute = dtype, choice
        sizes: dict[int, int] = {}
        keep = lambda x, sizes=sizes: (sizes.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()), x)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden, routings = model.hidden_states(tokens)
        (hidden.float().square().sum() + sum(routing.probs_NE.square().sum() for routing in routings)).backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for at, size in sizes.items() if at not in weights))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0]
