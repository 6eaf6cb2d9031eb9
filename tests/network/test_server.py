"""A server under attack over plain sockets: every request that is not granted has its status, and the run is unmoved."""

import json
import pickle
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

import polyfed as pf
from polyfed.core import wire
from polyfed.core.message import Message
from polyfed.network.client import Link
from polyfed.network.forms import Start
from polyfed.network.limits import NetworkLimits
from polyfed.run.client import first_env
from polyfed.run.join import introduction, prepared_site
from polyfed.run.serve import Server

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
import network_sites as sites
from test_serve_join import Thread

SECONDS = 60
HONEST = ("c0", "c1", "c2")
NAMES = (*HONEST, "mallory")
#: Short enough for a test; whoever is honest sends everything at once.
QUICK = NetworkLimits(progress_seconds=0.3, idle_seconds=0.6, linger_seconds=0.1)


class Mallory:
    """A client with a token of her own and a socket."""

    def __init__(self, server, name="mallory"):
        self.server, self.name = server, name
        self.link = Link(server.url)
        client = sites.client("numpy", name)
        raw = client.read()
        self.link.enrol(introduction(client, raw.target, "0" * 64))
        manifest = None
        while manifest is None:
            manifest = self.link.manifest()
        site = prepared_site(client, raw, manifest, pf.FedAvg(), self.link)
        self.first = site.model.first(site.train, first_env(site, manifest.seed))
        self.link.ready(self.first.spec.digest)

    def offers(self):
        """Tasks until the run has ended; the caller answers each."""
        while True:
            offer = self.link.next()
            if offer is None:
                continue
            if offer.task is None:
                self.link.start(Start(self.first, self.first.spec).message)
            elif offer.task["kind"] == "finish":
                self.link.leave()
                self.link.close()
                return
            else:
                task = offer.task
                yield offer, f"{task['collection']}.{task['position']}.{task['attempt']}"

    def put(self, path, body, length=None, **headers):
        return self.send("PUT", path, body, length, **headers)

    def send(self, method, path, body=b"", length=None, authorization=None, **headers):
        said = {
            "Host": "127.0.0.1:1",
            "Authorization": f"Bearer {self.link._token}" if authorization is None else authorization,
            "Content-Length": str(len(body) if length is None else length),
        } | {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in said.items() if v is not None)
        return raw(self.server.url, head.encode() + b"\r\n" + body)


def raw(url, data, close=False):
    """Status and error of the answer to these bytes; (0, "") if the connection is closed without one."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as link:
        try:
            link.sendall(data)
            if close:
                link.shutdown(socket.SHUT_WR)
            return answer(link)
        except (BrokenPipeError, ConnectionResetError):
            return 0, ""


def answer(link):
    found = b""
    while b"\r\n\r\n" not in found:
        more = link.recv(65536)
        if not more:
            return 0, ""
        found += more
    head, _, body = found.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
    while len(body) < length and (more := link.recv(65536)):
        body += more
    status = int(lines[0].split()[1])
    return status, body.decode(errors="replace")


def update(value, shape=None):
    """An upload as FedAvg expects it, filled with one value."""
    weight = np.full((4, 3) if shape is None else shape, value, np.float32)
    tree = pf.Tree({"weight": weight, "bias": np.full(3, value, np.float32)})
    return wire.to_bytes(Message({"params": tree}, {"num_examples": 30.0, "steps": 1.0}))


def huge_header(count):
    """The first bytes of a message that declares `count` arrays."""
    entries = "".join(
        f',"t/{i}":{{"dtype":"F32","shape":[],"data_offsets":[{4 * i},{4 * i + 4}]}}' for i in range(count)
    )
    text = '{"__metadata__":{"polyfed":"1","trees":"t","crc32":"' + "0" * 16 + '"}' + entries + "}"
    text += " " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text.encode()


def transport_attacks(mallory, receipt):
    """(what, status, words) of requests that are refused before they reach the engine."""
    path, good = f"/upload/{receipt}", update(0.5)
    yield "no body at all", mallory.put(path, b""), 400, "no message"
    yield "no length", mallory.put(path, b"", Content_Length=None), 411, "Content-Length"
    yield "length that is no number", mallory.put(path, good, length="+5"), 400, ""
    yield "a terabyte, refused before the body", mallory.put(path, b"", length=10**12), 413, "at most"
    yield "a length of 19 digits", mallory.put(path, b"", length=10**18), 411, "Content-Length"
    yield "two lengths", mallory.put(path, good, content_length="3"), 400, ""
    yield "chunks", mallory.put(path, b"0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"), 411, "encoding"
    yield "gzip", mallory.put(path, good, Content_Encoding="gzip"), 411, "encoding"
    yield "a body that trickles", mallory.put(path, good[:64], length=len(good)), 408, "too slowly"
    yield "pickle", mallory.put(path, pickle.dumps({"params": [1.0] * 40})), 400, "pickle"
    yield "zip", mallory.put(path, b"PK\x03\x04" + bytes(200)), 400, "zip"
    yield "random bytes", mallory.put(path, bytes(range(256))), 400, ""
    yield "trailing bytes", mallory.put(path, good + b"\0" * 8), 400, "the header declares"
    yield "a flipped bit", mallory.put(path, good[:-1] + bytes([good[-1] ^ 1])), 400, "crc32"
    yield "a million arrays", mallory.put(path, huge_header(1_000)[:8] + b" " * 56, length=10**6), 413, "at most"
    yield "a header of 2^60 bytes", mallory.put(path, (2**60 + 56).to_bytes(8, "little") + bytes(120)), 400, "header"
    yield "somebody else's receipt", mallory.put(_other(receipt), good), 404, "no such task for this client"
    yield "a receipt of no task", mallory.put("/upload/99.0.0", good), 404, "no such task for this client"
    yield "a receipt that is a path", mallory.put("/upload/..%2f..%2fetc", good), 404, "no such request"
    yield (
        "somebody else's verdict",
        mallory.send("GET", _other(receipt).replace("upload", "receipt")),
        404,
        "no such task",
    )
    yield "a wrong token", mallory.put(path, good, authorization="Bearer " + "0" * 64), 401, "enrol first"
    yield "no token", mallory.put(path, good, authorization=""), 401, "enrol first"
    yield "another scheme", mallory.put(path, good, authorization="Basic bWFsbG9yeQ=="), 401, "enrol first"
    yield "a name for a token", mallory.put(path, good, authorization="Bearer c0"), 401, "enrol first"
    yield "an unknown path", mallory.send("GET", "/admin"), 404, "no such request"
    yield "an unknown method", mallory.send("DELETE", path), 404, "no such request"
    yield "a blob outside", mallory.send("GET", "/blob/../../../etc/passwd"), 404, "no such request"
    yield "a blob outside, escaped", mallory.send("GET", "/blob/%2e%2e%2fetc%2fpasswd"), 404, "no such request"
    yield "a blob of nobody", mallory.send("GET", "/blob/" + "0" * 64), 404, "no such blob"
    yield "another host's name", mallory.send("GET", "/next", Host="evil.example:80"), 421, "answers to"
    yield "a wait of ever", mallory.send("GET", "/next?wait=1e9"), 400, "number of seconds"


def form_attacks(mallory):
    leave = lambda body, kind="application/json": mallory.send("POST", "/leave", body, Content_Type=kind)  # noqa: E731
    yield "no JSON", leave(b"{]"), 400, "not JSON"
    yield "depth", leave(b"[" * 100_000), 400, "not JSON"
    yield "NaN", leave(b'{"reason": NaN}'), 400, "no number"
    yield "a field twice", leave(b'{"reason": "", "reason": ""}'), 400, "twice"
    yield "an unknown field", leave(b'{"reason": "", "__class__": "os.system"}'), 400, "has no field"
    yield "no UTF-8", leave(b'{"reason": "\xff"}'), 400, "not JSON"
    yield "a wrong type", leave(b'{"reason": {"a": 1}}'), 400, "expected a text"
    yield "a control character", leave(b'{"reason": "\\u202e"}'), 400, "cannot be printed"
    yield "too long", leave(b'{"reason": "' + b"a" * 10**6 + b'"}'), 413, "at most"
    yield "a browser's form", leave(b'{"reason": ""}', "text/plain"), 415, "application/json"
    stolen = {"name": "c0", "ticket": "1" * 64, "kind": "Softmax", "offers": [], "settings": {}, "target": "number"}
    body = json.dumps(
        {**stolen, "shape": [], "values": [0, 1, 2], "frozen": [], "joins_at": 1, "away": [], "columns": ["", ""]}
    ).encode()
    enrol = lambda body: mallory.send("POST", "/enrol", body, Content_Type="application/json")  # noqa: E731
    yield "another's name", enrol(body), 409, "enrolled already"
    yield "an unexpected name", enrol(body.replace(b'"c0"', b'"c9"')), 403, "not expected"
    yield "a name with a path", enrol(body.replace(b'"c0"', b'"../c0"')), 400, "ASCII"
    yield "a first state too many", mallory.put("/start", update(0.1)), 204, ""


def _other(receipt):
    collection, _, attempt = receipt.split(".")
    return f"/upload/{collection}.0.{attempt}"


def connection_attacks(url):
    """Bytes that are hardly HTTP; each is closed or refused."""
    yield "a million header fields", raw(url, b"GET /next HTTP/1.1\r\n" + b"A: b\r\n" * 1_000_000)
    yield "one endless field", raw(url, b"GET /next HTTP/1.1\r\nA: " + b"b" * 1_000_000)
    yield "an endless path", raw(url, b"GET /" + b"b" * 1_000_000)
    yield "no HTTP", raw(url, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300))
    yield "a head that never ends", raw(url, b"GET /next HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    yield "silence", raw(url, b"")


@pytest.fixture(scope="module")
def attacked():
    """A whole run in which one client of four attacks: its result, what was refused, and the server's own numbers."""
    with Server(pf.FedAvg(), clients=NAMES, rounds=3, seed=1, limits=QUICK) as server:
        threads = {name: Thread(server.url, sites.client("numpy", name)) for name in HONEST}
        mallory, said, verdicts = Mallory(server), [], []
        answers = iter([update(np.nan), update(0.5, (3, 4)), update(1e30)])
        for offer, receipt in mallory.offers():
            path = f"/upload/{receipt}"
            if offer.task["kind"] == "evaluate":
                verdicts.append(
                    mallory.put(path, update(0.5)) if offer.task["round_num"] == 1 else evaluation(mallory, path)
                )
                continue
            if offer.task["round_num"] == 1:
                said = [*transport_attacks(mallory, receipt), *form_attacks(mallory)]
                said += [(what, found, None, "") for what, found in connection_attacks(server.url)]
            body = next(answers)
            verdicts += [mallory.put(path, body), mallory.put(path, update(0.5))]
        outcomes = {name: thread.outcome() for name, thread in threads.items()}
        return server.result(SECONDS), outcomes, said, verdicts, server._work.server


def evaluation(mallory, path):
    return mallory.put(path, wire.to_bytes(Message(numbers={"num_examples": -1.0})))


def test_run_when_one_client_attacks_ends_with_the_bits_that_it_has_without_her_updates(attacked):
    result, outcomes, *_ = attacked
    simulation = pf.simulate(pf.FedAvg(), sites.clients("numpy", NAMES), rounds=3, seed=1, baselines=())
    assert simulation.errors.keys() == {"mallory"}
    assert result.state.digest == simulation.state.digest
    assert {n: o.memory.digest for n, o in outcomes.items()} == {n: simulation.memories[n].digest for n in HONEST}
    assert result.test == {name: simulation.test[name] for name in HONEST}
    assert [log.accepted for log in result.history] == [HONEST] * 3


def test_requests_that_are_not_granted_have_a_status_and_a_sentence_without_a_trace(attacked):
    _, _, said, _, _ = attacked
    assert len(said) > 45
    for what, (status, body), wanted, words in said:
        assert status == wanted if wanted is not None else status in (0, 400), (what, status, body)
        assert words in body, (what, body)
        assert len(body) < 1500, what
        assert "Traceback" not in body, what
        assert ".py" not in body, what
    assert 500 not in attacked[0].denials


def test_updates_that_are_no_updates_are_refused_by_name_and_a_second_upload_changes_nothing(attacked):
    _, _, _, verdicts, _ = attacked
    words = [json.loads(body)["verdict"] for status, body in verdicts]
    assert [status for status, _ in verdicts] == [200] * len(verdicts)
    nan, nan_again, evaluated, shape, shape_again, _, large, large_again, *_ = words
    assert "params" in nan
    assert "nan" in nan
    assert nan_again == nan  # the same receipt: what was said before, whatever the new body
    assert "not expected" in evaluated
    assert "weight" in shape
    assert shape_again == shape
    assert "every value is finite and at most" in large
    assert large_again == large


def test_room_for_bodies_when_everything_is_over_is_given_back_and_was_never_large(attacked):
    *_, server = attacked
    assert server.inbox.num_bytes == 0
    assert 0 < server.inbox.peak < 1 << 20


def test_upload_when_the_round_is_over_is_told_so_and_changes_nothing():
    schedule = pf.Sync(goal=1)
    with Server(
        pf.FedAvg(), clients=["c0", "mallory"], rounds=1, schedule=schedule, evaluate_every=0, test=False
    ) as server:
        thread = Thread(server.url, sites.client("numpy", "c0"))
        mallory = Mallory(server)
        link, offer = mallory.link, None
        while offer is None:
            offer = link.next()
        thread.outcome()
        receipt = "1.1.0"
        assert link.upload(receipt, wire.decode(update(0.5))).startswith("late")
        assert link.receipt(receipt).startswith("late")
        link.leave()
        link.close()
        result = server.result(SECONDS)
    assert result.history[0].accepted == ("c0",)


def test_uploads_when_a_client_has_one_under_way_are_told_to_come_again():
    limits = NetworkLimits(progress_seconds=5.0, linger_seconds=0.1, retry_seconds=0.25)
    with Server(pf.FedAvg(), clients=["mallory"], rounds=1, evaluate_every=0, test=False, limits=limits) as server:
        mallory = Mallory(server)
        _, receipt = next(mallory.offers())
        path, body = f"/upload/{receipt}", update(0.5)
        head = f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {mallory.link._token}\r\n"
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as slow:
            slow.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            assert b"100" in slow.recv(100)  # the server has begun to read it
            slow.sendall(body[:8])
            found = mallory.put(path, body)
        assert found[0] == 503
        mallory.link.upload(receipt, wire.decode(body))
        mallory.link.leave()
        mallory.link.close()
        assert server.result(SECONDS).version == 1


def test_blob_when_asked_for_in_ranges_is_the_same_bytes():
    with Server(pf.FedAvg(), clients=["mallory"], rounds=1, evaluate_every=0, test=False) as server:
        mallory = Mallory(server)
        offer, receipt = next(mallory.offers())
        message = mallory.link.message(offer.digest, offer.size)
        assert mallory.link.blob(offer.digest).digest == message.digest
        for asked, status in [
            ("bytes=8-", 206),
            ("bytes=0-3", 206),
            ("bytes=9999999-", 416),
            ("bytes=5-2", 416),
            ("rows=1", 416),
        ]:
            assert mallory.send("GET", f"/blob/{offer.digest}", Range=asked)[0] == status
        mallory.link.failed(receipt, "enough")
        with pytest.raises(pf.errors.RunError, match="no quorum"):
            for _, again in mallory.offers():
                mallory.link.failed(again, "enough")
            server.result(SECONDS)


def test_connections_beyond_the_limit_are_closed_and_the_others_go_on():
    limits = NetworkLimits(connections=3)
    with Server(pf.FedAvg(), clients=["c0"], rounds=1, limits=limits) as server:
        parts = urlsplit(server.url)
        held = [socket.create_connection((parts.hostname, parts.port), timeout=10) for _ in range(2)]
        thread = Thread(server.url, sites.client("numpy", "c0"))
        thread.outcome()
        [link.close() for link in held]
        assert server.result(SECONDS).version == 1


def test_token_when_the_client_enrols_again_is_a_new_one_and_the_old_one_is_void():
    with Server(pf.FedAvg(), clients=["c0", "c1"], rounds=1) as server:
        client = sites.client("numpy", "c0")
        old, new = Link(server.url), Link(server.url)
        said = introduction(client, client.read().target, "0" * 64)
        old.enrol(said)
        new.enrol(said)
        for link, status in ((old, 401), (new, 204)):
            head = f"GET /next HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {link._token}\r\n\r\n"
            assert raw(server.url, head.encode())[0] == status
            link.close()
