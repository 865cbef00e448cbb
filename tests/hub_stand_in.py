"""A stand-in for the Hub: the part of its HTTP API that an upload and a download of one model use, on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class HubStandIn:
    """Serves repositories from memory at `endpoint` while the context is open.

    Weights go through Git LFS, everything else in the commit; Xet has to be switched off (HF_HUB_DISABLE_XET=1).

    Attributes:
        files: per repository, path -> content of the last commit.
        commits: per repository, the messages of its commits.
        unknown: requests that nothing here answers.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.large: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "HubStandIn":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: str) -> dict[str, str]:
        """Variables that send a process's Hub client here, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def commit_hash(self, repo: str) -> str:
        """A hash of 40 digits for the repository's state."""
        return hashlib.sha1(repr((repo, self.commits[repo])).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _unknown(self) -> None:
        self.hub.unknown.append(f"{self.command} {self.path}")
        self._answer(404)

    def do_GET(self) -> None:
        match self._parts():
            case [owner, name, "resolve", _, *path] if f"{owner}/{name}" in self.hub.files:
                self._file(f"{owner}/{name}", "/".join(path))
            case ["api", "models", _, _, "tree", *_]:
                # No repository here has folders.
                self._answer(404, X_Error_Code="EntryNotFound")
            case ["api", "models", owner, name, *_] if f"{owner}/{name}" in self.hub.files:
                repo = f"{owner}/{name}"
                siblings = [{"rfilename": path} for path in self.hub.files[repo]]
                self._json({"id": repo, "sha": self.hub.commit_hash(repo), "siblings": siblings, "tags": []})
            case [_, _, "resolve", *_] | ["api", "models", _, _, *_]:
                self._answer(404, X_Error_Code="RepoNotFound")
            case _:
                self._unknown()

    do_HEAD = do_GET  # noqa: N815

    def _file(self, repo: str, path: str) -> None:
        content = self.hub.files[repo].get(path)
        commit = self.hub.commit_hash(repo)
        if content is None:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(401)
            return
        match self._parts():
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                self.hub.files.setdefault(repo, {})
                self.hub.commits.setdefault(repo, [])
                self._json({"url": f"{self.hub.endpoint}/{repo}"})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                modes = {True: "lfs", False: "regular"}
                paths = [file["path"] for file in json.loads(body)["files"]]
                answers = [{"path": path, "uploadMode": modes[path.endswith(".safetensors")]} for path in paths]
                self._json({"files": [{**answer, "shouldIgnore": False} for answer in answers]})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self._json({"transfer": "basic", "objects": objects})
            case ["api", "models", owner, name, "commit", _]:
                self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
            case _:
                self._unknown()

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self._parts()[-1]
        if hashlib.sha256(content).hexdigest() != oid:
            self._answer(422)
            return
        self.hub.large[oid] = content
        self._answer(200)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits[repo].append(value["summary"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                self._unknown()
                return
        commit = self.hub.commit_hash(repo)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit})
