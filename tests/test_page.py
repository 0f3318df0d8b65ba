"""The live page, in a real chromium.

Chromium starts once, in the event loop of the session. Each test has a page of its own in it.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from playwright import async_api as playwright
from playwright.async_api._generated import LocatorAssertions
from yarl import URL

import server
from conftest import MakeRedis, RedisServer, Serve, Server, missing, run, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --disable-background-networking
    --disable-component-update --disable-sync --no-first-run"""
PATIENCE = 30_000  # ms
in_chromium = pytest.mark.asyncio(loop_scope="session")


class Browser:
    """A page in chromium, what it asked for, and all that went wrong in it."""

    def __init__(self, page: playwright.Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[playwright.Request] = []
        self.over: set[playwright.Request] = set()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self.on_console)
        page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request))
        page.on("requestfinished", lambda request: self.over.add(request))
        page.on("requestfailed", lambda request: self.over.add(request))

    def on_console(self, message: playwright.ConsoleMessage) -> None:
        # Chromium's own line for a failed fetch: that Redis or the server is away is no mistake.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def asked(self, words: str) -> int:
        """How often it has asked for such an address."""
        return sum(words in request.url for request in self.requests)

    @property
    def unanswered(self) -> set[playwright.Request]:
        return set(self.requests) - self.over

    async def stops_the_clock(self) -> None:
        """From now on, only tick() moves it on."""
        await self.page.clock.install()
        await self.page.reload()
        await self.titled("^Live")
        await self.page.clock.pause_at(datetime.now(UTC) + timedelta(seconds=5))
        await self.tick()
        await until(lambda: not self.unanswered)

    async def ticks(self, seconds: int) -> None:
        """Move its clock on."""
        for _ in range(seconds):
            await self.tick()

    async def tick(self) -> None:
        """Move its clock on by a second, and wait for the poll."""
        polls = self.asked("/health")
        await self.page.clock.run_for(1000)
        await until(lambda: self.asked("/health") > polls)

    def element(self, selector: str) -> LocatorAssertions:
        return playwright.expect(self.page.locator(selector))

    async def shows(self, selector: str, pattern: str) -> None:
        """Wait until an element's text matches."""
        await self.element(selector).to_have_text(re.compile(pattern), timeout=PATIENCE)

    async def open_tool(self) -> None:
        """Unfold the test run, which is there once the page has an answer."""
        await self.element("summary").to_be_visible(timeout=PATIENCE)
        await self.page.press("summary", "Enter")

    async def says(self, selector: str, text: str) -> None:
        """Wait until an element's text is this."""
        await self.element(selector).to_have_text(text, timeout=PATIENCE)

    async def titled(self, pattern: str) -> None:
        await playwright.expect(self.page).to_have_title(re.compile(pattern), timeout=PATIENCE)

    async def lists(self, *urls: str) -> None:
        """Wait until the rows are these."""
        await self.element("#rows .url").to_have_text([*urls], timeout=PATIENCE)

    async def chooses(self, day: str) -> None:
        await self.page.check(f"[name=day][value='{day}']")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[playwright.Browser]:
    if not CHROMIUM:
        missing("chromium")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def browser(chromium: playwright.Browser) -> AsyncIterator[Browser]:
    context = await chromium.new_context(viewport={"width": 1280, "height": 900}, locale="en-US")
    browser = Browser(await context.new_page())
    yield browser
    await context.close()
    assert browser.errors == []


@pytest.fixture(scope="module")
def shared_server(
    redis_process: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(stack, tmp_path_factory.mktemp("server"), redis_process.url)


@pytest.fixture
def process(shared_server: Server, redis_server: RedisServer) -> Server:
    """A server that nothing is done to but to count, on an empty Redis."""
    return shared_server


def fill(redis: RedisServer, counts: Mapping[str, int], day: str = server.ALL_TIME) -> None:
    """Write a list into Redis, of all time or of a day, as the server would have."""
    redis.client.zadd(server.of_day("url_rank", day), counts)
    redis.client.incrby(server.of_day("url_total", day), sum(counts.values()))
    if day == server.ALL_TIME:
        redis.client.mset({f"url_count:{url}": count for url, count in counts.items()})


@pytest.fixture
async def same_day() -> None:
    """In the last minute of a UTC day, wait for the next one: a test of today needs one day."""
    await until(lambda: f"{datetime.now(UTC):%H:%M}" != "23:59", seconds=70)


# --- What it shows --------------------------------------------------------------------------


@in_chromium
async def test_a_hostile_url_is_text(browser: Browser, process: Server) -> None:
    await process.hit(**{"%3Cimg%20src=x%20onerror=alert(1)%3E": 3, "a%0A%E2%80%AEb": 1})
    await browser.page.goto(process.base)
    await browser.lists("/api/<img src=x onerror=alert(1)>/", "/api/a%0A%E2%80%AEb/")
    await browser.shows("#rows tr:first-child", r">/\s*3\s*75\.0%$")
    await browser.page.fill("#text", "<img src=x")
    await browser.says("#rows mark", "<img src=x")
    await browser.says("#found", "1 URL contains “<img src=x”: 3 hits")
    await browser.element("#rows img").to_have_count(0)


@in_chromium
async def test_counts_go_on_through_an_outage_and_the_page_says_so(
    browser: Browser, own_redis: MakeRedis, serve: Serve
) -> None:
    redis = own_redis()
    process = serve(redis.url)
    await process.hit(hello=4)
    await browser.page.goto(process.base)
    await browser.titled("^Live")
    await browser.says("#hits", "4")
    await browser.says("#urls", "1")
    await browser.says("#redis", "Redis is connected")
    await browser.says("#since", "Since counting began")

    redis.kill()
    await process.hit(hello=1)
    await browser.says("#redis", "Redis is away, 1 hit held in memory")
    await browser.shows("#status", r"^Waiting for Redis\. Counts are as of \d")
    await browser.titled("^Redis is away")
    await browser.page.fill("#text", "hell")
    await browser.says("#found", "Waiting for Redis")

    await asyncio.to_thread(redis.start)
    await browser.says("#found", "1 URL contains “hell”: 5 hits")
    await browser.says("#redis", "Redis is connected")

    await process.stop()
    await browser.shows("#status", r"^The server does not answer, .* as of \d")
    await browser.titled("^No answer")
    await browser.page.fill("#text", "hello")
    await browser.says("#found", "Waiting for the server")
    assert {URL(request.url).authority for request in browser.requests} == {
        f"127.0.0.1:{process.port}"
    }


@in_chromium
async def test_redis_that_refuses_is_not_called_away(
    browser: Browser, own_redis: MakeRedis, serve: Serve
) -> None:
    redis = own_redis()
    process = serve(redis.url)
    await browser.page.goto(process.base)
    await browser.titled("^Live")
    redis.client.config_set("maxmemory", 1)
    await process.hit(hello=2)
    await browser.shows("#redis", "^Redis refuses, 2 hits held in memory: .*maxmemory")
    await browser.titled("^Redis refuses")
    redis.client.config_set("maxmemory", 0)
    await browser.says("#redis", "Redis is connected")
    await browser.lists("/api/hello/")


@in_chromium
async def test_an_empty_list_says_how_to_begin_and_memory_says_since_when(
    browser: Browser, serve: Serve
) -> None:
    process = serve()
    await browser.page.goto(process.base)
    await browser.says("#redis", "No Redis: counts are lost when the server stops")
    await browser.says("#nothing", "Nothing is counted yet")
    await browser.says("#example", f"curl {process.base}/api/hello/")
    await browser.shows("#since", r"^Since the server started, \d+ s ago$")


@in_chromium
async def test_the_highest_rate_is_that_of_the_time_that_the_tab_has_seen(
    browser: Browser, process: Server
) -> None:
    await browser.page.goto(process.base)
    await browser.stops_the_clock()
    await process.hit(hello=50)
    await browser.tick()
    await browser.says("#highest", "50")
    await browser.shows("#highest-in", r"^Highest in \d+ s$")
    for time, ahead, highest in [("1 min", 60, "50"), ("2 min", 60, "50"), ("3 min", 300, "0")]:
        await browser.page.clock.fast_forward(ahead * 1000)
        await browser.says("#highest-in", f"Highest in {time}")
        await browser.says("#highest", highest)


@in_chromium
async def test_show_more_ends_at_500_rows_and_hands_the_focus_on(
    browser: Browser, redis_server: RedisServer, process: Server
) -> None:
    page = browser.page
    fill(redis_server, {"/api/much/": 501} | {f"/api/n{n}/": 1 for n in range(500)})
    await page.goto(process.base)
    for shown in (20, 120, 220, 320, 420):
        await browser.says("#shown", f"{shown} of 501 URLs")
        await browser.element("#rows tr").to_have_count(shown)
        await page.press("#more", "Enter")
    await browser.says("#shown", "500 of 501 URLs")
    await browser.shows("#rows tr:last-child", r"\s*1\s*<0\.1%$")
    await browser.element("#more").to_be_hidden()
    await browser.element("#all").to_be_focused()
    await page.press("#all", "Enter")
    await browser.shows("body", r'^\[\{"count": 501, .*"/api/n0/"\}\]\s*$')


@in_chromium
async def test_a_long_url_unfolds_at_the_focus_and_keeps_it(
    browser: Browser, process: Server
) -> None:
    await process.hit(short=3, **{"x" * 500: 2})
    await browser.page.goto(process.base)
    long = browser.page.locator(".url", has_text="xxx")
    await playwright.expect(long).to_have_attribute("tabindex", "0")
    await long.focus()
    await process.hit(**{"x" * 500: 2})
    await browser.shows("#rows tr:first-child", r"x/\s*4\s*57\.1%$")  # the row has moved
    await playwright.expect(long).to_be_focused()


@in_chromium
async def test_it_works_under_a_path(browser: Browser, process: Server) -> None:
    async with under_a_path(process) as base:
        await browser.page.goto(base)
        await browser.says("#example", f"curl {base}api/hello/")
        await browser.open_tool()
        await browser.page.fill("#n", "30")
        await browser.page.press("#n", "Enter")
        await browser.shows("#outcome", "^30 of 30 answered")
        await browser.says("#hits", "30")
        await browser.page.fill("#text", "/api/")
        await browser.shows("#found", " URLs contain “/api/”")
        await browser.element("#all").to_have_attribute("href", "stats/?contains=%2Fapi%2F")
    assert all(request.url.startswith(base) for request in browser.requests)


@in_chromium
async def test_it_works_when_its_address_has_a_password(browser: Browser, process: Server) -> None:
    await browser.page.goto(process.base.replace("//", "//owner:secret@"))
    await browser.says("#hits", "0")


@asynccontextmanager
async def under_a_path(process: Server) -> AsyncIterator[str]:
    """A proxy in front: location /tracker/ { proxy_pass http://tracker/; }"""

    async def pass_on(request: web.Request) -> web.Response:
        target = URL(process.base + request.raw_path.removeprefix("/tracker"), encoded=True)
        async with session.request(request.method, target, headers=request.headers) as answer:
            headers = {name: value for name, value in answer.headers.items() if name[0] in "CX"}
            headers.pop("Content-Length", None)
            headers.pop("Connection", None)
            return web.Response(body=await answer.read(), status=answer.status, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/tracker/{tail:.*}", pass_on)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/tracker/"
    finally:
        await runner.cleanup()


def with_hashes(page: str, folder: Path) -> str:
    """What `make hashes` makes of it."""
    copy = folder / "page.html"
    copy.write_text(page)
    assert run(sys.executable, "tools/page_hashes.py", str(copy)).returncode == 0
    return copy.read_text()


def test_its_policy_allows_its_own_style_and_script_and_nothing_else(tmp_path: Path) -> None:
    page = server.DASHBOARD.read_text()
    assert page == with_hashes(page, tmp_path), "the page has changed: run `make hashes`"
    found = re.search('<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert found
    assert found.end() < page.index("<style")
    assert re.sub("'sha256-[^' ]{44}'", "HASH", found[1]).split("; ") == [
        *("default-src 'none'", "base-uri 'none'", "form-action 'none'", "connect-src 'self'"),
        *("img-src data:", "style-src HASH", "script-src HASH"),
    ]


@pytest.mark.parametrize("block", ["<style>", "<script>"])
def test_a_change_without_make_hashes_is_noticed(tmp_path: Path, block: str) -> None:
    changed = server.DASHBOARD.read_text().replace(block, block + " ")
    assert changed != with_hashes(changed, tmp_path)


def test_it_weighs_28_kb_at_most_and_asks_nobody_else() -> None:
    page = server.DASHBOARD.read_text()
    assert len(page.encode()) <= 28_000
    assert "://" not in re.sub(r"(?<!:)//.*", "", page).replace(r":\/\/", "")
    assert not re.search("innerHTML|insertAdjacentHTML|outerHTML", page)


# --- Days -----------------------------------------------------------------------------------


@in_chromium
async def test_a_day_has_totals_and_shares_of_its_own(
    browser: Browser, redis_server: RedisServer, process: Server, same_day: None
) -> None:
    before, yesterday = server.utc_day(2), server.utc_day(1)
    fill(redis_server, {"/api/old/": 90, "/api/new/": 6})
    fill(redis_server, {"/api/old/": 10}, before)
    fill(redis_server, {"/api/old/": 15, "/api/new/": 5}, yesterday)
    await process.hit(new=4)
    await browser.page.goto(process.base)
    for day, hits, urls, since, rows in [
        ("", "100", "2", "^Since counting began$", ["old/ 90 90.0%", "new/ 10 10.0%"]),
        ("today", "4", "1", ", since 00:00 UTC$", ["new/ 4 100.0%"]),
        ("yesterday", "20", "2", ", UTC$", ["old/ 15 75.0%", "new/ 5 25.0%"]),
    ]:
        await browser.chooses(day)
        await browser.shows("#since", since)
        await browser.says("#hits", hits)
        await browser.says("#urls", urls)
        await browser.says("#hits-of", f"Hits {day or 'in all'}")
        await browser.says("#title", f"Most requested {day}".strip())
        await browser.element("#rows tr").to_have_text(
            [re.compile(row.replace(" ", r"\s*")) for row in rows]
        )
    await browser.page.fill("#date", before)
    await browser.says("#hits", "10")
    await browser.says("#hits-of", "Hits that day")
    await browser.lists("/api/old/")
    await browser.element("[name=day]:checked").to_have_count(0)
    await browser.page.reload()  # the address has kept the day
    await browser.lists("/api/old/")
    await browser.element("#date").to_have_value(before)
    await browser.chooses("")
    await browser.element("#date").to_have_value("")
    await browser.says("#hits", "100")


@in_chromium
async def test_a_day_without_hits_says_so(
    browser: Browser, redis_server: RedisServer, process: Server
) -> None:
    fill(redis_server, {"/api/old/": 90})
    await browser.page.goto(process.base)
    await browser.lists("/api/old/")
    await browser.chooses("yesterday")
    await browser.says("#nothing", "Nothing was counted yesterday")
    await browser.says("#kept", "Days that are kept: 7")
    await browser.says("#hits", "0")
    await browser.element("#table").to_be_hidden()
    await browser.element("#example").to_be_hidden()
    await browser.page.fill("#date", "2020-02-29")
    await browser.says("#nothing", "Nothing was counted on February 29, 2020")
    await browser.page.fill("#text", "old")
    await browser.says("#found", "Nothing contains “old” on February 29, 2020")
    await browser.element("#empty").to_be_hidden()


@in_chromium
async def test_polls_do_not_disturb_a_date_that_is_being_typed(
    browser: Browser, process: Server
) -> None:
    await browser.page.clock.install()
    await browser.page.goto(process.base)
    await browser.page.focus("#date")
    for digits in ("02", "29", "2020"):  # as en-US has them
        await browser.page.keyboard.type(digits)
        await browser.ticks(2)
    await browser.element("#date").to_have_value("2020-02-29")
    await browser.says("#nothing", "Nothing was counted on February 29, 2020")


@in_chromium
async def test_where_no_days_are_kept_none_can_be_chosen(browser: Browser, serve: Serve) -> None:
    process = serve(KEEP_DAYS="0")
    await process.hit(hello=1)
    await browser.page.goto(f"{process.base}/#day=today")  # a bookmark of other times
    await browser.lists("/api/hello/")
    await browser.element("#days").to_be_hidden()
    await browser.says("#hits-of", "Hits in all")


# --- Search ---------------------------------------------------------------------------------


@in_chromium
async def test_a_search_shows_rows_as_one_types_and_marks_the_text(
    browser: Browser, process: Server
) -> None:
    await process.hit(**{"Pricing": 3, "blog/pricing-news": 2, "blog": 1})
    await browser.page.goto(process.base)
    await browser.page.type("#text", "PRIC")
    await browser.says("#found", "2 URLs contain “PRIC”: 5 hits")
    await browser.lists("/api/Pricing/", "/api/blog/pricing-news/")
    await browser.element("#rows mark").to_have_text(["Pric", "pric"])
    await browser.shows("#rows tr:first-child", r"\s*3\s*50\.0%$")  # of all hits
    await browser.says("#hits", "6")
    await browser.says("#urls", "3")
    await process.hit(pricing=4)  # and the result stays fresh
    await browser.says("#found", "3 URLs contain “PRIC”: 9 hits")
    await browser.says("#hits", "10")
    await browser.page.fill("#text", "NEWS")
    await browser.lists("/api/blog/pricing-news/")
    await browser.says("#rows mark", "news")
    await browser.page.fill("#text", "PRIC")
    await browser.page.type("#text", "ey")
    await browser.says("#found", "Nothing contains “PRICey”")
    await browser.element("#table").to_be_hidden()
    await browser.page.fill("#text", "")
    await browser.says("#found", "")
    await browser.element("#rows tr").to_have_count(4)
    await browser.element("#rows mark").to_have_count(0)


@in_chromium
async def test_a_whole_url_finds_its_row_however_it_is_pasted(
    browser: Browser, process: Server
) -> None:
    paths = ["cart", "api/users", "shop/7", "caf%C3%A9/a%20b", "50%25", "a%3Fb", "x%2By"]
    await process.hit(**dict.fromkeys(paths, 1))
    await browser.page.goto(process.base)
    for pasted, row in {
        "/api/cart/": "/api/cart/",
        " api/cart ": "/api/cart/",
        "http://example.com/api/cart?x=/1#y": "/api/cart/",
        "/api/users": "/api/api/users/",  # of a site that is mirrored
        "https://www.example.com/api/users/?x=1": "/api/api/users/",
        "https://www.example.com/shop/7?x=1#y": "/api/shop/7/",
        "www.example.com/shop/7": "/api/shop/7/",
        "localhost:5000/api/shop/7/": "/api/shop/7/",
        "/api/café/a b": "/api/café/a b/",
        "https://example.com/caf%C3%A9/a%20b": "/api/café/a b/",
        "/api/50%": "/api/50%/",
        "/50%25": "/api/50%/",
        "a?b": "/api/a?b/",
        "x+y": "/api/x+y/",
    }.items():
        await browser.page.fill("#text", pasted)
        await browser.page.press("#text", "Enter")
        await browser.lists(row)
    await browser.page.fill("#text", "https://example.com/nowhere?x=1")
    await browser.says("#found", "Nothing contains “/nowhere/”")


@in_chromium
async def test_the_row_of_a_whole_url_comes_first_even_from_the_end_of_the_list(
    browser: Browser, redis_server: RedisServer, process: Server
) -> None:
    posts = {f"/api/blog/{n}/": 2 + n for n in range(50)}
    fill(redis_server, {"/api/blog/": 1, "/api/": 1, **posts})
    await browser.page.goto(process.base)
    for pasted, row in {"https://a.org/blog": "/api/blog/", "https://a.org": "/api/"}.items():
        await browser.page.fill("#text", pasted)
        await browser.says("#rows tr:first-child .url", row)
        await browser.element("#rows tr").to_have_count(20)
        await browser.shows("#found", "^More than 20 URLs contain")
        await browser.says("#shown", "The first 20 URLs")
    await browser.page.press("#more", "Enter")
    await browser.says("#found", "52 URLs contain “/”: 1,327 hits")
    await browser.element("#all").to_be_focused()


@in_chromium
async def test_an_unknown_url_is_not_asked_for_each_second(
    browser: Browser, redis_server: RedisServer, process: Server
) -> None:
    fill(redis_server, {f"/api/{n}/": 1 for n in range(50)})
    await browser.page.clock.install()
    await browser.page.goto(process.base)
    await browser.page.fill("#text", "/api/")
    await browser.ticks(5)
    await browser.shows("#found", "^More than 20")
    await until(lambda: browser.asked("contains=") > 2)
    assert browser.asked("stats/api/") == 2  # /api/ and /api/api/, once


@in_chromium
async def test_a_search_that_is_kept_by_enter_is_there_again_after_a_reload(
    browser: Browser, process: Server, same_day: None
) -> None:
    page = browser.page
    await process.hit(cart=2, blog=1)
    await page.goto(process.base)
    await browser.element("#rows tr").to_have_count(2)
    await page.fill("#text", "art")
    await browser.lists("/api/cart/")
    assert page.url == f"{process.base}/"
    await page.press("#text", "Enter")
    await browser.chooses("today")
    await playwright.expect(page).to_have_url(f"{process.base}/#day=today&contains=art")
    await page.reload()
    await browser.lists("/api/cart/")
    await browser.element("#text").to_have_value("art")
    await browser.element("[value=today]").to_be_checked()
    await browser.says("#found", "1 URL contains “art” today: 2 hits")
    await page.fill("#text", "")
    await page.press("#text", "Enter")
    await browser.chooses("")
    await browser.element("#rows tr").to_have_count(2)
    assert page.url == f"{process.base}/"


@in_chromium
async def test_a_slow_search_is_not_asked_again_and_typing_ends_it(
    browser: Browser, process: Server
) -> None:
    page, gate, ended = browser.page, asyncio.Event(), list[str]()

    async def hold(route: playwright.Route) -> None:
        await gate.wait()
        with suppress(playwright.Error):  # of a search that is over
            await route.continue_()

    await process.hit(cart=2, blog=1)
    await page.route("**/stats/?*contains=*", hold)
    page.on("requestfailed", lambda request: ended.append(request.url))
    await page.clock.install()
    await page.goto(process.base)
    await browser.lists("/api/cart/", "/api/blog/")
    await page.fill("#text", "cart")
    await browser.ticks(5)
    await browser.says("#found", "Searching")
    assert browser.asked("contains=") == 1
    await page.fill("#text", "blog")
    await browser.ticks(5)
    await until(lambda: ended)
    assert "contains=cart" in ended[0]
    assert browser.asked("contains=") == 2
    gate.set()
    await browser.says("#found", "1 URL contains “blog”: 1 hit")
    await browser.ticks(12)  # more than it has taken
    await until(lambda: browser.asked("contains=") > 2)  # after an answer it is asked again
    assert len(ended) == 1


# --- Test run -------------------------------------------------------------------------------


@in_chromium
async def test_a_run_is_folded_away_until_it_is_wanted_and_reports(
    browser: Browser, process: Server
) -> None:
    await browser.page.goto(process.base)
    await browser.element("#start").to_be_hidden()
    await browser.open_tool()
    await browser.shows("#note", "They stay in the counts")
    await browser.page.press("#n", "Enter")
    await browser.shows("#outcome", r"^1,000 of 1,000 answered in [\d.]+\ss\s+[\d,]+ a second, ")
    await browser.shows("#outcome", r"seed \d+\s+Latency in ms: min .* p50 .* p95 .* p99 ")
    await browser.says("#hits", "1,000")


# After 100 requests, a run waits as long as a file is there.
HELD = """
import asyncio, functools, os
started = 0
async def hold(*_):
    global started
    started += 1
    while started > 100 and os.path.exists(os.environ["HOLD"]):
        await asyncio.sleep(0.01)
trace = server.aiohttp.TraceConfig()
trace.on_request_start.append(hold)
session = functools.partial(server.aiohttp.ClientSession, trace_configs=[trace])
server.aiohttp.ClientSession = session
server.main()
"""


@in_chromium
async def test_a_run_shows_that_it_goes_on_and_another_tab_starts_no_second(
    browser: Browser, serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hold = tmp_path_factory.mktemp("hold") / "hold"
    hold.touch()
    process = serve(code=HELD, HOLD=str(hold))
    other = Browser(await browser.page.context.new_page())
    for tab in (browser, other):
        await tab.page.goto(process.base)
        await tab.open_tool()
        await tab.page.fill("#n", "300")
    await browser.page.press("#n", "Enter")
    await browser.says("#outcome", "Sending 300 requests")
    await browser.says("#run", "Running")
    await browser.element("#progress").to_be_visible()
    await browser.page.press("#n", "Enter")  # does nothing
    await browser.says("#hits", "100")
    await other.page.press("#n", "Enter")
    await other.says("#outcome", "wait: a test run is under way")
    hold.unlink()
    await browser.shows("#outcome", "^300 of 300 answered")
    await browser.says("#run", "Start")
    await browser.element("#progress").to_be_hidden()
    assert browser.asked("/test/") == 1


@in_chromium
async def test_a_run_is_bounded_by_what_the_server_allows(browser: Browser, serve: Serve) -> None:
    await browser.page.goto(serve(MAX_TEST_REQUESTS="50").base)
    await browser.open_tool()
    await browser.element("#n").to_have_js_property("max", "50")
    for wrong in ("51", "0", "1.5", ""):
        await browser.page.fill("#n", wrong)
        await browser.page.press("#n", "Enter")
        await browser.element("#n:invalid").to_be_focused()
    assert browser.asked("/test/") == 0
    await browser.page.fill("#n", "50")
    await browser.page.press("#n", "Enter")
    await browser.shows("#outcome", "^50 of 50 answered")


@in_chromium
async def test_where_runs_are_off_there_is_no_tool_for_them(browser: Browser, serve: Serve) -> None:
    process = serve(MAX_TEST_REQUESTS="0")
    await process.hit(hello=1)
    await browser.page.goto(process.base)
    await browser.lists("/api/hello/")
    await browser.element("#tool").to_be_hidden()


# --- The picture ---------------------------------------------------------------------------


def shop_urls() -> list[str]:
    """What a shop is asked for, the most popular first."""
    fixed = "products/123 cart pricing users/42/orders search login products/7 blog/how-we-price"
    more = [f"products/{n}" for n in range(200, 260)] + [f"users/{n}/orders" for n in range(50, 80)]
    random.Random(1).shuffle(more)
    return [f"/api/{path}/" for path in fixed.split() + more]


async def three_minutes(browser: Browser, process: Server) -> None:
    """Traffic as of a shop, sent as fast as it goes while the page's clock runs ahead."""
    urls, rng, total = shop_urls(), random.Random(1), 0
    weights = [1 / rank for rank in range(1, len(urls) + 1)]
    async with aiohttp.ClientSession(process.base) as session:
        for second in range(180):
            wave = 70 + 40 * math.sin(second / 25) + 15 * math.sin(second / 7)
            for url in rng.choices(urls, weights, k=round(wave * rng.uniform(0.85, 1.15))):
                async with session.get(url) as response:
                    total += response.status == 200
            await browser.page.clock.run_for(1000)
            await browser.says("#hits", f"{total:,}")


@pytest.mark.picture
@in_chromium
async def test_take_the_picture_of_the_page(
    browser: Browser, process: Server, same_day: None, tmp_path: Path
) -> None:
    """`make picture`: the page as an owner sees it, after three minutes of traffic."""
    page = browser.page
    await page.emulate_media(color_scheme="light", reduced_motion="reduce")
    await page.goto(f"{process.base}/#day=today")
    await browser.stops_the_clock()
    await three_minutes(browser, process)
    folder = Path(os.environ.get("PICTURES", tmp_path))
    await page.screenshot(path=folder / "page.png", full_page=True)
