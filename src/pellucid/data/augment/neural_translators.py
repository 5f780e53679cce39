"""Picture 2, augment: translation by a model on this machine. Both import their library only when made.

transformers   MarianMT (Junczys-Dowmunt et al. 2018) and NLLB (NLLB team 2022), from a folder or a hub name
ctranslate2    the same models converted: int8 on the processor, several times faster
By default decoding is greedy or by beam, and a batch holds texts of like length, so padding is small. With sampling
each text is translated alone from a seed of its own: its result then depends on no neighbour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pellucid.config import UserError
from pellucid.data.augment.translators import stamp

NLLB = {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "es": "spa_Latn", "ru": "rus_Cyrl", "zh": "zho_Hans",
        "it": "ita_Latn", "pt": "por_Latn", "ja": "jpn_Jpan", "ar": "arb_Arab"}  # other codes are passed as they are


def in_batches(texts: Sequence[str], size: int, translate: Callable[[list[str]], list[str]]) -> list[str]:
    """Translate in batches of like length; results in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda n: (len(texts[n]), texts[n]))
    result = [""] * len(texts)
    for first in range(0, len(order), size):
        some = order[first : first + size]
        for n, text in zip(some, translate([texts[n] for n in some]), strict=True):
            result[n] = text
    return result


def model_name(models: dict[str, str], source: str, target: str) -> str:
    """The model for a direction. Raises UserError where none is given."""
    name = models.get(f"{source}-{target}") or models.get("*")
    if name is None:
        raise UserError(f"data.augment: no model for {source}-{target}; set models = {{\"{source}-{target}\" = \"folder\"}}")
    return name


def models_fingerprint(models: dict[str, str]) -> str:
    """Changes when a file in a model's folder does. Models by hub name are known by their names alone."""
    stamps = "".join(stamp(path) for name in sorted(models.values()) for path in sorted(Path(name).rglob("*")))
    return hashlib.sha256(stamps.encode()).hexdigest()[:16]


def text_seed(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=4).digest(), "little")


class TransformersTranslator:
    """Sequence-to-sequence models of Hugging Face transformers; `models` gives one per (source, target), or "*" for all.

    `load(name)` -> (model, tokenizer) may be replaced, as the tests do.
    """

    def __init__(self, models: dict[str, str], *, sampling: bool = False, beams: int = 1, batch_size: int = 32,
                 device: str = "cpu", load: Callable[[str], tuple[Any, Any]] | None = None):
        self.models, self.sampling, self.beams, self.batch_size, self.device = models, sampling, beams, batch_size, device
        self.fingerprint = f"transformers-{sorted(models.items())}-{sampling}-{beams}-{models_fingerprint(models)}"
        self._load, self._loaded = load or load_transformers, {}

    def translate(self, texts: Sequence[str], source: str, target: str, *, seed: int = 0) -> list[str]:
        name = model_name(self.models, source, target)
        if name not in self._loaded:
            model, tokenizer = self._load(name)
            self._loaded[name] = model.to(self.device).eval(), tokenizer
        model, tokenizer = self._loaded[name]
        size = 1 if self.sampling else self.batch_size
        return in_batches(texts, size, lambda batch: self._generate(model, tokenizer, batch, source, target, seed))

    def _generate(self, model: Any, tokenizer: Any, texts: list[str], source: str, target: str, seed: int) -> list[str]:
        import torch

        options: dict[str, Any] = {"num_beams": self.beams, "do_sample": self.sampling, "max_new_tokens": 256}
        if hasattr(tokenizer, "src_lang"):  # NLLB: the target language is the first token
            tokenizer.src_lang = NLLB.get(source, source)
            options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(NLLB.get(target, target))
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(self.device)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(text_seed(texts[0], seed))
            made = model.generate(**inputs, **options)
        return tokenizer.batch_decode(made, skip_special_tokens=True)


def load_transformers(name: str) -> tuple[Any, Any]:
    """Model and tokenizer by folder or hub name. Weights are read from safetensors only: nothing is unpickled."""
    try:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    except ImportError:
        raise UserError("data.augment: engine = 'transformers' needs the library; `pip install pellucid[translation]` "
                        "gives it") from None
    try:
        return AutoModelForSeq2SeqLM.from_pretrained(name, use_safetensors=True), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data.augment: cannot load the translation model {name!r} "
                        f"({str(error).splitlines()[0][:160]})") from None


class CTranslate2Translator:
    """Folders made by ct2-transformers-converter, with source.spm and target.spm (or one sentencepiece .model) beside."""

    def __init__(self, models: dict[str, str], *, sampling: bool = False, beams: int = 1, batch_size: int = 32,
                 device: str = "cpu"):
        self.models, self.sampling, self.beams, self.batch_size, self.device = models, sampling, beams, batch_size, device
        self.fingerprint = f"ctranslate2-{sorted(models.items())}-{sampling}-{beams}-{models_fingerprint(models)}"
        self._loaded: dict[str, tuple[Any, Any, Any]] = {}
        try:
            import ctranslate2  # noqa: F401
        except ImportError:
            raise UserError("data.augment: engine = 'ctranslate2' needs the library; `pip install pellucid[translation]` "
                            "gives it") from None

    def translate(self, texts: Sequence[str], source: str, target: str, *, seed: int = 0) -> list[str]:
        name = model_name(self.models, source, target)
        if name not in self._loaded:
            self._loaded[name] = self._open(Path(name))
        multilingual = f"{source}-{target}" not in self.models
        languages = (NLLB.get(source, source), NLLB.get(target, target)) if multilingual else None
        size = 1 if self.sampling else self.batch_size
        return in_batches(texts, size, lambda batch: self._run(self._loaded[name], batch, languages, seed))

    def _open(self, folder: Path) -> tuple[Any, Any, Any]:
        import ctranslate2
        import sentencepiece

        try:
            one, two = folder / "source.spm", folder / "target.spm"
            if not one.is_file():
                one = two = next(iter(sorted(folder.glob("*.model"))), one)
            pieces = [sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes()) for path in (one, two)]
            return ctranslate2.Translator(str(folder), device=self.device), *pieces
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{folder}: not a CTranslate2 model with source.spm and target.spm "
                            f"({str(error).splitlines()[0][:120]})") from None

    def _run(self, loaded: tuple[Any, Any, Any], texts: list[str], languages: tuple[str, str] | None,
             seed: int) -> list[str]:
        import ctranslate2

        model, source, target = loaded
        tokens = source.encode(texts, out_type=str)
        tokens = [[languages[0], *row, "</s>"] if languages else [*row, "</s>"] for row in tokens]
        ctranslate2.set_random_seed(text_seed(texts[0], seed))
        results = model.translate_batch(
            tokens, target_prefix=[[languages[1]]] * len(texts) if languages else None, beam_size=self.beams,
            sampling_topk=0 if self.sampling else 1, min_decoding_length=0, max_decoding_length=256)
        return [target.decode(row.hypotheses[0][bool(languages):]) for row in results]
