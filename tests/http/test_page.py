"""The chat page in a real browser, against a real server: what a person does, and what a hostile answer tries."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.settings import ServerSettings
from tests.http.support import ThreadServer, eventually, serving
from tests.support.browser import Browser, browser, browser_found

needs_browser = pytest.mark.skipif(not browser_found(), reason="no chromium and chromedriver on the PATH")
HOSTILE = """# Hi <img src=x onerror="window.hit=1">
[a](javascript:window.hit=1) [b](https://example.org/?q="><script>window.hit=1</script>) **bold** `x<y`

<script>window.hit=1</script>

```html" onload="window.hit=1
<b>code</b>
```
| a | b |
|---|---|
| 1 | <i>2</i> |

1. one
2. two
   - inner

> quoted
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.resize(1200, 800)
        yield opened


def ask(page: Browser, url: str, text: str) -> None:
    page.open(url)
    page.eventually(lambda: page.text("#model") not in ("", "…"), "the model's name")
    page.write("#input", text)
    page.click("#send")


@needs_browser
def test_a_message_is_answered_and_is_found_again_after_a_reload(window: Browser, demo_url: str) -> None:
    ask(window, demo_url, "What is the capital of France? Answer in one sentence.")
    window.eventually(lambda: window.text(".message.assistant .words"), "the first words")
    window.eventually(lambda: "tokens/s" in window.text("#numbers"), "the answer's end")
    answer = window.text(".message.assistant .words")
    assert "Paris" in answer
    left = window.text("#numbers")
    assert "tokens left" in left
    window.reload()
    window.eventually(lambda: window.text(".message.assistant .words") == answer, "the history")
    assert window.text(".message.user") == "What is the capital of France? Answer in one sentence."
    window.eventually(lambda: window.text("#numbers") == left, "the numbers of the last answer")
    window.eventually(lambda: "running" in window.text("#glance"), "the glance at the metrics")
    assert window.errors() == []


@needs_browser
def test_words_show_while_they_come_and_stop_frees_the_pages(window: Browser, steered: ThreadServer) -> None:
    ask(window, steered.url, "never stop")
    window.eventually(lambda: "aaa" in window.text(".message.assistant .words"), "words before the end")
    assert window.visible("#stop")
    assert not window.visible("#send")
    assert steered.pages_held() > 0
    window.click("#stop")
    eventually(lambda: steered.pages_held() == 0, "the pages' return")
    window.eventually(lambda: window.visible("#send"), "the send button")
    shown = window.text(".message.assistant .words")
    window.reload()
    window.eventually(lambda: window.text(".message.assistant .words") == shown, "what had come before the stop")
    window.click("#new")
    assert window.count(".message") == 0
    assert window.count("#conversations li") == 1


@needs_browser
def test_what_a_model_writes_cannot_run(window: Browser, demo_url: str) -> None:
    window.open(demo_url)
    script = """
        const [text, whole] = arguments;
        return import('/page/markdown.js').then(({Writer}) => {
            const target = document.createElement('div');
            document.body.append(target);
            const writer = new Writer(target);
            for (const part of whole ? [text] : text) { writer.push(part); writer.draw(); }
            writer.end();
            const made = target.innerHTML;
            const names = [...target.querySelectorAll('*')].map((node) => node.tagName);
            const links = [...target.querySelectorAll('a')].map((node) => node.href);
            const attributes = [...target.querySelectorAll('*')].flatMap((node) => node.getAttributeNames());
            target.remove();
            return {made, names, links, attributes, hit: window.hit ?? 0};
        });
    """
    seen = window.run(script, HOSTILE, True)
    assert seen["hit"] == 0
    assert not {"SCRIPT", "IMG", "I", "B"} & set(seen["names"])
    assert all(link.startswith("https://example.org/") for link in seen["links"])
    assert set(seen["attributes"]) <= {"class", "type", "href", "target", "rel", "start"}
    assert {"H1", "STRONG", "CODE", "PRE", "TABLE", "OL", "UL", "BLOCKQUOTE"} <= set(seen["names"])
    assert window.run(script, HOSTILE, False)["made"] == seen["made"], "shown while it grows, it ends the same"


@needs_browser
def test_a_key_is_asked_for_and_taken(window: Browser, roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(api_keys=("sesame",))) as server:
        window.open(server.url)
        window.eventually(lambda: "API key" in window.text("#note"), "the note")
        window.click("#open-settings")
        window.write("#key", "sesame")
        window.click("#done")
        window.eventually(lambda: window.text("#model") == "tiny", "the model's name")
        window.write("#input", "hi")
        window.click("#send")
        window.eventually(lambda: "aaa" in window.text(".message.assistant .words"), "words")
        window.click("#stop")


@needs_browser
def test_it_fits_a_phone_and_the_dark(tmp_path: Path, steered: ThreadServer) -> None:
    with browser(tmp_path, dark=True, touch=True) as phone:
        ask(phone, steered.url, "never stop " + "x" * 300)
        phone.eventually(lambda: "aaa" in phone.text(".message.assistant .words"), "words")
        phone.click("#stop")
        assert phone.run("return document.documentElement.scrollWidth <= innerWidth")
        assert not phone.visible("#side")
        phone.click("#open-side")
        moved = "return document.querySelector('#side').getBoundingClientRect().left"
        phone.eventually(lambda: phone.visible("#new") and phone.run(moved) == 0, "the list, slid in")
        phone.click("#close-side")
        background = phone.run("return getComputedStyle(document.body).backgroundColor")
        assert background == "rgb(18, 23, 23)", "dark where the system is"
        small = "return [...document.querySelectorAll('#send, #open-side, #open-settings')].map((b) => b.offsetHeight)"
        assert min(phone.run(small)) >= 40, "buttons that a thumb can hit"


def test_the_page_needs_no_key_and_lets_nothing_else_in(roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(api_keys=("sesame",))) as server:
        page = httpx.get(server.url + "/")
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert httpx.get(server.url + "/page/main.js").status_code == 200
        again = httpx.get(server.url + "/", headers={"If-None-Match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for name in ("nothing.js", "%2e%2e%2fapp.py", "..%2f..%2fREADME.md", "x" * 5000):
            assert httpx.get(f"{server.url}/page/{name}").status_code == 404
        assert httpx.get(server.url + "/v1/models").status_code == 401
