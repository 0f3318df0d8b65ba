"""Measures docs/benchmarks.md: `make bench > docs/benchmarks.md`, or QUICK=1 for a glance.

It needs Linux, wrk and redis-server; the Redis is its own, on a free port. Machines are noisy, so
all servers are up at once and measured in turns; and two processes of one program can be 10 %
apart, so each round starts new ones.
"""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from http.client import HTTPConnection
from importlib.metadata import version
from itertools import product
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

HERE, HOST = Path(__file__).resolve().parent, "127.0.0.1"
PACKAGES = ("aiohttp", "redis", "uvloop", "fastapi", "uvicorn", "httptools", "Flask", "gunicorn")
QUICK = os.environ.get("QUICK", "0") not in ("", "0")
ROUNDS = 1 if QUICK else 10
MANY = 10_000 if QUICK else 1_000_000  # URLs, where they are many
say = partial(print, file=sys.stderr, flush=True)

# --- The servers compared -------------------------------------------------------------------------
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
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
HEADERS = NOSNIFF | {"Content-Type": "application/json"}


def serve_aiohttp(counting: bool) -> None:
    import uvloop
    from aiohttp import web
    from redis.asyncio import Redis

    redis = Redis.from_url(os.environ["REDIS_URL"], protocol=2, max_connections=512)

    async def plain(request: web.Request) -> web.Response:
        """The ceiling: the handler of server.py, and no counting."""
        path = request.path if request.path[-1] == "/" else request.path + "/"
        return web.Response(body=f'{{"url": {quote(path)}}}\n'.encode(), headers=HEADERS)

    async def incr(request: web.Request) -> web.Response:
        """The obvious way to count."""
        await redis.incr(f"url_count:{request.path}")
        return web.json_response({"url": request.path}, headers=NOSNIFF)

    app, loop, port = web.Application(), uvloop.new_event_loop(), int(os.environ["PORT"])
    app.router.add_get("/api/{_:.*}", incr if counting else plain)
    web.run_app(app, host=HOST, port=port, backlog=1024, access_log=None, print=None, loop=loop)


def fastapi_app() -> Any:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from redis.asyncio import Redis

    redis = Redis.from_url(os.environ["REDIS_URL"], protocol=2, max_connections=512)
    app = FastAPI()

    @app.get("/api/{path:path}")
    async def api(path: str) -> JSONResponse:
        await redis.incr(f"url_count:/api/{path}")
        return JSONResponse({"url": f"/api/{path}"}, headers=NOSNIFF)

    return app


def flask_app() -> Any:
    from flask import Flask, jsonify
    from redis import Redis

    redis = Redis.from_url(os.environ["REDIS_URL"], protocol=2)
    app = Flask(__name__)

    @app.get("/api/<path:path>")
    def api(path: str) -> Any:
        redis.incr(f"url_count:/api/{path}")
        return jsonify(url=f"/api/{path}"), NOSNIFF

    return app


# --- Processes ------------------------------------------------------------------------------------
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
    rule = "|---" + "|---:" * columns.count("|") + "|"
    table = [f"| {columns} |", rule, *(f"| {row} |" for row in rows)]
    print(f"\n## {title}\n\n{sentence}\n", *table, sep="\n", flush=True)


class Lab(NamedTuple):
    pid: int  # of Redis, which is our own and writes no file
    url: str
    redis: Any  # its client
    script: str  # for wrk


# --- Requests a second ----------------------------------------------------------------------------
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


def ratio(own: list[Sample], others: list[Sample]) -> float:
    return median(a.rate / b.rate for a, b in zip(own, others, strict=True))


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
        if (counted := int(lab.redis.get("url_total"))) < sent:
            sys.exit(f"bench.py: {sent:.0f} requests were answered, but {counted} were counted")
    rows = []
    for (case, name), own in found.items():
        m, plain, incr = medians(own), ratio(own, found[case, PLAIN]), ratio(own, found[case, INCR])
        row = f"{name} | {case[0]} | {case[1]:,} | {m.rate:,.0f} | {plain:.2f} | {incr:.2f}"
        rows.append(f"{row} | {m.p50:.2f} | {m.p99:.2f} | {m.cpu:.0f} | {m.redis_cpu:.0f}")
    print_table(
        "Requests a second",
        "One process of each, asked for random URLs: plain aiohttp has this server's handler and "
        "counts nothing, the last three send an INCR a request; CPU and Redis are the processor "
        "time of one request, in the server and in Redis.",
        "| connections | URLs | req/s | ÷ plain | ÷ INCR | p50 ms | p99 ms | CPU µs | Redis µs",
        rows,
    )
    print(f"\nFailed requests: {sum(s.errors for own in found.values() for s in own):.0f}.")


# --- Statistics -----------------------------------------------------------------------------------
# Redis is filled with counts alone, as an earlier version leaves them. The first server makes the
# index; it is the second one that is measured, whose memory has seen nothing yet.

PAGE = 1000  # URLs that one command reads or writes


def fill(lab: Lab, urls: int) -> tuple[float, float, float]:
    """Returns Redis's bytes a URL before and after the index is made, and the seconds of that."""
    lab.redis.flushall()
    draw, used = Random(7), [lab.redis.info("memory")["used_memory"]]
    for start in range(0, urls, PAGE):  # as in life, few counts are large
        page = [f"url_count:/api/products/{n}/" for n in range(start, min(start + PAGE, urls))]
        lab.redis.mset({key: int(draw.paretovariate(0.7)) for key in page})
    used.append(lab.redis.info("memory")["used_memory"])
    begun = time.perf_counter()
    with started(SERVERS[THIS], lab.url):
        seconds = time.perf_counter() - begun
    used.append(lab.redis.info("memory")["used_memory"])
    return (used[1] - used[0]) / urls, (used[2] - used[0]) / urls, seconds


def milliseconds(action: Callable[[], object], times: int) -> float:
    return 1000 * median(repeat(action, number=1, repeat=times))


def get(http: HTTPConnection, path: str) -> int:
    """The bytes of an answer."""
    http.request("GET", path)
    return len(http.getresponse().read())


def scan_mget_sort(redis: Any) -> list[tuple[int, bytes]]:
    """The ranking without an index."""
    keys, counts = list(redis.scan_iter("url_count:*", count=PAGE)), []
    for start in range(0, len(keys), PAGE):
        counts += [int(hits) for hits in redis.mget(keys[start : start + PAGE])]
    return sorted(zip(counts, keys, strict=True), reverse=True)


def measure_statistics(lab: Lab) -> None:
    pages, alone, beside = [], [], []
    for urls in sorted({1_000, MANY // 10, MANY}):
        say(f"statistics of {urls:,} URLs")
        counts, index, takeover = fill(lab, urls)
        with started(SERVERS[THIS], lab.url) as (_, port):
            page = partial(get, HTTPConnection(HOST, port))
            top = milliseconds(partial(page, "/stats/?limit=100"), 200)
            middle = milliseconds(partial(page, f"/stats/?limit=100&offset={urls // 2}"), 200)
        sort = milliseconds(partial(scan_mget_sort, lab.redis), 3)
        pages.append(f"{urls:,} | {top:.2f} | {middle:.2f} | {sort:,.1f} | {sort / top:,.0f}")
    with started(SERVERS[THIS], lab.url) as (pid, port):
        whole_list = partial(get, HTTPConnection(HOST, port), "/stats/")
        before, size, took = memory_mb(pid, "VmRSS"), whole_list(), milliseconds(whole_list, 3)
        for turn in range(ROUNDS):
            alone.append(wrk(lab, (pid, port), CASES[0], turn))
            beside.append(wrk(lab, (pid, port), CASES[0], turn, whole_list))
        most, a, b = memory_mb(pid, "VmHWM"), medians(alone), medians(beside)
    print_table(
        "A page of the statistics",
        "Milliseconds for `/stats/?limit=100` (median of 200), at the top and in the middle of the "
        "list, and for the ranking without an index (median of 3): SCAN, MGET, sort in redis-py.",
        "URLs | top 100 | in the middle | SCAN + MGET + sort | ÷ top 100",
        pages,
    )
    print_table(
        f"At {MANY:,} URLs",
        "What the whole list takes, what one client of `/api/` notices while it is read again and "
        "again, and what so many URLs take of Redis's memory and of a first start.",
        " | ",
        [
            f"whole list by `/stats/`, {size / 1e6:.1f} MB | {took:,.0f} ms",
            f"server's memory before → at most | {before:.1f} → {most:.1f} MB",
            f"`/api/` alone: p50, p99, max | {a.p50:.2f}, {a.p99:.2f}, {a.worst:.2f} ms",
            f"`/api/` beside the list: p50, p99, max | {b.p50:.2f}, {b.p99:.2f}, {b.worst:.2f} ms",
            f"Redis's memory for a URL: its count, with the index | {counts:.0f}, {index:.0f} B",
            f"start that takes over counts without an index | {takeover:.1f} s",
        ],
    )


# --- What a Redis core takes ----------------------------------------------------------------------
# The server's own script and keys, in Redis's own processor time: what the client takes of the
# machine does not count. Commits are packed before, so that Redis does not wait for them.

BATCHES = (1, 10, 40, 100, 400, 1000)  # URLs in a commit
KNOWN = 10_000  # URLs in Redis; no others come
HITS = 20_000 if QUICK else 100_000


def commit_time(lab: Lab, batch: int, ahead: int) -> float:
    """Redis's microseconds for a commit, where so many are sent before the first is answered."""
    from hiredis import pack_command

    from server import COMMIT, SHARED

    script, sequence = lab.redis.script_load(COMMIT), int(lab.redis.get("url_commit:bench") or 0)
    draw, commits, hits = Random(batch), [], [1] * batch
    for _ in range(max(ahead, HITS // (batch + 3))):
        sequence += 1
        urls = [f"url_count:/api/products/{n}/" for n in draw.sample(range(KNOWN), batch)]
        keys = ("url_commit:bench", *SHARED, *urls)
        command: Any = ("EVALSHA", script, len(keys), *keys, sequence, 10 * KNOWN, *hits)
        commits.append(pack_command(command))
    connection = lab.redis.connection_pool.get_connection()
    total, cpu = int(lab.redis.get("url_total")), cpu_seconds(lab.pid)
    for start in range(0, len(commits), ahead):
        window = commits[start : start + ahead]
        connection.send_packed_command([b"".join(window)])
        for _ in window:
            connection.read_response()
    cpu = cpu_seconds(lab.pid) - cpu
    lab.redis.connection_pool.release(connection)
    if (counted := int(lab.redis.get("url_total")) - total) != len(commits) * batch:
        sys.exit(f"bench.py: {len(commits)} commits of {batch} hits, but {counted} were counted")
    return cpu * 1e6 / len(commits)


def measure_core(lab: Lab) -> None:
    fill(lab, KNOWN)
    rows = []
    for batch in BATCHES:
        row = f"{batch:,}"
        for ahead in (1, max(4, 2000 // batch)):
            took = median(commit_time(lab, batch, ahead) for _ in range(ROUNDS))
            say(f"{batch} URLs a commit, {ahead} ahead: {took:.1f} µs")
            row += f" | {batch * 1e6 / took:,.0f} | {took:,.1f}"
        rows.append(row)
    print_table(
        "What a Redis core takes",
        "Hits for each second of Redis's processor time, by the number of URLs in a commit: one "
        "commit at a time, as a server sends them, and pipelined, as those of many servers arrive.",
        "URLs | one at a time: hits/s | µs a commit | pipelined: hits/s | µs a commit",
        rows,
    )


def print_opening(lab: Lab) -> None:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    wrk_version = run(["wrk", "-v"], capture_output=True, text=True).stdout.split()[1]
    versions = [f"Python {python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
    versions += [f"Redis {lab.redis.info('server')['redis_version']}", f"wrk {wrk_version}"]
    title = "Figures for a glance only (QUICK=1)" if QUICK else "Benchmarks"
    print(f"# {title}, {date.today()}, {model[1] if model else '?'}, {os.cpu_count()} cores\n")
    print(f"Printed by `make bench`: {', '.join(versions)}.")
    print("The servers, wrk and Redis, which writes no file, share the machine and take turns.")
    print(
        f"Rounds: {ROUNDS}, each with new processes. A figure is the median of its rounds, and so"
    )
    print("is a ratio (÷) of requests a second.", flush=True)


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
        measure_core(lab)


if __name__ == "__main__":
    if sys.argv[1:]:
        serve_aiohttp(counting=sys.argv[1] == "incr")
    else:
        main()
