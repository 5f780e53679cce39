"""Hugging Face directories: config.json and safetensors, under the names inference engines read.

Written: the names SGLang reads (the xai-org/grok-2 layout), `lm_head` included. Read: those, and the names of the
hpcai-tech/grok-1 port that vLLM reads, with or without `model.` in front. Only safetensors, never .bin or .pt: those
are pickles. Sources: SGLang models/grok.py, vLLM models/grok1.py, safetensors' format page.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.config import ModelConfig, UserError, explain_validation_error
from pellucid.exchange.folder import new_folder, read_json, write_json
from pellucid.exchange.leaves import Leaf, ModelSource, Source, leaves
from pellucid.exchange.pickle_walk import SPELLINGS, Spelling
from pellucid.exchange.quantize import Scales
from pellucid.model.grok import Grok1

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
OFFICIAL_SCALES = Path("official") / "scales.safetensors"  # in a folder of its own: engines read every top-level file
BALANCE_BIAS = "model.layers.{layer}.block_sparse_moe.balance_bias"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ARCHITECTURE, BIASED_ARCHITECTURE = "Grok1ForCausalLM", "Grok1WithBalanceBiasForCausalLM"
LABELLING_ARCHITECTURE = "Grok1ForSequenceClassification"  # Hugging Face's name, also for regression
SCORE = "score.weight"

# Settings of other models of this family that change what is computed, and the values that leave Grok-1 as it is.
FOREIGN = {
    "residual_moe": (None, False),
    "rope_scaling": (None,),
    "rope_type": (None, "default"),
    "final_logit_softcapping": (None, 0),
    "attn_temperature_len": (None, -1, 0),
    "sliding_window_size": (None, -1),
    "quantization_config": (None,),
    "hidden_act": (None, "gelu_pytorch_tanh", "gelu_new", "gelu"),  # some call its tanh form plain "gelu"
    "sliding_window": (None, -1),
    "attention_bias": (None, False),
    "num_shared_experts": (None, 0),
    "norm_topk_prob": (None, False),
}


def save_huggingface(
    model: Grok1, tokenizer: Any, folder: str | Path, dtype: torch.dtype | None = None, replace: bool = False
) -> None:
    """Write a model (and its tokenizer, unless None) as a Hugging Face directory, complete or not at all.

    dtype: of matrices and embedding; None keeps the model's own (float32 for a trained one: a small model stays exactly
    what was measured; pass torch.bfloat16 to halve it). Norms and router are always float32.
    replace: swap out an existing folder. Raises UserError.
    """
    with new_folder(folder, replace) as partial:
        write_huggingface(ModelSource(model), partial, dtype)
        if tokenizer is not None:
            tokenizer.save(partial)


@torch.no_grad()
def write_huggingface(
    source: Source, folder: Path, dtype: torch.dtype | None = None, progress=None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `source` into an existing, empty folder, one matrix in memory at a time.

    A nonzero balance bias is written as tensors of its own under another architecture name, so that an engine which
    knows nothing of it refuses the model instead of routing otherwise. Raises UserError.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise UserError(f"dtype {dtype}: weights are written as torch.float32 or torch.bfloat16")
    biases = _balance_biases(source)
    if source.config.head is not None:
        biases[SCORE] = source.score()
    shards, carried = _plan(source, dtype, biases, shard_bytes), {}
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    total = sum(len(shard) for shard in shards)
    done = 0
    for file_name, shard in zip(names, shards, strict=True):
        with open(folder / file_name, "xb") as file:
            file.write(_header(shard))
            for name, leaf, matrix, kind, _ in shard:
                tensor = biases[name] if leaf is None else source.matrix(leaf, matrix)
                file.write(memoryview(tensor.to(kind).contiguous().cpu().view(torch.uint8).numpy()).cast("B"))
                done += 1
                if progress is not None:
                    progress("writing", done, total)
    if len(shards) > 1:
        where = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        size = sum(_bytes(entry) for shard in shards for entry in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    for leaf in leaves(source.config):
        if (scales := source.scales(leaf)) is not None:
            carried[f"{leaf.official}.scales"] = scales.scales.contiguous()
            if scales.weight is not None:
                carried[f"{leaf.official}.weight"] = scales.weight.contiguous()
    if carried:
        (folder / OFFICIAL_SCALES).parent.mkdir()
        save_file(carried, folder / OFFICIAL_SCALES, {k: str(v) for k, v in vars(source.spelling).items()})
    biased = any(name != SCORE for name in biases)
    write_json(folder / "config.json", engine_config(source.config, _stored(source, dtype), biased))


def engine_config(config: ModelConfig, dtype: torch.dtype, balance_bias: bool = False) -> dict[str, Any]:
    """config.json for engines of both families, and for our own reader, to which it is exact.

    Engines fix the attention multiplier at head_dim^-0.5 whatever is written here; every preset has that value.
    """
    ours = config.model_dump(exclude={"preset", "init_from"} | ({"head"} if config.head is None else set()), mode="json")
    architecture, labels = BIASED_ARCHITECTURE if balance_bias else ARCHITECTURE, {}
    if config.head is not None:
        architecture = LABELLING_ARCHITECTURE
        labels = {"problem_type": config.head.problem_type, "id2label": dict(enumerate(config.head.labels)),
                  "label2id": {label: index for index, label in enumerate(config.head.labels)}}  # fmt: skip
    return {
        "architectures": [architecture],
        "model_type": "git",  # as xai-org/grok-2 has it: transformers knows no grok, and engines need a type it knows
        **ours,
        "num_local_experts": config.num_experts,  # SGLang; vLLM reads num_experts
        "attn_logit_softcapping": config.max_attn_value,  # SGLang
        "load_presharded_moe": False,  # SGLang would look for files split per device
        "hidden_act": "gelu_pytorch_tanh",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **labels,
    }


def config_from_engine(values: dict[str, Any], where: Path) -> ModelConfig:
    """ModelConfig from the config.json of either family. Raises UserError for what is not a Grok-1."""
    for key, harmless in FOREIGN.items():
        if values.get(key) not in harmless:
            raise UserError(f"{where}: {key} = {values[key]!r} is not part of Grok-1: it would be computed wrongly")
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.keys() - {"rope_theta", "rope_type"} or rope.get("rope_type") not in (None, "default"):
        raise UserError(f"{where}: rope_parameters = {rope!r} is not part of Grok-1: it would be computed wrongly")
    values = {**values, "rope_parameters: rope_theta": rope.get("rope_theta")}
    known = ModelConfig.model_fields.keys() - {"preset", "init_from"}
    fields = {key: values[key] for key in ModelConfig.model_fields if key in known and values.get(key) is not None}
    for ours, theirs in (("num_experts", "num_local_experts"), ("max_attn_value", "attn_logit_softcapping"),
                         ("rope_theta", "rope_parameters: rope_theta")):
        other = values.get(theirs)
        if other is not None and fields.setdefault(ours, other) != other:
            raise UserError(f"{where}: {ours} = {fields[ours]} contradicts {theirs} = {other}")
    for key, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key} = {value} is not a number")
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if key not in fields
    ]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing")
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation_error(error, ModelConfig)}") from None


class HuggingFaceSource:
    """The weights of a Hugging Face directory, memory-mapped; names and shapes are all checked at the start.

    Without a config, config.json says it. Raises UserError naming the file or tensor.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None):
        self.folder = Path(folder)
        if config is None:
            config = config_from_engine(read_json(self.folder / "config.json"), self.folder / "config.json")
        tensors = _open_tensors(self.folder)
        if config.vocab_size is None:
            table = next((tensors[name] for name in tensors if name.endswith("embed_tokens.weight")), None)
            config = config.model_copy(update={"vocab_size": table.shape[0] if table else 5})
        self.config = config
        self._tensors: dict[tuple[str, int], _Stored] = {}
        self._claim(tensors)
        self._biases = {
            layer: tensors.pop(name)
            for layer in range(config.num_hidden_layers)
            if (name := BALANCE_BIAS.format(layer=layer)) in tensors
        }
        for bias in self._biases.values():
            bias.check((config.num_experts,))
        self._check_head(tensors.pop("lm_head.weight", None))
        self._score = tensors.pop(SCORE, None)
        if config.head is not None:
            if self._score is None:
                raise UserError(f"{self.folder}: tensor '{SCORE}' is missing")
            self._score.check((len(config.head.labels), config.hidden_size))
        strangers = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
        if strangers:
            raise UserError(f"{tensors[strangers[0]].path}: tensor '{strangers[0]}' does not belong to a Grok-1 model")
        self._scales, self.spelling = _read_official_scales(self.folder / OFFICIAL_SCALES, config)

    def _claim(self, tensors: dict[str, _Stored]) -> None:
        needed = 2 + self.config.num_hidden_layers * (9 + 3 * self.config.num_experts)
        if len(tensors) < needed:  # before the table is walked: a stranger's config may ask for 10^12 layers
            raise UserError(f"{self.folder}: holds {len(tensors)} tensors; its configuration needs at least {needed}")
        for leaf in leaves(self.config):
            for matrix in range(leaf.matrices):
                names = [name.format(e=matrix) for name in (leaf.sglang, leaf.port)]
                names += [name.removeprefix("model.") for name in names]
                found = next((name for name in names if name in tensors), None)
                if found is None:
                    raise UserError(f"{self.folder}: tensor '{names[0]}' is missing")
                stored = tensors.pop(found)
                stored.check(leaf.matrix_shape)
                self._tensors[leaf.official, matrix] = stored

    def _check_head(self, head: _Stored | None) -> None:
        if head is None:
            return
        table = next(iter(self._tensors.values()))
        head.check(table.shape)
        for start in range(0, table.shape[0], 8192):
            rows = slice(start, start + 8192)
            if not torch.equal(head.rows(rows).float(), table.rows(rows).float()):
                raise UserError(f"{head.path}: 'lm_head.weight' differs from the embedding; Grok-1 ties the two")

    def dtype(self, leaf: Leaf) -> torch.dtype:
        return self._tensors[leaf.official, 0].dtype

    def matrix(self, leaf: Leaf, matrix: int) -> Tensor:
        return self._tensors[leaf.official, matrix].read()

    def scales(self, leaf: Leaf) -> Scales | None:
        return self._scales.get(leaf.official)

    def balance_bias(self, layer: int) -> Tensor | None:
        return self._biases[layer].read() if layer in self._biases else None

    def score(self) -> Tensor | None:
        return None if self._score is None else self._score.read()


class _Stored:
    """One tensor of a safetensors file: known by shape and dtype, read when asked for."""

    def __init__(self, path: Path, file: Any, name: str):
        self.path, self.name, self._file = path, name, file
        part = file.get_slice(name)
        self.shape, kind = tuple(part.get_shape()), part.get_dtype()
        self.dtype = next((dtype for dtype, code in DTYPES.items() if code == kind), None)
        if self.dtype is None:
            raise UserError(f"{path}: tensor '{name}' is stored as {kind}; F32, BF16 and F16 are read")

    def check(self, shape: tuple[int, ...]) -> None:
        if self.shape != shape:
            raise UserError(f"{self.path}: tensor '{self.name}' has shape {self.shape}, the configuration says {shape}")

    def read(self) -> Tensor:
        return self._file.get_tensor(self.name)

    def rows(self, rows: slice) -> Tensor:
        return self._file.get_slice(self.name)[rows]


def _open_tensors(folder: Path) -> dict[str, _Stored]:
    tensors: dict[str, _Stored] = {}
    for path in _shard_paths(folder):
        file = _open(path)
        for name in file.keys():
            if name in tensors:
                raise UserError(f"{path}: tensor '{name}' is also in {tensors[name].path.name}")
            tensors[name] = _Stored(path, file, name)
    return tensors


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _shard_paths(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(_is_plain_name(name) for name in places.values()):
            raise UserError(f"{index}: weight_map must say for each tensor a .safetensors file of this folder")
        paths = [folder / name for name in sorted(set(places.values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        if not path.is_file():
            reason = f"missing, though {INDEX} names it" if index.exists() else "not a file of weights"
            raise UserError(f"{path}: {reason}: download it again")
    if not paths:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        reason = f"{pickles[0]} is a pickle, which can run a stranger's code and is never read" if pickles else "none here"
        raise UserError(f"{folder}: weights are read from .safetensors files only ({reason})")
    return paths


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\0" not in name


def _read_official_scales(path: Path, config: ModelConfig) -> tuple[dict[str, Scales], Spelling]:
    if not path.is_file():
        return {}, Spelling()
    file = _open(path)
    metadata = file.metadata() or {}
    spelling = next((s for s in SPELLINGS if {k: str(v) for k, v in vars(s).items()} == metadata), Spelling())
    found, names = {}, set(file.keys())
    for leaf in leaves(config):
        if f"{leaf.official}.scales" not in names:
            continue
        scales = file.get_tensor(f"{leaf.official}.scales")
        weight = file.get_tensor(f"{leaf.official}.weight") if f"{leaf.official}.weight" in names else None
        fits = leaf.quantized and scales.dtype == torch.bfloat16 and scales.ndim == len(leaf.shape)
        fits = fits and scales.shape[:-2] == leaf.shape[:-2] and scales.shape[-1] == leaf.shape[-1]
        fits = fits and scales.shape[-2] > 0 and leaf.shape[-2] % scales.shape[-2] == 0
        if not fits or (weight is not None and (weight.dtype != torch.int8 or weight.shape != leaf.shape)):
            raise UserError(f"{path}: the scales of {leaf.official} do not fit the model; remove the file to do without")
        found[leaf.official] = Scales(scales, weight)
    return found, spelling


def _balance_biases(source: Source) -> dict[str, Tensor]:
    layers = range(source.config.num_hidden_layers)
    found = {BALANCE_BIAS.format(layer=layer): source.balance_bias(layer) for layer in layers}
    return {name: bias for name, bias in found.items() if bias is not None}


def _stored(source: Source, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or next(source.dtype(leaf) for leaf in leaves(source.config) if leaf.quantized)


def _plan(source: Source, dtype: torch.dtype | None, biases: dict[str, Tensor], shard_bytes: int) -> list[list[tuple]]:
    """Entries (name, leaf, matrix, dtype, shape) per file; within one, wide types first, so that all lie aligned."""
    entries: list[tuple] = []
    for leaf in leaves(source.config):
        kind = torch.float32 if leaf.kept_in_fp32 else dtype or source.dtype(leaf)
        for matrix in range(leaf.matrices):
            entries.append((leaf.sglang.format(e=matrix), leaf, matrix, kind, leaf.matrix_shape))
    if source.config.head is None:
        entries.append(("lm_head.weight", *entries[0][1:]))
    entries += [(name, None, 0, torch.float32, tuple(bias.shape)) for name, bias in biases.items()]
    shards: list[list[tuple]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and _bytes(entry) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= _bytes(entry)
    return [sorted(shard, key=lambda entry: -entry[3].itemsize) for shard in shards]


def _bytes(entry: tuple) -> int:
    return torch.Size(entry[4]).numel() * entry[3].itemsize


def _header(shard: list[tuple]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in shard:
        end = position + _bytes(entry)
        table[entry[0]] = {"dtype": DTYPES[entry[3]], "shape": list(entry[4]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

