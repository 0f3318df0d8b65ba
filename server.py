"""Request Statistics Tracker: counts every request under /api/ by URL path, in Redis.

    any method /api/...   200 {"url": "/api/products/123/"}, the URL as counted
    GET /stats/           [{"count": 2, "url": "/api/products/123/"}, ...], most requested first;
                          ?limit= and ?offset= page it; X-Total-Count is the number of URLs
    GET /stats/api/...    one URL: {"count": 2, "url": "/api/products/123/", "rank": 1}, or 404
    POST /test/<n>/       sends n random requests to this server and reports on them;
                          ?seed= repeats a run, ?concurrency= is 1 to 256 (32)
    GET /health           {"status": "healthy", "redis": "connected", ...}, or 503
    GET /metrics          for Prometheus
    GET /                 the live page

A request counts once, when it arrives, under its decoded path with a trailing slash. Its answer
means that the hit is in Redis or, while Redis is away, held in memory until it is back. Errors are
JSON: {"error": "what is wrong, and what would be right"}.

    HOST               --host        127.0.0.1
    PORT               --port        5000; 0 takes any free one
    REDIS_URL          --redis-url   unset: redis://localhost:6379/0 if it answers, else memory
    MAX_TEST_REQUESTS                100000 in one test run; 0 turns /test/ off
    MAX_URLS                         10000000; a new URL beyond them counts as "(other)"
    METRICS_PORT                     unset; if set, also /metrics of each process, from this port on
    LOG_FORMAT                       text on a terminal, else json

Limits, on purpose: a path has at most 2,048 characters. While Redis is away, hits of at most
100,000 URLs are held in memory. A list read while counts change can repeat or miss a URL that moves
from page to page. The in-memory store, for demos, sorts everything for every list.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import re
import secrets
import signal
import socket
import sys
import time
from base64 import b64encode
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate, count, islice
from json.encoder import encode_basestring_ascii as quote
from pathlib import Path
from typing import Any, Self, cast

import aiohttp
import redis.exceptions
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from hiredis import pack_command
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest, start_http_server
from prometheus_client import core as prometheus
from prometheus_client.registry import Collector
from pythonjsonlogger.json import JsonFormatter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from yarl import URL

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    import resource

    from uvloop import new_event_loop

log = logging.getLogger("server")

# --- Configuration --------------------------------------------------------------------------------
# Read once, by whoever calls create_app(). A bad value ends the start with one line that names it:
# nobody should read a traceback to find a typo.


class UserError(Exception):
    """Somebody's mistake. The message is one line: what is wrong, and what would be right."""


@dataclass(frozen=True)
class Settings:
    host: str
    port: int
    redis_url: str
    max_test_requests: int
    max_urls: int
    metrics_port: int
    log_format: str

    @classmethod
    def load(cls, env: Mapping[str, str]) -> Self:
        """Settings from environment variables; an empty one is unset. Raises UserError."""
        log_format = env.get("LOG_FORMAT") or ("text" if sys.stderr.isatty() else "json")
        if log_format not in ("text", "json"):
            raise UserError(f"LOG_FORMAT={log_format!r}: use text or json")
        most = env.get("MAX_TEST_REQUESTS") or "100000"
        return cls(
            host=env.get("HOST") or "127.0.0.1",
            port=whole_number("PORT", env.get("PORT") or "5000", 0, 65_535),
            redis_url=env.get("REDIS_URL") or "",
            max_test_requests=whole_number("MAX_TEST_REQUESTS", most),
            max_urls=whole_number("MAX_URLS", env.get("MAX_URLS") or "10000000", 1),
            metrics_port=whole_number("METRICS_PORT", env.get("METRICS_PORT") or "0", 0, 65_000),
            log_format=log_format,
        )


def whole_number(name: str, text: str, low: int = 0, high: int = 10**15) -> int:
    """The number that text spells in ASCII digits. Raises UserError."""
    if not re.fullmatch("[0-9]{1,16}", text) or not low <= int(text) <= high:
        raise UserError(f"{name}={text!r}: use a whole number from {low} to {high}")
    return int(text)


# --- Stores ---------------------------------------------------------------------------------------
# Redis and memory answer to the same methods, and the rest of the program does not know which it
# has. All Redis commands stand here. The keys:
#   url_count:<url>        the count, raised by INCRBY: the truth
#   url_rank               sorted set url -> count, set to what INCRBY returned, so it cannot drift
#   url_total              the sum of url_rank
#   url_commit:<instance>  the last sequence number that was applied for one server, for 24 hours
#   url_schema             the version of this layout, 1

DEFAULT_REDIS_URL = "redis://localhost:6379/0"
OTHER = "(other)"
SHARED = ("url_rank", "url_total", f"url_count:{OTHER}", "url_schema")
PAGE = 1000  # URLs read or written in one go: a few milliseconds of Redis's time

# KEYS: url_commit:<instance> url_rank url_total url_count:(other) url_schema url_count:<url>...
# ARGV: sequence number, MAX_URLS, the hits of each URL. Returns the keys that hold no number.
# If Redis refuses to write (memory, read-only), SET fails first, and nothing has been applied.
# Later an error would roll nothing back, so INCRBY is a pcall. A total without an index means that
# the index was lost: without url_schema the next open() builds it again.
COMMIT = """
local urls = redis.call('ZCARD', KEYS[2])
if tonumber(ARGV[1]) <= tonumber(redis.call('GET', KEYS[1]) or 0) then return {} end
redis.call('SET', KEYS[1], ARGV[1], 'EX', 86400)
if urls == 0 and redis.call('DEL', KEYS[3]) == 1 then redis.call('DEL', KEYS[5]) end
local prefix, room, total, spoiled = #KEYS[4] - #'(other)', ARGV[2] - urls, 0, {}
for i = 6, #KEYS do  -- the hits of KEYS[6] are ARGV[3]
  local key = KEYS[i]
  if room < #KEYS and redis.call('EXISTS', key) == 0 then
    room = room - 1
    if room < 0 then key = KEYS[4] end
  end
  local count, url = redis.pcall('INCRBY', key, ARGV[i - 3]), key:sub(prefix + 1)
  if type(count) == 'number' then
    total = total + count - (redis.call('ZSCORE', KEYS[2], url) or 0)
    redis.call('ZADD', KEYS[2], count, url)
  else
    spoiled[#spoiled + 1] = key
  end
end
redis.pcall('INCRBY', KEYS[3], total)
return spoiled
"""


class RedisStore:
    """Counts in Redis. A command that Redis does not do in a second raises RedisError.

    From open() and commit() that may be a TimeoutError.
    """

    state = "connected"

    def __init__(self, url: str, max_urls: int) -> None:
        # redis-py may not retry: it cannot know whether a commit was applied. RESP2, because with
        # RESP3 its pool hands out connections that Redis has closed (redis-py issue 4252).
        options: dict[str, Any] = {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
        options |= {"socket_timeout": 1, "socket_connect_timeout": 1}
        pool = BlockingConnectionPool.from_url(url, max_connections=16, timeout=1, **options)
        self.redis = Redis.from_pool(pool)
        # Commits have a connection of their own: no crowd of readers holds one up, and without the
        # client around it a commit takes half the CPU time.
        alone = {**pool.connection_kwargs, "socket_timeout": None}  # apply() sees to that
        self.writer = pool.connection_class(**alone)
        self.script, self.max_urls = "", max_urls
        self.spoiled: set[bytes] = set()

    async def open(self) -> None:
        """Index what an earlier version counted: commit 0 hits to each URL, a page at a time.

        Whatever another server does meanwhile, and wherever this one dies, the result is the same.
        """
        self.script = await self.redis.script_load(COMMIT)
        whole = await self.redis.exists("url_rank", "url_total") != 1  # both, or no URL yet
        if whole and await self.redis.exists("url_schema"):
            return
        instance, urls, cursor = secrets.token_hex(8), 0, 0
        for page in count(1):
            cursor, keys = await self.redis.scan(cursor, "url_count:*", PAGE, "STRING")
            if keys:
                await self.apply(instance, page, keys, [0] * len(keys))
            urls += len(keys)
            if keys and (page % 100 == 0 or not cursor):
                log.info("indexing earlier counts", extra={"urls": urls, "done": not cursor})
            if not cursor:
                break
        await self.redis.set("url_schema", 1)

    async def commit(self, instance: str, sequence: int, hits: Mapping[str, int]) -> None:
        """Add hits {url: n}, but once: nothing if instance has used that sequence number."""
        keys = [f"url_count:{url}" for url in hits]
        await self.apply(instance, sequence, keys, hits.values())

    async def apply(
        self, instance: str, sequence: int, keys: Sequence[str | bytes], hits: Iterable[int]
    ) -> None:
        names = (f"url_commit:{instance}", *SHARED, *keys)
        command: Any = ("EVALSHA", self.script, len(names), *names, sequence, self.max_urls, *hits)
        try:
            async with asyncio.timeout(1):  # one for both ways: redis-py's own start a task each
                await self.writer.send_packed_command(pack_command(command))
                spoiled = await self.writer.read_response()
        except ResponseError:  # perhaps a primary was demoted, and its address leads elsewhere now
            await self.writer.disconnect()
            await self.redis.connection_pool.disconnect(inuse_connections=False)
            raise
        for key in spoiled:
            if key not in self.spoiled:
                self.spoiled.add(key)
                shown = key.decode(errors="replace")
                log.error("not a number, hits on it are lost", extra={"key": shown})

    async def safety(self) -> dict[str, str]:
        """What counts rest on, by Redis's names; a Redis that forbids CONFIG leaves it unknown."""
        names = ("appendonly", "appendfsync", "maxmemory-policy")
        try:
            config = await self.redis.config_get(*names)
        except ResponseError:
            config = {}
        return {name: config.get(name) or "unknown" for name in names}

    async def totals(self) -> tuple[int, int]:
        """The sum of all counts, and the number of URLs."""
        hits = await self.redis.get("url_total")
        return int(hits or 0), await self.redis.zcard("url_rank")

    async def find(self, url: str) -> tuple[int, int] | None:
        """Count and rank (1 for the most requested) of one URL."""
        hits = await self.redis.zscore("url_rank", url)
        ahead = cast(int | None, await self.redis.zrevrank("url_rank", url))
        return None if hits is None or ahead is None else (int(hits), ahead + 1)

    async def ranked(self, offset: int, limit: int) -> AsyncIterator[list[tuple[str, int]]]:
        """Pages of (url, count), most requested first, equal counts by descending URL."""
        for start in range(offset, offset + limit, PAGE):
            last = min(start + PAGE, offset + limit) - 1
            found = await self.redis.zrevrange("url_rank", start, last, withscores=True)
            rows = cast(list[tuple[bytes, float]], found)
            if not rows:
                return
            yield [(url.decode(errors="replace"), int(hits)) for url, hits in rows]

    async def aclose(self) -> None:
        await self.writer.disconnect()
        await self.redis.aclose()


class MemoryStore:
    """The same methods on a dictionary."""

    state = "in-memory"

    def __init__(self, max_urls: int) -> None:
        self.max_urls = max_urls
        self.counts: Counter[str] = Counter()

    async def open(self) -> None: ...

    async def commit(self, instance: str, sequence: int, hits: Mapping[str, int]) -> None:
        for url, n in hits.items():
            fits = url in self.counts or len(self.counts) < self.max_urls
            self.counts[url if fits else OTHER] += n

    async def totals(self) -> tuple[int, int]:
        return self.counts.total(), len(self.counts)

    async def find(self, url: str) -> tuple[int, int] | None:
        me = (self.counts[url], url)
        ahead = sum((n, other) > me for other, n in self.counts.items())
        return (me[0], ahead + 1) if me[0] else None

    async def ranked(self, offset: int, limit: int) -> AsyncIterator[list[tuple[str, int]]]:
        rows = sorted(self.counts.items(), key=lambda row: (row[1], row[0]), reverse=True)
        for start in range(offset, min(offset + limit, len(rows)), PAGE):
            yield rows[start : min(start + PAGE, offset + limit)]

    async def aclose(self) -> None: ...


Store = RedisStore | MemoryStore
NO_ANSWER = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)


async def connect(settings: Settings) -> Store:
    """A store that is ready to count. Raises UserError."""
    url = settings.redis_url or DEFAULT_REDIS_URL
    shown = re.sub(r"(?s)^(\w+://)?.*@|(?<=password=)[^&]*", r"\1***@", url)
    try:
        if "://" not in url:
            raise ValueError
        store = RedisStore(url, settings.max_urls)
    except (ValueError, TypeError):  # the text may quote a part of the password
        raise UserError(f"REDIS_URL={shown}: use redis://:password@host:6379/0") from None
    try:
        await store.open()
        safety = await store.safety()
    except (RedisError, TimeoutError) as error:
        await store.aclose()
        if settings.redis_url or type(error) not in NO_ANSWER:  # a wrong password is a subclass
            raise UserError(f"REDIS_URL={shown}: {error}") from None
        log.warning("no redis, counts are lost on exit", extra={"error": str(error)})
        return MemoryStore(settings.max_urls)
    log.info("counting in redis", extra={"redis": shown} | safety)
    if safety["appendonly"] == "no" or safety["maxmemory-policy"] not in ("noeviction", "unknown"):
        log.warning("redis can lose or evict counts", extra=safety)
    return store


# --- Group commit ---------------------------------------------------------------------------------
# The middleware awaits hit(). One INCR a request would cost more than the rest of the request, so
# one batch is in flight at a time, and the next one fills meanwhile. No timer: an idle server
# commits at once, a busy one in batches that grow with the load. (DeWitt et al., SIGMOD 1984.)

PATIENCE = 1.0  # seconds that a request waits for its commit
RETRY_PAUSE = 0.1  # seconds between attempts to commit
DRAIN_TIMEOUT = 2.0  # seconds for the last commits when the server stops
MAX_BACKLOG = 100_000  # URLs held while the store is away
RETRY_AFTER = {"Retry-After": "1"}
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds


@dataclass
class Batch:
    hits: dict[str, int] = field(default_factory=dict)
    born: float = 0.0  # loop time of the first hit
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    def release(self) -> None:
        """Answer the requests that wait for this batch."""
        for waiter in self.waiters:
            if not waiter.done():  # cancelled
                waiter.set_result(None)
        self.waiters.clear()


class GroupCommit:
    """Counts every hit in a store exactly once. Leaving its context commits what is left."""

    def __init__(self, store: Store, registry: prometheus.CollectorRegistry) -> None:
        self.store = store
        self.instance, self.sequence = secrets.token_hex(8), 0
        self.filling = Batch()  # takes hits
        self.flying = Batch()  # on its way to the store, slice by slice
        self.sent: dict[str, int] = {}  # sent, not confirmed: perhaps applied
        self.pending = 0  # hits taken, not confirmed
        self.held = 0  # hits confirmed since the store was lost
        self.away_since = 0.0  # loop time when the store was lost; 0 while it answers
        self.error: Exception  # the last one while sending
        self.stopping = False
        self.wake = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.time()
        up = prometheus.Gauge("redis_up", "1 while the store answers", registry=registry)
        up.set_function(lambda: not self.away_since)
        taken = prometheus.Gauge("url_hits_pending", "Hits taken, not committed", registry=registry)
        taken.set_function(lambda: self.pending)
        self.confirmed = prometheus.Counter("url_hits", "Hits committed", registry=registry)
        self.sizes = prometheus.Histogram(
            "url_commit_hits", "Commit size", buckets=[4**n for n in range(9)], registry=registry
        )
        self.times = prometheus.Histogram(
            "url_commit_seconds", "Time to commit", buckets=BUCKETS, registry=registry
        )

    def hit(self, url: str) -> asyncio.Future[None]:
        """Count one request. Done when it is in the store, or at once while that is away.

        Raises 503, and does not count, when hits of too many URLs are held already.
        """
        batch = self.filling
        if url not in batch.hits:
            urls = len(batch.hits) + len(self.flying.hits)
            if urls >= MAX_BACKLOG and url not in self.flying.hits:
                text = f"Redis is away and hits of {urls} URLs wait for it: try again later"
                raise web.HTTPServiceUnavailable(text=text, headers=RETRY_AFTER)
            if not batch.hits:
                batch.born = self.loop.time()
                self.wake.set()
            batch.hits[url] = 0
        batch.hits[url] += 1
        self.pending += 1
        waiter = self.loop.create_future()  # one each: who cancels it, cancels no other
        if self.away_since:
            waiter.set_result(None)
        else:
            batch.waiters.append(waiter)
        return waiter

    async def run(self) -> None:
        """Commit batch after batch, each in slices that Redis hardly feels."""
        while self.filling.hits or not self.stopping:
            await self.wake.wait()
            self.wake.clear()
            batch = self.flying = self.filling
            self.filling = Batch()
            patience = self.loop.call_at(batch.born + PATIENCE, self.stop_waiting)
            while batch.hits:
                self.sent = dict(islice(batch.hits.items(), PAGE))
                await self.commit_sent()
            patience.cancel()
            batch.release()
            soon = len(self.filling.hits) <= PAGE or self.loop.time() - batch.born < PATIENCE
            if self.away_since and soon:  # else those who wait for the next batch would wait long
                seconds = round(self.loop.time() - self.away_since, 1)
                hits = self.held + self.pending
                log.info("redis is back", extra={"hits": hits, "seconds": seconds})
                self.away_since = 0.0
                self.filling.born = self.loop.time()  # or its old hits would try our patience

    async def commit_sent(self) -> None:
        """Send the slice, unchanged, until the store confirms its sequence number."""
        self.sequence += 1
        self.error = TimeoutError("no answer within a second")
        started = time.perf_counter()
        for attempt in count():
            try:
                if attempt:  # Redis may have come back empty, or without its index
                    await self.store.open()
                await self.store.commit(self.instance, self.sequence, self.sent)
                break
            except Exception as error:  # whatever it is, no hit may be lost
                self.error = error
                await asyncio.sleep(RETRY_PAUSE if attempt else 0)
        hits = sum(self.sent.values())
        self.pending -= hits
        self.held += hits
        self.confirmed.inc(hits)
        self.sizes.observe(hits)
        self.times.observe(time.perf_counter() - started)
        for url in self.sent:
            del self.flying.hits[url]
        self.sent = {}

    def stop_waiting(self) -> None:
        """The store is away: answer those who wait, and let nobody wait until it is back."""
        if not self.away_since:
            self.away_since, self.held = self.loop.time(), 0
            log.error("redis is away, hits are held", extra={"error": str(self.error)})
        self.flying.release()
        self.filling.release()

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.run())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.stopping = True
        self.wake.set()
        await asyncio.wait([self.task], timeout=DRAIN_TIMEOUT)
        self.task.cancel()
        if self.pending:  # "sent" was applied if url_commit:<instance> has reached its sequence
            held = Counter(self.flying.hits) + Counter(self.filling.hits) - Counter(self.sent)
            sent = {"instance": self.instance, "sequence": self.sequence, "sent": self.sent}
            log.error("hits not committed", extra={"hits": self.pending, "held": held} | sent)


# --- Synthetic traffic ----------------------------------------------------------------------------
# POST /test/<n>/ requests random URLs from the very socket that it came in by: a Host header or a
# setting could aim the traffic at somebody else.


class TestRun:
    """n requests drawn from a seed, and what came of them, in memory that does not grow with n."""

    def __init__(self, n: int, concurrency: int, seed: int) -> None:
        rng = random.Random(seed)
        segments = [f"{drawn:06x}" for drawn in rng.sample(range(16**6), 3)]
        paths = (rng.choices(segments, k=rng.randint(1, 6)) for _ in range(n))
        self.urls = (f"/api/{'/'.join(path)}/" for path in paths)  # the workers share it
        self.order = {"concurrency": concurrency, "seed": seed, "segments": segments}
        self.n, self.concurrency = n, concurrency
        self.requested: set[str] = set()
        self.status: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.latencies: Counter[float] = Counter()  # in ms, to the 0.1 ms that the report gives

    async def run(self, base: URL, stopping: asyncio.Event) -> dict[str, Any]:
        """Send the requests to base, fewer if stopping gets set, and report."""
        started = time.perf_counter()
        connector = aiohttp.TCPConnector(limit=self.concurrency)
        async with aiohttp.ClientSession(base, connector=connector) as session:
            workers = [self.work(session, stopping) for _ in range(self.concurrency)]
            await asyncio.gather(*workers)
        seconds, ok, answered = time.perf_counter() - started, self.status[200], self.status.total()
        counted = {
            "requested": self.n,
            "ok": ok,
            "failed": answered - ok + self.errors.total(),
            "duration_s": round(seconds, 3),
            "requests_per_s": round(answered / seconds, 1),
            "latency_ms": self.latency_ms() if answered else {},
            "status": {str(code): n for code, n in self.status.items() if n},
            "errors": self.errors,
        }
        return counted | self.order | {"unique_urls": len(self.requested)}

    async def work(self, session: aiohttp.ClientSession, stopping: asyncio.Event) -> None:
        for url in self.urls:
            started = time.perf_counter()
            try:
                async with session.get(url, allow_redirects=False) as response:
                    await response.read()
                self.requested.add(url)
                self.status[response.status] += 1
                self.latencies[round((time.perf_counter() - started) * 1000, 1)] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                if not stopping.is_set():  # a server that stops takes no new connections
                    self.errors[type(error).__name__] += 1
            if stopping.is_set():
                return

    def latency_ms(self) -> dict[str, float]:
        """Percentiles are nearest-rank: N % of the requests took pN or less."""
        values, total = sorted(self.latencies), self.latencies.total()
        seen = list(accumulate(self.latencies[ms] for ms in values))
        mean = sum(ms * n for ms, n in self.latencies.items()) / total
        found = {"min": values[0], "mean": round(mean, 1)}
        for p in (50, 95, 99):
            found[f"p{p}"] = values[bisect_left(seen, p * total / 100)]
        return found | {"max": values[-1]}


# --- Middleware and handlers ----------------------------------------------------------------------
# Every request passes the one middleware: it counts before the handler runs, and makes JSON of
# whatever goes wrong. Handlers are plain functions: parse, ask the store, answer.

MAX_PATH = 2048  # characters
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
HEADERS = NOSNIFF | {"Content-Type": "application/json"}
KEPT = {"Allow", "Retry-After"}  # headers of an error that its JSON form has too
HINTS = {
    404: "nothing is here: try /, /api/..., /stats/, /health, /metrics or POST /test/<n>/",
    405: "the path is right, the method is not: see the Allow header",
}

SETTINGS = web.AppKey("settings", Settings)
STORE: web.AppKey[Store] = web.AppKey("store")
COMMITS = web.AppKey("commits", GroupCommit)
TEST_RUN = web.AppKey("test_run", asyncio.Lock)
STOPPING = web.AppKey("stopping", asyncio.Event)
REGISTRY = web.AppKey("registry", prometheus.CollectorRegistry)
ANSWERS: web.AppKey["Answers"] = web.AppKey("answers")


class Answers(Collector):
    """Notes answers for /metrics. With prometheus-client's own objects a request costs 6 % more."""

    def __init__(self, app: web.Application) -> None:
        routes = [(route.handler, route.resource) for route in app.router.routes()]
        self.labels = {h: r.canonical.replace("{slash}", "/") for h, r in routes if r}
        self.numbers: Counter[tuple[str, str, int]] = Counter()  # by method, route and status
        # By route: the number of answers in each bucket, then the sum of their seconds.
        self.durations = defaultdict[str, list[float]](lambda: [0] * (len(BUCKETS) + 2))
        app[REGISTRY].register(self)

    def observe(self, handler: Handler, method: str, status: int, seconds: float) -> None:
        route = self.labels.get(handler, "none")  # a pattern: never a label for each path
        self.numbers[method if method in hdrs.METH_ALL else "OTHER", route, status] += 1
        durations = self.durations[route]
        durations[bisect_left(BUCKETS, seconds)] += 1
        durations[-1] += seconds

    def collect(self) -> Iterator[prometheus.Metric]:  # perhaps in a thread: on copies
        labels, name = ["method", "route", "code"], "http_request_duration_seconds"
        numbers = prometheus.CounterMetricFamily("http_requests", "Answers", labels=labels)
        durations = prometheus.HistogramMetricFamily(name, "Time to answer", labels=["route"])
        for (method, route, status), n in list(self.numbers.items()):
            numbers.add_metric([method, route, str(status)], n)
        for route, found in list(self.durations.items()):
            buckets = zip([*map(str, BUCKETS), "+Inf"], accumulate(found[:-1]), strict=True)
            durations.add_metric([route], list(buckets), found[-1])
        yield from (numbers, durations)


def answer(data: object, status: int = 200, headers: Mapping[str, str] = HEADERS) -> web.Response:
    return web.Response(body=f"{json.dumps(data)}\n".encode(), status=status, headers=headers)


def counted_url(path: str) -> str:
    return path if path.endswith("/") else path + "/"


def number(request: web.Request, name: str, default: int, low: int = 0, high: int = 10**15) -> int:
    return whole_number(name, request.query.get(name, str(default)), low, high)


@web.middleware
async def count_and_guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count a request under /api/, answer errors in JSON, observe how it went."""
    started, path, app = time.perf_counter(), request.path, request.app
    try:
        if handler is api:  # not by the path: /api%2Fx is a 404
            if len(path) > MAX_PATH:
                text = f"a path has at most {MAX_PATH} characters, this one has {len(path)}"
                raise web.HTTPRequestURITooLong(text=text)
            await app[COMMITS].hit(counted_url(path))
        response = await handler(request)
    except web.HTTPException as error:
        response = failure(error.status, error.text, error.headers)
    except UserError as error:
        response = failure(400, str(error))
    except RedisError as error:
        response = failure(503, f"Redis does not answer: {error}", RETRY_AFTER)
    except Exception:
        log.exception("unexpected error", extra={"path": path})
        response = failure(500, "unexpected error: the server's log has it")
    app[ANSWERS].observe(handler, request.method, response.status, time.perf_counter() - started)
    return response


def failure(status: int, text: str | None, headers: Mapping[str, str] = NOSNIFF) -> web.Response:
    kept = {name: headers[name] for name in KEPT & headers.keys()}
    return answer({"error": HINTS.get(status, text)}, status, HEADERS | kept)


async def api(request: web.Request) -> web.Response:
    # Not json.dumps(), which takes longer to find the encoder than to encode.
    body = f'{{"url": {quote(counted_url(request.path))}}}\n'
    return web.Response(body=body.encode(), headers=HEADERS)


async def stats(request: web.Request) -> web.StreamResponse:
    """Stream the ranking page by page, so that a list of any length takes the same memory."""
    limit, offset = number(request, "limit", 10**15), number(request, "offset", 0)
    _, urls = await request.app[STORE].totals()
    pages = request.app[STORE].ranked(offset, limit)
    rows = await anext(pages, None)  # before the headers: until then a failure can be a 503
    response = web.StreamResponse(headers=HEADERS | {"X-Total-Count": str(urls)})
    opening = "["
    try:
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        while rows:
            page = ", ".join(f'{{"count": {hits}, "url": {quote(url)}}}' for url, hits in rows)
            await response.write((opening + page).encode())
            opening = ", "
            rows = await anext(pages, None)
        await response.write(b"[]\n" if opening == "[" else b"]\n")
    except ConnectionError:  # the client has left
        pass
    except RedisError as error:
        log.warning("list broken off", extra={"error": str(error)})
        if request.transport:
            request.transport.abort()  # a list cut short must not look whole
    return response


async def stats_of_url(request: web.Request) -> web.Response:
    url = counted_url(request.path.removeprefix("/stats"))
    found = await request.app[STORE].find(url)
    if not found:
        return answer({"error": f"{url} was never requested"}, 404)
    return answer({"count": found[0], "url": url, "rank": found[1]})


async def test(request: web.Request) -> web.Response:
    most, running = request.app[SETTINGS].max_test_requests, request.app[TEST_RUN]
    if not most:
        raise web.HTTPForbidden(text="test runs are off: MAX_TEST_REQUESTS is 0")
    if from_another_site(request):
        raise web.HTTPForbidden(text="a page of another site may not start a test run")
    n = whole_number("n", request.match_info["n"], 1, most)
    concurrency = number(request, "concurrency", 32, 1, 256)
    run = TestRun(n, concurrency, number(request, "seed", secrets.randbelow(10**9)))
    if running.locked():
        text = "another test run is under way: wait until it has ended"
        raise web.HTTPTooManyRequests(text=text, headers=RETRY_AFTER)
    async with running:
        host, port, *_ = request.get_extra_info("sockname")
        base = URL.build(scheme="http", host=host, port=port)
        report = await run.run(base, request.app[STOPPING])
    log.info("test run", extra=report)
    return answer(report)


def from_another_site(request: web.Request) -> bool:
    """Whether another site's page made a browser send this (Go's http.CrossOriginProtection)."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("//")[2] != request.headers.get("Host")


async def health(request: web.Request) -> web.Response:
    commits, store = request.app[COMMITS], request.app[STORE]
    report = {"status": "healthy", "redis": store.state, "pending": commits.pending}
    uptime = {"uptime_s": round(commits.loop.time() - commits.started, 1)}
    try:
        if commits.away_since:
            raise RedisError(commits.error)
        hits, urls = await store.totals()
    except RedisError as error:
        report |= {"status": "unhealthy", "redis": "disconnected", "error": str(error)}
        return answer(report | uptime, 503, HEADERS | RETRY_AFTER)
    return answer(report | {"hits": hits, "urls": urls} | uptime)


async def ignore_expect(request: web.Request) -> None:
    """Nobody here reads a body, and aiohttp's 417 would be neither counted nor JSON."""


async def metrics(request: web.Request) -> web.Response:
    headers = NOSNIFF | {"Content-Type": CONTENT_TYPE_LATEST}
    return web.Response(body=generate_latest(request.app[REGISTRY]), headers=headers)


def live_page() -> Handler:
    """Serves dashboard.html, to which its policy allows its own style and script and no other."""
    page = Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    policy += "; connect-src 'self'; img-src data:"
    for tag, block in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL):
        policy += f"; {tag}-src 'sha256-{b64encode(sha256(block.encode()).digest()).decode()}'"
    headers = NOSNIFF | {"Content-Security-Policy": policy}

    async def live(request: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html", headers=headers)

    return live


# --- Lifecycle ------------------------------------------------------------------------------------
# A host (main, gunicorn, a test) enters it before the first request and leaves it after the last.
# The store opens before group commit starts, and closes after that has drained.


@contextmanager
def own_metrics(settings: Settings, registry: prometheus.CollectorRegistry) -> Iterator[None]:
    """Serve this process's /metrics on a port of its own: those that share PORT cannot choose."""
    first = settings.metrics_port
    for port in range(first, first + 100):
        with suppress(OSError):  # another process has it
            server, _ = start_http_server(port, settings.host, registry)
            break
    else:
        raise UserError(f"METRICS_PORT={first}: neither it nor the next 99 can be had")
    log.info("metrics", extra={"port": port})
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@asynccontextmanager
async def lifecycle(app: web.Application) -> AsyncIterator[None]:
    settings, registry = app[SETTINGS], app[REGISTRY]
    with own_metrics(settings, registry) if settings.metrics_port else nullcontext():
        store = await connect(settings)
        async with aclosing(store), GroupCommit(store, registry) as commits:
            app[STORE], app[COMMITS], app[ANSWERS] = store, commits, Answers(app)
            yield
    log.info("stopped")


async def stop_test_run(app: web.Application) -> None:
    log.info("stopping", extra={"pending": app[COMMITS].pending})
    app[STOPPING].set()


async def create_app(settings: Settings | None = None) -> web.Application:
    """The application. A host that gives no settings (gunicorn) leaves them to the environment."""
    if settings is None:
        settings = Settings.load(os.environ)
        configure_logging(settings.log_format)
    app = web.Application(middlewares=[count_and_guard])
    app[SETTINGS], app[REGISTRY] = settings, prometheus.CollectorRegistry()
    app[TEST_RUN], app[STOPPING] = asyncio.Lock(), asyncio.Event()
    app.add_routes(
        [
            web.get("/", live_page(), expect_handler=ignore_expect),
            web.get("/stats{slash:/?}", stats, expect_handler=ignore_expect),
            web.get("/stats{url:/api/(?s:.*)}", stats_of_url, expect_handler=ignore_expect),
            web.post("/test/{n}{slash:/?}", test, expect_handler=ignore_expect),
            web.get("/health{slash:/?}", health, expect_handler=ignore_expect),
            web.get("/metrics{slash:/?}", metrics, expect_handler=ignore_expect),
            # (?s:.*) also takes a newline: %0A is as good a character as any other.
            web.route("*", "/api/{tail:(?s:.*)}", api, expect_handler=ignore_expect),
        ]
    )
    app.cleanup_ctx.append(lifecycle)
    app.on_shutdown.append(stop_test_run)
    return app


class TextFormatter(JsonFormatter):
    """The same event as a line for a person."""

    def jsonify_log_record(self, log_data: dict[str, Any]) -> str:
        at, level, event = (log_data.pop(name) for name in ("time", "level", "event"))
        fields = [f"{name}={json.dumps(value)}" for name, value in log_data.items()]
        return " ".join([f"{at:%H:%M:%S} {level:7} {event}", *fields])


def configure_logging(log_format: str) -> None:
    """One event a line, on standard error."""
    formatter = TextFormatter if log_format == "text" else JsonFormatter
    names = {"levelname": "level", "message": "event"}
    handler = logging.StreamHandler()
    handler.setFormatter(
        formatter("%(levelname)s %(message)s", rename_fields=names, timestamp="time")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Its errors are clients' (bytes that are not HTTP), a traceback each; ours never get that far.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UserError(f"HOST={host} PORT={port}: {reason}; set another one") from None


async def ignore_signals(app: web.Application) -> None:
    """A second Ctrl-C may not cut short the last commits."""
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, signal.SIG_IGN)


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises UserError."""
    sock = listen(settings.host, settings.port)
    loop = new_event_loop()
    app = loop.run_until_complete(create_app(settings))
    app.on_shutdown.append(ignore_signals)
    host, port = sock.getsockname()[:2]
    base = URL.build(scheme="http", host=host, port=port)
    urls = {"page": f"{base}/", "stats": f"{base}/stats/", "metrics": f"{base}/metrics"}
    web.run_app(
        app,
        sock=sock,
        backlog=1024,
        print=lambda _: log.info("started", extra=urls | {"redis": app[STORE].state}),
        access_log=None,  # it would cost as much as counting does
        shutdown_timeout=1.5,  # seconds for running requests; aiohttp takes that long twice
        loop=loop,
    )


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for flag in ("--host", "--port", "--redis-url"):
        parser.add_argument(flag)
    flags = {name.upper(): value for name, value in vars(parser.parse_args()).items() if value}
    if sys.platform != "win32":  # one open file a client: take all that we may have
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError):  # macOS promises more than it gives
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        settings = Settings.load(os.environ | flags)
        configure_logging(settings.log_format)
        serve(settings)
    except UserError as error:
        sys.exit(f"server.py: {error}")


if __name__ == "__main__":
    main()
