"""A small Google Cloud Storage on loopback: what gcsfs, TensorStore and Google's client ask of the real one.

`gcp-storage-emulator` on PyPI does not do: it sends no generation with an object's contents and ignores the
preconditions of writes, without which TensorStore's OCDBT neither reads nor writes.
"""

import contextlib
import dataclasses
import email.parser
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
REWRITE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")
PAGE = 1000  # objects that one answer lists
TIME = "2026-01-01T00:00:00.000Z"


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object."""

    data: bytes
    generation: int


class Store(ThreadingHTTPServer):
    """Buckets that all exist, the objects in them, and what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Stored] = {}  # by bucket/name
        self.missing: set[str] = set()  # buckets that do not exist
        self.asked: list[tuple[str, str]] = []
        # Called with each object's name before it is written; the write does not happen where it raises.
        self.before_write: Callable[[str], None] = lambda name: None
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.Lock()
        self._generation = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a process here instead of to Google."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # of gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_CLOUD_PROJECT": "project",
            "GCE_METADATA_ROOT": "127.0.0.1:1",  # where nobody answers: there are no credentials to find
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def handle_error(self, *args: object) -> None:
        """Says nothing of processes that end without closing their connections."""

    def names(self, prefix: str = "") -> list[str]:
        """Objects below bucket/prefix."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, data: bytes, match: str | None = None) -> Stored | None:
        """Writes an object as bucket/name; None = it has another generation than `match`."""
        self.before_write(name)
        with self.lock:
            old = self.objects.get(name)
            if match is not None and int(match) != (old.generation if old else 0):
                return None
            self._generation += 1
            new = self.objects[name] = Stored(data, self._generation)
            return new

    def remove(self, name: str, match: str | None = None) -> int:
        """Removes an object; returns the status of the answer."""
        with self.lock:
            old = self.objects.get(name)
            if old is None:
                return 404
            if match is not None and int(match) != old.generation:
                return 412
            del self.objects[name]
            return 204


class Handler(BaseHTTPRequestHandler):
    """The endpoints."""

    server: Store
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        self._body = self._read()
        self.server.asked.append((self.command, unquote(self.path)))
        try:
            self._route()
        except ConnectionAbortedError:  # of a test: the connection breaks off
            self.close_connection = True

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self) -> None:
        address = urlsplit(self.path)
        path = address.path
        self._query = {key: values[0] for key, values in parse_qs(address.query).items()}
        if path.startswith("/batch"):
            return self._batch()
        if found := re.fullmatch(r"(?:/upload|/resumable/upload)?/storage/v1/b/([^/]+)/o", path):
            bucket = unquote(found[1])
            if bucket in self.server.missing:
                return self._refuse(404, f"The specified bucket does not exist: {bucket}")
            return self._list(bucket) if self.command == "GET" else self._upload(bucket)
        if found := REWRITE.fullmatch(path):
            return self._rewrite(*map(unquote, found.groups()))
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/compose", path):
            return self._compose(unquote(found[1]), unquote(found[2]))
        if found := OBJECT.fullmatch(path):
            return self._object(unquote(found[1]), unquote(found[2]))
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            return self._bucket(unquote(found[1]))
        self._refuse(404, f"{self.command} {path}")

    def _bucket(self, bucket: str) -> None:
        if bucket in self.server.missing:
            return self._refuse(404, f"The specified bucket does not exist: {bucket}")
        about = {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"}
        self._json({**about, "locationType": "region", "storageClass": "STANDARD", "timeCreated": TIME})

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self._query.get("prefix", ""), self._query.get("delimiter")
        after, before = self._query.get("startOffset", ""), self._query.get("endOffset")
        names = [name.removeprefix(bucket + "/") for name in self.server.names(f"{bucket}/{prefix}")]
        items, folders = [], []
        for name in names:
            if name < after or (before and name >= before):
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                if folder not in folders:
                    folders.append(folder)
            else:
                items.append(name)
        start = int(self._query.get("pageToken") or 0)
        most = int(self._query.get("maxResults") or PAGE)
        answer: dict[str, Any] = {"kind": "storage#objects", "prefixes": folders if not start else []}
        with self.server.lock:
            page = [
                (name, self.server.objects.get(f"{bucket}/{name}")) for name in items[start : start + most]
            ]
        answer["items"] = [self._about(bucket, name, stored) for name, stored in page if stored]
        if start + most < len(items):
            answer["nextPageToken"] = str(start + most)
        self._json(answer)

    def _object(self, bucket: str, name: str) -> None:
        if self.command == "DELETE":
            status = self.server.remove(f"{bucket}/{name}", self._query.get("ifGenerationMatch"))
            return self._send(status) if status == 204 else self._refuse(status, name)
        with self.server.lock:
            stored = self.server.objects.get(f"{bucket}/{name}")
        match, differ = self._query.get("ifGenerationMatch"), self._query.get("ifGenerationNotMatch")
        found = stored.generation if stored else 0
        if match is not None and int(match) != found:
            return self._refuse(412 if stored or match != "0" else 404, name)
        if stored is None:
            return self._refuse(404, f"No such object: {bucket}/{name}")
        if differ is not None and int(differ) == found:
            return self._send(304)
        if self._query.get("alt") != "media" and not self.path.startswith("/download"):
            return self._json(self._about(bucket, name, stored))

        headers = {"x-goog-generation": str(found), "x-goog-metageneration": "1"}
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self._send(200, stored.data, headers)
        size = len(stored.data)
        start = int(part[1]) if part[1] else max(size - int(part[2]), 0)
        end = min(int(part[2]) + 1, size) if part[1] and part[2] else size
        if start >= size:
            return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send(206, stored.data[start:end], headers)

    def _upload(self, bucket: str) -> None:
        if self.command == "PUT" or "upload_id" in self._query:
            return self._resume(bucket)
        kind, name, data = self._query.get("uploadType", "media"), self._query.get("name"), self._body
        if kind == "multipart":
            head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
            boundary = email.parser.BytesParser().parsebytes(head).get_boundary() or ""
            _, about, content, *_ = self._body.split(b"--" + boundary.encode())
            name = (
                json.loads(about.partition(b"\r\n\r\n")[2] or about.partition(b"\n\n")[2]).get("name") or name
            )
            separator = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
            data = content.partition(separator)[2]
            data = data.removesuffix(b"\r\n") if data.endswith(b"\r\n") else data.removesuffix(b"\n")
        elif kind == "resumable":
            name = json.loads(self._body or b"{}").get("name") or name
            key = str(len(self.server.uploads))
            self.server.uploads[key] = (f"{bucket}/{name}", bytearray())
            place = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            return self._send(200, b"", {"Location": place})
        self._write(bucket, str(name), data)

    def _resume(self, bucket: str) -> None:
        key = self._query["upload_id"]
        name, data = self.server.uploads[key]
        due = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\*|\d+)", self.headers.get("Content-Range", ""))
        data += self._body
        if due is not None and (due[3] == "*" or len(data) < int(due[3])):
            return self._send(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})
        del self.server.uploads[key]
        self._write(bucket, name.removeprefix(bucket + "/"), bytes(data))

    def _write(self, bucket: str, name: str, data: bytes) -> None:
        stored = self.server.put(f"{bucket}/{name}", data, self._query.get("ifGenerationMatch"))
        if stored is None:
            return self._refuse(412, name)
        self._json(self._about(bucket, name, stored))

    def _compose(self, bucket: str, name: str) -> None:
        parts = [f"{bucket}/{part['name']}" for part in json.loads(self._body)["sourceObjects"]]
        self._write(bucket, name, b"".join(self.server.objects[part].data for part in parts))

    def _rewrite(self, bucket: str, name: str, to_bucket: str, to_name: str) -> None:
        with self.server.lock:
            stored = self.server.objects.get(f"{bucket}/{name}")
        if stored is None:
            return self._refuse(404, name)
        new = self.server.put(f"{to_bucket}/{to_name}", stored.data)
        assert new is not None
        about = self._about(to_bucket, to_name, new)
        self._json({"kind": "storage#rewriteResponse", "done": True, "resource": about} | about)

    def _batch(self) -> None:
        """Several deletions at once, as gcsfs sends them."""
        boundary, answers = "batch_answer", []
        for method, place in re.findall(rb"^(DELETE|GET) (\S+)", self._body, re.MULTILINE):
            found = OBJECT.fullmatch(urlsplit(place.decode()).path)
            assert method == b"DELETE"
            assert found is not None
            status = self.server.remove(f"{unquote(found[1])}/{unquote(found[2])}")
            answers.append(
                f"--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} X\r\n\r\n\r\n"
            )
        text = "".join(answers) + f"--{boundary}--\r\n"
        self._send(200, text.encode(), {"Content-Type": f"multipart/mixed; boundary={boundary}"})

    def _about(self, bucket: str, name: str, stored: Stored) -> dict[str, Any]:
        generation = str(stored.generation)
        return {
            **{
                "kind": "storage#object",
                "id": f"{bucket}/{name}/{generation}",
                "bucket": bucket,
                "name": name,
            },
            **{
                "generation": generation,
                "metageneration": "1",
                "size": str(len(stored.data)),
                "etag": generation,
            },
            **{"timeCreated": TIME, "updated": TIME, "contentType": "application/octet-stream"},
            **{
                "storageClass": "STANDARD",
                "mediaLink": f"{self.server.url}/download/storage/v1/b/{bucket}/o/",
            },
        }

    def _refuse(self, status: int, message: str) -> None:
        self._json({"error": {"code": status, "message": message}}, status)

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # of a process that was killed
                self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """A store that answers while the block runs."""
    store = Store()
    thread = threading.Thread(target=store.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()


@contextlib.contextmanager
def in_environment(store: Store) -> Iterator[None]:
    """Leads this process to the store."""
    before = {key: os.environ.get(key) for key in store.environment}
    os.environ.update(store.environment)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value
