"""An object store of this process whose listings are old."""

import time

import tensorstore as ts

from moma_jax.storage.directory import Directory


class StaleStore:
    """Stands for a directory's store; listings show what was written `seconds` ago, and deletions at once."""

    def __init__(self, directory: Directory, seconds: float):
        self._store, self._seconds, self._written = directory._kv, seconds, {}
        self.read, directory._kv = self._store.read, self

    def write(self, name, content, **conditions):
        self._written[name] = time.monotonic()
        return self._store.write(name, content, **conditions)

    def list(self, span):
        promise, listed = ts.Promise.new()
        ripe = time.monotonic() - self._seconds
        keys = self._store.list(span).result()
        promise.set_result([key for key in keys if self._written.get(key.decode(), 0) <= ripe])
        return listed
