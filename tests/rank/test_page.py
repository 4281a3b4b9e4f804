"""The page in a real browser, by keys alone and by hand: what is seen is what is kept."""

import json
import shutil
from pathlib import Path

import pytest

from jrlhf.rank import read_tasks
from jrlhf.rank.store import Store
from tests.support.rank import Server, write_tasks

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    for name in ("starlette", "uvicorn", "markdown_it"):
        pytest.importorskip(name)
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens pages of a server on a file of tasks; an error in a console, or a request elsewhere, fails the test."""
    wrong, contexts, servers = [], [], []

    def open_page(path, *, rater, server=None, **options):
        if server is None:
            server = Server(path)
            servers.append(server)
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: server.host in request.url or wrong.append(request.url))
        page.goto(server.address + (f"&rater={rater}" if rater else ""))
        return page, server

    yield open_page
    for context in contexts:
        context.close()
    for server in servers:
        server.__exit__()
    assert wrong == []


def standing(path: Path) -> list:
    store = Store(path.with_suffix(".sqlite"))
    found = store.standing()
    store.close()
    return found


def wait_for(page, done: int) -> None:
    # The page's policy forbids eval, and with it wait_for_function.
    page.locator("#count", has_text=f"{done} of ").wait_for()


def test_two_raters_rank_twenty_tasks_by_keys_alone(opened, tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", 20, answers=4)
    ann, server = opened(path, rater="ann")
    bob, _ = opened(path, rater="bob", server=server)
    wait_for(ann, 0)
    wait_for(bob, 0)
    expected = {}
    for number, task in enumerate(read_tasks(path).tasks):
        for page, rater in ((ann, "ann"), (bob, "bob")):
            # Digits name the answers as this rater sees them; the best is the file's last, or the first for bob.
            wanted = [3, 2, 1, 0] if rater == "ann" else [0, 1, 2, 3]
            seen = task.order_for(rater)
            for answer in wanted[:3]:
                page.keyboard.press(str(seen.index(answer) + 1))
            page.keyboard.press("Enter")
            wait_for(page, number + 1)
            expected[rater, task.key] = tuple(wanted.index(i) for i in range(4))
    assert ann.locator("#done").is_visible()
    decisions = standing(path)
    assert {(d.rater, d.task): d.ranks for d in decisions} == expected
    assert len(decisions) == 40
    assert all(0 < d.seconds < 600 for d in decisions)
    assert server.token not in ann.url


def test_every_key_does_what_the_help_says(opened, tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", 4)
    page, _ = opened(path, rater="ann")
    wait_for(page, 0)
    press, first = page.keyboard.press, read_tasks(path).tasks[0]

    def places():
        return [card.text_content() for card in page.locator(".answer .place").all()]

    def labels():
        return [card.text_content() for card in page.locator(".answer .pick").all()]

    press("Enter")
    assert page.locator("#status").text_content() == "3 answers have no place yet."
    press("ArrowDown")
    press("t")  # with one that has no place: nothing
    assert places() == ["–", "–", "–"]
    press("2")
    assert (labels(), places()) == (["2", "1", "3"], ["1.", "–", "–"])
    press("3")  # the one that is left gets the last place
    assert (labels(), places()) == (["2", "3", "1"], ["1.", "2.", "3."])
    press("t")
    assert places() == ["1.", "= 1.", "3."]
    page.locator(".answer").nth(1).get_by_role("button", name="Tie answer 3").click()
    assert places() == ["1.", "2.", "3."]
    press("u")
    assert places() == ["1.", "= 1.", "3."]
    press("u")
    assert places() == ["1.", "2.", "3."]
    press("ArrowDown")
    press("Shift+ArrowUp")
    assert labels() == ["2", "1", "3"]
    press("1")  # again: no place, and the others close up
    assert (labels(), places()) == (["2", "3", "1"], ["1.", "2.", "–"])
    press("Shift+ArrowUp")
    assert places() == ["1.", "2.", "3."]
    press("t")
    press("m")
    press("m")
    press("n")
    page.keyboard.type("3 is wrong")
    press("Escape")
    press("d")
    assert page.locator(".answer .html").count() == 3
    press("Enter")
    wait_for(page, 1)
    [decision] = standing(path)
    seen = first.order_for("ann")
    assert decision.ranks == tuple([1, 0, 1][seen.index(i)] for i in range(3))
    assert (decision.margin, decision.note) == (1.0, "3 is wrong")
    press("s")
    wait_for(page, 2)
    press("u")
    wait_for(page, 1)
    press("u")
    wait_for(page, 0)
    assert places() == ["1.", "2.", "= 2."]
    assert page.locator("#note").input_value() == "3 is wrong"
    assert page.locator("input[name=margin]:checked").get_attribute("value") == "clearly"


def test_dragged_by_hand_on_a_page_that_asked_for_a_name(opened, tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", 2)
    page, server = opened(path, rater="")
    page.locator("#name").fill("Cleo")
    page.keyboard.press("Enter")
    wait_for(page, 0)
    cards = page.locator(".answer")
    for at, place in ((2, 0), (2, 1)):
        cards.nth(at).drag_to(cards.nth(place), target_position={"x": 90, "y": 3})
    assert [p.text_content() for p in page.locator(".answer .pick").all()] == ["3", "2", "1"]
    page.locator(".answer").nth(2).locator(".moves button").first.click()
    page.locator("#submit").click()
    wait_for(page, 1)
    [decision] = standing(path)
    seen = read_tasks(path).tasks[0].order_for("Cleo")
    assert decision.ranks == tuple([2, 1, 0][seen.index(i)] for i in range(3))
    again, _ = opened(path, rater="", server=server)
    again.locator("#known button", has_text="Cleo").click()
    wait_for(again, 1)


def test_hostile_answers_are_text_in_both_views_and_in_chats(opened, tmp_path):
    path = tmp_path / "tasks.jsonl"
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script> [a](javascript:alert(3)) <style>*{left:0}</style>"
    prompt = [{"role": "system", "content": evil}, {"role": evil, "content": "**bold**"}]
    path.write_text(
        json.dumps({"prompt": prompt, "completions": [evil, "\n".join(["# plain", "| a |", "|:-:|", "| b |"])]})
    )
    page, _ = opened(path, rater="%3Cb%3E")
    wait_for(page, 0)
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    assert evil in page.locator("#prompt .text").first.text_content()
    page.keyboard.press("d")
    assert page.locator("#prompt strong").text_content() == "bold"
    for hostile in ("script", "img", "style", "a", "[style]", "[onerror]"):
        assert page.locator(f"main {hostile}").count() == 0
    assert page.locator("#who").text_content() == "<b>"
    assert page.locator("td").text_content() == "b"


def test_a_server_that_is_gone_is_said_and_nothing_is_lost_on_the_page(opened, tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", 2)
    page, _ = opened(path, rater="ann")
    wait_for(page, 0)
    page.keyboard.press("1")
    page.keyboard.press("2")
    page.evaluate("() => { window.fetch = () => Promise.reject(new TypeError('gone')) }")
    page.keyboard.press("Enter")
    page.locator("#status", has_text="Not saved: the server cannot be reached").wait_for()
    assert [p.text_content() for p in page.locator(".answer .place").all()] == ["1.", "2.", "3."]
    assert standing(path) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_named_for_screen_readers(opened, tmp_path, scheme):
    path = write_tasks(tmp_path / "tasks.jsonl", 2)
    page, _ = opened(path, rater="ann", viewport={"width": 360, "height": 700}, color_scheme=scheme)
    wait_for(page, 0)
    page.keyboard.press("1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground, text = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    light = [sum(map(int, value.removeprefix("rgb(").rstrip(")").split(","))) / 3 for value in (ground, text)]
    assert (light[0] > 200 and light[1] < 80) if scheme == "light" else (light[0] < 60 and light[1] > 200)
    assert page.locator(".answer.placed").get_attribute("aria-label").startswith("Answer 1, place 1: Answer 0.")
    assert page.get_by_role("progressbar", name="Tasks done").count() == 1
    assert page.get_by_role("button", name="Submit").count() == 1
    assert page.get_by_role("list").count() == 1
    unnamed = "[...document.querySelectorAll('button,input,textarea')].filter(e => e.checkVisibility()"
    assert page.evaluate(f"{unnamed} && !e.labels?.length && !(e.ariaLabel || e.textContent).trim()).length") == 0
