"""What prepared data holds, for a reader at the terminal: `pellucid data inspect`.

The manifest of picture 2 read aloud: sources, each stage with its counts and samples (what was taken away in red, what
came in green), the numbers of statistics.py; or the origin of one token.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

from rich.text import Text

BAR = 30  # characters of the longest bar


def describe(manifest: dict[str, Any], numbers: dict[str, dict[str, Any]], samples: int = 3) -> Text:
    """A folder of prepared data: its manifest, and what `statistics` counted."""
    parts = [_sources(manifest["sources"]), *(_stage(stage, samples) for stage in manifest["stages"]), _splits(manifest),
             *(_numbers(name, counts, manifest) for name, counts in numbers.items())]
    return Text("\n\n").join(parts)


def describe_origin(found: dict[str, Any]) -> Text:
    """What `origin` found."""
    text = Text()
    if token := found.get("token"):
        text.append(f"token {token['number']:,} of {found['split']}: ", style="bold").append(ascii(found["text"]), style="bold yellow")
        text.append(f" (id {token['id']}), number {token['position']} of {found['tokens']} in its document\n")
    text.append(f"document   {found['split']} {found['document']:,}, in rows {', '.join(map(str, found['rows'][:8]))}\n")
    exact = "" if found["exact"] else "  (of the whole document: its file is no plain text, or a stage or the tokenizer changed it)"
    text.append(f"source     {found['source']}  #{found['ordinal']}\n", style="cyan")
    text.append(f"bytes      {found['byte_start']}-{found['byte_end']}{exact}\n", style="cyan")
    for stage, decision in found["decisions"].items():
        text.append(f"  {stage:<26}{decision}\n", style="green" if decision == "changed" else "dim")
    if parent := found["parent"]:
        number = "which is not kept" if parent["document"] is None else f"document {parent['document']:,}"
        text.append(f"a version of {number} ({parent['content_hash'][:12]}): {found['augmentation']}\n", style="magenta")
    text.append("text       ").append(found["before"], style="dim").append(found["text"], style="bold yellow")
    return text.append(found["after"], style="dim")


def _sources(files: list[dict[str, Any]]) -> Text:
    size, documents = sum(file["size"] for file in files), sum(file["documents"] or 0 for file in files)
    names = [file["uri"] for file in files]
    silent, beyond = sum(file["documents"] == 0 for file in files), sum(file["documents"] is None for file in files)
    shown = names if len(names) <= 4 else [*names[:3], f"... and {len(names) - 3:,} more"]
    head = Text(f"sources: {len(files):,} files, {size:,} bytes as stored, {documents:,} documents"
                f"{f'; {silent:,} gave no document' if silent else ''}"
                f"{f'; {beyond:,} were not opened, beyond a cap' if beyond else ''}\n  ", style="bold")
    return Text.assemble(head, ("\n  ".join(shown), "cyan"))


def _stage(stage: dict[str, Any], samples: int) -> Text:
    settings = ", ".join(f"{key} {value}" for key, value in stage["settings"].items())
    text = Text.assemble((stage["name"], "bold"), (f" (version {stage['version']}; {settings})", "dim"))
    text.append(f"\n  documents  {stage['documents_in']:,} -> {stage['documents_out']:,}")
    text.append(f"\n  bytes      {stage['bytes_in']:,} -> {stage['bytes_out']:,}")
    if stage["dropped"]:
        text.append("\n  dropped    " + ", ".join(f"{count:,} {reason}" for reason, count in stage["dropped"].items()))
    for sample in stage["samples"][:samples]:
        if "message" in sample:
            text.append(f"\n  for example: {sample['message']}")
            continue
        text.append(f"\n  for example {sample['source']} #{sample['ordinal']}", style="cyan")
        before, after = difference(sample["before"], sample["after"])
        text.append("\n    before  ").append_text(before).append("\n    after   ")
        text.append_text(after) if after is not None else text.append(f"dropped ({sample['reason']})", style="red")
    return text


def difference(before: str, after: str | None) -> tuple[Text, Text | None]:
    """Both as ASCII literals, with what `after` lacks in red and what it has new in green."""
    if after is None:
        return Text(ascii(before)), None
    shown = Text("'"), Text("'")
    for what, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        style = ("", "") if what == "equal" else ("bold red", "bold green")
        shown[0].append(ascii(before[a:b])[1:-1], style=style[0])
        shown[1].append(ascii(after[c:d])[1:-1], style=style[1])
    return shown[0].append("'"), shown[1].append("'")


def _splits(manifest: dict[str, Any]) -> Text:
    tokenizer, settings, split = manifest["tokenizer"], manifest["settings"], manifest["split"]
    lines = [f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, {tokenizer['fingerprint'][:16]}",
             f"rows of {settings['sequence_length']} tokens, packing {settings['packing']}; held out by {split['method']}"]
    for name, counts in manifest["splits"].items():
        packing = counts["packing"]
        lines.append(
            f"  {name:<11}{counts['documents']:,} documents, {counts['tokens']:,} tokens "
            f"({counts['text_bytes'] / counts['tokens']:.2f} bytes each), {packing['rows']:,} rows, "
            f"{packing['utilization']:.2%} of positions used")
    return Text("\n".join(lines))


def _numbers(name: str, counts: dict[str, Any], manifest: dict[str, Any]) -> Text:
    text = Text(f"{name}: tokens of a document\n", style="bold")
    text.append("  " + " · ".join(f"{key} {value:,}" for key, value in counts["lengths"].items()))
    most = max(number for *_, number in counts["histogram"])
    for low, high, number in counts["histogram"]:
        text.append(f"\n  {low:>9,} to {high:<9,} {number:>11,} ").append("█" * round(BAR * number / most), style="cyan")
    for source in counts["sources"]:
        text.append(f"\n  {source['path']}: {source['documents']:,} documents, {source['tokens']:,} tokens")
    text.append("\n  changed by " + ", ".join(f"{stages}: {number:,}" for stages, number in counts["changed_by"].items()))
    if counts["augmented"]:
        text.append(f"\n  augmented versions: {counts['augmented']:,}")
    text.append(f"\n  vocabulary used: {counts['vocabulary_used']:,} of {manifest['tokenizer']['vocab_size']:,} tokens")
    if counts["languages"]:
        shares = list(counts["languages"].items())[:6]
        text.append("\n  languages of a sample: " + ", ".join(f"{code} {share:.0%}" for code, share in shares))
    return text
