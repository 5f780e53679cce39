"""`pellucid report`: the dashboard of one run as one HTML file that works from the disk, without a server or a network.

The page's own modules become data: URLs in an import map, and the answers it would ask the server for are packed
beside them. Of long runs the finest rollup is taken that keeps the file within its budget: minimum, maximum and the
count of non-finite values stay exact at every grain, so no spike is lost with the size.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pellucid.config import UserError
from pellucid.observe.store import FAN, LEVELS
from pellucid.observe.theatre import staged_steps
from pellucid.observe.web.feed import Feed, answer
from pellucid.observe.web.server import PAGE, VENDOR, check_assets

BUDGET = 5_000_000  # bytes of the file
STEPS, DOCUMENTS, PLAYS = 20, 8, 4  # steps with their documents, documents with their journey, steps played
KINDS = ("weight", "gradient", "update")
POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:"
IMPORT = re.compile(r"""(\bfrom\s*|\bimport\s*)(["'])(\.{1,2}/[^"']+)\2""")


def write_report(
    run_dir: str | Path, path: str | Path | None = None, budget: int = BUDGET,
    progress: Callable[[str, int, int, str], None] = lambda *_: None, sections: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write the file and return its path (default RUN_DIR/report.html). `progress(stage, done, total, detail)`.

    sections: HTML fragments without script that follow the page (what `pellucid measure` found).

    Raises UserError for what is not a run, has no telemetry, or cannot be written.
    """
    if path is not None and Path(path).suffix not in (".html", ".htm"):
        raise UserError(f"{path}: a report is a page; give it a name that ends in .html")
    check_assets()
    feed = Feed(run_dir)
    if feed.problem:
        raise UserError(feed.problem)
    target = Path(path) if path is not None else feed.directory / "report.html"
    head, tail = _page(feed.directory.resolve().name, sections)
    packed = _pack(feed, budget - len(head.encode()) - len(tail.encode()), progress)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(head + json.dumps(packed) + tail, encoding="utf-8")
        os.replace(unfinished, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place with -o") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return target


# ------------------------------------------------------------------------------------------------- answers


def _pack(feed: Feed, room: int, progress: Callable[[str, int, int, str], None]) -> dict[str, str]:
    """{question: base64 of its gzipped answer}, the most telling first, until the room is full."""
    packed: dict[str, str] = {}
    questions = list(_questions(feed))
    for number, (question, weight) in enumerate(questions):
        progress("packing", number, len(questions), question)
        rest = sum(other for _, other in questions[number:])
        share = room * weight / rest if question.startswith("window") else room
        text = next((found for found in _grains(feed, question) if len(found) + len(question) + 8 <= share), None)
        if text is not None:
            packed[question] = text
            room -= len(text) + len(question) + 8
    return packed


def _questions(feed: Feed) -> Iterator[tuple[str, float]]:
    """(question, its weight when room is shared out): what the page asks while its views are opened."""
    facts = feed.describe()
    if facts["problem"]:
        raise UserError(facts["problem"])
    yield from ((name, 0.1) for name in ("runs", "events?run=0", "rules?run=0", "river?run=0", "samples?run=0",
                                            "preferences?run=0"))
    streams = sorted((name for name in facts["streams"] if name != "param"), key=lambda name: (name != "run", name))
    yield from ((f"window?run=0&stream={name}&stat=*", 2.0 if name == "run" else 1.0) for name in streams)
    yield from ((f"capsule?run=0&step={capsule['step']}", 0.5) for capsule in facts["capsules"][-4:])
    yield "plays?run=0", 0.1
    yield from ((f"play?run=0&step={step}", 0.5) for step in staged_steps(feed.directory)[-PLAYS:])
    param = facts["streams"].get("param", {"stats": [], "rows": []})
    for stat in param["stats"]:
        yield f"window?run=0&stream=param&stat={stat['name']}", 1.5 if stat["name"] == "update_ratio" else 1.0
    alarms = [event["step"] for event in feed.events() if event["severity"] in ("alarm", "warning")]
    steps = list(dict.fromkeys([facts["latest"], *alarms]))[:STEPS]
    yield from ((f"step?run=0&step={step}", 0.05) for step in steps)
    pieces = feed.step(facts["latest"])["pieces"] if facts["latest"] is not None else []
    documents = dict.fromkeys([0, *(piece["document"] for piece in pieces if "document" in piece)])
    yield from ((f"document?run=0&split=train&index={n}", 0.05) for n in list(documents)[:DOCUMENTS])
    for row in range(len(param["rows"]) if facts["histograms"] else 0):
        yield from ((f"histograms?run=0&row={row}&kind={kind}", 0.01) for kind in KINDS)


def _grains(feed: Feed, question: str) -> Iterator[str]:
    """The answer, from the finest grain to the coarsest; nothing where there is none."""
    path, _, rest = question.partition("?")
    query = dict(pair.split("=") for pair in rest.split("&")) if rest else {}
    spans = [None, *(FAN**level for level in LEVELS)] if path == "window" else [None]
    for span in spans:
        try:
            body, _ = answer([feed], path, query if span is None else {**query, "span": str(span)})
        except UserError:
            return
        yield base64.b64encode(gzip.compress(body, mtime=0)).decode()


# ---------------------------------------------------------------------------------------------------- page


def _page(name: str, sections: Sequence[str]) -> tuple[str, str]:
    """The file before and after its numbers."""
    modules = {f"vendor/{file.name}": file for file in VENDOR.glob("*.mjs")}
    modules |= {f"page/{file.relative_to(PAGE).as_posix()}": file for file in PAGE.rglob("*.js")}
    imports = {key: "data:text/javascript;base64," + base64.b64encode(_module(key, file).encode()).decode()
               for key, file in sorted(modules.items())}  # fmt: skip
    style = "\n".join(file.read_text(encoding="utf-8") for file in (VENDOR / "uplot.css", PAGE / "style.css"))
    icon = base64.b64encode((PAGE / "icon.svg").read_bytes()).decode()
    escaped = name.replace("&", "&amp;").replace("<", "&lt;")
    head = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
            f'<title>{escaped} · Pellucid</title><link rel="icon" href="data:image/svg+xml;base64,{icon}"><style>{style}</style></head>'
            f'<body><div id="app"><p class="boot">Unpacking the run …</p></div>{"".join(sections)}'
            f'<script type="importmap">{json.dumps({"imports": imports})}</script><script>window.__report__ = ')  # fmt: skip
    return head, ';</script><script type="module">import "page/app.js";</script></body></html>\n'


def _module(key: str, file: Path) -> str:
    """A module whose relative imports are names of the import map."""
    folder = os.path.dirname(key)
    absolute = lambda found: f"{found[1]}{found[2]}{os.path.normpath(os.path.join(folder, found[3]))}{found[2]}"
    return IMPORT.sub(absolute, file.read_text(encoding="utf-8"))
