"""xAI's official checkpoint folder (`ckpt-0`: 2 + 12 L pickles), read and written without unpickling.

Weights are dequantised as the release does, rounded to bfloat16: keeping the fp32 product moves logits by 2e-3 to 1e-1.
Writing gives back the very bytes of every weight that came from such a folder and was not changed since.
Source: xai-org/grok-1 checkpoint.py and model.py. Letters as in leaves.py; G scale rows.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from pellucid.config import ModelConfig, UserError
from pellucid.exchange.leaves import Leaf, Source, leaf_count, leaves, refuse_what_has_no_place
from pellucid.exchange.pickle_walk import StoredArray, TensorFile, find_arrays, pieces
from pellucid.exchange.quantize import Scales, dequantize, quantize, recoverable

GROK1_HEAD_DIM = 128
GROK1_MULTIPLIERS = {
    "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
}


def file_name(index: int) -> str:
    return f"tensor{index:05d}_000"


def official_folder(path: Path) -> Path | None:
    """`path`, or the `ckpt-0` in it, if that looks like an official checkpoint."""
    for folder in (path, path / "ckpt-0"):
        named = folder.name == "ckpt-0" and folder.is_dir() and not (folder / "config.json").exists()
        if named or (folder / file_name(0)).exists():
            return folder
    return None


class XaiSource:
    """The weights of an official folder, memory-mapped. All files are checked, in number, form and shape, at the start.

    Without a config: Grok-1's multipliers, head_dim 128, sizes from the files. Raises UserError naming the file.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None):
        self.folder = Path(folder)
        files = [find_arrays(path) for path in _tensor_paths(self.folder)]
        self.config = _config_with_vocabulary(config, files) if config else _config_from(files)
        if len(files) != leaf_count(self.config.num_hidden_layers):
            raise UserError(
                f"{self.folder}: holds {len(files)} tensor files where the configuration's "
                f"{self.config.num_hidden_layers} layers need {leaf_count(self.config.num_hidden_layers)}"
            )
        self._files = {}
        for leaf, file in zip(leaves(self.config), files, strict=True):
            _check(leaf, file)
            self._files[leaf.official] = file
        self.spelling = next((file.spelling for file in files if file.scales), files[0].spelling)

    def dtype(self, leaf: Leaf) -> torch.dtype:
        return torch.bfloat16 if self._files[leaf.official].scales else torch.float32

    def matrix(self, leaf: Leaf, matrix: int) -> Tensor:
        """One matrix as [out, in] (embedding and norms as they are), dequantised."""
        file = self._files[leaf.official]
        weight = _tensor(file.weight)
        if file.scales is not None:
            scales = _tensor(file.scales)
            stacked = weight.ndim == 3
            weight = dequantize(weight[matrix] if stacked else weight, scales[matrix] if stacked else scales)
        elif weight.ndim == 3:
            weight = weight[matrix]
        return weight.T if leaf.transposed else weight

    def scales(self, leaf: Leaf) -> Scales | None:
        file = self._files[leaf.official]
        if file.scales is None:
            return None
        scales = _tensor(file.scales).clone()
        return Scales(scales, None if recoverable(scales) else _tensor(file.weight).clone())

    def balance_bias(self, layer: int) -> None:
        return None

    def score(self) -> None:
        return None


def write_xai(source: Source, folder: Path, progress=None) -> None:
    """Write the files of an official checkpoint into an existing, empty folder, one matrix in memory at a time.

    Raises UserError for a head, for a nonzero balance bias and for non-finite weights.
    """
    refuse_what_has_no_place(source, "the official checkpoint")
    total = leaf_count(source.config.num_hidden_layers)
    for index, leaf in enumerate(leaves(source.config)):
        with open(folder / file_name(index), "xb") as file:
            if leaf.quantized:
                _write_quantized(file, leaf, source)
            else:
                weight = source.matrix(leaf, 0).to(torch.float32)
                prefix, _, suffix = _split(pieces(leaf.shape, None, source.spelling))
                file.write(prefix[0])
                file.write(_raw(weight.T if leaf.transposed else weight))
                file.write(suffix)
        if progress is not None:
            progress("writing", index + 1, total)


def _write_quantized(file, leaf: Leaf, source: Source) -> None:
    carried = source.scales(leaf)
    groups = carried.groups if carried else leaf.groups()
    scales_shape = (*leaf.shape[:-2], groups, leaf.shape[-1])
    literals, _, suffix = _split(pieces(leaf.shape, scales_shape, source.spelling))
    file.write(literals[0])
    all_scales = []
    for matrix in range(leaf.matrices):
        int8, scales = _int8(leaf, source.matrix(leaf, matrix).T, matrix, groups, carried)
        file.write(_raw(int8))
        all_scales.append(scales)
    file.write(literals[1])
    for scales in all_scales:
        file.write(_raw(scales.view(torch.int16)))
    file.write(suffix)


def _int8(leaf: Leaf, weight: Tensor, matrix: int, groups: int, carried: Scales | None) -> tuple[Tensor, Tensor]:
    if carried is None:
        return quantize(weight, groups, None, leaf.official)
    stacked = len(leaf.shape) == 3
    scales = (carried.scales[matrix] if stacked else carried.scales).to(weight.device)
    if carried.weight is not None:
        int8 = (carried.weight[matrix] if stacked else carried.weight).to(weight.device)
        was = dequantize(int8, scales)
        if torch.equal(was.float().nan_to_num(nan=0.0), weight.float().nan_to_num(nan=0.0)):
            return int8, scales
    return quantize(weight, groups, scales, leaf.official)


def _split(parts: list[bytes | int]) -> tuple[list[bytes], list[int], bytes]:
    """Literal bytes before each payload (joined), the payload lengths, and what follows the last."""
    literals, lengths, current = [], [], b""
    for part in parts:
        if isinstance(part, int):
            literals.append(current)
            lengths.append(part)
            current = b""
        else:
            current += part
    return literals, lengths, current


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().cpu().numpy()).cast("B")


def _tensor(array: StoredArray) -> Tensor:
    tensor = torch.from_numpy(array.map())
    return tensor.view(torch.bfloat16) if array.kind == "bfloat16" else tensor


def _tensor_paths(folder: Path) -> list[Path]:
    try:
        names = {path.name for path in folder.iterdir() if path.name.startswith("tensor")}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    for name in sorted(names):
        if not re.fullmatch(r"tensor\d{5}_000", name):
            raise UserError(f"{folder / name}: not a name of the official checkpoint (tensorNNNNN_000)")
    for index in range(len(names)):
        if file_name(index) not in names:
            raise UserError(f"{folder / file_name(index)}: missing among {len(names)} tensor files: download it again")
    if len(names) < leaf_count(1) or (len(names) - 2) % 12:
        raise UserError(
            f"{folder}: holds {len(names)} tensor files; an official checkpoint of L layers has 2 + 12 L "
            "(770 for Grok-1): some are missing or do not belong"
        )
    return [folder / file_name(index) for index in range(len(names))]


def _config_with_vocabulary(config: ModelConfig, files: list[TensorFile]) -> ModelConfig:
    if config.vocab_size is None:
        return config.model_copy(update={"vocab_size": files[0].weight.shape[0]})
    return config


def _config_from(files: list[TensorFile]) -> ModelConfig:
    """Sizes from the shapes of the first layer's files, everything else as in Grok-1."""
    table, experts, key, query = (files[index].weight for index in (0, 2, 5, 7))
    for array, rank in ((table, 2), (experts, 3), (key, 2), (query, 2)):
        if len(array.shape) != rank:
            raise UserError(f"{array.path}: shape {array.shape}; the official tensor has {rank} dimensions")
    for array in (key, query):
        if array.shape[1] % GROK1_HEAD_DIM:
            raise UserError(
                f"{array.path}: shape {array.shape} does not fit heads of {GROK1_HEAD_DIM}, the only size Grok-1 has: "
                "give the model's configuration (config=..., or `pellucid convert --config`)"
            )
    try:
        return ModelConfig(
            vocab_size=table.shape[0],
            hidden_size=table.shape[1],
            intermediate_size=experts.shape[2],
            num_hidden_layers=(len(files) - 2) // 12,
            num_attention_heads=query.shape[1] // GROK1_HEAD_DIM,
            num_key_value_heads=key.shape[1] // GROK1_HEAD_DIM,
            head_dim=GROK1_HEAD_DIM,
            num_experts=experts.shape[0],
            **GROK1_MULTIPLIERS,
        )
    except ValueError as error:
        raise UserError(f"{table.path.parent}: the shapes make no Grok-1 model: {_first_line(error)}") from None


def _first_line(error: ValueError) -> str:
    details = error.errors()[0] if hasattr(error, "errors") else {"msg": str(error)}
    return str(details["msg"]).removeprefix("Value error, ")


def _check(leaf: Leaf, file: TensorFile) -> None:
    if file.weight.shape != leaf.shape:
        raise UserError(
            f"{file.weight.path}: {leaf.official} has shape {file.weight.shape}, the configuration says {leaf.shape}"
        )
    if file.scales is None:
        return
    if not leaf.quantized:
        raise UserError(f"{file.weight.path}: {leaf.official} is quantized; the release keeps it in float32")
    shape = file.scales.shape
    fits = len(shape) == len(leaf.shape) and shape[:-2] == leaf.shape[:-2] and shape[-1] == leaf.shape[-1]
    if not fits or leaf.shape[-2] % shape[-2]:
        raise UserError(f"{file.weight.path}: scales of shape {shape} do not fit the weight's shape {leaf.shape}")


