"""What fails, hangs, refuses, or comes in crowds: no hit is lost, and none counts twice."""

import asyncio
import gzip
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import server
from conftest import (
    PATIENCE,
    App,
    ClientOf,
    Load,
    MakeRedis,
    Proxy,
    RedisServer,
    Rig,
    RigOf,
    Serve,
    Server,
    dialled,
    group_commit,
    settings_of,
    settled,
    talk,
    until,
)

Fault = Callable[[Rig], Awaitable[None]]

# --- Under fire -----------------------------------------------------------------------------
# Sixteen clients, one fault, and the check of conftest.py's Rig.

# Without one of these rights to Redis no hit can count.
NEEDED = ["eval", "exists", "expire", "incrby", "zadd", "zcard"]
TO_READ = ["get", "zrevrange", "zrevrank", "zscore"]


def allow(redis: RedisServer, *rights: str) -> None:
    """What the user bob may do, from now on."""
    user = ("ACL", "SETUSER", "bob", "reset", "on", ">x", "~*", "+@all")
    redis.client.execute_command(*user, *rights)


async def replies_swallowed(rig: Rig) -> None:
    for _ in range(10):
        rig.proxy.swallow = 1
        await until(lambda: not rig.proxy.swallow)
        await rig.load.more(50)


async def old_copies_arrive_late(rig: Rig) -> None:
    for _ in range(5):
        rig.proxy.delay = 1
        await until(lambda: rig.proxy.late)
        await rig.load.more(200)  # the resent copy has been confirmed, and newer ones after it
        rig.proxy.deliver_late()
        await rig.load.more(50)


async def redis_killed(rig: Rig) -> None:
    for answers in (0, 100, 3000):  # while it is away
        rig.redis.kill()
        await rig.load.more(answers)
        await asyncio.to_thread(rig.redis.start)
        await rig.load.more(200)


async def redis_stopped(rig: Rig) -> None:
    rig.redis.process.send_signal(signal.SIGSTOP)
    await rig.refuses("no answer in time")
    rig.redis.process.send_signal(signal.SIGCONT)


async def redis_loading(rig: Rig) -> None:
    rig.redis.client.execute_command("DEBUG", "POPULATE", 20_000)
    rig.redis.client.bgrewriteaof()
    await until(lambda: not rig.redis.client.info("persistence")["aof_rewrite_in_progress"])
    rig.redis.kill()
    slowly = "--key-load-delay 20 --loading-process-events-interval-bytes 1024"
    await asyncio.to_thread(rig.redis.start, slowly)


async def links_cut(rig: Rig) -> None:
    for spoil in [closed_by_redis, reset] * 5:
        spoil(rig)
        await rig.load.more(50)


async def out_of_memory(rig: Rig) -> None:
    rig.redis.client.config_set("maxmemory", 1)
    await rig.refuses("command not allowed when used memory")
    rig.redis.client.config_set("maxmemory", 0)


async def read_only(rig: Rig) -> None:
    rig.redis.client.replicaof("127.0.0.1", "1")
    await rig.refuses("read only replica")
    rig.redis.client.replicaof("NO", "ONE")


def holds_hits(process: Server) -> bool:
    """Whether that is the last thing that its log says of Redis."""
    words = [event["event"] for event in process.events()]
    said = [event for event in words if event == "counting" or "hits are held" in event]
    return said != [] and said[-1] != "counting"


async def held_for_a_while(rig: Rig) -> None:
    await until(lambda: holds_hits(rig.server))
    await rig.load.more(300)


async def held_no_more(rig: Rig) -> None:
    await until(lambda: not holds_hits(rig.server))


async def lists_spoiled(rig: Rig) -> None:
    for day in ("", server.utc_day()):
        key = server.of_day("url_rank", day)
        with rig.redis.client.pipeline() as both_at_once:
            both_at_once.rename(key, "kept").set(key, "no list").execute()
        await held_for_a_while(rig)
        rig.redis.client.rename("kept", key)
        await held_no_more(rig)


async def rights_lost(rig: Rig) -> None:
    for right in NEEDED:
        allow(rig.redis, f"-{right}")
        await held_for_a_while(rig)
        allow(rig.redis)
        await held_no_more(rig)


async def clients_hang_up(rig: Rig) -> None:
    for n in range(300):
        url = f"/api/{n % rig.load.urls}/"
        async with dialled(rig.load.port) as (_, writer):
            writer.write(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            rig.load.unknown[url] += 1
            writer.transport.abort()


TWICE = [replies_swallowed, old_copies_arrive_late]  # where a naive server counts twice
AWAY = [redis_killed, redis_stopped, redis_loading, links_cut]
REFUSED = [out_of_memory, read_only, lists_spoiled, rights_lost]
FAULTS: list[Fault] = [*TWICE, *AWAY, *REFUSED, clients_hang_up]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_nothing_is_lost_nothing_counts_twice_no_request_fails(
    rig_of: RigOf, fault: Fault
) -> None:
    rig = await rig_of(user="bob:x@")
    async with rig.load:
        await fault(rig)
        await rig.load.more(200)
    await settled(rig.server)
    rig.check()
    assert rig.load.slowest < 3  # a request waits for Redis for a second at most
    assert await rig.server.stop() == 0


# What the rig is worth: the same load and faults on one awaited INCR a request.
NAIVE = """
import os
from aiohttp import web
from redis.asyncio import Redis

redis = Redis.from_url(os.environ["REDIS_URL"])

async def api(request):
    await redis.incr("url_count:" + request.path)
    return web.json_response({})

app = web.Application()
app.router.add_get("/api/{tail:.*}", api)
web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), print=lambda _: print("started"))
"""


@pytest.mark.parametrize("fault", TWICE, ids=lambda fault: fault.__name__)
async def test_control_the_naive_server_miscounts(rig_of: RigOf, fault: Fault) -> None:
    rig = await rig_of(code=NAIVE)
    async with rig.load:
        await fault(rig)
        await rig.load.more(200)
    lost, double = rig.load.lost_and_double(rig.redis.counts())
    print(f"| naive server, {fault.__name__} | {lost} lost | {double} double |")
    assert double > 0


def replica_state(redis: RedisServer) -> str:
    return str(redis.client.info("replication").get("slave0", {}).get("state"))


async def test_when_a_replica_takes_over_the_server_follows_its_address(
    rig_of: RigOf, own_redis: MakeRedis
) -> None:
    """What Sentinel or a managed Redis does: the old primary lives on, read-only."""
    rig = await rig_of()
    heir = own_redis()
    heir.client.replicaof("127.0.0.1", rig.redis.port)
    await until(lambda: replica_state(rig.redis) == "online")
    async with rig.load:
        rig.redis.client.execute_command("FAILOVER", "TO", "127.0.0.1", heir.port)
        rig.proxy.redis_port = heir.port
        await until(lambda: heir.client.role()[0] == "master")
        await rig.load.more(2000)
    await settled(rig.server)
    rig.redis = heir
    rig.check()


async def test_readers_follow_the_address_when_an_old_redis_wakes_up(
    rig_of: RigOf, own_redis: MakeRedis
) -> None:
    """Their idle links to it are as good as before, but it is not the one that counts."""
    rig = await rig_of()
    await rig.server.hit(old=1)
    assert await rig.server.stats() == {"/api/old/": 1}
    heir = own_redis()
    rig.redis.process.send_signal(signal.SIGSTOP)
    rig.proxy.redis_port = heir.port
    await rig.server.hit(new=1)
    await rig.logs("counting", 2)
    rig.redis.process.send_signal(signal.SIGCONT)
    await until(rig.redis.answers)
    assert await rig.server.stats() == {"/api/new/": 1}


async def test_an_address_that_leads_to_two_redis_in_turns_loses_nothing(
    rig_of: RigOf, own_redis: MakeRedis
) -> None:
    """A batch that was sent again may be in both of them; each of them adds up."""
    rig = await rig_of()
    second = own_redis()
    ports = itertools.cycle([second.port, rig.redis.port])
    async with rig.load:
        for turn in range(10):
            rig.proxy.redis_port = next(ports)
            rig.proxy.cut()
            await rig.logs("counting", turn + 2)
            await rig.load.more(100)
    await settled(rig.server)
    for redis in (rig.redis, second):
        assert redis.total() > 0
        redis.check_index()
    lost, _ = rig.load.lost_and_double(Counter(rig.redis.counts()) + Counter(second.counts()))
    assert lost == 0
    assert not rig.load.failed


async def test_flushall_under_load_and_counts_go_on_from_there(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        rig.redis.client.flushall()
        await rig.load.more(200)
    assert not rig.load.failed
    before = (await settled(rig.server))["hits"]
    assert 100 <= before < rig.load.answered.total()
    rig.redis.check_index()
    async with Load(rig.server.port) as load:
        pass
    assert (await settled(rig.server))["hits"] == before + load.answered.total()


async def test_counts_go_on_from_an_old_backup(rig_of: RigOf) -> None:
    rig = await rig_of()
    backup = rig.redis.folder.with_name("backup")
    await rig.server.hit(before=5)
    shutil.copytree(rig.redis.folder, backup)
    await rig.server.hit(lost=3)
    rig.redis.kill()
    await rig.server.hit(held=2)
    shutil.rmtree(rig.redis.folder)
    backup.rename(rig.redis.folder)
    await asyncio.to_thread(rig.redis.start)
    await settled(rig.server)
    await rig.server.hit(before=1, after=1)
    counts = {"/api/before/": 6, "/api/held/": 2, "/api/after/": 1}
    assert await rig.server.stats() == counts
    assert rig.redis.counts() == counts
    rig.redis.check_index()


async def test_a_key_that_holds_no_number_spoils_only_its_own_url(rig_of: RigOf) -> None:
    rig = await rig_of()
    rig.redis.client.set("url_count:/api/7/", "many")
    async with rig.load:
        await rig.load.more(1000)
    await settled(rig.server)
    rig.redis.client.delete("url_count:/api/7/")
    assert rig.load.answered.pop("/api/7/") > 10
    rig.check()
    metrics = await rig.server.metrics()
    assert metrics["url_hits_total", frozenset()] == rig.load.answered.total()
    assert metrics["url_keys_refused_total", frozenset()] > 0
    errors = [event for event in rig.server.events() if event["level"] == "error"]
    assert [event["key"] for event in errors] == ["url_count:/api/7/"]  # said once


@pytest.mark.parametrize(("key", "counted"), [("url_count:(other)", 3), ("url_total", 6)])
async def test_what_does_not_count_is_not_in_the_metric(
    rig_of: RigOf, key: str, counted: int
) -> None:
    """Here a key that stands for more than one URL holds no number."""
    rig = await rig_of(MAX_URLS="1")
    await rig.server.hit(known=1)
    rig.redis.client.delete(key)
    rig.redis.client.rpush(key, "no number")
    await rig.server.hit(known=2, new=3)
    metrics = await rig.server.metrics()
    assert metrics["url_hits_total", frozenset()] == counted
    assert metrics["url_keys_refused_total", frozenset()] > 0


async def test_a_reply_that_was_lost_is_made_again_as_it_was(redis_server: RedisServer) -> None:
    """Also if hits beyond MAX_URLS could not be counted."""
    async with AsyncExitStack() as stack:
        store = server.RedisStore(settings_of(redis_server.url, max_urls=1))
        stack.push_async_callback(store.close)
        await store.commit(1, {"/api/known/": 1})
        redis_server.client.rpush("url_count:(other)", "no number")
        hits = {"/api/known/": 2, "/api/new/": 3}
        assert await store.commit(2, hits) == (2, 1)
        assert await store.commit(2, hits) == (2, 1)


async def test_a_reply_that_is_made_again_makes_no_key(redis_server: RedisServer) -> None:
    """Of a URL whose key hands have deleted in between."""
    async with AsyncExitStack() as stack:
        store = server.RedisStore(settings_of(redis_server.url))
        stack.push_async_callback(store.close)
        assert await store.commit(1, {"/api/a/": 1}) == (1, 1)
        redis_server.client.delete("url_count:/api/a/")
        assert await store.commit(1, {"/api/a/": 1}) == (1, 1)
        assert redis_server.client.keys("url_count:*") == []


async def test_two_servers_with_other_bounds_count_into_one_redis(
    serve: Serve, redis_server: RedisServer
) -> None:
    few = serve(redis_server.url, MAX_URLS="5", KEEP_DAYS="0")
    many = serve(redis_server.url)
    async with Load(few.port) as to_few, Load(many.port, urls=70) as to_many:
        await to_few.more(500)
        await to_many.more(500)
    await settled(few)
    await settled(many)
    counts = redis_server.counts()
    assert sum(counts.values()) == (to_few.answered + to_many.answered).total()
    assert counts["(other)"] > 0
    assert set(counts) == {"(other)", *to_many.answered}
    assert redis_server.day_counts() == to_many.answered
    redis_server.check_index()


@pytest.mark.soak
async def test_soak(rig_of: RigOf) -> None:
    """Ten minutes of random faults: `make soak`, SOAK_SEED repeats one."""
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    seed = int(os.environ.get("SOAK_SEED", time.time_ns() % 10**6))
    print(f"SOAK_SEED={seed}")
    rng = random.Random(seed)
    rig = await rig_of(user="bob:x@")
    end = time.monotonic() + seconds
    async with rig.load:
        while time.monotonic() < end:
            fault = rng.choice(FAULTS)
            await held_no_more(rig)
            await fault(rig)
            await rig.load.more(rng.randint(1, 5000))
            print(fault.__name__, f"answered={rig.load.answered.total()}", flush=True)
    await settled(rig.server)
    rig.check()  # the days, too
    assert rig.load.slowest < 3


# --- Coming back ----------------------------------------------------------------------------


class Distinct(Load):
    """As fast as they can, 64 clients ask for ever new URLs. One of 40 is long."""

    def __init__(self, port: int) -> None:
        super().__init__(port, clients=64)
        self.numbers = itertools.count()

    def target(self, number: int) -> str:
        n = next(self.numbers)
        return f"/api/{n}/" if n % 40 else f"/api/{n}/{'x' * 2000}/"


@pytest.mark.parametrize(("latency", "seconds"), [(0, 3), (0.05, 1)])
async def test_a_short_outage_ends_while_the_load_goes_on(
    rig_of: RigOf, latency: float, seconds: float
) -> None:
    """Also if Redis is so far off that new hits could come faster than batches get there."""
    rig = await rig_of()
    rig.proxy.latency = latency
    rig.load = Distinct(rig.server.port)
    async with rig.load:
        rig.redis.process.send_signal(signal.SIGSTOP)
        await until(lambda: rig.server.says("redis disconnected"))
        stopped = time.monotonic()
        await until(lambda: time.monotonic() > stopped + seconds)
        rig.redis.process.send_signal(signal.SIGCONT)
        awake = time.monotonic()
        await rig.logs("counting", 2)
        while (report := (await rig.server.ask("/health")).json)["pending"] > 64:
            assert report["status"] == "healthy"
            assert time.monotonic() < awake + PATIENCE
        print(f"what was held is in Redis {time.monotonic() - awake:.1f} s after it was back")
        await rig.load.more(1000)
        assert (await rig.server.ask("/health")).json["status"] == "healthy"
    await settled(rig.server)
    rig.check()
    assert rig.load.slowest < 3


async def batches_as_on_any_day(redis: RedisServer, urls: list[str]) -> float:
    """Seconds for the same hits, sent in batches of a fixed size, one after the other."""
    store = server.RedisStore(settings_of(redis.url))
    began = time.monotonic()
    size = 100_000 * len(urls) // sum(map(len, urls))
    for sequence, start in enumerate(range(0, len(urls), size), 1):
        await store.commit(sequence, dict.fromkeys(urls[start : start + size], 1))
    seconds = time.monotonic() - began
    await store.close()
    return seconds


@pytest.mark.parametrize("mix", ["short", "mixed", "long"])
async def test_coming_back_is_as_fast_as_going_on(own_redis: MakeRedis, mix: str) -> None:
    redis = own_redis()
    long = {"short": 10**9, "mixed": 40, "long": 1}[mix]  # one of so many
    n = 4_000 if mix == "long" else 20_000
    urls = [f"/api/{i}/" if (i + 1) % long else f"/api/{i}/{'x' * 1900}/" for i in range(n)]
    usual = await batches_as_on_any_day(redis, urls)
    redis.kill()
    async with group_commit(server.RedisStore(settings_of(redis.url))) as commits:
        for url in urls:
            await commits.hit(url)
        redis.start()
        began = time.monotonic()
        await until(lambda: not commits.pending)
        seconds = time.monotonic() - began
    print(f"| {n} held URLs, {mix} | {seconds:.2f} s | {usual:.2f} s as on any day |")
    assert seconds < 5 * usual + 1
    assert redis.counts() == dict.fromkeys(urls, 2)


class Gated(server.RedisStore):
    """Lets batches through one by one."""

    def __init__(self, url: str) -> None:
        super().__init__(settings_of(url))
        self.gate = asyncio.Semaphore(0)
        self.batches: list[list[str]] = []

    async def commit(self, sequence: int, hits: Any) -> Any:
        if hits:
            self.batches.append(list(hits))
            await self.gate.acquire()
        return await super().commit(sequence, hits)


async def test_who_waits_for_what_has_been_committed_is_answered_at_once(
    redis_server: RedisServer,
) -> None:
    """Also when the URL is in the batch that is on its way: nobody waits for a timer."""
    store = Gated(redis_server.url)
    async with group_commit(store) as commits:
        await until(lambda: not commits.away)
        first = [asyncio.create_task(commits.hit(f"/api/{n}/")) for n in range(3)]
        await until(lambda: store.batches)
        late = [asyncio.create_task(commits.hit(f"/api/{n}/")) for n in range(3)]
        await asyncio.sleep(0)
        for _ in range(2):
            store.gate.release()
        async with asyncio.timeout(0.7):  # less than the second after which an idle server looks
            await asyncio.gather(*first, *late)
    assert redis_server.counts() == {f"/api/{n}/": 2 for n in range(3)}


# --- Days and clocks ------------------------------------------------------------------------


SetClock = Callable[[Callable[[], str]], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """A function that gives the server of this process another day."""

    def set_to(today: Callable[[], str]) -> None:
        def utc_day(ago: int = 0) -> str:
            return str(date.fromisoformat(today()) - timedelta(days=ago))

        monkeypatch.setattr(server, "utc_day", utc_day)

    return set_to


@pytest.fixture
async def proxied(
    redis_server: RedisServer, client_of: ClientOf
) -> AsyncIterator[tuple[App, Proxy]]:
    """The application in this process, and the proxy before its Redis."""
    async with Proxy(redis_server.port) as proxy:
        yield await client_of(f"redis://127.0.0.1:{proxy.port}/0"), proxy


async def test_a_batch_that_is_sent_again_after_midnight_counts_once_on_one_day(
    redis_server: RedisServer, proxied: tuple[App, Proxy], set_clock: SetClock
) -> None:
    app, proxy = proxied
    await app.hit(a=1)
    set_clock(lambda: "2026-03-01" if proxy.swallow else "2026-03-02")
    proxy.swallow = 1  # it is midnight when the reply is swallowed
    await app.hit(b=1)
    await app.hit(c=1)
    await settled(app)
    assert redis_server.ranking("2026-03-01") == {"/api/b/": 1}
    assert redis_server.ranking("2026-03-02") == {"/api/c/": 1}
    assert redis_server.counts() == {"/api/a/": 1, "/api/b/": 1, "/api/c/": 1}
    redis_server.check_index()


async def test_a_batch_that_arrives_after_midnight_counts_on_that_day(
    redis_server: RedisServer, proxied: tuple[App, Proxy], set_clock: SetClock
) -> None:
    """And when its old copy arrives at last, nothing changes."""
    app, proxy = proxied
    await app.hit(a=1)
    set_clock(lambda: "2026-03-01" if proxy.delay else "2026-03-02")
    proxy.delay = 1
    await app.hit(b=1)
    await settled(app)
    proxy.deliver_late()
    await app.hit(c=1)
    assert redis_server.ranking("2026-03-01") == {}
    assert redis_server.ranking("2026-03-02") == {"/api/b/": 1, "/api/c/": 1}
    assert redis_server.counts() == {"/api/a/": 1, "/api/b/": 1, "/api/c/": 1}
    redis_server.check_index()


async def test_a_clock_that_jumps_a_day_forward_and_back_loses_no_hit(
    client: App, set_clock: SetClock
) -> None:
    for day in ("2026-03-01", "2026-03-02", "2026-03-01"):
        set_clock(partial(str, day))
        await client.hit(a=1)
    assert await client.stats("?day=2026-03-01") == {"/api/a/": 2}
    assert await client.stats("?day=2026-03-02") == {"/api/a/": 1}
    assert await client.stats() == {"/api/a/": 3}


# --- Ends -----------------------------------------------------------------------------------


async def test_sigterm_under_load_commits_every_answered_hit(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        started = time.monotonic()
        assert await rig.server.stop() == 0
        assert time.monotonic() - started < 10  # when Docker would kill it
    rig.check()
    assert not rig.server.says("hits not committed")


@pytest.mark.parametrize("sent_is_there", [False, True])
async def test_sigterm_with_redis_away_logs_what_is_not_in_redis(
    rig_of: RigOf, sent_is_there: bool
) -> None:
    """Lines with a number up to that in url_commit:<instance> are there, the others are not."""
    rig = await rig_of(code="server.TAKEN_ALONG = 2000; server.main()")
    async with rig.load:
        if sent_is_there:
            rig.proxy.swallow = 10**9  # Redis has it, but its replies never arrive
        else:
            rig.proxy.delay = 10**9  # what is sent never arrives
            await until(lambda: rig.proxy.late)
            rig.redis.kill()
        await rig.load.more(2000)
        started = time.monotonic()
        assert await rig.server.stop() == 0
        assert time.monotonic() - started < 10
    if not sent_is_there:
        await asyncio.to_thread(rig.redis.start)
    lines = [event for event in rig.server.events() if event["event"] == "hits not committed"]
    instance = lines[0]["instance"]
    numbers = [line["sequence"] for line in lines]
    applied = int(rig.redis.client.get(f"url_commit:{instance}"))
    assert len(lines) > 3
    assert numbers == list(range(numbers[0], numbers[0] + len(lines)))
    assert (applied == numbers[0]) == sent_is_there
    assert rig.server.uncommitted().total() == sum(line["hits"] for line in lines)
    counts = Counter(rig.redis.counts())
    for line in lines:
        if line["sequence"] > applied:
            counts.update(line["urls"])
    assert rig.load.lost_and_double(counts) == (0, 0)


async def test_a_closed_terminal_and_many_ctrl_c_lose_no_held_hit(rig_of: RigOf) -> None:
    """A second signal does not cut the last commits short."""
    rig = await rig_of()
    rig.redis.kill()
    await rig.server.hit(a=1)
    for n in range(50):
        rig.server.process.send_signal(signal.SIGINT if n else signal.SIGHUP)
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(rig.server.ends) == 0
    assert rig.server.uncommitted() == {"/api/a/": 1}
    assert rig.server.events()[-1]["event"] == "stopped"


async def test_a_stop_does_not_wait_for_a_redis_that_hangs(rig_of: RigOf) -> None:
    rig = await rig_of()
    await rig.server.stats()  # readers have a connection, too
    rig.redis.process.send_signal(signal.SIGSTOP)
    await rig.server.hit(a=1)
    started = time.monotonic()
    assert await rig.server.stop() == 0
    assert time.monotonic() - started < 10
    assert rig.server.uncommitted() == {"/api/a/": 1}


async def test_a_thread_that_is_stuck_does_not_hold_up_the_end(serve: Serve) -> None:
    """As one that asks a name server which does not answer."""
    stuck = "import threading; threading.Thread(target=time.sleep, args=(60,)).start()"
    process = serve(code=f"import time; {stuck}; server.main()")
    began = time.monotonic()
    assert await process.stop() == 0
    assert time.monotonic() - began < 30


async def test_kill_9_of_the_server_loses_nothing_that_was_answered(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        await rig.load.more(1000)
        rig.server.kill()
    rig.check()


# --- Bounds ---------------------------------------------------------------------------------


async def test_a_full_backlog_refuses_new_urls_only_and_comes_back_in_batches(
    client_of: ClientOf, own_redis: MakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no batch holds Redis up for long."""
    monkeypatch.setattr(server, "BACKLOG_BYTES", 2_000_000)
    redis = own_redis()
    app = await client_of(redis.url)
    redis.kill()
    await app.hit(a=2)  # the first one waits, and finds out
    held = 1
    while app.commits.backlog_bytes < server.BACKLOG_BYTES:
        await app.commits.hit(f"/api/products/{held}/")
        held += 1
    answer = await app.ask("/api/one-too-many/")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert "too many URLs" in answer.json["error"]
    await app.hit(a=1)
    assert (await app.ask("/api/products/7/")).status == 200
    redis.start("--slowlog-log-slower-than 0 --slowlog-max-len 10000")
    await settled(app)
    slow = max(entry["duration"] for entry in redis.client.slowlog_get(10_000)) / 1000
    print(f"slowest command while {held} URLs came back: {slow:.1f} ms")
    assert slow < 100
    assert redis.total() == held + 3
    redis.check_index()


async def fill(commits: server.GroupCommit) -> list[str]:
    """Hold a hit of each of these URLs: the backlog is full."""
    urls: list[str] = []
    while commits.backlog_bytes < server.BACKLOG_BYTES:
        urls.append(f"/api/{len(urls)}/")
        await commits.hit(urls[-1])
    return urls


async def test_what_is_on_its_way_back_can_be_hit_again_without_a_second_copy(
    own_redis: MakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BACKLOG_BYTES", 500_000)
    redis = own_redis()
    redis.kill()
    store = Gated(redis.url)
    async with group_commit(store) as commits:
        urls = await fill(commits)
        redis.start()
        await until(lambda: store.batches)  # the first of several, and it does not get through
        again = [asyncio.create_task(commits.hit(url)) for url in urls]
        await asyncio.sleep(0)  # now all are added
        assert commits.backlog_bytes < server.BACKLOG_BYTES + server.TAKEN_ALONG
        for _ in urls:
            store.gate.release()
        await asyncio.gather(*again)
        await until(lambda: not commits.pending)
    assert redis.counts() == dict.fromkeys(urls, 2)


async def test_the_backlog_is_bounded_in_bytes(rig_of: RigOf) -> None:
    rig = await rig_of(code="server.BACKLOG_BYTES = 200_000; server.main()")
    rig.redis.kill()
    snakes = "%F0%9F%90%8D" * 500  # 2 kB in memory
    held = 0
    while held < 500 and (await rig.server.ask(f"/api/{held:03}{snakes}/")).status == 200:
        held += 1
    assert held == pytest.approx(200_000 / server.size_of("/api/000" + "🐍" * 500 + "/"), abs=2)
    assert (await settled(rig.server, 503))["pending"] == held


async def test_the_bound_holds_while_the_backlog_goes_back(
    own_redis: MakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a Redis that is too slow for the load, back and away in turns, would fill the memory."""
    monkeypatch.setattr(server, "BACKLOG_BYTES", 500_000)
    redis = own_redis()
    redis.kill()
    store = Gated(redis.url)
    async with group_commit(store) as commits:
        urls = await fill(commits)
        redis.start()
        store.gate.release()
        await until(lambda: not commits.away and len(store.batches) == 2)
        commits.backlog_bytes = server.BACKLOG_BYTES  # it is full again, and Redis is there
        known = asyncio.create_task(commits.hit(urls[0]))  # goes back last
        await asyncio.sleep(0)
        with pytest.raises(server.StoreError, match="too many URLs"):
            await commits.hit("/api/new/")
        monkeypatch.undo()
        new = asyncio.create_task(commits.hit("/api/new/"))
        for _ in range(20):
            store.gate.release()
        await asyncio.gather(known, new)
        await until(lambda: not commits.pending)
    assert redis.total() == len(urls) + 2


async def test_bytes_that_are_no_utf8_are_counted_and_found(
    serve: Serve, redis_server: RedisServer
) -> None:
    """aiohttp lets them through where it has no C parser."""
    process = serve(redis_server.url, AIOHTTP_NO_EXTENSIONS="1")
    for path in (b"/api/\xff", b"/stats/api/\xff"):
        request = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        said = await asyncio.to_thread(talk, process.port, request)
        assert said.startswith(b"HTTP/1.1 200"), said
    assert b'"count": 1' in said
    await process.hit(a=1)
    assert redis_server.total() == 2


async def test_a_reason_that_is_no_utf8_is_a_503_like_any(serve: Serve) -> None:
    process = serve("unix:///nowhere/\udce9.sock")
    await process.hit(a=1)
    for path in ("/health", "/stats/", "/stats/api/a/"):
        answer = await process.ask(path)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "nowhere" in answer.json["error"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
async def test_a_long_outage_does_not_grow_memory_beyond_the_backlog(rig_of: RigOf) -> None:
    rig = await rig_of(code="server.BACKLOG_BYTES = 150_000; server.main()")
    rig.load.urls = 3000

    def resident_kib() -> int:
        status = Path(f"/proc/{rig.server.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    async with rig.load:
        rig.redis.kill()
        await until(lambda: rig.load.failed.total() > 1000)  # full, and refusing
        before = resident_kib()
        await rig.load.more(3000)
        grown = resident_kib() - before
    assert set(rig.load.failed) == {"HTTP/1.1 503 Service Unavailable"}
    assert grown < 2048, f"{grown} KiB"


# --- What Redis may not do ------------------------------------------------------------------
# No way through the script in which a hit neither counts nor is reported.


@pytest.fixture
def bobs_redis(redis_server: RedisServer) -> Iterator[RedisServer]:
    """In the end bob may do everything again."""
    yield redis_server
    allow(redis_server)


def as_bob(redis: RedisServer) -> str:
    return redis.url.replace("//", "//bob:x@")


def looks(redis: RedisServer) -> int:
    """How many commands came from others than us."""
    commands: dict[str, Any] = redis.client.info("commandstats")
    commands.pop("cmdstat_info", None)
    return sum(int(of["calls"]) + int(of["rejected_calls"]) for of in commands.values())


@pytest.mark.parametrize("right", ["eval", "incrby"])  # as rights_lost takes each of them
async def test_hits_wait_for_a_right_that_is_missing(
    client_of: ClientOf, bobs_redis: RedisServer, right: str
) -> None:
    allow(bobs_redis, f"-{right}")
    app = await client_of(as_bob(bobs_redis))
    await app.hit(a=2, b=3)
    report = await settled(app, 503)
    assert report["redis"] == "refuses"
    assert "permission" in report["error"] or "can't run" in report["error"]
    assert bobs_redis.counts() == {}
    allow(bobs_redis)
    await settled(app)
    assert bobs_redis.counts() == {"/api/a/": 2, "/api/b/": 3}
    bobs_redis.check_index()


async def test_no_other_right_is_needed(serve: Serve, bobs_redis: RedisServer) -> None:
    allow(bobs_redis, "-@all", *(f"+{right}" for right in NEEDED + TO_READ))
    process = serve(as_bob(bobs_redis))
    await process.hit(a=2)
    before = looks(bobs_redis)
    await until(lambda: looks(bobs_redis) >= before + 2)  # an idle server looks each second
    await process.hit(a=1, b=1)
    assert await process.stats() == {"/api/a/": 3, "/api/b/": 1}
    assert (await process.ask("/stats/api/a/")).status == 200
    assert (await process.ask("/health")).status == 200
    assert [event["event"] for event in process.events()] == ["counting", "started"]
    bobs_redis.check_index()


@pytest.mark.parametrize("path", ["/health", "/stats/", "/stats/api/a/"])
async def test_a_list_that_holds_no_number_is_a_503(
    client_of: ClientOf, redis_server: RedisServer, path: str
) -> None:
    app = await client_of(redis_server.url)
    await app.hit(a=1)
    redis_server.client.zadd("url_rank", {"/api/a/": "inf"})
    redis_server.client.set("url_total", "many" if path == "/health" else 1)
    answer = await app.ask(path)
    assert answer.status == 503
    assert answer.json["error"]


async def test_a_redis_that_refuses_is_not_called_disconnected(rig_of: RigOf) -> None:
    """And the reason is that of the last attempt."""
    rig = await rig_of()
    rig.redis.client.config_set("maxmemory", 1)
    await rig.server.hit(a=1)
    report = await settled(rig.server, 503)
    assert report["redis"] == "refuses"
    assert "used memory > 'maxmemory'" in report["error"]
    (event,) = [event for event in rig.server.events() if event["level"] == "error"]
    assert event["event"] == "redis refuses, hits are held"
    assert "used memory > 'maxmemory'" in event["error"]
    rig.redis.kill()
    while report["redis"] != "disconnected":
        report = await settled(rig.server, 503)
    assert "maxmemory" not in report["error"]
    await asyncio.to_thread(rig.redis.start)
    await settled(rig.server)
    assert rig.redis.counts() == {"/api/a/": 1}


async def test_the_log_says_if_a_redis_that_was_away_now_refuses(rig_of: RigOf) -> None:
    rig = await rig_of()
    rig.redis.kill()
    await rig.server.hit(a=1)
    await rig.logs("redis disconnected, hits are held")
    await asyncio.to_thread(rig.redis.start, "--maxmemory 1")
    await rig.logs("redis refuses, hits are held")
    assert rig.server.says("used memory > 'maxmemory'")
    assert (await settled(rig.server, 503))["redis"] == "refuses"


# --- Slow, not away -------------------------------------------------------------------------


def evals(redis: RedisServer) -> int:
    """How many batches, and looks at Redis, it has had."""
    return int(redis.client.info("commandstats")["cmdstat_eval"]["calls"])


@pytest.mark.parametrize(("latency", "patience", "outages"), [(0.7, 1.0, 0), (0.45, 0.3, 1)])
async def test_a_slow_redis_does_not_flap(
    rig_of: RigOf, latency: float, patience: float, outages: int
) -> None:
    """One that takes longer than a request may wait is away until it is quick again."""
    rig = await rig_of(code=f"server.PATIENCE = {patience}; server.main()")
    async with rig.load:
        before = evals(rig.redis)
        rig.proxy.latency = latency
        await until(lambda: evals(rig.redis) >= before + (6 if outages else 4))
        rig.proxy.latency = 0
        await rig.load.more(200)
    await settled(rig.server)
    rig.check()
    assert rig.server.says("redis disconnected") == outages


async def test_a_slow_redis_comes_back_after_an_outage(rig_of: RigOf) -> None:
    """It takes 0.3 s a reply, and a request may wait for a second."""
    rig = await rig_of()
    async with rig.load:
        rig.redis.kill()
        await rig.logs("redis disconnected")
        rig.proxy.latency = 0.3
        await asyncio.to_thread(rig.redis.start)
        await rig.logs("counting", 2)
        await rig.load.more(16)
        rig.proxy.latency = 0
    rig.check()
    assert rig.server.says("redis disconnected") == 1


async def test_long_urls_come_through_a_slow_link(rig_of: RigOf) -> None:
    """All of them at once would never fit in the second that a command may take here."""
    rig = await rig_of(code="server.LONG_PATIENCE = 1; server.main()")
    rig.redis.kill()
    paths = [f"/api/{n:04}{'x' * 2000}/" for n in range(1000)]
    async with asyncio.TaskGroup() as group:
        for start in range(0, 1000, 100):
            group.create_task(ask_all(rig.server, paths[start : start + 100]))
    rig.proxy.rate = 1_000_000
    await asyncio.to_thread(rig.redis.start)
    await settled(rig.server)
    assert rig.redis.counts() == dict.fromkeys(paths, 1)


async def ask_all(process: Server, paths: list[str]) -> None:
    async with dialled(process.port) as (reader, writer):
        for path in paths:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert (await reader.readuntil(b'/"}\n')).startswith(b"HTTP/1.1 200")


async def test_a_redis_that_hangs_is_called_that(rig_of: RigOf, serve: Serve) -> None:
    """Under a running server, and at a start."""
    rig = await rig_of()
    rig.redis.process.send_signal(signal.SIGSTOP)
    await rig.server.hit(a=1)
    assert (await settled(rig.server, 503))["error"] == "no answer in time"
    hasty = serve(rig.redis.url, code="server.LONG_PATIENCE = 0.5; server.main()")
    await until(lambda: hasty.says("no answer in time"))
    await hasty.hit(a=1)
    rig.redis.process.send_signal(signal.SIGCONT)
    await settled(rig.server)
    await settled(hasty)
    assert rig.redis.counts() == {"/api/a/": 2}


# --- Links to Redis -------------------------------------------------------------------------

OPTIONS = [
    "decode_responses=true",
    "protocol=3",
    "socket_timeout=9&retry_on_timeout=true",
    "encoding=utf-16",
    "credential_provider=x",
    "redis_connect_func=x",
    "max_connections=1",
]


@pytest.mark.parametrize("options", OPTIONS)
async def test_options_in_redis_url_break_nothing(
    client_of: ClientOf, redis_server: RedisServer, options: str
) -> None:
    app = await client_of(f"{redis_server.url}?{options}")
    await app.hit(a=2, b=1)
    assert await app.stats() == {"/api/a/": 2, "/api/b/": 1}
    assert (await app.ask("/stats/api/a/")).status == 200


async def read_at_once(process: Server, n: int) -> set[int]:
    """The statuses of so many readers at a time."""
    answers = await asyncio.gather(*(process.ask("/stats/api/a/") for _ in range(n)))
    return {answer.status for answer in answers}


def closed_by_redis(rig: Rig) -> None:
    rig.redis.client.client_kill_filter(_type="normal")


def reset(rig: Rig) -> None:
    """As firewalls and load balancers do to idle links."""
    rig.proxy.cut()


def forgotten(rig: Rig) -> None:
    """Without a word: what is sent on them arrives nowhere."""
    for writer in rig.proxy.writers:
        if not writer.is_closing():
            writer.transport.pause_reading()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spoil", "rounds"), [(closed_by_redis, 20), (reset, 20), (forgotten, 2)])
async def test_readers_do_not_notice_what_became_of_idle_links(
    rig_of: RigOf, spoil: Callable[[Rig], None], rounds: int
) -> None:
    # Else the writer would notice, within its second, and say for a moment that Redis is away.
    no_look = "async def ping(store): ...\nserver.RedisStore.ping = ping\nserver.main()"
    rig = await rig_of(code=no_look)
    await rig.server.hit(a=1)
    for _ in range(rounds):
        assert await read_at_once(rig.server, 8) == {200}
        spoil(rig)
        assert await read_at_once(rig.server, 8) == {200}
    assert not rig.server.says("Traceback")


# --- Crowds ---------------------------------------------------------------------------------


async def test_100_readers_of_whole_lists_starve_nobody(
    serve: Serve, redis_server: RedisServer
) -> None:
    """Not each other, not /health, not the commits."""
    await batches_as_on_any_day(redis_server, [f"/api/{n}/" for n in range(20_000)])
    process = serve(redis_server.url)
    statuses = Counter[int]()
    waits: list[float] = []
    end = time.monotonic() + 2

    async def read_on() -> None:
        while time.monotonic() < end:
            answer = await process.ask("/stats/")
            statuses[answer.status] += 1
            assert len(answer.json) == 20_000

    readers = [asyncio.create_task(read_on()) for _ in range(100)]
    while time.monotonic() < end:
        began = time.monotonic()
        assert (await process.ask("/api/0/")).status == 200
        assert (await process.ask("/health")).status == 200
        waits.append(time.monotonic() - began)
    await asyncio.gather(*readers)
    print(f"a hit and /health beside {statuses.total()} lists: {max(waits):.2f} s at most")
    assert set(statuses) == {200}
    assert max(waits) < 5
    assert not process.says("redis disconnected")


def processor_time(process: Server) -> float:
    stat = Path(f"/proc/{process.process.pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
async def test_a_body_that_nobody_reads_is_not_inflated(victim: Server) -> None:
    """It costs what it costs when nothing says that it could be inflated."""
    bomb = gzip.compress(bytes(200_000_000), 1)

    async def cost(headers: dict[str, str]) -> float:
        before = processor_time(victim)
        for _ in range(10):
            answer = await victim.ask("/api/a/", "POST", headers, bomb)
            assert answer.status == 200
        return processor_time(victim) - before

    usual = await cost({})
    assert await cost({"Content-Encoding": "gzip"}) < 3 * usual + 0.5


async def test_slow_and_idle_clients_hold_nobody_up(victim: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        async with AsyncExitStack() as stack:
            crowd = [await stack.enter_async_context(dialled(victim.port)) for _ in range(1000)]
            for _ in range(3):  # a request, a byte at a time, that will never be whole
                for _, writer in crowd[::10]:
                    writer.write(b"G")
                async with Load(victim.port) as load:
                    pass
                assert load.slowest < 2
                assert not load.failed
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- Logs and metrics -----------------------------------------------------------------------


async def test_the_log_says_one_event_a_line_and_nothing_of_requests(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        rig.redis.kill()
        await rig.logs("redis disconnected")
        await rig.load.more(500)
        await asyncio.to_thread(rig.redis.start)
        await rig.logs("counting", 2)
    assert (await rig.server.ask("/test/5/", "POST")).status == 200
    assert await rig.server.stop() == 0
    events = [json.loads(line) for line in rig.server.log.read_text().splitlines()]
    assert [f"{event['level']}: {event['event']}" for event in events] == [
        "info: counting",
        "info: started",
        "error: redis disconnected, hits are held",
        "info: counting",
        "info: stopped",
    ]
    counting, started, away, back, _ = events
    assert counting["where"] == f"127.0.0.1:{rig.proxy.port}/0"
    assert started["page"] == rig.server.base
    assert away["error"]
    assert back["held"] >= 500


GONE = "end, pipe = os.pipe(); os.close(end); os.dup2(pipe, 2)"
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"
NO_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize(
    "spoil",
    [pytest.param(FULL, id="full disk", marks=NO_FULL), pytest.param(GONE, id="reader gone")],
)
async def test_a_log_that_cannot_be_written_costs_no_hit(
    own_redis: MakeRedis, serve: Serve, spoil: str
) -> None:
    redis = own_redis()
    process = serve(redis.url, wait=False, code=f"import os; {spoil}; server.main()")
    await settled(process)
    redis.kill()
    await process.hit(a=1)
    await asyncio.to_thread(redis.start)
    await settled(process)
    await process.hit(a=1)
    assert redis.counts() == {"/api/a/": 2}
    assert process.log.read_text() == ""
    assert await process.stop() in (0, 120)  # 120 is Python's for a lost stderr


async def test_metrics_say_when_redis_is_away_even_if_nobody_asks(
    client_of: ClientOf, own_redis: MakeRedis
) -> None:
    redis = own_redis()
    app = await client_of(redis.url)

    async def shows(name: str, value: int) -> None:
        async with asyncio.timeout(30):
            while (await app.metrics())[name, frozenset()] != value:
                await asyncio.sleep(0.05)

    await shows("url_redis_up", 1)
    redis.kill()
    await shows("url_redis_up", 0)  # on an idle server
    await app.hit(a=3)
    await shows("url_hits_pending", 3)
    redis.start()
    await shows("url_redis_up", 1)
    await shows("url_hits_pending", 0)
