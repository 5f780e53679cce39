"""Picture 2, tokenize: how each kind of tokenizer is made from a sample of the training split.

bpe         byte-level BPE (Sennrich et al. 2016; GPT-2's word split, every digit by itself as in Grok-1)
sentencepiece   BPE with byte fallback and the flags of Grok-1's own model
unigram     the same with a unigram language model (Kudo 2018) in place of merges
bytes       id = byte + 4        characters   one id per character seen, bytes for the others
All reserve pad 0, bos 1, eos 2, unk 3 and can spell any text through the 256 bytes. The same texts in the same
order give the same tokenizer.
"""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
from collections.abc import Iterable, Iterator

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pellucid.config import TokenizerConfig, UserError
from pellucid.data.bpe_training import bpe_merges
from pellucid.data.tokenizer import BYTE_OF, RESERVED, HuggingFaceEngine, SentencePieceEngine, Tokenizer, load_tokenizer

SAMPLE_BYTES = 1 << 26  # of text a tokenizer is trained on; memory stays within about ten times this
LONGEST_SENTENCE = 4096  # characters SentencePiece gets at once
GROK_SYMBOLS = ["\n" * n for n in range(1, 11)] + list("0123456789") + ["\t" * n for n in range(1, 9)]


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train a tokenizer of `config.kind` on texts (at most SAMPLE_BYTES of them), or load one for kind "file".

    The vocabulary may come out smaller than asked when the texts are too short to fill it. Raises UserError.
    """
    if config.kind == "file":
        return load_tokenizer(config.path)
    make = {"bpe": _bpe, "sentencepiece": _sentencepiece, "unigram": _sentencepiece, "bytes": _bytes,
            "characters": _characters}[config.kind]
    return make(config, _at_most(texts, SAMPLE_BYTES))


def _at_most(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def _bpe(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    merges, trainer = bpe_merges(texts, config.vocab_size - len(RESERVED) - 256)
    names = dict.fromkeys([*RESERVED, *sorted(BYTE_OF), *(left + right for left, right in merges)])
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(RESERVED))
    return _from_backend(backend, trainer)


def _bytes(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    names = {byte[0]: char for char, byte in BYTE_OF.items()}
    vocabulary = {name: n for n, name in enumerate(RESERVED)} | {names[byte]: 4 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(RESERVED))
    return _from_backend(backend)


def _characters(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    names = [*RESERVED, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(seen)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\s+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(RESERVED))
    return _from_backend(backend)


def _from_backend(backend: tokenizers.Tokenizer, trainer: str | None = None) -> Tokenizer:
    content = json.dumps(json.loads(backend.to_str()), ensure_ascii=False).encode()
    return _made_by(trainer, Tokenizer(HuggingFaceEngine(content)))


def _made_by(library: str | None, tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.trained_by = library and f"{library} {importlib.metadata.version(library)}"
    return tokenizer


def _sentencepiece(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    model = io.BytesIO()
    lines = (line[start : start + LONGEST_SENTENCE] for text in texts for line in text.splitlines(keepends=True)
             for start in range(0, len(line), LONGEST_SENTENCE))
    first = next(lines, None)
    if first is None:
        raise UserError("data.tokenizer: there is no text to train on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines), model_writer=model,
            model_type="unigram" if config.kind == "unigram" else "bpe",
            vocab_size=config.vocab_size, hard_vocab_limit=False, byte_fallback=True, character_coverage=0.9995,
            normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
            split_digits=True, allow_whitespace_only_pieces=True, user_defined_symbols=GROK_SYMBOLS,
            max_sentence_length=8 * LONGEST_SENTENCE, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            pad_piece="[PAD]", bos_piece="[BOS]", eos_piece="[EOS]", unk_piece="[UNK]", unk_surface="[UNK]",
            num_threads=1, minloglevel=2)
    except RuntimeError as error:
        sentence = str(error).split("] ")[-1].strip().rstrip(".")
        raise UserError(f"data.tokenizer.vocab_size = {config.vocab_size}: SentencePiece cannot make it ({sentence}); "
                        "try a larger one") from None
    return _made_by("sentencepiece", Tokenizer(SentencePieceEngine(model.getvalue())))
