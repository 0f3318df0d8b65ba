"""The server counts every request under /api/ exactly once, and answers as its docstring says."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

import server
from conftest import (
    HERE,
    NO_REDIS,
    App,
    Calendar,
    ClientOf,
    MakeRedis,
    RedisServer,
    Serve,
    Server,
    dialled,
    free_port,
    group_commit,
    launched,
    missing,
    run,
    settings_of,
    settled,
    talk,
    until,
    wait_for,
)
from server import OTHER, MemoryStore, RedisStore
from tools import reindex

Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]
Counts = dict[str, int]

# --- What is counted ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "paths"),
    [
        ("/api/", ["/api/"]),
        ("/api/a/", ["/api/a", "/api/a/", "/api/a/?x=1", "/api/a?x=/b/", "/api/%61"]),
        ("/api/a\nb/", ["/api/a%0Ab/"]),
        ("/api/a\0b/", ["/api/a%00b/"]),
        ("/api/é/🐍/", ["/api/%C3%A9/%F0%9F%90%8D/"]),
        ("/api/%FF/", ["/api/%FF/"]),
        ("/api//a//", ["/api//a//"]),
        ("/api/../a/", ["/api/../a/"]),
        ("/api/(other)/", ["/api/(other)/"]),
    ],
)
async def test_the_url_is_the_decoded_path(client: App, url: str, paths: list[str]) -> None:
    for path in paths:
        answer = await client.ask(path)
        assert (answer.status, answer.json) == (200, {"url": url})
    assert await client.stats() == {url: len(paths)}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PURGE"])
async def test_every_method_counts_once(client: App, method: str) -> None:
    assert (await client.ask("/api/a/", method)).status == 200
    assert await client.stats() == {"/api/a/": 1}


@pytest.mark.parametrize(
    "path",
    ["/", "/api", "/api%2Fa/", "/apix/", "/stats/", "/stats/api/a/", "/health", "/metrics", "/x"],
)
async def test_nothing_else_counts(client: App, path: str) -> None:
    await client.ask(path)
    assert await client.stats() == {}


@pytest.mark.parametrize(("length", "status"), [(2048, 200), (2049, 414)])
async def test_a_path_has_at_most_2048_characters(client: App, length: int, status: int) -> None:
    answer = await client.ask("/api/" + "x" * (length - 5))
    assert answer.status == status
    assert len(await client.stats()) == (status == 200)


@pytest.mark.parametrize("expected", ["100-continue", "foo"])
async def test_a_client_that_expects_something_counts_once(victim: Server, expected: str) -> None:
    head = f"POST /api/{expected}/ HTTP/1.1\r\nHost: x\r\nExpect: {expected}\r\nContent-Length: 1"
    said = talk(victim.port, f"{head}\r\nConnection: close\r\n\r\nx".encode())
    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    assert (await victim.stats())[f"/api/{expected}/"] == 1


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?" + "x" * 10_000, {}),
        ("", {"X": "y" * 15_000}),
        ("", {f"X-{n}": "y" for n in range(200)}),
    ],
    ids=["long query", "long header", "many headers"],
)
async def test_big_requests_count(victim: Server, query: str, headers: dict[str, str]) -> None:
    assert (await victim.ask("/api/big/" + query, headers=headers)).status == 200


def test_bytes_that_are_not_http_get_a_400(victim: Server) -> None:
    assert talk(victim.port, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.0 400")


# --- Endpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "urls"),
    [
        ("", "acdb"),
        ("?limit=0", ""),
        ("?limit=1", "a"),
        ("?limit=2&offset=1", "cd"),
        ("?limit=007", "acdb"),
        ("?offset=3", "b"),
        ("?limit=999999999999999&offset=3", "b"),
        ("?offset=4", ""),
        ("?offset=1000000000000000", ""),
    ],
)
async def test_the_most_requested_come_first(client: App, query: str, urls: str) -> None:
    hits = {"a": 3, "c": 2, "d": 1, "b": 1}  # ties: both stores in the one order that Redis has
    await client.hit(**hits)
    answer = await client.ask(f"/stats/{query}")
    assert answer.json == [{"count": hits[url], "url": f"/api/{url}/"} for url in urls]
    assert answer.headers["X-Total-Count"] == "4"
    assert answer.headers["X-Total-Hits"] == "7"
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "value", ["-1", "x", "", "1.5", "%D9%A3", "%2B1", "1e3", "1_0", "9" * 17, "9" * 5000]
)
@pytest.mark.parametrize("name", ["limit", "offset"])
async def test_a_page_is_asked_for_in_ascii_digits(client: App, name: str, value: str) -> None:
    answer = await client.ask(f"/stats/?{name}={value}")
    assert answer.status == 400
    assert answer.json["error"].startswith(f"{name} is ")


async def test_the_whole_list_is_one_list_however_long(client: App) -> None:
    """It is sent page by page; the seams do not show."""
    urls = {f"/api/{n}/": n % 7 + 1 for n in range(server.LIST_PAGE * 2 + 1)}
    await client.commits.store.commit(9, urls)
    rows = (await client.ask("/stats/")).json
    assert {row["url"]: row["count"] for row in rows} == urls
    assert rows == sorted(rows, key=lambda row: (row["count"], row["url"]), reverse=True)
    assert (await client.ask("/stats/?offset=199&limit=202")).json == rows[199:]


async def test_a_list_in_memory_lets_others_be_served_in_between(
    client_of: ClientOf,
) -> None:
    client = await client_of()
    await client.commits.store.commit(1, {f"/api/{n}/": 1 for n in range(20 * server.LIST_PAGE)})
    pages, others = 0, 0

    async def other() -> None:
        nonlocal others
        while pages < 20:
            others += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    async for rows in client.commits.store.ranked(server.ALL_TIME, 0, 10**6):
        assert len(rows) == server.LIST_PAGE
        pages += 1
    await task
    assert others >= 19


async def test_stats_of_one_url(client: App) -> None:
    await client.hit(b=1, a=3, c=2, d=1)
    for path in ("/stats/api/c/", "/stats/api/c", "/stats/api/%63"):
        assert (await client.ask(path)).json == {"count": 2, "url": "/api/c/", "rank": 2}
    assert (await client.ask("/stats/api/b/")).json["rank"] == 4
    answer = await client.ask("/stats/api/x/")
    assert (answer.status, answer.json["error"][:12]) == (404, "/api/x/ was ")


async def test_health_adds_up(client: App, redis_url: str) -> None:
    await client.hit(a=2, b=1)
    answer = await client.ask("/health")
    report = answer.json
    assert answer.status == 200
    assert report.pop("uptime_s") >= 0
    assert report == {
        "status": "healthy",
        "redis": "connected" if redis_url else "in-memory",
        "pending": 0,
        "hits": 3,
        "urls": 2,
        "version": server.__version__,
        "keep_days": 7,
        "max_test_requests": 100_000,
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("GET", "/api", 404, None),
        ("GET", "/stats/x/", 404, None),
        ("GET", "/stats/api/never/", 404, None),
        ("GET", "/stats/?limit=x", 400, None),
        ("GET", "/api/" + "x" * 2048, 414, None),
        ("POST", "/test/0/", 400, None),
        ("GET", "/test/5/", 405, "POST"),
        ("POST", "/stats/", 405, "GET,HEAD"),
        ("DELETE", "/stats/api/a/", 405, "GET,HEAD"),
        ("POST", "/health", 405, "GET,HEAD"),
    ],
)
async def test_errors_are_json(
    client: App, method: str, path: str, status: int, allow: str | None
) -> None:
    answer = await client.ask(path, method)
    assert (answer.status, answer.headers.get("Allow")) == (status, allow)
    assert list(answer.json) == ["error"]
    assert answer.json["error"]
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "path",
    ["/stats", "/stats/", "/stats/?contains=a", "/stats/api/a", "/health", "/metrics/", "/api/a"],
)
async def test_no_answer_is_sniffed_or_stored(client: App, method: str, path: str) -> None:
    await client.hit(a=1)
    answer = await client.ask(path, method)
    assert answer.status == 200
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"


async def test_the_page_is_asked_for_again_each_time_and_stands_in_no_frame(client: App) -> None:
    answer = await client.ask("/")
    assert answer.body == (HERE / "dashboard.html").read_bytes()
    assert answer.headers["Content-Type"].startswith("text/html")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"


async def test_without_its_file_the_page_is_a_404(client: App, monkeypatch: Patch) -> None:
    monkeypatch.setattr(server, "DASHBOARD", Path("nothing.html"))
    answer = await client.ask("/")
    assert answer.status == 404
    assert "dashboard.html" in answer.json["error"]


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/stats/?limt=3", "limit, offset, day, contains"),
        ("/stats/?limit=3&x", "limit, offset, day, contains"),
        ("/stats/api/a/?limit=3", "day"),
        ("/test/1/?sed=7", "seed, concurrency"),
    ],
)
async def test_an_unknown_parameter_is_a_400(client: App, path: str, known: str) -> None:
    await client.hit(a=1)
    answer = await client.ask(path, "POST" if "/test/" in path else "GET")
    assert answer.status == 400
    assert answer.json["error"].endswith(f" use {known}")


async def test_a_list_is_broken_off_never_short(client: App, monkeypatch: Patch) -> None:
    async def ranked(*_: object) -> AsyncIterator[server.Rows]:
        yield [("/api/a/", 1)]
        raise OSError("gone")

    monkeypatch.setattr(client.commits.store, "ranked", ranked)
    with pytest.raises(aiohttp.ClientError):
        await client.ask("/stats/")


async def test_the_unexpected_is_a_500(client: App, monkeypatch: Patch, capsys: Printed) -> None:
    monkeypatch.setattr(client.commits, "store", None)
    answer = await client.ask("/stats/")
    assert (answer.status, list(answer.json)) == (500, ["error"])
    monkeypatch.undo()
    assert "unexpected error" in capsys.readouterr().out


# --- Days -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("day", "rows"),
    [
        ("today", {"/api/b/": 4}),
        ("2026-11-26", {"/api/b/": 4}),
        ("yesterday", {"/api/a/": 2, "/api/b/": 1}),
        ("2026-11-25", {"/api/a/": 2, "/api/b/": 1}),
        ("2026-11-24", {}),
    ],
)
async def test_the_list_of_a_day(client: App, calendar: Calendar, day: str, rows: Counts) -> None:
    await client.hit(a=2, b=1)
    calendar.midnight()
    await client.hit(b=4)
    answer = await client.ask(f"/stats/?day={day}")
    assert {row["url"]: row["count"] for row in answer.json} == rows
    assert answer.headers["X-Total-Count"] == str(len(rows))
    assert answer.headers["X-Total-Hits"] == str(sum(rows.values()))
    assert await client.stats(f"?day={day}&offset=1") == dict(list(rows.items())[1:])
    assert await client.stats() == {"/api/b/": 5, "/api/a/": 2}


async def test_one_url_on_one_day(client: App, calendar: Calendar) -> None:
    await client.hit(a=2, b=1)
    calendar.midnight()
    await client.hit(b=4)
    answer = await client.ask("/stats/api/b?day=yesterday")
    assert answer.json == {"count": 1, "url": "/api/b/", "rank": 2}
    answer = await client.ask("/stats/api/a/?day=today")
    assert (answer.status, answer.json["error"][:12]) == (404, "/api/a/ was ")


@pytest.mark.parametrize("path", ["/stats/", "/stats/api/a/"])
@pytest.mark.parametrize(
    "day", ["tomorrow", "20261126", "2026-1-2", "2026-02-30", "2026-W48-4", "2026-11-26T00:00"]
)
async def test_another_day_is_a_400(client: App, path: str, day: str) -> None:
    await client.hit(a=1)
    answer = await client.ask(f"{path}?day={day}")
    assert answer.status == 400
    assert answer.json["error"] == f"day is {day!r}: use today, yesterday or 2026-11-26"


async def test_a_day_expires_in_redis(client_of: ClientOf, redis_server: RedisServer) -> None:
    client = await client_of(redis_server.url, keep_days=3)
    await client.hit(a=1)
    keys = redis_server.client.keys("url_*:20??-??-??")
    assert sorted(key.partition(":")[0] for key in keys) == ["url_rank", "url_total"]
    for key in keys:
        assert 3 * 86_400 - 3600 < int(redis_server.client.ttl(key)) <= 3 * 86_400
    (commit,) = redis_server.client.keys("url_commit:*")
    assert 86_400 - 3600 < int(redis_server.client.ttl(commit)) <= 86_400


async def test_a_day_expires_in_memory(client_of: ClientOf, calendar: Calendar) -> None:
    client = await client_of(keep_days=2)
    await client.hit(a=1)
    first = calendar.utc_day()
    for kept in (True, True, False):
        await client.hit(b=1)
        assert bool(await client.stats(f"?day={first}")) == kept
        calendar.midnight()


async def test_keep_days_0_keeps_no_day(client_of: ClientOf, redis_server: RedisServer) -> None:
    for redis_url in redis_server.url, "":
        client = await client_of(redis_url, keep_days=0)
        await client.hit(a=1)
        assert await client.stats("?day=today") == {}
        assert await client.stats() == {"/api/a/": 1}
    assert redis_server.client.keys("url_*:20??-??-??") == []


async def test_urls_beyond_max_urls_count_as_other(client_of: ClientOf, redis_url: str) -> None:
    client = await client_of(redis_url, max_urls=2)
    await client.hit(a=1, b=1, c=1)
    await asyncio.gather(*(client.ask(f"/api/new{n}/") for n in range(40)))
    await client.hit(a=1, b=1)
    counts = {OTHER: 41, "/api/b/": 2, "/api/a/": 2}
    assert await client.stats() == counts
    assert await client.stats("?day=today") == counts


# --- Search ---------------------------------------------------------------------------------


SITE = {"/api/Pricing/": 5, "/api/blog/": 4, "/api/blog/pricing-2/": 3, "/api/STRASSE/": 2}


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("contains=pricing", ["/api/Pricing/", "/api/blog/pricing-2/"]),
        ("contains=PRICING&limit=1", ["/api/Pricing/"]),
        ("contains=pricing&offset=1", ["/api/blog/pricing-2/"]),
        ("contains=pricing&offset=2", []),
        ("contains=pricing&limit=0", []),
        ("contains=/blog/&limit=9", ["/api/blog/", "/api/blog/pricing-2/"]),
        ("contains=stra%C3%9Fe", ["/api/STRASSE/"]),
        ("contains=%2E%2A", []),
        ("contains=never", []),
        ("contains=", list(SITE)),
        ("contains=blog&day=today", ["/api/blog/", "/api/blog/pricing-2/"]),
        ("contains=blog&day=yesterday", []),
    ],
)
async def test_a_search_ignores_case(client: App, query: str, found: list[str]) -> None:
    await client.commits.store.commit(1, SITE)
    answer = await client.ask(f"/stats/?{query}")
    assert answer.json == [{"count": SITE[url], "url": url} for url in found]
    assert ("X-Total-Count" in answer.headers) == (query == "contains=")
    assert answer.headers["X-Total-Hits"] == ("0" if "yesterday" in query else "14")


async def test_a_search_goes_through_all_pages(client: App) -> None:
    urls = {f"/api/{n}/": 10_000 - n for n in range(5 * server.LIST_PAGE)}
    await client.commits.store.commit(1, urls)
    found = [url for url in urls if "7" in url]
    assert list(await client.stats("?contains=7")) == found
    assert list(await client.stats("?contains=7&offset=150&limit=60")) == found[150:210]


@pytest.fixture
async def big(client_of: ClientOf, redis_server: RedisServer) -> App:
    """A list of 500 pages."""
    rows = {f"/api/{n}/": n for n in range(500 * server.LIST_PAGE)}
    redis_server.client.zadd("url_rank", rows)
    redis_server.client.config_resetstat()
    return await client_of(redis_server.url)


def pages_read(redis_server: RedisServer) -> int:
    read = redis_server.client.info("commandstats").get("cmdstat_zrevrange")
    return int(read["calls"]) if read else 0


async def test_head_does_not_walk_the_list(big: App, redis_server: RedisServer) -> None:
    answer = await big.ask("/stats/", "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert pages_read(redis_server) == 1
    await big.ask("/stats/")  # the control
    assert pages_read(redis_server) >= 500


async def test_a_search_ends_when_its_client_is_gone(big: App, redis_server: RedisServer) -> None:
    async with dialled(big.port) as (_, writer):
        writer.write(b"GET /stats/?contains=never HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: pages_read(redis_server) >= 3)
        writer.transport.abort()
    before = -1
    while (now := pages_read(redis_server)) > before:
        before = now
        await asyncio.sleep(0.2)
    assert now < 500


async def test_clients_that_leave_a_list_leave_no_trace(big: App, capfd: Printed) -> None:
    capfd.readouterr()
    for _ in range(100):
        async with dialled(big.port) as (_, writer):
            writer.write(b"GET /stats/ HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            writer.transport.abort()
    assert len(await big.stats("?limit=5000")) == 5000
    assert capfd.readouterr() == ("", "")


# --- Synthetic traffic ----------------------------------------------------------------------


async def run_test(
    client: App, path: str, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    answer = await client.ask(path, "POST", headers)
    return answer.status, answer.json


async def test_a_run_sends_n_requests_made_of_three_segments(client: App) -> None:
    status, report = await run_test(client, "/test/500/")
    counts = await client.stats()
    assert (status, report["requested"], report["ok"], report["failed"]) == (200, 500, 500, 0)
    assert (report["status"], report["errors"]) == ({"200": 500}, {})
    assert sum(counts.values()) == 500
    assert len(counts) == report["unique_urls"]
    used = [url.removeprefix("/api/").removesuffix("/").split("/") for url in counts]
    assert {len(segments) for segments in used} == {1, 2, 3, 4, 5, 6}
    assert {segment for path in used for segment in path} == set(report["segments"])
    assert len(set(report["segments"])) == 3
    latency = report["latency_ms"]
    assert list(latency) == ["min", "mean", "p50", "p95", "p99", "max"]
    assert latency["min"] <= latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]


async def test_a_seed_repeats_a_run_and_another_one_does_not(client: App) -> None:
    _, first = await run_test(client, "/test/50/?seed=7")
    counts = await client.stats()
    _, again = await run_test(client, "/test/50?seed=7&concurrency=1")
    assert await client.stats() == {url: 2 * n for url, n in counts.items()}
    _, other = await run_test(client, "/test/50/")
    assert first["segments"] == again["segments"] != other["segments"]
    assert (first["seed"], first["concurrency"], again["concurrency"]) == (7, 32, 1)


def test_the_same_seed_sends_the_same_urls_in_the_same_order() -> None:
    (segments, urls), (again, same) = server.random_urls(99, 7), server.random_urls(99, 7)
    assert (segments, list(urls)) == (again, list(same))


def test_percentiles_are_nearest_rank() -> None:
    found = server.summary([float(ms) for ms in range(1, 201)])
    assert found == {"min": 1, "mean": 100.5, "p50": 100, "p95": 190, "p99": 198, "max": 200}
    assert server.summary([3.14]) == dict.fromkeys(("min", "mean", "p50", "p95", "p99", "max"), 3.1)
    assert server.summary([]) == {}


@pytest.mark.parametrize("n", ["1", "60", "1?concurrency=256", "1?seed=0"])
async def test_a_run_within_its_bounds(client_of: ClientOf, n: str) -> None:
    client = await client_of(max_test_requests=60)
    assert (await run_test(client, f"/test/{n}"))[0] == 200


@pytest.mark.parametrize(
    "n", ["0", "61", "x", "-1", "%D9%A3", "1?concurrency=0", "1?concurrency=257", "1?seed=x"]
)
async def test_a_run_beyond_its_bounds_is_a_400(client_of: ClientOf, n: str) -> None:
    client = await client_of(max_test_requests=60)
    assert (await run_test(client, f"/test/{n}"))[0] == 400


async def test_max_test_requests_0_turns_runs_off(client_of: ClientOf) -> None:
    client = await client_of(max_test_requests=0)
    status, report = await run_test(client, "/test/1/")
    assert (status, report["error"]) == (403, "test runs are off: MAX_TEST_REQUESTS is 0")
    assert (await client.ask("/health")).json["max_test_requests"] == 0


async def test_one_run_at_a_time(client: App) -> None:
    long = asyncio.create_task(run_test(client, "/test/2000/?concurrency=4"))
    await until(client.app[server.TEST_RUN].locked)
    answer = await client.ask("/test/1/", "POST")
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    assert answer.json["error"]
    assert (await long)[1]["ok"] == 2000
    assert (await run_test(client, "/test/1/"))[0] == 200


async def test_a_run_reports_what_failed(client_of: ClientOf, monkeypatch: Patch) -> None:
    client = await client_of(NO_REDIS)
    monkeypatch.setattr(server, "BACKLOG_BYTES", 0)
    _, report = await run_test(client, "/test/20/")
    assert (report["ok"], report["failed"], report["status"]) == (0, 20, {"503": 20})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Host": "me", "Origin": "http://me"}, 200),
        ({"Host": "me", "Origin": "https://me"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Host": "me", "Origin": "http://me"}, 403),
        ({"Host": "me", "Origin": "http://evil"}, 403),
        ({"Host": "me", "Origin": "null"}, 403),
    ],
    ids=str,
)
async def test_another_sites_page_cannot_start_a_run(
    client_of: ClientOf, headers: dict[str, str], status: int
) -> None:
    client = await client_of()
    answered, report = await run_test(client, "/test/1/", headers)
    assert answered == status
    assert status == 200 or "$http_host" in report["error"]  # what to mend behind a proxy


async def test_the_host_header_does_not_aim_the_traffic(client: App) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bystander:
        bystander.setblocking(False)
        host = f"127.0.0.1:{bystander.getsockname()[1]}"
        _, report = await run_test(client, "/test/20/", {"Host": host})
        assert report["ok"] == 20
        with pytest.raises(BlockingIOError):  # nobody has called
            bystander.accept()
    assert sum((await client.stats()).values()) == 20


# --- Group commit ---------------------------------------------------------------------------


async def test_300_concurrent_requests_are_300_hits(client: App) -> None:
    answers = await asyncio.gather(*(client.ask(f"/api/{n % 3}/") for n in range(300)))
    assert {answer.status for answer in answers} == {200}
    assert await client.stats() == {f"/api/{n}/": 100 for n in (2, 1, 0)}


async def test_an_answer_means_that_the_hit_is_in_redis(
    client_of: ClientOf, redis_server: RedisServer
) -> None:
    client = await client_of(redis_server.url)

    async def check(url: str) -> None:
        assert (await client.ask(url)).status == 200
        assert redis_server.client.get(f"url_count:{url}") == "1"

    await asyncio.gather(*(check(f"/api/{n}/") for n in range(100)))
    redis_server.check_index()


async def test_hits_wait_for_their_batch_and_share_it_even_if_one_leaves() -> None:
    """The first hit flies at once; the 40 that come meanwhile are one commit of 40."""
    entered, gate = asyncio.Event(), asyncio.Event()
    batches = list[Counts]()

    class Gated(MemoryStore):
        async def commit(self, sequence: int, hits: Mapping[str, int]) -> tuple[int, int]:
            entered.set()
            await gate.wait()
            batches.append(dict(hits))
            return await super().commit(sequence, hits)

    async with group_commit(Gated(settings_of())) as commits:
        await until(lambda: not commits.away)
        first = asyncio.create_task(commits.hit("/api/a/"))
        await entered.wait()
        rest = [asyncio.create_task(commits.hit("/api/a/")) for _ in range(40)]
        await asyncio.sleep(0)
        rest.pop(3).cancel()
        await asyncio.sleep(0)
        assert commits.pending == 41
        assert not first.done()
        gate.set()
        await asyncio.wait_for(asyncio.gather(first, *rest), 30)
        assert (batches, commits.pending) == ([{"/api/a/": 1}, {"/api/a/": 40}], 0)


async def test_hits_are_held_while_redis_is_away(own_redis: MakeRedis, serve: Serve) -> None:
    own = own_redis()
    own.kill()
    process = serve(own.url)  # not there at the start, either
    await process.hit(a=3)
    for path in ("/health", "/stats/", "/stats/api/a/"):
        answer = await process.ask(path)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "Error 111" in answer.json["error"] or "Connection refused" in answer.json["error"]
    report = (await process.ask("/health")).json
    assert (report["status"], report["redis"]) == ("unhealthy", "disconnected")
    assert report["pending"] == 3
    own.start()
    assert (await settled(process))["hits"] == 3
    assert await process.stats() == {"/api/a/": 3}
    assert own.counts() == {"/api/a/": 3}


async def test_a_full_backlog_refuses_new_urls(client_of: ClientOf, monkeypatch: Patch) -> None:
    client = await client_of(NO_REDIS)
    await client.hit(a=1)
    monkeypatch.setattr(server, "BACKLOG_BYTES", client.commits.backlog_bytes)
    answer = await client.ask("/api/one-too-many/")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert "too many URLs" in answer.json["error"]
    await client.hit(a=1)
    assert client.commits.pending == 2


# --- The store against a model --------------------------------------------------------------
# Whatever comes in whatever order, Redis holds what a few lines of Python say.

POOL = [f"/api/{name}/" for name in "abcdef"]
MOST = 4  # URLs, so that the cap is met
STORES = st.integers(0, 1)
BATCHES = st.dictionaries(st.sampled_from(POOL), st.integers(1, 3), min_size=1, max_size=4)


class StoreMachine(stateful.RuleBasedStateMachine):
    """Two servers on one Redis. The second keeps no days."""

    redis: RedisServer
    calendar: Calendar

    def __init__(self) -> None:
        super().__init__()
        self.redis.client.flushall()
        self.runner = asyncio.Runner()
        self.stores = [
            RedisStore(settings_of(self.redis.url, max_urls=MOST, keep_days=days))
            for days in (7, 0)
        ]
        self.sent: list[list[Counts]] = [[], []]  # by server; the first one has number 1
        self.forget()

    def forget(self) -> None:
        self.counts = Counter[str]()
        self.listed = set[str]()
        self.days: dict[str, Counter[str]] = {}
        self.spoiled = set[str]()
        self.forgotten = [len(sent) for sent in self.sent]  # numbers that Redis has not seen

    def expect(self, hits: Mapping[str, int], keep: bool) -> int:
        """Count in the model what Redis should count now. How many hits?"""
        listed = len(self.listed)
        counted = 0
        for url, n in hits.items():
            if url not in self.counts and url not in self.spoiled:
                if listed < MOST:
                    listed += 1
                else:
                    url = OTHER
            if url not in self.spoiled:
                self.counts[url] += n
                self.listed.add(url)
                counted += n
                if keep:
                    self.days.setdefault(self.calendar.utc_day(), Counter())[url] += n
        return counted

    @stateful.rule(n=STORES, batches=st.lists(BATCHES, min_size=1, max_size=3))
    def commit(self, n: int, batches: list[Counts]) -> None:
        for hits in batches:
            self.sent[n].append(hits)
            counted = self.expect(hits, self.stores[n].settings.keep_days > 0)
            answered = self.runner.run(self.stores[n].commit(len(self.sent[n]), hits))
            assert answered == (counted, len(self.listed))

    @stateful.rule(n=STORES, back=st.integers(1, 3))
    def an_old_batch_arrives_again(self, n: int, back: int) -> None:
        """The last one, as its reply was lost; or one before, as an old copy was late."""
        number = len(self.sent[n]) + 1 - back
        if number > self.forgotten[n]:
            self.runner.run(self.stores[n].commit(number, self.sent[n][number - 1]))

    @stateful.rule(n=STORES)
    def a_server_looks_whether_redis_takes_commits(self, n: int) -> None:
        self.runner.run(self.stores[n].connect())

    @stateful.rule()
    def midnight(self) -> None:
        self.calendar.midnight()

    @stateful.rule(url=st.sampled_from([*POOL, OTHER]))
    def a_key_is_spoiled(self, url: str) -> None:
        if url not in self.counts:
            self.redis.client.delete(f"url_count:{url}")
            self.redis.client.rpush(f"url_count:{url}", "no number")
            self.spoiled.add(url)

    @stateful.rule()
    def flushall(self) -> None:
        self.redis.client.flushall()
        self.forget()

    @stateful.rule()
    def the_index_is_lost(self) -> None:
        self.redis.client.delete("url_rank", "url_total")
        self.listed.clear()

    @stateful.rule()
    def the_index_is_made_again(self) -> None:
        with reindex.connect(self.redis.url) as client:
            reindex.reindex(client)
        self.listed = set(self.counts)

    @stateful.invariant()
    def redis_agrees(self) -> None:
        ranking = {url: self.counts[url] for url in self.listed}
        for url in self.spoiled:
            assert self.redis.client.type(f"url_count:{url}") == "list"
        keys = self.redis.client.keys("url_count:*")
        unspoiled = set(keys) - {f"url_count:{url}" for url in self.spoiled}
        values = {key: int(self.redis.client.get(key)) for key in unspoiled}
        assert values == {f"url_count:{url}": n for url, n in self.counts.items()}
        assert self.redis.ranking() == ranking
        assert self.redis.total() == sum(ranking.values())
        assert self.redis.days() == self.days
        for day, counts in self.days.items():
            assert self.redis.total(day) == counts.total()

    def teardown(self) -> None:
        for store in self.stores:
            self.runner.run(store.close())
        self.runner.close()


def test_redis_holds_what_the_model_holds(redis_server: RedisServer, calendar: Calendar) -> None:
    StoreMachine.redis = redis_server
    StoreMachine.calendar = calendar
    settings = hypothesis.settings(max_examples=60, stateful_step_count=30)
    stateful.run_state_machine_as_test(StoreMachine, settings=settings)


# --- Settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORT", "x", "argument --port: PORT is 'x': use a whole number from 0 to 65535"),
        ("PORT", "-1", "PORT is '-1'"),
        ("PORT", "65536", "PORT is '65536'"),
        ("PORT", "٣", "PORT is '٣'"),
        ("MAX_URLS", "0", "argument --max-urls: MAX_URLS is '0': use a whole number from 1 "),
        ("MAX_TEST_REQUESTS", "1e5", "--max-test-requests: MAX_TEST_REQUESTS is '1e5': use"),
        ("KEEP_DAYS", "-1", "argument --keep-days: KEEP_DAYS is '-1': use a whole number from 0 "),
        ("REDIS_URL", "http://h/", "argument --redis-url: REDIS_URL is no address like redis://"),
        ("REDIS_URL", "localhost", "REDIS_URL is no address"),
        ("REDIS_URL", "redis:/h:6379/3", "REDIS_URL is no address"),
        ("REDIS_URL", "redis://h:99999/0", "REDIS_URL is no address"),
        ("REDIS_URL", "rediss://h/0?ssl_cert_reqs=foo", "REDIS_URL is no address"),
    ],
)
@pytest.mark.parametrize("way", ["variable", "flag"])
def test_a_bad_value_is_named_in_one_line(
    monkeypatch: Patch, capsys: Printed, way: str, name: str, value: str, said: str
) -> None:
    flags = [f"--{name.lower().replace('_', '-')}={value}"] if way == "flag" else []
    if not flags:
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        server.read_settings(flags)
    line = capsys.readouterr().err
    assert re.fullmatch(r"server\.py: error: .*\n", line)
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prot", "5001"], "--prot"),
        (["--prot=5001", "--redis_url", "redis://h/0"], "--redis_url"),
        (["redis://h/0"], "an argument"),
        (["--max-url=7"], "an argument"),
    ],
)
def test_an_unknown_argument_is_named_without_its_value(
    capsys: Printed, arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        server.read_settings(arguments)
    line = capsys.readouterr().err
    assert re.fullmatch(r"server\.py: error: not known: .*--help.*\n", line)
    assert said in line
    assert "5001" not in line
    assert "//" not in line


SECRET = "Sec7ret"
ODD = st.text("aZ9:/?#[]@!%&=+ é", max_size=3)
PASSWORDS = st.tuples(ODD, ODD).map(lambda odd: odd[0] + SECRET + odd[1])
REDIS_URLS = st.builds(
    "{}{}:{}@{}{}{}".format,
    st.sampled_from(["redis://", "rediss://", "unix://", "http://", "redis:", "unix:/", ""]),
    st.sampled_from(["", "user"]),
    PASSWORDS,
    st.sampled_from(["127.0.0.1:1", "127.0.0.1:99999", "127.0.0.1:x", "", "[::1]:1", "[::1"]),
    st.sampled_from(["", "/", "/0", "/x"]),
    st.sampled_from(["", "?password=" + SECRET, "?p%61ssword=" + SECRET, "?db=" + SECRET]),
)
SLIPS = ["--redis_url", "--redis-url", "--redis", "-r", "--port", "--max-urls", "--keep-days"]
ARGUMENTS = (
    REDIS_URLS.map(lambda url: [url])
    | st.builds(lambda flag, url: [flag, url], st.sampled_from(SLIPS), REDIS_URLS)
    | st.builds(lambda flag, url: [f"{flag}={url}"], st.sampled_from(SLIPS), REDIS_URLS)
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(arguments=ARGUMENTS, redis_url=REDIS_URLS, in_variable=st.booleans())
def test_no_secret_is_ever_printed(arguments: list[str], redis_url: str, in_variable: bool) -> None:
    """Neither that of REDIS_URL, however it is spelled, nor that of an argument in its place."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if in_variable:
            patch.setenv("REDIS_URL", redis_url)
        with (
            contextlib.redirect_stderr(printed),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
        ):
            settings = server.read_settings([] if in_variable else arguments)
            if settings.redis_url:
                print(RedisStore(settings).where)  # as the log does
    assert SECRET.lower() not in printed.getvalue().lower()


def test_a_flag_wins_over_a_variable_and_an_empty_one_is_unset(monkeypatch: Patch) -> None:
    monkeypatch.setenv("PORT", "8080")
    monkeypatch.setenv("MAX_URLS", "5")
    monkeypatch.setenv("HOST", "")
    monkeypatch.setenv("KEEP_DAYS", "")
    found = server.read_settings(["--max-urls", "6"])
    assert found == settings_of(port=8080, max_urls=6)


def test_importing_opens_nothing_and_reads_no_environment() -> None:
    command = [sys.executable, "-W", "error", "-c", "import server"]
    ended = run(*command, PORT="nonsense", REDIS_URL="nonsense")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_version() -> None:
    ended = run(sys.executable, "server.py", "--version")
    assert (ended.returncode, ended.stdout) == (0, server.__version__ + "\n")


# --- Start and stop -------------------------------------------------------------------------


async def test_without_redis_url_it_counts_in_the_local_redis(
    client_of: ClientOf, redis_server: RedisServer, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(server, "LOCAL_REDIS", redis_server.url)
    client = await client_of()
    await client.hit(a=1)
    assert (await client.ask("/health")).json["redis"] == "connected"
    assert redis_server.counts() == {"/api/a/": 1}


def is_killed(own: RedisServer) -> None:
    own.kill()


def wants_a_password(own: RedisServer) -> None:
    own.client.config_set("requirepass", "right")


def hangs(own: RedisServer) -> None:
    own.process.send_signal(signal.SIGSTOP)


def loads(own: RedisServer) -> None:
    own.client.execute_command("DEBUG", "POPULATE", 5000)
    own.client.bgrewriteaof()
    wait_for(lambda: not own.client.info("persistence")["aof_rewrite_in_progress"])
    own.kill()
    own.start("--key-load-delay 2000 --loading-process-events-interval-bytes 1024", wait=False)
    wait_for(own.loads)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (is_killed, "Error 111"),
        (wants_a_password, "Authentication required"),
        (hangs, "no answer in time"),
        (loads, "Redis is loading the dataset"),
    ],
)
async def test_without_a_useful_redis_it_counts_in_memory_and_says_why(
    serve: Serve, own_redis: MakeRedis, harm: Callable[[RedisServer], None], reason: str
) -> None:
    own = own_redis()
    harm(own)
    process = serve(code=f"server.LOCAL_REDIS = {own.url!r}; server.main()")
    await process.hit(a=1)
    assert await process.stats() == {"/api/a/": 1}
    assert (await process.ask("/health")).json["redis"] == "in-memory"
    (warning,) = [event for event in process.events() if event["level"] == "warning"]
    assert warning["event"] == "REDIS_URL is not set: counts are lost on exit"
    assert f"127.0.0.1:{own.port}/0: " in warning["no_local_redis"]
    assert reason in warning["no_local_redis"]


async def test_a_wrong_password_is_no_end_and_not_shown(serve: Serve, own_redis: MakeRedis) -> None:
    own = own_redis()
    own.client.config_set("requirepass", "right")
    process = serve(own.url.replace("//", "//:secret@"))
    await process.hit(a=1)
    answer = await process.ask("/health")
    assert (answer.status, answer.json["redis"]) == (503, "refuses")
    assert "password" in answer.json["error"]
    own.client.config_set("requirepass", "secret")
    assert (await settled(process))["hits"] == 1
    assert await process.stop() == 0
    assert process.says(f"127.0.0.1:{own.port}/0")
    assert not process.says("secret")


def test_a_taken_port_is_all_that_is_said(serve: Serve) -> None:
    first = serve()
    second = serve(PORT=str(first.port))
    assert second.ends() == 1
    (line,) = second.log.read_text().splitlines()
    assert line.startswith("server.py: ")
    assert re.search(rf"port\W{first.port}\b.* in use", line, re.IGNORECASE)


def test_port_0_takes_any_free_one_and_says_which(serve: Serve) -> None:
    process = serve(PORT="0")
    (started,) = [event for event in process.events() if event["event"] == "started"]
    port = int(started["page"].rpartition(":")[2])
    assert talk(port, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_ends_it_without_a_traceback(serve: Serve, sig: int) -> None:
    process = serve()
    await process.hit(a=1)
    assert await process.stop(sig) == 0
    assert process.events()[-1]["event"] == "stopped"
    assert not process.says("Traceback")


async def test_under_nohup_the_end_of_the_terminal_is_not_its_end(serve: Serve) -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); server.main()"
    process = serve(code=ignoring)
    process.process.send_signal(signal.SIGHUP)
    await process.hit(a=1)
    assert await process.stop() == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
async def test_closed_streams_and_a_link_are_no_harm(
    redis_server: RedisServer, serve: Serve, tmp_path: Path, closed: str
) -> None:
    (tmp_path / "link.py").symlink_to(HERE / "server.py")
    command = f"exec {sys.executable} {tmp_path}/link.py {closed}"
    shell = f"import os; os.execvp('sh', ['sh', '-c', {command!r}])"
    process = serve(redis_server.url, code=shell, wait=False)
    await settled(process)
    assert (await process.ask("/")).body == (HERE / "dashboard.html").read_bytes()
    await process.hit(a=1)
    assert await process.stop() == 0
    assert redis_server.counts() == {"/api/a/": 1}


# --- Metrics and logs -----------------------------------------------------------------------


async def test_metrics_tell_what_was_answered(client: App) -> None:
    before = await client.metrics()
    await client.hit(a=2, b=1)
    await client.ask("/nothing")
    await client.ask("/stats/?limit=x")
    await client.ask("/api/c/", "PURGE")
    after = await client.metrics()

    def rise(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0)

    requests = "http_request_duration_seconds"
    api = {"route": "/api/...", "code": "200"}
    assert rise(f"{requests}_count", method="GET", **api) == 3
    assert rise(f"{requests}_count", method="OTHER", **api) == 1
    assert rise(f"{requests}_count", method="GET", route="none", code="404") == 1
    assert rise(f"{requests}_count", method="GET", route="/stats/", code="400") == 1
    assert rise(f"{requests}_bucket", method="GET", le="+Inf", **api) == 3
    assert rise(f"{requests}_sum", method="GET", **api) > 0
    assert rise("url_hits_total") == 4
    assert rise("url_commit_seconds_count") >= 1
    assert after["url_redis_up", frozenset()] == 1
    assert after["url_hits_pending", frozenset()] == 0
    assert after["url_keys", frozenset()] == 3
    assert not [labels for _, labels in after if "/api/a/" in str(labels)]  # never one per URL


@pytest.mark.parametrize("accept", ["text/plain; version=x", "application/openmetrics-text", "?"])
async def test_no_accept_header_breaks_metrics(client: App, accept: str) -> None:
    assert (await client.ask("/metrics", headers={"Accept": accept})).status == 200


async def test_promtool_finds_nothing_to_mend(client: App) -> None:
    if not shutil.which("promtool"):
        missing("promtool (apt: prometheus)")
    await client.hit(a=1)
    text = (await client.ask("/metrics")).body.decode()
    ended = run("promtool", "check", "metrics", given=text)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


async def test_a_key_that_cannot_be_raised_is_logged(
    serve: Serve, redis_server: RedisServer
) -> None:
    redis_server.client.rpush("url_count:/api/a/", "no number")
    process = serve(redis_server.url)
    await process.hit(a=2, b=1)
    metrics = await process.metrics()
    assert metrics["url_hits_total", frozenset()] == 1
    assert metrics["url_keys_refused_total", frozenset()] == 2
    (error,) = [event for event in process.events() if event["event"] == "cannot count"]
    assert error["key"] == "url_count:/api/a/"
    assert "wrong kind of value" in error["error"]


async def test_the_log_says_that_max_urls_is_reached(
    serve: Serve, redis_server: RedisServer
) -> None:
    process = serve(redis_server.url, MAX_URLS="2")
    await process.hit(a=1)
    assert not process.says("MAX_URLS")
    await process.hit(b=1, c=1, d=1)
    assert process.says("MAX_URLS is reached") == 1


@pytest.mark.parametrize("listed", [True, False])
async def test_counts_without_a_list_are_told(
    serve: Serve, redis_server: RedisServer, listed: bool
) -> None:
    redis_server.client.set("url_count:/api/old/", 7)
    if listed:
        redis_server.client.zadd("url_rank", {"/api/old/": 7})
    process = serve(redis_server.url)
    assert process.says("counts without a list: run tools/reindex.py") == (not listed)
    await process.hit(old=1)
    assert await process.stats() == {"/api/old/": 8}


def test_a_terminal_gets_text_but_hits_that_are_left_as_json(stack: contextlib.ExitStack) -> None:
    terminal, theirs = pty.openpty()
    stack.callback(os.close, terminal)
    port = free_port()
    env = {"PORT": str(port), "REDIS_URL": NO_REDIS}
    process = launched(stack, [sys.executable, "server.py"], theirs, env)
    os.close(theirs)
    said = b""
    while b"started" not in said:
        said += os.read(terminal, 1000)
    assert talk(port, b"GET /api/a HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")
    process.terminate()
    while b"stopped" not in said:
        said += os.read(terminal, 1000)
    assert process.wait(timeout=30) == 0
    text = re.sub(r"\x1b\[\d*m", "", said.decode())
    assert re.search(r"\[info +\] started +.*page=http://127\.0\.0\.1:\d+", text)
    (line,) = re.findall("{.*not committed.*}", text)
    assert json.loads(line)["urls"] == {"/api/a/": 1}


# --- Bad input ------------------------------------------------------------------------------


def hits(process: Server) -> int:
    said = talk(process.port, b"GET /health HTTP/1.0\r\n\r\n")
    return int(json.loads(said.partition(b"\r\n\r\n")[2])["hits"])


WORDS = [
    *["api", "stats", "test", "health", "metrics", "/", "//", "..", "%00", "%0A", "%ff", "?"],
    *["limit=", "offset=", "day=", "today", "contains=", "&", "=", "-1", "1", "%", ";", "{}"],
    *["%F0%9F%90%8D", "99999999999999999999", "a" * 2000],
]
ASCII = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#")
MIXED = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
TARGETS = st.text(ASCII, max_size=60) | MIXED
METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])


@hypothesis.settings(max_examples=800)
@hypothesis.given(method=METHODS, target=TARGETS)
def test_no_request_breaks_the_counts(victim: Server, method: str, target: str) -> None:
    before = hits(victim)
    lines = [f"{method} /{target} HTTP/1.1", "Host: x", "Content-Length: 0", "Connection: close"]
    said = talk(victim.port, "\r\n".join([*lines, "", ""]).encode())
    status = int(said.split()[1])
    assert status < 500
    if b"/json" in said and status >= 400 and method != "HEAD":
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]
    if not target.startswith("test"):
        counts = status == 200 and target.startswith(("api/", "%61pi/"))
        assert hits(victim) - before == counts


REQUEST = b"GET /api/fuzz/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
EDITS = st.lists(
    st.tuples(st.integers(0, len(REQUEST)), st.integers(0, 9), st.binary(max_size=9)), max_size=5
)


@hypothesis.settings(max_examples=500)
@hypothesis.given(edits=EDITS, copies=st.integers(1, 3))
def test_no_bytes_break_the_counts(
    victim: Server, edits: list[tuple[int, int, bytes]], copies: int
) -> None:
    data = REQUEST
    for start, length, inserted in edits:
        data = data[:start] + inserted + data[start + length :]
    before = hits(victim)
    said = talk(victim.port, data * copies, patience=0.02)
    assert b"HTTP/1.1 5" not in said
    assert b"Traceback" not in said
    answered = said.count(b'{"url": ')
    assert answered <= hits(victim) - before <= copies
