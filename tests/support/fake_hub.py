"""A server on this machine with one repository, which answers huggingface_hub as the hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(kind: str, name: str, files: Mapping[str, bytes], refs: tuple[str, ...] = ("main",)) -> Iterator[str]:
    """Yield the address of a hub with one repository at one commit.

    Args:
        kind: datasets or models.
        refs: the names of the commit.
    """
    api, resolve = f"/api/{kind}/{name}", f"{'/datasets' if kind == 'datasets' else ''}/{name}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            revision = path.removeprefix(f"{api}/revision/").removeprefix(f"{api}/tree/").removeprefix(resolve)
            if not path.startswith((api, resolve)):
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            elif path == f"{api}/refs":
                named = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": COMMIT} for ref in refs]
                self.answer(json.dumps({"branches": named, "tags": [], "converts": []}).encode())
            elif revision.partition("/")[0] not in (*refs, COMMIT):
                self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            elif path.startswith(f"{api}/revision/"):
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith(f"{api}/tree/"):
                tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": file} for file in files]
                self.answer(json.dumps(tree).encode())
            elif (content := files.get(revision.partition("/")[2])) is None:
                self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
