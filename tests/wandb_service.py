"""As much of the W&B service as its client asks for: remembers all that is uploaded, in memory.

What is answered was found by watching wandb 0.31 talk; a question that is not known here is listed
in ``unknown``, and answered with nothing.
"""

import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "P", "name": "cl_peft", "entity": {"id": "E", "name": "me"}}


class Service:
    """Uploaded runs by id (group, name, config, history, ...), and files by path."""

    def __init__(self):
        self.runs, self.files, self.artifacts, self.unknown, self.bodies = {}, {}, [], [], []
        self.lock, self.url = threading.Lock(), ""

    def run(self, name):
        fresh = {"history": [], "summary": {}, "config": {}, "sent": [], "resumed": 0}
        return self.runs.setdefault(name, fresh)

    # ---------------------------------------------------------------- questions

    def answer(self, operation, given):
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
        known = getattr(self, f"on_{name}", None)
        if known is None:
            self.unknown.append(operation)
            return {}
        return known(given)

    def on_viewer(self, given):
        return {"viewer": {"id": "U", "entity": "me", "username": "me", "flags": "{}",
                           "teams": {"edges": []}}}  # fmt: skip

    def on_run_resume_status(self, given):
        run = self.runs.get(given["name"])
        if run is None:
            return {"model": {**PROJECT, "bucket": None}}
        run["resumed"] += 1
        bucket = {
            "id": "B",
            "name": given["name"],
            "summaryMetrics": json.dumps(run["summary"]),
            "displayName": run["name"],
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(run["history"]),
            "historyTail": json.dumps([json.dumps(line) for line in run["history"][-1:]]),
            "eventsTail": "[]",
            "config": json.dumps({k: {"value": v} for k, v in run["config"].items()}),
            "tags": [],
            "notes": None,
            "wandbConfig": "{}",
        }
        return {"model": {**PROJECT, "bucket": bucket}}

    def on_upsert_bucket(self, given):
        run = self.run(given["name"])
        run["sent"].append(given)
        for mine, theirs in (("group", "groupName"), ("name", "displayName"), ("job", "jobType")):
            run[mine] = given[theirs] or run.get(mine)
        config = json.loads(given["config"] or "{}")
        run["config"].update({k: v["value"] for k, v in config.items() if k != "_wandb"})
        bucket = {"id": "B", "name": given["name"], "displayName": run["name"], "config": None,
                  "description": "", "sweepName": None, "project": PROJECT,
                  "historyLineCount": len(run["history"])}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": len(run["sent"]) == 1}}

    def on_create_run_files(self, given):
        files = [{"name": f, "uploadUrl": self.at("run", given["run"], f)} for f in given["files"]]
        return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}

    def on_artifact_type(self, given):
        return {"project": {"artifact": None}}

    def on_server_features_query(self, given):
        return {"serverInfo": {"features": []}}

    def on_create_artifact(self, given):
        about = given["input"]
        self.artifacts.append({"type": about["artifactTypeName"], "state": "PENDING"})
        sequence = {"id": "S", "latestArtifact": None}
        artifact = {"id": str(len(self.artifacts) - 1), "state": "PENDING",
                    "artifactSequence": sequence}  # fmt: skip
        return {"createArtifact": {"artifact": artifact}}

    def on_create_artifact_manifest(self, given):
        file = {"id": "F", "uploadUrl": self.at("manifest", given["artifactID"], "json"),
                "uploadHeaders": []}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}

    def on_create_artifact_files(self, given):
        nodes = [
            {"id": f["name"], "name": f["name"], "displayName": f["name"], "uploadHeaders": [],
             "uploadUrl": self.at("artifact", f["artifactID"], f["name"]), "storagePath": "x",
             "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]}}
            for f in given["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": n} for n in nodes]}}}

    def on_commit_artifact(self, given):
        self.artifacts[int(given["artifactID"])]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "x"}}}

    # ---------------------------------------------------------------- uploads

    def at(self, *parts):
        return "/".join([self.url, "upload", *parts])

    def stream(self, name, sent):
        """Lines of a run: history is put at its offset, the summary replaces the one before."""
        run, files = self.run(name), sent.get("files") or {}
        if "wandb-history.jsonl" in files:
            lines = files["wandb-history.jsonl"]
            new = [json.loads(line) for line in lines["content"]]
            run["history"][lines["offset"] : lines["offset"] + len(new)] = new
        if "wandb-summary.json" in files:
            run["summary"].update(json.loads(files["wandb-summary.json"]["content"][-1]))
        if "exitcode" in sent:
            run["exit_code"] = sent["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_PUT(self):
        service, data = self.server.service, self._read()
        with service.lock:
            service.bodies.append(data)
            if self.path.startswith("/upload/"):
                service.files[self.path.removeprefix("/upload/")] = data
                reply = {}
            elif self.path.endswith("/file_stream"):
                service.stream(self.path.split("/")[-2], json.loads(data))
                reply = {}
            elif self.path == "/graphql":
                asked = json.loads(data)
                name = asked.get("operationName") or asked["query"].split("(")[0].split()[1]
                reply = {"data": service.answer(name, asked.get("variables") or {})}
            else:
                reply = {}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET = do_HEAD = do_PUT  # noqa: N815 (names that http.server looks for)

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data


@contextmanager
def serving():
    """A service on a port of this machine, for as long as the block runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.service = Service()
        server.service.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.service
        finally:
            server.shutdown()
