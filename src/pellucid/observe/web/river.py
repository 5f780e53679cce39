"""Picture 2 of a run: stages of its data, documents followed from file to batch.

The stages are what the run's own telemetry has of them. Documents are read from the prepared data: a run records where
they lie; on another machine they may be missing, then what needs the texts says so.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.config import FilterConfig, UserError, load_config
from pellucid.data.dataset import Dataset, Split
from pellucid.data.place import folder_of_run
from pellucid.observe.trace import height
from pellucid.observe.web.journey import EXCERPT, journey

EXCERPTED = 80  # tokens of a piece shown as its text
TOKENS = 600  # tokens of a document shown as chips
SHOWN = 400  # rows of a document listed
TITLES = {"held_out": "decontaminate", "split": "hold out"}  # where not the name


class River:
    """The data of one run. `problem` says why its texts cannot be shown, if they cannot."""

    def __init__(self, run_dir: Path, manifest: dict[str, Any]):
        self.run_dir = run_dir
        self._manifest = manifest
        self.problem: str | None = None
        self._splits: dict[tuple[str, int], Split] = {}

    @cached_property
    def dataset(self) -> Dataset | None:
        recorded = self._manifest.get("data") if isinstance(self._manifest, dict) else None
        try:
            place = folder_of_run(self.run_dir, recorded)
        except UserError:
            self.problem = "This run does not say where its data lies (manifest.json is missing or incomplete)."
            return None
        try:
            dataset = Dataset(place, verify=False, run=load_config(self.run_dir / "config.toml").data)
        except UserError as error:
            why = "cannot be read" if place.is_dir() else "is not on this machine"
            self.problem = f"The prepared data {why}: {error}."
            return None
        if dataset.fingerprint != recorded.get("fingerprint"):
            self.problem = f"{place} holds other data now than what this run was trained on, so no text is shown."
            return None
        return dataset

    def _split(self, name: str, seed: int) -> Split:
        """Kept, with what it has found out about its documents."""
        if (name, seed) not in self._splits:
            self._splits[name, seed] = self.dataset.split(name, seed)
        return self._splits[name, seed]

    def describe(self, reader: Any) -> dict[str, Any]:
        """What the page draws: the stages that the run recorded (data/river.py) between the source and the batch.

        `into` and `out` of each are bytes of the text that goes on to be trained on; `splits` and `rows_per_epoch` (of
        training; None without them) are those of `pack`. `cut`: into how many documents those that were read were cut, to hold
        out the end.
        """
        stages = [stage["detail"] for stage in reader.stages()] if reader else []
        splits = stages[-1].get("splits", {}) if stages else {}
        stages = [stage for stage in stages if stage["name"] != "split" or "validation" in splits]
        if len(stages) > 1 and stages[1]["documents_in"] > stages[0]["documents_out"]:
            stages[0]["cut"] = stages[1]["documents_in"]
        rows = splits["train"]["packing"]["rows"] if splits else None  # of a run that did not record how many make an epoch
        epoch = stages[-1].get("rows_per_epoch", rows) if stages else None
        text = stages[0]["bytes_in"] if stages else 0
        source = [self._source(text)] if self.dataset else []
        for stage in stages:
            kept = text if stage["settings"].get("augment_originals") else 0
            out = stage["splits"]["train"]["text_bytes"] if "splits" in stage else stage["bytes_out"] + kept
            title = TITLES.get(stage["name"], stage["name"].replace("_", " "))
            stage |= {"title": title, "filter": stage["name"] in FilterConfig.model_fields, "into": text, "out": out}
            text = out
        batch = [{**stages[-1], "name": "batch", "title": "batch", "into": 0, "out": 0}] if splits else []
        return {"problem": self.problem, "stages": [*source, *stages, *batch], "splits": splits, "rows_per_epoch": epoch}

    def _source(self, text: int) -> dict[str, Any]:
        files = sorted(self.dataset.manifest["sources"], key=lambda file: -file["size"])
        largest = [{key: file[key] for key in ("uri", "size", "documents", "sha256")} for file in files[:40]]
        return {"name": "source", "title": "source", "into": sum(file["size"] for file in files), "out": text, "files": len(files),
                "documents": sum(file["documents"] or 0 for file in files), "largest": largest}  # fmt: skip

    def step(self, step: int, losses: list[dict], worst: list[dict], config: dict[str, Any]) -> dict[str, Any]:
        """Pieces of the batch of a step, those with a recorded loss first, worst on top; worst tokens in their text."""
        if self.dataset is None:
            return {"problem": self.problem, "step": step, "pieces": losses, "tokens": worst}
        training = config.get("training", {})
        split = self._split("train", training.get("seed", 0))
        pieces = split.trace(step, training.get("batch_size", 16))
        label_at = {(piece["row"], piece["position_start"] + piece["length"] - 1): piece["label"] for piece in pieces}
        loss_of = {(loss["row"], loss["segment"]): loss for loss in losses}
        for piece in pieces:
            piece.update({key: loss_of.get((piece["row"], piece["segment"]), {}).get(key) for key in ("loss", "worst")})
        pieces.sort(key=lambda piece: height(piece["loss"]), reverse=True)
        for piece in pieces[:12]:
            piece["excerpt"] = self._piece_text(split, piece)
        tokens = [{**self._token(split, step, training, token), "label": label_at.get((token["row"], token["position"]))}
                  for token in worst if not self.dataset.labels or token["loss"] != 0]
        return {"problem": None, "step": step, "pieces": pieces, "tokens": tokens}

    def _piece_text(self, split: Any, piece: dict[str, Any]) -> str:
        """Its first tokens as text, and no others: a document may be a whole book."""
        first = int(split.reader.starts[piece["document"]]) + piece["token_start"]
        last = min(first + min(piece["length"], EXCERPTED), int(split.reader.ends[piece["document"]]))
        ids = split.reader.tokens(np.arange(first, last)).tolist()
        return split.tokenizer.decode([i for i in ids if i != split.tokenizer.eos_token_id])

    def _token(self, split: Any, step: int, training: dict[str, Any], token: dict[str, Any]) -> dict[str, Any]:
        batch = split.batch(step, training.get("batch_size", 16))
        tokens, segments = batch.tokens_BT[token["row"]].tolist(), batch.segment_ids_BT[token["row"]].tolist()
        at = token["position"]
        before = [t for t, s in zip(tokens[max(0, at - 24) : at + 1], segments[max(0, at - 24) : at + 1], strict=True)
                  if s == segments[at]]  # fmt: skip
        return {**token, "before": split.tokenizer.decode(before), "target_text": self.token_text(token["target"])}

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        """A kept row with its tokens as text; of labelled documents `labels`, at the last token of each what it is, else None."""
        tokens, targets, losses = row["tokens"].tolist(), row["targets"].tolist(), row["losses"].tolist()
        texts = [self.token_text(target) if target >= 0 else None for target in targets]
        found = {"step": row["step"], "row": row["row"], "sample": row["sample_id"], "tokens": tokens, "targets": targets,
                 "losses": losses, "texts": texts}  # fmt: skip
        if self.dataset is not None and self.dataset.labels:
            found["labels"] = [None] * len(tokens)
            for piece in self.dataset.train.describe_rows([row["sample_id"]]):
                found["labels"][piece["position_start"] + piece["length"] - 1] = piece["label"]
        return found

    def token_text(self, token: int) -> str:
        if self.dataset is None:
            return f"#{token}"
        tokenizer = self.dataset.tokenizer
        if token in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
            return {tokenizer.pad_token_id: "<pad>", tokenizer.bos_token_id: "<bos>", tokenizer.eos_token_id: "<eos>"}[token]
        return tokenizer.token_bytes(token).decode("utf-8", errors="replace")

    def document(self, split_name: str, index: int, config: dict[str, Any], latest: int | None) -> dict[str, Any]:
        """One document from its file to the batches: text, tokens, the rows it is packed into, the steps that read it."""
        if self.dataset is None:
            raise UserError(self.problem)
        split = self._split(split_name, config.get("training", {}).get("seed", 0))
        if not 0 <= index < split.plan.document.max() + 1:
            raise UserError(f"document {index}: the {split_name} split has {split.plan.document.max() + 1} documents")
        document = split.document(index)
        ids = document.pop("token_ids")
        tokens = [{"id": token, "text": self.token_text(token)} for token in ids[:TOKENS]]
        text = document.pop("text")
        rows = split.rows_of_document(index)
        batch = config.get("training", {}).get("batch_size", 16)
        steps = split.steps_with(rows, latest + 1, batch) if split_name == "train" and latest is not None else []
        return {**document, **journey(self.dataset, split_name, document),
                "split": split_name, "index": index, "characters": len(text), "text": text[:EXCERPT],
                "documents": int(split.plan.document.max()) + 1, "tokens": tokens, "token_count": len(ids),
                "rows": sorted(rows)[:SHOWN], "row_count": len(rows), "steps": steps, "step_count": len(steps),
                "version": bool(document["augmentation"])}  # fmt: skip
