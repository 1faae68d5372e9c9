"""A Google Cloud Storage of one bucket, `bucket`, in memory, with faults by seed.

It is gcp-storage-emulator and what that leaves out of the protocol and clients rely on: ranges of listings,
generations, preconditions.

    python tests/helpers/gcs_server.py PORT [--seed 0] [--unavailable 0.05] [--cut 0.02] [--hidden 5]

After SIGUSR1 it closes connections without an answer, until the next; after SIGUSR2 it answers all requests well.
"""

import argparse
import functools
import random
import re
import signal
import threading
import time
from http import HTTPStatus, server

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def asked(request, name):
    """A parameter of the query; None without it."""
    return (request.query.get(name) or [None])[0]


def object_of(request):
    """The object that a request is about."""
    data = request.data if request.method == "POST" else None
    described = data["meta"].get("name") if isinstance(data, dict) and "meta" in data else None
    return request.params.get("object_id") or asked(request, "name") or described


def generation_of(storage, request, name):
    """An object's generation, "0" where there is none."""
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return "0"


def conditional(handle):
    """A handler that heeds ifGenerationMatch and ifGenerationNotMatch, and tells the generation."""

    @functools.wraps(handle)
    def handled(request, response, storage, *rest, **options):
        if (name := object_of(request)) is not None:
            generation = generation_of(storage, request, name)
            response["x-goog-generation"] = generation
            if asked(request, "ifGenerationMatch") not in (None, generation):
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
            if asked(request, "ifGenerationNotMatch") == generation:
                reading = request.method == "GET"
                response.status = HTTPStatus.NOT_MODIFIED if reading else HTTPStatus.PRECONDITION_FAILED
                return None
        return handle(request, response, storage, *rest, **options)

    return handled


class Listing:
    """The listing of a bucket, by range and page; objects that are new are left out for some seconds."""

    def __init__(self, hidden):
        self.hidden = hidden

    def __call__(self, request, response, storage, *_, **__):
        places = (asked(request, name) for name in ("prefix", "delimiter", "matchGlob"))
        try:
            files, folders = storage.get_file_list(request.params["bucket_name"], *places)
        except NotFound:
            response.status = HTTPStatus.NOT_FOUND
            return
        first, end = asked(request, "startOffset") or "", asked(request, "endOffset") or "\x7f"
        files = [file for file in files if first <= file["name"] < end and self.shows(file)]
        folders = [folder for folder in folders if (folder >= first or first.startswith(folder)) and folder < end]
        start, count = int(asked(request, "pageToken") or 0), int(asked(request, "maxResults") or 1000)
        found = {"kind": "storage#objects", "prefixes": [] if start else folders, "items": files[start : start + count]}
        if len(files) > start + count:
            found["nextPageToken"] = str(start + count)
        response.json(found)

    def shows(self, file):
        return time.time_ns() - int(file["generation"]) >= 1e9 * self.hidden  # which is when it was written


def handlers(hidden):
    """The emulator's table of handlers with ours in place of some."""
    ours = {each: conditional(each) for each in (objects.download, objects.get, objects.delete, objects.insert)}
    ours[objects.ls] = Listing(hidden)
    objects.download, objects.insert = ours[objects.download], ours[objects.insert]  # they are called by name, too
    return tuple(
        (re.compile(path), {method: ours.get(handle, handle) for method, handle in by_method.items()})
        for path, by_method in emulator.HANDLERS
    )


class Handler(emulator.RequestHandler):
    """Answers one request of a connection; sometimes with 503, sometimes with half of the answer."""

    protocol_version = "HTTP/1.1"
    lock, dice, unavailable, cut, gone = threading.RLock(), random.Random(0), 0.0, 0.0, False

    @classmethod
    def leave(cls, *_):
        cls.gone = not cls.gone

    @classmethod
    def behave(cls, *_):
        cls.unavailable, cls.cut, cls.gone = 0.0, 0.0, False

    def one(self):
        self.close_connection = True
        if self.gone:
            return
        with self.lock:
            refused, halved = self.dice.random() < self.unavailable, self.dice.random() < self.cut
            if refused:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            wfile = self.wfile
            if halved:
                self.wfile = Half(wfile)
            emulator.Router(self).handle(self.command)
            if halved:
                self.wfile.flush_half()
                self.wfile = wfile

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = one


class Half:
    """Takes an answer and sends its first half."""

    closed = False

    def __init__(self, to):
        self.to, self.parts = to, []

    def write(self, part):
        self.parts.append(bytes(part))
        return len(part)

    def flush(self):
        pass

    def flush_half(self):
        head, end, body = b"".join(self.parts).partition(b"\r\n\r\n")
        self.to.write(head + end + body[: len(body) // 2])
        self.to.flush()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    for name, kind in (("seed", int), ("unavailable", float), ("cut", float), ("hidden", float)):
        parser.add_argument(f"--{name}", type=kind, default=0)
    options = parser.parse_args()
    emulator.HANDLERS = handlers(options.hidden)
    Handler.dice = random.Random(options.seed)
    Handler.unavailable, Handler.cut = options.unavailable, options.cut
    signal.signal(signal.SIGUSR1, Handler.leave)
    signal.signal(signal.SIGUSR2, Handler.behave)
    storage = emulator.Storage(use_memory_fs=True)
    about = {"kind": "storage#bucket", "location": "US", "storageClass": "STANDARD", "projectNumber": "1"}
    storage.create_bucket("bucket", {"name": "bucket", "metageneration": "1", **about})
    serving = server.ThreadingHTTPServer(("127.0.0.1", options.port), functools.partial(Handler, storage))
    serving.daemon_threads = True
    print("ready", flush=True)
    serving.serve_forever()


if __name__ == "__main__":
    main()
