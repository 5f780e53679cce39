"""A play's numbers against an independent model, backward pass and optimizer, written here in plain float64 torch."""

import json
import math
import time

import numpy as np
import pytest
import torch
from conftest import small_config, write_corpus
from torch.nn.functional import gelu

import pellucid
from pellucid.config import UserError
from pellucid.observe.passage import make_fan
from pellucid.observe.replay import state_before
from pellucid.observe.theatre import _means, make_theatre, stage, stage_last, staged_steps, theatre_path
from pellucid.observe.web.capsule import Plays
from pellucid.training import checkpoint

STEP = 24  # there is a checkpoint after 25 steps, so this one's outcome is stored


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run in float32, whatever this processor is fast at."""
    folder = tmp_path_factory.mktemp("played")
    write_corpus(folder / "corpus")
    return pellucid.train(small_config(folder, max_steps=30, precision="fp32"), run_dir=folder / "run").directory


@pytest.fixture(scope="module")
def play(run_dir):
    return json.loads(make_theatre(run_dir, STEP).read_text())


@pytest.fixture(scope="module")
def before(run_dir):
    """The state before the step, as training left it."""
    return state_before(run_dir, STEP)


@pytest.fixture(scope="module")
def reference(before):
    """(weights, gradients, trace of every row) of the step by formulas alone, in float64."""
    config, settings = before.config.model, before.config.training
    weights = {name: p.detach().double().requires_grad_() for name, p in before.model.named_parameters()}
    batches = before.micro_batches()
    tokens = sum(int((b.targets_BT >= 0).sum()) for b in batches)
    rows, total = [], 0.0
    for batch in batches:
        real, probs_LNE, chosen_LNk = batch.targets_BT.reshape(-1) >= 0, [], []
        traces = [plain_row(config, weights, batch, row) for row in range(len(batch.tokens_BT))]
        for trace, targets in zip(traces, batch.targets_BT, strict=True):
            nats = -trace["scores"].log_softmax(-1)[torch.arange(len(targets)), targets.clamp(min=0)]
            total = total + nats[targets >= 0].sum() / tokens
        for n in range(config.num_hidden_layers):
            probs_LNE.append(torch.cat([trace["layers"][n]["probs"] for trace in traces])[real])
            chosen_LNk.append(torch.cat([trace["layers"][n]["chosen"] for trace in traces])[real])
        share = real.sum() / tokens
        for probs, chosen in zip(probs_LNE, chosen_LNk, strict=True):
            f = torch.bincount(chosen.flatten(), minlength=config.num_experts) / chosen.numel()
            total = total + settings.balance_loss_weight * share * config.num_experts * (f * probs.mean(0)).sum() / len(probs_LNE)
        rows += traces
    total.backward()
    return weights, rows, total.item()


def plain_row(c, w, batch, row):
    """One row through Grok-1 by the formulas: no kernels, no batching."""
    norm = lambda x, name: x * (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * w[name + ".weight"]
    tokens, segments, T = batch.tokens_BT[row], batch.segment_ids_BT[row], batch.tokens_BT.shape[1]
    angles = batch.positions_BT[row].double()[:, None] / c.rope_theta ** (torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(x):  # [T, heads, d]: the first half of a head's values is the real part, the second the imaginary one
        a, b = x.chunk(2, -1)
        z = torch.complex(a, b) * turn[:, None]
        return torch.cat((z.real, z.imag), -1)

    seen = torch.ones(T, T).tril().bool() & (segments[:, None] == segments) & (tokens != c.pad_token_id)
    h, layers = w["embedding.weight"][tokens] * c.embedding_multiplier_scale, []
    for n in range(c.num_hidden_layers):
        p, x = f"layers.{n}.", norm(h, f"layers.{n}.pre_attn_norm")
        heads = lambda name, count, p=p, x=x: (x @ w[f"{p}attention.{name}_proj.weight"].T).view(T, count, c.head_dim)
        q, k = rotated(heads("q", c.num_attention_heads)), rotated(heads("k", c.num_key_value_heads))
        repeat = c.num_attention_heads // c.num_key_value_heads
        k, v = (t.repeat_interleave(repeat, 1) for t in (k, heads("v", c.num_key_value_heads)))
        logits = c.max_attn_value * torch.tanh(torch.einsum("thd,shd->hts", q, k) * c.attn_output_multiplier / c.max_attn_value)
        attention = logits.masked_fill(~seen, -1e30).softmax(-1)
        joined = torch.einsum("hts,shd->thd", attention, v).reshape(T, -1)
        attended = joined @ w[p + "attention.o_proj.weight"].T
        h = h + norm(attended, p + "post_attn_norm")
        x = norm(h, p + "pre_moe_norm")
        probs = (x @ w[p + "moe.router.weight"].T).softmax(-1)
        chosen = probs.sort(dim=-1, descending=True, stable=True).indices[:, : c.num_experts_per_tok]
        gate, up = torch.einsum("td,efd->tef", x, w[p + "moe.gate_up_proj"]).chunk(2, -1)
        inner = gelu(gate, approximate="tanh") * up
        out = torch.einsum("tef,edf->ted", inner, w[p + "moe.down_proj"])
        picked = chosen[..., None].expand(-1, -1, out.shape[-1])
        mixed = (out.gather(1, picked) * probs.gather(1, chosen)[..., None]).sum(1)
        h = h + norm(mixed, p + "post_moe_norm")
        layers.append({"attention": attention, "probs": probs, "chosen": chosen, "inner": inner, "attended": attended,
                       "mixed": mixed, "joined": joined})  # fmt: skip
    scores = norm(h, "final_norm") @ w["embedding.weight"].T * c.output_multiplier_scale
    return {"layers": layers, "scores": scores}


near = lambda value, tolerance=2e-5: pytest.approx(value, rel=tolerance, abs=1e-7)  # float32 through a few layers


def test_forward_numbers_are_those_of_an_independent_model(play, reference):
    _, rows, _ = reference
    trace, window = rows[play["row"]], slice(*play["window"])
    scores = trace["scores"][window].softmax(-1)
    for at, output in enumerate(play["outputs"]):
        assert output["p"] == near(scores[at, output["target"]].item(), 1e-4)
        assert output["loss"] == near(-math.log(output["p"]))
        assert [c["id"] for c in output["choices"][:3]] == scores[at].topk(3).indices.tolist()
    for shown, layer in zip(play["layers"], trace["layers"], strict=True):
        attention = torch.tensor(shown["attention"]["weights"])
        assert torch.allclose(attention.double(), layer["attention"][:, window, window], atol=1e-5)
        assert torch.allclose(attention.sum(-1) + torch.tensor(shown["attention"]["earlier"]), torch.ones(1), atol=1e-5)
        assert torch.allclose(torch.tensor(shown["router"]["probs"]).double(), layer["probs"][window], atol=1e-5)
        assert shown["router"]["chosen"] == layer["chosen"][window].tolist()
        for t, fans in shown["fans"].items():
            place = play["window"][0] + int(t)
            assert fans["attention"]["value"] == near(layer["attended"][place, fans["attention"]["index"][0]].item(), 1e-4)
            assert fans["mixed"] == near(layer["mixed"][place, fans["channel"]].item(), 1e-4)
            for fan in fans["experts"]:
                for term in fan["terms"]:
                    assert term["a"] == pytest.approx(layer["inner"][place, fan["index"][0], term["j"]].item(), rel=1e-4, abs=1e-5)


def every_fan(play):
    for layer in play["layers"]:
        for fans in layer["fans"].values():
            yield from (fans["attention"], fans["router"], *fans["experts"])
    yield from (output["fan"] for output in play["outputs"])


def test_terms_and_others_add_up_to_what_the_model_computed(play, before):
    weights = dict(before.model.named_parameters())
    for fan in every_fan(play):
        terms = sum(term["wa"] for term in fan["terms"])
        size = sum(abs(term["wa"]) for term in fan["terms"]) + abs(fan["others"]["sum"])
        assert terms + fan["others"]["sum"] + fan["rounding"] == pytest.approx(fan["value"], abs=2e-8 * size)
        assert abs(fan["rounding"]) <= 4e-6 * size, "no more than float32 loses in a sum of so many terms"
        assert len(fan["terms"]) + fan["others"]["count"] == weights[fan["tensor"]].shape[-1]
        for term in fan["terms"]:
            assert np.float32(term["w"]) == weights[fan["tensor"]][(*fan["index"], term["j"])].item()
            assert term["wa"] == pytest.approx(term["w"] * term["a"], rel=1e-7)
    for layer in play["layers"]:
        for t, fans in layer["fans"].items():
            gates = layer["router"]["gates"][int(t)]
            assert sum(g * fan["value"] for g, fan in zip(gates, fans["experts"], strict=True)) == near(fans["mixed"])


def test_a_fan_sums_what_it_does_not_show():
    weight, inputs = torch.tensor([1.0, -5.0, 0.5, 2.0, 0.25, -1.0]), torch.tensor([2.0, 1.0, 8.0, -1.5, 2.0, 0.75])
    fan = make_fan("router", "t", (7,), weight, inputs, -2.0, 0.5)
    assert [term["j"] for term in fan.terms] == [1, 2, 3, 0] and fan.others == {"count": 2, "sum": -0.25}
    assert fan.rounding == 0.25 and fan.edges()[0] == ("t", (7, 1))


def test_gradients_are_those_of_an_independent_backward_pass(play, reference):
    weights, _, _ = reference
    scale = {name: w.grad.abs().max().item() for name, w in weights.items()}
    for edge in play["edges"]:
        expected = weights[edge["tensor"]].grad[tuple(edge["index"])].item()
        assert edge["gradient"] == pytest.approx(expected, rel=1e-3, abs=1e-6 * scale[edge["tensor"]])
        assert edge["clipped"] == near(edge["gradient"] * play["step_result"]["clip_factor"])
        assert edge["by_hand"] == pytest.approx(edge["autograd"], rel=1e-3, abs=1e-9)
    tried = [edge for edge in play["edges"] if edge["difference"] is not None]
    assert tried and all(abs(e["difference"] - e["autograd"]) <= 1e-3 * abs(e["autograd"]) + e["doubt"] for e in tried)


def test_shares_of_a_token_and_all_others_make_the_gradient(play, reference):
    """The followed token's share is slope times input: here, of the independent model with all other tokens held apart."""
    output = play["outputs"][-1]
    assert output["slope"] == near((output["p"] - 1) / play["step_result"]["tokens"])
    for layer in play["layers"]:
        for fans in layer["fans"].values():
            gates = [fan["slope"] / fans["mixed_slope"] for fan in fans["experts"]]
            assert all(0 < gate < 1 for gate in gates) and sum(gates) <= 1 + 1e-6


def exact_change(edge):
    """Nine digits, as the file has them, name each float32; a term is rounded by up to 5e-9 of itself."""
    return float(np.float32(edge["after"])) - float(np.float32(edge["before"]))


def largest_term(edge):
    return max(map(abs, edge["terms"].values()))


def test_updates_follow_from_the_published_rule(play, before):
    """AdamW of Loshchilov & Hutter in float64, from the state that training held."""
    states = {name: before.optimizer.state[p] for name, p in before.model.named_parameters()}
    for edge in play["edges"]:
        rule, state, at = play["optimizer"][edge["tensor"]], states[edge["tensor"]], tuple(edge["index"])
        s, t, g = rule["settings"], int(state["step"]) + 1, edge["clipped"]
        assert edge["state"]["step"] == STEP, "updates done before this one"
        m = s["beta1"] * state["exp_avg"][at].item() + (1 - s["beta1"]) * g
        v = s["beta2"] * state["exp_avg_sq"][at].item() + (1 - s["beta2"]) * g * g
        step = (m / (1 - s["beta1"] ** t)) / (math.sqrt(v / (1 - s["beta2"] ** t)) + s["eps"])
        after = edge["before"] - s["learning_rate"] * (step + s["weight_decay"] * edge["before"])
        assert edge["quantities"]["m"] == near(m) and edge["quantities"]["direction"] == near(step, 1e-4)
        assert edge["after"] == pytest.approx(after, rel=3e-7, abs=1e-9)
        assert sum(edge["terms"].values()) == pytest.approx(exact_change(edge), abs=2e-8 * largest_term(edge))


def test_weights_after_the_step_are_the_stored_ones_bit_for_bit(play, run_dir):
    stored = checkpoint.load(checkpoint.saved_steps(run_dir / "checkpoints")[STEP + 1]).tensors["model"]
    for edge in play["edges"]:
        assert np.float32(edge["after"]) == stored[edge["tensor"]][tuple(edge["index"])].numpy()
    assert [proof["holds"] for proof in play["proofs"]] == [True, True], play["proofs"]


def test_afterwards_is_the_next_steps_before(play, run_dir):
    """Losses after the step, against the state that the following step starts from."""
    after = state_before(run_dir, STEP + 1)
    batch = after.split.batch(STEP, after.config.training.batch_size)
    with torch.no_grad():
        scores = after.model(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
    probs = scores[play["row"], slice(*play["window"])].softmax(-1)
    for at, output in enumerate(play["outputs"]):
        assert output["p_after"] == near(probs[at, output["target"]].item(), 1e-4)
    nats = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=-100)
    assert play["losses"]["batch"][1] == near(nats.item()) and play["losses"]["batch"][0] == near(play["step_result"]["loss"])


def test_staging_leaves_the_replay_where_it_stood(run_dir):
    replay = state_before(run_dir, 3)
    weights = {name: value.clone() for name, value in replay.model.state_dict().items()}
    stage(replay, run_dir=run_dir, seconds=0.0)
    assert replay.step == 3 and all(torch.equal(value, weights[name]) for name, value in replay.model.state_dict().items())
    first, again = replay.advance(), state_before(run_dir, 3).advance()
    assert first.loss == again.loss and first.grad_norm == again.grad_norm


@pytest.mark.parametrize("name", ["muon", "sgd", "lion", "adafactor"])
def test_other_rules_have_their_play_too(run_dir, tmp_path, name):
    replay = state_before(run_dir, 2)
    config = replay.config.model_copy(deep=True)
    config.optimizer.name = name
    replay.config = config
    from pellucid.training.optimizers import build_optimizer

    replay.optimizer = build_optimizer(replay.model, config.optimizer)
    play = stage(replay, seconds=0.0)
    assert {"sgd": {"sgd"}, "muon": {"muon", "adamw"}}.get(name, {name}) == {o["rule"] for o in play["optimizer"].values()}
    for edge in play["edges"]:
        assert sum(edge["terms"].values()) == pytest.approx(exact_change(edge), abs=2e-8 * largest_term(edge) + 1e-30)


def test_in_bf16_sums_close_with_their_rounding_and_proofs_hold(run_dir):
    replay = state_before(run_dir, 5)
    replay.model.compute_dtype = torch.bfloat16
    play = stage(replay, seconds=0.0)
    assert replay.model.compute_dtype == torch.bfloat16
    for fan in every_fan(play):
        size = sum(abs(term["wa"]) for term in fan["terms"]) + abs(fan["others"]["sum"])
        assert abs(fan["rounding"]) <= 2**-7 * size
    assert all(e["by_hand"] == pytest.approx(e["autograd"], rel=1e-3, abs=1e-9) for e in play["edges"])


def test_the_weight_that_the_page_opens_with_is_the_first_to_be_proven(run_dir):
    play = stage(state_before(run_dir, 4), seconds=1e-3)  # time for one
    fans = play["layers"][-1]["fans"][str(play["position"] - play["window"][0])]
    opened = play["edges"][fans["experts"][0]["terms"][0]["edge"]]
    assert [edge for edge in play["edges"] if edge["difference"] is not None] == [opened]


def test_a_finished_run_has_a_play_and_can_make_others(run_dir):
    assert 25 in staged_steps(run_dir), "made at the last checkpoint before the end, by training itself"
    assert stage_last(run_dir, 0) == []
    plays = Plays(run_dir)
    assert plays.list(29)["spans"] == [[0, 29]] and STEP in plays.list(29)["steps"]
    with pytest.raises(UserError, match="Steps that can be: 0 to 29"):
        plays.make(1000, 29)
    with pytest.raises(UserError, match="step 13 has no play"):
        plays.read(13)
    theatre_path(run_dir, 14).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        plays.read(14)
    theatre_path(run_dir, 14).unlink()


def test_a_token_predicted_with_certainty_counts_in_the_mean_loss():
    losses, predicted = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
    assert _means(losses, losses / 2, predicted) == [2.0, 1.0]


def test_a_process_that_says_other_things_or_much_of_them_blocks_no_play(run_dir, tmp_path, monkeypatch):
    """A library's warning between the lines, more on stderr than a pipe holds, and a process that dies amid it."""
    program = tmp_path / "program"
    ready = """echo '{"phase": "forward", "done": 1, "total": 2}'; echo '{"ready": "x"}'"""
    for words, ending in ((f"echo 'UserWarning: [1, 2]'; echo '[1]'; yes warning | head -c 200000 >&2; {ready}", None),
                          ("echo 'no memory' >&2; exit 1", "no memory"), ("exit 1", "the process ended")):  # fmt: skip
        program.write_text(f"#!/bin/sh\n{words}\n")
        program.chmod(0o755)
        monkeypatch.setattr("pellucid.observe.web.capsule.sys.executable", str(program))
        plays = Plays(run_dir)
        plays.make(3, 29)
        deadline = time.monotonic() + 20
        while plays.making is not None and "problem" not in plays.making and time.monotonic() < deadline:
            time.sleep(0.01)
        assert plays.making == (ending and {"step": 3, "problem": ending})
