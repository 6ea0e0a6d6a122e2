"""A bucket on a server of the S3 protocol on loopback: it counts what is asked of it, and is slow or wrong on demand.

The server is moto's, behind a layer that sees each request. Knows nothing of corpora.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NAME = "text"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "known-key", "AWS_SECRET_ACCESS_KEY": "known-secret"}


class Bucket:
    """`env` is what a process needs to find it; `url` names a folder in it. Close it when done."""

    def __init__(self) -> None:
        import boto3
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from moto.server import MotoRequestHandler
        from werkzeug.serving import make_server

        class Quiet(MotoRequestHandler):  # type: ignore[misc]
            def log(self, *args: object) -> None:
                pass

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()
        self.latency_seconds = 0.0
        # Whether to deny a file, by its name and how many files were asked for before.
        self.denies: Callable[[str, int], bool] = lambda file, before: False
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {
            **_CREDENTIALS,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=_CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )
        self._client.create_bucket(Bucket=NAME)

    def url(self, folder: str) -> str:
        return f"s3://{NAME}/{folder}"

    def put(self, folder: str, source: Path, without: Iterable[str] = ()) -> str:
        """Copy the files of a local folder, but for some; returns the URL."""
        for path in source.iterdir():
            if path.name not in without:
                self.write(folder, path.name, path.read_bytes())
        return self.url(folder)

    def write(self, folder: str, file: str, content: bytes) -> None:
        self._client.put_object(Bucket=NAME, Key=f"{folder}/{file}", Body=content)

    def asked(self) -> Counter[str]:
        """How often each file was read since the last call, by its name."""
        with self._lock:
            asked, self._asked = self._asked, Counter()
        return asked

    def behave(self) -> None:
        """Be quick and right again, and begin to count anew."""
        self.latency_seconds = 0.0
        self.denies = lambda file, before: False
        self.asked()

    def close(self) -> None:
        self._client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "GET":
            file = environ["PATH_INFO"].rpartition("/")[2]
            with self._lock:
                denied = self.denies(file, self._asked.total())
                self._asked[file] += 1
            time.sleep(self.latency_seconds)
            if denied:
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return [b"<Error><Code>AccessDenied</Code><Message>not now</Message></Error>"]
        return self._moto(environ, start_response)
