"""What training needs in memory, before any is spent: one step of it done dry, every tensor counted.

The training step itself runs, on tensors that have shapes but no memory (torch's FakeTensorMode), so what is allocated and
freed is the program's own doing, kernels and observation included, and no formula can fall behind it. Values decide
little: every gradient is taken to be finite, one expert to get BUSY times its share of the tokens and the others unequal
parts of the rest, as routers do before they learn. Beside tensors, what oneDNN keeps of every matrix product it has compiled is
counted, where it serves (see kernels/products.py): of one step, though later ones give experts other numbers of tokens and so make
products of other sizes. Of what else is allocated inside one operation only that of our GPU kernels is seen, by their own account.
bench/memory.py compares with what the system measured.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pellucid.config import Config, UserError
from pellucid.data.dataset import Batch, Dataset
from pellucid.data.tokenizer import load_tokenizer
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.kernels import gpu, native
from pellucid.model.kernels.gpu.copies import written_copy
from pellucid.observe.attention import probe_attention
from pellucid.observe.machine import host_memory
from pellucid.observe.observer import SilentObserver
from pellucid.observe.routing import RoutingProbe
from pellucid.observe.statistics import ParameterProbe
from pellucid.observe.text_losses import TextLossProbe
from pellucid.training.device import choose_precision
from pellucid.training.optimizers import build_optimizer
from pellucid.training.step import training_step

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.mm.out, aten.bmm.default)
KEPT = 580_000  # bytes of each size of product that oneDNN has compiled; 560,000 to 610,000 with torch 2.13, whatever the size
MOST_KEPT = 1_150_000_000  # then it forgets the products that were longest unused: 850 to 1,190 MB after 3,000 sizes
LONGEST = 131_072  # tokens; the longest context that is looked for
TRACED = 4  # layers
BUSIEST = 1  # the expert that is taken to be,
BUSY = 2.5  # with so many times its share; in the worst layers of fresh models it is 1.4 to 3.7
GRANULE = 128  # tokens; contexts are multiples of it
RECOMPUTE = ("none", "attention", "all")


@dataclass(frozen=True)
class Peak:
    """Bytes in use when most are: in all, by kind, and in which phase of the step."""

    total: int
    kinds: dict[str, int]  # of tensors: weights, moments, gradients, activations (all else); and libraries, see KEPT
    phase: str  # forward (with the loss), backward, update

    def as_dict(self) -> dict[str, Any]:
        return {"bytes": self.total, **self.kinds, "phase": self.phase}


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors made within it on one kind of device, from the first to the last reference to their
    storage, and what oneDNN keeps."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.kind, self.phase = "activations", "forward"  # of what is made from now on
        self.live: Counter[str] = Counter()
        self.total = 0
        self._records: dict[int, list] = {}  # storage -> [bytes, kind]
        self._products: set = set()
        self.peaks: dict[str, Peak] = {}  # of each phase

    def start(self) -> None:
        """All is in place: from now on, look for the peak."""
        self.peaks.clear()

    @property
    def peak(self) -> Peak:
        return max(self.peaks.values(), key=lambda peak: peak.total)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in gpu.WITHIN:
            self._add(within := gpu.WITHIN[func](*args), self.kind)
            self._add(-within, self.kind)
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and args[0].dtype == torch.bfloat16:
            self._see_product(func, args[:2])
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                self.see(leaf)
        return result

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor, if it is not counted yet; with `kind`, count it as that from now on."""
        storage = tensor.untyped_storage()
        key, record = storage._cdata, self._records.get(storage._cdata)
        if record is None:
            record = self._records[key] = [storage.nbytes(), kind or self.kind]
            weakref.finalize(storage, self._gone, key).atexit = False
            self._add(*record)
        elif kind is not None and record[1] != kind:
            self._add(-record[0], record[1])
            record[1] = kind
            self._add(*record)

    def _see_product(self, func, factors: tuple[Tensor, Tensor]) -> None:
        product = (func, *((factor.shape, factor.is_contiguous()) for factor in factors))
        if factors[0].device.type == self.device == "cpu" and native.dry() != "cuda" and product not in self._products:
            self._products.add(product)
            self._add(min(self._kept(func), MOST_KEPT - self.live["libraries"]), "libraries")

    def _kept(self, func) -> int:
        return KEPT

    def _gone(self, key: int) -> None:
        size, kind = self._records.pop(key)
        self._add(-size, kind)

    def _add(self, size: int, kind: str) -> None:
        self.live[kind] += size
        self.total += size
        if self.phase not in self.peaks or self.total > self.peaks[self.phase].total:
            self.peaks[self.phase] = Peak(self.total, dict(self.live), self.phase)


class DryLedger(Ledger):
    """A Ledger over tensors without memory, which answers where the program asks for a value."""

    experts_per_token = 1
    chunks = 1  # of queries, each of which has products of sizes of its own
    layer = 0  # that is at work

    def _kept(self, func) -> int:
        return KEPT * self.chunks // min(2, self.chunks) if func is aten.bmm.default else KEPT  # a dry run does the last two

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._value(args[0])
        if func is aten.bincount.default:  # the rows of each expert
            size = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            counts = args[0].new_empty(size)
            counts.untyped_storage().shared = args[0].numel()
            counts.untyped_storage().spread = 0.3 + self.layer * 3 % 8 / 12
            return counts
        if func is aten.repeat_interleave.Tensor and _shared(args[0]) is not None:
            return args[0].new_empty(_shared(args[0]))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in (aten.any.default, aten.any.dim):
            result.untyped_storage().shared = 0
        return result

    def _value(self, tensor: Tensor) -> Any:
        total = _shared(tensor)
        if tensor.dtype == torch.bool:
            return total != 0  # what is asked of `any` is not so; all else is
        if total is None:
            return 1.0 if tensor.dtype.is_floating_point else 1
        experts, e = tensor.untyped_storage().nbytes() // tensor.element_size(), tensor.storage_offset()
        busiest = min(total // self.experts_per_token, int(BUSY * total / experts))  # no token chooses an expert twice
        if e == BUSIEST or experts == 1:
            return busiest
        rest, e, others = total - busiest, e - (e > BUSIEST), experts - 1
        spread = tensor.untyped_storage().spread * (others > 1)
        upto = lambda e: int(rest * e / others * (1 - spread * (others - e) / others))  # least to the first, most to the last
        return upto(e + 1) - upto(e)


def _shared(tensor: Tensor) -> int | None:
    return getattr(tensor.untyped_storage(), "shared", None)


# ------------------------------------------------------------------------------------------------- a step


def with_vocabulary(config: Config) -> Config:
    """The same with the vocabulary that its tokenizer has, or is to have. Raises UserError where only the text can tell."""
    if config.model.vocab_size is not None:
        return config
    wanted = config.data.tokenizer
    if config.data.prepared is not None:
        size = Dataset(config.data.prepared, verify=False).tokenizer.vocab_size
    elif wanted.kind == "file":
        size = load_tokenizer(wanted.path).vocab_size
    elif wanted.kind == "characters":
        raise UserError("data.tokenizer.kind = 'characters': how many there are is known once the text is read; set model.vocab_size")
    else:
        size = 4 + 256 if wanted.kind == "bytes" else wanted.vocab_size
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def predict_peak(config: Config, device: str = "cpu") -> Peak:
    """The peak of training by `config`, whose model.vocab_size is known, on this machine's processor, or (cuda) on its GPU, or where
    there is none on a Hopper card.

    Raises UserError for another task than language modelling, and on a GPU without triton or with moments offloaded.
    Of many layers the fourth and fifth are traced: each phase needs as much more for every other one, forward as backward.
    """
    if device == "cuda" and not gpu.HAS_TRITON:
        raise UserError("--device cuda: a GPU's kernels need the package triton to be planned: pip install 'pellucid[gpu]'")
    if device == "cuda" and config.optimizer.offload:
        raise UserError("optimizer.offload: its memory on a GPU is not predicted; plan without it, and take the moments off")
    if config.training.task != "language_modeling":
        raise UserError(f"training.task = '{config.training.task}': the memory of training is predicted for language models only; "
                        "plan a copy of the configuration without training.task, data.label_field and what goes with them")  # fmt: skip
    layers = config.model.num_hidden_layers
    if layers <= TRACED + 1:
        return trace_step(config, device, DryLedger()).peak
    few, more = (trace_step(_with_layers(config, n), device, DryLedger()).peaks for n in (TRACED, TRACED + 1))
    far = lambda a, b: b + (layers - TRACED - 1) * (b - a)
    at_end = {phase: Peak(far(few[phase].total, peak.total), {kind: far(few[phase].kinds.get(kind, 0), size)
                          for kind, size in peak.kinds.items()}, phase) for phase, peak in more.items()}  # fmt: skip
    return max(at_end.values(), key=lambda peak: peak.total)


def _with_layers(config: Config, layers: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_hidden_layers": layers})})


def trace_step(config: Config, device: str, ledger: Ledger) -> Ledger:
    """Do one training step within the ledger: dry with a DryLedger, with real tensors and random tokens otherwise.

    Dry, all tensors are the CPU's: without a GPU torch cannot even imagine one's."""
    dry = isinstance(ledger, DryLedger)
    with native.dry_run(device) if dry else nullcontext(), FakeTensorMode() if dry else nullcontext(), ledger:
        _step(config, torch.device("cpu" if dry else device), ledger)
    return ledger


def _step(config: Config, device: torch.device, ledger: Ledger) -> None:
    settings = config.training
    ledger.experts_per_token, ledger.chunks = config.model.num_experts_per_tok, -(-config.data.sequence_length // GRANULE)
    with _as(ledger, "weights"):
        model = Grok1(config.model, device=device)
        if not isinstance(ledger, DryLedger):
            initialize(model, settings.seed)
    precision = "bf16" if settings.precision == "auto" and native.dry() == "cuda" else settings.precision
    model.compute_dtype, model.parity = choose_precision(precision, device)
    model.recompute = settings.recompute
    optimizer = build_optimizer(model, config.optimizer, settings.seed)
    for number, layer in enumerate(model.layers):
        layer.moe.register_forward_pre_hook(lambda *_, number=number: setattr(ledger, "layer", number))
    weights = list(model.parameters())
    with _as(ledger, "moments"):  # a first step, so that the moments are there
        if native.dry() == "cuda" or device.type == "cuda":  # and what the products read
            training_step(model, optimizer, [_random_batch(config, 1, device, GRANULE)], settings, 1.0, SilentObserver())
        else:
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
    for weight in weights:
        if (copy := written_copy(weight)) is not None:
            ledger.see(copy, "weights")
        weight.grad = None
        weight.register_post_accumulate_grad_hook(lambda weight: ledger.see(weight.grad, "gradients"))
    several = min(2, settings.batch_size // settings.micro_batch_size)  # the others repeat the second
    batches = [_random_batch(config, settings.micro_batch_size, device) for _ in range(several)]
    observer = _Observer(ledger, model, optimizer, config)
    ledger.start()
    training_step(model, optimizer, batches, settings, 1.0, observer)


@contextmanager
def _as(ledger: Ledger, kind: str) -> Iterator[None]:
    before, ledger.kind = ledger.kind, kind
    yield
    ledger.kind = before


def _random_batch(config: Config, rows: int, device: torch.device, most: int | None = None) -> Batch:
    T = min(config.data.sequence_length, most or config.data.sequence_length)
    tokens = torch.randint(4, config.model.vocab_size, (rows, T + 1), device=device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(rows, T, dtype=torch.int32, device=device),
                 torch.arange(T, dtype=torch.int32, device=device).repeat(rows, 1), torch.arange(rows, device=device),
                 torch.zeros(rows, dtype=torch.int64, device=device))  # fmt: skip


class _Observer(SilentObserver):
    """Tells the ledger where the step is, and measures what the observer measures when it measures all."""

    def __init__(self, ledger: Ledger, model: Grok1, optimizer: torch.optim.Optimizer, config: Config):
        self.ledger, self.model, self.enabled = ledger, model, config.observe.enabled
        if not self.enabled:
            return
        shape = config.model
        self.parameters = ParameterProbe(model, optimizer)
        self.largest = max(self.parameters.parameters, key=lambda p: p.weight.numel())
        self.routing = RoutingProbe(shape.num_hidden_layers, shape.num_experts, shape.num_experts_per_tok)
        self.text = TextLossProbe(config.data.sequence_length, [source.path for source in config.data.sources], shape.vocab_size)

    def micro_batch(self, batch, routings, per_token_N, predicted_N) -> None:
        if self.enabled:
            self.routing.add(routings, batch.targets_BT.reshape(-1) >= 0)
            self.text.add(batch, per_token_N, predicted_N, True)
            probe_attention(self.model, batch)
        self.ledger.phase = "backward"

    def after_backward(self, batch) -> None:
        self.ledger.phase = "forward"

    def reads_gradients(self) -> bool:
        return self.enabled

    def before_update(self, result) -> None:
        self.ledger.phase = "update"
        if self.enabled:
            self.parameters.before(self.largest, False)

    def after_update(self, result) -> None:
        if self.enabled:
            self.parameters.after(True, False)


# ---------------------------------------------------------------------------------------- what fits


def at_context(config: Config, tokens: int, recompute: str) -> Config:
    """The same training with one sequence of so many tokens at a time."""
    changed = config.model_copy(deep=True)
    changed.data.sequence_length = tokens
    changed.model = changed.model.model_copy(update={"max_position_embeddings": max(tokens, changed.model.max_position_embeddings)})
    changed.training.micro_batch_size = 1  # first: the batch must be a multiple of it
    changed.training.batch_size = 1
    changed.training.recompute = recompute
    return changed


def largest_context(
    config: Config, memory: int, device: str = "cpu", tell: Callable[[int], None] | None = None
) -> dict[str, tuple[int, Peak] | None]:
    """For each way to recompute: (tokens of the longest sequence whose step stays within `memory` bytes, its peak).

    None where not even one granule fits. `tell` hears each context that is tried.
    """
    return {mode: _longest(config, mode, memory, device, tell or (lambda tokens: None)) for mode in RECOMPUTE}


def _longest(config: Config, mode: str, memory: int, device: str, tell) -> tuple[int, Peak] | None:
    """By secants, to 1 %: the peak grows all but linearly, faster where another phase takes the lead."""
    known: dict[int, Peak] = {}
    tokens = 8 * GRANULE
    while tokens not in known:
        tell(tokens)
        known[tokens] = predict_peak(at_context(config, tokens, mode), device)
        fitting = [t for t, peak in known.items() if peak.total <= memory]
        if not fitting:
            if tokens == GRANULE:
                return None
            tokens = GRANULE
            continue
        low = max(fitting)
        if low == LONGEST or known[low].total > 0.99 * memory:
            break
        above = [t for t in known if t > low]
        if len(known) == 1:
            tokens *= 4
            continue
        a, b = (low, min(above)) if above else sorted(known)[-2:]
        rise = (known[b].total - known[a].total) / (b - a)
        tokens = a + int((memory - known[a].total) / rise) if rise > 0 else LONGEST
        tokens = min(max(tokens // GRANULE, 1) * GRANULE, LONGEST)
    return low, known[low]


def program_bytes(device: str) -> int:
    """What the program itself takes there: interpreter and libraries on a CPU, measured now; on a GPU, CUDA's context, which
    only a card can tell: half a gigabyte is usual."""
    return int(host_memory()) if device == "cpu" else 500_000_000


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """'24GiB', '80 GB', '16e9'. Raises UserError."""
    number = text.strip().upper().removesuffix("B")
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if number.endswith(u)), "")
    try:
        value = float(number.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise UserError(f"'{text}' is no amount of memory: write it like 24GiB or 80GB")
    return int(value)
