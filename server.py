# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp==3.14.5", "prometheus-client==0.26.0", "redis[hiredis]==8.1.0",
#   "structlog==26.1.0", "uvloop==0.23.0; sys_platform != 'win32'"]
# ///
"""Request Statistics Tracker: counts every request under /api/ by URL path, in Redis.

    any method /api/...   200 {"url": "/api/products/123/"}, the URL as counted
    GET /stats/           [{"count": 2, "url": "/api/products/123/"}, ...], most requested first;
                          ?limit= and ?offset= page it; X-Total-Count is the number of URLs
    GET /stats/api/...    one URL: {"count": 2, "url": "/api/products/123/", "rank": 1}, or 404
    POST /test/<n>/       sends n random requests to this server and reports on them;
                          ?seed= repeats a run, ?concurrency= is 1 to 256 (32)
    GET /health           {"status": "healthy", "redis": "connected", ...}, or 503
    GET /metrics, GET /   figures for Prometheus; the live page

A request counts once, when it arrives, under its decoded path (at most 2,048 characters) with a
trailing slash. Its answer means that the hit is in Redis or, while Redis is away, held in memory
(100,000 URLs or 64 MB of them) until it is back. Errors are JSON: {"error": "what is wrong, and
what would be right"}. A list read while counts change can repeat or miss a URL.
"""

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("server.py: Python 3.11 or newer is needed")
if __name__ == "__main__":  # before the slow imports: a container's first process ignores SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import argparse
import asyncio
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from functools import lru_cache, partial
from itertools import islice, takewhile
from json.encoder import encode_basestring_ascii as json_string
from pathlib import Path
from typing import Any, cast

import aiohttp
import prometheus_client as prometheus
import redis
import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from hiredis import pack_command
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.multiprocess import MultiProcessCollector
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from yarl import URL

try:
    import resource

    from uvloop import new_event_loop
except ImportError:  # Windows
    from asyncio import new_event_loop  # type: ignore[assignment]

log: structlog.types.FilteringBoundLogger = structlog.get_logger()

# --- Configuration --------------------------------------------------------------------------------
# Read once, by main() or by create_app(). A bad value ends the start with one line that names it.

ANY = range(10**15 + 1)
DEFAULT_REDIS_URL = "redis://localhost:6379/0"
PASSWORD = re.compile(r"(?s)(?<=//).*(?=@)|^(?!\w+://).*(?=@)|(?<=password=)[^&]*")
OPTIONS = [  # variable, default, numbers allowed, line of --help
    ("HOST", "127.0.0.1", None, "127.0.0.1; 0.0.0.0 listens to the network"),
    ("PORT", "5000", range(65_536), "5000; 0 takes any free one"),
    ("REDIS_URL", "", None, f"unset: {DEFAULT_REDIS_URL} if it answers, else memory"),
    ("MAX_TEST_REQUESTS", "100000", ANY, "100000 in one test run; 0 turns /test/ off"),
    ("MAX_URLS", "10000000", ANY[1:], '10000000; beyond them a new URL counts as "(other)"'),
]


def read_settings(arguments: list[str]) -> argparse.Namespace:
    """Flags, else environment variables (an empty one is unset), else defaults."""
    parser = argparse.ArgumentParser("server.py", argparse.SUPPRESS, __doc__)  # no usage line
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, default, span, text in OPTIONS:
        flag, value = "--" + name.lower().replace("_", "-"), os.environ.get(name) or default
        kind = partial(whole_number, name, span=span) if span else str
        parser.add_argument(flag, metavar=name, default=value, type=kind, help=text)
    settings = parser.parse_args(arguments)
    try:
        RedisStore(settings.redis_url or DEFAULT_REDIS_URL, 0)
    except Exception:  # no client can be made of it; the words may quote a part of the password
        shown = PASSWORD.sub("***", settings.redis_url)
        parser.error(f"argument --redis-url: REDIS_URL is {shown!r}: use redis://host:6379/0")
    return settings


def whole_number(name: str, text: str, span: range, limit: str = "") -> int:
    """The number that text spells in ASCII digits. Raises ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,16}", text) or int(text) not in span:
        wanted = f", {span[0]} or more" if span[-1] == ANY[-1] else f" from {span[0]} to {span[-1]}"
        raise argparse.ArgumentTypeError(f"{name} is {text!r}: use a whole number{wanted}{limit}")
    return int(text)


# --- Stores ---------------------------------------------------------------------------------------
# Redis and memory answer to the same methods; nobody else knows which one it is. Keys in Redis:
#   url_count:<url>        the count, raised by INCRBY: the truth
#   url_rank               sorted set of the URLs, scored with the count itself, so it cannot drift
#   url_total              the sum of url_rank
#   url_schema             1 (the version of this layout) when url_rank has every URL, else 0
#   url_commit:<instance>  the last sequence number applied for one server, for 24 hours

Rows = list[tuple[str, int]]  # URL and count
OTHER = "(other)"
SHARED = ("url_rank", "url_total", "url_schema", f"url_count:{OTHER}")
PAGE = 1000  # URLs written in one go: a few milliseconds of Redis's time
LIST_PAGE = 200  # URLs read in one go: a client that stops reading keeps one such page in memory
NO_ANSWER = "no answer in time"  # asyncio's TimeoutError has no words

# KEYS: url_commit:<instance>, the SHARED ones, url_count:<url>... ARGV: sequence number, MAX_URLS,
# hits of each URL. Returns whether url_rank has every URL, then keys that cannot count, and why.
# Redis does not undo a script that fails half-way. So everything that it may refuse (no right, no
# memory, read-only) is tried without effect before the number is recorded; then nothing raises.
# A number that was seen before adds nothing, but gets the same reply: the first one was lost.
COMMIT = """
local urls, total = redis.call('ZCARD', KEYS[2]), redis.call('GET', KEYS[3])
local whole = redis.call('GET', KEYS[4]) == '1' and (urls > 0 or total == '0')
local seen, sequence = tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(ARGV[1])
if #KEYS > 5 or sequence == 0 or sequence > seen then  -- not for a mere question
  redis.call('SET', KEYS[1], seen, 'EX', 86400)
  redis.call('ZADD', KEYS[2], 'XX', 0, '')
  redis.call('ZSCORE', KEYS[2], '')
  redis.call('EXISTS', KEYS[5])
  redis.call('INCRBY', KEYS[1], math.max(sequence - seen, 0))
  if urls == 0 and total ~= '0' then redis.call('SET', KEYS[3], 0) end
  if not whole then redis.call('SET', KEYS[4], 0) end
end
local prefix, room, added, reply = #'url_count:', ARGV[2] - urls, 0, {whole and 1 or 0}
for i = 6, #KEYS do  -- the hits of KEYS[6] are ARGV[3]
  local key, hits = KEYS[i], sequence > seen and ARGV[i - 3] or 0
  local new = room < #KEYS and redis.call('EXISTS', key) == 0
  if new then room = room - 1 end
  if new and room < 0 then key = KEYS[5] end
  local count, url = redis.pcall('INCRBY', key, hits), key:sub(prefix + 1)
  if type(count) == 'number' then
    added = added + count - (redis.call('ZSCORE', KEYS[2], url) or 0)
    redis.call('ZADD', KEYS[2], count, url)
  else
    reply[#reply + 1], reply[#reply + 2] = key, count.err
  end
end
redis.pcall('INCRBY', KEYS[3], added)
return reply
"""


class RedisStore:
    """Counts in Redis; where that fails raises redis.RedisError. A wrong url is a ValueError."""

    def __init__(self, url: str, max_urls: int) -> None:
        url.index("://")  # a ValueError; redis-py would take the host to be localhost
        limits = {"socket_timeout": 1, "socket_connect_timeout": 1}
        # RESP2: with RESP3 the pool hands out connections that Redis has closed (redis-py #4252).
        options: dict[str, Any] = {**parse_url(url), "protocol": 2, "decode_responses": False}
        pool = BlockingConnectionPool(max_connections=16, timeout=5, **options | limits)
        self.redis = Redis.from_pool(pool)
        # Commits have a connection of their own, so that readers cannot hold them up.
        self.writer = pool.connection_class(**pool.connection_kwargs | dict.fromkeys(limits))
        self.lists = asyncio.Semaphore(8)  # pages read at a time: other readers have the rest
        self.state, self.instance, self.script = "connected", os.urandom(8).hex(), b""
        self.max_urls, self.refused = max_urls, set[bytes]()

    async def call(self, *command: Any) -> Any:
        """What Redis replies to one command, sent on the writer's connection."""
        try:
            await self.writer.send_packed_command(pack_command(command))
            return await self.writer.read_response()
        except redis.ResponseError:  # from a demoted primary? Its address may lead elsewhere now
            await self.writer.disconnect()
            await self.redis.connection_pool.disconnect(inuse_connections=False)
            raise

    async def open(self, patience: float) -> None:
        """See whether Redis counts, and whether url_rank has every URL; if not, index them all."""
        async with asyncio.timeout(patience):
            self.script = await self.call("SCRIPT", "LOAD", COMMIT)
            whole = await self.commit(0, {})
        cursor, pages = b"0", 0
        while not whole:  # commits of 0 hits: no harm if another server does it too, or if we die
            async with asyncio.timeout(60):
                scan = ("MATCH", "url_count:?*", "COUNT", PAGE, "TYPE", "string")
                cursor, keys = await self.call("SCAN", cursor, *scan)
                urls = [key[len("url_count:") :].decode(errors="surrogateescape") for key in keys]
                await self.commit(0, dict.fromkeys(urls, 0))
                pages, whole = pages + 1, cursor == b"0"
                if pages % 100 == 0 or (whole and pages + len(urls) > 1):
                    log.info("indexing counts", pages=pages, done=whole)
                if whole:
                    await self.call("SET", "url_schema", 1)

    async def commit(self, sequence: int, hits: Mapping[str, int]) -> bool:
        """Add hits {url: n}, unless this sequence was added before or is 0. Is url_rank whole?"""
        urls = [f"url_count:{url}".encode(errors="surrogateescape") for url in hits]
        keys = (f"url_commit:{self.instance}", *SHARED, *urls)
        arguments = (sequence, self.max_urls, *hits.values())
        whole, *refused = await self.call("EVALSHA", self.script, len(keys), *keys, *arguments)
        for key, error in zip(refused[::2], refused[1::2], strict=True):
            if key not in self.refused:  # once is enough
                self.refused.add(key)
                log.error("cannot count", key=key.decode(errors="replace"), error=error.decode())
        return bool(whole)

    async def totals(self) -> tuple[int, int]:
        return int(await self.redis.get("url_total") or 0), await self.redis.zcard("url_rank")

    async def find(self, url: str) -> tuple[int, int] | None:
        """Count and rank (1 for the most requested) of one URL."""
        hits = await self.redis.zscore("url_rank", url)
        ahead = cast(int | None, await self.redis.zrevrank("url_rank", url))
        return None if hits is None or ahead is None else (int(hits), ahead + 1)

    async def ranked(self, offset: int, limit: int) -> AsyncIterator[Rows]:
        """Pages of (url, count), most requested first, equal counts by descending URL."""
        for start in range(offset, offset + limit, LIST_PAGE):
            last = min(start + LIST_PAGE, offset + limit) - 1
            async with self.lists:  # first come, first served, so no list starves another
                rows: Any = await self.redis.zrevrange("url_rank", start, last, withscores=True)
            if not rows:
                return
            yield [(url.decode(errors="replace"), int(hits)) for url, hits in rows]

    async def aclose(self) -> None:
        await self.writer.disconnect(nowait=True)  # a Redis that hangs may not hold up the end
        with suppress(redis.RedisError):
            await self.redis.aclose()


class MemoryStore:
    """The same methods on a dictionary."""

    def __init__(self, max_urls: int) -> None:
        self.state, self.instance = "in-memory", ""
        self.max_urls, self.counts = max_urls, Counter[str]()

    async def open(self, patience: float) -> None: ...

    async def commit(self, sequence: int, hits: Mapping[str, int]) -> bool:
        for url, n in hits.items():
            fits = url in self.counts or len(self.counts) < self.max_urls
            self.counts[url if fits else OTHER] += n
        return True

    async def totals(self) -> tuple[int, int]:
        return self.counts.total(), len(self.counts)

    async def find(self, url: str) -> tuple[int, int] | None:
        me = (self.counts[url], url)
        ahead = sum((n, other) > me for other, n in self.counts.items())
        return (me[0], ahead + 1) if me[0] else None

    async def ranked(self, offset: int, limit: int) -> AsyncIterator[Rows]:
        rows = sorted(self.counts.items(), key=lambda row: (row[1], row[0]), reverse=True)
        yield rows[offset : offset + limit]

    async def aclose(self) -> None: ...


# --- Group commit ---------------------------------------------------------------------------------
# The middleware awaits hit(). One INCR a request would cost more than the rest of the request, so
# hits are committed in rounds, and the next round fills while one is under way. No timer: an idle
# server commits at once, a busy one in rounds that grow with the load (DeWitt et al., SIGMOD 1984).

Store = RedisStore | MemoryStore
PATIENCE = 1.0  # seconds that a round may take: requests wait for it
MAX_PATIENCE = 8.0  # seconds that an attempt may take while no request waits
MAX_BACKLOG, MAX_BACKLOG_BYTES = 100_000, 64 * 2**20  # URLs held while the store is away
FULL, RETRY_AFTER = "too many URLs wait for Redis: try again later", {"Retry-After": "1"}
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds
HITS = prometheus.Counter("url_hits", "Hits committed")
PENDING = prometheus.Gauge("url_hits_pending", "Hits not committed", multiprocess_mode="livesum")
COMMIT_SECONDS = prometheus.Histogram("url_commit_seconds", "Time to commit", buckets=BUCKETS)
UP = prometheus.Gauge("redis_up", "1 while the store answers", multiprocess_mode="livemin")


class GroupCommit:
    """Counts every hit in a store exactly once, until aclose()."""

    def __init__(self, store: Store, away: str) -> None:
        self.store, self.away = store, away  # "" while the store answers, else why it does not
        self.held: dict[str, int] = {}  # hits of each URL, not sent
        self.sent: dict[str, int] = {}  # sent under this sequence, not confirmed: perhaps applied
        self.sequence, self.size = 1, 0  # size: bytes of what is held, while the store is away
        self.waiters: list[asyncio.Future[None]] = []
        self.wake, self.loop = asyncio.Event(), asyncio.get_running_loop()
        self.started, self.task = self.loop.time(), self.loop.create_task(self.run())

    @property
    def pending(self) -> int:
        return sum(self.held.values()) + sum(self.sent.values())

    def hit(self, url: str) -> asyncio.Future[None]:
        """Count one request. Done when the hit is in the store; while that is away, at once."""
        if url not in self.held:
            full = len(self.held) + len(self.sent) >= MAX_BACKLOG or self.size >= MAX_BACKLOG_BYTES
            if self.away and full and url not in self.sent:
                raise web.HTTPServiceUnavailable(text=FULL, headers=RETRY_AFTER)
            self.size += sys.getsizeof(url) if self.away else 0
            if not self.held:
                self.wake.set()
            self.held[url] = 0
        self.held[url] += 1
        waiter = self.loop.create_future()  # one a request, so cancelling it leaves the others
        if self.away:
            waiter.set_result(None)
        else:
            self.waiters.append(waiter)
        return waiter

    async def run(self) -> None:
        """Commit what is held, then answer the requests that wait for it; again and again."""
        while True:
            UP.set(not self.away)
            if self.away:
                await self.outlast()
            if not self.held:
                timer = self.loop.call_later(1, self.wake.set)  # to ask an idle store how it is
                await self.wake.wait()
                timer.cancel()
            self.wake.clear()
            waiters, self.waiters, owed = self.waiters, [], len(self.held) or 1  # 1: a question
            try:
                async with asyncio.timeout(PATIENCE):
                    while owed > 0:
                        owed -= len(await self.commit()) or 1
            except Exception as error:  # whatever it is, no hit may be lost
                self.away = str(error) or NO_ANSWER
                waiters, self.waiters = waiters + self.waiters, []  # from now on nobody waits
            for waiter in waiters:
                if not waiter.done():  # cancelled
                    waiter.set_result(None)
            PENDING.set(self.pending)

    async def outlast(self) -> None:
        """Hold hits until the store answers quickly and has all but a page of them."""
        log.error("redis is away, hits are held", error=self.away)
        lost, patience, n = self.loop.time(), PATIENCE, 0
        while self.away:
            patience = min(2 * patience, MAX_PATIENCE)
            self.size = sum(map(sys.getsizeof, self.held))
            try:
                await self.store.open(patience)  # it may have come back empty, or without its index
                began = self.loop.time()
                async with asyncio.timeout(patience):
                    n += sum((await self.commit()).values())
                if len(self.held) <= PAGE and self.loop.time() - began < PATIENCE / 2:
                    self.away = ""
            except Exception as error:
                self.away = str(error) or NO_ANSWER
                PENDING.set(self.pending)
                await asyncio.sleep(0.1)
        log.info("redis is back", hits=n + self.pending, seconds=round(self.loop.time() - lost, 1))

    async def commit(self) -> dict[str, int]:
        """Send the next slice, or the unconfirmed one again; without hits, ask how the store is."""
        if not self.sent:
            self.sent = self.slice()
            self.sequence += bool(self.sent)
        with COMMIT_SECONDS.time():
            await self.store.commit(self.sequence, self.sent)
        sent, self.sent = self.sent, {}
        HITS.inc(sum(sent.values()))
        return sent

    def slice(self) -> dict[str, int]:
        """Take the oldest hits, 100,000 characters at most: a slow link must get them through."""
        urls = list(islice(self.held, PAGE))
        fit = 100_000 // max(map(len, urls), default=1)
        return {url: self.held.pop(url) for url in urls[:fit]}

    async def aclose(self) -> None:
        """Commit what is left; log what cannot be."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                while self.pending:
                    await asyncio.sleep(0.01)
        self.task.cancel()
        await asyncio.wait([self.task])
        if self.sent:  # applied, if url_commit:<instance> has reached the sequence
            sent = {"instance": self.store.instance, "sequence": self.sequence, "sent": self.sent}
            log.error("hits not committed", hits=sum(self.sent.values()), **sent)
        while held := self.slice():
            log.error("hits not committed", hits=sum(held.values()), held=held)


# --- Synthetic traffic ----------------------------------------------------------------------------
# POST /test/<n>/ requests random URLs from the very socket that it came in by: a Host header or a
# setting could aim the traffic at somebody else.


def random_urls(n: int, seed: int) -> tuple[list[str], Iterator[str]]:
    """Three random segments, and n URLs of one to six of them each."""
    rng = random.Random(seed)
    segments = [f"{drawn:06x}" for drawn in rng.sample(range(16**6), 3)]
    paths = (rng.choices(segments, k=rng.randint(1, 6)) for _ in range(n))
    return segments, (f"/api/{'/'.join(path)}/" for path in paths)


async def send(urls: Iterator[str], to: URL, workers: int, app: web.Application) -> dict[str, Any]:
    """Request the URLs, fewer if the server is told to stop, and report."""
    ms, requested, status, errors = list[float](), set[str](), Counter[str](), Counter[str]()

    async def work() -> None:
        for url in takewhile(lambda _: not app[STOPPING].is_set(), urls):
            began = time.perf_counter()
            try:
                async with session.get(url, allow_redirects=False) as response:
                    await response.read()
                ms.append((time.perf_counter() - began) * 1000)
                status[str(response.status)] += 1
                requested.add(url)
            except (aiohttp.ClientError, TimeoutError) as error:
                if not app[STOPPING].is_set():  # a server that stops takes no new connections
                    errors[type(error).__name__] += 1
            app[PROGRESS]["done"] += 1

    began = time.perf_counter()
    async with aiohttp.ClientSession(to, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(work() for _ in range(workers)))
    seconds = time.perf_counter() - began
    ok, failed = status["200"], status.total() - status["200"] + errors.total()
    report: dict[str, Any] = {"ok": ok, "failed": failed, "duration_s": round(seconds, 3)}
    report |= {"requests_per_s": round(len(ms) / seconds, 1), "latency_ms": summary(sorted(ms))}
    return report | {"status": status, "errors": errors, "unique_urls": len(requested)}


def summary(ms: list[float]) -> dict[str, float]:
    """Of sorted latencies; percentiles are nearest-rank: N % took pN or less."""
    ranks = {f"p{p}": ms[(len(ms) * p - 1) // 100] for p in (50, 95, 99) if ms}
    ends = {"min": ms[0], "mean": sum(ms) / len(ms), **ranks, "max": ms[-1]} if ms else {}
    return {name: round(figure, 1) for name, figure in ends.items()}


# --- Middleware and handlers ----------------------------------------------------------------------
# Every request passes the one middleware. Handlers are plain: parse, ask the store, answer.

NOSNIFF = {"X-Content-Type-Options": "nosniff"}
HEADERS = NOSNIFF | {"Content-Type": "application/json"}
UNUSABLE = (redis.RedisError, ValueError, OverflowError)  # the last two: a count is "x" or "inf"
NOT_HERE = "nothing is here: paths that start with /api/ are counted, /stats/ lists the counts"
SETTINGS = web.AppKey("settings", argparse.Namespace)
COMMITS = web.AppKey("commits", GroupCommit)
PROGRESS = web.AppKey("progress", dict[str, int])  # of the test run, empty while there is none
STOPPING = web.AppKey("stopping", asyncio.Event)
LABELS = ("method", "route", "code")
SECONDS = prometheus.Histogram("http_request_duration_seconds", "Time", LABELS, buckets=BUCKETS)
seconds_of = lru_cache(1024)(SECONDS.labels)  # labels() by itself is slow


@web.middleware
async def count_and_guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count a request under /api/, answer errors in JSON, note how long it took."""
    began = time.perf_counter()
    try:
        if handler is api:  # not by the path: /api%2Fx is a 404
            if len(request.path) > 2048:
                raise web.HTTPRequestURITooLong(text="a path has at most 2048 characters")
            await request.app[COMMITS].hit(with_slash(request.path))
        response = await handler(request)
    except web.HTTPException as error:
        text = NOT_HERE if error.text == "404: Not Found" else error.text
        text = f"use {error.headers['Allow']} here" if error.status == 405 else text
        response = answer({"error": text}, error.status, {**error.headers, **HEADERS})
    except argparse.ArgumentTypeError as error:
        response = answer({"error": str(error)}, 400)
    except UNUSABLE as error:
        response = answer({"error": f"Redis: {error}"}, 503, HEADERS | RETRY_AFTER)
    except Exception:
        log.exception("unexpected error", path=str(request.rel_url))
        response = answer({"error": "unexpected error: the server's log has it"}, 500)
    method = request.method if request.method in hdrs.METH_ALL else "OTHER"
    labels = method, ROUTE_OF.get(handler, "none"), response.status
    seconds_of(*labels).observe(time.perf_counter() - began)
    return response


def answer(data: object, status: int = 200, headers: Mapping[str, str] = HEADERS) -> web.Response:
    return web.Response(body=f"{json.dumps(data)}\n".encode(), status=status, headers=headers)


def with_slash(path: str) -> str:
    return path if path[-1] == "/" else path + "/"


async def api(request: web.Request) -> web.Response:
    # Not json.dumps(), which takes longer to find the encoder than to encode.
    url = json_string(with_slash(request.path))
    return web.Response(body=f'{{"url": {url}}}\n'.encode(), headers=HEADERS)


async def stats(request: web.Request) -> web.Response:
    limit = whole_number("limit", request.query.get("limit", str(ANY[-1])), ANY)
    offset = whole_number("offset", request.query.get("offset", "0"), ANY)
    store = request.app[COMMITS].store
    _, urls = await store.totals()
    pages = store.ranked(offset, limit)
    rows: Rows = await anext(pages, [])  # before the headers: until then a failure can be a 503
    return web.Response(body=json_list(rows, pages), headers=HEADERS | {"X-Total-Count": f"{urls}"})


async def json_list(rows: Rows, pages: AsyncIterator[Rows]) -> AsyncIterator[bytes]:
    """The list page by page, in flat memory; if it raises, aiohttp breaks the connection off."""
    opening = "["
    while rows:
        page = ", ".join(f'{{"count": {hits}, "url": {json_string(url)}}}' for url, hits in rows)
        yield (opening + page).encode()
        opening, rows = ", ", await anext(pages, [])
    yield b"[]\n" if opening == "[" else b"]\n"


async def stats_of_url(request: web.Request) -> web.Response:
    url = with_slash(request.path.removeprefix("/stats"))
    found = await request.app[COMMITS].store.find(url)
    if not found:
        raise web.HTTPNotFound(text=f"{url} was never requested")
    return answer({"count": found[0], "url": url, "rank": found[1]})


async def test(request: web.Request) -> web.Response:
    progress, most = request.app[PROGRESS], request.app[SETTINGS].max_test_requests
    if not most:
        raise web.HTTPForbidden(text="test runs are off: MAX_TEST_REQUESTS is 0")
    if from_another_site(request.headers):
        raise web.HTTPForbidden(text="a page of another site may not start a test run")
    n = whole_number("n", request.match_info["n"], range(1, most + 1), " (MAX_TEST_REQUESTS)")
    workers = whole_number("concurrency", request.query.get("concurrency", "32"), range(1, 257))
    seed = whole_number("seed", request.query.get("seed", str(random.randrange(10**9))), ANY)
    if progress:
        raise web.HTTPTooManyRequests(text="wait: a test run is under way", headers=RETRY_AFTER)
    address = request.get_extra_info("sockname")
    if isinstance(address, str):
        raise web.HTTPBadRequest(text="a test run needs a TCP port, this came by a unix socket")
    base = URL.build(scheme="http", host=address[0], port=address[1])
    segments, urls = random_urls(n, seed)
    report = {"requested": n, "concurrency": workers, "seed": seed, "segments": segments}
    progress.update(requested=n, done=0)
    try:
        report |= await send(urls, base, workers, request.app)
    finally:
        progress.clear()
    return answer(report)


def from_another_site(headers: Mapping[str, str]) -> bool:
    """Whether another site's page made a browser send this (Go's http.CrossOriginProtection)."""
    site, origin, host = (headers.get(name) for name in ("Sec-Fetch-Site", "Origin", "Host"))
    foreign = origin not in (None, f"http://{host}", f"https://{host}")
    return site not in ("same-origin", "none") if site else foreign


async def health(request: web.Request) -> web.Response:
    commits, progress = request.app[COMMITS], request.app[PROGRESS]
    report: dict[str, object] = {"status": "healthy", "redis": commits.store.state}
    report |= {"pending": commits.pending} | ({"test_run": progress} if progress else {})
    report["uptime_s"] = round(commits.loop.time() - commits.started, 1)
    try:
        if commits.away:
            raise redis.RedisError(commits.away)
        report["hits"], report["urls"] = await commits.store.totals()
    except UNUSABLE as error:
        report |= {"status": "unhealthy", "redis": "disconnected", "error": str(error)}
        return answer(report, 503, HEADERS | RETRY_AFTER)
    return answer(report)


async def metrics(request: web.Request) -> web.StreamResponse:
    registry = prometheus.REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # prometheus-client's way to add up processes
        registry = prometheus.CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    response = await make_aiohttp_handler(registry)(request.clone(headers={}))  # Accept can fail
    response.headers.update(NOSNIFF)
    return response


async def live_page(request: web.Request) -> web.StreamResponse:
    page = Path(__file__).with_name("dashboard.html")
    if not page.exists():
        return answer({"error": "the live page is dashboard.html: put it beside server.py"}, 404)
    policy = {"Content-Security-Policy": "frame-ancestors 'none'", "Cache-Control": "no-cache"}
    return web.FileResponse(page, headers=NOSNIFF | policy)


ROUTES = [  # each with its label in /metrics
    (web.get("/", live_page), "/"),
    (web.get("/stats{slash:/?}", stats), "/stats/"),
    (web.get("/stats{url:/api/(?s:.*)}", stats_of_url), "/stats/api/..."),
    (web.post("/test/{n}{slash:/?}", test), "/test/<n>/"),
    (web.get("/health{slash:/?}", health), "/health"),
    (web.get("/metrics{slash:/?}", metrics), "/metrics"),
    (web.route("*", "/api/{tail:(?s:.*)}", api), "/api/..."),  # ?s: a newline (%0A) counts, too
]
ROUTE_OF = {route.handler: label for route, label in ROUTES}

# --- Lifecycle ------------------------------------------------------------------------------------
# The store opens before the first request, and closes when group commit has drained.


async def connect(settings: argparse.Namespace, managed: bool) -> tuple[Store, str]:
    """A store, and why it does not answer yet, or "". Exits where counting may not start."""
    url = settings.redis_url or DEFAULT_REDIS_URL
    store, shown = RedisStore(url, settings.max_urls), PASSWORD.sub("***", url)
    try:
        await store.open(MAX_PATIENCE if settings.redis_url else PATIENCE)
    except (redis.RedisError, OSError) as error:
        reason = f"REDIS_URL={shown}: " + (str(error) or NO_ANSWER)
        if managed:
            return store, reason
        await store.aclose()
        if settings.redis_url or type(error) not in (TimeoutError, redis.ConnectionError):
            sys.exit(f"server.py: {reason}")
        log.warning("no redis, counts are lost on exit", error=reason)
        return MemoryStore(settings.max_urls), ""
    log.info("counting in redis", redis=shown)
    with suppress(redis.RedisError):  # some forbid the question
        safety = await store.redis.config_get("appendonly", "appendfsync", "maxmemory-policy")
        if "no" in safety.values() or safety.get("maxmemory-policy", "noeviction") != "noeviction":
            mend = "CONFIG SET appendonly yes appendfsync everysec maxmemory-policy noeviction"
            log.warning("redis can lose or evict counts", mend=mend, **cast(dict[str, str], safety))
    return store, ""


@asynccontextmanager
async def lifecycle(app: web.Application, managed: bool) -> AsyncIterator[None]:
    store, away = await connect(app[SETTINGS], managed)
    async with aclosing(store), aclosing(GroupCommit(store, away)) as app[COMMITS]:
        yield
    log.info("stopped")


async def stop_test_run(app: web.Application) -> None:
    app[STOPPING].set()


# The access log would cost as much as counting does. aiohttp gives running requests this time-out
# twice. Nobody reads a body, so none is inflated.
SERVING: dict[str, Any] = {"access_log": None, "shutdown_timeout": 1.5, "auto_decompress": False}


async def create_app(settings: argparse.Namespace | None = None) -> web.Application | web.AppRunner:
    """An application; for a process manager, which gives no settings, with a runner around it."""
    app = web.Application(middlewares=[count_and_guard])
    app[SETTINGS], app[PROGRESS], app[STOPPING] = settings or read_settings([]), {}, asyncio.Event()
    app.add_routes(route for route, _ in ROUTES)
    app.cleanup_ctx.append(partial(lifecycle, managed=not settings))
    app.on_shutdown.append(stop_test_run)
    if not settings:
        configure_logging()
    return app if settings else web.AppRunner(app, **SERVING)


def configure_logging() -> None:
    """One event a line on standard error: for people on a terminal, else JSON."""
    steps = structlog.processors
    render = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else steps.JSONRenderer()
    chain = (steps.add_log_level, steps.TimeStamper("iso"), steps.format_exc_info, render)
    structlog.configure(chain, logger_factory=structlog.stdlib.LoggerFactory())
    logging.basicConfig(format="%(message)s", level=logging.INFO)  # survives a full disk
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # clients' errors, tracebacks


def end_on_signals(loop: asyncio.AbstractEventLoop) -> None:
    """Let a signal end the server, once: a second one may not cut short the last commits."""

    def end() -> None:
        for number in ends:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(30)  # all is saved long before, but a thread may wait for a name server
        raise web.GracefulExit

    with suppress(AttributeError, NotImplementedError):  # Windows has Ctrl-C only
        ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in ends:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                loop.add_signal_handler(number, end)


def main() -> None:
    settings = read_settings(sys.argv[1:])
    configure_logging()
    with suppress(AttributeError, NameError, OSError, ValueError):  # where a system has it not
        os.set_blocking(2, True)  # or the log may lose lines
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # one open file a client
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = new_event_loop()
    end_on_signals(loop)
    options: dict[str, Any] = SERVING | {"backlog": 1024, "handle_signals": False, "loop": loop}
    options["print"] = lambda text: log.info("started", page=text.split()[3])
    try:
        web.run_app(create_app(settings), host=settings.host, port=settings.port, **options)  # type: ignore[arg-type]
    except (OSError, UnicodeError) as error:
        other = f"HOST={settings.host} PORT={settings.port}: {error}"
        taken = f"port {settings.port} is in use: set PORT to another"
        sys.exit(f"server.py: {taken if 'in use' in str(error) else other}")


if __name__ == "__main__":
    main()
