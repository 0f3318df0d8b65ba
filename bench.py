"""Every number in the README, measured again: `make bench`, or QUICK=1 for a glance in a minute.

    python bench.py [--quick]                  markdown to stdout, progress to stderr
    python bench.py serve NAME PORT REDIS_URL  one of the servers that this one is compared with

It needs wrk and redis-server; the Redis is its own, on a free port, in a temporary folder. Machines
are noisy, so all servers are up at once and measured in turns, round after round; and two processes
of one program can be 10 % apart, so every round starts new ones. A number is the median of its
rounds, a ratio that of two medians.
"""

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date
from http.client import HTTPConnection, HTTPException
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from aiohttp import web
    from flask import Flask, Response
    from redis import Redis

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
PACKAGES = ("aiohttp", "redis", "uvloop", "fastapi", "uvicorn", "httptools", "Flask", "gunicorn")

# --- The servers compared -------------------------------------------------------------------------
# One process each, of this interpreter, without access log, with the fastest parts that the
# framework offers (uvloop, httptools, hiredis). Each imports its framework alone: what another one
# keeps in memory would slow its garbage collector.


def serve_plain(port: int, redis_url: str) -> None:
    """The ceiling: the handler of server.py, and no counting."""
    from json.encoder import encode_basestring_ascii as quote

    from aiohttp import web

    headers = NOSNIFF | {"Content-Type": "application/json"}

    async def api(request: web.Request) -> web.Response:
        path = request.path if request.path.endswith("/") else request.path + "/"
        return web.Response(body=f'{{"url": {quote(path)}}}\n'.encode(), headers=headers)

    run_aiohttp(api, port)


def serve_incr(port: int, redis_url: str) -> None:
    """The obvious way to count."""
    from aiohttp import web
    from redis.asyncio import Redis

    redis = Redis.from_url(redis_url, protocol=2, max_connections=512)

    async def api(request: web.Request) -> web.Response:
        await redis.incr(f"url_count:{request.path}")
        return web.json_response({"url": request.path}, headers=NOSNIFF)

    run_aiohttp(api, port)


def run_aiohttp(api: "Callable[[web.Request], Any]", port: int) -> None:
    import uvloop
    from aiohttp import web

    app = web.Application()
    app.router.add_get("/api/{_:.*}", api)
    loop = uvloop.new_event_loop()
    web.run_app(app, host=HOST, port=port, backlog=1024, access_log=None, print=None, loop=loop)


def serve_fastapi(port: int, redis_url: str) -> None:
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from redis.asyncio import Redis

    redis = Redis.from_url(redis_url, protocol=2, max_connections=512)
    app = FastAPI()

    @app.get("/api/{path:path}")
    async def api(path: str) -> JSONResponse:
        await redis.incr(f"url_count:/api/{path}")
        return JSONResponse({"url": f"/api/{path}"}, headers=NOSNIFF)

    uvicorn.run(app, host=HOST, port=port, loop="uvloop", http="httptools", access_log=False)


def serve_flask(port: int, redis_url: str) -> None:
    command = [sys.executable, "-m", "gunicorn", "-w", "1", "--threads", "8", "--no-control-socket"]
    command += [f"--chdir={HERE}", f"-b{HOST}:{port}", f"bench:flask_app('{redis_url}')"]
    os.execv(sys.executable, command)


def flask_app(redis_url: str) -> "Flask":
    from flask import Flask, jsonify
    from redis import Redis

    redis = Redis.from_url(redis_url, protocol=2)
    app = Flask(__name__)

    @app.get("/api/<path:path>")
    def api(path: str) -> "tuple[Response, dict[str, str]]":
        redis.incr(f"url_count:/api/{path}")
        return jsonify(url=f"/api/{path}"), NOSNIFF

    return app


THIS, PLAIN, INCR = "this server", "plain aiohttp", "aiohttp + INCR"
SERVE: dict[str, Callable[[int, str], None]] = {
    PLAIN: serve_plain,
    INCR: serve_incr,
    "FastAPI + uvicorn": serve_fastapi,
    "Flask + gunicorn": serve_flask,
}
NAMES = [THIS, *SERVE]


# --- Processes ------------------------------------------------------------------------------------
# What is started here is stopped here, on Ctrl-C too.


class Process(NamedTuple):
    pid: int
    port: int


class Plan(NamedTuple):
    rounds: int
    connections: tuple[int, ...]
    url_sets: tuple[int, ...]  # distinct URLs requested
    sizes: tuple[int, ...]  # URLs in Redis when the statistics are read


FULL = Plan(9, (1, 64, 256), (1_000, 1_000_000), (1_000, 100_000, 1_000_000))
QUICK = Plan(1, (1, 64), (1_000, 10_000), (1_000, 10_000))


class Lab(NamedTuple):
    """What every measurement needs."""

    plan: Plan
    folder: Path
    redis: Process
    client: "Redis"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def running(command: list[str], port: int, folder: Path, path: str) -> Iterator[Process]:
    """The process, once it answers GET path, or accepts connections if path is empty."""
    log = folder / f"{port}.log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            while not answers(port, path):
                if process.poll() is not None:
                    sys.exit(f"bench.py: {' '.join(command)}: {log.read_text()[-500:].strip()}")
                time.sleep(0.02)
            yield Process(process.pid, port)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def answers(port: int, path: str) -> bool:
    connection = HTTPConnection(HOST, port, timeout=1)
    try:
        connection.connect()
        if path:
            connection.request("GET", path)
        return not path or connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


@contextmanager
def laboratory(plan: Plan) -> Iterator[Lab]:
    """A Redis of our own, and a client for it."""
    from redis import Redis

    port = free_port()
    command = ["redis-server", "--bind", HOST, "--port", str(port), "--save", ""]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "wrk.lua").write_text(WRK_SCRIPT)
        command += ["--appendonly", "no", "--dir", name]
        with running(command, port, Path(name), "") as redis:
            yield Lab(plan, Path(name), redis, Redis(HOST, port, protocol=2, socket_timeout=60))


@contextmanager
def started(lab: Lab, name: str, database: int = 0) -> Iterator[Process]:
    port, url = free_port(), f"redis://{HOST}:{lab.redis.port}/{database}"
    command, path = [str(HERE / "bench.py"), "serve", name, str(port), url], "/api/ready/"
    if name == THIS:
        command, path = (
            [str(HERE / "server.py"), "--port", str(port), "--redis-url", url],
            "/health",
        )
    with running([sys.executable, *command], port, lab.folder, path) as process:
        yield process


def cpu_seconds(pid: int) -> float:
    """User and system time that a process and its children have taken."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


def memory_mb(pid: int, field: str) -> float:
    """VmRSS, now, or VmHWM, the most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1000


# --- Requests a second ----------------------------------------------------------------------------
# URLs are drawn at random, the same ones for every server; each has a database of its own, empty at
# first. So nearly all hits on 1,000 URLs find their key, and most of those on 1,000,000 make one.

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
    rate: float  # requests a second
    p50: float  # latencies in ms
    p99: float
    worst: float
    cpu: float  # microseconds of a request: in the server,
    redis_cpu: float  # in Redis
    errors: float


Results = dict[tuple[int, int, str], list[Sample]]  # by distinct URLs, connections, server


def wrk(lab: Lab, server: Process, urls: int, connections: int, seed: int) -> Sample:
    """A second of traffic. The same seed requests the same URLs."""
    command = ["wrk", "-t1", f"-c{connections}", "-d1s", "-s", f"{lab.folder}/wrk.lua"]
    command += [f"http://{HOST}:{server.port}", "--", str(urls), str(seed)]
    before = cpu_seconds(server.pid), cpu_seconds(lab.redis.pid)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = cpu_seconds(server.pid), cpu_seconds(lab.redis.pid)
    requests, took, p50, p99, worst, errors = json.loads(output.splitlines()[-1])
    cpu, redis_cpu = [(b - a) * 1e6 / max(requests, 1) for a, b in zip(before, after, strict=True)]
    return Sample(requests * 1e6 / took, p50 / 1e3, p99 / 1e3, worst / 1e3, cpu, redis_cpu, errors)


def medians(samples: list[Sample]) -> Sample:
    return Sample(*map(median, zip(*samples, strict=True)))


def compare(lab: Lab) -> Results:
    """All servers, in turns; in each round new ones, and another one first."""
    plan = lab.plan
    results: Results = {k: [] for k in product(plan.url_sets, plan.connections, NAMES)}
    for urls in plan.url_sets:
        lab.client.flushall()
        for turn in range(1, plan.rounds + 1):
            measure_round(lab, urls, turn, results)
    return results


def measure_round(lab: Lab, urls: int, turn: int, results: Results) -> None:
    with ExitStack() as stack:
        servers = {n: stack.enter_context(started(lab, n, i)) for i, n in enumerate(NAMES)}
        for server in servers.values():
            wrk(lab, server, 1000, 64, 0)  # warms it up
        for conns in lab.plan.connections:
            for name in NAMES[turn % len(NAMES) :] + NAMES[: turn % len(NAMES)]:
                sample = wrk(lab, servers[name], urls, conns, turn * 1000 + conns)
                results[urls, conns, name].append(sample)
            rates = ", ".join(f"{results[urls, conns, n][-1].rate:,.0f}" for n in NAMES)
            say(f"{urls:,} URLs, round {turn}/{lab.plan.rounds}, -c{conns}: {rates} req/s")


SPEED = """
{:,} distinct URLs:

| | conns | req/s | ÷ plain | ÷ INCR | p50 ms | ÷ INCR | p99 ms | CPU µs | Redis µs |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def print_speed(results: Results) -> None:
    middle = {key: medians(samples) for key, samples in results.items()}
    last = 0
    for (urls, conns, name), own in middle.items():
        if urls != last:
            print(SPEED.format(urls))
        last = urls
        plain, incr = middle[urls, conns, PLAIN], middle[urls, conns, INCR]
        rates = f"{own.rate:,.0f} | {own.rate / plain.rate:.2f} | {own.rate / incr.rate:.2f}"
        latency = f"{own.p50:.2f} | {own.p50 / incr.p50:.2f} | {own.p99:.2f}"
        print(f"| {name} | {conns} | {rates} | {latency} | {own.cpu:.0f} | {own.redis_cpu:.0f} |")
    errors = sum(sample.errors for samples in results.values() for sample in samples)
    print(f"\nFailed requests: {errors:.0f}. {spread(results)}", flush=True)


def spread(results: Results) -> str:
    """How noisy the machine was."""
    cells = [sorted(sample.rate for sample in samples) for samples in results.values()]
    apart = [(rates[-1] - rates[0]) / median(rates) for rates in cells]
    return f"Slowest and fastest round of a row are {median(apart):.0%} apart (median of the rows)."


# --- Statistics -----------------------------------------------------------------------------------
# Redis is filled with counts alone, as an earlier version leaves them. The server takes them over
# when it starts; then the ranking is read through it and without it.

PAGE = 1000  # URLs that one command reads


def milliseconds(action: Callable[[], object], times: int = 1) -> float:
    """The median of some repetitions."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        found.append((time.perf_counter() - begun) * 1000)
    return median(found)


def fill(redis: "Redis", urls: int) -> None:
    """Counts as in life: few of them large."""
    draw = Random(7)
    for start in range(0, urls, PAGE):
        page = range(start, min(start + PAGE, urls))
        redis.mset({f"url_count:/api/products/{n}/": int(draw.paretovariate(0.7)) for n in page})


def bytes_used(redis: "Redis") -> int:
    info: Any = redis.info("memory")
    return int(info["used_memory"])


def scan_mget_sort(redis: "Redis") -> list[tuple[int, bytes]]:
    """The ranking without an index."""
    keys, counts = list(redis.scan_iter("url_count:*", count=PAGE)), []
    for start in range(0, len(keys), PAGE):
        page: Any = redis.mget(keys[start : start + PAGE])
        counts += [int(hits) for hits in page]
    return sorted(zip(counts, keys, strict=True), reverse=True)


def read_index(redis: "Redis", urls: int) -> None:
    """The ranking by redis-py alone, page by page."""
    for start in range(0, urls, PAGE):
        redis.zrevrange("url_rank", start, start + PAGE - 1, withscores=True)


def read_list(port: int) -> int:
    """The ranking by GET /stats/: its bytes."""
    connection, size, buffer = HTTPConnection(HOST, port), 0, bytearray(1 << 18)
    connection.request("GET", "/stats/")
    response = connection.getresponse()
    while got := response.readinto(buffer):
        size += got
    connection.close()
    return size


def page_times(lab: Lab, port: int, urls: int) -> str:
    connection = HTTPConnection(HOST, port)

    def get(offset: int) -> None:
        connection.request("GET", f"/stats/?limit=100&offset={offset}")
        connection.getresponse().read()

    get(0)
    top, middle = milliseconds(lambda: get(0), 200), milliseconds(lambda: get(urls // 2), 200)
    connection.close()
    unindexed = milliseconds(lambda: scan_mget_sort(lab.client), 3)
    return f"{top:.2f} | {middle:.2f} | {unindexed:,.1f} | {unindexed / top:,.0f}"


def list_times(lab: Lab, server: Process, urls: int) -> None:
    """The whole list beside redis-py alone, in turns, and what it takes of memory."""
    before, ours, alone = memory_mb(server.pid, "VmRSS"), [], []
    for _ in range(3):
        ours.append(milliseconds(lambda: read_list(server.port)))
        alone.append(milliseconds(lambda: read_index(lab.client, urls)))
    peak, size = memory_mb(server.pid, "VmHWM"), read_list(server.port) / 1e6
    print(f"| whole list by `/stats/`, {size:.1f} MB | {median(ours):,.0f} ms |")
    print(f"| redis-py alone, the same pages of {PAGE:,} | {median(alone):,.0f} ms |")
    print(f"| speed of the list ÷ redis-py alone | {median(alone) / median(ours):.2f} |")
    print(f"| server's memory before → at most | {before:.1f} → {peak:.1f} MB |")


def latency_beside_list(lab: Lab, server: Process) -> None:
    """One client's requests, while nobody and while somebody reads the whole list."""
    quiet, busy = [], []
    for turn in range(max(3, lab.plan.rounds)):
        quiet.append(wrk(lab, server, 1000, 1, turn))
        with ThreadPoolExecutor() as pool:
            sample = pool.submit(wrk, lab, server, 1000, 1, turn)
            while not sample.done():
                read_list(server.port)
        busy.append(sample.result())
    for name, found in ("alone", medians(quiet)), ("while the list streams", medians(busy)):
        cells = f"{found.p50:.2f}, {found.p99:.2f}, {found.worst:.2f} ms"
        print(f"| `/api/` {name}: p50, p99, max | {cells} |")


STATISTICS = """
`/stats/?limit=100` in ms, beside redis-py without an index:

| URLs | top 100 | in the middle | SCAN + MGET + sort | ÷ top 100 |
|---:|---:|---:|---:|---:|"""


def print_statistics(lab: Lab) -> None:
    print(STATISTICS)
    for urls in lab.plan.sizes:
        say(f"statistics of {urls:,} URLs")
        lab.client.flushall()
        used = [bytes_used(lab.client)]
        fill(lab.client, urls)
        used.append(bytes_used(lab.client))
        begun = time.perf_counter()
        with started(lab, THIS):
            takeover = time.perf_counter() - begun
        used.append(bytes_used(lab.client))
        with started(lab, THIS) as server:  # another one, whose memory no takeover has touched
            print(f"| {urls:,} | {page_times(lab, server.port, urls)} |", flush=True)
            if urls == lab.plan.sizes[-1]:
                print(f"\n| At {urls:,} URLs | |\n|---|---:|")
                list_times(lab, server, urls)
                latency_beside_list(lab, server)
    counts, index = [(after - used[0]) / urls for after in used[1:]]
    print(
        f"| Redis's memory for one URL: its count, with the index | {counts:.0f}, {index:.0f} B |"
    )
    print(f"| start that takes over counts without an index | {takeover:.1f} s |")


# --- The report -----------------------------------------------------------------------------------


def print_setting(lab: Lab) -> None:
    info: Any = lab.client.info("server")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    wrk_says = subprocess.run(["wrk", "-v"], capture_output=True, text=True).stdout.split()
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    versions += [f"Redis {info['redis_version']}", f"wrk {wrk_says[1]}"]
    print(
        f"{date.today()}, {model[1] if model else platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {', '.join(versions)}. "
        f"Medians of {lab.plan.rounds} rounds of a second, in turns; ÷ is a ratio of medians. "
        "One process a server, uvloop, no access log; Redis without append-only file. wrk, Redis "
        "and the servers share the machine. CPU is that of one request."
    )


def check_tools() -> None:
    """One line that says what to install, rather than a traceback half-way."""
    if sys.platform != "linux":
        sys.exit("bench.py: only Linux will do: CPU time and memory are read from /proc")
    for tool in ("wrk", "redis-server"):
        if not shutil.which(tool):
            sys.exit(f"bench.py: no {tool} here: apt-get install {tool}")
    for package in PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            sys.exit(f"bench.py: no {package} here: pip install -r requirements-dev.txt")


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        _, _, name, port, redis_url = sys.argv
        SERVE[name](int(port), redis_url)
        return
    check_tools()
    quick = "--quick" in sys.argv or os.environ.get("QUICK", "") not in ("", "0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.monotonic()
    try:
        with laboratory(QUICK if quick else FULL) as lab:
            print_setting(lab)
            print_speed(compare(lab))
            print_statistics(lab)
    except KeyboardInterrupt:
        sys.exit(130)
    say(f"done in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
