"""A Hub on loopback: what huggingface_hub's client asks of huggingface.co, from memory, with faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".pt", ".png", ".bin")  # what the Hub keeps in LFS
REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"


@dataclass
class Repo:
    """Commits, oldest first: each maps paths to content. The branch is `main`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        former = list(self.commits.values())[-1] if self.commits else {}
        content = former | files
        sha = hashlib.sha1(repr((len(self.commits), sorted(content))).encode()).hexdigest()
        self.commits[sha] = content
        return sha

    def find(self, revision: str) -> str | None:
        return (
            list(self.commits)[-1]
            if revision == "main" and self.commits
            else revision
            if revision in self.commits
            else None
        )


@dataclass
class Hub:
    """`cut` maps paths to the bytes after which the connection breaks, once; `corrupt` are served with other bytes."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes], **kind: bool) -> str:
        self.repos[name] = Repo(**kind)
        return self.repos[name].commit(files)

    def add_folder(self, name: str, folder: Path) -> str:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return self.add(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def downloads(self) -> list[str]:
        return [line for line in self.log if line.startswith("GET") and "/resolve/" in line]


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def digest(path: str, content: bytes) -> str:
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        routes = {
            rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": self.resolve,
            rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?": self.model_info,
            rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)": self.tree,
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": self.validate,
            rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)": self.preupload,
            rf"/{REPO}\.git/info/lfs/objects/batch": self.lfs_batch,
            r"/lfs/(?P<oid>[0-9a-f]{64})": self.lfs_put,
            rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)": self.commit,
        }
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.chunks()
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, path)
            if match:
                answer(**match.groupdict())
                return
        self.error(404, "EntryNotFound")

    def chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json")

    def error(self, status: int, code: str) -> None:
        self.send(b"{}", status, X_Error_Code=code, X_Error_Message=code)

    def may_write(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.error(401, "Unauthorized")
            return False
        return True

    def open(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.error(404, "RepoNotFound")
            return None
        sha = found.find(revision or "main")
        if sha is None:
            self.error(404, "RevisionNotFound")
            return None
        return sha, found.commits[sha]

    def model_info(self, repo: str, revision: str | None) -> None:
        if opened := self.open(repo, revision):
            sha, files = opened
            siblings = [{"rfilename": path} for path in files]
            self.json({"id": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        if opened := self.open(repo, revision):
            entries = []
            for path, content in opened[1].items():
                git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
                if is_large(path):
                    entry["lfs"] = {"oid": digest(path, content), "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self.json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        opened = self.open(repo, revision)
        if opened is None:
            return
        if self.hub.repos[repo].gated:
            self.error(403, "GatedRepo")
            return
        sha, files = opened
        if path not in files:
            self.error(404, "EntryNotFound")
            return
        content, etag = files[path], digest(path, files[path])
        if path in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        cut = self.hub.cut.pop(path, None) if self.command == "GET" else None
        if cut is None:
            self.send(part, 206 if asked else 200, **headers)
            return
        self.send_response(206 if asked else 200)
        for name, value in (headers | {"Content_Length": str(len(part))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(part[:cut])
        self.close_connection = True

    def create(self) -> None:
        if self.may_write():
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.hub.repos else 200
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repos.setdefault(name, Repo({}, private=private))
            if not self.hub.repos[name].commits:
                self.hub.repos[name].commit({})
            self.json({"url": f"{self.hub.url}/{name}"}, status)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        known = re.match(r"---\n(?:.*\n)*?license: \S+\n", content)
        self.json({"errors": [] if known else [{"message": "license"}], "warnings": []}, 200 if known else 400)

    def preupload(self, repo: str, revision: str) -> None:
        if self.may_write() and self.open(repo, revision):
            files = json.loads(self.body)["files"]
            modes = [("lfs" if is_large(file["path"]) else "regular", file["path"]) for file in files]
            self.json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for mode, p in modes]})

    def lfs_batch(self, repo: str) -> None:
        if self.may_write():
            objects = json.loads(self.body)["objects"]
            answers = [o | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}} for o in objects]
            self.json({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str) -> None:
        good = hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self.send(b"", 200 if good else 400)

    def commit(self, repo: str, revision: str) -> None:
        if not self.may_write() or not self.open(repo, revision):
            return
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        sha = self.hub.repos[repo].commit(files)
        self.json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "success": True})


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfOneHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
