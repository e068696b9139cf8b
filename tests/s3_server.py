"""An S3 store for tests: moto's server, whose answers are counted, and cut off where a test wants it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

KEY, SECRET = "testkey", "testsecret-never-printed"


@dataclass
class Store:
    """Its address, and what was asked of it.

    Args:
        address: its URL.
        asked: the method, the path and the range of each request.
        sent: how many bytes were sent of each object in all.
        drops: how many answers are cut off in their middle before one is whole.
        denied: the paths of buckets that nobody may list.
        interrupt: called with each range of an object that is asked for, before it is answered.
    """

    address: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    drops: int = 0
    denied: set[str] = field(default_factory=set)
    interrupt: Callable[[str], None] = lambda path: None

    @property
    def settings(self) -> dict[str, object]:
        """What fsspec's configuration has to say about it."""
        return {"endpoint_url": self.address, "key": KEY, "secret": SECRET}

    def make_bucket(self, name: str) -> None:
        self._client.create_bucket(Bucket=name)

    def put(self, bucket: str, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            self._client.put_object(Bucket=bucket, Key=name, Body=content)

    def get(self, bucket: str, name: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=bucket, Key=name)["Body"].read()
        return content

    def list(self, bucket: str) -> list[str]:
        return [row["Key"] for row in self._client.list_objects_v2(Bucket=bucket)["Contents"]]

    def deny_objects(self, bucket: str) -> None:
        self._decide(bucket, "Deny")

    def allow_everybody(self, bucket: str) -> None:
        self._decide(bucket, "Allow")

    def _decide(self, bucket: str, effect: str) -> None:
        """Set what everybody may do with objects; moto asks for no more than that about lists."""
        resource = f"arn:aws:s3:::{bucket}/*"
        statement = {"Effect": effect, "Principal": "*", "Action": "s3:GetObject", "Resource": resource}
        self._client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Statement": [statement]}))

    def forget(self) -> None:
        """Count from here on."""
        self.asked.clear()
        self.sent.clear()

    def empty(self) -> None:
        """Remove all buckets."""
        self.denied = set()
        s3_backends.reset()

    @property
    def _client(self) -> Any:
        import boto3

        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.address, **keys)


@contextmanager
def serving() -> Iterator[Store]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store()
    server = make_server("127.0.0.1", 0, _Counting(store), threaded=True)
    store.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Counting:
    """Moto's application, and what a test wants to know of it."""

    def __init__(self, store: Store) -> None:
        self._store, self._application = store, DomainDispatcherApplication(create_backend_app)

    def __call__(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        store, method, path = self._store, environment["REQUEST_METHOD"], environment["PATH_INFO"]
        wanted = environment.get("HTTP_RANGE", "")
        store.asked.append((method, path, wanted))
        if wanted:
            store.interrupt(path)
        if path in store.denied:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        content = b"".join(self._application(environment, start_response))
        if method == "GET":
            store.sent[path] = store.sent.get(path, 0) + len(content)
        if store.drops and wanted and len(content) > 1000:
            store.drops -= 1
            return self._cut(content)
        return [content]

    @staticmethod
    def _cut(content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        raise ConnectionError("cut off by the test")
