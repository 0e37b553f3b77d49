"""The chat page's settings, and when it asks the server: a refused key is not tried again and again, nor a hidden page kept
up to date. The page's timers are counted as it starts them; its requests are those that the browser itself has noted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.settings import ServerSettings
from tests.http.support import Scripted, ThreadServer, serving
from tests.support.browser import Browser, browser, browser_found

pytestmark = pytest.mark.skipif(not browser_found(), reason="no chromium and chromedriver on the PATH")
COUNT = """
    window.timers = new Set();
    for (const [start, end, once] of [['setTimeout', 'clearTimeout', true], ['setInterval', 'clearInterval', false]]) {
        const realStart = window[start].bind(window), realEnd = window[end].bind(window);
        window[start] = (action, ...rest) => {
            const id = realStart(() => { if (once) window.timers.delete(id); action(); }, ...rest);
            window.timers.add(id);
            return id;
        };
        window[end] = (id) => { window.timers.delete(id); realEnd(id); };
    }
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.resize(1200, 800)
        opened._ask("POST", "/goog/cdp/execute", cmd="Page.addScriptToEvaluateOnNewDocument", params={"source": COUNT})
        yield opened


@pytest.fixture(scope="module")
def server(roomy_path: Path) -> Iterator[ThreadServer]:
    with serving(roomy_path, backend=Scripted("aye")) as opened:
        yield opened


@pytest.fixture
def page(window: Browser, server: ThreadServer) -> Browser:
    window.open(server.url + "/page/icon.svg")
    window.run("localStorage.clear()")
    window.open(server.url)
    window.eventually(lambda: window.text("#model") == "tiny", "the model's name")
    return window


def requests(window: Browser) -> list[str]:
    """The paths that the page has asked for by itself, in order."""
    script = """
        return performance.getEntriesByType('resource').filter((one) => one.initiatorType === 'fetch')
            .map((one) => new URL(one.name).pathname);
    """
    found: list[str] = window.run(script)
    return found


def timers(window: Browser) -> int:
    return int(window.run("return window.timers.size"))


def stored(window: Browser) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(window.run("return localStorage.getItem('rillet.settings') ?? '{}'"))
    return found


def set_field(window: Browser, selector: str, value: str) -> None:
    """As a person types it, over what stands there."""
    window.run("document.querySelector(arguments[0]).select()", selector)
    window.write(selector, value)


def press_escape(window: Browser) -> None:
    actions = [{"type": "keyDown", "value": "\ue00c"}, {"type": "keyUp", "value": "\ue00c"}]
    window._ask("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])


# ---- the dialog ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [press_escape, lambda window: window.click("#cancel")], ids=["escape", "cancel"])
def test_settings_that_are_left_stay_as_they_were(page: Browser, leave: Any) -> None:
    page.click("#open-settings")
    set_field(page, "#temperature", "0.33")
    page.click("#done")
    page.eventually(lambda: not page.visible("#settings"), "the dialog's end")
    assert stored(page)["temperature"] == 0.33
    page.click("#open-settings")
    set_field(page, "#system", "Be rude.")
    set_field(page, "#temperature", "1.5")
    set_field(page, "#key", "wrong")
    page.run("document.querySelector('#theme').value = 'dark'")
    leave(page)
    page.eventually(lambda: not page.visible("#settings"), "the dialog's end")
    assert stored(page)["temperature"] == 0.33
    assert stored(page)["system"] == stored(page)["key"] == ""
    assert page.run("return document.documentElement.dataset.theme ?? ''") == ""
    page.click("#open-settings")
    assert page.run("return document.querySelector('#temperature').value") == "0.33"
    page.click("#cancel")


@pytest.mark.parametrize(("field", "wrong", "name", "right"), [
    ("#temperature", "2.5", "temperature", "2"),
    ("#temperature", "-1", "temperature", "0"),
    ("#temperature", "1e", "temperature", "1"),
    ("#max-tokens", "0", "maxTokens", "1"),
    ("#max-tokens", "7.5", "maxTokens", "7"),
    ("#key", "kéy", "key", "key"),
])  # fmt: skip
def test_settings_that_are_not_valid_are_not_taken(page: Browser, field: str, wrong: str, name: str, right: str) -> None:
    page.click("#open-settings")
    set_field(page, field, wrong)
    page.click("#done")
    assert page.visible("#settings")
    assert page.run("return document.activeElement === document.querySelector(arguments[0])", field), "where it is wrong"
    assert name not in stored(page)
    set_field(page, field, right)
    page.click("#done")
    page.eventually(lambda: not page.visible("#settings"), "the dialog's end")
    assert stored(page)[name] == (right if name == "key" else int(right))


# ---- asking the server -----------------------------------------------------------------------------------------------


def test_after_a_401_nothing_is_asked_until_the_settings_change(window: Browser, roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(api_keys=("sesame",))) as server:
        window.open(server.url)
        window.eventually(lambda: "the request shows no API key" in window.text("#note"), "the server's own words")
        assert timers(window) == 0
        assert requests(window) == ["/v1/models"]
        window.click("#open-settings")
        set_field(window, "#key", "wrong")
        window.click("#done")
        window.eventually(lambda: "the request shows a wrong API key" in window.text("#note"), "the server's own words")
        assert timers(window) == 0
        assert requests(window) == ["/v1/models"] * 2
        window.click("#open-settings")
        set_field(window, "#key", "sesame")
        window.click("#done")
        window.eventually(lambda: "running" in window.text("#glance"), "the metrics")
        assert window.text("#note") == ""
        assert timers(window) == 1


def test_a_hidden_page_asks_for_nothing_and_one_that_is_seen_again_does_at_once(page: Browser) -> None:
    page.eventually(lambda: "/metrics" in requests(page), "the first look at the metrics")
    page._ask("POST", "/window/minimize")
    page.eventually(lambda: page.run("return document.hidden"), "the page's hiding")
    page.eventually(lambda: timers(page) == 0, "the timers' end")
    before = len(requests(page))
    page.resize(1200, 800)                               # which shows it again
    page.eventually(lambda: len(requests(page)) > before, "a look at once")
    assert not page.run("return document.hidden")
