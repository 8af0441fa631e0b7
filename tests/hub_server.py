"""A small Hugging Face Hub on loopback: what `huggingface_hub` asks of the real one, kept in memory."""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REFUSALS = {  # repositories that are refused: status and headers
    "acme/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "acme/private": (401, {"X-Error-Code": "RepoNotFound"}),
    "acme/forbidden": (403, {}),
    "acme/crowded": (429, {}),
    "acme/broken": (500, {}),
    "acme/away": (503, {}),
}


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {branch, tag or commit: {path: content}}}, and all that was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.large: dict[str, bytes] = {}  # contents by their SHA-256

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Commits the files of a repository; returns the commit."""
        digest = hashlib.sha1(repo.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        commit = digest.hexdigest()
        self.repos.setdefault(repo, {}).update({revision: files, commit: files})
        return commit

    def commit(self, repo: str, revision: str) -> str:
        """The commit of a branch or tag."""
        files = self.repos[repo][revision]
        return next(ref for ref, those in self.repos[repo].items() if those is files and len(ref) == 40)

    def downloads(self) -> list[str]:
        """The files whose contents were sent."""
        sent = (path for method, path in self.asked if method == "GET" and "/resolve/" in path)
        return sorted(path.split("/resolve/")[1].partition("/")[2] for path in sent)


class Handler(BaseHTTPRequestHandler):
    """The endpoints."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if token := self.headers.get("Authorization"):
            self.server.tokens.add(token.removeprefix("Bearer "))
        body = self._body()
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, path):
                repo = found.groupdict().get("repo", "")
                if repo in REFUSALS:
                    status, headers = REFUSALS[repo]
                    self._send(status, {"error": "refused"}, headers)
                else:
                    answer(self, body, **found.groupdict())
                return
        self._send(404, {"error": f"no such endpoint {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None = there is none, and that was said."""
        if repo not in self.server.repos:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in self.server.repos[repo]:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return self.server.repos[repo][revision]

    def info(self, body: bytes, repo: str, revision: str | None) -> None:
        files = self._files(repo, revision or "main")
        if files is None:
            return
        license = "mit" if b"license: mit" in files.get("README.md", b"") else None
        described = {
            "id": repo,
            "modelId": repo,
            "sha": self.server.commit(repo, revision or "main"),
            "tags": [],
            "private": self.server.private.get(repo, False),
            "siblings": [{"rfilename": name} for name in files],
            "cardData": {"license": license} if license else {},
        }
        self._send(200, described)

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is not None:
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in files.items()
            ]
            self._send(200, rows)

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": self.server.commit(repo, revision)}
        if file not in files:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
            return
        self._send(200, files[file], {"ETag": f'"{_etag(files[file])}"', **commit})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if repo in REFUSALS:
            self._send(REFUSALS[repo][0], {"error": "refused"})
            return
        if repo in self.server.repos:
            self._send(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}
            )
            return
        self.server.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.add(repo, {".gitattributes": b""})
        self._send(200, {"url": f"{self.server.url}/{repo}", "id": repo})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        self.server.repos[repo][branch] = dict(self.server.repos[repo]["main"])
        self.server.add(repo, self.server.repos[repo][branch], branch)
        self._send(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._files(repo, revision) is None:
            return
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": rows})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.server.repos[repo][revision])
        for line in body.splitlines():
            value = json.loads(line)["value"]
            match json.loads(line)["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = self.server.add(repo, files, revision)
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})

    def yaml(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"
ROUTES = [
    (rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?", Handler.info),
    (rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/large/(?P<oid>\w+)", Handler.put),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.yaml),
]


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers as long as the block lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their names in it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    """The environment of a process that knows this Hub and no other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return kept | own | more


def python(script: str, env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh process: `huggingface_hub` reads its environment when it is imported."""
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
