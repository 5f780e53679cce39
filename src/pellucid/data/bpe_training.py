"""Picture 2, tokenize: the merges of byte-level BPE (Sennrich et al. 2016), by the fastest trainer that is here.

gigabpe is about five times as fast as Hugging Face `tokenizers` and asks a tenth of its memory, but reads lines of a
file, knows GPT-2's word split only and forgets bytes it has not seen. So the sample is rewritten (see `training_lines`)
such that both trainers, which get the same file, count exactly the words our tokenizer will make of the texts; and the
alphabet is put in afterwards, whole. Both give the same merges: gigabpe must show it on a probe before it is used.
"""

from __future__ import annotations

import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

Merge = tuple[str, str]
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space, as both libraries see it
DIGITS, ZERO_AFTER_SPACE, ENDS_IN_SPACE = (re.compile(pattern) for pattern in (
    "[0-9]+", f"0(?<=[{SPACE}]0)", f"[{SPACE}]\\Z"))
MADE_UP = ("Ġ", "0")  # the one merge that the rewriting adds
PROBE = ("the cat sat on the mat\n\n\tdef f(x):\n\t\treturn x ** 2  # 12345 naïve café\n" * 3, "  1  22\n 3²½ x's we'll \r\n\n",
         "日本語のテキスト 😀 — “quotes” aaaaaaaaaaaa bbbbbb abababab\x0b\x85 ", "the mat, the café; the def")


def bpe_merges(texts: Iterable[str], count: int) -> tuple[list[Merge], str]:
    """The first merges learnt from texts, at most `count` that make new tokens, and the name of the trainer.

    In the printable characters that stand for bytes. Fewer where the texts are used up. The name says how the result
    was found, not what it is: every trainer gives the same.
    """
    train, name = (_gigabpe, "gigabpe") if gigabpe_problem() is None else (_hugging_face, "tokenizers")
    return _train(train, texts, count), name


@cache
def gigabpe_problem() -> str | None:
    """Why gigabpe is not used, or None if it is."""
    try:
        import gigabpe  # noqa: F401
    except ImportError:
        return "not installed; pip install 'pellucid[fast]'"
    try:
        same = _train(_gigabpe, PROBE, 300) == _train(_hugging_face, PROBE, 300)
    except Exception as error:  # another version's interface
        return f"refused: {error}"
    return None if same else "refused: its merges differ from those of tokenizers"


def training_lines(text: str) -> Iterator[str]:
    """A text rewritten as lines whose words by GPT-2's split are those of the text, each digit by itself.

    - line ends become vertical tabs, which the split treats alike, so a text stays one line; `_train` turns them back;
    - a digit is a word of one byte and has no pairs: a run of digits becomes one 0. After a space the split would take
      that space to the digits, so it gets another one: that makes the word " 0", whose only merge `_train` drops;
    - other numerals are words of several bytes: each gets a line.
    """
    text = text.replace("\n", "\x0b")
    text = ZERO_AFTER_SPACE.sub(" 0", DIGITS.sub("0", text))
    numerals = sorted(_numerals().intersection(text)) if not text.isascii() else ()
    if numerals:
        parts = re.split(f"([{''.join(numerals)}])", text)
        text = "".join(part + _closed(part) for part in parts[:-1]) + parts[-1]
    yield text + _closed(text)


def _closed(text: str) -> str:
    """A line end that does not become part of a run of spaces before it."""
    return " 0\n" if ENDS_IN_SPACE.search(text[-1:]) else "\n"


@cache
def _numerals() -> frozenset[str]:
    """Every numeral (Unicode category N) but 0-9."""
    return frozenset(chr(n) for n in range(128, sys.maxunicode + 1) if unicodedata.category(chr(n))[0] == "N")


def _train(trainer, texts: Iterable[str], count: int) -> list[Merge]:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", suffix=".txt") as file:
        for text in texts:
            file.writelines(training_lines(text))
        file.flush()
        merges = trainer(file.name, 256 + count + 1)
    known, kept = set(pre_tokenizers.ByteLevel.alphabet()), []
    line_end = str.maketrans({"ċ": "Ċ"})  # the bytes 11 and 10
    for left, right in merges:
        if len(known) == 256 + count:
            break
        if (left, right) != MADE_UP:
            kept.append((left.translate(line_end), right.translate(line_end)))
            known.add("".join(kept[-1]))
    return kept


def _gigabpe(path: str, size: int) -> list[Merge]:
    import gigabpe

    return gigabpe.train_bpe([path], vocab_size=size, min_frequency=0, pretokenizer="bytelevel")[1]


def _hugging_face(path: str, size: int) -> list[Merge]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.train([path], trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    with tempfile.TemporaryDirectory() as folder:
        _, merges = sorted(backend.model.save(folder), reverse=True)
        lines = Path(merges).read_text(encoding="utf-8").split("\n")
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
