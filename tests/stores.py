"""Object stores for tests: real servers of their protocols, each behind a proxy that makes faults.

Each is started once and serves until the tests end. The tests are in
`guarantees.test_object_stores`.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ObjectStore:
    """A running store.

    Attributes:
        port: Of its proxy.
        root: The URI that databases are in.
        options: LanceDB's storage options for it.
    """

    port: int
    root: str
    options: dict[str, str]

    @property
    def secrets(self) -> list[str]:
        """What must be told nowhere."""
        return [
            value
            for name, value in self.options.items()
            if name.endswith(("secret_access_key", "account_key"))
        ]

    def rules(self, **rules: Any) -> None:
        """Sets what the proxy does from now on (see `store_proxy.Rules`); nothing by default."""
        _request(f"http://127.0.0.1:{self.port}/__proxy/rules", "POST", json.dumps(rules).encode())

    def log(self) -> list[tuple[str, str, str]]:
        """Returns method, path and fault of each request since the rules were set."""
        told = _request(f"http://127.0.0.1:{self.port}/__proxy/log", "GET")
        return [(method, path, fault) for method, path, fault in json.loads(told)]


@contextlib.contextmanager
def s3() -> Iterator[ObjectStore]:
    """Runs moto's S3 server behind a proxy."""
    server, port = _free_port(), _free_port()
    with (
        _running(["moto.server", "-H", "127.0.0.1", "-p", str(server)], server),
        _running(["tests.store_proxy", str(port), str(server)], port),
    ):
        _request(f"http://127.0.0.1:{server}/bucket", "PUT")
        yield ObjectStore(
            port,
            "s3://bucket",
            {
                "endpoint": f"http://127.0.0.1:{port}",
                "allow_http": "true",
                "aws_access_key_id": "test-key",
                "aws_secret_access_key": "test-secret",
                "region": "us-east-1",
            },
        )


AZURITE = shutil.which("azurite-blob")
"""Azure's storage as a program, from npm's package `azurite`; `None` where it is not installed."""

_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def azure() -> Iterator[ObjectStore]:
    """Runs azurite, the server of Azure's storage, behind a proxy."""
    server, port = _free_port(), _free_port()
    command = [str(AZURITE), "--blobPort", str(server), "--inMemoryPersistence", "--silent",
               "--skipApiVersionCheck", "--disableTelemetry"]  # fmt: skip
    with (
        _serving(command, server),
        _running(["tests.store_proxy", str(port), str(server)], port),
    ):
        _make_container(server, "container")
        yield ObjectStore(
            port,
            "az://container",
            {
                "azure_storage_endpoint": f"http://127.0.0.1:{port}/{_ACCOUNT}",
                "azure_storage_account_name": _ACCOUNT,
                "azure_storage_account_key": _KEY,
                "allow_http": "true",
            },
        )


def _make_container(port: int, name: str) -> None:
    """Makes a container, with a request signed by the account's key as Azure documents it."""
    now = dt.datetime.now(dt.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    signed = f"x-ms-date:{now}\nx-ms-version:2021-08-06\n"
    text = "PUT" + "\n" * 12 + f"{signed}/{_ACCOUNT}/{_ACCOUNT}/{name}\nrestype:container"
    digest = hmac.new(base64.b64decode(_KEY), text.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": now,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    url = f"http://127.0.0.1:{port}/{_ACCOUNT}/{name}?restype=container"
    _request(url, "PUT", headers=headers)


def _running(module: list[str], port: int) -> contextlib.AbstractContextManager[None]:
    return _serving([sys.executable, "-m", *module], port)


@contextlib.contextmanager
def _serving(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not serve (exit code {process.poll()})")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _request(
    url: str, method: str, data: bytes | None = None, headers: dict[str, str] | None = None
) -> bytes:
    request = urllib.request.Request(url, data, headers or {}, method=method)  # noqa: S310 - this machine's
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
        found: bytes = answer.read()
        return found


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
