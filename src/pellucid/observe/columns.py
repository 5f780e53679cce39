"""What is recorded, in words: every statistic's meaning, formula, healthy range and source, stored beside the numbers.

The dashboard's tooltips, the docs and the exports all read these lines from the run's own file.
Notation: w weight, g gradient (after accumulation, before clipping), c clip factor, m, v Adam's moments, dw the update
actually applied (weight after - weight before), u = m_hat / (sqrt(v_hat) + eps), N elements, E experts, k per token.
"""

from pellucid.observe.store import Stat

PARAM = (
    Stat("weight_norm", scale="log", low=1e-3, high=1e3, formula="||w||", meaning="Size of the weights before the step."),
    Stat("gradient_norm", scale="log", low=1e-8, high=1e2, formula="||g||", meaning="Size of the loss's gradient, before clipping."),
    Stat("clipped_norm", scale="log", low=1e-8, high=1e2, formula="c ||g||", meaning="Size of the gradient the optimizer saw."),
    Stat("update_norm", scale="log", low=1e-8, high=1e1, formula="||dw||",
         meaning="Size of the change actually applied; over all elements where `exact` is 1, else from a fixed sample."),
    Stat("update_ratio", scale="log", low=1e-6, high=1e-1, formula="||dw|| / ||w||", meaning="Relative size of the change.",
         healthy="about 1e-3; AdamW tends to sqrt(2 lr decay (1-beta1)/(1+beta1)); above 3e-2 after warm-up is too large",
         source="Karpathy, makemore part 3; Kosson et al. 2023, arXiv 2305.17212"),
    Stat("exact", low=0, high=1, meaning="1: update_norm, update_ratio and credit of this step were measured over all elements; "
         "0: estimated from a fixed sample of up to 1,024 coordinates per tensor or expert."),
    Stat("adam_rms", scale="log", low=1e-2, high=1e1, formula="RMS(u)", meaning="Size of Adam's normalised step.",
         healthy="0.2 to 0.4 in steady state (noise alone gives sqrt((1-beta1)/(1+beta1)) = 0.23); near 1: one direction",
         source="Su, kexue.fm/archives/11267; Liu et al. 2025, arXiv 2502.16982"),
    Stat("staleness", scale="log", low=1e-1, high=1e2, formula="sqrt(mean(g^2 / max(v_hat, eps^2))), g clipped",
         meaning="How far today's gradient exceeds what Adam expects of it: an early sign of loss spikes.",
         healthy="about 1; above 2.3 a spike may follow in 1 to 8 steps", source="Wortsman et al. 2023, arXiv 2304.13013"),
    Stat("cos_descent", low=-1, high=1, formula="cos(-g, dw)", meaning="Does the step go down this batch's gradient?",
         healthy="positive; below 0 momentum walks uphill", source="Kosson et al. 2024, arXiv 2410.23922"),
    Stat("cos_previous", low=-1, high=1, formula="cos(dw_t, dw_t-1)", meaning="Does the step continue the one before?",
         healthy="near beta1 under Adam; near -1: oscillation", source="Cohen et al. 2021, arXiv 2103.00065"),
    Stat("cos_gradient", low=-1, high=1, formula="cos(g_t, g_t-1)", meaning="Do two batches agree?"),
    Stat("credit", "nats", low=-1e-2, high=1e-2, formula="g . dw", meaning="First-order change of this batch's loss by this "
         "tensor's step; negative: it helped.", source="Lan et al. 2019, arXiv 1909.01440"),
    Stat("weight_nonfinite", "elements", low=0, high=1, meaning="NaN or infinite weights.", healthy="0"),
    Stat("gradient_nan", "elements", low=0, high=1, meaning="NaN in the gradient.", healthy="0"),
    Stat("gradient_inf", "elements", low=0, high=1, meaning="Infinities in the gradient.", healthy="0"),
    Stat("gradient_zero", "share", low=0, high=1, meaning="Share of gradient elements that are exactly 0 (sampled)."),
    Stat("unmoved", "share", low=0, high=1, meaning="Share of elements with a gradient that did not change at all (sampled).",
         healthy="near 0; bf16 weights without fp32 masters lose small steps"),
    Stat("swallowed", "share", low=0, high=1, formula="|dw| < 2^-9 |w|", meaning="Share of elements whose change a bf16 weight "
         "would lose (sampled).", healthy="any, if masters are fp32", source="half a unit in bf16's last place"),
    Stat("epsilon", "share", low=0, high=1, formula="sqrt(v_hat) < eps", meaning="Share of elements whose step eps decides, "
         "not the gradient (sampled).", healthy="near 0", source="Wortsman et al. 2023, arXiv 2309.14322"),
    Stat("learning_rate", scale="log", low=1e-6, high=1e-1, meaning="Learning rate of the tensor's group at this step."),
    Stat("weight_decay", low=0, high=1, meaning="Weight decay of the tensor's group."),
)

ROUTER = (
    Stat("tokens", "tokens", low=0, high=1e4, meaning="Tokens that chose this expert (pads left out)."),
    Stat("load", low=0, high=3, formula="tokens E / (T k)", meaning="Its share of the work; 1 is fair.",
         healthy="0.5 to 2", source="Wang et al. 2024, arXiv 2408.15664"),
    Stat("probability", "share", low=0, high=1, meaning="Mean router probability over all tokens."),
    Stat("gate_mass", "share", low=0, high=1, formula="sum of gates / tokens of the batch",
         meaning="Weight with which it entered the residual stream, per token of the batch."),
    Stat("mean_gate", low=0, high=1, meaning="Mean gate of the tokens it served; null if there were none."),
    Stat("gradient_norm", scale="log", low=1e-8, high=1e2, meaning="Of its slices of all stacked tensors together."),
    Stat("update_norm", scale="log", low=1e-8, high=1e1, meaning="Of its slices of all stacked tensors together."),
    Stat("ghost", low=0, high=1, meaning="1: it moved without having served a token (momentum or decay alone).", healthy="0",
         source="PaddleFormers issue 4405"),
    Stat("ghost_share", "share", low=0, high=1, formula="sum ||dw_e|| of steps without tokens / sum ||dw_e||", healthy="0",
         meaning="How much of its way, over about the last 100 measured steps, it went in steps in which it served no token; "
         "null before it moves."),
    Stat("frozen", low=0, high=1, meaning="1: it served tokens and did not move, while other experts did.", healthy="0",
         source="DeepSpeed issue 8354"),
    Stat("idle_steps", "steps", low=0, high=100, meaning="Steps since it last served a token.", healthy="below 100"),
)

LAYER = (
    Stat("max_violation", low=0, high=3, formula="max load - 1", meaning="How overloaded the busiest expert is.",
         healthy="below 1", source="Wang et al. 2024, arXiv 2408.15664"),
    Stat("idle_experts", "experts", low=0, high=8, meaning="Experts without a token in this step.", healthy="0"),
    Stat("token_entropy", low=0, high=1, formula="mean H(p) / ln E", meaning="How undecided the router is about a token.",
         healthy="falls slowly; near 0 early is collapse", source="Zoph et al. 2022, arXiv 2202.08906"),
    Stat("load_entropy", low=0, high=1, formula="exp(H(load)) / E", meaning="Share of experts effectively in use.", healthy="near 1"),
    Stat("top_mass", "share", low=0, high=1, formula="mean sum of the k gates", meaning="Probability that the chosen experts "
         "hold. Grok-1 does not renormalise it: what is missing shrinks the branch."),
    Stat("margin", low=-1, high=1, formula="mean(least chosen p - best unchosen p)", meaning="How firmly the choice was made."),
    Stat("logit_max", low=-10, high=10, meaning="Largest router score.", healthy="bounded", source="Zoph et al. 2022"),
    Stat("logit_min", low=-10, high=10, meaning="Smallest router score."),
    Stat("router_z", scale="log", low=1e-2, high=1e2, formula="mean logsumexp(scores)^2", meaning="What the router z-loss limits."),
)

ATTENTION = (
    Stat("saturation", "share", low=0, high=0.2, formula="|x| > 0.88 cap", meaning="Share of visible scores that the cap "
         "c tanh(x/c) flattens to less than half their slope.", healthy="below 5 %"),
    Stat("entropy", low=0, high=1, formula="mean H(weights) / ln(visible keys)", meaning="How widely a head looks; 0: one key.",
         healthy="not near 0 in all heads", source="Zhai et al. 2023, arXiv 2303.06296"),
    Stat("score_max", scale="log", low=1e-1, high=1e3, meaning="Largest |score| before the cap.", healthy="below the cap, 30"),
)

LOSS = (
    Stat("loss", "nats", low=0, high=12, meaning="Mean cross-entropy of these tokens."),
    Stat("tokens", "tokens", low=0, high=1e5, meaning="Predicted tokens."),
)

EVALUATION = (
    Stat("loss", "nats", low=0, high=12, meaning="Held-out cross-entropy per token (of labelled documents: see the run's)."),
    Stat("perplexity", scale="log", low=1, high=1e5, meaning="exp(loss)."),
    Stat("bits_per_byte", "bits", low=0, high=8, meaning="Held-out bits per byte of text: comparable between tokenizers."),
    Stat("gap", "nats", low=-1, high=1, formula="held-out loss - mean training loss of the last 32 steps",
         meaning="What the model knows of its training data only.", healthy="small and steady; widening is overfitting"),
    Stat("tokens", "tokens", low=0, high=1e6, meaning="Held-out tokens measured; null for labelled documents."),
    Stat("documents", "documents", low=0, high=1e6, meaning="Held-out labelled documents measured; null for text."),
    Stat("accuracy", "share", low=0, high=1, meaning="Classification: documents whose class was predicted."),
    Stat("macro_f1", low=0, high=1, meaning="Classification: mean F1 of the classes."),
    Stat("rmse", scale="log", low=1e-3, high=1e3,
         meaning="Regression: root mean squared error, in the number's own unit; null for several numbers."),
    Stat("r2", low=-1, high=1, meaning="Regression: 1 - squared error / that of the mean."),
    Stat("spearman", low=-1, high=1, meaning="Regression: rank correlation of prediction and truth."),
)

PHASES = ("data", "forward", "loss", "backward", "clip", "update", "observe", "between")

RUN = (
    Stat("loss", "nats", low=0, high=12, meaning="Cross-entropy of the step's batch, per token. Classification: per document. "
         "Regression: squared (or Huber) error per document, in standard deviations. With class weights and smoothing, where set."),
    Stat("balance_loss", low=0, high=10, meaning="Load-balance loss, unweighted; 1 is balanced (switch); null if it is off."),
    Stat("router_z_loss", low=0, high=10, meaning="Router z-loss, unweighted; null if it is off."),
    Stat("z_loss", low=0, high=1, meaning="z-loss of the output scores, weighted; null if it is off."),
    Stat("learning_rate", scale="log", low=1e-6, high=1e-1, meaning="Of the first parameter group."),
    Stat("gradient_norm", scale="log", low=1e-3, high=1e3, meaning="Global, before clipping."),
    Stat("clip_factor", low=0, high=1, formula="min(1, limit / ||g||)", meaning="What clipping left of the gradient.",
         healthy="1 most of the time"),
    Stat("applied", low=0, high=1, meaning="0: loss or gradient was not finite and the step was skipped.", healthy="1"),
    Stat("weight_norm", scale="log", low=1, high=1e4, meaning="Of all parameters."),
    Stat("update_norm", scale="log", low=1e-6, high=1e2, meaning="Of all parameters' changes."),
    Stat("credit", "nats", low=-1, high=1, formula="sum of g . dw", meaning="First-order prediction of the loss change on this batch."),
    Stat("noise_scale", "tokens", scale="log", low=1e2, high=1e8, formula="tr(covariance) / ||G||^2, from micro-batch norms",
         meaning="Batch size above which more data per step stops paying; null with one micro-batch.",
         source="McCandlish et al. 2018, arXiv 1812.06162"),
    Stat("tokens", "tokens", low=0, high=1e6, meaning="Predicted tokens of the step."),
    Stat("tokens_per_second", "tokens/s", low=0, high=1e6, meaning="Speed over the whole step."),
    Stat("mfu", "share", low=0, high=1, meaning="Model FLOPs over the device's bf16 peak; null where the peak is not known."),
    Stat("step_seconds", "s", scale="log", low=1e-3, high=1e2, meaning="From reading the batch to the end of the step."),
    *(Stat(f"{phase}_seconds", "s", scale="log", low=1e-5, high=1e1, meaning=f"Time of the phase: {phase}.") for phase in PHASES[:-1]),
    Stat("between_seconds", "s", scale="log", low=1e-5, high=1e1, meaning="Before this step: evaluation, checkpoints, display."),
    Stat("host_memory", "B", low=0, high=1e11, meaning="Resident memory of the process."),
    Stat("device_memory", "B", low=0, high=1e11, meaning="Largest memory allocated on the accelerator; null on the CPU."),
    Stat("observe_share", "share", low=0, high=0.1, meaning="Share of the step's time spent observing, moving average.",
         healthy="at most observe.budget"),
    Stat("exact_row", low=0, high=1e4, meaning="`param` row whose update was measured over all elements; null if none."),
    Stat("beta1", low=0, high=1, meaning="Of the first group that has one; null if none has."),
    Stat("beta2", low=0, high=1, meaning="Of the first group that has one; null if none has."),
    Stat("checkpoint_seconds", "s", scale="log", low=1e-5, high=1e2, meaning="Of between_seconds: writing checkpoints."),
)

INDEX = {
    stream: {stat.name: i for i, stat in enumerate(stats)}
    for stream, stats in {"param": PARAM, "router": ROUTER, "layer": LAYER, "attention": ATTENTION, "run": RUN,
                          "evaluation": EVALUATION, "position": LOSS, "source": LOSS}.items()
}  # fmt: skip
