"""Balance losses against hand-worked values and Hugging Face's formula, written out here again."""

import pytest
import torch
from torch.nn import functional as F

from pellucid.model.moe import Routing
from pellucid.training.balance import (
    expert_load,
    mixtral_loss,
    router_z_loss,
    switch_loss,
    update_balance_bias,
)


def routing(probs, chosen, logits=None):
    probs, chosen = torch.tensor(probs, dtype=torch.float64), torch.tensor(chosen)
    logits = probs.log() if logits is None else torch.tensor(logits, dtype=torch.float64)
    return Routing(logits, probs, chosen, probs.gather(-1, chosen))


def random_routing(tokens=50, experts=8, k=2, seed=0):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits.requires_grad_()
    probs = logits.softmax(dim=-1)
    gates, chosen = probs.topk(k, dim=-1)
    return Routing(logits, probs, chosen, gates)


ALL = lambda n: torch.ones(n, dtype=torch.bool)

# three tokens, two experts, top-1: experts 0, 0, 1; the fourth token is a pad and would change every number
TOP1 = routing([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [1.0, 0.0]], [[0], [0], [1], [0]])
REAL = torch.tensor([True, True, True, False])


def test_switch_loss_by_hand():
    # f = (2/3, 1/3), P = (1.5/3, 1.5/3): 2 * (2/3 * 1/2 + 1/3 * 1/2) = 1
    assert torch.allclose(switch_loss(TOP1, REAL), torch.tensor(1.0).double())
    # only the first two tokens: f = (1, 0), P = (0.65, 0.35): 2 * 0.65
    assert torch.allclose(switch_loss(TOP1, torch.tensor([True, True, False, False])), torch.tensor(1.3).double())


def test_switch_loss_is_one_when_balanced_and_E_when_collapsed():
    balanced = routing([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], [[0, 1], [2, 3]])
    assert torch.allclose(switch_loss(balanced, ALL(2)), torch.tensor(1.0).double())
    collapsed = routing([[1.0, 0, 0, 0]] * 3, [[0]] * 3)
    assert torch.allclose(switch_loss(collapsed, ALL(3)), torch.tensor(4.0).double())


def test_mixtral_loss_by_hand():
    # two tokens, three experts, top-2 {0,1} and {0,2}: f = (1, 1/2, 1/2), P = (0.5, 0.3, 0.2): 3 * 0.75
    layer = routing([[0.6, 0.4, 0.0], [0.4, 0.2, 0.4]], [[0, 1], [0, 2]])
    assert torch.allclose(mixtral_loss(layer, ALL(2)), torch.tensor(3 * (0.5 + 0.15 + 0.1)).double())
    assert torch.allclose(switch_loss(layer, ALL(2)) * 2, mixtral_loss(layer, ALL(2)))


def hugging_face_load_balancing_loss(gate_logits, num_experts, top_k, attention_mask_N):
    """transformers, models/mixtral/modeling_mixtral.py, `load_balancing_loss_func` with an attention mask."""
    layers = len(gate_logits)
    weights = torch.cat(gate_logits).softmax(dim=-1)
    _, selected = torch.topk(weights, top_k, dim=-1)
    expert_mask = F.one_hot(selected, num_experts)
    mask = attention_mask_N.repeat(layers).double()
    per_expert = mask[:, None, None].expand(-1, top_k, num_experts)
    tokens_per_expert = (expert_mask.double() * per_expert).sum(0) / per_expert.sum(0)
    prob_per_expert = (weights * mask[:, None]).sum(0) / mask[:, None].expand(-1, num_experts).sum(0)
    return (tokens_per_expert * prob_per_expert.unsqueeze(0)).sum() * num_experts


def test_mixtral_loss_and_its_gradient_equal_hugging_faces():
    layers = [random_routing(seed=seed) for seed in range(3)]
    mask = torch.rand(50, generator=torch.Generator().manual_seed(9)) > 0.3
    logits = [layer.logits_NE for layer in layers]
    expected = hugging_face_load_balancing_loss(logits, 8, 2, mask)
    found = mixtral_loss(layers, mask)
    assert torch.allclose(found, expected, rtol=1e-13)
    for a, b in zip(torch.autograd.grad(expected, logits), torch.autograd.grad(found, logits), strict=True):
        assert torch.allclose(a, b, atol=1e-15)


def test_switch_gradient_follows_the_paper():
    """d loss / d P_e = E f_e: the choice itself carries no gradient (Fedus et al., below equation 6)."""
    probs = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0], [1], [0]])
    switch_loss(Routing(probs.log(), probs, chosen, probs.gather(-1, chosen)), ALL(3)).backward()
    assert torch.allclose(probs.grad, torch.tensor([2 * 2 / 3 / 3, 2 * 1 / 3 / 3]).double().expand(3, 2))


def test_router_z_loss_by_hand():
    # logsumexp(0, 0) = ln 2, logsumexp(ln 1, ln 3) = ln 4 = 2 ln 2: mean of squares 2.5 ln²2; the pad's 99 is not seen
    ln3 = torch.tensor(3.0).double().log().item()
    layer = routing([[0.5, 0.5]] * 3, [[0]] * 3, logits=[[0.0, 0.0], [0.0, ln3], [99.0, 99.0]])
    ln2 = torch.tensor(2.0).double().log()
    assert torch.allclose(router_z_loss(layer, torch.tensor([True, True, False])), 2.5 * ln2**2)


@pytest.mark.parametrize("loss", [switch_loss, mixtral_loss, router_z_loss])
def test_pads_change_nothing_and_only_pads_cost_nothing(loss):
    full = random_routing()
    mask = torch.arange(50) < 30
    part = Routing(full.logits_NE[:30], full.probs_NE[:30], full.expert_index_Nk[:30], full.gate_Nk[:30])
    assert torch.allclose(loss(full, mask), loss(part, ALL(30)))
    assert torch.allclose(loss([full, full], mask), loss(full, mask))
    nothing = loss(full, torch.zeros(50, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0 and not full.logits_NE.grad.any()


def test_expert_load_counts_real_choices():
    layer = routing([[0.25] * 4] * 4, [[0, 1], [1, 3], [3, 1], [2, 0]])
    assert expert_load(layer, REAL).tolist() == [1, 3, 0, 2]


def test_balance_bias_moves_by_the_sign_of_the_overload():
    bias = torch.tensor([0.1, 0.0, -0.2, 0.0])
    result = update_balance_bias(bias, torch.tensor([9, 1, 5, 5]), 0.01)  # mean 5
    assert result is bias
    assert torch.allclose(bias, torch.tensor([0.09, 0.01, -0.2, 0.0]))


def test_balance_bias_evens_out_a_skewed_router():
    """The rule's promise: without any loss, a router that prefers some experts ends balanced."""
    logits = torch.randn(4000, 8, generator=torch.Generator().manual_seed(3)) + torch.linspace(-1, 1, 8)
    probs, bias = logits.softmax(dim=-1), torch.zeros(8)
    load = lambda: torch.bincount((probs + bias).topk(2, dim=-1).indices.flatten(), minlength=8)
    before = load()
    for _ in range(400):
        update_balance_bias(bias, load(), 1e-3)
    assert before.max() / before.float().mean() > 1.7
    assert load().max() / load().float().mean() < 1.1
