"""The promises of the server, each with its test: real sockets, real processes, a real Redis.

Nothing here sleeps and hopes: what takes time is polled for. No Redis but our own is touched.
"""

import asyncio
import contextlib
import gzip
import io
import json
import math
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import hypothesis
import pytest
import pytest_asyncio
import redis
from aiohttp import ClientError, ClientSession, TCPConnector, UnixConnector, web
from aiohttp.test_utils import TestClient
from hypothesis import strategies as st
from playwright import async_api as playwright
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

import server
from server import GroupCommit, MemoryStore, RedisStore

HERE = Path(__file__).parent
NO_REDIS = "redis://127.0.0.1:1/0"  # nobody listens there

Client = TestClient[web.Request, web.Application]
ClientOf = Callable[..., Awaitable[Client]]


# --- What the tests run against -------------------------------------------------------------------


def missing(what: str) -> None:
    """A test cannot run here; where CI is set everything must be there, so there it fails."""
    if os.environ.get("CI"):
        pytest.fail(f"CI needs {what}")
    pytest.skip(f"needs {what}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Poll until condition() is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def block(document: str, language: str, words: str) -> str:
    """The one code block of a document that has these words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (HERE / document).read_text(), re.DOTALL)
    (found,) = (text for text in blocks if words in text)
    return str(found)


def with_ports(text: str, ports: Mapping[int, int]) -> str:
    """A block of a document, on ports of our own."""
    for old, new in ports.items():
        address = rf"(127\.0\.0\.1:|localhost:|(?<=listen )){old}\b"
        text, n = re.subn(address, f"127.0.0.1:{new}", text)
        assert n, f"no port {old}"
    return text


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """wait_for() for a test whose own tasks must go on meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


async def run(*command: str, given: str = "", **env: str) -> tuple[int | None, str]:
    """How a program ends, and what it prints."""
    variables, pipe = os.environ | env, asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, env=variables, stdin=pipe, stdout=pipe, cwd=HERE
    )
    printed, _ = await process.communicate(given.encode())
    return process.returncode, printed.decode()


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def launched(
    stack: ExitStack,
    command: list[str],
    out: Any = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = HERE,
) -> "subprocess.Popen[bytes]":
    """A process that ends with the stack."""
    process = subprocess.Popen(
        command, stdout=out, stderr=out, env=env, cwd=cwd, start_new_session=True
    )
    stack.callback(end, process)
    return process


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test starts ends with it, whatever becomes of it."""
    with ExitStack() as stack:
        yield stack


class RedisServer:
    """A redis-server of our own, on its own port and folder; a confirmed write is on disk."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        if not shutil.which("redis-server"):
            missing("redis-server")
        self.stack, self.folder, self.port = stack, folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client: Any = redis.Redis.from_url(self.url, protocol=2, decode_responses=True)
        stack.callback(self.client.close)
        self.start()

    def start(self, options: str = "") -> None:
        command = f"redis-server --port {self.port} --bind 127.0.0.1 --dir {self.folder} --save ''"
        command += " --appendonly yes --appendfsync always --enable-debug-command local"
        command += " --repl-diskless-sync-delay 0 --user bob on '>x' '~*' '&*' '+@all' "
        command += "--logfile /dev/null " + options
        self.process = launched(self.stack, shlex.split(command))
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        end(self.process)
        self.client.close()

    def counts(self) -> dict[str, int]:
        """The truth: what the url_count: keys hold."""
        keys = list(self.client.scan_iter("url_count:*", 1000))
        values = map(int, self.client.mget(keys) if keys else [])
        return dict(zip((key.removeprefix("url_count:") for key in keys), values, strict=True))

    def check_index(self) -> None:
        """url_rank and url_total say what the url_count: keys say."""
        rows = self.client.zrange("url_rank", 0, -1, withscores=True)
        assert {url: int(count) for url, count in rows} == self.counts()
        assert int(self.client.get("url_total") or 0) == sum(count for _, count in rows)


MakeRedis = Callable[[], RedisServer]


@pytest.fixture
def own_redis(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> MakeRedis:
    """A function that starts a Redis for this test alone."""
    return lambda: RedisServer(stack, tmp_path_factory.mktemp("redis"))


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with ExitStack() as stack:
        yield RedisServer(stack, tmp_path_factory.mktemp("redis"))


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    redis_process.client.flushall()
    return redis_process


@pytest.fixture
def no_local_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DEFAULT_REDIS_URL", NO_REDIS)


@pytest.fixture(params=["redis", "memory"])
def redis_url(request: pytest.FixtureRequest) -> str:
    """What the tests of both stores run on; the in-memory one stands in where there is no Redis."""
    return str(request.getfixturevalue("redis_server").url) if request.param == "redis" else ""


async def app_of(redis_url: str = "", **options: str) -> web.Application:
    flags = [f"--{name.lower().replace('_', '-')}={value}" for name, value in options.items()]
    app = await server.create_app(server.read_settings([f"--redis-url={redis_url}", *flags]))
    assert isinstance(app, web.Application)
    return app


@pytest.fixture
def client_of(aiohttp_client: Callable[..., Awaitable[Client]], no_local_redis: None) -> ClientOf:
    """A function that starts the application in this process."""

    async def start(redis_url: str = "", **options: str) -> Client:
        app = await app_of(redis_url, **options)
        return await aiohttp_client(app)

    return start


@pytest.fixture
async def client(client_of: ClientOf, redis_url: str) -> Client:
    return await client_of(redis_url)


def commits_of(client: Client) -> GroupCommit:
    assert client.app
    return client.app[server.COMMITS]  # of this process


async def get(client: Client, path: str, method: str = "GET") -> tuple[int, Any]:
    async with client.request(method, URL(path, encoded=True)) as response:
        return response.status, await response.json() if method != "HEAD" else None


async def hit(client: Client, **counts: int) -> None:
    """Request /api/<name>/ so many times."""
    for name, n in counts.items():
        for _ in range(n):
            assert (await get(client, f"/api/{name}/"))[0] == 200


async def ask(
    port: int | None, target: str, method: str = "GET", body: str = ""
) -> tuple[int, str]:
    """Send a request whose target nobody tidies up; the answer's status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
    answer, _, content = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(answer.split()[1]), content


async def stats(client: Client, query: str = "") -> dict[str, int]:
    _, rows = await get(client, f"/stats/{query}")
    return {row["url"]: row["count"] for row in rows}


# --- What is counted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "paths"),
    [
        ("/api/", "/api/"),
        ("/api/a/", "/api/a /api/a/ /api/a/?x=1 /api/a?x=/b/ /api/%61"),
        ("/api/a\nb/", "/api/a%0Ab/"),
        ("/api/a\0b/", "/api/a%00b/"),
        ("/api/é/🐍/", "/api/%C3%A9/%F0%9F%90%8D/"),
        ("/api/%FF/", "/api/%FF/"),
        ("/api//a//", "/api//a//"),
        ("/api/../a/", "/api/../a/"),
        ("/api/(other)/", "/api/(other)/"),
    ],
)
async def test_the_url_is_the_decoded_path_with_a_slash(
    client: Client, url: str, paths: str
) -> None:
    for path in paths.split():
        status, body = await ask(client.port, path)
        assert (status, json.loads(body)) == (200, {"url": url})
    assert await stats(client) == {url: len(paths.split())}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PURGE"])
async def test_every_method_counts_once(client: Client, method: str) -> None:
    assert (await get(client, "/api/a/", method))[0] == 200
    assert await stats(client) == {"/api/a/": 1}


@pytest.mark.parametrize(
    "path", ["/api", "/api%2Fa/", "/apix/", "/stats/", "/health", "/stats/api/a/", "/x"]
)
async def test_nothing_else_counts(client: Client, path: str) -> None:
    await get(client, path)
    assert await stats(client) == {}


async def test_a_client_that_waits_for_100_continue_counts_once(client: Client) -> None:
    async with client.post("/api/a/", data=b"x", expect100=True) as response:
        assert response.status == 200
    assert await stats(client) == {"/api/a/": 1}


@pytest.mark.parametrize(("length", "status"), [(2048, 200), (2049, 414)])
async def test_a_path_has_at_most_2048_characters(client: Client, length: int, status: int) -> None:
    path = "/api/" + "x" * (length - 5)
    assert (await get(client, path))[0] == status
    assert len(await stats(client)) == (status == 200)


async def test_bytes_that_are_not_http_get_a_400(client: Client) -> None:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"\x16\x03\x01 hello\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.0 400")
    writer.close()


# --- Endpoints ------------------------------------------------------------------------------------


PAGES = """? acdb, ?limit=0 -, ?limit=1 a, ?limit=2&offset=1 cd, ?limit=007 acdb, ?offset=3 b,
    ?limit=999999999999999&offset=3 b, ?offset=4 -, ?offset=1000000000000000 -"""


@pytest.mark.parametrize("page", PAGES.split(","))
async def test_stats_lists_the_most_requested_first_and_limit_and_offset_page_it(
    client: Client, page: str
) -> None:
    hits = {"a": 3, "c": 2, "d": 1, "b": 1}  # ties: both stores in the one order that Redis has
    await hit(client, **hits)
    query, urls = page.replace("-", "").split(" ")[-2:]
    async with client.get(f"/stats/{query}") as response:
        rows = [{"count": hits[url], "url": f"/api/{url}/"} for url in urls]
        assert await response.json() == rows
        assert response.headers["X-Total-Count"] == "4"
        assert response.content_type == "application/json"


@pytest.mark.parametrize(
    "value", ["-1", "x", "", "1.5", "٣", "+1", "1e3", "1_0", "9" * 17, "9" * 5000]
)
@pytest.mark.parametrize("name", ["limit", "offset"])
async def test_a_page_is_asked_for_in_ascii_digits(client: Client, name: str, value: str) -> None:
    async with client.get("/stats/", params={name: value}) as response:
        assert response.status == 400
        assert (await response.json())["error"].startswith(f"{name} is ")


async def test_the_whole_list_is_one_list_however_long(client: Client) -> None:
    """Streamed in pages; the seams do not show."""
    store = commits_of(client).store
    urls = {f"/api/{n}/": n % 7 + 1 for n in range(server.PAGE * 2 + 1)}
    await store.commit(9, urls)
    assert await stats(client) == urls
    _, rows = await get(client, "/stats/")
    assert rows == sorted(rows, key=lambda row: (row["count"], row["url"]), reverse=True)
    assert await stats(client, "?offset=999&limit=1002") == {
        row["url"]: row["count"] for row in rows[999:2001]
    }


async def test_stats_of_one_url(client: Client) -> None:
    await hit(client, b=1, a=3, c=2, d=1)
    for path in ("/stats/api/c/", "/stats/api/c", "/stats/api/%63?x=1"):
        assert await get(client, path) == (200, {"count": 2, "url": "/api/c/", "rank": 2})
    assert await get(client, "/stats/api/b/") == (200, {"count": 1, "url": "/api/b/", "rank": 4})
    assert await get(client, "/stats/api/x/") == (404, {"error": "/api/x/ was never requested"})


async def test_health_adds_up(client: Client, redis_url: str) -> None:
    await hit(client, a=2, b=1)
    status, report = await get(client, "/health")
    assert report.pop("uptime_s") >= 0
    expected = {"status": "healthy", "redis": "connected" if redis_url else "in-memory"}
    assert (status, report) == (200, expected | {"pending": 0, "hits": 3, "urls": 2})


WRONG = (
    "GET /nothing 404, GET /api 404, GET /stats/x/ 404, GET /test/5/ 405 POST, "
    "POST /stats/ 405 GET,HEAD, DELETE /stats/api/a/ 405 GET,HEAD, POST /health 405 GET,HEAD"
)


@pytest.mark.parametrize("line", WRONG.split(", "))
async def test_errors_are_json(client: Client, line: str) -> None:
    method, path, status, *allow = line.split()
    async with client.request(method, path) as response:
        assert (response.status, response.headers.get("Allow", "")) == (int(status), "".join(allow))
        assert (await response.json())["error"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/stats", "/stats/", "/health", "/health/", "/api/a"])
async def test_a_trailing_slash_is_optional_and_no_answer_is_sniffed(
    client: Client, path: str
) -> None:
    for method in ("GET", "HEAD"):
        async with client.request(method, path) as response:
            assert response.status == 200
            assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_failing_store_is_a_503_and_a_list_is_broken_off_never_short(
    client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await client_of()

    async def ranked(*_: object) -> AsyncIterator[list[tuple[str, int]]]:
        yield [("/api/a/", 1)]
        raise redis.ConnectionError("gone")

    async def totals() -> tuple[int, int]:
        raise redis.ConnectionError("gone")

    store = commits_of(client).store
    monkeypatch.setattr(store, "ranked", ranked)
    async with client.get("/stats/") as response:
        with pytest.raises(ClientError):
            await response.json()
    monkeypatch.setattr(store, "totals", totals)
    for path in ("/stats/", "/health"):
        async with client.get(path) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert "gone" in (await response.json())["error"]


# --- Synthetic traffic ----------------------------------------------------------------------------


async def run_test(client: Client, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
    async with client.post(path, headers=headers) as response:
        return response.status, await response.json()


async def test_a_run_sends_n_requests_made_of_three_segments(client: Client) -> None:
    status, report = await run_test(client, "/test/500/")
    counts = await stats(client)
    assert (status, report["requested"], report["ok"], report["failed"]) == (200, 500, 500, 0)
    assert sum(counts.values()) == 500
    assert len(counts) == report["unique_urls"]
    used = [url.removeprefix("/api/").removesuffix("/").split("/") for url in counts]
    assert {len(segments) for segments in used} == {1, 2, 3, 4, 5, 6}
    assert {segment for path in used for segment in path} == set(report["segments"])
    assert len(set(report["segments"])) == 3
    latency = report["latency_ms"]
    assert list(latency) == ["min", "mean", "p50", "p95", "p99", "max"]
    assert latency["min"] <= latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]


async def test_a_seed_repeats_a_run_and_another_one_does_not(client: Client) -> None:
    _, first = await run_test(client, "/test/50/?seed=7")
    counts = await stats(client)
    _, again = await run_test(client, "/test/50?seed=7&concurrency=1")
    assert await stats(client) == {url: 2 * n for url, n in counts.items()}
    _, other = await run_test(client, "/test/50/")
    assert first["segments"] == again["segments"] != other["segments"]
    assert (first["seed"], again["concurrency"]) == (7, 1)


def test_percentiles_are_nearest_rank() -> None:
    found = server.summary([float(ms) for ms in range(1, 201)])
    assert found == {"min": 1, "mean": 100.5, "p50": 100, "p95": 190, "p99": 198, "max": 200}
    assert server.summary([3.14]) == dict.fromkeys(("min", "mean", "p50", "p95", "p99", "max"), 3.1)
    assert server.summary([]) == {}


BOUNDS = [
    (200, "1 60 1?concurrency=256 1?seed=0"),
    (400, "0 61 x -1 ٣ 1?concurrency=0 1?concurrency=257 1?seed=x"),
]


@pytest.mark.parametrize(("status", "n"), [(row[0], n) for row in BOUNDS for n in row[1].split()])
async def test_a_run_keeps_to_its_bounds(client_of: ClientOf, status: int, n: str) -> None:
    client = await client_of(MAX_TEST_REQUESTS="60")
    assert (await run_test(client, f"/test/{n}"))[0] == status


async def test_one_run_at_a_time(client: Client) -> None:
    long = asyncio.create_task(run_test(client, "/test/2000/?concurrency=4"))
    while not await stats(client):
        await asyncio.sleep(0)
    status, report = await run_test(client, "/test/1/")
    assert status == 429
    assert report["error"]
    assert (await long)[1]["ok"] == 2000
    assert (await run_test(client, "/test/1/"))[0] == 200


SAME, CROSS = {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "cross-site"}
ALLOWED = [{}, SAME, {"Sec-Fetch-Site": "none"}, {"Host": "me", "Origin": "http://me"}]
FOREIGN = [CROSS, CROSS | {"Origin": "http://me"}, {"Sec-Fetch-Site": "same-site"}]
FOREIGN += [{"Host": "me", "Origin": origin} for origin in ("http://evil", "null")]


@pytest.mark.parametrize("headers", ALLOWED + FOREIGN, ids=str)
async def test_another_sites_page_cannot_start_a_run(
    client: Client, headers: dict[str, str]
) -> None:
    status, _ = await run_test(client, "/test/1/", **headers)
    assert status == (403 if headers in FOREIGN else 200)


async def test_the_host_header_does_not_aim_the_traffic(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as victim:
        victim.setblocking(False)
        host = f"127.0.0.1:{victim.getsockname()[1]}"
        assert (await run_test(client, "/test/20/", Host=host))[1]["ok"] == 20
        with pytest.raises(BlockingIOError):  # nobody has called
            victim.accept()
    assert sum((await stats(client)).values()) == 20


# --- Group commit ---------------------------------------------------------------------------------


async def test_300_concurrent_requests_are_300_hits(client: Client) -> None:
    answers = await asyncio.gather(*(get(client, f"/api/{n % 3}/") for n in range(300)))
    assert {status for status, _ in answers} == {200}
    assert await stats(client) == {f"/api/{n}/": 100 for n in range(3)}


async def test_an_answer_means_that_the_hit_is_in_redis(
    client_of: ClientOf, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a round is so big that it goes in slices, here of 3 URLs."""
    monkeypatch.setattr(server, "PAGE", 3)
    client = await client_of(redis_server.url)

    async def check(url: str) -> None:
        assert (await get(client, url))[0] == 200
        assert redis_server.client.get(f"url_count:{url}") == "1"

    await asyncio.gather(*(check(f"/api/{n}/") for n in range(100)))
    redis_server.check_index()


async def test_hits_wait_for_their_batch_and_share_it_even_if_one_leaves() -> None:
    """The first hit flies at once; the 40 that come meanwhile are one commit of 40."""
    gate, batches = asyncio.Event(), list[dict[str, int]]()

    class Gated(MemoryStore):
        async def commit(self, sequence: int, hits: Mapping[str, int]) -> bool:
            await gate.wait()
            batches.append(dict(hits))
            return await super().commit(sequence, hits)

    async with contextlib.aclosing(GroupCommit(Gated(10), "")) as commits:
        first = commits.hit("/api/a/")
        while commits.held:
            await asyncio.sleep(0)
        rest = [commits.hit("/api/a/") for _ in range(40)]
        rest.pop(3).cancel()
        await asyncio.sleep(0)
        assert commits.pending == 41
        assert not first.done()
        gate.set()
        await asyncio.wait_for(asyncio.gather(first, *rest), 10)
        assert (batches, commits.pending) == ([{"/api/a/": 1}, {"/api/a/": 40}], 0)


async def test_redis_is_back_when_commits_are_quick_however_big_they_are() -> None:
    """5,000 new URLs are in each batch, for 900 more come with each slice of 1,000."""

    class Slices(MemoryStore):
        async def commit(self, sequence: int, hits: Mapping[str, int]) -> bool:
            for n in range(900):
                commits.hit(f"/api/{sequence}/{n}/")
            await asyncio.sleep(0)
            return await super().commit(sequence, hits)

    async with contextlib.aclosing(GroupCommit(Slices(10**6), "away")) as commits:
        for n in range(5000):
            commits.hit(f"/api/{n}/")
        while commits.away and commits.sequence < 500:
            await asyncio.sleep(0)
        assert not commits.away
        commits.store = MemoryStore(10**6)  # so that it ends


async def test_a_sequence_number_counts_once(redis_server: RedisServer) -> None:
    """Also when an old copy of a commit arrives after newer ones."""
    store, other = [await opened(redis_server) for _ in range(2)]
    for sequence in (1, 1, 2, 1, 2):
        await store.commit(sequence, {"/api/a/": 5})
    await other.commit(1, {"/api/a/": 1})
    for each in (store, other):
        await each.aclose()
    assert redis_server.counts() == {"/api/a/": 11}
    redis_server.check_index()
    assert 86_000 < int(redis_server.client.ttl(f"url_commit:{store.instance}")) <= 86_400


@pytest.mark.parametrize("n", [1, 40])
async def test_urls_beyond_max_urls_count_as_other(
    client_of: ClientOf, redis_url: str, n: int
) -> None:
    client = await client_of(redis_url, MAX_URLS="2")
    await hit(client, a=1, b=1, c=1)
    await asyncio.gather(*(get(client, f"/api/new{i}/") for i in range(n)))
    await hit(client, a=1, b=1)
    assert await stats(client) == {"/api/a/": 2, "/api/b/": 2, "(other)": n + 1}


# --- Takeover -------------------------------------------------------------------------------------


async def opened(redis_server: RedisServer) -> RedisStore:
    store = RedisStore(redis_server.url, 10**6)
    await store.open(1)
    return store


def seed_old_counts(server: RedisServer, n: int, name: str = "products") -> dict[str, int]:
    """What the earlier version leaves behind: counts and nothing else."""
    counts = {f"/api/{name}/{i}/": i % 97 + 1 for i in range(n)}
    server.client.mset({f"url_count:{url}": count for url, count in counts.items()})
    return counts


async def test_counts_of_an_earlier_version_are_taken_over(
    client_of: ClientOf, redis_server: RedisServer
) -> None:
    counts = seed_old_counts(redis_server, 2500)
    redis_server.client.set("url_count:/api/bad/", "many")
    redis_server.client.set("other:/api/x/", "7")
    redis_server.client.set("url_count:", "7")  # of no URL
    client = await client_of(redis_server.url)
    assert await stats(client) == counts
    assert redis_server.client.get("url_schema") == "1"
    assert int(redis_server.client.get("url_total") or 0) == sum(counts.values())


async def test_takeover_is_exact_when_it_dies_half_way_and_when_many_do_it_at_once(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = seed_old_counts(redis_server, 5000)
    stores = [RedisStore(redis_server.url, 10**6) for _ in range(3)]
    real, calls = stores[0].commit, 0

    async def dies(sequence: int, hits: Mapping[str, int]) -> bool:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise redis.ConnectionError("died")
        return await real(sequence, hits)

    monkeypatch.setattr(stores[0], "commit", dies)
    with pytest.raises(redis.ConnectionError):
        await stores[0].open(1)
    assert 0 < int(redis_server.client.zcard("url_rank")) < 5000
    live = {"/api/products/1/": 1, "/api/new/": 2}
    await asyncio.gather(stores[1].open(1), stores[2].open(1), real(1, live))
    for store in stores:
        await store.aclose()
    expected = {url: counts.get(url, 0) + live.get(url, 0) for url in counts | live}
    assert redis_server.counts() == expected
    redis_server.check_index()


async def test_a_start_looks_through_the_keys_only_when_the_index_lacks_some(
    redis_server: RedisServer,
) -> None:
    """And an empty Redis is not looked through again by the next one."""
    scans = []
    for url in ("", "", "/api/a/"):
        redis_server.client.config_resetstat()
        store = RedisStore(redis_server.url, 100)
        await store.open(1)
        if url:
            await store.commit(1, {url: 1})
        await store.aclose()
        scans.append("cmdstat_scan" in redis_server.client.info("commandstats"))
    assert scans == [True, False, False]


REPAIRS: dict[str, Callable[[Any], object]] = {
    "the index is lost": lambda _: None,
    "index and total are lost": lambda redis: redis.delete("url_total"),
    "the total is wrong": lambda redis: redis.set("url_total", 7),
    "the total is text": lambda redis: redis.set("url_total", "many"),
    "a count is lost": lambda redis: redis.delete("url_count:/api/b/"),
    "a score is no number": lambda redis: redis.zadd("url_rank", {"/api/a/": "inf"}),
}


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "restart"])
@pytest.mark.parametrize("harm", REPAIRS.values(), ids=REPAIRS)
async def test_del_url_rank_and_a_restart_repair_whatever_hands_did(
    redis_server: RedisServer, harm: Callable[[Any], object], goes_on: bool
) -> None:
    store = await opened(redis_server)
    await store.commit(1, {"/api/a/": 3, "/api/b/": 1})
    harm(redis_server.client)
    redis_server.client.delete("url_rank")
    if goes_on:  # a server that is not stopped at once has built a part of it
        await store.commit(2, {"/api/a/": 1})
    await store.open(1)
    await store.aclose()
    redis_server.check_index()
    assert redis_server.counts()["/api/a/"] == 3 + goes_on


async def test_start_over_takes_every_key_of_ours_and_no_other(redis_server: RedisServer) -> None:
    store = await opened(redis_server)
    await store.commit(1, dict.fromkeys(["/api/a/", "/api/a\nb/", "/api/\0 '\"\\ü/", "\udcff"], 1))
    await store.aclose()
    redis_server.client.set("other:url_count:", "7")
    command = block("docs/operations.md", "sh", "--scan")
    command = command.replace("redis-cli", f"redis-cli -p {redis_server.port}")
    assert await run("bash", "-c", command) == (0, "")
    assert redis_server.client.keys() == ["other:url_count:"]


# --- Processes: start, stop, configuration --------------------------------------------------------


class Server:
    """server.py as a user runs it, after a line of code that tunes it, or other code."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        redis_url: str = "",
        tune: str = "pass",
        code: str = "",
        wait: bool = True,
        **env: str,
    ) -> None:
        port = env.get("PORT", "")
        self.port = int(port) if port.isdecimal() else free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"log{len(os.listdir(folder))}"
        # Without REDIS_URL it would try the machine's own Redis, which is not ours to touch.
        local = f"import server; server.DEFAULT_REDIS_URL = {NO_REDIS!r}"
        code = code or f"{local}; {tune}; server.main()"
        kept = {"PATH": os.environ["PATH"], "PORT": str(self.port), "REDIS_URL": redis_url}
        command = [sys.executable, "-uc", code]
        with self.log.open("wb") as file:
            self.process = launched(stack, command, file, kept | env)
        if wait:
            wait_for(self.serves)

    def says(self, words: str) -> int:
        """How often its log has these words."""
        return self.log.read_text().count(words)

    def serves(self) -> bool:
        return bool(self.says("started")) or self.process.poll() is not None

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if "{" in line]

    def kill(self) -> None:
        end(self.process)

    def ends(self) -> int:
        """Its exit code, when it has ended."""
        return self.process.wait(timeout=15)

    async def stop(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return await asyncio.to_thread(self.ends)


Serve = Callable[..., Server]


@pytest.fixture
def serve(stack: ExitStack, tmp_path: Path) -> Serve:
    return partial(Server, stack, tmp_path)


BAD_VALUES = {
    "PORT=x": "argument --port: PORT is 'x': use a whole number from 0 to 65535",
    "PORT=-1": "PORT is '-1'",
    "PORT=65536": "PORT is '65536'",
    "MAX_URLS=0": "argument --max-urls: MAX_URLS is '0': use a whole number, 1 or more",
    "MAX_TEST_REQUESTS=-1": "MAX_TEST_REQUESTS is '-1': use a whole number, 0 or more",
    "REDIS_URL=http://u:secret@h/": "REDIS_URL is 'http://***@h/': use redis://host:6379/0",
    "REDIS_URL=redis://:secret@127.0.0.1:99999/0": "'redis://***@127.0.0.1:99999/0'",
    "REDIS_URL=:secret@127.0.0.1": "'***@127.0.0.1'",
    "REDIS_URL=redis:secret@127.0.0.1": "'***@127.0.0.1'",
    "REDIS_URL=redis://:secret@127.0.0.1:1/0?x=y": "'redis://***@127.0.0.1:1/0?x=y'",
    "REDIS_URL=redis://127.0.0.1:1/0?retry=5": "'redis://127.0.0.1:1/0?retry=5'",
    "REDIS_URL=rediss://127.0.0.1:1/0?ssl_cert_reqs=foo": "?ssl_cert_reqs=foo'",
    "REDIS_URL=redis://127.0.0.1:no/0?password=secret": "?password=***'",
}
NO_START = {
    "HOST=256.1.1.1": "HOST=256.1.1.1 PORT=",
    "REDIS_URL=redis://:secret@127.0.0.1:1/0": "REDIS_URL=redis://***@127.0.0.1:1/0: Error 111",
    "REDIS_URL=redis://127.0.0.1:1?password=secret": "REDIS_URL=redis://127.0.0.1:1?password=***: ",
}


@pytest.mark.parametrize("setting", BAD_VALUES)
def test_a_bad_value_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["server.py"])
    with pytest.raises(SystemExit, match="2"):
        server.main()
    said = capsys.readouterr().err
    assert re.fullmatch(r"server\.py: error: .*\n", said)
    assert BAD_VALUES[setting] in said
    assert "secret" not in said


@pytest.mark.parametrize("setting", NO_START)
def test_what_cannot_start_says_why_in_one_line(serve: Serve, setting: str) -> None:
    name, _, value = setting.partition("=")
    process = serve(**{name: value})
    assert process.ends() == 1
    (line,) = [line for line in process.log.read_text().splitlines() if "{" not in line]
    assert line.startswith(f"server.py: {NO_START[setting]}")
    assert "secret" not in line


def test_a_taken_port_is_named(serve: Serve) -> None:
    first = serve()
    second = serve(PORT=str(first.port))
    assert second.ends() == 1
    last = second.log.read_text().splitlines()[-1]
    assert last == f"server.py: port {first.port} is in use: set PORT to another"


@pytest.mark.parametrize("given", [True, False], ids=["in REDIS_URL", "local"])
def test_a_redis_that_wants_another_password_ends_the_start_in_one_line_without_it(
    serve: Serve, own_redis: MakeRedis, given: bool
) -> None:
    """Nor is a local one passed over for memory."""
    own = own_redis()
    own.client.config_set("requirepass", "right")
    url = own.url.replace("//", "//:secret@" if given else "//")
    process = serve(url) if given else serve(tune=f"server.DEFAULT_REDIS_URL = {url!r}")
    assert process.ends() == 1
    (line,) = process.log.read_text().splitlines()
    assert line.startswith(f"server.py: REDIS_URL={url.replace(':secret', '***')}: ")
    assert ("password" if given else "Authentication required") in line


async def test_clients_that_leave_a_list_leave_no_trace(
    client_of: ClientOf, redis_server: RedisServer, capfd: pytest.CaptureFixture[str]
) -> None:
    seed_old_counts(redis_server, 5000)
    client = await client_of(redis_server.url)
    capfd.readouterr()
    for _ in range(200):
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"GET /stats/ HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        writer.transport.abort()
    assert len(await stats(client)) == 5000
    assert capfd.readouterr() == ("", "")


async def test_the_start_warns_of_a_redis_that_can_lose_counts(
    serve: Serve, own_redis: MakeRedis
) -> None:
    own = own_redis()
    own.client.execute_command("ACL SETUSER", "bob", "on", ">x", "~*", "+@all", "-config")

    async def warnings(url: str = own.url) -> list[dict[str, Any]]:
        process = serve(url)
        assert await process.stop() == 0
        return [event for event in process.events() if event["level"] != "info"]

    assert await warnings() == []
    assert await warnings(own.url.replace("//", "//bob:x@")) == []  # it may not ask
    own.client.config_set("maxmemory-policy", "allkeys-lru")
    own.client.config_set("appendonly", "no")
    (warning,) = await warnings()
    assert (warning["appendonly"], warning["maxmemory-policy"]) == ("no", "allkeys-lru")
    own.client.execute_command(*warning["mend"].split())  # it says the command that mends it
    assert await warnings() == []


def test_a_flag_wins_over_its_variable_and_an_empty_variable_is_unset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORT", "8080")
    monkeypatch.setenv("MAX_URLS", "5")
    monkeypatch.setenv("HOST", "")
    found = server.read_settings(["--max-urls", "6"])
    assert (found.port, found.max_urls, found.host) == (8080, 6, "127.0.0.1")


async def test_importing_opens_nothing_and_reads_no_environment() -> None:
    env = {"PORT": "nonsense", "REDIS_URL": "nonsense"}
    assert await run(sys.executable, "-W", "error", "-c", "import server", **env) == (0, "")


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_at_once_without_a_traceback(serve: Serve, sig: int) -> None:
    process = serve()
    async with ClientSession(process.base) as session:
        await session.get("/api/a/")
        started = time.monotonic()
        assert await process.stop(sig) == 0
    assert time.monotonic() - started < 1
    assert process.events()[-1]["event"] == "stopped"
    assert not process.says("Traceback")


async def test_stopping_ends_a_test_run_early_and_answers_it(
    serve: Serve, redis_server: RedisServer
) -> None:
    process = serve(redis_server.url)
    async with ClientSession(process.base) as session:
        run = asyncio.create_task(session.post("/test/100000/"))
        await until(lambda: int(redis_server.client.get("url_total") or 0) >= 100)
        assert await process.stop() == 0
        report = await (await run).json()
    assert 100 <= report["ok"] < 100_000
    assert report["failed"] == 0
    assert sum(redis_server.counts().values()) == report["ok"]
    redis_server.check_index()


# --- Under fire -----------------------------------------------------------------------------------
# The promise: an answered request is in Redis exactly once. The check is that of Jepsen's counter:
# for every URL, answered <= count <= answered + cut off without an answer.


class Proxy:
    """Stands between the server and Redis, and spoils commits on demand."""

    def __init__(self, redis_port: int) -> None:
        self.redis_port, self.port = redis_port, 0
        self.swallow = 0  # replies to commits still to be dropped, and their line cut
        self.delay = 0  # commits still to be held back while their line is cut
        self.latency = 0.0  # seconds that each reply takes longer
        self.rate = 10**9  # bytes a second to Redis
        self.late: list[tuple[bytes, asyncio.StreamWriter]] = []
        self.writers: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Proxy":
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for writer in self.writers:
            writer.close()
        if self.tasks:
            await asyncio.wait(self.tasks)

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        try:
            from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self.redis_port)
        except OSError:
            return writer.close()
        self.writers |= {writer, to_redis}
        dropping = asyncio.Event()
        back = asyncio.create_task(self.pass_back(from_redis, writer, dropping))
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                commit = b"EVALSHA" in data or b"INCR" in data
                if commit and self.delay:
                    self.delay -= 1
                    self.late.append((data, to_redis))
                    return writer.close()
                if commit and self.swallow:
                    self.swallow -= 1
                    dropping.set()
                await asyncio.sleep(len(data) / self.rate)
                to_redis.write(data)
        back.cancel()
        writer.close()
        return to_redis.close()

    async def pass_back(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dropping: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                await asyncio.sleep(self.latency)
                if dropping.is_set():
                    break
                writer.write(data)
        writer.close()

    def deliver_late(self) -> None:
        """Hand the commits that were held back to Redis, long after their copies."""
        for data, to_redis in self.late:
            to_redis.write(data)
        self.late.clear()


class Load:
    """Clients that never retry, and note what became of every request."""

    def __init__(self, port: int, urls: int = 50) -> None:
        self.port, self.urls = port, urls
        self.answered: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()  # by status line
        self.slowest = 0.0
        self.stopping = False

    async def __aenter__(self) -> Self:
        self.clients = [asyncio.create_task(self.client(n)) for n in range(16)]
        await self.more(200)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping = True
        await asyncio.gather(*self.clients)

    async def more(self, n: int) -> None:
        """Return when n more requests have been answered."""
        goal = self.answered.total() + n
        await until(lambda: self.answered.total() >= goal)

    async def client(self, number: int) -> None:
        while not self.stopping:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return  # the server has stopped
            while not self.stopping and await self.request(reader, writer, number):
                number += 1
            writer.close()

    async def request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> bool:
        """Whether the connection goes on."""
        target = self.target(number)
        started = time.monotonic()
        try:
            writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"Content-Length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
        except (OSError, asyncio.IncompleteReadError):
            self.unknown[target] += 1
            return False
        self.slowest = max(self.slowest, time.monotonic() - started)
        status = head.partition("\r\n")[0]
        if status == "HTTP/1.1 200 OK":
            self.answered[self.url(target, body)] += 1
        else:
            self.failed[status] += 1
        return "Connection: close" not in head

    def target(self, number: int) -> str:
        return f"/api/{number % self.urls}/"

    def url(self, target: str, body: bytes) -> str:
        """What it counts as."""
        return target

    def lost_and_double(self, counts: Mapping[str, int]) -> tuple[int, int]:
        """Hits that were answered and are not there; hits that nobody sent."""
        urls = self.answered | self.unknown | Counter(counts)
        lost = sum(max(0, self.answered[url] - counts.get(url, 0)) for url in urls)
        most = self.answered + self.unknown
        return lost, sum(max(0, counts.get(url, 0) - most[url]) for url in urls)


async def settled(process: Server, *statuses: int) -> dict[str, Any]:
    """/health of a server that runs and holds no hits any more, or that has such a status."""
    async with ClientSession(process.base) as session, asyncio.timeout(30):
        while True:
            with contextlib.suppress(ClientError):
                async with session.get("/health") as response:
                    report: dict[str, Any] = await response.json()
                idle = response.status == 200 and report["pending"] == 0
                if idle or response.status in statuses:
                    return report
            await asyncio.sleep(0.05)


@dataclass
class Rig:
    """A real server process under load, its own Redis, and the proxy between them."""

    redis: RedisServer
    proxy: Proxy
    server: Server
    load: Load

    async def logs(self, words: str, times: int = 1) -> None:
        await until(lambda: self.server.says(words) >= times)

    async def refuses(self, words: str) -> None:
        """Redis says why, the server says it in its log, and goes on."""
        await self.logs(words)
        await self.load.more(500)

    def check(self) -> None:
        """Nothing is lost, nothing counts twice, no request failed; `pytest -rP` shows the row."""
        lost, double = self.load.lost_and_double(self.redis.counts())
        failed, slowest = self.load.failed.total(), self.load.slowest
        test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2]
        answered = self.load.answered.total()
        print(f"| {test} | {answered} | {lost} | {double} | {failed} | {slowest:.2f} s |")
        assert (lost, double, failed) == (0, 0, 0)
        self.redis.check_index()


RigOf = Callable[..., Awaitable[Rig]]
Fault = Callable[[Rig], Awaitable[None]]


@pytest.fixture
async def rig_of(own_redis: MakeRedis, serve: Serve) -> AsyncIterator[RigOf]:
    async with contextlib.AsyncExitStack() as proxies:

        async def start(user: str = "", **options: str) -> Rig:
            redis_server = own_redis()
            proxy = await proxies.enter_async_context(Proxy(redis_server.port))
            process = serve(f"redis://{user}127.0.0.1:{proxy.port}/0", wait=False, **options)
            await until(process.serves)
            return Rig(redis_server, proxy, process, Load(process.port))

        yield start


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


async def scripts_flushed_and_clients_killed(rig: Rig) -> None:
    for command in ["SCRIPT FLUSH", "CLIENT KILL TYPE normal"] * 10:
        rig.redis.client.execute_command(*command.split())
        await rig.load.more(50)


async def out_of_memory(rig: Rig) -> None:
    rig.redis.client.config_set("maxmemory", 1)
    await rig.refuses("command not allowed when used memory")
    rig.redis.client.config_set("maxmemory", 0)


async def read_only(rig: Rig) -> None:
    rig.redis.client.replicaof("127.0.0.1", "1")
    await rig.refuses("read only replica")
    rig.redis.client.replicaof("NO", "ONE")


async def index_spoiled(rig: Rig) -> None:
    rig.redis.client.delete("url_rank")
    rig.redis.client.set("url_rank", "not a sorted set")
    await rig.refuses("WRONGTYPE")
    rig.redis.client.delete("url_rank")


async def rights_lost(rig: Rig) -> None:
    for n, right in enumerate(NEEDED[:-1], rig.server.says("redis is back") + 1):
        limit(rig.redis.client, f"-{right}")
        await rig.logs("redis is away", n)
        await rig.load.more(300)
        limit(rig.redis.client)
        await rig.logs("redis is back", n)


async def clients_hang_up(rig: Rig) -> None:
    for n in range(300):
        _, writer = await asyncio.open_connection("127.0.0.1", rig.load.port)
        url = f"/api/{n % rig.load.urls}/"
        writer.write(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        rig.load.unknown[url] += 1
        writer.transport.abort()


TWICE = [replies_swallowed, old_copies_arrive_late]  # where a naive server counts twice
AWAY = [redis_killed, redis_stopped, redis_loading, scripts_flushed_and_clients_killed]
REFUSED = [out_of_memory, read_only, index_spoiled, rights_lost]
FAULTS = [*TWICE, *AWAY, *REFUSED, clients_hang_up]


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
    assert rig.load.slowest < 1.5
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


@pytest.mark.parametrize("fault", TWICE)
async def test_control_the_naive_server_miscounts(rig_of: RigOf, fault: Fault) -> None:
    rig = await rig_of(code=NAIVE)
    async with rig.load:
        await fault(rig)
        await rig.load.more(200)
    with pytest.raises(AssertionError):
        rig.check()
    assert rig.load.lost_and_double(rig.redis.counts())[1] > 0


async def test_when_a_replica_takes_over_the_server_follows_its_address(
    rig_of: RigOf, own_redis: MakeRedis
) -> None:
    """What Sentinel or a managed Redis does: the old primary lives on, read-only."""
    rig, heir = await rig_of(), own_redis()
    heir.client.replicaof("127.0.0.1", rig.redis.port)
    await until(lambda: heir.client.role()[3] == "connected")
    async with rig.load:
        rig.redis.client.execute_command("FAILOVER", "TO", "127.0.0.1", heir.port)
        rig.proxy.redis_port = heir.port
        await until(lambda: heir.client.role()[0] == "master")
        await rig.load.more(2000)
    await settled(rig.server)
    rig.redis = heir
    rig.check()


async def test_flushall_under_load_and_counts_go_on_from_there(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        rig.redis.client.flushall()
        await rig.load.more(200)
    assert rig.load.failed.total() == 0
    before = (await settled(rig.server))["hits"]
    assert 200 <= before < rig.load.answered.total()
    rig.redis.check_index()
    async with Load(rig.server.port) as load:
        pass
    assert (await settled(rig.server))["hits"] == before + load.answered.total()


async def test_a_key_that_holds_no_number_spoils_only_its_own_url(rig_of: RigOf) -> None:
    rig = await rig_of()
    rig.redis.client.set("url_count:/api/7/", "many")
    async with rig.load:
        await rig.load.more(1000)
    await settled(rig.server)
    rig.redis.client.delete("url_count:/api/7/")
    assert rig.load.answered.pop("/api/7/") > 10
    rig.check()
    errors = [event for event in rig.server.events() if event["level"] == "error"]
    assert [event["key"] for event in errors] == ["url_count:/api/7/"]


async def test_sigterm_under_load_commits_every_answered_hit(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        started = time.monotonic()
        assert await rig.server.stop() == 0
        assert time.monotonic() - started < 6
    rig.check()


def uncommitted(process: Server) -> tuple[Counter[str], Counter[str]]:
    """The hits in the log that were held, and those that were sent."""
    held, sent = Counter[str](), Counter[str]()
    for line in process.events():
        if line.get("event") == "hits not committed":
            urls = line.get("held") or line["sent"]
            assert (line["level"], line["hits"]) == ("error", sum(urls.values()))
            assert len(urls) <= server.PAGE
            (sent if "sent" in line else held).update(urls)
    return held, sent


@pytest.mark.parametrize("sent_is_there", [False, True])
async def test_sigterm_with_redis_away_logs_what_the_documented_script_adds(
    rig_of: RigOf, serve: Serve, sent_is_there: bool
) -> None:
    rig = await rig_of(tune="server.PAGE = 20")
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
        assert time.monotonic() - started < 8
    held, sent = uncommitted(rig.server)
    assert rig.server.says("hits not committed") > 3
    assert sent
    if not sent_is_there:
        await asyncio.to_thread(rig.redis.start)
    script = block("docs/operations.md", "python", "hits not committed")
    expected, log = (held if sent_is_there else held + sent).total(), rig.server.log
    again = log.with_name("docker compose logs")
    again.write_text(re.sub("^", "server-1  | ", log.read_text(), flags=re.MULTILINE))
    for file, n in (log, expected), (again, 0):  # to run it twice does no harm
        said = await run(sys.executable, "-c", script, str(file), REDIS_URL=rig.redis.url)
        assert said == (0, f"{n} hits added\n")
    serve(rig.redis.url)
    rig.check()


async def test_a_closed_terminal_and_many_ctrl_c_lose_no_held_hit(rig_of: RigOf) -> None:
    """A second signal does not cut the last commits short."""
    rig = await rig_of()
    rig.redis.kill()
    async with ClientSession(rig.server.base) as session:
        await session.get("/api/a/")
    for n in range(50):
        rig.server.process.send_signal(signal.SIGINT if n else signal.SIGHUP)
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(rig.server.ends) == 0
    held, sent = uncommitted(rig.server)
    assert held + sent == {"/api/a/": 1}
    assert rig.server.events()[-1]["event"] == "stopped"


async def test_kill_9_of_the_server_loses_nothing_that_was_answered(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        await rig.load.more(1000)
        rig.server.kill()
    rig.check()


@pytest.mark.soak
async def test_soak(rig_of: RigOf) -> None:
    """Ten minutes of random faults: `make soak`, SOAK_SEED repeats one."""
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    seed = int(os.environ.get("SOAK_SEED", time.time_ns() % 10**6))
    print(f"SOAK_SEED={seed}")
    rng, rig = random.Random(seed), await rig_of(user="bob:x@")
    end = time.monotonic() + seconds
    async with rig.load:
        while time.monotonic() < end:
            fault = rng.choice(FAULTS)
            await fault(rig)
            await rig.load.more(rng.randint(1, 5000))
            print(fault.__name__, f"answered={rig.load.answered.total()}", flush=True)
    await settled(rig.server)
    rig.check()
    assert rig.load.slowest < 1.5


# --- Bounds ---------------------------------------------------------------------------------------


async def test_a_full_backlog_refuses_new_urls_only_and_comes_back_in_slices(
    client_of: ClientOf, own_redis: MakeRedis
) -> None:
    """And no slice holds Redis up for more than 50 ms."""
    own = own_redis()
    client = await client_of(own.url)
    commits = commits_of(client)
    await hit(client, a=1)
    own.kill()
    await get(client, "/api/a/")  # the first one waits, and finds out
    assert commits.away
    for n in range(server.MAX_BACKLOG - 1):
        await commits.hit(f"/api/products/{n}/")
    async with client.get("/api/one-too-many/") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert "too many URLs" in (await response.json())["error"]
    assert (await get(client, "/api/products/7/"))[0] == 200
    assert (await get(client, "/api/a/"))[0] == 200
    own.start("--slowlog-log-slower-than 0 --slowlog-max-len 10000")
    await until(lambda: not commits.pending)
    assert (await get(client, "/health"))[0] == 200
    slow = max(entry["duration"] for entry in own.client.slowlog_get(10_000)) / 1000
    print(f"slowest command while {server.MAX_BACKLOG} URLs came back: {slow:.1f} ms")
    assert slow < 50
    own.check_index()
    assert sum(own.counts().values()) == server.MAX_BACKLOG + 3


async def test_the_backlog_is_bounded_in_bytes_too(rig_of: RigOf) -> None:
    rig, statuses = await rig_of(tune="server.MAX_BACKLOG_BYTES = 2 * 10**5"), Counter[int]()
    rig.redis.kill()
    snakes = "🐍" * 500  # 2 kB in memory
    async with ClientSession(rig.server.base) as session:
        for n in range(100, 300):
            async with session.get(URL(f"/api/{n}{snakes}/")) as response:
                statuses[response.status] += 1
    assert abs(statuses[200] - 2 * 10**5 // sys.getsizeof(f"/api/100{snakes}/")) <= 2
    assert statuses[503] == 200 - statuses[200]
    assert await rig.server.stop() == 0
    held, sent = uncommitted(rig.server)
    assert (held + sent).total() == statuses[200]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
async def test_a_long_outage_does_not_grow_memory_beyond_the_backlog(rig_of: RigOf) -> None:
    rig = await rig_of(tune="server.MAX_BACKLOG = 1000")
    rig.load.urls = 3000

    def resident_kib() -> int:
        status = Path(f"/proc/{rig.server.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    async with rig.load:
        rig.redis.kill()
        await until(lambda: rig.load.failed.total() > 1000)  # full, and refusing
        before = resident_kib()
        await rig.load.more(5000)
        grown = resident_kib() - before
    assert set(rig.load.failed) == {"HTTP/1.1 503 Service Unavailable"}
    assert grown < 2048, f"{grown} KiB"


# --- What Redis may not do ------------------------------------------------------------------------
# No way through the script in which a hit neither counts nor is reported.

NEEDED = ["get", "set", "incrby", "exists", "zcard", "zscore", "zadd", "evalsha", "script"]


def limit(client: Any, *rights: str) -> None:
    client.execute_command("ACL", "SETUSER", "bob", "reset", "on", ">x", "~*", "+@all", *rights)


@pytest.mark.parametrize("right", [*NEEDED, "del", "flushall", "config", "keys"])
async def test_a_missing_right_ends_the_start_or_costs_no_hit(
    client_of: ClientOf, redis_server: RedisServer, right: str
) -> None:
    limit(redis_server.client, f"-{right}")
    url = redis_server.url.replace("//", "//bob:x@")
    if right in NEEDED:
        refusal = r"server.py: REDIS_URL=redis://\*\*\*@.*(permission|can't run)"
        runner = web.AppRunner(await app_of(url))
        with pytest.raises(SystemExit, match=refusal):
            await runner.setup()
        return
    client = await client_of(url)
    await hit(client, a=20, b=30)
    assert redis_server.counts() == {"/api/a/": 20, "/api/b/": 30}
    redis_server.check_index()


@pytest.mark.parametrize("path", ["/health", "/stats/", "/stats/api/a/"])
async def test_an_index_that_holds_no_number_is_a_503(
    client_of: ClientOf, redis_server: RedisServer, path: str
) -> None:
    client = await client_of(redis_server.url)
    await hit(client, a=1)
    redis_server.client.zadd("url_rank", {"/api/a/": "inf"})
    redis_server.client.set("url_total", "many" if path == "/health" else 1)
    status, answer = await get(client, path)
    assert (status, bool(answer["error"])) == (503, True)


# --- Slow, not away -------------------------------------------------------------------------------


@pytest.mark.parametrize(("latency", "patience", "outages"), [(0.7, 1.0, 0), (0.6, 0.4, 1)])
async def test_a_slow_redis_does_not_flap(
    rig_of: RigOf, latency: float, patience: float, outages: int
) -> None:
    """One that takes longer than a request may wait is away until it is quick again."""
    rig = await rig_of(tune=f"server.PATIENCE = {patience}")

    def commits() -> int:
        return int(rig.redis.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    async with rig.load:
        before, rig.proxy.latency = commits(), latency
        await until(lambda: commits() >= before + (6 if outages else 4))
        rig.proxy.latency = 0
        await rig.load.more(200)
    await settled(rig.server)
    rig.check()
    assert rig.server.says("redis is away") == outages


async def test_long_urls_come_through_a_slow_link(rig_of: RigOf) -> None:
    """A page of them at once would never fit in the second that an attempt may take here."""
    rig = await rig_of(tune="server.MAX_PATIENCE = 1")
    rig.redis.kill()
    async with ClientSession(rig.server.base) as session:
        paths = [f"/api/{n:04}{'x' * 2000}/" for n in range(1000)]
        for start in range(0, len(paths), 100):
            await asyncio.gather(*(session.get(path) for path in paths[start : start + 100]))
    rig.proxy.rate = 1_000_000
    await asyncio.to_thread(rig.redis.start)
    await asyncio.wait_for(settled(rig.server), 30)
    assert rig.redis.counts() == dict.fromkeys(paths, 1)


async def test_a_start_waits_for_a_busy_redis(serve: Serve, redis_server: RedisServer) -> None:
    counts = seed_old_counts(redis_server, 100)
    busy = asyncio.to_thread(redis_server.client.execute_command, "DEBUG", "SLEEP", 2)
    task = asyncio.create_task(busy)
    process = serve(redis_server.url, wait=False)
    await until(process.serves)
    assert (await settled(process))["hits"] == sum(counts.values())
    await task


async def test_a_redis_that_hangs_is_called_that(rig_of: RigOf, serve: Serve) -> None:
    rig = await rig_of()
    rig.redis.process.send_signal(signal.SIGSTOP)
    async with ClientSession(rig.server.base) as session:
        await session.get("/api/a/")
        async with session.get("/health") as response:
            assert (await response.json())["error"] == "no answer in time"
    hasty = serve(rig.redis.url, tune="server.MAX_PATIENCE = 1")
    assert hasty.ends() == 1
    assert hasty.says("no answer in time")


# --- Crowds ---------------------------------------------------------------------------------------


async def test_100_readers_of_whole_lists_starve_nobody(rig_of: RigOf) -> None:
    """Not each other, not /health, not the commits; also when Redis forgets the script."""
    rig, statuses = await rig_of(), Counter[int]()
    seed_old_counts(rig.redis, 20_000)
    rig.redis.client.delete("url_rank", "url_total")
    rig.redis.client.script_flush()  # so the server opens the store again, and indexes
    waits: list[float] = []

    async def read(path: str) -> None:
        async with session.get(path) as response:
            statuses[response.status] += 1
            await response.read()

    async def read_on() -> None:
        while time.monotonic() < end:
            await read("/stats/")

    async with ClientSession(rig.server.base, connector=TCPConnector(limit=0)) as session:
        await read("/api/0/")
        await rig.logs("indexing")
        end = time.monotonic() + 2
        readers = [asyncio.create_task(read_on()) for _ in range(100)]
        rig.redis.client.script_flush()
        while time.monotonic() < end:
            started = time.monotonic()
            await read("/api/0/")
            async with session.get("/health") as response:  # 503 while the script is loaded again
                assert response.status in (200, 503)
            waits.append(time.monotonic() - started)
            await asyncio.sleep(0.05)
        await asyncio.gather(*readers)
    await settled(rig.server)
    print(f"/health and a hit beside {statuses.total()} lists: {max(waits):.2f} s at most")
    assert set(statuses) == {200}
    assert max(waits) < 1
    assert rig.server.events()[-1]["event"] in ("redis is back", "indexing counts")


async def test_a_body_that_nobody_reads_is_not_inflated(victim: Server) -> None:
    """Ten that would inflate to 5 GB cost less than a second of the server's time."""
    bomb, headers = gzip.compress(bytes(500_000_000), 1), {"Content-Encoding": "gzip"}

    def processor_time() -> float:
        fields = Path(f"/proc/{victim.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = processor_time()
    async with ClientSession(victim.base) as session:
        for _ in range(10):
            body = io.BytesIO(bomb)
            async with session.post("/api/a/", data=body, headers=headers) as response:
                assert response.status == 200
    assert processor_time() - before < 1


# --- Signals --------------------------------------------------------------------------------------


async def test_a_signal_while_counts_are_taken_over_ends_the_start(
    serve: Serve, redis_server: RedisServer
) -> None:
    seed_old_counts(redis_server, 30_000)
    for n in range(0, 8, 2):
        redis_server.client.delete("url_rank")
        process = serve(redis_server.url, wait=False)
        while redis_server.client.zcard("url_rank") <= 1000 * n:
            await asyncio.sleep(0.001)
        started = time.monotonic()
        assert await process.stop() == 0
        assert time.monotonic() - started < 2
        assert not process.says("Traceback")


def test_a_containers_first_process_heeds_a_signal_before_it_serves(stack: ExitStack) -> None:
    """There SIGTERM has no default action, so it must be handled before the slow imports."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
        missing("the right to unshare")
    code = "import sys; sys.argv = ['server.py']; exec(open('server.py').read())"
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", code]
    process = launched(stack, command, env={"PORT": "0", "REDIS_URL": NO_REDIS})
    wait_for(lambda: children(process))
    (first,) = children(process)
    status = Path(f"/proc/{first}/status")
    caught = 1 << (signal.SIGTERM - 1)
    wait_for(lambda: int(re.findall(r"SigCgt:\s+(\w+)", status.read_text())[0], 16) & caught)
    os.kill(first, signal.SIGTERM)
    assert process.wait(timeout=2) == 0


def children(process: "subprocess.Popen[bytes]") -> set[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return set(map(int, listed.split()))


def test_an_old_python_is_told_so() -> None:
    code = "import sys, runpy; sys.version_info = (3, 10); runpy.run_path('server.py')"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "server.py: Python 3.11 or newer is needed\n")


# --- Under a process manager ----------------------------------------------------------------------


def gunicorn(workers: int) -> str:
    return f"""
import os, server, sys; from gunicorn.app.wsgiapp import run
server.DEFAULT_REDIS_URL = {NO_REDIS!r}
sys.argv = ['gunicorn', '-w{workers}', '-kaiohttp.GunicornUVLoopWebWorker', '--no-control-socket',
    '-b127.0.0.1:' + os.environ['PORT'], 'server:create_app']
print('started'); run()
"""


async def test_a_worker_told_to_stop_while_redis_is_away_says_what_it_held(rig_of: RigOf) -> None:
    """Also if a client does not read its list: aiohttp's own worker would wait 57 s for it."""
    rig = await rig_of(code=gunicorn(1))
    seed_old_counts(rig.redis, 5000, "x" * 1500)  # more than the sockets take
    rig.redis.client.delete("url_total")
    rig.redis.client.script_flush()
    await settled(rig.server, 503)
    async with rig.load:
        await until(lambda: rig.redis.client.zcard("url_rank") >= 5000)
    await settled(rig.server)
    _, writer = await asyncio.open_connection("127.0.0.1", rig.server.port, limit=1000)
    writer.write(b"GET /stats/ HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(0.3)
    rig.redis.kill()
    async with ClientSession(rig.server.base) as session:
        for n in range(300):
            await session.get(f"/api/{n}/")
    started = time.monotonic()
    assert await rig.server.stop() == 0
    assert time.monotonic() - started < 9
    writer.close()
    held, sent = uncommitted(rig.server)
    assert (held + sent).total() == 300


async def test_a_worker_replaced_while_redis_is_away_waits_for_it(rig_of: RigOf) -> None:
    rig = await rig_of(code=gunicorn(2))
    await rig.logs("counting in redis", 2)
    rig.redis.kill()
    before = children(rig.server.process)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: len(children(rig.server.process) - before) == 2)
    await settled(rig.server, 503)
    async with rig.load:
        await rig.load.more(500)
        await asyncio.to_thread(rig.redis.start)
        await rig.load.more(500)
    await until(lambda: rig.server.says("counting in redis") + rig.server.says("is back") == 4)
    await until(lambda: sum(rig.redis.counts().values()) >= rig.load.answered.total())
    assert await rig.server.stop() == 0
    rig.check()
    assert not rig.server.says("failed to boot")


async def test_under_a_process_manager_no_process_counts_in_its_own_memory(serve: Serve) -> None:
    process = serve(code=gunicorn(1))
    await settled(process, 503)
    async with ClientSession(process.base) as session:
        assert (await session.get("/api/a/")).status == 200
        report = await (await session.get("/health")).json()
    assert (report["redis"], report["pending"]) == ("disconnected", 1)
    assert process.says(f'"error": "REDIS_URL={NO_REDIS}: Error 111')
    assert not process.says("counts are lost")


# --- Redis at other addresses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["?decode_responses=true", "?protocol=3", "?socket_timeout=9&retry_on_timeout=true"]
)
async def test_options_in_redis_url_break_nothing(
    client_of: ClientOf, redis_server: RedisServer, options: str
) -> None:
    client = await client_of(redis_server.url + options)
    await hit(client, a=2, b=1)
    assert await stats(client) == {"/api/a/": 2, "/api/b/": 1}
    assert (await get(client, "/stats/api/a/"))[0] == 200


@pytest.mark.parametrize("options", ["", "?protocol=3"])
async def test_readers_never_get_a_connection_that_redis_has_closed(
    client_of: ClientOf, redis_server: RedisServer, options: str
) -> None:
    """Which redis-py's pool hands out with RESP3."""
    client = await client_of(redis_server.url + options)
    await hit(client, a=1)
    for _ in range(20):
        await asyncio.gather(*(get(client, "/health") for _ in range(8)))
        redis_server.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        answers = await asyncio.gather(*(get(client, "/stats/api/a/") for _ in range(8)))
        assert [status for status, _ in answers] == [200] * 8


async def test_a_test_run_by_a_unix_socket_is_refused(tmp_path: Path, no_local_redis: None) -> None:
    runner, path = web.AppRunner(await app_of()), str(tmp_path / "sock")
    await runner.setup()
    await web.UnixSite(runner, path).start()
    async with ClientSession("http://x", connector=UnixConnector(path)) as session:
        async with session.post("/test/5/") as response:
            assert response.status == 400
            assert "TCP port" in (await response.json())["error"]
        assert (await session.get("/api/a/")).status == 200
    await runner.cleanup()


# --- Bad input ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ExitStack() as stack:
        process = Server(stack, tmp_path_factory.mktemp("victim"))
        yield process
        process.process.terminate()
        assert process.ends() == 0
        assert len(process.log.read_text().splitlines()) < 10  # not a line for a bad request


def talk(process: Server, data: bytes, patience: float = 5) -> bytes:
    """All that the server says to these bytes until it closes, or says nothing for a while."""
    said = b""
    address = ("127.0.0.1", process.port)
    with socket.create_connection(address, patience) as sock, contextlib.suppress(OSError):
        sock.sendall(data)
        while chunk := sock.recv(1 << 16):
            said += chunk
    return said


def hits(process: Server) -> int:
    body = talk(process, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return int(json.loads(body.partition(b"\r\n\r\n")[2])["hits"])


FUZZ = hypothesis.settings(
    derandomize=True,
    max_examples=1500,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
WORDS = (
    """api stats test health / // .. %00 %0A %ff %F0%9F%90%8D ?limit= ?offset= & = -1 1 % ; {}
    99999999999999999999 """
    + "a" * 2000
)
ASCII = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#")
MIXED = st.lists(st.sampled_from(WORDS.split()), max_size=8).map("".join)
TARGETS = st.text(ASCII, max_size=60) | MIXED
METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])


@FUZZ
@hypothesis.given(method=METHODS, target=TARGETS)
def test_no_request_breaks_the_server_or_its_counts(
    victim: Server, method: str, target: str
) -> None:
    before = hits(victim)
    request = (
        f"{method} /{target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    said = talk(victim, request.encode())
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


@hypothesis.settings(FUZZ, max_examples=1000)
@hypothesis.given(edits=EDITS, copies=st.integers(1, 3))
def test_no_bytes_break_the_server_or_its_counts(
    victim: Server, edits: list[tuple[int, int, bytes]], copies: int
) -> None:
    data = REQUEST
    for start, length, inserted in edits:
        data = data[:start] + inserted + data[start + length :]
    before = hits(victim)
    said = talk(victim, data * copies, patience=0.02)
    assert b"HTTP/1.1 5" not in said
    assert b"Traceback" not in said
    answered = said.count(b'{"url": ')
    assert answered <= hits(victim) - before <= answered + 1  # one may have been cut off


async def test_slow_and_idle_clients_hold_nobody_up(victim: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        crowd = [await asyncio.open_connection("127.0.0.1", victim.port) for _ in range(1000)]
        for _ in range(3):  # a request, a byte at a time, that will never be whole
            for _, writer in crowd[::10]:
                writer.write(b"G")
            async with Load(victim.port) as load:
                pass
            assert load.slowest < 0.5
            assert not load.failed.total()
        for _, writer in crowd:
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- Metrics and logs -----------------------------------------------------------------------------

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(client: Client | ClientSession) -> Samples:
    """Every sample of /metrics, read by the library's own parser."""
    async with client.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(await response.text())
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


async def test_metrics_tell_what_was_answered(client: Client) -> None:
    before = await scrape(client)
    await hit(client, a=2, b=1)
    await get(client, "/nothing")
    await get(client, "/stats/?limit=x")
    await get(client, "/api/c/", "PURGE")
    after = await scrape(client)

    def rise(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0)

    name, api = "http_request_duration_seconds", {"route": "/api/...", "code": "200"}
    assert rise(f"{name}_count", method="GET", **api) == 3
    assert rise(f"{name}_count", method="OTHER", **api) == 1
    assert rise(f"{name}_count", method="GET", route="none", code="404") == 1
    assert rise(f"{name}_count", method="GET", route="/stats/", code="400") == 1
    assert rise(f"{name}_bucket", method="GET", le="+Inf", **api) == 3
    assert 0 < rise(f"{name}_sum", method="GET", **api) < 3
    assert rise("url_hits_total") == 4
    assert rise("url_commit_seconds_count") >= 1
    assert (after["redis_up", frozenset()], after["url_hits_pending", frozenset()]) == (1, 0)
    assert after["process_open_fds", frozenset()] > 0
    assert not [labels for _, labels in after if "/api/a/" in str(labels)]  # never one per URL


async def test_metrics_say_when_redis_is_away_even_if_nobody_asks(
    client_of: ClientOf, own_redis: MakeRedis
) -> None:
    own = own_redis()
    client = await client_of(own.url)
    own.kill()

    async def shows(name: str, value: int) -> None:
        async with asyncio.timeout(10):
            while (await scrape(client))[name, frozenset()] != value:
                await asyncio.sleep(0.05)

    await shows("redis_up", 0)  # on an idle server
    await hit(client, a=3)
    await shows("url_hits_pending", 3)
    own.start()
    await shows("redis_up", 1)


async def test_no_accept_header_breaks_metrics(client: Client) -> None:
    for accept in ("text/plain; version=x", "application/openmetrics-text; version=abc", "?"):
        async with client.get("/metrics", headers={"Accept": accept}) as response:
            assert response.status == 200


async def test_promtool_finds_nothing_to_mend(client: Client) -> None:
    if not shutil.which("promtool"):
        missing("promtool (apt: prometheus)")
    await hit(client, a=1)
    async with client.get("/metrics") as response:
        text = await response.text()
    check = "promtool check metrics 2>&1"
    assert await run("bash", "-c", check, given=text) == (0, "")


async def test_logs_are_one_event_a_line_and_none_a_request(rig_of: RigOf) -> None:
    rig = await rig_of()
    async with rig.load:
        rig.redis.kill()
        await rig.logs("redis is away")
        await rig.load.more(500)
        await asyncio.to_thread(rig.redis.start)
        await rig.logs("redis is back")
    async with ClientSession(rig.server.base) as session:
        await session.post("/test/5/")
    assert await rig.server.stop() == 0
    events = [json.loads(line) for line in rig.server.log.read_text().splitlines()]
    assert [f"{event['level']}: {event['event']}" for event in events] == [
        "info: counting in redis",
        "info: started",
        "error: redis is away, hits are held",
        "info: redis is back",
        "info: stopped",
    ]
    _, started, away, back, _ = events
    assert started["page"] == rig.server.base
    assert away["error"]
    assert back["hits"] >= 500
    assert back["seconds"] > 0


def test_logs_on_a_terminal_are_for_people(stack: ExitStack) -> None:
    terminal, end = pty.openpty()
    code = f"import server; server.DEFAULT_REDIS_URL = {NO_REDIS!r}; server.main()"
    process = launched(stack, [sys.executable, "-c", code], end, {"PORT": "0"})
    os.close(end)
    said = b""
    while b"started" not in said:
        said += os.read(terminal, 1000)
    process.terminate()
    assert process.wait(timeout=10) == 0
    os.close(terminal)
    line = re.sub(r"\x1b\[\d*m", "", said.decode())
    assert re.search(r"\[info +\] started +page=http://127\.0\.0\.1:\d+", line)


async def test_a_log_that_cannot_be_written_costs_no_hit(
    own_redis: MakeRedis, serve: Serve
) -> None:
    """As on a full disk: the reader of the pipe has gone."""
    own, gone = own_redis(), "import os; end, pipe = os.pipe(); os.close(end); os.dup2(pipe, 2)"
    process = serve(own.url, wait=False, tune=gone)
    await settled(process)
    own.kill()
    async with ClientSession(process.base) as session:
        await session.get("/api/a/")
        await asyncio.to_thread(own.start)
        await settled(process)
        await session.get("/api/a/")
    assert own.counts() == {"/api/a/": 2}
    assert process.log.read_text() == ""
    assert await process.stop() in (0, 120)  # Python's for a lost stderr


# --- The live page, in a real browser -------------------------------------------------------------
# Chromium starts once, in the event loop of the session; each test has a page of its own in it.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --disable-background-networking
    --disable-component-update --disable-sync --no-first-run"""
in_chromium = pytest.mark.asyncio(loop_scope="session")


class Browser:
    """A page in chromium, and all that went wrong in it."""

    def __init__(self, page: playwright.Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self.on_console)
        page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.hosts.add(URL(request.url).authority))

    def on_console(self, message: playwright.ConsoleMessage) -> None:
        # Chromium's own line for a failed fetch: that Redis or the server is away is no mistake.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    async def shows(self, selector: str, pattern: str) -> None:
        """Wait until an element's text matches."""
        element = playwright.expect(self.page.locator(selector))
        await element.to_have_text(re.compile(pattern), timeout=10_000)

    async def titled(self, pattern: str) -> None:
        title = re.compile(pattern)
        await playwright.expect(self.page).to_have_title(title, timeout=10_000)

    async def enter(self, selector: str, text: str) -> None:
        await self.page.fill(selector, text)
        await self.page.press(selector, "Enter")


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
    context = await chromium.new_context(viewport={"width": 1280, "height": 900})
    browser = Browser(await context.new_page())
    yield browser
    await context.close()
    assert browser.errors == []


async def send(process: Server, **counts: int) -> None:
    """Request /api/<name>/ so many times."""
    async with ClientSession(process.base) as session:
        for name, n in counts.items():
            for _ in range(n):
                async with session.get(URL(f"/api/{name}/", encoded=True)) as response:
                    assert response.status == 200


@in_chromium
async def test_the_page_shows_counts_runs_tests_and_survives_an_outage(
    browser: Browser, own_redis: MakeRedis, serve: Serve
) -> None:
    hostile, own = "/api/<img src=x onerror=alert(1)>/", own_redis()
    process = serve(own.url)
    await send(process, **{"%3Cimg%20src=x%20onerror=alert(1)%3E": 3, "hello": 1})
    await browser.page.goto(process.base)
    await browser.titled("^Live")
    await browser.shows("#hits", "^4$")
    await browser.shows("#urls", "^2$")
    await browser.shows("#redis", "connected")
    await browser.shows("#rows tr:first-child", re.escape(hostile) + r"\s*3\s*75\.0%")
    assert await browser.page.locator("#rows img").count() == 0

    await browser.enter("#n", "3000")
    await browser.shows("#run", "Running")
    await browser.shows("#outcome", "3,000 of 3,000 answered")
    await browser.shows("#latency", r"p50[\d.]+p95[\d.]+p99[\d.]+")
    await browser.shows("#hits", "^3,004$")
    await browser.shows("#rows tr:first-child", "/api/[0-9a-f]{6}/")  # the bars have moved

    own.kill()
    await send(process, hello=1)
    await browser.shows("#redis", "away, 1 hit held")
    await browser.shows("#status", r"Waiting for Redis. Counts are as of \d")
    await browser.titled("^Redis is away")
    await asyncio.to_thread(own.start)
    await browser.shows("#redis", "connected")
    await browser.shows("#hits", "^3,005$")
    await process.stop()
    await browser.shows("#status", "does not answer")
    await browser.titled("^No answer")
    assert browser.hosts == {f"127.0.0.1:{process.port}"}


async def test_the_page_allows_no_inline_script_and_weighs_under_24_kb(client: Client) -> None:
    async with client.get("/") as response:
        frames, page = response.headers["Content-Security-Policy"], await response.text()
    assert "frame-ancestors 'none'" in frames  # which a <meta> may not say
    found = re.search('<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert found
    assert found.end() < page.index("<style")
    blocks = re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
    hashes = {tag: b64encode(sha256(text.encode()).digest()).decode() for tag, text in blocks}
    assert found[1].split("; ") == [
        *("default-src 'none'", "base-uri 'none'", "form-action 'none'"),
        *("connect-src 'self'", "img-src data:"),
        *(f"{tag}-src 'sha256-{hashes[tag]}'" for tag in ("style", "script")),
    ]
    assert len(page.encode()) < 24_000


@in_chromium
async def test_the_page_finds_a_url_however_it_is_pasted_and_keeps_it_up_to_date(
    browser: Browser, serve: Serve
) -> None:
    shop = serve()
    await send(shop, cart=3, **dict.fromkeys(["caf%C3%A9/a%20b%5C", "50%25", "api/x", "/x"], 1))
    await browser.page.goto(shop.base)
    for pasted, counted in {
        "/api/cart/": "/api/cart/: 3 hits, rank 1 of 5",
        " cart ": "/api/cart/: 3 hits, rank 1 of 5",
        "/api/café/a b\\": "/api/café/a b\\/: 1 hit, rank 2 of 5",
        "api/caf%C3%A9/a%20b%5C": "/api/café/a b\\/: 1 hit, rank 2 of 5",
        "http://example.com/api/cart?x=/1#y": "/api/cart/: 3 hits, rank 1 of 5",
        "/api/50%": "/api/50%/: 1 hit, rank 4 of 5",
        "localhost:5000/api/api/x": "/api/api/x/: 1 hit, rank 3 of 5",
        "/api//x": "/api//x/: 1 hit, rank 5 of 5",
        "/api/../health": "Enter a URL such as /api/products/123/",
        "/api/new": "/api/new/ was never requested",
    }.items():
        await browser.enter("#url", pasted)
        await browser.shows("#found", f"^{re.escape(counted)}$")
    await send(shop, new=4)
    await browser.shows("#found", "^/api/new/: 4 hits, rank 1 of 6$")
    await browser.page.fill("#url", "")
    await browser.shows("#found", "^$")


@in_chromium
async def test_the_page_shows_more_rows_up_to_500_and_a_tiny_share_is_not_nothing(
    browser: Browser, serve: Serve
) -> None:
    page, shop = browser.page, serve()
    await send(shop, much=501, **{f"n{n}": 1 for n in range(500)})
    await page.goto(shop.base)
    for shown in (20, 120, 220, 320, 420):
        await browser.shows("#shown", f"^{shown} of 501 URLs$")
        await playwright.expect(page.locator("#rows tr")).to_have_count(shown)
        await page.press("#more", "Enter")
    await browser.shows("#shown", "^500 of 501 URLs$")
    await browser.shows("#rows tr:last-child", r"\s*1\s*<0\.1%$")
    await playwright.expect(page.locator("#more")).to_be_hidden()
    await playwright.expect(page.locator("#rest")).to_be_focused()
    await page.press("#rest", "Enter")
    await browser.shows("body", r'^\[\{"count": 1, "url": "/api/n0/"\}\]\s*$')


# A commit of at most 32 hits takes 0.05 s, so that a run lasts without keeping the machine busy.
SLOW = f"""
import asyncio, server
commit = server.MemoryStore.commit
async def slow_commit(*args):
    await asyncio.sleep(0.05)
    await commit(*args)
server.MemoryStore.commit = slow_commit
server.DEFAULT_REDIS_URL = {NO_REDIS!r}
server.main()
"""


@in_chromium
async def test_the_page_shows_a_run_after_a_reload_and_in_another_tab(
    browser: Browser, serve: Serve
) -> None:
    process, other = serve(code=SLOW), Browser(await browser.page.context.new_page())
    await browser.page.goto(process.base)
    await browser.page.fill("#n", "1 500")
    await browser.page.click("#run")
    await browser.shows("#doing", "^Sending requests$")
    await browser.shows("#sent", r"^[\d,]+ of 1,500$")
    await browser.page.reload()
    await other.page.goto(process.base)
    for tab in (browser, other):
        progress = playwright.expect(tab.page.locator("#progress"))
        await tab.shows("#doing", "^A run started elsewhere$")
        await tab.shows("#sent", r"^[\d,]+ of 1,500$")
        await progress.to_have_js_property("max", 1500)
        await tab.page.press("#n", "Enter")  # does nothing
    for tab in (browser, other):
        await tab.shows("#doing", "^The run started elsewhere has ended$")
        await tab.shows("#run", "^Start$")
        await playwright.expect(tab.page.locator("#progress")).to_be_hidden()
        await tab.shows("#hits", "^1,500$")


@in_chromium
async def test_the_page_says_what_to_type_until_it_is_typed(browser: Browser, serve: Serve) -> None:
    await browser.page.goto(serve().base)
    for typed, message in {
        "0": "Enter a whole number, 1 or more$",
        "1.5": "Enter a whole number, 1 or more$",
        "200,000": "Enter 1 to 100,000$",
        "1,000": "1,000 of 1,000 answered",
    }.items():
        await browser.page.fill("#n", typed)
        await browser.shows("#outcome", "^$")
        await browser.page.press("#n", "Enter")
        await browser.shows("#outcome", f"^{message}")


@in_chromium
async def test_the_page_says_that_runs_are_off(browser: Browser, serve: Serve) -> None:
    await browser.page.goto(serve(MAX_TEST_REQUESTS="0").base)
    await browser.page.click("#run")
    await browser.shows("#outcome", "runs are off")
    await browser.shows("#run", "^Start$")


def shop_urls() -> list[str]:
    """What a shop's API is asked for, the most popular first."""
    fixed = "products/123 cart users/42/orders search login products/7 checkout products/9/reviews"
    more = [f"products/{n}" for n in range(200, 260)] + [f"users/{n}/orders" for n in range(50, 80)]
    random.Random(1).shuffle(more)
    return [f"/api/{path}/" for path in fixed.split() + more]


async def three_minutes(browser: Browser, base: str) -> None:
    """Traffic as of a shop, sent as fast as it goes while the page's clock runs ahead."""
    urls, rng, total = shop_urls(), random.Random(1), 1000
    weights = [1 / rank for rank in range(1, len(urls) + 1)]
    async with ClientSession(base) as session:
        for second in range(180):
            wave = 70 + 40 * math.sin(second / 25) + 15 * math.sin(second / 7)
            for url in rng.choices(urls, weights, k=round(wave * rng.uniform(0.85, 1.15))):
                async with session.get(url) as response:
                    total += response.status == 200
            await browser.page.clock.run_for(1000)
            await browser.shows("#hits", f"^{total:,}$")


PICTURES: list[tuple[str, Literal["light", "dark"], int, int]] = [
    ("page", "light", 1280, 1130),
    ("dark", "dark", 1280, 1130),
    ("phone", "light", 390, 1900),
]


@pytest.mark.picture
@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture[0])
@in_chromium
async def test_take_pictures(
    browser: Browser, tmp_path: Path, redis_server: RedisServer, serve: Serve, picture: Any
) -> None:
    """`make picture`: the page as a visitor sees it, after three minutes of traffic."""
    page, process, (name, scheme, width, height) = browser.page, serve(redis_server.url), picture
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.set_viewport_size({"width": width, "height": height})
    await page.clock.install()
    await page.goto(process.base)
    await page.press("#n", "Enter")
    await browser.shows("#outcome", "answered")
    await page.clock.run_for(1000)
    await browser.shows("#hits", "^1,000$")
    await three_minutes(browser, process.base)
    await browser.enter("#url", "/api/products/250")
    await browser.shows("#found", "rank")
    await page.locator("#url").blur()
    await page.screenshot(path=Path(os.environ.get("PICTURES", tmp_path)) / f"{name}.png")


# --- Several processes ----------------------------------------------------------------------------


async def test_four_processes_under_gunicorn_count_as_one(
    tmp_path: Path, redis_server: RedisServer, serve: Serve
) -> None:
    """As the operations page starts them; one scrape is the sum of all, the killed one included."""
    port = free_port()
    command = block("docs/operations.md", "sh", "gunicorn.conf.py")
    command = with_ports(command, {5000: port, 6379: redis_server.port})
    command = re.sub(".* install gunicorn\n", "", command)
    command = command.replace("\n.venv/bin/gunicorn", "\nexec .venv/bin/gunicorn")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "server.py").symlink_to(HERE / "server.py")
    code = f"""import os; os.chdir({str(tmp_path)!r}); print("started")
os.execvp("bash", ["bash", "-ec", {command!r}])"""

    async def load_and_scrape() -> Load:
        async with Load(port) as load:
            await load.more(2000)
        async with ClientSession(process.base) as session:
            samples = await scrape(session)
        hits = sum(redis_server.counts().values())
        api = frozenset({("method", "GET"), ("route", "/api/..."), ("code", "200")})
        names = ["url_hits_total", "redis_up", "url_hits_pending"]
        assert [samples[name, frozenset()] for name in names] == [hits, 1, 0]
        assert samples["http_request_duration_seconds_count", api] == hits
        assert (load.failed.total(), load.unknown.total()) == (0, 0)
        return load

    process = serve(code=code, PORT=str(port), GUNICORN_CMD_ARGS="--no-control-socket")
    await until(lambda: process.says("counting in redis") == 4)
    first = await load_and_scrape()
    killed = re.findall(r"Booting worker with pid: (\d+)", process.log.read_text())[0]
    os.kill(int(killed), signal.SIGKILL)
    await until(lambda: process.says("counting in redis") == 5)
    left = {name for name in os.listdir(tmp_path / "metrics") if killed in name}
    assert left == {f"counter_{killed}.db", f"histogram_{killed}.db"}
    second = await load_and_scrape()
    async with ClientSession(process.base) as session, session.post("/test/200/") as run:
        assert (await run.json())["ok"] == 200
    assert await process.stop() == 0
    counts = redis_server.counts()
    loaded = {url: counts.pop(url) for url in list(counts) if url in first.answered}
    assert loaded == first.answered + second.answered
    assert sum(counts.values()) == 200
    redis_server.check_index()


# --- Behind nginx ---------------------------------------------------------------------------------


class Nginx:
    """A real nginx with this in its http { }, and all its files in a folder."""

    def __init__(self, stack: ExitStack, folder: Path, port: int, http: str) -> None:
        if not shutil.which("nginx"):
            missing("nginx")
        folder.mkdir()
        self.stack, self.port = stack, port
        self.log, conf = folder / "error.log", folder / "nginx.conf"
        kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        folders = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
        conf.write_text(
            f"daemon off; user root; pid {folder}/pid; events {{ }}\n"  # unless root, it stays us
            f"http {{ access_log off; {folders}\n{http} }}\n"
        )
        self.command = ["nginx", "-p", str(folder), "-e", str(self.log), "-c", str(conf)]
        self.start()

    def start(self) -> None:
        self.process = launched(self.stack, self.command)
        wait_for(self.listens)

    def listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def restart(self) -> None:
        """Once it has finished what it is doing: mirrored requests, too."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(timeout=20)
        self.start()


@dataclass
class Site:
    """A site that exists already, behind nginx, which tells the tracker of each visit."""

    redis: RedisServer
    tracker: Server
    nginx: Nginx
    files: int  # port of a second site, with an index and an error page

    async def counts(self) -> Counter[str]:
        """Of the site's URLs, when the tracker has counted all that nginx tells it."""
        await asyncio.to_thread(self.nginx.restart)
        await settled(self.tracker)
        return Counter({url.removeprefix("/api"): n for url, n in self.redis.counts().items()})


@pytest.fixture
def site(tmp_path: Path, redis_server: RedisServer, serve: Serve, stack: ExitStack) -> Site:
    port, files, old, tracker = free_port(), free_port(), free_port(), serve(redis_server.url)
    ports = {80: port, 5000: tracker.port, 8000: old}
    conf = with_ports(block("README.md", "nginx", "mirror "), ports)
    pasted = conf[conf.index("    mirror ") : conf.rindex("}")]
    (tmp_path / "index.html").touch()
    (tmp_path / "404.html").touch()
    site = f'server {{ listen 127.0.0.1:{old}; location / {{ return 200 "the site"; }} }}'
    more = f"server {{ listen 127.0.0.1:{files}; root {tmp_path}; error_page 404 /404.html;"
    nginx = Nginx(stack, tmp_path / "nginx", port, f"{conf} {site} {more} {pasted} }}")
    return Site(redis_server, tracker, nginx, files)


async def test_a_mirrored_site_is_counted_and_no_visitor_notices_a_dead_tracker(
    site: Site, serve: Serve
) -> None:
    async with Load(site.nginx.port) as up:
        await up.more(2000)
    assert await site.counts() == up.answered
    async with Load(site.nginx.port) as load:
        site.tracker.kill()
        await load.more(2000)
        site.tracker = serve(site.redis.url, wait=False, PORT=str(site.tracker.port))
        await until(site.tracker.serves)
        await load.more(500)
    async with Load(site.nginx.port) as again:
        await again.more(500)
    for each in (up, load, again):
        assert not each.failed + each.unknown
        assert each.slowest < 3  # on a busy machine
    print(f"slowest visit: {up.slowest:.3f} s, tracker killed and started: {load.slowest:.3f} s")
    counts = await site.counts() - up.answered
    assert again.answered <= counts <= load.answered + again.answered
    site.redis.check_index()


async def test_a_visit_to_a_mirrored_site_waits_for_a_tracker_that_hangs_at_most_its_timeout(
    site: Site,
) -> None:
    site.tracker.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    assert await ask(site.nginx.port, "/") == (200, "the site")
    async with Load(site.nginx.port) as load:
        pass
    assert time.monotonic() - started > 0.3, "it did not hang"
    print(f"{load.answered.total()} visits, slowest {load.slowest:.3f} s")
    assert load.slowest < 3  # 0.2 s, on a busy machine more
    assert not load.failed + load.unknown


async def test_a_visit_counts_once_under_the_url_as_the_visitor_spelled_it(site: Site) -> None:
    spelled = {"/": "/", "/a?x=/b/": "/a/", "/x//y": "/x//y/", "//x": "//x/", "/a%2Fb": "/a/b/",
        "/%C3%A9": "/é/", "/e/../f/": "/e/../f/", "/g/%2E%2e": "/g/../", "/%FF": "/%FF/",
        "/%0A": "/\n/", "/+%2B": "/++/", "/api/a": "/api/a/", "/" + "x" * 2042: f"/{'x' * 2042}/",
    }  # fmt: skip
    for target in spelled:
        for method, body in ("GET", ""), ("HEAD", ""), ("POST", "12345"), ("PURGE", ""):
            assert (await ask(site.nginx.port, target, method, body))[0] == 200
    assert (await ask(site.nginx.port, "/-/count"))[0] == 404  # nobody counts from outside
    for path, status in ("/?1", 200), ("/none", 404):  # in files: index and error page
        assert (await ask(site.files, path))[0] == status
    expected = Counter(dict.fromkeys(spelled.values(), 4)) + Counter(["/", "/none/"])
    assert await site.counts() == expected
    assert "uninitialized" not in site.nginx.log.read_text()


@dataclass
class Pairs:
    redis: list[RedisServer]
    servers: list[Server]
    nginx: Nginx

    async def merged(self) -> tuple[int | None, list[dict[str, Any]]]:
        """What the documented command returns and prints."""
        if not shutil.which("jq"):
            missing("jq")
        ports = {5001: self.servers[0].port, 5002: self.servers[1].port}
        command = "set -o pipefail\n" + with_ports(block("docs/operations.md", "sh", "jq"), ports)
        code, printed = await run("bash", "-c", command)
        return code, [json.loads(line) for line in printed.splitlines()]


@pytest.fixture
def pairs(tmp_path: Path, own_redis: MakeRedis, serve: Serve, stack: ExitStack) -> Pairs:
    redis = [own_redis(), own_redis()]
    servers = [serve(each.url, MAX_TEST_REQUESTS="0") for each in redis]
    ports = {80: free_port(), 5001: servers[0].port, 5002: servers[1].port}
    conf = with_ports(block("docs/operations.md", "nginx", "hash "), ports)
    return Pairs(redis, servers, Nginx(stack, tmp_path / "nginx", ports[80], conf))


PIECES = """
    a b / // . .. %2e %2E%2e %2F %2f %25 %25FF %FF %C3%A9 %C3 %A9 %C3%C3%A9 %25C3%A9 %C3%25A9
    %E0%A4%85 %E4%BD %ED%A0%80 %F0%9F%90%8D %F0%9F%90 %F4%8F%BF%BF %0A %0D %20 + %2B %3F %23 %61 A
    api stats ~ \\ %5C : ; %7F %80 %C0%80 %01 = & %2525 %25%32%35 %25%46F /api/"""
TRAPS = ["/api/", "/api/../a", "/api/b/../../c", "/api/a//", "/api/%0A", "/api/%FF", "/api/%25FF"]


class Spellings(Load):
    """Clients that spell a few hundred URLs in many ways; a URL is what the server says it is."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.rng, self.spelled = random.Random(1), dict[str, set[str]]()
        picks = (self.rng.choices(PIECES.split(), k=self.rng.randint(0, 5)) for _ in range(400))
        self.paths = TRAPS + ["/api/" + "".join(pick) for pick in picks]

    def target(self, number: int) -> str:
        path = re.sub("%..|[^%/]", self.respelled, self.rng.choice(self.paths))
        return path + self.rng.choice(["", "", "/", "?q=1", "/?q=/"])

    def respelled(self, token: re.Match[str]) -> str:
        spelling, chance = token[0], self.rng.random()
        if len(spelling) == 1:
            return f"%{ord(spelling):02x}" if chance < 0.15 else spelling
        if chance < 0.2 and spelling in ("%FF", "%C3", "%A9"):
            return f"%25{spelling[1:]}"  # another URL, or by the server's rules the same
        return spelling.upper() if chance < 0.6 else spelling.lower()

    def url(self, target: str, body: bytes) -> str:
        url: str = json.loads(body)["url"]
        self.spelled.setdefault(url, set()).add(target)
        return url


async def test_pairs_count_exactly_and_a_url_has_one_home_however_it_is_spelled(
    pairs: Pairs,
) -> None:
    port = pairs.nginx.port
    async with Spellings(port) as load:
        await load.more(1500)
        pairs.redis[0].kill()
        await load.more(500)
        await asyncio.sleep(1.2)  # by then its server waits no more
        await load.more(500)
        await asyncio.to_thread(pairs.redis[0].start)
        await load.more(500)
    for each in pairs.servers:
        await settled(each)
    print(f"{load.answered.total()} hits, slowest {load.slowest:.2f} s")
    assert not load.failed + load.unknown
    assert load.slowest < 3  # on a busy machine
    first, second = (each.counts() for each in pairs.redis)
    assert not [load.spelled[url] for url in first.keys() & second.keys()]
    assert first | second == load.answered
    assert min(len(first), len(second)) > 50

    for url, targets in list(load.spelled.items())[:150]:
        for target in list(targets)[:3]:
            status, body = await ask(port, f"/stats{target}")
            assert (status, json.loads(body)["count"]) == (200, load.answered[url]), target
    rows = sorted(load.answered.items(), key=lambda row: (row[1], row[0]), reverse=True)
    assert await pairs.merged() == (0, [{"count": n, "url": url} for url, n in rows])

    assert (await ask(port, "/test/5/", "POST"))[0] == 403
    pairs.servers[1].kill()
    assert {(await ask(port, f"/api/{n}"))[0] for n in range(20)} == {200, 502}
    code, rows_of_one = await pairs.merged()
    assert (code != 0, rows_of_one) == (True, [])


# --- The README -----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()
VOLATILE = {"duration_s", "requests_per_s", "latency_ms", "uptime_s"}


def steady(text: str) -> object:
    """An answer without the figures that differ from run to run."""
    data = json.loads(text)
    if isinstance(data, dict):
        return {key: type(value) if key in VOLATILE else value for key, value in data.items()}
    return data


async def test_the_readme_shows_what_the_server_says(serve: Serve) -> None:
    shown, process = block("README.md", "console", "curl"), serve()
    examples = re.findall(r"^\$ (curl .*)\n((?:(?!\$ ).+\n)*)", shown, re.MULTILINE)
    assert len(examples) >= 3
    for command, expected in examples:
        local = command.replace("localhost:5000", f"127.0.0.1:{process.port}")
        code, printed = await run("bash", "-c", local)
        assert (code, steady(printed)) == (0, steady(expected)), command


async def test_the_settings_table_is_what_help_says_and_names_the_defaults() -> None:
    table = re.findall(r"^\| `([A-Z_]+)` \| `(--[a-z-]+)` \| (.+) \|$", README, re.MULTILINE)
    assert [row[0] for row in table] == [name for name, *_ in server.OPTIONS]
    code, said = await run(sys.executable, "server.py", "--help")
    for name, flag, meaning in table:
        assert f"{flag} {name} {meaning}" in " ".join(said.split())
    for promise in ("X-Total-Count", "/test/<n>/", "any method /api/..."):
        assert promise in said
    for _, default, _, meaning in server.OPTIONS:
        assert meaning.startswith(default or "unset")
    assert code == 0


def test_uv_run_needs_the_file_alone(tmp_path: Path, stack: ExitStack) -> None:
    """Its header names the packages of requirements.txt, so that uv can find them."""
    source = (HERE / "server.py").read_text()
    header = re.search(r"# /// script\n(.*?)# ///\n", source, re.DOTALL)
    assert header
    found = tomllib.loads(header[1].replace("# ", ""))
    wanted = (HERE / "requirements.txt").read_text().replace('"', "'").splitlines()
    assert (found["requires-python"], found["dependencies"]) == (">=3.11", wanted)
    (tmp_path / "server.py").write_text(source)
    pip = [sys.executable, "-m", "pip", "config", "get", "global.extra-index-url"]
    index = subprocess.run(pip, capture_output=True, text=True).stdout.strip()
    told = {"UV_INDEX": index, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    port = free_port()
    env = {**os.environ, **{k: v for k, v in told.items() if v}, "PORT": str(port)}
    env |= {"REDIS_URL": "", "UV_PYTHON": sys.executable, "UV_NO_CONFIG": "1"}
    env["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does
    with (tmp_path / "log").open("wb") as log:
        command = [str(Path(sys.executable).with_name("uv")), "run", "server.py"]
        process = launched(stack, command, log, env, tmp_path)
    wait_for(lambda: "started" in (tmp_path / "log").read_text(), 60)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        said = sock.makefile("rb").read()
    assert said.startswith(b"HTTP/1.0 404")
    assert b"dashboard.html: put it beside server.py" in said
    process.terminate()
    assert process.wait(timeout=10) == 0
