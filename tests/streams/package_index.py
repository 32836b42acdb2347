"""A tiny package index on this machine that can lose connections, and tiny packages for it."""

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class PackageIndex:
    """Serves ``/simple/NAME/`` and ``/files/FILE`` from memory.

    Attributes:
        files: Archive name to content.
        listed: Archive name to the digest the index claims, where it is not the true one.
        break_at: Close the connection after this many bytes of a file, ``breaks`` times.
        ranges: Whether Range requests are honoured.
        log: (archive, Range header or None, bytes sent) of every file request.
    """

    def __init__(self):
        self.files = {}
        self.listed = {}
        self.ranges = True
        self.break_at = None
        self.breaks = 0
        self.log = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                index.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, filename, content):
        """Serve an archive; return its digest."""
        self.files[filename] = content
        return hashlib.sha256(content).hexdigest()

    def answer(self, request):
        kind, _, name = request.path.strip("/").partition("/")
        if kind == "simple":
            own = [f for f in self.files if f.split("-")[0].replace("_", "-") == name.strip("/")]
            links = [f'<a href="/files/{f}#sha256={self._listed(f)}">{f}</a>' for f in own]
            body = "".join(links).encode()
            request.send_response(200 if own else 404)
            request.send_header("Content-Type", "text/html")
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
            return
        content = self.files[name]
        asked = request.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            request.send_header("Content-Range", span)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        part = content[start:]
        if self.breaks > 0:
            self.breaks -= 1
            part = part[: self.break_at]
        self.log.append((name, asked, len(part)))
        request.wfile.write(part)
        request.close_connection = True

    def _listed(self, filename):
        return self.listed.get(filename, hashlib.sha256(self.files[filename]).hexdigest())


def wheel(members):
    """A wheel of (name or ZipInfo, bytes) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def sdist(folder, members, links=()):
    """A source archive with everything below one folder; links are (name, target) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name, target in links:
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return buffer.getvalue()
