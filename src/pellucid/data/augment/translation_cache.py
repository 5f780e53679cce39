"""Picture 2, augment: translations once made are kept on disk, keyed by a hash of all that decides them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from pellucid.config import UserError
from pellucid.data.augment.translators import Translator


class CachedTranslator:
    """A translator that asks another only for texts it has not seen; a repeated text in one call is asked for once.

    The file holds one row per (engine fingerprint, languages, seed, text); deleting it costs only time. `hits` and
    `misses` count the texts.
    """

    def __init__(self, translator: Translator, path: str | Path):
        self.translator, self.fingerprint, self.sampling = translator, translator.fingerprint, translator.sampling
        self.hits = self.misses = 0
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS translation (key BLOB PRIMARY KEY, text TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: cannot keep translations there ({error}); remove the file, or set "
                            "data.directory") from None

    def translate(self, texts: Sequence[str], source: str, target: str, *, seed: int = 0) -> list[str]:
        keys = {text: self._key(text, source, target, seed) for text in texts}
        found = self._find(list(keys.values()))
        missing = [text for text, key in keys.items() if key not in found]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            made = self.translator.translate(missing, source, target, seed=seed)
            new = [(keys[text], result) for text, result in zip(missing, made, strict=True)]
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO translation VALUES (?, ?)", new)
            found.update(new)
        return [found[keys[text]] for text in texts]

    def close(self) -> None:
        self._database.close()

    def _key(self, text: str, source: str, target: str, seed: int) -> bytes:
        return hashlib.blake2b(json.dumps([self.fingerprint, source, target, seed, text]).encode(), digest_size=16).digest()

    def _find(self, keys: list[bytes]) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        for first in range(0, len(keys), 500):
            some = keys[first : first + 500]
            marks = ",".join("?" * len(some))
            found.update(self._database.execute(f"SELECT key, text FROM translation WHERE key IN ({marks})", some))
        return found
