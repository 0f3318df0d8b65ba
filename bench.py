"""Measures docs/benchmarks.md: `make bench > docs/benchmarks.md`, or QUICK=1 for a glance.

It needs Linux, wrk and redis-server, and takes about eight minutes. The Redis is its own, on a free
port, and writes no file. Machines are noisy, so what is compared is measured in turns; and two
processes of one program can be 10 % apart, so each round starts new servers.
"""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from functools import partial
from http.client import HTTPConnection
from importlib.metadata import version
from itertools import count, islice, product
from json import loads
from json.encoder import encode_basestring_ascii as quote
from pathlib import Path
from platform import python_version
from random import Random
from shlex import split
from statistics import median
from subprocess import PIPE, Popen, run
from tempfile import NamedTemporaryFile, TemporaryFile
from timeit import repeat
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
PACKAGES = ("aiohttp", "redis", "uvloop", "fastapi", "uvicorn", "httptools", "Flask", "gunicorn")
QUICK = os.environ.get("QUICK", "0") not in ("", "0")
ROUNDS = 1 if QUICK else 10
MANY = 10_000 if QUICK else 1_000_000  # URLs, where they are many
say = partial(print, file=sys.stderr, flush=True)

# --- The servers compared -------------------------------------------------------------------
# One process each, of this interpreter, without access log, with the fastest parts that the
# framework offers (uvloop, httptools, hiredis). Each imports its framework alone: what another one
# keeps in memory would slow its garbage collector. PORT and REDIS_URL are in the environment.

THIS, PLAIN, INCR = "this server", "plain aiohttp", "aiohttp + INCR"
SERVERS = {
    THIS: "{python} server.py",
    PLAIN: "{python} bench.py plain",
    INCR: "{python} bench.py incr",
    "FastAPI + uvicorn": "{python} -m uvicorn bench:fastapi_app --factory --host {host} "
    "--port {port} --workers 1 --loop uvloop --http httptools --no-access-log",
    "Flask + gunicorn": "{python} -m gunicorn 'bench:flask_app()' --bind {host}:{port} "
    "--workers 1 --threads 8 --no-control-socket",
}
NAMES = list(SERVERS)
REDIS = "redis-server --bind {host} --port {port} --save ''"
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
JSON_HEADERS = HEADERS | {"Content-Type": "application/json"}


def serve_aiohttp(counting: bool) -> None:
    import uvloop
    from aiohttp import web
    from redis.asyncio import Redis

    redis = Redis.from_url(os.environ["REDIS_URL"], protocol=2, max_connections=512)

    async def plain(request: web.Request) -> web.Response:
        """The ceiling: the handler of server.py, and no counting."""
        path = request.path if request.path[-1] == "/" else request.path + "/"
        return web.Response(body=f'{{"url": {quote(path)}}}\n'.encode(), headers=JSON_HEADERS)

    async def incr(request: web.Request) -> web.Response:
        """The obvious way to count."""
        await redis.incr(f"url_count:{request.path}")
        return web.json_response({"url": request.path}, headers=HEADERS)

    app = web.Application()
    app.router.add_get("/api/{_:.*}", incr if counting else plain)
    options: Any = {"backlog": 1024, "access_log": None, "print": None}
    loop = uvloop.new_event_loop()
    web.run_app(app, host=HOST, port=int(os.environ["PORT"]), loop=loop, **options)


def fastapi_app() -> Any:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from redis.asyncio import Redis

    redis = Redis.from_url(os.environ["REDIS_URL"], protocol=2, max_connections=512)
    app = FastAPI()

    @app.get("/api/{path:path}")
    async def api(path: str) -> JSONResponse:
        await redis.incr(f"url_count:/api/{path}")
        return JSONResponse({"url": f"/api/{path}"}, headers=HEADERS)

    return app


def flask_app() -> Any:
    from flask import Flask, jsonify
    from redis import Redis

    redis = Redis.from_url(os.environ["REDIS_URL"], protocol=2)
    app = Flask(__name__)

    @app.get("/api/<path:path>")
    def api(path: str) -> Any:
        redis.incr(f"url_count:/api/{path}")
        return jsonify(url=f"/api/{path}"), HEADERS

    return app


# --- Processes ------------------------------------------------------------------------------
# What is started here is stopped here, on Ctrl-C too.

Server = tuple[int, int]  # process and port


@contextmanager
def started(command: str, redis_url: str = "") -> Iterator[Server]:
    """A process, as soon as it listens on its port."""
    with socket.create_server((HOST, 0)) as sock:
        port = sock.getsockname()[1]  # a free one
    words = split(command.format(python=sys.executable, host=HOST, port=port))
    env = os.environ | {"HOST": HOST, "PORT": str(port), "REDIS_URL": redis_url}
    with TemporaryFile("w+") as log, Popen(words, cwd=HERE, env=env, stdout=log, stderr=log) as it:
        try:
            while not listens(port):
                if it.poll() is not None:
                    log.seek(0)
                    sys.exit(f"bench.py: {command}: {log.read().strip()}")
                time.sleep(0.02)
            yield it.pid, port
        finally:
            it.terminate()


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


@contextmanager
def hanging(pid: int) -> Iterator[None]:
    """The process stands still meanwhile: its connections stay, but nobody answers."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken, with its threads and children."""
    seconds = 0.0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        seconds += int((thread / "schedstat").read_text().split()[0]) / 1e9
        seconds += sum(map(cpu_seconds, map(int, (thread / "children").read_text().split())))
    return seconds


def memory_mb(pid: int, field: str) -> float:
    """VmRSS, now, or VmHWM, the most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1000


def print_table(title: str, sentence: str, columns: str, rows: list[str]) -> None:
    """A chapter of the page. The first column is text, the others are numbers."""
    print(f"\n## {title}\n\n{sentence}\n")
    print(f"| {columns} |")
    print("|---" + "|---:" * columns.count("|") + "|")
    for row in rows:
        print(f"| {row} |", flush=True)


class Lab(NamedTuple):
    pid: int  # of Redis
    url: str
    redis: Any  # its client
    script: str  # for wrk


# --- Requests a second ----------------------------------------------------------------------
# URLs are drawn at random, the same ones for every server; each has a database of its own, empty
# when a round starts. So nearly all hits on 1,000 URLs find their key, and most of those on
# 1,000,000 make one.

CASES = ((1, 1_000), (64, 1_000), (64, MANY))  # connections, URLs
WRK_SCRIPT = r"""
function init(args)
  urls = tonumber(args[1])
  math.randomseed(tonumber(args[2]))
end
function request()
  return 'GET /api/products/' .. math.random(urls) .. '/ HTTP/1.1\r\nHost: localhost\r\n\r\n'
end
function done(summary, latency)  -- times are in microseconds
  local e = summary.errors
  print(string.format('\n[%d, %d, %d, %d, %d, %d]', summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency.max,
    e.connect + e.read + e.write + e.timeout + e.status))
end
"""


class Sample(NamedTuple):
    requests: float
    rate: float  # requests a second
    p50: float  # latencies in ms
    p99: float
    worst: float
    cpu: float  # microseconds of a request: in the server,
    redis_cpu: float  # in Redis
    errors: float


def wrk(lab: Lab, server: Server, case: tuple[int, int], seed: int, beside: Any = None) -> Sample:
    """A second of traffic, the same URLs for the same seed; beside() is called meanwhile."""
    (pid, port), (connections, urls) = server, case
    command = ["wrk", "-t1", f"-c{connections}", "-d1s", "-s", lab.script, f"http://{HOST}:{port}"]
    cpu, redis_cpu = cpu_seconds(pid), cpu_seconds(lab.pid)
    with Popen([*command, "--", str(urls), str(seed)], stdout=PIPE, text=True) as process:
        while beside and process.poll() is None:
            beside()
        output, _ = process.communicate()
    cpu, redis_cpu = cpu_seconds(pid) - cpu, cpu_seconds(lab.pid) - redis_cpu
    n, took, p50, p99, worst, errors = loads(output.splitlines()[-1])
    ms, each = (p50 / 1e3, p99 / 1e3, worst / 1e3), 1e6 / max(n, 1)
    return Sample(n, n * 1e6 / took, *ms, cpu * each, redis_cpu * each, errors)


def medians(samples: list[Sample]) -> Sample:
    return Sample(*map(median, zip(*samples, strict=True)))


def ratio(own: Iterable[float], others: Iterable[float]) -> float:
    return median(a / b for a, b in zip(own, others, strict=True))


def compare_servers(lab: Lab) -> None:
    """All servers, in turns; in each round new ones, and another one first."""
    found: dict[Any, list[Sample]] = {key: [] for key in product(CASES, NAMES)}
    for turn in range(ROUNDS):
        lab.redis.flushall()
        say(f"servers, round {turn + 1} of {ROUNDS}")
        first = turn % len(NAMES)
        with ExitStack() as stack:
            servers = {}
            for i, name in enumerate(NAMES):
                servers[name] = stack.enter_context(started(SERVERS[name], f"{lab.url}{i}"))
            warm = {name: wrk(lab, server, (64, 1_000), 0) for name, server in servers.items()}
            for case in CASES:
                for name in NAMES[first:] + NAMES[:first]:
                    found[case, name].append(wrk(lab, servers[name], case, turn + 1))
        sent = warm[THIS].requests + sum(found[case, THIS][-1].requests for case in CASES)
        assert int(lab.redis.get("url_total")) >= sent, "an answer was not counted"
    rates = {key: [sample.rate for sample in samples] for key, samples in found.items()}
    rows = []
    for (case, name), samples in found.items():
        m = medians(samples)
        row = f"{name} | {case[0]} | {case[1]:,} | {m.rate:,.0f}"
        for other in (PLAIN, INCR):
            row += f" | {ratio(rates[case, name], rates[case, other]):.2f}"
        rows.append(f"{row} | {m.p50:.2f} | {m.p99:.2f} | {m.cpu:.1f} | {m.redis_cpu:.1f}")
    print_table(
        "Requests a second",
        "One process of each, asked for random URLs: plain aiohttp has this server's handler and "
        "counts nothing, the last three send an INCR a request; CPU and Redis are the processor "
        "time of one request, in the server and in Redis.",
        "| connections | URLs | req/s | ÷ plain | ÷ INCR | p50 ms | p99 ms | CPU µs | Redis µs",
        rows,
    )
    failed = sum(sample.errors for samples in found.values() for sample in samples)
    print(f"\nFailed requests: {failed:.0f}.")


# --- Statistics ----------------------------------------------------------------------------
# Redis is filled with counts alone, and tools/reindex.py lists them. The server that is measured
# starts after that: its memory has seen nothing yet.

PAGE = 1000  # URLs that one command reads or writes
FREQUENT = "/stats/?contains=products&limit=20"  # found in every URL
RARE = "/stats/?contains=products/4321/"  # found in one


def fill(lab: Lab, urls: int) -> float:
    """Returns the seconds that tools/reindex.py took."""
    lab.redis.flushall()
    draw = Random(7)
    for start in range(0, urls, PAGE):  # as in life, few counts are large
        page = [f"url_count:/api/products/{n}/" for n in range(start, min(start + PAGE, urls))]
        lab.redis.mset({key: int(draw.paretovariate(0.7)) for key in page})
    begun = time.perf_counter()
    env = os.environ | {"REDIS_URL": lab.url}
    run([sys.executable, "tools/reindex.py"], cwd=HERE, env=env, stdout=sys.stderr, check=True)
    seconds = time.perf_counter() - begun
    assert lab.redis.zcard("url_rank") == urls, "tools/reindex.py has not listed all"
    return seconds


def milliseconds(action: Callable[[], object], times: int) -> float:
    return 1000 * median(repeat(action, number=1, repeat=times))


def get(http: HTTPConnection, path: str) -> int:
    """The bytes of an answer."""
    http.request("GET", path)
    return len(http.getresponse().read())


def scan_mget_sort(redis: Any) -> list[tuple[int, bytes]]:
    """The ranking without an index."""
    keys = list(redis.scan_iter("url_count:*", count=PAGE))
    counts: list[int] = []
    for start in range(0, len(keys), PAGE):
        counts += [int(hits) for hits in redis.mget(keys[start : start + PAGE])]
    return sorted(zip(counts, keys, strict=True), reverse=True)


def measure_statistics(lab: Lab) -> None:
    rows = []
    for urls in sorted({1_000, MANY // 10, MANY}):
        say(f"statistics of {urls:,} URLs")
        reindexing = fill(lab, urls)
        with started(SERVERS[THIS], lab.url) as (_, port):
            page = partial(get, HTTPConnection(HOST, port))
            top = milliseconds(partial(page, "/stats/?limit=100"), 200)
            middle = milliseconds(partial(page, f"/stats/?limit=100&offset={urls // 2}"), 200)
        sort = milliseconds(partial(scan_mget_sort, lab.redis), 3)
        rows.append(f"{urls:,} | {top:.2f} | {middle:.2f} | {sort:,.1f} | {sort / top:,.0f}")
    print_table(
        "A page of the statistics",
        "Milliseconds for `/stats/?limit=100` (median of 200), at the top and in the middle of the "
        "list, and for the ranking without an index (median of 3): SCAN, MGET, sort in redis-py.",
        "URLs | top 100 | in the middle | SCAN + MGET + sort | ÷ top 100",
        rows,
    )
    measure_walks(lab, reindexing)


def measure_walks(lab: Lab, reindexing: float) -> None:
    """What goes through a list of MANY URLs from end to end, and what others notice of it."""
    found: dict[str, list[Sample]] = {"alone": [], "beside the list": [], "beside a search": []}
    with started(SERVERS[THIS], lab.url) as (pid, port):
        page = partial(get, HTTPConnection(HOST, port))
        frequent = milliseconds(partial(page, FREQUENT), 50)
        before = memory_mb(pid, "VmRSS")
        size = page("/stats/")
        whole = milliseconds(partial(page, "/stats/"), 3)
        rare = milliseconds(partial(page, RARE), 3)
        for turn in range(ROUNDS):
            say(f"beside the list and a search, round {turn + 1} of {ROUNDS}")
            walks = (None, partial(page, "/stats/"), partial(page, RARE))
            for samples, walk in zip(found.values(), walks, strict=True):
                samples.append(wrk(lab, (pid, port), CASES[0], turn, walk))
        most = memory_mb(pid, "VmHWM")
    rows = [
        f"whole list by `/stats/`, {size / 1e6:.1f} MB | {whole:,.0f} ms",
        f"search for a text in one URL, `?contains=` | {rare:,.0f} ms",
        f"search for a text in every URL, `limit=20` | {frequent:.2f} ms",
    ]
    for name, samples in found.items():
        m = medians(samples)
        times = f"{m.p50:.2f}, {m.p99:.2f}, {m.worst:.2f} ms"
        rows.append(f"`/api/` {name}: p50, p99, max | {times}")
    rows.append(f"server's memory before → at most | {before:.1f} → {most:.1f} MB")
    rows.append(f"`tools/reindex.py`, where no URL is listed yet | {reindexing:.1f} s")
    print_table(
        f"At {MANY:,} URLs",
        "What the whole list takes, and a search, which walks the list until it has found enough; "
        "what one client of `/api/` notices while the list is read, or the text in one URL is "
        "searched for, again and again.",
        " | ",
        rows,
    )


# --- Commits -------------------------------------------------------------------------------
# The server's own commits, in Redis's own processor time: what the client takes of the machine
# does not count. They are packed before, so that Redis does not wait for them.

BATCHES = (1, 10, 40, 1000)  # URLs in a commit
KNOWN = [f"/api/products/{n}/" for n in range(10_000)]  # in Redis before; no others come
HITS = 10_000 if QUICK else 40_000
KINDS = [(0, False), (1, False), (7, False), (7, True)]  # KEEP_DAYS, and whether pipelined


def packed_commits(keep_days: int, batches: Iterable[list[str]]) -> list[bytes]:
    """What the server would send to commit a hit of each URL."""
    from hiredis import pack_command

    from server import RedisStore, read_settings

    packed: list[bytes] = []

    class Packer(RedisStore):
        async def call(self, *command: Any) -> Any:
            packed.append(pack_command(command))
            raise EOFError  # there is nobody to reply

    async def commit_all() -> None:
        store = Packer(read_settings(["--keep-days", str(keep_days)]))
        for sequence, urls in enumerate(batches, 1):
            with suppress(EOFError):
                await store.commit(sequence, dict.fromkeys(urls, 1))

    asyncio.run(commit_all())
    return packed


def send(lab: Lab, commits: list[bytes], ahead: int = 1) -> float:
    """Redis's microseconds for a commit, where so many are sent before the first is answered."""
    connection = lab.redis.connection_pool.get_connection()
    cpu = cpu_seconds(lab.pid)
    for start in range(0, len(commits), ahead):
        window = commits[start : start + ahead]
        connection.send_packed_command([b"".join(window)])
        for _ in window:
            connection.read_response()
    cpu = cpu_seconds(lab.pid) - cpu
    lab.redis.connection_pool.release(connection)
    return cpu * 1e6 / len(commits)


def commit_time(lab: Lab, seed: int, batch: int, keep_days: int, pipelined: bool) -> float:
    draw = Random(seed)
    ahead = max(4, 2000 // batch) if pipelined else 1
    times = max(ahead, HITS // (batch + 3))
    commits = packed_commits(keep_days, [draw.sample(KNOWN, batch) for _ in range(times)])
    total = int(lab.redis.get("url_total"))
    took = send(lab, commits, ahead)
    assert int(lab.redis.get("url_total")) == total + times * batch, "commits are not counted"
    return took


def measure_commits(lab: Lab) -> None:
    lab.redis.flushall()
    send(lab, packed_commits(7, [KNOWN]))
    found: dict[Any, list[float]] = {key: [] for key in product(BATCHES, KINDS)}
    for turn in range(ROUNDS):
        say(f"commits, round {turn + 1} of {ROUNDS}")
        for batch, kind in found:
            found[batch, kind].append(commit_time(lab, turn, batch, *kind))
    days = []
    core = []
    for batch in BATCHES:
        none, one, seven, pipelined = (found[batch, kind] for kind in KINDS)
        times = " | ".join(f"{median(took):,.1f}" for took in (none, one, seven))
        ratios = f"{ratio(one, none):.2f} | {ratio(seven, none):.2f}"
        rates = " | ".join(f"{batch * 1e6 / median(took):,.0f}" for took in (seven, pipelined))
        days.append(f"{batch:,} | {times} | {ratios}")
        core.append(f"{batch:,} | {rates}")
    print_table(
        "Days",
        "Redis's processor time for a commit, in µs, by the number of URLs in it: with the list "
        "of no day kept, of one, and of seven.",
        "URLs | KEEP_DAYS=0 | 1 | 7 | 1 ÷ 0 | 7 ÷ 0",
        days,
    )
    print_table(
        "What a Redis core takes",
        "Hits for each second of Redis's processor time, by the number of URLs in a commit: one "
        "commit at a time, as a server sends them, and pipelined, as those of many servers arrive.",
        "URLs | one at a time | pipelined",
        core,
    )


# --- Memory --------------------------------------------------------------------------------

STORED = 3_000 if QUICK else 30_000  # URLs: nearly as many as a hash table of Redis has room for


def measure_memory(lab: Lab) -> None:
    rows = []
    for length in (26, 100, 500, 2_000):
        say(f"memory of URLs of {length} characters")
        urls = [f"/api/{n:0{length - 6}}/" for n in range(STORED)]
        slices = [urls[start : start + 50] for start in range(0, STORED, 50)]
        lab.redis.flushall()
        used = [lab.redis.info("memory")["used_memory"]]
        for keep_days in (0, 7):
            send(lab, packed_commits(keep_days, slices))
            used.append(lab.redis.info("memory")["used_memory"])
        all_time = (used[1] - used[0]) / STORED
        day = (used[2] - used[1]) / STORED
        rows.append(f"{length:,} | {all_time:,.0f} | {day:,.0f}")
    print_table(
        "Memory",
        f"Bytes of Redis for a URL, by its length, when it has {STORED:,} of them: for the count "
        "and the list of all time, and for each day kept on which the URL was requested.",
        "characters | all time | each day",
        rows,
    )


# --- Recovery ------------------------------------------------------------------------------
# Redis hangs, and the server holds the hits of many new URLs. Then Redis goes on.

RECOVERIES = 1 if QUICK else 3
HELD = (1_000, 10_000) if QUICK else (1_000, 10_000, 100_000)  # URLs
MIXES = {"short": 0, "one in 40 long": 40, "all long": 1}  # every how many-th is long
AHEAD = 20  # requests sent before the first is answered: few enough for a socket's buffers


def new_urls(long: int) -> Iterator[str]:
    for n in count():
        digits = 1994 if long and n % long == 0 else 7
        yield f"/api/{n:0{digits}}/"


def hold(port: int, urls: Iterator[str], most: int) -> int:
    """Request so many URLs, or as many as the server has room for. How many does it hold?"""
    held = 0
    with socket.create_connection((HOST, port)) as sock:
        while held < most:
            for url in islice(urls, AHEAD):
                sock.sendall(f"GET {url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answers = b""
            while answers.count(b"}\n") < AHEAD:
                answers += sock.recv(100_000) or sys.exit("bench.py: the server has gone")
            held += answers.count(b"HTTP/1.1 200 ")
            if b"HTTP/1.1 503 " in answers:
                break
    return held


def recovery(lab: Lab, port: int, urls: Iterator[str], most: int) -> tuple[int, float]:
    """How many URLs were held, and the seconds until Redis has them."""
    lab.redis.flushall()
    with hanging(lab.pid):
        held = hold(port, urls, most)
    begun = time.perf_counter()
    while (counted := int(lab.redis.get("url_total") or 0)) != held:
        assert time.perf_counter() - begun < 60, f"{held} hits were held, {counted} are counted"
        time.sleep(0.002)
    return held, time.perf_counter() - begun


def measure_recovery(lab: Lab) -> None:
    rows = []
    with started(SERVERS[THIS], lab.url) as (_, port):
        get(HTTPConnection(HOST, port), "/health")  # answered as soon as the store is open
        for most in HELD:
            row = f"{most:,}"
            for mix, long in MIXES.items():
                say(f"recovery with {most:,} URLs, {mix}")
                found = [recovery(lab, port, new_urls(long), most) for _ in range(RECOVERIES)]
                held, seconds = map(median, zip(*found, strict=True))
                row += f" | {seconds:.2f}" + (f" ({held:,.0f} fit)" if held < most else "")
            rows.append(row)
    print_table(
        "Recovery",
        "Redis hangs, and the server holds the hits of so many URLs. Seconds until Redis has them "
        f"all, once it goes on (median of {RECOVERIES}). A short URL has 13 characters, a long one "
        "2,000. The server holds 64 MB: where not all fit, it says how many.",
        "URLs | " + " | ".join(MIXES),
        rows,
    )


# --- The page ------------------------------------------------------------------------------


def print_opening(lab: Lab) -> None:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    wrk_version = run(["wrk", "-v"], capture_output=True, text=True).stdout.split()[1]
    versions = [f"Python {python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
    versions += [f"Redis {lab.redis.info('server')['redis_version']}", f"wrk {wrk_version}"]
    title = "Figures for a glance only (QUICK=1)" if QUICK else "Benchmarks"
    print(f"# {title}, {date.today()}, {model[1] if model else '?'}, {os.cpu_count()} cores\n")
    print(f"Printed by `make bench`: {', '.join(versions)}.")
    print("The servers, wrk and Redis, which writes no file, share the machine and take turns.")
    print(f"Rounds: {ROUNDS}. A figure is the median of its rounds, and so is a ratio (÷) of two")
    print("figures of one round. KEEP_DAYS is 7 where it is not said.", flush=True)


def main() -> None:
    from redis import Redis

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with NamedTemporaryFile("w", suffix=".lua") as script, started(REDIS) as (pid, port):
        script.write(WRK_SCRIPT)
        script.flush()
        url = f"redis://{HOST}:{port}/"
        lab = Lab(pid, url, Redis.from_url(url, protocol=2, socket_timeout=60), script.name)
        print_opening(lab)
        compare_servers(lab)
        measure_statistics(lab)
        measure_commits(lab)
        measure_memory(lab)
        measure_recovery(lab)


if __name__ == "__main__":
    if sys.argv[1:]:
        serve_aiohttp(counting=sys.argv[1] == "incr")
    else:
        main()
