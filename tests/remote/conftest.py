"""A bucket on this machine: an emulator of Google Cloud Storage for gcsfs, for tensorstore and for the command line."""
import itertools
import socket

import pytest

from tests.data.conftest import cifar10  # noqa: F401

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The environment in which gs://bucket is there, and nothing else is."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    running.start()
    quiet = pytest.MonkeyPatch()  # gcsfs hangs up on requests whose answer it needs no more, of which the server would print a traceback
    quiet.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
    home = tmp_path_factory.mktemp("home")  # copies of what lies in the bucket
    yield {"STORAGE_EMULATOR_HOST": f"http://localhost:{port}", "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}", "HOME": str(home),
           "NO_GCE_CHECK": "true"}
    running.stop()
    quiet.undo()


@pytest.fixture
def bucket(emulator, monkeypatch):
    """A new place gs://bucket/NUMBER."""
    for name, value in emulator.items():
        monkeypatch.setenv(name, value)
    return f"gs://bucket/{next(NUMBERS)}"


@pytest.fixture(params=["here", "there"])
def root(request, tmp_path):
    """A place on this machine and one in the bucket."""
    return str(tmp_path / "root") if request.param == "here" else request.getfixturevalue("bucket")
