import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from polyfed.core import wire
from polyfed.core.errors import LimitError, MalformedError, RunError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Tree
from polyfed.network.bodies import Blob, Inbox
from polyfed.network.client import Link
from polyfed.network.forms import DeniedError, Enrolment, Offer, parse, printable, task_of, write
from polyfed.network.identity import Identities
from polyfed.network.limits import NetworkLimits

SAID = {
    "kind": "Softmax",
    "offers": ("params",),
    "settings": {"lr": 0.1},
    "target": "number",
    "shape": (),
    "values": (0, 1),
}


def enrolment(name="c0", ticket="0" * 64, **more):
    return Enrolment(**{"name": name, "ticket": ticket, **SAID, **more})


def test_client_when_imported_brings_the_standard_library_alone():
    code = "import sys, polyfed.network.client; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("aiohttp", "torch", "sklearn", "keras", "pandas", "pickle5"):
        assert f"'{name}'" not in found
    code = "import sys, polyfed.run.join; print('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1:1", "http://example.org:80", "http://127.0.0.1", "http://u@127.0.0.1:1", "http://127.0.0.1:1/x", "http://127.0.0.1:99999", "file:///etc"],
)  # fmt: skip
def test_address_when_it_is_not_this_machine_over_http_is_refused(url):
    with pytest.raises(UsageError, match=r"is not this machine|is no address"):
        Link(url)


class Response:
    """As `HTTPResponse`, from pieces; a piece that is None is a link that was cut."""

    def __init__(self, status, length, *pieces, **headers):
        self.status, self.length, self.pieces, self.headers = status, length, list(pieces), headers
        self.will_close, self.reason = False, "reason"

    def readinto(self, view):
        piece = self.pieces.pop(0) if self.pieces else b""
        if piece is None:
            raise ConnectionResetError("cut")
        view[: len(piece)] = piece
        return len(piece)

    def read(self, count=-1):
        return b"".join(self.pieces)

    def getheader(self, name, default=None):
        return self.headers.get(name.replace("-", "_"), default)


class Script(Link):
    """A link whose answers are written down; `asked` keeps what was sent."""

    def __init__(self, *responses, **options):
        super().__init__("http://127.0.0.1:1", pause=self.waited, clock=lambda: 0.0, **options)
        self.responses, self.asked, self.pauses = list(responses), [], []

    def waited(self, seconds):
        self.pauses.append(seconds)

    def _once(self, method, path, pieces, headers, read):
        self.asked.append((method, path, headers))
        response = self.responses.pop(0)
        if isinstance(response, Exception):
            raise response
        return self._answer(response, read)


MESSAGE = Message({"params": Tree({"w": [1.0, 2.0, 3.0]})}, {"num_examples": 3.0})
DATA = wire.to_bytes(MESSAGE)
DIGEST = Blob.of(MESSAGE).digest


def test_blob_when_the_link_is_cut_is_taken_up_where_it_broke_off():
    first = Response(200, len(DATA), DATA[:50], None)
    rest = Response(206, len(DATA) - 50, DATA[50:90], DATA[90:])
    link = Script(first, rest)
    assert link.message(DIGEST, len(DATA)).digest == MESSAGE.digest
    assert [headers for _, _, headers in link.asked] == [{}, {"Range": "bytes=50-"}]


def test_blob_when_its_bytes_are_others_is_no_message():
    with pytest.raises(MalformedError, match="do not have the digest"):
        Script(Response(200, len(DATA), DATA)).message("0" * 64, len(DATA))


def test_blob_when_it_is_larger_than_the_site_allows_is_refused_before_it_is_asked_for():
    link = Script()
    with pytest.raises(LimitError, match="at most"):
        link.message(DIGEST, 1 << 40)
    assert link.asked == []


def test_blob_when_another_length_comes_than_was_announced_is_refused():
    with pytest.raises(MalformedError, match="were announced"):
        Script(Response(200, len(DATA) + 1, DATA)).message(DIGEST, len(DATA))


def test_blob_when_its_body_just_ends_is_asked_for_again():
    link = Script(Response(200, len(DATA), DATA[:50]), Response(206, len(DATA) - 50, DATA[50:]))
    assert link.message(DIGEST, len(DATA)).digest == MESSAGE.digest


def test_answer_without_a_length_or_too_long_is_refused():
    for length in (None, 1 << 30):
        with pytest.raises(LimitError, match="an answer of"):
            Script(Response(200, length, b"{}")).receipt("1.0.0")


def test_request_when_the_server_is_full_waits_as_long_as_it_is_told():
    full = Response(503, 2, b"{}", Retry_After="0.25")
    link = Script(full, full, Response(200, 20, b'{"verdict":"accepted"}'))
    assert link.upload("1.0.0", MESSAGE) == "accepted"
    assert all(0.125 <= seconds <= 0.75 for seconds in link.pauses)
    assert len(link.pauses) == 2


def test_request_when_the_link_is_dead_is_given_up_in_a_sentence():
    with pytest.raises(RunError, match="has not answered for -1 seconds: ConnectionRefusedError"):
        Script(ConnectionRefusedError("no"), patience=-1.0).receipt("1.0.0")


def test_token_when_the_server_has_forgotten_it_is_fetched_once_more():
    token = Response(200, 10, b'{"token":"a"}'), Response(200, 10, b'{"token":"b"}')
    link = Script(token[0], Response(401, 2, b"{}"), token[1], Response(200, 9, b'{"verdict":""}'))
    link.enrol(enrolment())
    assert link.receipt("1.0.0") == ""
    assert link._token == "b"


def test_denial_when_it_is_no_form_is_still_one_line():
    with pytest.raises(DeniedError, match="404 reason"):
        Script(Response(404, 10, b"<html>\n\x1b[31m")).receipt("1.0.0")


# ---------------------------------------------------------------------------------------------- forms and identities


def test_forms_when_written_and_read_are_equal():
    offer = Offer({"kind": "train"}, "Softmax", "1.0.0", ("1.0.0",), "0" * 64, 3, "done", False)
    for form in (enrolment(), offer):
        assert parse(type(form), write(form)) == form


@pytest.mark.parametrize(
    "more",
    [{"name": "../x"}, {"name": "a" * 65}, {"ticket": "no"}, {"values": ("a", "b")}, {"values": (True, False)}, {"shape": (1, 2)}, {"shape": (0,)}],
)  # fmt: skip
def test_enrolment_when_a_field_is_out_of_its_range_is_refused(more):
    with pytest.raises(MalformedError):
        enrolment(**more)


@pytest.mark.parametrize("change", [{"kind": "shell"}, {"attempt": -1}, {"path": "/"}, {"round_num": "1"}])
def test_task_when_a_field_is_not_what_a_task_has_is_refused(change):
    from polyfed.core.algorithm import Task
    from polyfed.network.forms import task_fields

    fields = task_fields(Task("train", "c0", 1, 0))
    assert task_of(Offer(fields, digest="0" * 64)) == Task("train", "c0", 1, 0)
    with pytest.raises(MalformedError):
        task_of(Offer({**fields, **change}, digest="0" * 64))


def test_sentence_when_it_holds_controls_is_made_one_plain_line():
    assert printable("a\nb\x1b[31m\u202ec" + "x" * 2000)[:12] == "a; b?[31m?cx"
    assert len(printable("x" * 2000)) == 1000


def test_name_when_it_is_claimed_with_another_ticket_stays_with_the_first():
    known = Identities(["c0", "c1"], 10)
    token = known.enrol(enrolment())
    with pytest.raises(DeniedError, match="enrolled already"):
        known.enrol(enrolment(ticket="1" * 64))
    assert known.who(f"Bearer {token}") == "c0"
    with pytest.raises(DeniedError, match="enrol first"):
        known.who("Bearer ")


def test_identities_when_counted_are_in_the_order_of_names_and_no_more_than_expected():
    known = Identities(2, 10)
    for name in ("b", "a"):
        known.enrol(enrolment(name))
    assert list(known.enrolments) == ["a", "b"]
    with pytest.raises(DeniedError, match="all 2 clients"):
        known.enrol(enrolment("c"))


@pytest.mark.parametrize("clients", [0, 11, [], ["a", "a"], ["a b"], "abc"])
def test_identities_when_clients_make_no_sense_are_refused(clients):
    with pytest.raises(UsageError, match="clients="):
        Identities(clients, 10)


def test_room_when_all_bytes_are_taken_is_denied_until_some_are_given_back():
    inbox = Inbox(NetworkLimits(spool_bytes=100, uploads_per_client=2))
    with inbox.room("a", 60):
        with pytest.raises(DeniedError) as denied, inbox.room("b", 50):
            pass
        assert denied.value.retry_after > 0
        with inbox.room("b", 40):
            assert inbox.num_bytes == 100
    with pytest.raises(DeniedError, match="spool_bytes") as denied, inbox.room("a", 101):
        pass
    assert not denied.value.retry_after
    assert inbox.num_bytes == 0


def test_connection_when_an_answer_is_empty_serves_the_next_request_at_once():
    """An answer of 204 that is not read to its end blocks its connection: the next answer was lost, and asked for again."""
    seen = []

    class Empty(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            seen.append(self.client_address)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pauses = []
        link = Link(f"http://127.0.0.1:{server.server_port}", pause=pauses.append)
        assert [link.next() for _ in range(3)] == [None] * 3
        link.close()
        server.shutdown()
    assert (len(seen), len(set(seen)), pauses) == (3, 1, [])
