"""The page in a real browser, opened from disk."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from math import comb
from pathlib import Path
from typing import Any

import pytest

from diffalign.intervals import wilson

from . import browser

NEEDED = "the gallery's page is tested in a browser: apt-get install chromium, pip install playwright"
pytest.importorskip("playwright.sync_api", reason=NEEDED)
if browser.CHROMIUM is None:
    pytest.skip(NEEDED, allow_module_level=True)

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LOCAL = ("file:", "data:", "blob:", "about:")
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=browser.CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Forty entries of three systems, one of each rarity: a gallery that tests read and never change."""
    folder = tmp_path_factory.mktemp("discs")
    data = browser.rich(folder)
    return browser.write(folder, data), data


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visit]:
    """Open an address in a fresh profile; in the end nothing went to a network and nothing was complained about."""
    wrong: list[str] = []
    contexts = []

    def go(url: str, **options: Any) -> Page:
        contexts.append(chromium.new_context(**{"viewport": DESK, "reduced_motion": "reduce"} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(LOCAL) or wrong.append(request.url))
        page.goto(url)
        return page

    go.wrong = wrong  # type: ignore[attr-defined]
    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def prompts(page: Page) -> list[str]:
    return page.locator(".card h3").all_inner_texts()


def gains(data: dict[str, Any], reward: str) -> dict[str, float | None]:
    both = {e["id"]: [(shot or {}).get("scores", {}).get(reward) for shot in e["shots"][:2]] for e in data["entries"]}
    return {name: None if None in pair else pair[1] - pair[0] for name, pair in both.items()}


def shoot(page: Page, name: str) -> None:
    if folder := os.environ.get("DIFFALIGN_SHOTS"):
        page.wait_for_timeout(200)  # lazy images
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_slider_moves_the_clip_by_range_by_key_and_by_hand(visit: Visit, discs: Any) -> None:
    page = visit(discs[0] + "#entry=e5&mode=slider")
    clip = "getComputedStyle(document.querySelectorAll('#detail .layer')[1]).clipPath"
    seen = [page.evaluate(clip)]
    page.locator("#detail .split").fill("20")
    seen.append(page.evaluate(clip))
    page.locator("#detail-title").focus()
    page.keyboard.press("ArrowUp")
    seen.append(page.evaluate(clip))
    box = page.locator("#detail .pane").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 200, steps=3)
    page.mouse.up()
    seen.append(page.evaluate(clip))
    lefts = [float(text.split("px")[-2].split()[-1]) for text in seen]
    assert lefts[1] < lefts[2] < lefts[0] < lefts[3]


def test_sorting_by_a_gain_puts_the_worst_regression_first_and_the_unscored_last(visit: Visit, discs: Any) -> None:
    url, data = discs
    page = visit(url)
    page.locator("#sort").select_option("up:shapes")
    known = {name: gain for name, gain in gains(data, "shapes").items() if gain is not None}
    shown = page.evaluate("Gallery.shown().map((entry) => entry.id)")
    assert shown[: len(known)] == sorted(known, key=lambda name: known[name])
    assert set(shown[len(known) :]) == set(gains(data, "shapes")) - set(known)
    assert page.locator(".card").first.get_attribute("data-entry") == shown[0]
    assert page.locator("#losses li a").first.get_attribute("href").startswith(f"#entry={shown[0]}&")


def test_filters_keep_what_they_name(visit: Visit, discs: Any) -> None:
    url, data = discs
    page = visit(url)
    page.locator("#outcome").select_option("loss")
    losses = {name for name, gain in gains(data, "shapes").items() if gain is not None and gain < 0}
    assert set(page.evaluate("Gallery.shown().map((entry) => entry.id)")) == losses
    page.locator("#tag").select_option("colour")
    tagged = {entry["id"] for entry in data["entries"] if "colour" in entry["tags"]}
    assert set(page.evaluate("Gallery.shown().map((entry) => entry.id)")) == losses & tagged
    page.locator("#tag").select_option("")
    page.locator("#outcome").select_option("disagree")
    each = [gains(data, reward) for reward in browser.ROLES]
    signs = {name: {(gain[name] or 0) > 0 for gain in each if gain[name]} for name in each[0]}
    assert set(page.evaluate("Gallery.shown().map((e) => e.id)")) == {name for name, s in signs.items() if len(s) == 2}


def test_search_ignores_case_and_says_how_many_are_left(visit: Visit, discs: Any) -> None:
    page = visit(discs[0])
    page.keyboard.press("/")
    page.keyboard.type("DISC NUMBER 12")
    assert prompts(page) == ["a disc number 12 on a table"]
    assert page.locator("#count").inner_text() == "1 of 40 entries"
    page.locator("#search").fill("no such thing")
    assert page.locator("#nothing").is_visible()


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")


def scored(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of which the first two systems have a score."""
    return [
        e for e in data["entries"] if all(shot and shot["scores"].get("shapes") is not None for shot in e["shots"][:2])
    ]


def test_swapping_the_pair_turns_the_summary_round(visit: Visit, discs: Any) -> None:
    url, data = discs
    row = data["summaries"][0]["rewards"]["shapes"]
    page = visit(url)
    page.get_by_role("button", name="Swap A and B").click()
    cells = page.locator("#pair-table tbody tr").first.locator("td").all_inner_texts()
    assert cells[0].startswith(f"\u2212{row['delta']:.3f}" if row["delta"] > 0 else f"+{-row['delta']:.3f}")
    assert cells[1] == f"{row['losses']} / {row['wins']} / {row['ties']}"
    gains = [entry["shots"][0]["scores"]["shapes"] - entry["shots"][1]["scores"]["shapes"] for entry in scored(data)]
    assert cells[2] == f"{signed(min(gains))} to {signed(max(gains))}"
    assert cells[3] == "30.0 % [20.0, 40.0]"


def test_keys_walk_flicker_zoom_and_close_but_not_while_typing(visit: Visit, discs: Any) -> None:
    page = visit(discs[0])
    page.locator("#search").fill("disc number 1")
    page.locator("#search").press("v")
    assert not page.locator("#vote").is_visible()
    page.locator("#search").fill("")
    page.locator(".card a").nth(4).click()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator("#detail-title").inner_text() == "Entry 6 of 40"
    page.keyboard.press("f")
    front = "[...document.querySelectorAll('#detail .layer')].map((layer) => getComputedStyle(layer).visibility)"
    assert page.evaluate(front) == ["visible", "hidden"]
    page.keyboard.press("f")
    assert page.evaluate(front) == ["hidden", "visible"]
    page.keyboard.press("z")
    assert page.evaluate("document.querySelector('#detail .canvas').style.width") == "64px"
    page.keyboard.press("Escape")
    browser.until(page, "!document.querySelector('#detail').open")
    assert page.evaluate("document.activeElement.closest('.card').dataset.entry") == "e5"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


def test_a_permalink_opens_its_entry_and_back_returns_to_the_list(visit: Visit, discs: Any) -> None:
    page = visit(discs[0] + "#entry=e7&a=0&b=2&mode=side")
    assert page.locator("#detail .prompt").inner_text() == "a disc number 7 on a table"
    assert page.locator("#detail .plate").all_inner_texts() == ["A \u00b7 stock", "B \u00b7 tuned"]
    page.keyboard.press("Escape")
    page.locator(".card a").nth(5).click()
    assert "entry=e5" in page.url
    page.go_back()
    browser.until(page, "!document.querySelector('#detail').open")
    page.go_forward()
    browser.until(page, "document.querySelector('#detail').open")
    page.goto(discs[0] + "#entry=gone")
    browser.until(page, "document.querySelector('#message').innerText")  # the page hears of a new hash a little later
    assert "no entry \u201cgone\u201d" in page.locator("#message").inner_text()


@pytest.mark.parametrize(("dialog", "opened"), [("detail", "entry: 'e5'"), ("vote", "view: 'vote'")])
def test_a_dialog_opened_again_at_once_stays_open(visit: Visit, discs: Any, dialog: str, opened: str) -> None:
    page = visit(discs[0])
    shut = "Gallery.go({ entry: null, view: null })"
    page.evaluate(f"() => {{ Gallery.go({{ {opened} }}); {shut}; Gallery.go({{ {opened} }}); }}")
    page.wait_for_timeout(200)  # the browser tells of the first closing a little later
    assert page.evaluate(f"document.querySelector('#{dialog}').open")
    page.evaluate(f"document.querySelector('#{dialog}').close()")
    browser.until(page, "!/entry|view/.test(location.hash)")


def vote_all(page: Page, keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_votes_are_blind_undone_kept_exported_and_imported(visit: Visit, discs: Any, tmp_path: Path) -> None:
    url, data = discs
    page = visit(url)
    page.keyboard.press("v")
    page.locator("#voter").fill("ada")
    page.locator("#voter").press("Enter")
    hidden = page.locator("#vote").evaluate("(node) => node.innerHTML")
    assert not any(word in hidden for word in ("stock", "searched", "e5", "seed", "0.5"))
    vote_all(page, "120")
    assert page.locator("#progress").inner_text() == "3 of 39"
    page.keyboard.press("u")
    assert page.locator("#progress").inner_text() == "2 of 39"
    order = page.evaluate("Gallery.plan().map(({ entry, left }) => entry.id + left)")
    page.reload()
    browser.until(page, "document.querySelector('#vote').open")
    assert page.evaluate("Gallery.plan().map(({ entry, left }) => entry.id + left)") == order
    assert page.locator("#progress").inner_text() == "2 of 39"
    page.keyboard.press("r")
    with page.expect_download() as download:
        page.locator("#export").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    by_id = {entry["id"]: entry for entry in data["entries"]}
    for place, vote in enumerate(lines):
        entry, left = by_id[order[place][:-1]], order[place][-1]
        assert vote.pop("at").endswith("Z")
        chosen = left if place == 0 else "ba"["ab".index(left)]
        first, second = (shot["media"]["original"] for shot in entry["shots"][:2])
        assert vote == {
            "format": "diffalign-votes", "version": 1, "page": data["id"], "blind": True, "voter": "ada",
            "entry": entry["id"], "prompt": entry["prompt"], "a": "stock", "b": "searched",
            "a_path": first, "b_path": second, "choice": chosen, "left": left,
        }  # fmt: skip
    late = json.loads(text.splitlines()[0]) | {"choice": "tie", "at": "2999-01-01T00:00:00Z"}
    bad = [late | {"choice": "both"}, late | {"page": "another"}, late | {"a": "searched", "b": "stock"}]
    (tmp_path / "more.jsonl").write_text("".join(f"{json.dumps(v)}\n" for v in [late, late, *bad]) + "no json\n")
    page.locator("#import").set_input_files(tmp_path / "more.jsonl")
    note = page.locator("#import-note").inner_text()
    assert note.startswith(
        "1 vote taken; 1 already known or replaced by a later one; 1 of other pages left out; 3 lines not"
    )
    assert page.evaluate("Gallery.votes('ada').map(({ choice }) => choice)")[0] == "tie"


def test_the_result_agrees_with_the_statistics_of_python(visit: Visit, discs: Any) -> None:
    url, data = discs
    page = visit(url + "#view=vote")
    vote_all(page, "112201121121120112121212121122012101212")
    assert page.locator("#result").is_visible()
    votes = page.evaluate("Gallery.votes()")
    a, b, ties = (sum(vote["choice"] == choice for vote in votes) for choice in ("a", "b", "tie"))
    share, n = wilson(b, a + b), a + b
    p = min(1.0, 2 * sum(comb(n, k) for k in range(min(a, b) + 1)) / 2**n)
    values = page.locator("#vote-table td").all_inner_texts()
    assert values[:3] == [str(a), str(b), str(ties)]
    assert values[3] == f"{100 * share.mean:.1f} % [{100 * share.lo:.1f}, {100 * share.hi:.1f}]"
    assert values[4] == f"{p:.3f}"
    gain = gains(data, "shapes")
    same = [(gain[v["entry"]] > 0) == (v["choice"] == "b") for v in votes if v["choice"] != "tie" and gain[v["entry"]]]
    agreed = wilson(sum(same), len(same))
    row = page.locator("#agreement tbody tr").first.locator("td").all_inner_texts()
    assert row == [f"{100 * agreed.mean:.1f} % [{100 * agreed.lo:.1f}, {100 * agreed.hi:.1f}]", str(len(same))]
    shoot(page, "desktop-result")


def test_statistics_hold_for_thousands_of_votes(visit: Visit, discs: Any) -> None:
    page = visit(discs[0])
    for wins, losses in ((0, 0), (8, 0), (3, 5), (1040, 960), (5000, 0)):
        n = wins + losses
        exact = min(1.0, 2 * sum(comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)
        assert page.evaluate(f"Gallery.signTest({wins}, {losses})") == pytest.approx(exact, rel=1e-9)
        if n:
            found = page.evaluate(f"Gallery.wilson({wins}, {n})")
            assert (found["lo"], found["hi"]) == pytest.approx((wilson(wins, n).lo, wilson(wins, n).hi))


def test_sides_are_balanced_and_the_order_is_shuffled(visit: Visit, discs: Any) -> None:
    page = visit(discs[0])
    draw = "() => { Gallery.clearVotes(); return Gallery.plan().map((step) => step.entry.id + step.left); }"
    plans = page.evaluate(f"Array.from({{ length: 200 }}, {draw})")
    assert {sum(step.endswith("a") for step in plan) for plan in plans} == {19, 20}  # of 39
    first = [plan[0] for plan in plans]
    assert 60 < sum(step.endswith("a") for step in first) < 140
    assert len(set(first)) > 40


def test_two_thousand_entries_scroll_smoothly_and_few_of_them_exist(visit: Visit, tmp_path: Path) -> None:
    page = visit(browser.write(tmp_path, browser.manifest(tmp_path, 2000)))
    page.locator("#entries").scroll_into_view_if_needed()
    frames, most = page.evaluate(
        """() => new Promise((done) => {
          const times = []; let most = 0, last = performance.now();
          const tick = (now) => {
            times.push(now - last); last = now;
            most = Math.max(most, document.querySelectorAll(".card").length);
            scrollBy({ top: 400, behavior: "instant" });
            times.length < 90 ? requestAnimationFrame(tick) : done([times.slice(2), most]);
          };
          requestAnimationFrame(tick);
        })"""
    )
    print(f"median frame {statistics.median(frames):.1f} ms, worst {max(frames):.0f} ms, {most} cards")
    assert statistics.median(frames) < 50
    assert most < 40
    page.evaluate("scrollTo({ top: 1e9, behavior: 'instant' })")
    page.wait_for_selector('[data-entry="e1999"]')


@pytest.mark.parametrize(
    ("name", "size", "theme"),
    [
        ("desktop", DESK, "light"),
        ("phone", PHONE, "dark"),
        pytest.param("desktop", DESK, "dark", marks=pytest.mark.slow),
        pytest.param("phone", PHONE, "light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(visit: Visit, discs: Any, name: str, size: Any, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    page = visit(discs[0], viewport=size, color_scheme=theme, is_mobile=size is PHONE, has_touch=size is PHONE)
    page.evaluate("for (const node of document.querySelectorAll('details')) node.open = true")
    views = {"list": "", "detail": "#entry=e1&mode=slider", "strip": "#entry=e4&mode=strip", "voting": "#view=vote"}
    for view, link in (views | {"result": "", "help": ""}).items():
        if view in views:
            page.goto(discs[0] + link)
        else:
            page.keyboard.press("r" if view == "result" else "?")
        found = axe.run(page, options={"preload": False}).response["violations"]
        assert [(view, rule["id"], [node["html"] for node in rule["nodes"]][:2]) for rule in found] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if view == "list":
            shoot(page, f"{name}-{theme}-top")
            page.evaluate("document.querySelector('#browse').scrollIntoView()")
        shoot(page, f"{name}-{theme}-{view}")


@pytest.mark.parametrize("link", ["", "#entry=e1&mode=slider", "#entry=e0&mode=strip", "#view=vote"])
def test_the_narrowest_phone_needs_no_sideways_scroll(visit: Visit, discs: Any, link: str) -> None:
    page = visit(discs[0] + link, viewport={"width": 320, "height": 640})
    wide = "[document.documentElement, ...document.querySelectorAll('dialog[open], dialog[open] > :not(.unseen)')]"
    assert page.evaluate(f"{wide}.every((node) => node.scrollWidth <= 320)")


def test_hostile_prompts_are_text(visit: Visit, tmp_path: Path) -> None:
    data = browser.manifest(tmp_path, 6)
    attack = "</script><img src=x onerror=window.hit=1>\"'><script>window.hit=1</script>"
    texts = [
        attack,
        "a 'quoted' \"prompt\"",
        "\u0642\u0631\u0635 \u0623\u0632\u0631\u0642",
        "\U0001f388" * 40,
        "long " * 2000,
    ]
    for entry, text in zip(data["entries"], [*texts, texts[1]], strict=True):
        entry |= {"prompt": text, "tags": [attack], "instruction": attack}
    data |= {"title": attack, "subtitle": attack, "notes": [attack], "unlike": [attack]}
    data["systems"][1]["name"] = attack
    data["entries"][1]["shots"][0]["media"]["shown"] = "javascript:window.hit=1"
    data["entries"][2]["shots"][0]["media"] = data["entries"][2]["shots"][1]["media"] | {"shown": "../../etc/passwd"}
    page = visit(browser.write(tmp_path, data))
    assert prompts(page)[0] == attack
    for i, text in enumerate(texts):
        page.goto(page.url.split("#")[0] + f"#entry=e{i}")
        assert page.locator("#detail .prompt").inner_text().strip() == text.strip()
    assert (
        page.evaluate("window.hit === undefined && document.scripts.length") == len(list(browser.PAGE.glob("*.js"))) + 1
    )
    assert page.locator("#detail .missing").count() == 0
    page.goto(page.url.split("#")[0] + "#entry=e2")
    assert "leaves the gallery" in page.locator("#detail .missing").first.inner_text()


def test_a_network_address_cannot_be_reached_from_the_page(visit: Visit, discs: Any) -> None:
    page = visit(discs[0])
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }))")
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'reached', () => 'refused')") == "refused"
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in line for line in visit.wrong)
    visit.wrong.clear()


def test_a_film_plays_in_step_and_samples_are_scrubbed(visit: Visit, discs: Any) -> None:
    page = visit(discs[0] + "#entry=e3&mode=side")
    page.locator("#detail .clock input").fill("5")
    shown = "[...document.querySelectorAll('#detail canvas')].map((node) => node.dataset.frame)"
    browser.until(page, f"{shown}.join() === '5,5'")
    assert page.locator("#detail canvas").first.evaluate("(node) => [node.width, node.height]") == [64, 64]
    left = browser.inked(page.locator("#detail canvas").first)
    assert abs(left - 32 * 6 / 9 / 64) < 0.03  # the sixth frame of eight, which lie in rows of three
    page.keyboard.press("p")
    browser.until(page, f"{shown}.join() !== '5,5' && new Set({shown}).size === 1")
    page.goto(discs[0] + "#entry=e1&mode=side")
    assert "from 0.1 to 0.72" in page.locator("#detail .spark").inner_text()
    page.locator("#detail .scrub input").fill("0")
    assert page.locator("#detail .scrub output").inner_text() == "step 0"
    assert "failed" in page.locator("#detail .checks .down").inner_text()


def test_videos_play_together_and_stop_on_one_frame(visit: Visit, tmp_path: Path) -> None:
    data = browser.manifest(tmp_path, 1)
    clip = browser.video(visit("about:blank"), tmp_path)
    for shot in data["entries"][0]["shots"]:
        shot["media"] = clip
    page = visit(browser.write(tmp_path, data) + "#entry=e0&mode=side")
    videos = "[...document.querySelectorAll('#detail video')]"
    page.get_by_role("button", name="Play").click()
    browser.until(page, f"{videos}.every((video) => !video.paused && video.currentTime > 0.1)")
    page.locator("#detail .clock input").fill("7")
    browser.until(page, f"{videos}.every((video) => video.paused && Math.abs(video.currentTime - 0.375) < 0.01)")


def test_a_missing_image_says_why(visit: Visit, discs: Any, tmp_path: Path) -> None:
    page = visit(discs[0] + "#entry=e4&mode=slider")
    assert page.locator("#detail .missing").inner_text() == "the safety filter refused it"
    data = browser.manifest(tmp_path, 3)
    data["entries"][0]["shots"][1] = None
    data["entries"][1]["shots"][1]["media"] = {"kind": "image", "shown": "media/cut.png", "width": 8, "height": 8}
    (tmp_path / "media" / "cut.png").write_bytes((tmp_path / "media" / "00.png").read_bytes()[:40])
    page = visit(browser.write(tmp_path, data))
    assert page.locator("[data-entry=e0] .missing").inner_text() == "No image of this system"
    page.wait_for_selector("[data-entry=e1] .missing")
    assert "could not be read: media/cut.png" in page.locator("[data-entry=e1] .missing").inner_text()


def test_data_that_is_newer_or_gone_or_empty_gets_a_sentence(visit: Visit, tmp_path: Path) -> None:
    for name in ("newer", "empty", "gone"):
        (tmp_path / name).mkdir()
    newer = visit(browser.write(tmp_path / "newer", browser.manifest(tmp_path / "newer", 1, version=2)))
    assert "version 2, and this page reads up to version 1" in newer.locator("#message").inner_text()
    empty = visit(browser.write(tmp_path / "empty", browser.manifest(tmp_path / "empty", 0)))
    assert "holds no entries" in empty.locator("#nothing").inner_text()
    gone = visit(browser.write(tmp_path / "gone", None))
    assert "manifest.js is not beside index.html" in gone.locator("#message").inner_text()
    visit.wrong[:] = [line for line in visit.wrong if "ERR_FILE_NOT_FOUND" not in line]


def test_one_system_is_shown_without_comparison_or_votes(visit: Visit, tmp_path: Path) -> None:
    page = visit(browser.write(tmp_path, browser.manifest(tmp_path, 5, systems=1)))
    assert page.locator(".card").first.locator("img").count() == 1
    assert page.locator("#to-vote, #outcome, #pair-table, #system-a").count() == 0
    assert not page.locator("#strips").is_visible()
    page.locator(".card a").first.click()
    assert page.locator("#detail .pane").count() == 1


def test_votes_work_where_the_browser_keeps_nothing(visit: Visit, discs: Any) -> None:
    page = visit("about:blank")
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })")
    page.goto(discs[0] + "#view=vote")
    page.keyboard.press("1")
    assert page.locator("#progress").inner_text() == "1 of 39"
    assert page.get_by_text("does not keep votes").is_visible()
