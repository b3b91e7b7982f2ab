"""What each key may do, tried against the server that the manifests start, with the arguments that they give it."""

from __future__ import annotations

import fnmatch
import json
import re
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from minio.commonconfig import CopySource
from minio.error import S3Error

from esvit_core.config import Config
from esvit_core.config.cluster_settings import Role as Kind
from esvit_core.errors import UserError
from esvit_core.evaluation.import_backbone import import_backbone
from esvit_core.models.factory import create_backbone
from esvit_core.retraining.find_new_data import find_new
from esvit_core.retraining.prepare_new_data import prepare_new
from esvit_core.runs.run import MEASURED, open_run
from esvit_core.storage import ObjectStore, StoreAddress, StoreError, StoreRefused, weed
from esvit_core.storage.keys import new_keys, secret_manifests, secret_values
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.roles import ADMIN, ROLES, may_write, policy
from esvit_core.weights.backbone import save_backbone

Object = dict[str, Any]
# An object of each kind that a run has (`test_every_object_of_a_real_run_has_one_writer` holds the table to a real one).
OBJECTS = (
    "runs/a/config.yaml",
    "runs/a/data/shards/train-00000.tar",
    "runs/a/transfer/digits/manifest.json",
    "runs/a/training/checkpoints/00000010/manifest.json",
    "runs/a/training/latest",
    "runs/a/events/20261125T000000-started.json",
    "runs/a/events/20261125T000001-evaluated.json",
    "runs/a/baseline/manifest.json",
    "runs/a/backbone/manifest.json",
    "runs/a/features/trained-train.safetensors",
    "features/0a1b.json",
    "runs/a/evaluation/knn.json",
    "runs/a/visualization/manifest.json",
    "runs/a/report/index.html",
    "runs/a/promotion.json",
    "runs/a/measured.json",
    "runs/a/runtime",
    "runs/a/auto.json",
    "runs/a/retrain.json",
    "runs/a/retrain/images.jsonl.gz",
    "runs/a/comparison/b.json",
    "leases/champion",
    "pointers/champion",
    "elsewhere",
)


class Server:
    """The server, and clients with the keys of the roles."""

    def __init__(self, ports: weed.Ports, metrics: int, values: dict[str, dict[str, str]]) -> None:
        self.port, self.grpc, self.metrics, self.values = ports.s3, ports.s3_grpc, metrics, values

    def client(self, role: str) -> ObjectStore:
        environment = self.values[role] | {"ESVIT_S3_ENDPOINT": f"http://127.0.0.1:{self.port}"}
        return ObjectStore(StoreAddress.from_env(environment), RetryPolicy(attempts=1))


@pytest.fixture(scope="module")
def server(rendered: dict[str, list[Object]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    (pod,) = [t["spec"]["template"]["spec"] for t in rendered["onprem"] if t["kind"] == "StatefulSet"]
    (container,) = pod["containers"]
    folder = tmp_path_factory.mktemp("store")
    (folder / "data").mkdir()
    ports = weed.free_ports()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = free.getsockname()[1]
    values = secret_values(new_keys(), "http://esvit-object-store:8333", "esvit", ["photos"], folder)
    for name, text in values["server"].items():
        weed.write_private(folder / name, text)
    places = {"/etc/seaweedfs": str(folder), "-dir=/data": f"-dir={folder / 'data'}", "0.0.0.0": "127.0.0.1"}
    arguments = list(container["args"])
    for old, new in places.items():
        arguments = [argument.replace(old, new) for argument in arguments]
    arguments += [f"-metricsPort={metrics}"]
    for role in ("s3", "master", "volume", "filer"):
        arguments += [f"-{role}.port={getattr(ports, role)}", f"-{role}.port.grpc={getattr(ports, f'{role}_grpc')}"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [weed.binary(), *arguments], cwd=folder, env=weed.environment(folder), stdout=log, stderr=log
    )
    try:
        made = Server(ports, metrics, values)
        probe = container["readinessProbe"]["httpGet"]["path"]
        _wait_until(lambda: _status(f"http://127.0.0.1:{ports.s3}{probe}") == 200, process, folder / "log")
        admin = made.client(ADMIN)
        _wait_until(lambda: _makes_buckets(admin), process, folder / "log")
        yield made
    finally:
        process.kill()
        process.wait()
        log.close()
        for path in weed.sockets(ports):
            path.unlink(missing_ok=True)


def _makes_buckets(admin: ObjectStore) -> bool:
    try:
        for bucket in ("esvit", "photos", "others"):
            admin.ensure_bucket(bucket)
    except StoreError:
        return False
    return True


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.1)


def test_a_role_writes_what_the_table_says_and_nothing_else(server: Server) -> None:
    admin = server.client(ADMIN)
    for key in OBJECTS:
        admin.put_bytes(f"s3://esvit/{key}", b"before")
    for role in ROLES:
        client = server.client(role)
        allowed = set()
        for key in OBJECTS:
            try:
                client.put_bytes(f"s3://esvit/{key}", b"after")
                allowed.add(key)
            except StoreRefused:
                assert client.get_bytes(f"s3://esvit/{key}") in (b"before", b"after")  # all of them may read it
        # SeaweedFS cannot let a key delete what it may not write.
        deletes = {k for k in OBJECTS for pattern in ROLES[role].deletes if fnmatch.fnmatchcase(k, pattern)}
        assert allowed == {key for key in OBJECTS if may_write(role, key)} | deletes, role


def test_the_boundaries_that_matter() -> None:
    """In words, so that a change of the table that breaks one does not pass as a change of the table."""
    assert not may_write("prepare", "runs/a/training/checkpoints/00000010/manifest.json")
    assert not may_write("evaluate", "runs/a/data/shards/train-00000.tar")
    assert not may_write("evaluate", "runs/a/backbone/manifest.json")
    assert [role for role in ROLES if may_write(role, "pointers/champion")] == ["publish"]
    assert [role for role in ROLES if may_write(role, "leases/champion")] == ["prepare"]
    assert [role for role in ROLES if may_write(role, "runs/a/config.yaml")] == ["prepare", "publish"]
    assert not any(may_write("read", key) for key in OBJECTS)


def test_no_other_request_leads_around_the_boundary(server: Server, tmp_path: Path) -> None:
    admin, prepare = server.client(ADMIN), server.client("prepare")
    target, own = "runs/b/training/latest", "runs/b/data/x"
    admin.put_bytes(f"s3://esvit/{target}", b"before")
    admin.put_bytes("s3://others/secret", b"secret")
    prepare.put_bytes(f"s3://esvit/{own}", b"own")
    large = tmp_path / "large"
    large.write_bytes(b"0" * 17_000_000)
    client = prepare.connection.client
    attempts: dict[str, Callable[[], object]] = {
        "delete": lambda: client.remove_object("esvit", target),
        "bulk delete": lambda: client.remove_all("esvit", [target]),
        "in several parts": lambda: prepare.put_file(f"s3://esvit/{target}", large),
        "copy onto": lambda: client.copy_object("esvit", target, CopySource("esvit", own)),
        "copy from elsewhere": lambda: client.copy_object("esvit", own, CopySource("others", "secret")),
        "conditional": lambda: prepare.put_if_absent("s3://esvit/pointers/new", b"1"),
        "by way of a parent": lambda: client.put("esvit", "runs/b/data/../training/latest", b"after", {}),
        "percent-encoded": lambda: client.put("esvit", "runs/b/data/%2e%2e/training/latest", b"after", {}),
        "another bucket": lambda: prepare.put_bytes("s3://photos/x", b"1"),
        "list another bucket": lambda: list(prepare.list("s3://others")),
        "make a bucket": lambda: prepare.ensure_bucket("surely-not"),
        "remove the bucket": lambda: client.remove_bucket("esvit"),
        "open the bucket": lambda: client.set_bucket_policy("esvit", "{}"),
    }
    done = []
    for what, attempt in attempts.items():
        try:
            attempt()
            done.append(what)
        except (StoreRefused, StoreError, S3Error):
            pass
    assert set(done) <= {"percent-encoded"}  # to this server a name like any other, of an object of its own
    assert admin.get_bytes(f"s3://esvit/{target}") == b"before"
    assert prepare.get_bytes(f"s3://esvit/{own}") == b"own"


def test_what_the_steps_need_works_with_their_keys(server: Server, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"0" * 17_000_000)
    prepare, train, publish = (server.client(role) for role in ("prepare", "train", "publish"))
    prepare.check()
    prepare.ensure_bucket("esvit")  # it exists, so that there is nothing to make
    prepare.put_file("s3://esvit/runs/c/data/large", large)
    assert list(prepare.list("s3://photos")) == []
    train.put_bytes("s3://esvit/runs/c/training/checkpoints/00000001/x", b"1")
    assert train.remove_prefix("s3://esvit/runs/c/training/checkpoints/00000001") == 1
    assert train.swap_pointer("s3://esvit/runs/c/training/latest", {"step": 1}, None)
    assert publish.swap_pointer("s3://esvit/pointers/c", {"run": "c"}, None)
    prune = server.client("prune")
    assert prune.read_pointer("s3://esvit/pointers/c") is not None
    assert prune.remove_prefix("s3://esvit/runs/c") == 2
    with pytest.raises(StoreRefused):
        prune.remove("s3://esvit/pointers/c")


def test_nothing_but_s3_opens_without_a_key(server: Server) -> None:
    assert _status(f"http://127.0.0.1:{server.port}/esvit/runs/a/config.yaml") == 403
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    # What the alerts on the store's room look at.
    assert {"all", "avail"} <= set(re.findall(r'^SeaweedFS_volumeServer_resource\{.*type="(\w+)"', text, re.MULTILINE))


def test_the_grpc_door_asks_for_a_certificate(server: Server) -> None:
    """S3's own gRPC opens wherever S3 does, and whoever is let in there could give himself every right."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    trusting.set_alpn_protocols(["h2"])
    with (
        pytest.raises((ssl.SSLError, ConnectionError)),
        socket.create_connection(("127.0.0.1", server.grpc), timeout=10) as plain,
        trusting.wrap_socket(plain) as connection,
    ):
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        assert connection.recv(100)  # TLS 1.3 tells of the missing certificate with the first answer
        connection.recv(100)


def test_every_object_of_a_real_run_has_one_writer(finished_run: Any, finished_store: Any) -> None:
    """Beside `publish`, which also begins the runs that measure."""
    store = ObjectStore(finished_store.start())
    found = [stat.uri.removeprefix("s3://esvit/") for stat in store.list("s3://esvit")]
    makers = ("prepare", "train", "evaluate")
    writers = {
        key: [r for r in makers if may_write(r, key)] or ["publish"] * may_write("publish", key) for key in found
    }
    assert len(found) > 20
    assert {key: roles for key, roles in writers.items() if len(roles) != 1} == {}


def test_a_backbone_is_taken_to_be_measured_with_the_key_of_that_step(
    server: Server, micro_recipe: Path, images: Any, tmp_path: Path
) -> None:
    config = Config.load(micro_recipe, ["bucket=esvit"])
    network = create_backbone(config.model, config.augment.global_crops.size, drop_path=0.0)
    save_backbone(server.client("train"), "s3://esvit/runs/t/backbone", network, config, {"run": "t", "step": 8})
    folder = images.folder(tmp_path / "images", ["a", "b"], 6)
    run = import_backbone("s3://esvit/runs/t/backbone", str(folder), config, store=server.client("publish"))
    assert run.store.exists(run.at(MEASURED))


def test_a_retraining_is_found_claimed_and_prepared_with_the_key_of_those_steps(
    server: Server, micro_recipe: Path, images: Any, tmp_path: Path
) -> None:
    config = Config.load(micro_recipe, ["bucket=esvit", "retrain.min_new_images=1", "promotion.pointer=roles"])
    source, store = tmp_path / "images", server.client("prepare")
    for each in (6, 7):
        images.folder(source, ["a", "b"], each)
        found = find_new(config, str(source), "me", store)
        assert not found.nothing and prepare_new(open_run(found.run, store)).samples == 2 * each
        server.client("publish").put_json(f"{found.run}/promotion.json", {"promoted": False})


def test_the_steps_take_the_secrets_that_are_made_without_further_settings() -> None:
    cluster = Config.load("demo").cluster
    made = {
        thing["metadata"]["name"]
        for thing in yaml.safe_load_all(
            secret_manifests(secret_values(new_keys(), "http://store:8333", "esvit"), "esvit")
        )
    }
    assert {cluster.secret_of(kind) for kind in get_args(Kind)} <= made
    one = Config.load("demo", ["cluster.secret=one", "cluster.train.secret=own"]).cluster
    assert [one.secret_of(kind) for kind in get_args(Kind)] == ["one", "own", "one", "one"]


def test_the_secrets_have_a_key_of_its_own_for_every_role() -> None:
    values = secret_values(new_keys(), "http://store:8333", "esvit")
    objects = list(yaml.safe_load_all(secret_manifests(values, "vision")))
    assert {thing["metadata"]["name"] for thing in objects} == {
        f"esvit-object-store-{name}" for name in (ADMIN, *ROLES, "server")
    }
    assert {thing["metadata"]["namespace"] for thing in objects} == {"vision"}
    keys = {values[role]["ESVIT_S3_SECRET_KEY"] for role in (ADMIN, *ROLES)}
    assert len(keys) == len(ROLES) + 1
    for role in ROLES:
        assert StoreAddress.from_env(values[role]).endpoint == "store:8333"
        assert values[role]["ESVIT_S3_ACCESS_KEY"] in values["server"]["identities.json"]


@pytest.mark.parametrize("bucket", ["*", "esvit/runs", "E", ""])
def test_a_bucket_that_means_more_than_it_says_is_refused(bucket: str) -> None:
    with pytest.raises(UserError, match="bucket"):
        secret_values(new_keys(), "http://store:8333", bucket)


def test_policies_for_other_servers_say_the_same() -> None:
    for role, entry in ROLES.items():
        statements = policy(role, "esvit", ["photos"])["Statement"]
        writes = [r for s in statements if "s3:PutObject" in s["Action"] for r in s["Resource"]]
        assert writes == [f"arn:aws:s3:::esvit/{pattern}" for pattern in entry.writes]
        removes = [r for s in statements if "s3:DeleteObject" in s["Action"] for r in s["Resource"]]
        assert removes == [f"arn:aws:s3:::esvit/{pattern}" for pattern in (*entry.writes, *entry.deletes)]
        reads = [r for s in statements if "s3:GetObject" in s["Action"] for r in s["Resource"]]
        assert reads == ["arn:aws:s3:::esvit/*", "arn:aws:s3:::photos/*"]


def test_an_account_that_several_steps_share_may_do_what_each_may(esvit: Callable[..., Any]) -> None:
    roles = ("prepare", "evaluate", "publish")
    done = esvit("store", "policies", *roles, "--bucket", "runs", "--source", "photos")
    assert done.returncode == 0, done.stderr
    statements = json.loads(done.stdout)["Statement"]
    each = [one for role in roles for one in policy(role, "runs", ["photos"])["Statement"]]
    assert all(one in statements for one in each) and all(one in each for one in statements)
    assert len(statements) == len({json.dumps(one, sort_keys=True) for one in statements}) < len(each)
    wrong = esvit("store", "policies", "prepare", "all")
    assert wrong.returncode == 2 and "role all: expected one of prepare, train" in wrong.stderr
