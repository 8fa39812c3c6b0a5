"""paths.py: the same calls give the same answers on this machine and in a bucket, and a refusal is one line."""
import http.server
import os
import threading
from pathlib import PurePosixPath

import pytest

from ldm_jax import paths
from ldm_jax.types import UserError


def filled(root):
    for name in ("b.txt", "a/c.txt", "a/d/e.txt", "ab.txt"):
        paths.makedirs(os.path.dirname(os.path.join(root, name)))
        paths.write_text(os.path.join(root, name), f"{name}\r\n\u00e9")
    return root


def test_what_is_written_is_read(root):
    filled(root)
    assert paths.read_text(os.path.join(root, "a/c.txt")) == "a/c.txt\r\n\u00e9"
    assert paths.read_all([os.path.join(root, name) for name in ("b.txt", "ab.txt", "b.txt")]) == [
        f"{name}\r\n\u00e9".encode() for name in ("b.txt", "ab.txt", "b.txt")]
    paths.write_bytes(os.path.join(root, "b.txt"), b"shorter")
    assert paths.read_bytes(os.path.join(root, "b.txt")) == b"shorter"


def test_what_is_there(root):
    assert not paths.exists(root) and not paths.isdir(root)
    filled(root)
    assert paths.listdir(root) == ["a", "ab.txt", "b.txt"] and paths.listdir(root + "/a/") == ["c.txt", "d"]
    assert paths.files_below(root) == [PurePosixPath(name) for name in ("a/c.txt", "a/d/e.txt", "ab.txt", "b.txt")]
    kinds = {name: (paths.exists(path), paths.isfile(path), paths.isdir(path))
             for name in ("a", "a/c.txt", "a/d", "a/x", "b", "") for path in [os.path.join(root, name)]}
    assert kinds == {"a": (True, False, True), "a/c.txt": (True, True, False), "a/d": (True, False, True), "a/x": (False, False, False),
                     "b": (False, False, False), "": (True, False, True)}


def test_what_another_writes_is_seen_at_once(bucket):
    """As tensorstore does, or the process before: nothing of a listing is remembered."""
    filled(bucket)
    assert paths.listdir(bucket) == ["a", "ab.txt", "b.txt"]
    type(paths.connect(bucket))(skip_instance_cache=True).pipe_file(f"{bucket}/z.txt", b"")
    assert "z.txt" in paths.listdir(bucket) and paths.exists(f"{bucket}/z.txt")


def test_what_is_missing(root):
    for read in (paths.read_bytes, paths.listdir, lambda path: paths.read_all([path, path + "x"])):
        with pytest.raises(FileNotFoundError) as error:
            read(os.path.join(root, "none"))
        assert "none" in str(error.value)


def test_files_and_directories_appear_whole_or_not_at_all(root):
    filled(root)
    for new, name in ((paths.new_file, "f.bin"), (lambda path: paths.new_directory(path, "last.json"), "new")):
        path = os.path.join(root, name)
        with pytest.raises(KeyboardInterrupt), new(path) as partial:
            with open(os.path.join(partial, "x.bin") if name == "new" else partial, "wb") as file:
                file.write(b"half")
            raise KeyboardInterrupt
        assert not paths.exists(path)
    with paths.new_file(os.path.join(root, "f.bin")) as partial, open(partial, "wb") as file:
        file.write(bytes(3_000_000))
    with paths.new_directory(os.path.join(root, "new"), "last.json") as partial:
        os.makedirs(os.path.join(partial, "in"))
        for name in ("in/x.bin", "last.json", "z"):
            with open(os.path.join(partial, name), "w") as file:
                file.write(name)
    assert paths.read_bytes(os.path.join(root, "f.bin")) == bytes(3_000_000)
    assert [str(name) for name in paths.files_below(os.path.join(root, "new"))] == ["in/x.bin", "last.json", "z"]
    copy = paths.local_directory(os.path.join(root, "new"))
    assert all(open(os.path.join(copy, name)).read() == name for name in ("in/x.bin", "last.json", "z"))


def test_the_file_without_which_a_directory_is_not_whole_comes_last(bucket, monkeypatch):
    store, sent = paths.connect(bucket), []
    put = store.put
    monkeypatch.setattr(store, "put", lambda sources, targets: (sent.append(targets), put(sources, targets)))
    with paths.new_directory(f"{bucket}/new", "b") as partial:
        for name in "abc":
            open(os.path.join(partial, name), "w").close()
    assert sent == [[f"{bucket}/new/a", f"{bucket}/new/c"], [f"{bucket}/new/b"]]


def test_a_copy_is_made_once_for_each_version(bucket):
    path = f"{bucket}/w.bin"
    paths.write_bytes(path, b"one")
    first = paths.local(path)
    assert os.path.basename(first) == "w.bin" and open(first, "rb").read() == b"one"
    before = os.stat(first).st_mtime_ns
    assert paths.local(path) == first and os.stat(first).st_mtime_ns == before
    paths.write_bytes(path, b"two")  # of the same size
    assert open(paths.local(path), "rb").read() == b"two" and open(first, "rb").read() == b"one"
    with pytest.raises(FileNotFoundError):
        paths.local(bucket)


def test_an_objects_name_does_not_lead_out_of_the_copy(bucket, monkeypatch):
    monkeypatch.setattr(paths.connect(bucket), "find", lambda path, detail: {f"{path.removeprefix('gs://')}/../../escaped": {"size": 1}})
    with pytest.raises(UserError, match=r"'\.\./\.\./escaped', which cannot be a file's"):
        paths.local_directory(f"{bucket}/set")


def test_a_file_of_this_machine_is_its_own_copy(tmp_path):
    assert paths.local(str(tmp_path / "x")) == str(tmp_path / "x") == paths.local_directory(str(tmp_path / "x"))
    assert paths.expand("~/x") == os.path.expanduser("~/x") and paths.expand("gs://b/~x") == "gs://b/~x"


def refused(call, *says):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and all(text in str(error.value) for text in says), str(error.value)


def test_refusals_are_one_line(bucket):
    refused(lambda: paths.write_text("gs://nobucket/run/config.json", ""), "'gs://nobucket/run/config.json'", "no such bucket")
    refused(lambda: paths.upload(__file__, "gs://nobucket/x"), "no such bucket")
    refused(lambda: paths.exists("s3://bucket/x"), "'s3://bucket/x'", "gs://BUCKET/")


class Forbids(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def refuse(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"error": {"code": 403, "message": "x@y.iam does not have storage.objects.get access"}}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = refuse

    def log_message(self, *_):
        pass


@pytest.fixture
def forbidding(bucket, monkeypatch):
    server = http.server.ThreadingHTTPServer(("localhost", 0), Forbids)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    store = type(paths.connect(bucket))(endpoint_url=f"http://localhost:{server.server_port}", token="anon", skip_instance_cache=True)
    monkeypatch.setattr(paths, "connect", lambda path: store)
    yield
    server.shutdown()


@pytest.mark.parametrize("call", [paths.exists, paths.isdir, paths.listdir, paths.read_bytes, paths.local, paths.local_directory,
                                  lambda path: paths.write_bytes(path, b"")])
def test_what_the_account_may_not_do(forbidding, call):
    refused(lambda: call("gs://bucket/x"), "'gs://bucket/x'", "does not have storage.objects.get access", "gcloud auth")


def test_without_gcsfs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    refused(lambda: paths.exists("gs://bucket/x"), "'gs://bucket/x'", 'pip install "ldm_jax[gcs]"')
