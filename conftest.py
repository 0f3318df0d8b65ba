"""What the tests run against: our own Redis and server processes, a spoiling proxy, clients.

Nothing here sleeps and hopes: what takes time is polled for. No Redis but our own is touched.
What a test starts ends with it, whatever becomes of the test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import aiohttp
import hypothesis
import pytest
import redis
from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

import server

HERE = Path(__file__).parent
NO_REDIS = "redis://127.0.0.1:1/0"  # nobody listens there
PATIENCE = 30  # seconds for what takes one at most, for the machine may be busy

# A signal that our starter ignores would be ignored by all that we start, too. One that is
# handled is not, so it gets a handler that does nothing. The others end the tests as Ctrl-C
# does, so that what they have started ends, too.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
    else:
        signal.signal(number, signal.default_int_handler)

hypothesis.settings.register_profile(
    "ours",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("ours")


def missing(what: str) -> None:
    """A test cannot run here; where CI is set everything must be there, so there it fails."""
    if os.environ.get("CI"):
        pytest.fail(f"CI needs {what}")
    pytest.skip(f"needs {what}")


def free_port() -> int:
    """Below those that the system gives to clients, or one of them could take it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


# --- Waiting --------------------------------------------------------------------------------


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Poll until condition() is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """until() for code that is not async. It stops the event loop: no task goes on meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# --- Documents ------------------------------------------------------------------------------


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


# --- Programs -------------------------------------------------------------------------------


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test enters here ends with it."""
    with ExitStack() as stack:
        yield stack


def run(
    *command: str, given: str = "", cwd: Path = HERE, **env: str
) -> subprocess.CompletedProcess[str]:
    """A program from start to end. It stops the event loop: no task goes on meanwhile."""
    with ExitStack() as stack:
        pipe = subprocess.PIPE
        process = launched(stack, list(command), pipe, os.environ | env, cwd, pipe, pipe)
        out, err = process.communicate(given.encode(), timeout=120)
        code = process.returncode
        return subprocess.CompletedProcess(command, code, out.decode(), err.decode())


def launched(
    stack: ExitStack,
    command: list[str],
    out: Any = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = HERE,
    err: Any = subprocess.STDOUT,
    given: Any = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """A process that ends with the stack. Without out, what it prints is thrown away."""
    process = subprocess.Popen(
        command,
        stdin=given,
        stdout=subprocess.DEVNULL if out is None else out,
        stderr=err,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )
    stack.callback(end, process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and all that it has started."""
    if process.returncode is None:  # nobody has waited for it, so the number is still its own
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


# --- Redis ----------------------------------------------------------------------------------


class RedisServer:
    """A redis-server of our own, on its own port and folder; a confirmed write is on disk."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        if not shutil.which("redis-server"):
            missing("redis-server")
        self.stack = stack
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client: Any = redis.Redis.from_url(self.url, protocol=2, decode_responses=True)
        stack.callback(self.client.close)
        self.start()

    def start(self, options: str = "", wait: bool = True) -> None:
        command = f"redis-server --port {self.port} --bind 127.0.0.1 --dir {self.folder} --save ''"
        command += " --appendonly yes --appendfsync always --enable-debug-command local"
        command += " --repl-diskless-sync-delay 0 --user bob on '>x' '~*' '&*' '+@all' "
        self.process = launched(self.stack, shlex.split(command + options))
        if wait:
            wait_for(self.answers)

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def loads(self) -> bool:
        try:
            return not self.client.ping()
        except redis.RedisError as error:
            return isinstance(error, redis.BusyLoadingError)

    def kill(self) -> None:
        end(self.process)
        self.client.close()

    def counts(self) -> dict[str, int]:
        """The truth: what the url_count: keys hold."""
        keys = list(self.client.scan_iter("url_count:*", 1000))
        values = map(int, self.client.mget(keys) if keys else [])
        return dict(zip((key.removeprefix("url_count:") for key in keys), values, strict=True))

    def ranking(self, day: str = "") -> dict[str, int]:
        """The list of all time or of one day."""
        rows = self.client.zrange(server.of_day("url_rank", day), 0, -1, withscores=True)
        return {url: int(count) for url, count in rows}

    def days(self) -> dict[str, dict[str, int]]:
        """The lists of all days that are kept."""
        names = [key.partition(":")[2] for key in self.client.scan_iter("url_rank:*", 1000)]
        return {day: self.ranking(day) for day in names}

    def day_counts(self) -> Counter[str]:
        """The sum of the days."""
        return sum(map(Counter, self.days().values()), Counter())

    def total(self, day: str = "") -> int:
        return int(self.client.get(server.of_day("url_total", day)) or 0)

    def check_index(self) -> None:
        """url_rank and url_total say what the url_count: keys say, and each day adds up."""
        counts = self.counts()
        assert self.ranking() == counts
        assert self.total() == sum(counts.values())
        for day, counts_of_day in self.days().items():
            assert self.total(day) == sum(counts_of_day.values())


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
    """The Redis that all tests share, empty."""
    redis_process.client.flushall()
    return redis_process


@pytest.fixture(autouse=True)
def no_local_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without REDIS_URL the server would try the machine's own Redis, which is not ours."""
    monkeypatch.setattr(server, "LOCAL_REDIS", NO_REDIS)


@pytest.fixture(params=["redis", "memory"])
def redis_url(request: pytest.FixtureRequest) -> str:
    """What the tests of both stores run on."""
    return str(request.getfixturevalue("redis_server").url) if request.param == "redis" else ""


# --- Requests -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Http:
    """Whatever answers on a port of 127.0.0.1: the one way to send a request."""

    port: int

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(
        self,
        target: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Send a request whose target nobody tidies up, by a connection of its own."""
        url = URL(self.base + target, encoded=True)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
            session.request(method, url, headers=headers, data=body) as response,
        ):
            return Answer(response.status, response.headers, await response.read())

    async def hit(self, **counts: int) -> None:
        """Request /api/<name>/ so many times."""
        for name, n in counts.items():
            for _ in range(n):
                assert (await self.ask(f"/api/{name}/")).status == 200

    async def stats(self, query: str = "") -> dict[str, int]:
        """The list, as {url: count} in its order."""
        answer = await self.ask(f"/stats/{query}")
        assert answer.status == 200, answer
        return {row["url"]: row["count"] for row in answer.json}

    async def metrics(self) -> Samples:
        """Every sample of /metrics, read by the library's own parser."""
        answer = await self.ask("/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(answer.body.decode())
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


@asynccontextmanager
async def dialled(
    port: int, limit: int = 1 << 16
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that ends with the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def talk(port: int, data: bytes, patience: float = PATIENCE) -> bytes:
    """All that a server says to these bytes until it closes, or says nothing for a while."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock, suppress(OSError):
        sock.settimeout(patience)
        sock.sendall(data)
        while chunk := sock.recv(1 << 16):
            said += chunk
    return said


# --- The server -----------------------------------------------------------------------------


class App(Http):
    """The application, in this process."""

    def __init__(self, app: web.Application, port: int) -> None:
        self.app = app
        self.port = port

    @property
    def commits(self) -> server.GroupCommit:
        return self.app[server.GROUP_COMMIT]


ClientOf = Callable[..., Awaitable[App]]


def settings_of(redis_url: str = "", **changes: Any) -> argparse.Namespace:
    """The defaults, but for what is given."""
    defaults = {name.lower(): default for name, default, *_ in server.OPTIONS}
    return argparse.Namespace(**defaults | {"redis_url": redis_url} | changes)


@pytest.fixture
def client_of(aiohttp_server: Callable[..., Awaitable[TestServer]]) -> ClientOf:
    """A function that starts the application in this process."""

    async def start(redis_url: str = "", **settings: Any) -> App:
        app = server.create_app(settings_of(redis_url, **settings))
        started = await aiohttp_server(app)
        assert started.port
        return App(app, started.port)

    return start


@asynccontextmanager
async def group_commit(store: server.Store) -> AsyncIterator[server.GroupCommit]:
    """Group commit alone, without the application."""
    commits = server.GroupCommit(store)
    task = asyncio.create_task(commits.run())
    try:
        yield commits
    finally:
        task.cancel()
        await asyncio.wait([task])
        await store.close()


@pytest.fixture
async def client(client_of: ClientOf, redis_url: str) -> App:
    """The application on each store in turn."""
    return await client_of(redis_url)


class Server(Http):
    """server.py as a process. `code` may tune it first, or be something else altogether."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        redis_url: str = "",
        *arguments: str,
        code: str = "server.main()",
        wait: bool = True,
        **env: str,
    ) -> None:
        port = env.get("PORT", "")
        self.port = int(port) if port.isdecimal() else free_port()
        self.log = folder / f"log{len(os.listdir(folder))}"
        code = f"import server; server.LOCAL_REDIS = {NO_REDIS!r}\n{code}"
        kept = {"PATH": os.environ["PATH"], "PORT": str(self.port), "REDIS_URL": redis_url}
        command = [sys.executable, "-uc", code, *arguments]
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

    def uncommitted(self) -> Counter[str]:
        """The hits that its log says are not committed."""
        found = Counter[str]()
        for event in self.events():
            if event["event"] == "hits not committed":
                assert event["hits"] == sum(event["urls"].values())
                found.update(event["urls"])
        return found

    def kill(self) -> None:
        end(self.process)

    def ends(self) -> int:
        """Its exit code, when it has ended."""
        return self.process.wait(timeout=PATIENCE)

    async def stop(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return await asyncio.to_thread(self.ends)


Serve = Callable[..., Server]


@pytest.fixture
def serve(stack: ExitStack, tmp_path: Path) -> Serve:
    """A function that starts the server as a process: serve(redis_url, *flags, **variables)."""
    return partial(Server, stack, tmp_path)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process for all that is done to one in a module. It does not log each of it."""
    with ExitStack() as stack:
        process = Server(stack, tmp_path_factory.mktemp("victim"))
        yield process
        process.process.terminate()
        assert process.ends() == 0
        assert len(process.log.read_text().splitlines()) < 10


async def settled(process: Http, *statuses: int) -> dict[str, Any]:
    """/health of a server that runs and holds no hits any more, or that has such a status."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with suppress(aiohttp.ClientError):
                answer = await process.ask("/health")
                report: dict[str, Any] = answer.json
                idle = answer.status == 200 and report["pending"] == 0
                if idle or answer.status in statuses:
                    return report
            await asyncio.sleep(0.05)


class Calendar:
    """The day that the server sees."""

    def __init__(self) -> None:
        self.today = date(2026, 11, 25)

    def utc_day(self, ago: int = 0) -> str:
        return str(self.today - timedelta(days=ago))

    def midnight(self, days: int = 1) -> None:
        self.today += timedelta(days=days)


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    calendar = Calendar()
    monkeypatch.setattr(server, "utc_day", calendar.utc_day)
    return calendar


# --- nginx -----------------------------------------------------------------------------------


class Nginx(Http):
    """A real nginx with this in its http { }, and all its files in a folder."""

    def __init__(self, stack: ExitStack, folder: Path, port: int, http: str) -> None:
        folder.mkdir(exist_ok=True)
        self.stack = stack
        self.port = port
        self.log = folder / "error.log"
        conf = folder / "nginx.conf"
        kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        folders = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
        conf.write_text(
            f"daemon off; user root; pid {folder}/pid; events {{ }}\n"  # unless root, it stays us
            f"http {{ access_log {folder}/access.log combined; {folders}\n{http} }}\n"
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
        self.process.wait(timeout=PATIENCE)
        self.start()

    async def visit(
        self, target: str = "/", method: str = "GET", host: str = "x", agent: str = "Mozilla/5.0"
    ) -> int:
        """The status of the answer. A target may hold any bytes."""
        length = "Content-Length: 5\r\n" if method == "POST" else ""
        head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {agent}\r\n{length}"
        body = "12345" if length else ""
        request = f"{head}Connection: close\r\n\r\n{body}".encode("utf-8", "surrogateescape")
        said = await asyncio.to_thread(talk, self.port, request)
        return int(said.split()[1])


# --- Under fire -----------------------------------------------------------------------------
# The promise: an answered request is in Redis exactly once. The check is that of Jepsen's
# counter: for every URL, answered <= count <= answered + cut off without an answer.


class Proxy:
    """Stands between the server and Redis, and spoils commits on demand."""

    def __init__(self, redis_port: int) -> None:
        self.redis_port = redis_port
        self.port = 0
        self.swallow = 0  # replies to commits still to be dropped, and their line cut
        self.delay = 0  # commits still to be held back while their line is cut
        self.latency = 0.0  # seconds that each reply takes longer
        self.rate = 10**9  # bytes a second to Redis
        self.late: list[tuple[bytes, asyncio.StreamWriter]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)
        for writer in list(self.writers):
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def cut(self) -> None:
        """Break all connections off, with a reset."""
        at_once = struct.pack("ii", 1, 0)  # without it the other side would see a tidy end
        for writer in self.writers:
            if not writer.is_closing():
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
                writer.transport.abort()

    def deliver_late(self) -> None:
        """Hand the commits that were held back to Redis, long after their copies."""
        for data, to_redis in self.late:
            to_redis.write(data)
        self.late.clear()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        self.writers.add(writer)
        try:
            from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self.redis_port)
        except OSError:
            writer.close()
            return
        self.writers.add(to_redis)
        dropping = asyncio.Event()
        back = asyncio.create_task(self.pass_back(from_redis, writer, dropping))
        self.tasks.add(back)
        with suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 20):
                commit = b"EVAL" in data or b"INCR" in data
                if commit and self.delay:
                    self.delay -= 1
                    self.late.append((data, to_redis))
                    writer.close()
                    return
                if commit and self.swallow:
                    self.swallow -= 1
                    dropping.set()
                await asyncio.sleep(len(data) / self.rate)
                to_redis.write(data)
        back.cancel()
        writer.close()
        to_redis.close()

    async def pass_back(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dropping: asyncio.Event
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 20):
                await asyncio.sleep(self.latency)
                if dropping.is_set():
                    break
                writer.write(data)
        writer.close()


class Load:
    """Clients that never retry, and note what became of every request."""

    def __init__(self, port: int, urls: int = 50, clients: int = 16) -> None:
        self.port = port
        self.urls = urls
        self.clients = clients
        self.answered: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()  # by status line
        self.slowest = 0.0
        self.stopping = False

    async def __aenter__(self) -> Self:
        self.tasks = [asyncio.create_task(self.client(n)) for n in range(self.clients)]
        try:
            await self.more(200)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping = True
        done, hanging = await asyncio.wait(self.tasks, timeout=PATIENCE)
        for task in hanging:
            task.cancel()
        if hanging:
            await asyncio.wait(hanging)
        for task in done:
            task.result()
        assert not hanging, f"{len(hanging)} requests were never answered"

    async def more(self, n: int) -> None:
        """Return when n more requests have been answered."""
        goal = self.answered.total() + n
        await until(lambda: self.answered.total() >= goal)

    async def client(self, number: int) -> None:
        with suppress(ConnectionError):  # the server has stopped
            while not self.stopping:
                async with dialled(self.port) as (reader, writer):
                    while not self.stopping and await self.request(reader, writer, number):
                        number += 1

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
        """Nothing is lost, nothing counts twice, no request failed; `pytest -rP` shows the row.

        Nor in the list of the day, or of two days if midnight came between.
        """
        lost, double = self.load.lost_and_double(self.redis.counts())
        failed = self.load.failed.total()
        slowest = self.load.slowest
        test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].removesuffix(" (call)")
        answered = self.load.answered.total()
        print(f"| {test} | {answered} | {lost} | {double} | {failed} | {slowest:.2f} s |")
        assert (lost, double, failed) == (0, 0, 0)
        assert self.load.lost_and_double(self.redis.day_counts()) == (0, 0)
        self.redis.check_index()


RigOf = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def rig_of(own_redis: MakeRedis, serve: Serve) -> AsyncIterator[RigOf]:
    """A function that starts a Rig; what it is given goes to serve()."""
    async with AsyncExitStack() as proxies:

        async def start(user: str = "", **options: Any) -> Rig:
            redis_server = own_redis()
            proxy = await proxies.enter_async_context(Proxy(redis_server.port))
            process = serve(f"redis://{user}127.0.0.1:{proxy.port}/0", wait=False, **options)
            await until(process.serves)
            return Rig(redis_server, proxy, process, Load(process.port))

        yield start
