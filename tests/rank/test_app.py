"""The page's server: who is let in, what is shown, what is kept."""

import pytest

from tests.support.rank import TOKEN, Client, write_tasks

pytest.importorskip("starlette")
pytest.importorskip("markdown_it")

from jrlhf.rank import read_tasks
from jrlhf.rank.app import make_app
from jrlhf.rank.guard import MAX_BODY_BYTES
from jrlhf.rank.render import to_html
from jrlhf.rank.store import Store


def decide(client, task, rater="ann", **more):
    return client("POST", "/api/decide", {"rater": rater, "task": task["key"], "seconds": 1.5, **more})


def following(client, rater="ann"):
    return client("POST", "/api/next", {"rater": rater}).json()


def test_the_address_lets_in_and_the_cookie_keeps_in(client):
    first = client("GET", "/", token=TOKEN, cookie=None)
    assert first.status == 200
    assert first.headers["set-cookie"] == f"{client.app.cookie}={TOKEN}; HttpOnly; SameSite=Strict; Path=/"
    assert client("GET", "/rank.js").status == 200
    assert "set-cookie" not in client("GET", "/style.css").headers


@pytest.mark.parametrize("cookie", [None, "", "other=1", "jrlhf_rank_00000000=the-token"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/rank.js"), ("POST", "/api/next"), ("GET", "/x")])
def test_without_the_token_there_is_nothing(client, method, path, cookie):
    body = {"rater": "ann"} if method == "POST" else None
    assert client(method, path, body, cookie=cookie).status == 403
    assert client(method, path, body, cookie=f"{client.app.cookie}=wrong").status == 403
    assert client(method, path, body, cookie=cookie, token="wröng").status == 403


def test_a_token_in_the_address_is_not_enough_to_decide(client):
    """Else a form on another page that has seen the address could."""
    assert client("POST", "/api/next", {"rater": "ann"}, token=TOKEN, cookie=None).status == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", None, "[", "0"])
def test_another_name_of_this_address_is_refused(client, host):
    for method, path, body in (("GET", "/", None), ("POST", "/api/next", {"rater": "ann"})):
        assert client(method, path, body, host=host, token=TOKEN, origin=f"http://{host}").status == 400


@pytest.mark.parametrize("host", ["localhost:8000", "[::1]:8000", "127.0.0.1"])
def test_this_machine_s_own_names_are_not(client, host):
    assert client("POST", "/api/next", {"rater": "ann"}, host=host, origin=f"http://{host}").status == 200


def test_a_server_for_all_addresses_knows_itself_by_numbers_only(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    app = Client(make_app(read_tasks(write_tasks(tmp_path / "t.jsonl", 1)).tasks, store, token=TOKEN, host="0.0.0.0"))
    assert app("GET", "/", host="192.168.1.7:80").status == 200
    assert app("GET", "/", host="evil.example").status == 400
    store.close()


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8001", "http://127.0.0.1", None])
def test_another_page_cannot_decide(client, origin):
    task = following(client)["task"]
    asked = {"rater": "ann", "task": task["key"], "ranks": [0, 1, 2], "seconds": 1}
    assert client("POST", "/api/decide", asked, origin=origin).status == 403
    assert following(client)["done"] == 0


def test_another_page_cannot_read(client):
    assert client("GET", "/api/raters", origin="http://evil.example").status == 403


def test_a_large_body_is_refused_by_its_header_and_by_its_bytes(client):
    large = b"x" * (MAX_BODY_BYTES + 1)
    assert client("POST", "/api/next", chunks=[large], content_length=str(len(large))).status == 413
    assert client("POST", "/api/next", chunks=[large[:9], large[9:]]).status == 413
    assert client("POST", "/api/next", chunks=[b"{}"], content_length=str(len(large))).status == 413
    assert client("POST", "/api/next", chunks=[b"{}"], content_length="-1").status == 413


@pytest.mark.parametrize("path", ["/", "/rank.js", "/api/raters", "/nothing"])
def test_every_reply_forbids_scripts_from_elsewhere_frames_and_sniffing(client, path):
    for headers in (client("GET", path).headers, client("GET", path, cookie=None).headers):
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert headers["cache-control"] == "no-store"


def test_the_page_asks_nothing_of_anyone_else_and_has_no_inline_script(client):
    for path in ("/", "/rank.js", "/style.css"):
        text = client("GET", path).body.decode()
        assert "://" not in text.replace("http://www.w3.org", "")
        assert "style=" not in text
    page = client("GET", "/").body.decode()
    assert page.count("<script") == 1
    assert "onclick" not in page


def test_an_answer_s_html_and_links_can_do_nothing():
    assert to_html("<img src=x onerror=alert(1)> <b>") == "<p>&lt;img src=x onerror=alert(1)&gt; &lt;b&gt;</p>\n"
    assert to_html("<script>alert(1)</script>") == "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>\n"
    link = to_html('[here](https://evil.example/"><script>) <https://a.example>')
    assert "<script" not in link
    assert "<a" not in link
    assert "href" not in link
    assert "<img" not in to_html("![x](https://evil.example/x.png)")
    assert "<a" not in to_html("[x](javascript:alert(1))")
    table = to_html("| a | b |\n|:-:|--:|\n| 1 | 2 |")
    assert "<td>1</td>" in table
    assert "style" not in table


def test_what_is_shown_is_blind_and_in_the_rater_s_order(client, tmp_path):
    [first, *_] = read_tasks(tmp_path / "tasks.jsonl").tasks
    reply = client("POST", "/api/next", {"rater": "ann"})
    assert b"secret" not in reply.body
    assert b"gold" not in reply.body
    task = reply.json()["task"]
    assert [a["text"] for [a] in task["answers"]] == [first.completions[i] for i in first.order_for("ann")]


def test_decisions_are_kept_in_the_order_of_the_file(client, tmp_path):
    [first, *_] = read_tasks(tmp_path / "tasks.jsonl").tasks
    task = following(client)["task"]
    # The rater ties the two answers seen first, and likes the third least; gaps in ranks close.
    after = decide(client, task, ranks=[0, 0, 5], margin="clearly", note="näh").json()
    assert (after["done"], after["total"], after["task"]["key"] != task["key"]) == (1, 3, True)
    store = Store(tmp_path / "tasks.sqlite")
    [decision] = store.standing()
    store.close()
    seen = first.order_for("ann")
    assert decision.ranks == tuple({seen[0]: 0, seen[1]: 0, seen[2]: 1}[i] for i in range(3))
    assert (decision.rater, decision.kind, decision.margin, decision.note) == ("ann", "rank", 1.0, "näh")
    assert decision.seconds == 1.5


def test_skip_undo_and_two_raters(client):
    one = following(client)["task"]
    assert decide(client, one, skip=True).json()["skipped"] == 1
    two = following(client)["task"]
    decide(client, two, ranks=[2, 0, 1], margin="slightly", note="n")
    assert following(client, "bob")["task"]["key"] == one["key"]
    assert following(client, "bob")["done"] == 0
    back = client("POST", "/api/undo", {"rater": "ann"}).json()
    assert (back["task"]["key"], back["task"]["ranks"], back["done"]) == (two["key"], [2, 0, 1], 1)
    assert (back["task"]["margin"], back["task"]["note"]) == ("slightly", "n")
    back = client("POST", "/api/undo", {"rater": "ann"}).json()
    assert (back["task"]["key"], back["task"]["ranks"], back["done"]) == (one["key"], None, 0)
    assert client("POST", "/api/undo", {"rater": "ann"}).json()["task"]["key"] == one["key"]
    assert client("GET", "/api/raters").json() == {"raters": ["ann"]}


def test_after_the_last_task_there_is_none(client):
    for _ in range(3):
        after = decide(client, following(client)["task"], ranks=[0, 1, 2]).json()
    assert (after["task"], after["done"]) == (None, 3)


@pytest.mark.parametrize(
    "asked",
    [
        {"ranks": [0, 1]}, {"ranks": [0, 1, -1]}, {"ranks": [0, 1, True]}, {"ranks": [0, 1, 2.0]}, {"ranks": "012"}, {},
        {"ranks": [0, 1, 2], "margin": "much"}, {"ranks": [0, 1, 2], "margin": []}, {"ranks": [0, 1, 2], "note": 3},
        {"ranks": [0, 1, 2], "note": "x" * 2001}, {"ranks": [0, 1, 2], "seconds": "1"},
        {"ranks": [0, 1, 2], "seconds": float("nan")}, {"ranks": [0, 1, 2], "rater": " "},
        {"ranks": [0, 1, 2], "rater": "x" * 65}, {"ranks": [0, 1, 2], "rater": "a\nb"},
        {"ranks": [0, 1, 2], "rater": None},
    ],
)  # fmt: skip
def test_what_is_no_decision_is_refused_and_not_kept(client, asked):
    task = following(client)["task"]
    assert decide(client, task, **asked).status == 400
    assert following(client)["done"] == 0


def test_other_bad_requests(client):
    assert decide(client, {"key": "unknown"}, ranks=[0, 1, 2]).status == 404
    assert decide(client, {"key": []}, ranks=[0, 1, 2]).status == 404
    assert client("POST", "/api/next", chunks=[b"{"]).status == 400
    assert client("POST", "/api/next", chunks=[b"[]"]).status == 400
    assert client("POST", "/api/next", {"rater": "a"}, content_type="text/plain").status == 415
    assert client("GET", "/api/next").status == 405
    assert client("GET", "/../tasks.jsonl").status == 404
