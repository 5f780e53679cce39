"""A stand-in for the Hugging Face hub on this machine: one dataset repository, as much of the hub's HTTP as its clients ask for."""

import hashlib
import http.server
import json
import threading
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
REPOSITORY = "somebody/texts"


class Hub(http.server.BaseHTTPRequestHandler):
    """`files`: path -> content. `asked` collects the paths of all requests."""

    files: dict[str, bytes]
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        path = unquote(urlsplit(self.path).path)
        api, file = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/"
        if path in (api, *(f"{api}/revision/{name}" for name in ("main", COMMIT))):
            facts = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files], "tags": [],
                     "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            return self.answer(200, json.dumps(facts).encode())
        if path.startswith(f"{api}/tree/"):
            folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
            return self.answer(200, json.dumps(self.below(folder, "recursive=True" in self.path)).encode())
        if path.startswith(file) and (content := self.files.get(path.removeprefix(file).partition("/")[2])) is not None:
            return self.content(content)
        return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound" if REPOSITORY in path else "RepoNotFound"})

    def do_POST(self):
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        known = {entry["path"]: entry for entry in self.below("", True)}
        self.answer(200, json.dumps([known[path] for path in paths if path in known]).encode())

    def below(self, folder, recursive):
        prefix, found = folder + "/" if folder else "", {}
        for name, content in self.files.items():
            if name.startswith(prefix):
                parts = name.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    path = prefix + "/".join(parts[:depth])
                    found[path] = {"type": "directory", "oid": "d" * 40, "size": 0, "path": path}
                digest = hashlib.sha1(content).hexdigest()
                found[name] = {"type": "file", "oid": digest, "size": len(content), "path": name}
        return [entry for path, entry in found.items() if recursive or "/" not in path.removeprefix(prefix)]

    def content(self, content):
        facts = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if not wanted:
            return self.answer(200, content, facts)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        return self.answer(206, part, {**facts, "Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_hub(files):
    """(its address, the paths asked for so far)."""
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"files": files, "asked": asked}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
