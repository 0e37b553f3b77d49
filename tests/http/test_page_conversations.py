"""The chat page's memory: two tabs of one browser, questions that got no answer, and what of it all is sent to the model.

What is sent is read off in the page itself, where its requests leave; what is stored is read off after a reload.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import EngineConfig
from server.settings import ServerSettings
from tests.http.support import Scripted, Steered, ThreadServer, eventually, serving
from tests.support.browser import Browser, browser, browser_found

pytestmark = pytest.mark.skipif(not browser_found(), reason="no chromium and chromedriver on the PATH")
RECORD = """
    window.sent = [];
    const real = window.fetch;
    window.fetch = (address, options) => {
        if (options?.body) window.sent.push(JSON.parse(options.body).messages);
        return real(address, options);
    };
"""
SHORT = 200                                              # tokens that the small server's context has


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.resize(1200, 800)
        yield opened


@pytest.fixture(scope="module")
def server(roomy_path: Path) -> Iterator[ThreadServer]:
    """Its model says "aye" and ends."""
    config = EngineConfig(served_model_name="tiny", max_model_len=SHORT)
    with serving(roomy_path, backend=Scripted("aye"), config=config) as opened:
        yield opened


@pytest.fixture
def page(window: Browser, server: ThreadServer) -> Browser:
    """The page as it is found for the first time."""
    fresh(window, server.url)
    return window


def fresh(window: Browser, url: str) -> None:
    window.open(url + "/page/icon.svg")                  # the same origin, and no page that could write at its end
    window.run("localStorage.clear()")
    visit(window, url)


def visit(window: Browser, url: str) -> None:
    window.open(url)
    window.eventually(lambda: window.text("#model") == "tiny", "the model's name")
    window.run(RECORD)


def ask(window: Browser, text: str) -> None:
    window.write("#input", text)
    window.click("#send")


def answered(window: Browser, text: str) -> None:
    ask(window, text)
    window.eventually(lambda: window.visible("#send"), "the answer's end")


def texts(window: Browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].filter((n) => n.checkVisibility()).map((n) => n.innerText)"
    found: list[str] = window.run(script, selector)
    return found


def press(window: Browser, label: str, message: int) -> None:
    """The button of the message with this number, from 0, or from the end where negative."""
    window.run(
        "[...[...document.querySelectorAll('.message')].at(arguments[1]).querySelectorAll('.tools button')]"
        ".find((b) => b.checkVisibility() && b.innerText === arguments[0]).click()",
        label, message,
    )  # fmt: skip


def agains(window: Browser) -> list[int]:
    """The numbers of the messages that offer Again."""
    script = """
        return [...document.querySelectorAll('.message')].flatMap((message, number) =>
            [...message.querySelectorAll('.tools button')].some((b) => b.checkVisibility() && b.innerText === 'Again')
                ? [number] : []);
    """
    found: list[int] = window.run(script)
    return found


def sent(window: Browser) -> list[tuple[str, str]]:
    """The messages of the latest request."""
    last: list[dict[str, Any]] = window.run("return window.sent.at(-1)")
    return [(message["role"], message["content"]) for message in last]


class Tabs:
    """Two tabs of one window; each is switched to by its number."""

    def __init__(self, window: Browser) -> None:
        self.window = window
        self.handles = [window._ask("GET", "/window"), window._ask("POST", "/window/new", type="tab")["handle"]]

    def to(self, number: int) -> None:
        self.window._ask("POST", "/window", handle=self.handles[number])

    def close(self) -> None:
        self.to(1)
        self.window._ask("DELETE", "/window")
        self.to(0)


@pytest.fixture
def tabs(page: Browser, server: ThreadServer) -> Iterator[Tabs]:
    """The page in both, tab 0 first; neither has a conversation."""
    two = Tabs(page)
    two.to(1)
    visit(page, server.url)
    two.to(0)
    yield two
    two.close()


def titles(window: Browser) -> list[str]:
    return texts(window, "#conversations .title")


# ---- two tabs --------------------------------------------------------------------------------------------------------


def test_two_tabs_keep_each_others_conversations(tabs: Tabs) -> None:
    page = tabs.window
    answered(page, "first")
    tabs.to(1)
    answered(page, "second")
    assert titles(page) == ["second", "first"], "the other tab's is there without a reload"
    tabs.to(0)
    page.eventually(lambda: titles(page) == ["second", "first"], "the other tab's conversation")
    page.reload()                                        # what a tab writes at its end takes nothing away
    tabs.to(1)
    page.reload()
    for number in (0, 1):
        tabs.to(number)
        page.eventually(lambda: titles(page) == ["second", "first"], "both conversations")


def test_the_newest_version_of_a_conversation_is_shown_in_every_tab(tabs: Tabs) -> None:
    page = tabs.window
    answered(page, "first")
    tabs.to(1)
    page.click("#conversations .title")
    answered(page, "second")
    tabs.to(0)
    page.eventually(lambda: texts(page, ".message .words") == ["first", "aye", "second", "aye"], "the other tab's words")
    answered(page, "third")
    assert [content for role, content in sent(page) if role == "user"] == ["first", "second", "third"]
    assert titles(page) == ["first"]


def test_what_one_tab_deletes_is_not_brought_back_by_another_that_writes_in_it(tabs: Tabs, server: ThreadServer) -> None:
    page, gate = tabs.window, server.backend.gate
    answered(page, "keep this")
    page.click("#new")
    gate.clear()
    try:
        ask(page, "delete this")
        tabs.to(1)
        page.eventually(lambda: titles(page) == ["delete this", "keep this"], "the conversation, while it is written")
        page.click("#conversations li:first-child button[aria-label^=Delete]")
        tabs.to(0)
        page.eventually(lambda: titles(page) == ["keep this"], "the deletion")
        assert page.visible("#send"), "the answer has no place any more, and is ended"
    finally:
        gate.set()
    eventually(lambda: server.pages_held() == 0, "the pages' return")
    for number in (0, 1):
        tabs.to(number)
        page.reload()
        page.eventually(lambda: page.text("#model") == "tiny", "the page")
        assert titles(page) == ["keep this"]


def test_conversations_of_an_earlier_page_are_taken_over_without_their_empty_answers(page: Browser) -> None:
    old = [{"id": "1", "title": "old", "at": 5, "messages": [
        {"role": "user", "content": "lost"}, {"role": "assistant", "content": "", "note": "It broke."},
        {"role": "user", "content": "old"}, {"role": "assistant", "content": "yes"}, "nonsense", {"role": "user"},
    ]}]  # fmt: skip
    page.run("localStorage.setItem('rillet.conversations', JSON.stringify(arguments[0]))", [*old, None, {"messages": 3}])
    page.reload()
    page.eventually(lambda: texts(page, ".message .words") == ["lost", "old", "yes"], "the conversation")
    assert texts(page, ".wrong") == ["It broke."]
    page.run(RECORD)
    answered(page, "new")
    assert sent(page) == [("user", "old"), ("assistant", "yes"), ("user", "new")]


# ---- questions without an answer -------------------------------------------------------------------------------------


def test_a_message_that_is_too_long_goes_back_to_the_input_and_the_conversation_lives_on(page: Browser) -> None:
    answered(page, "hi")
    answered(page, long := "x" * SHORT)
    page.eventually(lambda: f"the context length is {SHORT}" in page.text("#note"), "the server's words")
    assert page.run("return document.querySelector('#input').value") == long
    assert texts(page, ".message .words") == ["hi", "aye"]
    assert agains(page) == [1]
    page.run("document.querySelector('#input').value = ''")
    answered(page, "still there?")
    assert sent(page) == [("user", "hi"), ("assistant", "aye"), ("user", "still there?")]
    assert texts(page, ".message .words") == ["hi", "aye", "still there?", "aye"]


def test_a_first_message_that_is_too_long_leaves_no_conversation(page: Browser) -> None:
    answered(page, long := "x" * SHORT)
    page.eventually(lambda: f"the context length is {SHORT}" in page.text("#note"), "the server's words")
    assert page.run("return document.querySelector('#input').value") == long
    assert (page.count(".message"), titles(page)) == (0, [])
    page.run("document.querySelector('#input').value = ''")
    answered(page, "hi")
    assert (sent(page), titles(page)) == ([("user", "hi")], ["hi"])


def test_a_question_that_was_stopped_before_a_word_is_not_sent_again_until_it_is_asked_again(
    page: Browser, server: ThreadServer
) -> None:
    answered(page, "first")
    server.backend.gate.clear()
    try:
        ask(page, "stopped")
        page.eventually(lambda: page.visible("#stop"), "the stop button")
        page.click("#stop")
    finally:
        server.backend.gate.set()
    page.eventually(lambda: agains(page) == [2], "the question's own Again")
    assert page.count(".message") == 3, "no empty answer"
    answered(page, "second")
    assert sent(page) == [("user", "first"), ("assistant", "aye"), ("user", "second")]
    assert agains(page) == [2, 4], "the unanswered question and the last answer"
    visit(page, server.url)
    page.eventually(lambda: agains(page) == [2, 4], "the same after a reload")
    press(page, "Again", 2)
    page.eventually(lambda: agains(page) == [5], "its answer")
    assert texts(page, ".message .words") == ["first", "aye", "second", "aye", "stopped", "aye"]
    assert sent(page)[1::2] == [("assistant", "aye")] * 2
    assert sent(page)[0::2] == [("user", text) for text in ("first", "second", "stopped")]


def test_a_question_whose_answer_failed_says_why_and_can_be_asked_again(window: Browser, roomy_path: Path) -> None:
    backend = Steered()
    with serving(roomy_path, backend=backend) as server:
        fresh(window, server.url)
        backend.fault = RuntimeError("the device is gone")
        ask(window, "first")
        window.eventually(lambda: agains(window) == [0], "the question's own Again")
        assert texts(window, ".message .wrong")[0]
        answered(window, "second")
        assert sent(window) == [("user", "second")]
        press(window, "Again", 0)
        window.eventually(lambda: window.run("return window.sent.length") == 3 and window.visible("#send"), "another try")
        assert sent(window) == [("user", "first")]
        assert texts(window, ".message .words") == ["second", "first"]


# ---- again -----------------------------------------------------------------------------------------------------------


def test_only_the_last_answer_offers_again(page: Browser, server: ThreadServer) -> None:
    for number, text in enumerate(("one", "two", "three")):
        answered(page, text)
        assert agains(page) == [2 * number + 1]
    page.reload()
    page.eventually(lambda: agains(page) == [5], "the history")
    page.run(RECORD)
    press(page, "Again", 5)
    page.eventually(lambda: agains(page) == [5] and page.visible("#send"), "the other answer")
    assert [content for role, content in sent(page)] == ["one", "aye", "two", "aye", "three"]
    assert page.count(".message") == 6


def test_an_answer_stays_when_again_is_stopped_before_a_word(page: Browser, server: ThreadServer) -> None:
    answered(page, "one")
    server.backend.gate.clear()
    try:
        press(page, "Again", 1)
        page.eventually(lambda: page.visible("#stop"), "the stop button")
        assert agains(page) == []
        page.click("#stop")
    finally:
        server.backend.gate.set()
    page.eventually(lambda: agains(page) == [1], "the answer that there was")
    assert texts(page, ".message .words") == ["one", "aye"]
    page.reload()
    page.eventually(lambda: texts(page, ".message .words") == ["one", "aye"], "the history")


def test_a_refused_key_leaves_the_question_with_its_again(window: Browser, roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(api_keys=("sesame",)), backend=Scripted("aye")) as server:
        window.open(server.url)
        ask(window, "hi")
        window.eventually(lambda: agains(window) == [0], "the question's own Again")
        assert "the request shows no API key" in texts(window, ".message .wrong")[0]
        window.click("#open-settings")
        window.write("#key", "sesame")
        window.click("#done")
        window.eventually(lambda: window.text("#model") == "tiny", "the model's name")
        press(window, "Again", 0)
        window.eventually(lambda: texts(window, ".message .words") == ["hi", "aye"], "the answer")
