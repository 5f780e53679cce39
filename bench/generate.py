"""Tokens a second of generation with a key/value cache: Pellucid beside Hugging Face transformers' generate, in turn.

    python bench/generate.py [--sizes small medium large] [--dtypes fp32 bf16] [--new 64] [--rounds 5] [--threads 1] [--out FILE]

The models have the sizes of cpu_step.py and random weights (transformers' is Mixtral, with the experts implementation
that proves the faster here; ours has two norms and the cap more in each layer), one sequence, most likely token; weights and
products of both in fp32, then in bf16 (ours as `generate --dtype bfloat16` serves: with every cast of the official run).
Each round asks both for `--new` tokens after the same prompt of 64, and for one token, whose time is the prompt's; the
difference is the time of decoding. The sizes are checked to be equal. Times are the process's CPU time (wall time beside
it); the ratio is the median over rounds. Needs: pip install transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from cpu_step import EXPERTS, EXPERTS_PER_TOKEN, SIZES, grok_config, machine

RESULTS = Path(__file__).parent / "results" / "generate.json"
PROMPT = 64  # tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pellucid(size: dict, dtype: torch.dtype):
    from pellucid.model.generate import generate_ids
    from pellucid.model.grok import Grok1
    from pellucid.model.initialize import initialize

    drawn = initialize(Grok1(grok_config(size)), seed=0)
    model = Grok1(grok_config(size), dtype=dtype).eval()
    model.load_state_dict(drawn.state_dict())
    return model, lambda prompt, new: list(generate_ids(model, prompt, max_new_tokens=new, temperature=0))


def mixtral(size: dict, experts: str, dtype: torch.dtype):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=size["V"], hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=size["L"],
        num_attention_heads=size["H"], num_key_value_heads=size["K"], num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN, tie_word_embeddings=True, sliding_window=None,
    )).to(dtype).eval()  # fmt: skip
    model.set_experts_implementation(experts)

    def generate(prompt: list[int], new: int) -> list[int]:
        tokens = torch.tensor([prompt])
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        return found[0, len(prompt) :].tolist()

    return model, generate


def timed(generate, prompt: list[int], new: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    assert len(generate(prompt, new)) == new
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(name: str, precision: str, options: argparse.Namespace) -> dict:
    """Rounds in turn, the first of each a warm-up; decoding alone: `new` tokens less one token's time."""
    size, prompt = SIZES[name], torch.randint(3, SIZES[name]["V"], (PROMPT,)).tolist()
    dtype = DTYPES[precision]
    built = {"pellucid": pellucid(size, dtype)} | {f"mixtral {way}": mixtral(size, way, dtype) for way in ("grouped_mm", "eager")}
    count = lambda model: sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert len({count(model) for model, _ in built.values()}) == 1, "the matrices of both must be of one size"
    rates = {contender: {"cpu": [], "wall": []} for contender in built}
    for number in range(options.rounds + 1):
        for contender, (_, generate) in list(built.items())[:: 1 if number % 2 else -1]:
            one, all_ = timed(generate, prompt, 1), timed(generate, prompt, options.new)
            for clock, first, last in zip(("cpu", "wall"), one, all_, strict=True):
                rates[contender][clock].append((options.new - 1) / (last - first))
    rates = {contender: {clock: values[1:] for clock, values in clocks.items()} for contender, clocks in rates.items()}
    best = max((c for c in rates if c != "pellucid"), key=lambda c: statistics.median(rates[c]["cpu"]))
    ratios = [ours / theirs for ours, theirs in zip(rates["pellucid"]["cpu"], rates[best]["cpu"], strict=True)]
    return {
        "size": name, "precision": precision, **size, "prompt": PROMPT, "new": options.new, "threads": options.threads, "peer": best,
        "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "tokens_per_second": {c: {k: statistics.median(v) for k, v in clocks.items()} for c, clocks in rates.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    for precision, name in ((precision, name) for precision in options.dtypes for name in options.sizes):
        result = compare(name, precision, options)
        rates = "  ".join(f"{c} {r['cpu']:.0f}" for c, r in result["tokens_per_second"].items())
        low, high = result["ratio_range"]
        print(f"{precision} {name:7} ratio {result['ratio']:.2f} ({low:.2f}..{high:.2f})  tokens per CPU-second: {rates}", flush=True)
        results.append(result)
    options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
