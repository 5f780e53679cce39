"""Picture 2, augment: engines that translate, behind one call. Two need only a program or a server; see
neural_translators.py for the two that run a model.

apertium   rule-based, on this machine, no download (Forcada et al. 2011); language codes are its own: en-eo, eng-spa
http       a server that speaks LibreTranslate's protocol
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pellucid.config import UserError


class Translator(Protocol):
    """An engine. The translation of a text depends on that text, the languages and the seed, not on its neighbours."""

    fingerprint: str  # of engine, model and settings: part of the cache's key
    sampling: bool  # whether the seed matters

    def translate(self, texts: Sequence[str], source: str, target: str, *, seed: int = 0) -> list[str]:
        """One translation per text, in order. Raises UserError where the engine or the pair is missing."""
        ...


SPECIAL = re.compile(r"([\[\]{}^$/\\@<>])")  # of Apertium's stream format
END = "[][\n]"  # a formatting block after each text: keeps its last full stop


class Apertium:
    """The pipeline of an Apertium mode, run once per call for all texts.

    Its statistical tagger carries state from one text to the next (measured: 1 to 5 % of sentences change with their
    neighbours), so each text gets a tagger process of its own; that is most of the cost, about 10 ms per text.
    """

    sampling = False

    def __init__(self, data: str | None = None):
        self.modes = Path(data or os.environ.get("APERTIUM_DATADIR", "/usr/share/apertium")) / "modes"
        programs = Path(shutil.which("apertium-tagger") or "").resolve()
        self.fingerprint = f"apertium-{stamp(programs)}"

    def translate(self, texts: Sequence[str], source: str, target: str, *, seed: int = 0) -> list[str]:
        if not texts:
            return []
        script = self._script(f"{source}-{target}")
        stream = "".join(SPECIAL.sub(r"\\\1", text.replace("\0", " ")) + END + "\0" for text in texts)
        run = subprocess.run(["bash", "-c", script], input=stream.encode(), capture_output=True, check=False)
        parts = run.stdout.decode(errors="replace").split("\0")
        if run.returncode or len(parts) < len(texts):
            raise UserError(f"apertium {source}-{target} failed: {run.stderr.decode(errors='replace').strip()[:200]}")
        return [re.sub(r"\\(.)", r"\1", part.removesuffix(END), flags=re.DOTALL).strip(" ") for part in parts[: len(texts)]]

    def pair_fingerprint(self, source: str, target: str) -> str:
        """Changes when the language pair's data does: sizes and times of the files its mode names."""
        mode = self._mode(f"{source}-{target}")
        stamps = "".join(stamp(Path(name)) for name in re.findall(r"'([^']+)'", mode))
        return hashlib.sha256(stamps.encode()).hexdigest()[:16]

    def _script(self, name: str) -> str:
        """The mode's commands with NUL between texts, and the tagger in a loop, once per text."""
        stages = [stage.strip() for stage in self._mode(name).replace("$1", "-n").replace("$2", "").split("|")]
        for number, stage in enumerate(stages):
            if stage.startswith("apertium-tagger"):
                stages[number] = f"while IFS= read -r -d '' text; do printf %s \"$text\" | {stage}; printf '\\0'; done"
            else:
                program, space, rest = stage.partition(" ")
                stages[number] = f"{program} -z{space}{rest}"
        return "set -o pipefail; " + " | ".join(stages)

    def _mode(self, name: str) -> str:
        path = self.modes / f"{name}.mode"
        if not shutil.which("apertium-tagger") or not shutil.which("lt-proc"):
            raise UserError("data.augment: Apertium is not installed; `apt-get install apertium apertium-eo-en` gives it")
        if not path.is_file():
            known = sorted(p.stem for p in self.modes.glob("*.mode") if p.stem.count("-") == 1)
            raise UserError(f"data.augment: Apertium has no pair {name} (installed: {', '.join(known) or 'none'}); "
                            f"`apt-cache search apertium` names the packages")
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        return " | ".join(lines)


def open_apertium(language: str, pivot: str) -> Apertium:
    """Apertium for both directions, its fingerprint naming their data. Raises UserError where either is missing."""
    engine = Apertium()
    engine.fingerprint += "-".join(engine.pair_fingerprint(*pair) for pair in ((language, pivot), (pivot, language)))
    return engine


class HttpTranslator:
    """POST {url}/translate {"q": [...], "source", "target", "format": "text"}; the answer {"translatedText": [...]}."""

    sampling = False

    def __init__(self, url: str, api_key: str | None = None, batch_size: int = 32, timeout: float = 120.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"data.augment: url must start with http:// or https:// (got {url!r})")
        self.url, self.api_key, self.batch_size, self.timeout = url.rstrip("/"), api_key, batch_size, timeout
        self.fingerprint = f"http-{self.url}"

    def translate(self, texts: Sequence[str], source: str, target: str, *, seed: int = 0) -> list[str]:
        batches = [list(texts[n : n + self.batch_size]) for n in range(0, len(texts), self.batch_size)]
        return [text for batch in batches for text in self._ask(batch, source, target)]

    def _ask(self, texts: list[str], source: str, target: str) -> list[str]:
        question = {"q": texts, "source": source, "target": target, "format": "text"}
        if self.api_key:
            question["api_key"] = self.api_key
        request = urllib.request.Request(f"{self.url}/translate", json.dumps(question).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.load(response)["translatedText"]
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.url}: the translation server answered {error.code} ({error.reason})") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.url}: no translation server answers there ({str(error)[:100]}); "
                            "start one, for example LibreTranslate, or set url") from None
        if not isinstance(answer, list) or len(answer) != len(texts) or not all(isinstance(t, str) for t in answer):
            raise UserError(f"{self.url}: the answer is not one translation per text; is this LibreTranslate's protocol?")
        return answer


def stamp(path: Path) -> str:
    """What changes when a file does, without reading it: name, size and time."""
    if not path.is_file():
        return "absent"
    state = path.stat()
    return f"{path.name}:{state.st_size}:{state.st_mtime_ns};"
