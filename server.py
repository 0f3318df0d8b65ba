# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.5", "prometheus-client==0.26.0", "redis[hiredis]==8.1.0",
#   "structlog==26.1.0", "uvloop==0.23.0"]
# ///
"""Request Statistics Tracker: counts every request under /api/ by URL path, in Redis.

    any method /api/...   200 {"url": "/api/products/123/"}, the URL as counted
    GET /stats/           [{"count": 2, "url": "/api/products/123/"}, ...], most requested
                          first; ?limit= and ?offset= page it, ?day= takes one UTC day
                          (today, yesterday or 2026-11-26), ?contains= the URLs that have
                          a text in them. X-Total-Count and X-Total-Hits are the totals
                          of the day or of all time; a search gives no X-Total-Count
    GET /stats/api/...    one URL: {"count": 2, "url": "/api/products/123/", "rank": 1},
                          or 404; ?day= likewise
    POST /test/<n>/       sends n random requests to this server and reports on them;
                          ?seed= repeats a run, ?concurrency= is 1 to 256 (32)
    GET /health           {"status": "healthy", "redis": "connected", ...}, or 503
    GET /metrics, GET /   figures for Prometheus; the live page

A request counts once, under its decoded path (at most 2,048 characters) with a trailing
slash. Its answer means that the hit is in Redis or, while Redis is away, held in memory
(64 MB of URLs) until it is back. Its day is that on which Redis gets it. Errors are JSON:
{"error": "what is wrong, and what would be right"}. A list that is read while counts
change can repeat or miss a URL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import random
import re
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache, partial
from json.encoder import encode_basestring_ascii as json_string
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import prometheus_client as prometheus
import redis
import structlog
import uvloop
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from hiredis import pack_command
from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from yarl import URL

__version__ = "2.0.0"

log: structlog.types.FilteringBoundLogger = structlog.get_logger()


@lru_cache(1000)  # called again with the same words, it does nothing
def log_once(event: str, **facts: str) -> None:
    log.error(event, **facts)


# --- Settings ---------------------------------------------------------------------------
# main() reads them once. Other programs give create_app() a Settings of their own.

LOCAL_REDIS = "redis://localhost:6379/0"
NO_LIMIT = 10**15
STARTED = time.monotonic()


@dataclass(frozen=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 5000
    redis_url: str = ""
    max_test_requests: int = 100_000
    max_urls: int = 10_000_000
    keep_days: int = 7


OPTIONS = [  # setting, its lowest and highest number, what --help says of it
    ("host", None, "127.0.0.1; 0.0.0.0 listens to the network, :: by IPv6, too"),
    ("port", (0, 65_535), "5000; 0 takes any free one"),
    ("redis_url", None, f"unset: {LOCAL_REDIS} if it can be used, else memory"),
    ("max_test_requests", (0, NO_LIMIT), "100000 in one test run; 0 turns /test/ off"),
    ("max_urls", (1, NO_LIMIT), '10000000; beyond them a new URL counts as "(other)"'),
    ("keep_days", (0, 36_500), "7 days of which the list is kept; 0 keeps none"),
]


def read_settings(arguments: list[str]) -> Settings:
    """From flags, else the environment, else the defaults. What is wrong exits with 2."""
    parser = argparse.ArgumentParser("server.py", usage=argparse.SUPPRESS, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.add_argument("--version", action="version", version=__version__)
    for name, limits, meaning in OPTIONS:
        flag = "--" + name.replace("_", "-")
        variable = name.upper()
        default = os.environ.get(variable) or getattr(Settings, name)
        kind = partial(whole_number, variable, limits) if limits else str
        parser.add_argument(flag, metavar=variable, default=default, type=kind, help=meaning)
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Names only: what stands beside them may be a REDIS_URL with its password.
        names = [word for word in unknown if re.fullmatch("--[a-z_-]+", word)]
        parser.error(f"not known: {', '.join(names) or 'an argument'}; --help lists what is")
    try:
        # Making a store connects to nothing, but finds out whether the address is one.
        RedisStore(known.redis_url or LOCAL_REDIS, max_urls=0, keep_days=0)
    except Exception:  # not with redis-py's words, which may quote a part of the password
        parser.error("argument --redis-url: REDIS_URL is no address like redis://host:6379/0")
    return Settings(**vars(known))


def whole_number(name: str, limits: tuple[int, int], text: str) -> int:
    """The number that text spells in ASCII digits. Raises argparse.ArgumentTypeError."""
    lowest, highest = limits
    if re.fullmatch("[0-9]{1,16}", text) and lowest <= int(text) <= highest:
        return int(text)
    # A text with other signs is not shown: it may be a REDIS_URL in the wrong place.
    shown = repr(text) if re.fullmatch(r"[\w.+-]{0,40}", text) else "no number"
    error = f"{name} is {shown}: use a whole number from {lowest} to {highest}"
    raise argparse.ArgumentTypeError(error)


# --- Middleware and handlers ------------------------------------------------------------
# Every request passes the one middleware. A handler parses, asks the store, answers.

COMMITS: web.AppKey[GroupCommit] = web.AppKey("commits")
SETTINGS: web.AppKey[Settings] = web.AppKey("settings")
# The run under way, if any. A list, because a started application takes no new values.
TEST_RUNS: web.AppKey[list[TestRun]] = web.AppKey("test_runs")

Store: TypeAlias = "RedisStore | MemoryStore"
Rows = list[tuple[str, int]]  # URL and count, most requested first
Pages = AsyncIterator[Rows]  # of 200 rows at most
ALL_TIME = ""  # stands where a day like "2026-11-26" could
MAX_PATH = 2048  # characters
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
HEADERS = {**NOSNIFF, "Content-Type": "application/json", "Cache-Control": "no-store"}
RETRY_LATER = {"Retry-After": "1"}
NOT_HERE = "nothing is here: paths that start with /api/ are counted, /stats/ lists them"


class StoreError(Exception):
    """The store cannot do this now. The text says why; the client gets a 503 with it."""


@web.middleware
async def count_and_guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count a request under /api/, answer errors in JSON, note how long it took."""
    began = time.perf_counter()
    try:
        # As this is the only middleware, handler is the very function of the route. To
        # look at the path would be wrong: /api%2Fx is /api/x once decoded, but a 404.
        if handler is api:
            if len(request.path) > MAX_PATH:
                text = f"a path has at most {MAX_PATH} characters"
                raise web.HTTPRequestURITooLong(text=text)
            await request.app[COMMITS].hit(with_slash(request.path))
        response = await handler(request)
    except web.HTTPNotFound:
        response = answer({"error": NOT_HERE}, 404)
    except web.HTTPException as error:
        told = f"use {error.headers['Allow']} here" if error.status == 405 else error.text
        response = answer({"error": told}, error.status, error.headers)
    except StoreError as error:
        response = answer({"error": str(error)}, 503, RETRY_LATER)
    except Exception:
        log.exception("unexpected error", path=str(request.rel_url))
        response = answer({"error": "unexpected error: the server's log has it"}, 500)
    method = request.method if request.method in hdrs.METH_ALL else "OTHER"
    route = ROUTE_NAMES.get(handler, "none")  # none: a 404 or 405
    seconds_of(method, route, response.status).observe(time.perf_counter() - began)
    return response


BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # s
REQUESTS = prometheus.Histogram(
    "http_request_duration_seconds",
    "Time from the arrival of a request to its answer",
    ("method", "route", "code"),
    buckets=BUCKETS,
)
# Cached, for labels() takes as long as observe().
seconds_of = lru_cache(1024)(REQUESTS.labels)


def with_slash(path: str) -> str:
    return path if path[-1] == "/" else path + "/"


def answer(
    data: object, status: int = 200, more_headers: Mapping[str, str] | None = None
) -> web.Response:
    text = json.dumps(data) + "\n"
    headers = {**(more_headers or {}), **HEADERS}
    return web.Response(body=text.encode(), status=status, headers=headers)


async def api(request: web.Request) -> web.Response:
    # Not json.dumps(), which takes longer to find its encoder than to encode one string.
    url = json_string(with_slash(request.path))
    return web.Response(body=f'{{"url": {url}}}\n'.encode(), headers=HEADERS)


async def stats(request: web.Request) -> web.Response:
    refuse_unknown(request, ("limit", "offset", "day", "contains"))
    limit = number(request.query, "limit", default=NO_LIMIT)
    offset = number(request.query, "offset", default=0)
    text = request.query.get("contains", "")
    day = day_asked_for(request)
    store = store_of(request)
    hits, urls = await store.totals(day)
    headers = {**HEADERS, "X-Total-Hits": str(hits)}
    if text:
        pages = matching(store.ranked(day, 0, NO_LIMIT), text, offset, limit)
    else:
        headers["X-Total-Count"] = str(urls)
        pages = store.ranked(day, offset, limit)
    # One page is read before the headers go out: until then a failure can be a 503. The
    # others are read while the list is sent. So HEAD, which sends none, reads no more.
    first: Rows = await anext(pages, [])
    return web.Response(body=json_list(request, first, pages), headers=headers)


async def matching(pages: Pages, text: str, offset: int, limit: int) -> Pages:
    """Of the rows whose URL has the text, upper or lower case, skip some and pass on some."""
    wanted = text.casefold()
    async for rows in pages:
        found = [(url, count) for url, count in rows if wanted in url.casefold()]
        passed = found[offset : offset + limit]
        yield passed  # also if it is empty: json_list() sees then whether the client has gone
        offset = max(0, offset - len(found))
        limit -= len(passed)
        if not limit:
            return


async def json_list(request: web.Request, first: Rows, more: Pages) -> AsyncIterator[bytes]:
    """The list, a page at a time. If this raises, aiohttp breaks the connection off."""
    yield b"[" + json_rows(first)
    separator = b", " if first else b""
    async for rows in more:
        if request.transport is None:  # the client has gone
            return
        if rows:
            yield separator + json_rows(rows)
            separator = b", "
    yield b"]\n"


def json_rows(rows: Rows) -> bytes:
    objects = (f'{{"count": {count}, "url": {json_string(url)}}}' for url, count in rows)
    return ", ".join(objects).encode()


async def stats_of_url(request: web.Request) -> web.Response:
    refuse_unknown(request, ("day",))
    day = day_asked_for(request)
    url = with_slash(request.path.removeprefix("/stats"))
    found = await store_of(request).find(day, url)
    if not found:
        return answer({"error": f"{url} was not requested"}, 404)
    count, rank = found
    return answer({"count": count, "url": url, "rank": rank})


OTHER_SITE = (
    "a page of another site may not start a test run (behind a proxy this site looks like "
    "another one, unless the proxy passes the Host header on: in nginx, $http_host)"
)


async def test(request: web.Request) -> web.Response:
    refuse_unknown(request, ("seed", "concurrency"))
    most = request.app[SETTINGS].max_test_requests
    if not most:
        raise web.HTTPForbidden(text="test runs are off: MAX_TEST_REQUESTS is 0")
    if from_another_site(request.headers):
        raise web.HTTPForbidden(text=OTHER_SITE)
    n = number(request.match_info, "n", default=1, limits=(1, most))
    concurrency = number(request.query, "concurrency", default=32, limits=(1, 256))
    seed = number(request.query, "seed", default=random.randrange(10**9))
    runs = request.app[TEST_RUNS]
    if runs:
        text = "wait: a test run is under way"
        raise web.HTTPTooManyRequests(text=text, headers=RETRY_LATER)
    segments, urls = random_urls(n, seed)
    run = TestRun(n, urls)
    runs.append(run)
    # The socket that this came by: a Host header could aim the run at somebody else.
    host, port, *_ = request.get_extra_info("sockname")
    try:
        report = await run.send(URL.build(scheme="http", host=host, port=port), concurrency)
    finally:
        runs.remove(run)
    return answer({**report, "concurrency": concurrency, "seed": seed, "segments": segments})


def from_another_site(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site made a browser send this. As in Go's net/http."""
    site = headers.get("Sec-Fetch-Site")
    if site:
        return site not in ("same-origin", "none")
    host = headers.get("Host")
    return headers.get("Origin") not in (None, f"http://{host}", f"https://{host}")


async def health(request: web.Request) -> web.Response:
    commits = request.app[COMMITS]
    settings = request.app[SETTINGS]
    report: dict[str, object] = {
        "status": "healthy",
        "redis": "in-memory" if isinstance(commits.store, MemoryStore) else commits.state,
        "pending": commits.pending,
        "uptime_s": round(time.monotonic() - STARTED, 1),
        "version": __version__,
        "keep_days": settings.keep_days,
        "max_test_requests": settings.max_test_requests,
    }
    for run in request.app[TEST_RUNS]:
        report["test_run"] = {"requested": run.requested, "done": run.done}
    try:
        report["hits"], report["urls"] = await store_of(request).totals(ALL_TIME)
        return answer(report)
    except StoreError as error:
        report["status"] = "unhealthy"
        report["error"] = str(error)
        return answer(report, 503, RETRY_LATER)


async def metrics(request: web.Request) -> web.Response:
    headers = {**HEADERS, "Content-Type": prometheus.CONTENT_TYPE_LATEST}
    return web.Response(body=prometheus.generate_latest(), headers=headers)


PAGE = Path(__file__).resolve().with_name("dashboard.html")


async def live_page(request: web.Request) -> web.Response:
    if not PAGE.exists():
        return answer({"error": "put dashboard.html beside server.py: it is the live page"}, 404)
    headers = {
        **NOSNIFF,
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "frame-ancestors 'none'",
        "Cache-Control": "no-cache",
    }
    return web.Response(body=PAGE.read_bytes(), headers=headers)


def store_of(request: web.Request) -> Store:
    """The store, for a reader. Raises StoreError at once if a reader would wait in vain."""
    commits = request.app[COMMITS]
    if commits.lost:
        raise StoreError(commits.reason)
    return commits.store


def refuse_unknown(request: web.Request, known: tuple[str, ...]) -> None:
    unknown = request.query.keys() - set(known)
    if unknown:
        text = f"{min(unknown)!r} is not known: use {', '.join(known)}"
        raise web.HTTPBadRequest(text=text)


def number(
    given: Mapping[str, str], name: str, default: int, limits: tuple[int, int] = (0, NO_LIMIT)
) -> int:
    try:
        return whole_number(name, limits, given[name]) if name in given else default
    except argparse.ArgumentTypeError as error:
        raise web.HTTPBadRequest(text=str(error)) from None


def day_asked_for(request: web.Request) -> str:
    """A UTC day, as in 2026-11-26; without a ?day= it is ALL_TIME."""
    day = request.query.get("day")
    if day is None:
        return ALL_TIME
    if day == "today":
        return utc_day()
    if day == "yesterday":
        return utc_day(ago=1)
    with suppress(ValueError):
        if str(date.fromisoformat(day)) == day:  # not 20261126
            return day
    raise web.HTTPBadRequest(text=f"day is {day!r}: use today, yesterday or 2026-11-26")


ROUTES = [  # each with its name in /metrics
    (web.get("/", live_page), "/"),
    (web.get("/stats{slash:/?}", stats), "/stats/"),
    (web.get("/stats{url:/api/(?s:.*)}", stats_of_url), "/stats/api/..."),
    (web.post("/test/{n}{slash:/?}", test), "/test/<n>/"),
    (web.get("/health{slash:/?}", health), "/health"),
    (web.get("/metrics{slash:/?}", metrics), "/metrics"),
    (web.route("*", "/api/{tail:(?s:.*)}", api), "/api/..."),  # ?s: %0A counts, too
]
ROUTE_NAMES = {route.handler: name for route, name in ROUTES}


async def go_on(request: web.Request) -> None:
    """Whatever a client expects (Expect: 100-continue), let it send its body."""
    if request.version == aiohttp.HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # aiohttp would take this for the beginning of the answer


for route, _ in ROUTES:
    route.kwargs["expect_handler"] = go_on  # aiohttp's own answers some with a 417 in plain text

# --- Synthetic traffic ------------------------------------------------------------------
# POST /test/<n>/ makes a TestRun, which sends real requests to this server.


class TestRun:
    """N requests, and what became of them."""

    def __init__(self, n: int, urls: Iterator[str]) -> None:
        self.requested = n
        self.urls = urls
        self.answered: set[str] = set()
        self.latencies: list[float] = []  # ms, one for each answer
        self.status: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    @property
    def done(self) -> int:
        return len(self.latencies) + self.errors.total()

    async def send(self, server: URL, concurrency: int) -> dict[str, object]:
        """Send them all, and report."""
        began = time.perf_counter()
        no_limit = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(server, connector=no_limit) as session:
            await asyncio.gather(*(self.work(session) for _ in range(concurrency)))
        seconds = time.perf_counter() - began
        return {
            "requested": self.requested,
            "ok": self.status["200"],
            "failed": self.requested - self.status["200"],
            "duration_s": round(seconds, 3),
            "requests_per_s": round(len(self.latencies) / seconds, 1),
            "latency_ms": summary(sorted(self.latencies)),
            "status": self.status,
            "errors": self.errors,
            "unique_urls": len(self.answered),
        }

    async def work(self, session: aiohttp.ClientSession) -> None:
        """What one worker does. All of them draw from one iterator, until it is empty."""
        for url in self.urls:
            began = time.perf_counter()
            try:
                async with session.get(url, allow_redirects=False) as response:
                    await response.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.errors[type(error).__name__] += 1
            else:
                self.latencies.append((time.perf_counter() - began) * 1000)
                self.status[str(response.status)] += 1
                self.answered.add(url)


def random_urls(n: int, seed: int) -> tuple[list[str], Iterator[str]]:
    """Three random segments, and n URLs of one to six of them each."""
    rng = random.Random(seed)
    segments = [f"{drawn:06x}" for drawn in rng.sample(range(16**6), 3)]
    paths = (rng.choices(segments, k=rng.randint(1, 6)) for _ in range(n))
    return segments, (f"/api/{'/'.join(path)}/" for path in paths)


def summary(ms: list[float]) -> dict[str, float]:
    """Of sorted latencies. Percentiles are nearest-rank: N % took pN or less."""
    if not ms:
        return {}
    figures = {"min": ms[0], "mean": sum(ms) / len(ms)}
    for percent in (50, 95, 99):
        rank = math.ceil(len(ms) * percent / 100)
        figures[f"p{percent}"] = ms[rank - 1]
    figures["max"] = ms[-1]
    return {name: round(figure, 1) for name, figure in figures.items()}


# --- Group commit -----------------------------------------------------------------------
# The middleware awaits hit(). One INCR a request would cost more than the rest of the
# request. So hits collect in a batch while the batch before them is on its way to the
# store. No timer delays a hit: an idle server commits at once, a busy one in batches that
# grow with the load (DeWitt et al., Implementation Techniques for Main Memory Database
# Systems, 1984). The store is in one of four states:
#   connected      a request waits until its hit is in the store
#   disconnected   hits are held in memory, and requests do not wait
#   refuses        likewise: it answers, but with an error
#   catching up    it gets the hits that were held, and requests wait 0.2 s. If they did not,
#                  new hits could come faster than those get through
# In all but the first the store is called away.

ROUND_PATIENCE = 1.0  # seconds for a round of commits while requests wait for it
CATCH_UP_DELAY = 0.2  # seconds
CALL_PATIENCE = 8.0  # seconds for one command: the only limit while the store is away
SLICE_BYTES = 128 * 1024  # by size_of(), so under 1,000 URLs: some milliseconds of Redis
BACKLOG_BYTES = 64 * 1024 * 1024
URL_OVERHEAD = 80  # bytes that a held URL takes beside Python's string

HITS = prometheus.Counter("url_hits", "Hits that the store has counted")
PENDING = prometheus.Gauge("url_hits_pending", "Hits that the store has not confirmed yet")
URLS = prometheus.Gauge("url_keys", "URLs in the list of all time")
UP = prometheus.Gauge("url_redis_up", "1 while commits succeed, 0 while hits are held")
COMMIT_SECONDS = prometheus.Histogram(
    "url_commit_seconds", "Time until the store has confirmed a slice", buckets=BUCKETS
)


class GroupCommit:
    """Counts every hit in a store exactly once, or logs why it cannot. For async with."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # A hit goes through these three, each {url: hits}.
        self.open_batch: dict[str, int] = {}  # takes new hits
        self.batch: dict[str, int] = {}  # is closed, and being committed in slices
        self.sent: dict[str, int] = {}  # a slice on its way: the store may have it or not
        self.sequence = 0  # number of that slice, or of the last one
        self.pending = 0  # hits in all three
        self.bytes = 0  # taken by the URLs in open_batch and batch
        self.waiters: list[asyncio.Future[None]] = []  # first for batch, then for open_batch
        self.wake = asyncio.Event()  # the open batch has got a hit
        self.state = "disconnected"  # one of the four above
        self.reason = "not asked yet"  # why the store is away
        self.told = ""  # the state that the log has named, "" when it is not away
        self.held = 0  # hits that have come while it is away
        PENDING.set_function(lambda: self.pending)
        UP.set_function(lambda: not self.away)

    async def __aenter__(self) -> GroupCommit:
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Commit what is left, for two seconds at most. What remains goes to the log."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                while self.pending:
                    await asyncio.sleep(0.01)
        self.task.cancel()
        await asyncio.wait([self.task])
        self.log_pending()

    @property
    def away(self) -> bool:
        return self.state != "connected"

    @property
    def lost(self) -> bool:
        return self.state in ("disconnected", "refuses")

    def hit(self, url: str) -> asyncio.Future[None]:
        """Add a hit. Done when the store has it or, while that is away, at once."""
        self.add(url)
        waiter: asyncio.Future[None] = asyncio.Future()  # if it is cancelled, no other is
        if self.state == "connected":
            self.waiters.append(waiter)
            return waiter
        self.held += 1
        delay = CATCH_UP_DELAY if self.state == "catching up" else 0
        asyncio.get_running_loop().call_later(delay, finish, waiter)
        return waiter

    def add(self, url: str) -> None:
        """Put a hit into a batch. Raises StoreError when there is no room for its URL."""
        batch = self.batch_for(url)
        if url not in batch:
            # A full backlog still takes hits for a URL that it has, or that is on its way.
            if self.bytes >= BACKLOG_BYTES and url not in self.sent:
                raise StoreError("too many URLs wait for Redis: try again later")
            batch[url] = 0
            self.bytes += size_of(url)
            self.wake.set()
        batch[url] += 1
        self.pending += 1

    def batch_for(self, url: str) -> dict[str, int]:
        """Where a hit is added: to the open batch, so that the request that waits is answered
        with it. While the store is away, nobody waits for a batch: then a URL that the closed
        batch has is counted there, so as not to be held twice."""
        return self.batch if url in self.batch and self.away else self.open_batch

    async def run(self) -> None:
        """One round after another, for as long as the server runs."""
        while True:
            if not self.away and not self.open_batch:
                self.wake.clear()
                with suppress(TimeoutError):  # after a second ask the store how it is
                    async with asyncio.timeout(1):
                        await self.wake.wait()
            was_away = self.away
            try:
                async with asyncio.timeout(None if self.away else ROUND_PATIENCE):
                    await self.commit_round()
            except Exception as error:  # whatever it is, no hit may be lost
                self.hold(error)
            # A pause between rounds while the store is away. But after the first failure it
            # tries again at once.
            if was_away and self.away:
                await asyncio.sleep(0.1)

    async def commit_round(self) -> None:
        """Commit all that is held, then answer the requests that wait for it."""
        if self.lost:
            await self.store.open()
            self.state = "catching up"
        elif not self.open_batch:
            await self.store.ping()
        began = time.monotonic()
        await self.commit_batch()  # what a failure has left of the last one
        self.batch = self.open_batch
        self.open_batch = {}
        waiting = len(self.waiters)  # those for this batch. More may come behind them
        await self.commit_batch()
        self.release(waiting)
        # Requests can wait for the store again when a round that carried everything was quick.
        if self.away and time.monotonic() - began < ROUND_PATIENCE / 2:
            event = "redis is back" if self.told else "counting"
            log.info(event, where=self.store.where, held=self.held)
            self.state = "connected"
            self.told = ""
            self.held = 0

    def hold(self, error: Exception) -> None:
        """The store has failed. From now on hits are held, and nobody waits."""
        self.state = "refuses" if isinstance(error, REFUSALS) else "disconnected"
        self.reason = str(error) or "no answer in time"  # a TimeoutError has no words
        if self.told != self.state:
            event = "redis refuses" if self.state == "refuses" else "redis is away"
            log.error(f"{event}, hits are held", where=self.store.where, error=self.reason)
            self.told = self.state
        self.release(len(self.waiters))

    def release(self, n: int) -> None:
        """Let the first n requests that wait be answered."""
        for waiter in self.waiters[:n]:
            finish(waiter)
        del self.waiters[:n]

    async def commit_batch(self) -> None:
        while self.sent or self.batch:
            # A slice that was not confirmed goes again, under the number that it had. By
            # the number the store can tell, and counts it once.
            if not self.sent:
                self.next_slice()
            with COMMIT_SECONDS.time():
                counted, urls = await self.store.commit(self.sequence, self.sent)
            self.pending -= sum(self.sent.values())  # commit() logs those that cannot count
            self.sent = {}
            HITS.inc(counted)
            URLS.set(urls)
            if urls >= self.store.max_urls:
                log_once('MAX_URLS is reached: a new URL counts as "(other)"')

    def next_slice(self) -> None:
        size = 0
        while self.batch and size < SLICE_BYTES:
            url, hits = self.batch.popitem()
            self.sent[url] = hits
            size += size_of(url)
        self.bytes -= size
        self.sequence += 1

    def log_pending(self) -> None:
        """A line for each slice, with the number that it was or would have been sent under."""
        for url, hits in self.open_batch.items():
            self.batch[url] = self.batch.get(url, 0) + hits
        while self.sent or self.batch:
            if not self.sent:
                self.next_slice()
            line = {
                "event": "hits not committed",
                "level": "error",
                "timestamp": datetime.now(UTC).isoformat(),
                "instance": self.store.instance,
                "sequence": self.sequence,
                "hits": sum(self.sent.values()),
                "urls": self.sent,
            }
            # Not log.error(): tools/recover.py needs JSON, also from a terminal.
            logging.error(json.dumps(line))
            self.sent = {}


def finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # it is when its request was cancelled
        waiter.set_result(None)


def size_of(url: str) -> int:
    return sys.getsizeof(url) + URL_OVERHEAD


# --- Stores -----------------------------------------------------------------------------
# Redis and memory answer to the same methods. Keys in Redis:
#   url_count:<url>         the count, raised by INCRBY: the truth
#   url_rank                sorted set of the URLs, scored with the count itself
#   url_total               the sum of url_rank
#   url_rank:2026-11-26, url_total:2026-11-26   hits of one UTC day, for KEEP_DAYS days
#   url_commit:<instance>   number of the last slice applied for one server, for 24 hours

OTHER = "(other)"
LIST_PAGE = 200  # URLs read at a time. A client that stops reading keeps so many in memory
REFUSALS = (redis.ResponseError, redis.AuthenticationError, redis.BusyLoadingError)
REFUSED = prometheus.Counter("url_keys_refused", "Times that a key could not be raised")

# KEYS: url_commit:<instance>, url_rank, url_total, url_count:(other), url_rank:<day>,
# url_total:<day>, then url_count:<url> for each URL. ARGV: number of the slice, MAX_URLS,
# seconds for which a day is kept, then the hits of each URL. Replies with the hits that were
# counted, the number of URLs, and pairs of a key that could not be raised and the reason.
COMMIT = """
local commit, rank, total, other, day_rank, day_total = unpack(KEYS, 1, 6)
local sequence, max_urls, keep = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local first_url = 7  -- its hits are ARGV[4]
local refused = {}

local function add(key, hits)
  local count = redis.pcall('INCRBY', key, hits)
  if type(count) == 'number' then return count end
  table.insert(refused, {key, count.err})
end

-- Redis does not undo a script that fails half-way. So each command that is used below is
-- tried first, in a way that changes no count. If Redis refuses (no right, no memory, a wrong
-- type, a read-only replica), it does so here, before the number of the slice is noted.
local seen = redis.call('INCRBY', commit, 0)
redis.call('EXPIRE', commit, 24 * 60 * 60)
redis.call('EXISTS', other)
redis.call('ZADD', rank, 'XX', 0, '')
if keep > 0 then redis.call('ZADD', day_rank, 'XX', 'INCR', 0, '') end
local urls = redis.call('ZCARD', rank)
local counted = 0

-- This slice was counted before, but its reply was lost. Make that reply again, and count
-- nothing. A URL without a key went to (other); for the rest, to add 0 shows whether the key
-- can be raised, as it did then.
if sequence <= seen then
  for i = first_url, #KEYS do
    local went_to_other = redis.call('EXISTS', KEYS[i]) == 0
    if went_to_other or add(KEYS[i], 0) then counted = counted + tonumber(ARGV[i - 3]) end
  end
  return {counted, urls, refused}
end

-- Note the number, by a command that was tried. From here on nothing raises.
redis.call('INCRBY', commit, sequence - seen)
local near_the_cap = urls + #KEYS > max_urls  -- only then it matters whether a URL is new
local sum = 0
for i = first_url, #KEYS do
  local key, hits = KEYS[i], tonumber(ARGV[i - 3])
  if near_the_cap and redis.call('EXISTS', key) == 0 then
    if urls < max_urls then urls = urls + 1 else key = other end
  end
  local count = add(key, hits)
  if count then
    local url = key:sub(#'url_count:' + 1)
    -- The total is the sum of the list. A URL that is new in the list adds its whole count,
    -- because an earlier version of this program had counts, but no list.
    local new = redis.call('ZADD', rank, count, url) == 1
    sum = sum + (new and count or hits)
    counted = counted + hits
    if keep > 0 then redis.call('ZADD', day_rank, 'INCR', hits, url) end
  end
end
add(total, sum)
if keep > 0 then
  add(day_total, counted)
  redis.call('EXPIRE', day_rank, keep)
  redis.call('EXPIRE', day_total, keep)
end
return {counted, redis.call('ZCARD', rank), refused}
"""


def address_of(url: str) -> dict[str, Any]:
    """Where Redis is, as options for redis-py. Raises any exception if the URL is no good.

    Other options that redis-py takes from a URL, such as time-outs, are left out.
    """
    # In a password @ / ? # must be quoted. If they are not, redis-py can take a piece of it for
    # the host, and the host is shown.
    if not re.fullmatch(r"\w+://([^@/?#]*@)?[^@?#]*(\?[^@#]*)?", url):
        raise ValueError
    place = ("connection_class", "host", "port", "path", "db", "username", "password")
    tls = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
    said: dict[str, Any] = {**parse_url(url)}
    return {name: said[name] for name in place + tls if name in said}


class RedisStore:
    """Counts in Redis."""

    def __init__(self, url: str, max_urls: int, keep_days: int) -> None:
        address = address_of(url)
        connection_class = address.pop("connection_class", Connection)
        known = {"host": "localhost", "port": 6379, "db": 0} | address
        self.where = address.get("path") or "{host}:{port}/{db}".format(**known)
        self.max_urls = max_urls
        self.keep_days = keep_days
        self.instance = os.urandom(8).hex()
        # Readers ask a second time, because firewalls forget idle connections. uvloop reports
        # that as a RuntimeError.
        broken: Any = (redis.ConnectionError, redis.TimeoutError, OSError, RuntimeError)
        self.pool = BlockingConnectionPool(
            connection_class=connection_class,
            max_connections=16,
            timeout=5,  # seconds that a reader waits for one of them
            socket_timeout=1,
            socket_connect_timeout=1,
            retry=Retry(NoBackoff(), 1, broken),
            protocol=2,  # with 3 redis-py hands out connections that Redis has closed (#4252)
            **address,
        )
        self.redis = Redis.from_pool(self.pool)
        self.list_slots = asyncio.Semaphore(8)  # half of the 16, so others get through
        # Commits have a connection outside the pool, so that readers cannot hold them up. It
        # needs no lock, as only GroupCommit's task uses it, for one command at a time. This is
        # how redis-py's Connection works: send_packed_command() connects if need be, and sends
        # once. If it or read_response() fails or is cancelled, the connection is closed. So a
        # late reply is never taken for that of the next command.
        self.writer = connection_class(socket_timeout=None, protocol=2, **address)

    async def call(self, *command: Any) -> Any:
        """Redis's reply to a command of GroupCommit."""
        try:
            async with asyncio.timeout(CALL_PATIENCE):
                await self.writer.send_packed_command(pack_command(command))
                return await self.writer.read_response()
        except RuntimeError as error:  # uvloop's, with an odd text
            raise redis.ConnectionError("the connection was closed") from error

    async def open(self) -> None:
        """See whether Redis will take commits."""
        # A replica may have taken over: connect again, to where the address leads now.
        await self.writer.disconnect(nowait=True)
        await self.pool.disconnect(inuse_connections=False)
        await self.ping()  # a short command: to it Redis says clearly if it wants a password
        _, urls = await self.commit(0, {})  # 0 is never new: it tries all, and adds nothing
        URLS.set(urls)
        if not urls:
            await self.look_for_counts()

    async def look_for_counts(self) -> None:
        """Look for them in 10,000 keys: a Redis may have a billion that are not ours."""
        with suppress(redis.ResponseError):  # no right to look
            scan = ("MATCH", "url_count:?*", "COUNT", 10_000)
            _, counts = await self.call("SCAN", 0, *scan)
            if counts:
                log_once("counts without a list: run tools/reindex.py", where=self.where)

    async def ping(self) -> None:
        """See whether Redis is there. Not by PING, which a user may have no right to."""
        try:
            await self.call("EXISTS", "url_rank")
        except redis.ConnectionError:  # closed while it was idle? A question may be repeated
            await self.call("EXISTS", "url_rank")

    async def commit(self, sequence: int, hits: Mapping[str, int]) -> tuple[int, int]:
        """Add {url: hits}, once for each number. Returns hits counted, and number of URLs."""
        day = utc_day()
        shared = ["url_rank", "url_total", f"url_count:{OTHER}"]
        keys = [f"url_commit:{self.instance}", *shared, f"url_rank:{day}", f"url_total:{day}"]
        keys += [f"url_count:{url}" for url in hits]
        arguments = (sequence, self.max_urls, self.keep_days * 86_400, *hits.values())
        reply = await self.call("EVAL", COMMIT, len(keys), *keys, *arguments)
        counted, known_urls, refused = reply
        for key, error in refused:
            REFUSED.inc()
            log_once("cannot count", key=key.decode(), error=error.decode())
        return counted, known_urls

    async def totals(self, day: str) -> tuple[int, int]:
        """Hits and URLs."""
        async with self.reading() as pipeline:
            pipeline.get(of_day("url_total", day))
            pipeline.zcard(of_day("url_rank", day))
            hits, urls = await pipeline.execute()
            return int(hits or 0), urls

    async def find(self, day: str, url: str) -> tuple[int, int] | None:
        """Count and rank of a URL. The most requested one has rank 1."""
        async with self.reading() as pipeline:
            pipeline.zscore(of_day("url_rank", day), url)
            pipeline.zrevrank(of_day("url_rank", day), url)
            count, ahead = await pipeline.execute()
            return None if count is None else (int(count), ahead + 1)

    async def ranked(self, day: str, offset: int, limit: int) -> Pages:
        """Most requested first, equal counts by descending URL."""
        for start in range(offset, offset + limit, LIST_PAGE):
            last = min(start + LIST_PAGE, offset + limit) - 1
            async with self.list_slots, self.reading() as pipeline:
                pipeline.zrevrange(of_day("url_rank", day), start, last, withscores=True)
                (found,) = await pipeline.execute()
                rows = [(url.decode(errors="replace"), int(count)) for url, count in found]
            if not rows:
                return
            yield rows

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Pipeline]:
        """A reader's commands, which go together. Whatever fails is a StoreError."""
        try:
            async with self.redis.pipeline(transaction=False) as pipeline:
                yield pipeline
        # ValueError, OverflowError: int() of a count that is "many" or infinite.
        except (redis.RedisError, OSError, RuntimeError, ValueError, OverflowError) as error:
            raise StoreError(f"Redis: {error}") from error

    async def close(self) -> None:
        await self.writer.disconnect(nowait=True)  # or a Redis that hangs holds us up
        with suppress(redis.RedisError):
            await self.redis.aclose()


class MemoryStore:
    """The same methods on dictionaries."""

    def __init__(self, max_urls: int, keep_days: int) -> None:
        self.max_urls = max_urls
        self.keep_days = keep_days
        self.where = "memory"
        self.instance = ""
        self.counts: dict[str, Counter[str]] = {ALL_TIME: Counter()}  # and of each day

    async def open(self) -> None: ...

    async def ping(self) -> None: ...

    async def commit(self, sequence: int, hits: Mapping[str, int]) -> tuple[int, int]:
        counts = self.counts[ALL_TIME]
        today = self.counts.setdefault(utc_day(), Counter())
        for url, n in hits.items():
            fits = url in counts or len(counts) < self.max_urls
            counts[url if fits else OTHER] += n
            today[url if fits else OTHER] += n
        for day in self.counts.keys() - {ALL_TIME}:
            if day <= utc_day(ago=self.keep_days):
                del self.counts[day]
        return sum(hits.values()), len(counts)

    async def totals(self, day: str) -> tuple[int, int]:
        counts = self.counts.get(day, Counter())
        return counts.total(), len(counts)

    async def find(self, day: str, url: str) -> tuple[int, int] | None:
        for rank, (ranked_url, count) in enumerate(self.ranking(day), start=1):
            if ranked_url == url:
                return count, rank
        return None

    async def ranked(self, day: str, offset: int, limit: int) -> Pages:
        rows = self.ranking(day)[offset : offset + limit]
        for start in range(0, len(rows), LIST_PAGE):
            yield rows[start : start + LIST_PAGE]
            await asyncio.sleep(0)  # let others be served in between

    def ranking(self, day: str) -> Rows:
        counts = self.counts.get(day, Counter())
        return sorted(counts.items(), key=lambda row: (row[1], row[0]), reverse=True)

    async def close(self) -> None: ...


def of_day(key: str, day: str) -> str:
    return f"{key}:{day}" if day else key


def utc_day(ago: int = 0) -> str:
    return str(datetime.now(UTC).date() - timedelta(days=ago))


# --- Start and stop ---------------------------------------------------------------------
# The first request is let in when the store has opened, or a second later. The store
# closes when all requests are answered and GroupCommit has committed their hits.


async def choose_store(settings: Settings) -> Store:
    """The Redis of REDIS_URL, even if it is not there yet. Else the local one, or memory."""
    limits = (settings.max_urls, settings.keep_days)
    store = RedisStore(settings.redis_url or LOCAL_REDIS, *limits)
    if settings.redis_url:
        return store
    try:
        async with asyncio.timeout(1):
            await store.open()
            return store
    except (redis.RedisError, OSError) as error:  # a TimeoutError is an OSError
        await store.close()
        reason = f"{store.where}: {str(error) or 'no answer in time'}"
        log.warning("REDIS_URL is not set: counts are lost on exit", no_local_redis=reason)
        return MemoryStore(*limits)


async def counting(app: web.Application) -> AsyncIterator[None]:
    """The life of the store and of GroupCommit, around that of the application."""
    store = await choose_store(app[SETTINGS])
    async with GroupCommit(store) as commits:
        app[COMMITS] = commits
        with suppress(TimeoutError):  # wait a second for it, so that /stats/ works at once
            async with asyncio.timeout(1):
                while commits.away:
                    await asyncio.sleep(0.01)
        yield
    await store.close()
    log.info("stopped")


def create_app(settings: Settings) -> web.Application:
    app = web.Application(middlewares=[count_and_guard])
    app[SETTINGS] = settings
    app[TEST_RUNS] = []
    app.add_routes(route for route, _ in ROUTES)
    app.cleanup_ctx.append(counting)
    return app


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Serve until a signal comes, then end in order."""
    stop = stop_event()
    runner = web.AppRunner(
        create_app(settings),
        access_log=None,  # it would cost as much as counting does
        auto_decompress=False,  # nobody reads a body, so none is inflated
        # More than aiohttp's 8 kB and 128, but bounded: 16 kB of slashes cost its router 27 ms,
        # 64 kB 284, and a client that sends headers and no end of them is held in memory.
        max_line_size=16 * 1024,
        max_field_size=16 * 1024,
        max_headers=256,
        shutdown_timeout=1.5,  # then aiohttp cancels, and waits as long again
    )
    try:
        await runner.setup()
        await web.SockSite(runner, listener, backlog=1024).start()
        host, port, *_ = listener.getsockname()
        page = URL.build(scheme="http", host=host, port=port)
        log.info("started", page=str(page))
        await stop.wait()
    finally:
        await runner.cleanup()


def stop_event() -> asyncio.Event:
    """Set by SIGINT, SIGTERM or SIGHUP. After the first of them, all are ignored."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        for signum in signums:
            loop.remove_signal_handler(signum)
            # Or Python's own handlers come back when the loop closes, and a second Ctrl-C
            # breaks off the end.
            signal.signal(signum, signal.SIG_IGN)
        # In 30 seconds, long after all is saved, this ends the process: Python would wait for
        # ever for a thread that asks a name server.
        signal.alarm(30)
        stop.set()

    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for signum in signums:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            loop.add_signal_handler(signum, end)
    return stop


def listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    both = family == socket.AF_INET6  # so :: is open to IPv4, too
    return socket.create_server(address, family=family, dualstack_ipv6=both)


def configure_logging() -> None:
    """One event a line on standard error: for people on a terminal, else JSON."""
    steps = structlog.processors
    render = structlog.dev.ConsoleRenderer() if os.isatty(2) else steps.JSONRenderer()
    chain = (steps.add_log_level, steps.TimeStamper("iso"), steps.format_exc_info, render)
    # The standard library's loggers survive a log that cannot be written (a full disk).
    structlog.configure(chain, logger_factory=structlog.stdlib.LoggerFactory())
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # clients' errors


def prepare_process() -> None:
    # If a standard stream is closed, a socket would get its number, and libuv would abort at
    # the end. So /dev/null is opened until it gets a number after theirs.
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(opened)
    os.set_blocking(2, True)  # or a slow reader of the log makes it lose lines
    # A client is an open file. macOS does not tell how many it allows: 10,240 at least.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 10_240 if sys.platform == "darwin" else most
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))


def main() -> None:
    settings = read_settings(sys.argv[1:])
    prepare_process()
    configure_logging()
    try:
        listener = listen(settings.host, settings.port)
    except (OSError, UnicodeError) as error:
        host = settings.host.rpartition("@")[2]  # without the password of a misplaced REDIS_URL
        sys.exit(f"server.py: HOST={host} PORT={settings.port}: {error}")
    uvloop.run(serve(settings, listener))


if __name__ == "__main__":
    main()
