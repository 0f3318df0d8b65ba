# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.5", "prometheus-client==0.26.0", "redis[hiredis]==8.1.0",
#   "structlog==26.1.0", "uvloop==0.23.0"]
# ///
"""Request Statistics Tracker: counts every request under /api/ by URL path, in Redis.

    any method /api/...   200 {"url": "/api/products/123/"}, the URL as counted
    GET /stats/           [{"count": 2, "url": "/api/products/123/"}, ...], most requested
                          first. ?limit= ?offset= page it, ?day= is one UTC day (today,
                          yesterday or 2026-11-26), ?contains= a text in the URLs
    GET /stats/api/...    {"count": 2, "url": "/api/products/123/", "rank": 1}, or 404; ?day=
    POST /test/<n>/       sends n random requests to itself, and reports; ?seed= repeats a
                          run, ?concurrency= is 1 to 256
    GET /health           {"status": "healthy", "redis": "connected", ...}, or 503
    GET /metrics, GET /   figures for Prometheus; the live page

A request counts once, under its decoded path with a slash at the end. A 200 means that
the hit is in Redis or, while Redis is away, held in memory (64 MB of URLs) until it is
back. If the Redis key of a URL holds something else than a number, its hits are answered
with 200, too, but do not count, and the log says so. A hit counts for the UTC day on which
it is sent to Redis. Errors are JSON: {"error": "what is wrong"}.
"""

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
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from aiohttp.web import Request, Response, StreamResponse
from hiredis import pack_command
from redis.asyncio.connection import BlockingConnectionPool, Connection, parse_url
from structlog import processors
from yarl import URL

__version__ = "2.0.0"

log = structlog.get_logger()


@lru_cache(1000)  # a line that is in the cache is not logged again
def log_once(event: str, **facts: str) -> None:
    log.error(event, **facts)


# --- Settings ---------------------------------------------------------------------------
# main() reads them once. Other programs give create_app() what read_settings([]) returns.
LOCAL_REDIS = "redis://localhost:6379/0"
NO_LIMIT = 10**15
ANY = (0, NO_LIMIT)  # lowest and highest number
OPTIONS = [  # variable, default, lowest and highest number, what --help says of it
    ("HOST", "127.0.0.1", None, "0.0.0.0 listens to the network, :: by IPv6, too"),
    ("PORT", 5000, (0, 65_535), "0 takes any free one"),
    ("REDIS_URL", "", None, f"tries {LOCAL_REDIS}, else counts in memory"),
    ("MAX_TEST_REQUESTS", 100_000, ANY, "the most in one test run, 0 turns /test/ off"),
    ("MAX_URLS", 10_000_000, (1, NO_LIMIT), 'beyond them a new URL counts as "(other)"'),
    ("KEEP_DAYS", 7, (0, 36_500), "days with a list of their own, 0 for none"),
]


def read_settings(arguments: list[str]) -> Namespace:
    """From flags, else the environment, else the defaults. A bad value exits with 2."""
    # Without a usage text an error is one line.
    parser = ArgumentParser("server.py", usage=SUPPRESS, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    for variable, default, limits, meaning in OPTIONS:
        flag = "--" + variable.lower().replace("_", "-")
        given = os.environ.get(variable) or default  # argparse checks it if it is text
        kind = partial(whole_number, variable, *limits) if limits else str
        parser.add_argument(flag, default=given, type=kind, help=f"{default or 'unset'}; {meaning}")
    settings, unknown = parser.parse_known_args(arguments)
    if unknown:  # only names are shown: a REDIS_URL may stand beside them
        names = [word for word in unknown if re.fullmatch("--[a-z_-]+", word)]
        parser.error(f"not known: {', '.join(names) or 'an argument'}; see --help")
    try:
        RedisStore(settings)  # to see if redis-py takes the address: it does not connect
    except Exception:  # not with redis-py's words, which may quote a part of the password
        parser.error("argument --redis-url: REDIS_URL is no address like redis://host:6379/0")
    return settings


def whole_number(name: str, lowest: int, highest: int, text: str) -> int:
    """The number that text spells in ASCII digits. Raises ArgumentTypeError."""
    if re.fullmatch("[0-9]{1,16}", text) and lowest <= int(text) <= highest:
        return int(text)
    # A text with other characters is not shown: it may be a misplaced REDIS_URL.
    shown = repr(text) if re.fullmatch(r"[\w.+-]{0,40}", text) else "no number"
    raise ArgumentTypeError(f"{name} is {shown}: use a whole number from {lowest} to {highest}")


# --- Middleware and handlers ------------------------------------------------------------
# The one middleware counts. A handler parses, asks the store, answers.
SETTINGS = web.AppKey("settings", Namespace)
GROUP_COMMIT: "web.AppKey[GroupCommit]" = web.AppKey("group_commit")  # GroupCommit stands below
STARTED = time.monotonic()
TEST_RUN = web.AppKey("test_run", asyncio.Lock)  # is held by the test run under way
COUNTED_AS = web.RequestKey("counted_as", str)  # like an AppKey, but of one request

Store: TypeAlias = "RedisStore | MemoryStore"
Rows = list[tuple[str, int]]  # URL and count, most requested first
Pages = AsyncIterator[Rows]  # of 1 to 200 rows
ALL_TIME = ""  # instead of a day like "2026-11-26"
DASHBOARD = Path(__file__).resolve().with_name("dashboard.html")
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
HEADERS = {**NOSNIFF, "Content-Type": "application/json", "Cache-Control": "no-store"}
NOT_HERE = "nothing is here: paths that start with /api/ are counted, /stats/ lists them"
OTHER_SITE = "a page of another site asked for this (in nginx: proxy_set_header Host $http_host)"
REQUESTS = prometheus.Histogram(
    "http_request_duration_seconds", "From arrival to answer", ("method", "route", "code")
)
histogram_of = lru_cache(1024)(REQUESTS.labels)  # labels() takes as long as observe()


class StoreError(Exception):
    """The store cannot do this now. The text says why; the client gets a 503 with it."""


@web.middleware
async def count_and_guard(request: Request, handler: Handler) -> StreamResponse:
    """Count a request under /api/, answer errors in JSON, note how long it took."""
    began = time.perf_counter()
    endpoint = request.match_info.route.handler
    try:
        if endpoint is api:
            if len(request.path) > 2048:
                raise web.HTTPRequestURITooLong(text="a path has at most 2,048 characters")
            url = request[COUNTED_AS] = request.path.removesuffix("/") + "/"
            await request.app[GROUP_COMMIT].hit(url)
        response = await handler(request)
    except web.HTTPNotFound:
        response = answer({"error": NOT_HERE}, 404)
    except web.HTTPMethodNotAllowed as error:
        allowed = error.headers["Allow"]
        response = answer({"error": f"use {allowed} here"}, 405)
        response.headers["Allow"] = allowed
    except web.HTTPException as error:
        response = answer({"error": error.text}, error.status)
    except StoreError as error:
        response = answer({"error": str(error)}, 503)
    except Exception:
        log.exception("unexpected error", path=str(request.rel_url))
        response = answer({"error": "unexpected error: the server's log has it"}, 500)
    method = request.method if request.method in hdrs.METH_ALL else "OTHER"
    route = ROUTE_NAMES.get(endpoint, "none")  # none: a 404 or 405
    histogram_of(method, route, response.status).observe(time.perf_counter() - began)
    return response


def answer(data: object, status: int = 200) -> Response:
    body = json.dumps(data).encode() + b"\n"
    response = Response(body=body, status=status, headers=HEADERS)
    if status in (429, 503):
        response.headers["Retry-After"] = "1"
    return response


async def api(request: Request) -> Response:
    # By hand: with json.dumps() each request would cost 1 % more.
    url = json_string(request[COUNTED_AS])
    return Response(body=f'{{"url": {url}}}\n'.encode(), headers=HEADERS)


async def stats(request: Request) -> Response:
    refuse_unknown(request, "limit", "offset", "day", "contains")
    limit = number(request.query, "limit", default=NO_LIMIT)
    offset = number(request.query, "offset")
    day = day_asked_for(request)
    # The first page is read here, so that a failure can be a 503. The others are read by
    # aiohttp, which takes an async iterator as a body, while it sends the list. For HEAD
    # it reads none.
    with store_for_reading(request) as store:
        hits, urls = await store.totals(day)
        headers = {**HEADERS, "X-Total-Hits": str(hits)}
        if request.query.get("contains"):
            pages = matching(request, store.ranked(day, 0, NO_LIMIT), offset, limit)
        else:
            headers["X-Total-Count"] = str(urls)
            pages = store.ranked(day, offset, limit)
        first: Rows = await anext(pages, [])
    return Response(body=json_list(first, pages), headers=headers)


async def matching(request: Request, pages: Pages, to_skip: int, to_pass: int) -> Pages:
    """Of the rows whose URL has the text, upper or lower case, skip some, pass some on."""
    wanted = request.query["contains"].casefold()
    async for rows in pages:
        found = [row for row in rows if wanted in row[0].casefold()]
        passed = found[to_skip : to_skip + to_pass]
        if passed:
            yield passed
        to_skip = max(0, to_skip - len(found))
        to_pass -= len(passed)
        # While nothing is found, nothing is sent. So aiohttp does not notice that a
        # client has gone, but request.transport is None then.
        if not to_pass or request.transport is None:
            return


async def json_list(first: Rows, more: Pages) -> AsyncIterator[bytes]:
    """The list, a page at a time. If this raises, aiohttp breaks the connection off."""
    yield b"[" + json_rows(first)
    async for rows in more:
        yield b", " + json_rows(rows)
    yield b"]\n"


def json_rows(rows: Rows) -> bytes:
    return ", ".join(
        f'{{"count": {count}, "url": {json_string(url)}}}' for url, count in rows
    ).encode()


async def stats_of_url(request: Request) -> Response:
    refuse_unknown(request, "day")
    day = day_asked_for(request)
    url = request.path.removeprefix("/stats").removesuffix("/") + "/"
    with store_for_reading(request) as store:
        found = await store.find(day, url)
    if not found:
        return answer({"error": f"{url} was not requested"}, 404)
    count, rank = found
    return answer({"count": count, "url": url, "rank": rank})


async def start_test_run(request: Request) -> Response:
    refuse_unknown(request, "seed", "concurrency")
    most = request.app[SETTINGS].max_test_requests
    if not most:
        raise web.HTTPForbidden(text="test runs are off: MAX_TEST_REQUESTS is 0")
    if from_another_site(request.headers):
        raise web.HTTPForbidden(text=OTHER_SITE)
    n = number(request.match_info, "n", limits=(1, most))
    concurrency = number(request.query, "concurrency", default=32, limits=(1, 256))
    seed = number(request.query, "seed", default=random.getrandbits(30))
    if request.app[TEST_RUN].locked():
        raise web.HTTPTooManyRequests(text="wait: a test run is under way")
    segments, urls = random_urls(n, seed)
    # Our end of this very connection: a Host header could aim the run at somebody else.
    host, port, *_ = request.get_extra_info("sockname")
    server = URL.build(scheme="http", host=host, port=port)
    async with request.app[TEST_RUN]:  # it is free, so this does not wait
        report = await send_requests(server, urls, concurrency)
    return answer(
        {"requested": n, **report, "concurrency": concurrency, "seed": seed, "segments": segments}
    )


def from_another_site(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site made a browser send this (CrossOriginProtection in Go)."""
    site = headers.get("Sec-Fetch-Site")  # browsers send it since 2023
    if site:
        return site not in ("same-origin", "none")
    host = headers.get("Host")
    return headers.get("Origin") not in (None, f"http://{host}", f"https://{host}")


async def health(request: Request) -> Response:
    settings = request.app[SETTINGS]
    commits = request.app[GROUP_COMMIT]
    report: dict[str, object] = {
        "status": "healthy",
        "redis": "in-memory" if isinstance(commits.store, MemoryStore) else commits.state,
        "pending": commits.pending,
        "uptime_s": round(time.monotonic() - STARTED, 1),
        "version": __version__,
        "keep_days": settings.keep_days,
        "max_test_requests": settings.max_test_requests,
    }
    try:
        with store_for_reading(request) as store:
            report["hits"], report["urls"] = await store.totals(ALL_TIME)
        return answer(report)
    except StoreError as error:
        report |= {"status": "unhealthy", "error": str(error)}
        return answer(report, 503)


async def metrics(request: Request) -> Response:
    headers = {**HEADERS, "Content-Type": prometheus.CONTENT_TYPE_LATEST}
    return Response(body=prometheus.generate_latest(), headers=headers)


async def live_page(request: Request) -> Response:
    if not DASHBOARD.exists():
        return answer({"error": "put dashboard.html beside server.py: it is the live page"}, 404)
    headers = NOSNIFF | {
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "frame-ancestors 'none'",
    }
    return Response(body=DASHBOARD.read_bytes(), headers=headers)


@contextmanager
def store_for_reading(request: Request) -> Iterator[Store]:
    """The store. If it is away, or reading fails in any way, this is a StoreError."""
    commits = request.app[GROUP_COMMIT]
    if commits.away:
        raise StoreError(commits.reason)
    try:
        yield commits.store
    # A TimeoutError is an OSError. uvloop raises RuntimeError for a closed connection.
    # int() raises ValueError or OverflowError if a text or infinity stands in Redis.
    except (redis.RedisError, OSError, RuntimeError, ValueError, OverflowError) as error:
        raise StoreError(f"Redis: {error}") from error


def refuse_unknown(request: Request, *known: str) -> None:
    for name in request.query:
        if name not in known:
            raise web.HTTPBadRequest(text=f"{name!r} is not known: use {', '.join(known)}")


def number(
    given: Mapping[str, str], name: str, default: int = 0, limits: tuple[int, int] = ANY
) -> int:
    try:
        return whole_number(name, *limits, given[name]) if name in given else default
    except ArgumentTypeError as error:
        raise web.HTTPBadRequest(text=str(error)) from None


def day_asked_for(request: Request) -> str:
    """A UTC day, as in 2026-11-26; without a ?day= it is ALL_TIME."""
    day = request.query.get("day", ALL_TIME)
    day = {"today": utc_day(), "yesterday": utc_day(ago=1)}.get(day, day)
    with suppress(ValueError):
        if day == ALL_TIME or str(date.fromisoformat(day)) == day:  # not 20261126
            return day
    raise web.HTTPBadRequest(text=f"day is {day!r}: use today, yesterday or 2026-11-26")


async def send_100_continue(request: Request) -> None:
    """Accept any Expect header. aiohttp itself answers some with 417, in plain text."""
    if request.version == aiohttp.HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


# Each route stands under its name in /metrics. {slash:/?} is an optional slash, (?s:.*)
# any text, also with a line feed, which a path can have as %0A.
ROUTES = {
    "/": web.get("/", live_page),
    "/stats/": web.get("/stats{slash:/?}", stats),
    "/stats/api/...": web.get("/stats/api/{tail:(?s:.*)}", stats_of_url),
    "/test/<n>/": web.post("/test/{n}{slash:/?}", start_test_run),
    "/health": web.get("/health{slash:/?}", health),
    "/metrics": web.get("/metrics{slash:/?}", metrics),
    "/api/...": web.route("*", "/api/{tail:(?s:.*)}", api),
}
ROUTE_NAMES = {route.handler: name for name, route in ROUTES.items()}
for route in ROUTES.values():  # the same as expect_handler=... in each line above
    route.kwargs["expect_handler"] = send_100_continue


# --- Synthetic traffic ------------------------------------------------------------------
# POST /test/<n>/ sends real requests to this server.
async def send_requests(server: URL, urls: Iterator[str], concurrency: int) -> dict[str, object]:
    """Request all URLs, and report. The workers draw from the one iterator."""
    answers: list[tuple[str, int, float]] = []  # URL, status, ms
    errors = Counter[str]()

    async def work(session: aiohttp.ClientSession) -> None:
        for url in urls:
            sent = time.perf_counter()
            try:
                async with session.get(url, allow_redirects=False) as response:
                    await response.read()
                answers.append((url, response.status, (time.perf_counter() - sent) * 1000))
            except (aiohttp.ClientError, TimeoutError) as error:
                errors[type(error).__name__] += 1

    began = time.perf_counter()
    async with aiohttp.ClientSession(server, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
    seconds = time.perf_counter() - began
    status = Counter(str(code) for _, code, _ in answers)
    return {
        "ok": status["200"],
        "failed": len(answers) + errors.total() - status["200"],
        "duration_s": round(seconds, 3),
        "requests_per_s": round(len(answers) / seconds, 1),
        "latency_ms": summary(sorted(ms for _, _, ms in answers)),
        "status": status,
        "errors": errors,
        "unique_urls": len({url for url, _, _ in answers}),
    }


def random_urls(n: int, seed: int) -> tuple[list[str], Iterator[str]]:
    """Three random segments, and n URLs, each of one to six of these segments."""
    rng = random.Random(seed)
    segments = [f"{drawn:06x}" for drawn in rng.sample(range(16**6), 3)]
    paths = (rng.choices(segments, k=rng.randint(1, 6)) for _ in range(n))
    return segments, (f"/api/{'/'.join(path)}/" for path in paths)


def summary(ms: list[float]) -> dict[str, float]:
    """Figures of sorted latencies. Percentiles are nearest-rank: 95 % took p95 at most."""
    if not ms:
        return {}
    figures = {"min": ms[0], "mean": sum(ms) / len(ms)}
    for percent in (50, 95, 99):
        figures[f"p{percent}"] = ms[math.ceil(len(ms) * percent / 100) - 1]
    figures["max"] = ms[-1]
    return {name: round(figure, 1) for name, figure in figures.items()}


# --- Group commit -----------------------------------------------------------------------
# The middleware awaits hit(). One INCR a request would cost more than the rest of the
# request. So hits collect in a batch while the batch before is on its way to the store.
# No timer delays a hit: an idle server commits at once, a busy one in batches that grow
# with its load (DeWitt et al., Implementation Techniques for Main Memory Database
# Systems, 1984).
#   A store that fails, or is too slow, is away. Then hits are held in a backlog, and no
# request waits. When the store is back, requests wait again, and each batch takes 128 kB
# of the backlog along: so the backlog gets smaller however high the load is.
PATIENCE = 1.0  # seconds that a commit may take while requests wait for it
LONG_PATIENCE = 8.0  # seconds for a commit, and for connecting, while no request waits
TAKEN_ALONG = 128 * 1024  # bytes of the backlog in a batch: about 800 URLs, 5 ms of Redis
BACKLOG_BYTES = 64 * 1024**2
# Errors of a Redis that is there, but says no. Then hits are held, too.
REFUSALS = (redis.ResponseError, redis.AuthenticationError, redis.BusyLoadingError)

HITS = prometheus.Counter("url_hits", "Hits that the store has counted")
PENDING = prometheus.Gauge("url_hits_pending", "Hits that the store has not confirmed yet")
URLS = prometheus.Gauge("url_keys", "URLs in the list of all time")
UP = prometheus.Gauge("url_redis_up", "1 while commits succeed, 0 while hits are held")
COMMIT_SECONDS = prometheus.Histogram("url_commit_seconds", "Time that a commit took")


class GroupCommit:
    """Counts every hit in a store exactly once, or logs why it cannot.

    A hit that the store has not confirmed is in one of three places, each {url: hits}:

      open_batch   goes to the store next. The requests of these hits wait.
      sent         is on its way: the store may have it or not. Its requests wait, too.
      backlog      is held until the store is back. No request waits for these hits.

    When the store fails, the open batch goes to the backlog, and sent is kept, to be sent
    again. As all hits are held then, all requests are answered. While the store is away,
    new hits go to the backlog, the open batch stays empty, and no request waits.

    A server numbers its batches. Each is sent again under its number, unchanged, until the
    store has confirmed it, and the store takes no number twice. A server that is stopped
    before that logs the batch with its number, so that tools/recover.py can send it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.open_batch = Counter[str]()
        self.sent = Counter[str]()
        self.backlog = Counter[str]()
        self.backlog_bytes = 0
        self.pending = 0  # hits in all three
        self.open_waiters: list[asyncio.Future[None]] = []  # requests of the open batch
        self.sent_waiters: list[asyncio.Future[None]] = []  # requests of what was sent
        self.wake = asyncio.Event()  # there is a hit to commit
        self.sequence = 0  # number of the batch in sent
        self.state = "starting"  # then "connected", "disconnected" or "refuses"
        self.reason = "no answer yet"  # why the store is away
        PENDING.set_function(lambda: self.pending)
        UP.set_function(lambda: not self.away)

    @property
    def away(self) -> bool:
        return self.state != "connected"  # as when the server has just started

    async def hit(self, url: str) -> None:
        """Add a hit. Returns when the store has it or, while that is away, at once."""
        # While the backlog is full, a hit of a URL that is not in it is refused. This must
        # be so even when the store is connected again, because a store that fails once
        # more adds the open batch to the backlog.
        if self.backlog_bytes >= BACKLOG_BYTES and url not in self.backlog:
            raise StoreError("too many URLs wait for Redis: try again later")
        self.pending += 1
        self.wake.set()
        if self.away:
            if url not in self.backlog:
                self.backlog_bytes += size_of(url)
            self.backlog[url] += 1
            return
        self.open_batch[url] += 1
        # A waiter for each request, so that one that is cancelled does not cancel others.
        waiter: asyncio.Future[None] = asyncio.Future()
        self.open_waiters.append(waiter)
        await waiter

    async def run(self) -> None:
        """One batch after another, for as long as the server runs."""
        while True:
            try:
                if self.away:
                    await self.come_back()
                await self.wait_for_hits()
                async with asyncio.timeout(PATIENCE):
                    await self.commit_batch()
            except Exception as error:  # whatever it is, no hit may be lost
                pause = 0.1 if self.away else 0  # none if this is the first failure
                self.hold(error)
                await asyncio.sleep(pause)

    async def come_back(self) -> None:
        """Connect, and commit until a batch is quick. Then requests can wait for the store.

        What is left of the backlog by then goes along with later batches.
        """
        async with asyncio.timeout(LONG_PATIENCE):
            await self.store.connect()
        held = self.pending
        while True:
            began = time.monotonic()
            async with asyncio.timeout(LONG_PATIENCE):
                await self.commit_batch()
            if time.monotonic() - began < PATIENCE / 2:
                break
        log.info("counting", where=self.store.where, held=held)
        self.state = "connected"

    async def wait_for_hits(self) -> None:
        """Wait until there are hits, but a second at most: then commit_batch() pings."""
        if not self.pending:
            self.wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.wake.wait()

    async def commit_batch(self) -> None:
        """Send a batch, and let its requests be answered. Without hits, only ping."""
        if not self.pending:
            await self.store.ping()
            return
        # What was sent, and not confirmed, goes first.
        if not self.sent:
            self.close_batch()
        with COMMIT_SECONDS.time():
            counted, urls = await self.store.commit(self.sequence, self.sent)
        self.pending -= self.sent.total()  # all: what cannot be counted is logged
        self.sent = Counter()
        release(self.sent_waiters)
        HITS.inc(counted)
        URLS.set(urls)
        if urls >= self.store.settings.max_urls:
            log_once('MAX_URLS is reached: a new URL counts as "(other)"')

    def close_batch(self) -> None:
        """The open batch is sent next, and takes a part of the backlog along."""
        self.sent = self.open_batch
        self.sent_waiters = self.open_waiters
        self.open_batch = Counter()
        self.open_waiters = []
        self.sequence += 1
        taken = 0
        while self.backlog and taken < TAKEN_ALONG:
            url, hits = self.backlog.popitem()
            self.sent[url] += hits
            taken += size_of(url)
        self.backlog_bytes -= taken

    def hold(self, error: Exception) -> None:
        """The store has failed: all hits are held now, and all requests answered."""
        state = "refuses" if isinstance(error, REFUSALS) else "disconnected"
        self.reason = str(error) or "no answer in time"  # a TimeoutError has no words
        if state != self.state:
            log.error(f"redis {state}, hits are held", where=self.store.where, error=self.reason)
        self.state = state
        if self.open_batch:
            self.backlog.update(self.open_batch)  # adds the hits of URLs that are in both
            self.backlog_bytes = sum(map(size_of, self.backlog))
            self.open_batch = Counter()
        release(self.sent_waiters)
        release(self.open_waiters)

    def log_pending(self) -> None:
        """A line, with a number, for each batch that the store has not confirmed."""
        while self.sent or self.open_batch or self.backlog:
            if not self.sent:
                self.close_batch()
            # Not by log, as this must be JSON even on a terminal: recover.py reads it.
            facts = {
                "event": "hits not committed",
                "level": "error",
                "timestamp": time.strftime("%FT%TZ", time.gmtime()),
                "instance": self.store.instance,
                "sequence": self.sequence,
                "hits": self.sent.total(),
                "urls": self.sent,
            }
            logging.error(json.dumps(facts))
            self.sent = Counter()


def release(waiters: list[asyncio.Future[None]]) -> None:
    """Let these requests be answered."""
    for waiter in waiters:
        if not waiter.done():  # it is when its request was cancelled
            waiter.set_result(None)
    waiters.clear()


def size_of(url: str) -> int:
    return sys.getsizeof(url) + 80  # 80: its place in the backlog


# --- Stores -----------------------------------------------------------------------------
# Redis and memory answer to the same methods. Keys in Redis:
#   url_count:<url>         the count of one URL
#   url_rank                sorted set: the same counts in order, for lists and ranks
#   url_total               the sum of url_rank
#   url_rank:2026-11-26, url_total:2026-11-26   hits of one UTC day. Both expire KEEP_DAYS
#                           days after the last hit (in memory, after the day began)
#   url_commit:<instance>   number of the last batch of one server that was counted. It
#                           expires after 24 hours: a batch that is sent again later than
#                           that may be counted twice
# If url_rank and url_total are lost, tools/reindex.py makes them again from the counts.
OTHER = "(other)"
LIST_PAGE = 200  # URLs read at a time: so many stay in memory if a client stops reading
SPOILED = prometheus.Counter("url_keys_refused", "Times that a key could not be increased")

# The script that counts a batch. Its first two lines name six KEYS and three ARGV. After
# those come, for each URL of the batch, its url_count:<url> in KEYS and its hits in ARGV.
# It replies with the hits that were counted, the number of URLs in the list, and pairs of
# a key that could not be raised and the reason.
COMMIT = """
local commit, rank, total, other, day_rank, day_total = unpack(KEYS, 1, 6)
local sequence, max_urls, keep_s = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local batch = #KEYS - 6  -- URLs in it
local counted, growth, spoiled = 0, 0, {}
local function add(key, hits)  -- returns the new count, or nil
  local count = redis.pcall('INCRBY', key, hits)
  if type(count) == 'number' then return count end
  table.insert(spoiled, {key, count.err})
end

-- 1. Rehearse. Redis does not undo what a script has done before it fails. So whatever
-- Redis may refuse (a command without the right to it, a write when memory is full or on
-- a read-only replica, a key of a wrong type), it must refuse here, before the number of
-- the batch is noted. For this, each command of step 2 is called in a way that changes no
-- count: INCRBY by 0, and ZADD with XX, which adds no member. The keys that add() will
-- increase are not tried: if one of them holds no number, add() reports it, and goes on.
local seen = redis.call('INCRBY', commit, 0)  -- number of the last batch that was counted
redis.call('EXPIRE', commit, 24 * 60 * 60)
redis.call('EXISTS', other)
redis.call('ZADD', rank, 'XX', 'INCR', 0, '')
if keep_s > 0 then redis.call('ZADD', day_rank, 'XX', 'INCR', 0, '') end
local urls = redis.call('ZCARD', rank)

-- 2. If this batch is new, note its number, by INCRBY as in step 1, and count it.
if sequence > seen then
  redis.call('INCRBY', commit, sequence - seen)
  local near_the_cap = urls + batch > max_urls  -- only then it matters whether a URL is new
  for i = 1, batch do
    local key, hits = KEYS[6 + i], tonumber(ARGV[3 + i])
    if near_the_cap and redis.call('EXISTS', key) == 0 then
      if urls < max_urls then urls = urls + 1 else key = other end
    end
    local count = add(key, hits)
    if count then
      counted = counted + hits
      local url = key:sub(#'url_count:' + 1)
      -- The list gets the count itself, so that the two cannot drift apart.
      local is_new = redis.call('ZADD', rank, count, url) == 1
      -- The total is the sum of the list, and grows as the list does. (An early version
      -- of this program had no list: its URLs come to the list with their whole count.)
      if is_new then growth = growth + count else growth = growth + hits end
      if keep_s > 0 then redis.call('ZADD', day_rank, 'INCR', hits, url) end
    end
  end
  add(total, growth)
  if keep_s > 0 then
    add(day_total, counted)
    redis.call('EXPIRE', day_rank, keep_s)
    redis.call('EXPIRE', day_total, keep_s)
  end
  return {counted, redis.call('ZCARD', rank), spoiled}
end

-- 3. This batch has been counted, but the reply was lost on its way to the server, which
-- sent the batch again. So count nothing, but make the same reply, for the server's log
-- and metrics. The hits of a URL that has no key went to (other). A key that holds no
-- number refuses 0, as it refused its hits, so add() reports it again.
for i = 1, batch do
  local key, hits = KEYS[6 + i], tonumber(ARGV[3 + i])
  if redis.call('EXISTS', key) == 0 then key = other end
  local gone = redis.call('EXISTS', key) == 0  -- somebody has deleted both since then
  if gone or add(key, 0) then counted = counted + hits end
end
return {counted, urls, spoiled}
"""


def address_of(url: str) -> dict[str, Any]:
    """Where Redis is, in options of redis-py. Others, such as time-outs, are left out."""
    # In redis://:12/34@host the password is 12/34, but redis-py would take 12 for a port,
    # and the log would show it. So there must be no @ behind the host, and no # at all.
    # (In a password, / ? # must be percent-encoded.)
    if not re.fullmatch(r"\w+://[^/?#]*([/?][^@#]*)?", url):
        raise ValueError
    known = "connection_class|host|port|path|db|username|password"
    known += "|ssl_(ca_certs|certfile|keyfile|cert_reqs|check_hostname)"
    return {name: value for name, value in parse_url(url).items() if re.fullmatch(known, name)}


class RedisStore:
    def __init__(self, settings: Namespace) -> None:
        """Connects to nothing. Raises any exception if REDIS_URL is no good."""
        self.settings = settings
        self.instance = os.urandom(8).hex()
        address = address_of(settings.redis_url or LOCAL_REDIS)
        address["protocol"] = 2  # by RESP3 a pool may lend a closed link (redis-py #4252)
        kind = address.pop("connection_class", Connection)
        # Commits have a connection outside the pool, so that readers cannot hold them up.
        # It needs no lock, as only one task uses it, for one command at a time, and no
        # time-out, as that task sets one. redis-py's Connection works like this:
        # send_packed_command() connects if need be, and sends once. If a call of it or of
        # read_response() fails or is cancelled, the connection is closed. So the reply to
        # one command is never taken for that to the next (tests/test_faults.py tries it).
        self.link = link = kind(socket_timeout=None, **address)
        self.where = address.get("path") or f"{link.host}:{link.port}/{link.db}"
        reading = {**address, "socket_timeout": 1, "socket_connect_timeout": 1}
        reading["encoding_errors"] = "replace"  # as commit() does
        # Firewalls forget idle connections. So a reader tries again after any error: once
        # and without a pause, which is what redis-py makes of this option.
        reading["retry_on_error"] = [Exception]
        # A reader waits 5 s at most for one of 16. Lists use 8, so others get through.
        self.pool = BlockingConnectionPool(16, timeout=5, connection_class=kind, **reading)
        self.redis: Any = redis.asyncio.Redis.from_pool(self.pool)
        self.list_slots = asyncio.Semaphore(8)

    async def call(self, *command: Any) -> Any:
        """Redis's reply to a command that goes by the link."""
        await self.link.send_packed_command(pack_command(command))
        return await self.link.read_response()

    async def connect(self) -> None:
        """Connect to where the address leads now, and see if Redis takes commits."""
        # Close what is not in use, so that the next command connects anew.
        await self.link.disconnect(nowait=True)
        await self.pool.disconnect(inuse_connections=False)
        # If a password is missing, Redis says so only to a short command. To a long one,
        # like the script, it says "Protocol error".
        await self.ping()
        # A batch of number 0 is never new. So the script only rehearses.
        _, urls = await self.commit(0, {})
        if not urls:
            with suppress(redis.ResponseError):  # no right to look
                # Look through 10,000 keys only, as a Redis may have a billion of others.
                _, found = await self.call("SCAN", 0, "MATCH", "url_count:?*", "COUNT", 10_000)
                if found:
                    log_once("counts without a list: run tools/reindex.py", where=self.where)

    async def ping(self) -> None:
        """See whether Redis is there. Not by PING, which a user may have no right to."""
        await self.call("EXISTS", "url_rank")

    async def commit(self, sequence: int, hits: Mapping[str, int]) -> tuple[int, int]:
        """Add {url: hits}, once for each number. Returns hits counted, number of URLs."""
        day = utc_day()
        # In the order of COMMIT's first lines, and then for each URL its key and its hits.
        keys = [f"url_commit:{self.instance}", "url_rank", "url_total", f"url_count:{OTHER}"]
        keys += [of_day("url_rank", day), of_day("url_total", day)]
        keys += [f"url_count:{url}" for url in hits]
        keep = self.settings.keep_days * 86_400
        # aiohttp's parser in C takes no raw bytes in a path. Its parser in Python makes
        # surrogates of those that are no UTF-8, and they count as "?".
        names = [key.encode(errors="replace") for key in keys]
        numbers = [sequence, self.settings.max_urls, keep, *hits.values()]
        counted, urls, spoiled = await self.call("EVAL", COMMIT, len(keys), *names, *numbers)
        for key, error in spoiled:
            SPOILED.inc()
            log_once("cannot count", key=key.decode(errors="replace"), error=error.decode())
        return counted, urls

    async def totals(self, day: str) -> tuple[int, int]:
        hits = await self.redis.get(of_day("url_total", day))
        urls = await self.redis.zcard(of_day("url_rank", day))
        return int(hits or 0), urls

    async def find(self, day: str, url: str) -> tuple[int, int] | None:
        """Count and rank of a URL. The most requested one has rank 1."""
        key = of_day("url_rank", day)
        count = await self.redis.zscore(key, url)
        ahead = await self.redis.zrevrank(key, url)
        if count is None or ahead is None:  # a day can expire between the two
            return None
        return int(count), ahead + 1

    async def ranked(self, day: str, offset: int, limit: int) -> Pages:
        """Most requested first. Equal counts are by descending URL, in both stores."""
        key = of_day("url_rank", day)
        for start in range(offset, offset + limit, LIST_PAGE):
            last = min(start + LIST_PAGE, offset + limit) - 1
            async with self.list_slots:
                found = await self.redis.zrevrange(key, start, last, withscores=True)
            if not found:
                return
            yield [(url.decode(errors="replace"), int(count)) for url, count in found]

    async def close(self) -> None:
        await self.link.disconnect(nowait=True)  # at once, even if Redis hangs
        with suppress(redis.RedisError):
            await self.redis.aclose()


class MemoryStore:
    where = "memory"
    instance = ""

    def __init__(self, settings: Namespace) -> None:
        self.settings = settings
        self.counts: dict[str, Counter[str]] = {ALL_TIME: Counter()}  # and for each day

    async def nothing(self) -> None:
        """Memory is always there."""

    connect = ping = close = nothing

    async def commit(self, sequence: int, hits: Mapping[str, int]) -> tuple[int, int]:
        counts = self.counts[ALL_TIME]
        today = self.counts.setdefault(utc_day(), Counter())
        for url, n in hits.items():
            if url not in counts and len(counts) >= self.settings.max_urls:
                url = OTHER
            counts[url] += n
            today[url] += n
        last_day_gone = utc_day(ago=self.settings.keep_days)
        for day in self.counts.keys() - {ALL_TIME}:
            if day <= last_day_gone:
                del self.counts[day]
        return sum(hits.values()), len(counts)

    async def totals(self, day: str) -> tuple[int, int]:
        counts = self.counts.get(day, Counter())
        return counts.total(), len(counts)

    async def find(self, day: str, url: str) -> tuple[int, int] | None:
        counts = self.counts.get(day, Counter())
        if url not in counts:
            return None
        ahead = sum((n, each) > (counts[url], url) for each, n in counts.items())
        return counts[url], ahead + 1

    async def ranked(self, day: str, offset: int, limit: int) -> Pages:
        counts = self.counts.get(day, Counter())
        rows = sorted(counts.items(), key=lambda row: (row[1], row[0]), reverse=True)
        rows = rows[offset : offset + limit]
        for start in range(0, len(rows), LIST_PAGE):
            yield rows[start : start + LIST_PAGE]
            await asyncio.sleep(0)  # let others be served in between


def of_day(key: str, day: str) -> str:
    return f"{key}:{day}" if day else key


def utc_day(ago: int = 0) -> str:
    return str(datetime.now(UTC).date() - timedelta(days=ago))


# --- Start and stop ---------------------------------------------------------------------
# At the start, requests are answered once the store is connected, or after two seconds.
# At the end, the store closes when all requests are answered, and their hits are in it or
# in the log.
async def choose_store(settings: Namespace) -> Store:
    """Redis. But if REDIS_URL is not set, and there is no local Redis to use, memory."""
    store = RedisStore(settings)
    try:
        if not settings.redis_url:
            await asyncio.wait_for(store.connect(), 1)  # to see; GroupCommit does it again
        return store
    except Exception as error:  # whatever it is that answers there
        await store.close()
        log.warning(
            "REDIS_URL is not set: counts are lost on exit",
            no_local_redis=f"{store.where}: {str(error) or 'no answer in time'}",
        )
        return MemoryStore(settings)


async def open_store(app: web.Application) -> AsyncIterator[None]:
    """The life of the store and of GroupCommit, around that of the application."""
    store = await choose_store(app[SETTINGS])
    commits = app[GROUP_COMMIT] = GroupCommit(store)
    task = asyncio.create_task(commits.run())
    for _ in range(100):  # look for a second at most, so that /stats/ works at once
        if not commits.away:
            break
        await asyncio.sleep(0.01)
    yield
    for _ in range(200):  # two seconds at most
        if not commits.pending:
            break
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    commits.log_pending()
    await store.close()
    log.info("stopped")


def create_app(settings: Namespace) -> web.Application:
    app = web.Application(middlewares=[count_and_guard])
    app[SETTINGS] = settings
    app[TEST_RUN] = asyncio.Lock()
    app.add_routes(ROUTES.values())
    app.cleanup_ctx.append(open_store)
    return app


async def serve(settings: Namespace, listener: socket.socket) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP comes, then end in order."""
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    runner = web.AppRunner(
        create_app(settings),
        # Cookies can exceed aiohttp's own limits, 8 kB and 128 headers. Much higher limits
        # would do harm: 64 kB of slashes keep aiohttp's router busy for 284 ms, and headers
        # without end fill the memory.
        max_line_size=16_384,
        max_field_size=16_384,
        max_headers=256,
        access_log=None,  # it would cost as much as counting does
        auto_decompress=False,  # nobody reads a body, so none is inflated
        shutdown_timeout=1.5,  # then requests are cancelled, and it waits as long again
    )
    await runner.setup()
    site = web.SockSite(runner, listener, backlog=1024)
    await site.start()
    log.info("started", page=site.name)
    await stop.wait()
    await runner.cleanup()
    # All is saved. Without this line the process would wait for a thread that looks up the
    # address of Redis, and a name server can hang for long.
    os._exit(0)


def prepare_process() -> None:
    # The standard streams have the numbers 0, 1 and 2. If one is closed, a socket could
    # get its number, and libuv would abort at the end. So /dev/null takes these numbers
    # first.
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass
    os.set_blocking(2, True)  # if a reader of the log is slow, wait, and lose no line
    # A client is an open file. macOS does not tell how many it allows: 10,240 at least.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(most, 10_240) if sys.platform == "darwin" else most
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))


def configure_logging() -> None:
    """For people on a terminal, else in lines of JSON."""
    render = structlog.dev.ConsoleRenderer() if os.isatty(2) else processors.JSONRenderer()
    stamps = (processors.add_log_level, processors.TimeStamper("iso"), processors.format_exc_info)
    # The standard library's loggers survive a log that cannot be written (a full disk).
    structlog.configure((*stamps, render), logger_factory=structlog.stdlib.LoggerFactory())
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # no line for a request


def main() -> None:
    settings = read_settings(sys.argv[1:])
    prepare_process()
    configure_logging()
    ipv6 = ":" in settings.host
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    address = (settings.host, settings.port)
    try:
        listener = socket.create_server(address, family=family, dualstack_ipv6=ipv6)
    except (OSError, ValueError) as error:  # ValueError: a name too long, or no IPv6 here
        sys.exit(f"server.py: cannot listen on PORT {settings.port} of HOST: {error}")
    uvloop.run(serve(settings, listener))


if __name__ == "__main__":
    main()
