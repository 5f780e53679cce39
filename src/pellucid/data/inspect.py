"""What prepared data holds, in words: the manifest of picture 2 read aloud for `pellucid data inspect`."""

from __future__ import annotations

from typing import Any


def describe(manifest: dict[str, Any], samples: int = 3) -> str:
    """The manifest as text: sources, each stage with its counts and some samples, tokenizer, splits, packing."""
    parts = [_sources(manifest["sources"]), *(_stage(stage, samples) for stage in manifest["stages"]), _splits(manifest)]
    return "\n\n".join(parts)


def _sources(files: list[dict[str, Any]]) -> str:
    size, documents = sum(file["size"] for file in files), sum(file["documents"] for file in files)
    names = [file["uri"] for file in files]
    shown = names if len(names) <= 4 else [*names[:3], f"... and {len(names) - 3:,} more"]
    return f"sources: {len(files):,} files, {size:,} bytes as stored, {documents:,} documents\n  " + "\n  ".join(shown)


def _stage(stage: dict[str, Any], samples: int) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in stage["settings"].items())
    lines = [
        f"{stage['name']} (version {stage['version']}; {settings})",
        f"  documents  {stage['documents_in']:,} -> {stage['documents_out']:,}",
        f"  bytes      {stage['bytes_in']:,} -> {stage['bytes_out']:,}",
    ]
    if stage["dropped"]:
        lines.append("  dropped    " + ", ".join(f"{count:,} {reason}" for reason, count in stage["dropped"].items()))
    for sample in stage["samples"][:samples]:
        if "message" in sample:
            lines.append(f"  for example: {sample['message']}")
        else:
            after = f"dropped ({sample['reason']})" if sample["after"] is None else ascii(sample["after"])
            lines += [f"  for example {sample['source']} #{sample['ordinal']}",
                      f"    before  {sample['before']!a}", f"    after   {after}"]
    return "\n".join(lines)


def _splits(manifest: dict[str, Any]) -> str:
    tokenizer, settings, split = manifest["tokenizer"], manifest["settings"], manifest["split"]
    lines = [f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, {tokenizer['fingerprint'][:16]}",
             f"rows of {settings['sequence_length']} tokens, packing {settings['packing']}; held out by {split['method']}"]
    for name, counts in manifest["splits"].items():
        packing = counts["packing"]
        lines.append(
            f"  {name:<11}{counts['documents']:,} documents, {counts['tokens']:,} tokens "
            f"({counts['text_bytes'] / counts['tokens']:.2f} bytes each), {packing['rows']:,} rows, "
            f"{packing['utilization']:.2%} of positions used")
    return "\n".join(lines)
