"""Images in an object store: a real server, and a proxy that fails as stores and networks do."""

import io
import os
import signal
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import tiny
from conftest import launch, make_image, predict
from proxy import Proxy
from pyarrow import parquet

from featx.data.sources import ImageTree, find
from featx.data.sources.fetcher import explain, without_secrets
from featx.data.sources.store import _refused, shown
from featx.errors import StoreError, UserError

pytestmark = pytest.mark.xdist_group("store")  # one server


@pytest.fixture
def bucket(store_server, monkeypatch):
    """The server, which nobody has to sign for, and who fails early."""
    settings = {"ENDPOINT_URL": store_server.endpoint, "ALLOW_HTTP": "true", "SKIP_SIGNATURE": "true",
                "REGION": "us-east-1", "READ_TIMEOUT": "1s"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return store_server


@pytest.fixture
def photos_in_store(bucket, photos):
    """The made-up photographs as objects: their URL."""
    bucket.put_folder("bucket/photos", photos)
    return "s3://bucket/photos"


@pytest.fixture
def proxy(bucket, monkeypatch):
    """A proxy in front of the server."""
    proxy = Proxy(bucket.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def some(bucket, tmp_path):
    """20 images, as a folder and as objects: the folder."""
    folder = tmp_path / "some"
    folder.mkdir()
    for i in range(20):
        make_image(i, (60, 50)).save(folder / f"{i:02}.png")
    bucket.put_folder("bucket/some", folder)
    return folder


def rows(out: Path) -> bytes:
    return (out / "2.csv").read_bytes()


def test_objects_are_the_images_of_a_folder_in_its_order(photos, photos_in_store):
    folder, store = ImageTree(str(photos)), find(photos_in_store)
    assert list(store.names) == list(folder.names) and store.classes == folder.classes
    assert list(store.sizes) == list(folder.sizes) and min(store.stamps) >= 0
    assert store.path(0) == f"s3://bucket/photos/{folder.names[0]}"
    for place, file in enumerate(store.read(range(len(store)))):
        assert file.read() == Path(folder.path(place)).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_folders(photos, photos_in_store, tmp_path, workers):
    tiny.run(photos, tmp_path / "folder")
    tiny.run(photos_in_store, tmp_path / "store", data={"num_workers": workers})
    assert rows(tmp_path / "store") == rows(tmp_path / "folder")
    assert "obstore" not in sys.modules


def test_a_name_is_any_text_that_a_key_may_be(bucket):
    names = ["é 1%20#?&+.png", "a'b\"c.png", "sub/deep/x.png", " lead.png", "日本.png"]
    image = io.BytesIO()
    make_image(1, (20, 20)).save(image, "PNG")
    for name in names:
        bucket.put(f"bucket/odd/x/{name}", image.getvalue())
    store = find("s3://bucket/odd")
    assert sorted(store.names) == sorted(f"x/{name}" for name in names)
    assert all(file.read() == image.getvalue() for file in store.read(range(len(store))))


@pytest.mark.parametrize("what", ["503", "cut", "stall"])
def test_a_store_that_fails_for_a_while_loses_nothing(some, proxy, tmp_path, what):
    seen = {}

    def rule(path):
        seen[path] = seen.get(path, 0) + 1
        return what if seen[path] <= 2 and path.endswith(("3.png", "some")) else ""

    tiny.run(some, tmp_path / "folder")
    proxy.rule = rule
    tiny.run("s3://bucket/some", tmp_path / "store", data={"num_workers": 2})
    assert rows(tmp_path / "store") == rows(tmp_path / "folder")
    assert max(seen.values()) >= 3


def test_a_store_that_is_gone_ends_the_run_which_continues_later(some, proxy, tmp_path):
    tiny.run(some, tmp_path / "folder")
    proxy.rule = lambda path: "503" if path.endswith("12.png") else ""
    with pytest.raises(StoreError, match=r"(?s)s3://bucket/some: the store failed: 503 .*SlowDown.*the same command"):
        tiny.run("s3://bucket/some", tmp_path / "store", data={"num_workers": 2, "retry_seconds": 1})
    assert StoreError.exit_status == 4
    proxy.rule = lambda path: ""
    tiny.run("s3://bucket/some", tmp_path / "store")
    assert rows(tmp_path / "store") == rows(tmp_path / "folder")


def test_a_run_that_is_killed_is_ended_by_two_processes(photos, photos_in_store, proxy, tmp_path):
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    line = ("--model.arch", "squeezenet1_1", "--model.weights", "random", "--model.layer", "features.12")
    line += ("--model.pool", "avg", "--data.batch_size", "4", "--trainer.accelerator", "cpu")
    predict(photos, tmp_path / "folder", *line)
    proxy.delay = 0.2
    killed = launch("predict", "--data.dir", photos_in_store, "--writer.out_dir", tmp_path / "store", *line, env=env)
    while sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("store/.featx/*/*.journal")) < 4:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.kill()
    assert killed.communicate() and not (tmp_path / "store/features.12.csv").exists()
    proxy.delay = 0
    done = predict(
        photos_in_store, tmp_path / "store", *line, "--trainer.devices", 2, "--trainer.strategy", "ddp", env=env
    )
    assert "continuing" in done.stderr
    assert (tmp_path / "store/features.12.csv").read_bytes() == (tmp_path / "folder/features.12.csv").read_bytes()


def test_an_object_without_permission_is_listed_but_credentials_that_expire_are_the_stores_failure(some, proxy):
    store = find("s3://bucket/some")
    proxy.rule = lambda path: "403" if path.endswith("03.png") else ""
    found = list(store.read(range(20)))
    assert isinstance(found[3], PermissionError) and sum(isinstance(file, Exception) for file in found) == 1
    for status in ("403", "400"):
        proxy.rule = lambda path, status=status: status
        with pytest.raises(StoreError, match=f"the store failed: {status}"):
            list(store.read([3]))
    proxy.rule = lambda path: ""
    assert len(list(store.read(range(20)))) == 20


def test_a_process_that_reads_and_dies_ends_the_run(some, proxy):
    store = find("s3://bucket/some")
    proxy.rule = lambda path: "stall" if path.endswith("19.png") else ""
    files = store.read(range(20))
    next(files)
    for child in Path("/proc/thread-self/children").read_text().split():
        if b"fetcher.py" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    with pytest.raises(StoreError, match="the process that reads from the store died"):
        list(files)
    proxy.rule = lambda path: ""
    assert len(list(store.read(range(20)))) == 20


def test_an_object_that_is_gone_or_changed_since_the_listing_is_listed(some, bucket, tmp_path):
    store = find("s3://bucket/some")
    bucket.delete("bucket/some/03.png")
    bucket.put("bucket/some/04.png", (some / "05.png").read_bytes())
    found = list(store.read(range(20)))
    assert [str(found[3]), str(found[4])] == ["gone since the listing", "changed since the listing"]
    assert all(isinstance(file, io.BytesIO) for place, file in enumerate(found) if place not in (3, 4))


@pytest.fixture
def files_in_store(bucket, photos, tmp_path):
    """The photographs as a zip, as two tars, and as a table, each of them in the bucket."""
    names = list(ImageTree(str(photos)).names)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for name in names:
            file.write(photos / name, name)
    for number, some in enumerate((names[:20], names[20:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as file:
            for name in some:
                file.add(photos / name, name)
    rows = [{"path": name, "bytes": (photos / name).read_bytes()} for name in names]
    parquet.write_table(pa.table({"image": rows}), tmp_path / "all.parquet", row_group_size=7)
    for name in ("all.zip", "0.tar", "1.tar", "all.parquet"):
        bucket.put(f"bucket/files/{name}", (tmp_path / name).read_bytes())
    return names


@pytest.mark.parametrize("what", ["all.zip", "all.parquet", "*.tar", "{0..1}.tar"])
def test_archives_and_tables_are_read_by_ranges(photos, files_in_store, tmp_path, what):
    tiny.run(photos, tmp_path / "folder")
    tiny.run(f"s3://bucket/files/{what}", tmp_path / "store", data={"num_workers": 2})
    assert rows(tmp_path / "store") == rows(tmp_path / "folder")


@pytest.mark.parametrize("what", ["all.zip", "0.tar", "all.parquet"])
def test_a_single_file_is_read_over_http_and_its_url_keeps_its_secrets(photos, files_in_store, proxy, what):
    url = f"http://user:secret@{proxy.endpoint.removeprefix('http://')}/bucket/files/{what}?X-Amz-Signature=secret"
    source = find(url)
    assert source.where == f"{proxy.endpoint}/bucket/files/{what}" and "secret" not in source.path(0)
    assert next(iter(source.read([0]))).read() == (photos / source.names[0]).read_bytes()
    assert all("X-Amz-Signature=secret" in path for path in proxy.paths)


@pytest.mark.parametrize("what", ["all.zip", "0.tar", "all.parquet"])
def test_a_store_that_fails_within_a_file_ends_the_run(files_in_store, proxy, what):
    source = find(f"s3://bucket/files/{what}", retry_seconds=0)
    proxy.rule = lambda path: "503"
    with pytest.raises(StoreError, match="the store failed: 503"):
        list(source.read([len(source) - 1]))


def test_neighbours_in_an_archive_are_one_request(files_in_store, proxy):
    source = find("s3://bucket/files/0.tar")
    before = len(proxy.paths)
    assert len(list(source.read(range(20)))) == 20
    assert len(proxy.paths) - before == 2  # one says whether it is still the same


def refusal(url: str, **options: object) -> tuple[int, str]:
    """The exit status and the message with which a URL is refused."""
    with pytest.raises(UserError) as caught:
        find(url, **{"retry_seconds": 0} | options)
    return caught.value.exit_status, str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "s3://nowhere/photos",
            "there is no such bucket (404 Not Found, NoSuchBucket: The specified bucket does not exist)",
        ),
        ("s3://bucket/nothing", "no image below it"),
        ("s3://bucket/nothing.zip", "there is no such object (404 Not Found, NoSuchKey: "),
        ("s3://bucket/nothing.parquet", "there is no such object (404 Not Found, NoSuchKey: "),
        ("s3://bucket/{a,b}.tar", "nothing at s3://bucket/a.tar; s3://bucket/b.tar"),
        ("s3:/bucket/photos", "no such folder. Did you mean s3://bucket/photos?"),
        ("s3://", "expected a folder, or the URL of a bucket, such as s3://bucket/photos"),
        ("ftp://bucket/photos", "expected a folder, or the URL of a bucket, such as s3://bucket/photos"),
        ("http://host/photos", "over HTTP images cannot be listed"),
    ],
)
def test_a_url_without_images_is_refused(bucket, url, words):
    status, message = refusal(url)
    assert status == 2 and message.startswith(f"--data.dir {url}: {words}")


@pytest.mark.parametrize(
    ("key", "secret", "words"),
    [
        ("reader", "reader", "no permission (403 Forbidden, AccessDenied: Access Denied)"),
        ("lister", "lister", "no permission to read ants/image-00.jpg, although it may be listed"),
        ("reader", "wrong", "these credentials are not valid (403 Forbidden, SignatureDoesNotMatch: The request"),
        ("nobody", "wrong", "these credentials are not valid (403 Forbidden, InvalidAccessKeyId: The access key"),
    ],
)
def test_without_permission_a_url_is_refused(photos_in_store, monkeypatch, key, secret, words):
    monkeypatch.delenv("AWS_SKIP_SIGNATURE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    status, message = refusal(photos_in_store)
    assert status == 2 and message.startswith(f"--data.dir {photos_in_store}: {words}")


def test_without_credentials_a_url_is_refused_at_once(bucket, monkeypatch):
    for name in ("SKIP_SIGNATURE", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}")
    status, message = refusal("s3://bucket/photos", retry_seconds=300)
    assert status == 2 and message.startswith(
        "--data.dir s3://bucket/photos: no permission (no credentials).\nSet AWS_"
    )


def test_images_in_a_store_have_no_columns(some):
    assert "has images, which have no columns" in refusal("s3://bucket/some", column="jpg")[1]


def test_markers_of_folders_are_no_images(some, bucket):
    for name in ("some/", "some/empty/"):
        bucket.put(f"bucket/{name}")
    store = find("s3://bucket/some")
    assert len(store) == 20 and all(name.endswith(".png") for name in store.names)


def test_a_key_that_obstore_cannot_read_is_named():
    trouble = explain(type("InvalidPathError", (Exception,), {})("invalid path: photos/a//b.jpg\n\nDebug source: x"))
    assert "a//b.jpg" in str(_refused("s3://bucket/photos", trouble)) and not trouble.may_pass


def test_a_store_that_is_not_there_is_a_failure(proxy):
    proxy.close()
    status, message = refusal("s3://bucket/photos")
    assert status == 4 and message.startswith("--data.dir s3://bucket/photos: the store failed: Connection refused\n")


def test_without_obstore_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("featx.data.sources.store.find_spec", lambda name: None)
    assert refusal("s3://bucket/photos")[1].endswith("obstore is not installed: pip install 'featx[remote]'")


def test_rows_are_not_written_to_a_store(photos):
    with pytest.raises(UserError, match=r"^--writer.out_dir s3://bucket/rows: expected a folder on a local"):
        tiny.run(photos, "s3://bucket/rows")


def test_what_gives_access_is_never_shown():
    assert shown("https://user:p@w@host/a.tar?X-Amz-Signature=abc#x") == "https://host/a.tar"
    assert without_secrets("GET https://a.blob.core.windows.net/c?sv=1&sig=abc failed: x") == (
        "GET https://a.blob.core.windows.net/c failed: x"
    )
