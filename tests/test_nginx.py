"""docs/site.md and the pairs of docs/operations.md: every block as it stands, in a real nginx."""

from __future__ import annotations

import asyncio
import configparser
import csv
import gzip
import json
import random
import re
import shlex
import shutil
import signal
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import server
from conftest import (
    HERE,
    PATIENCE,
    Http,
    Load,
    MakeRedis,
    Nginx,
    RedisServer,
    Serve,
    Server,
    block,
    free_port,
    launched,
    missing,
    run,
    settled,
    talk,
    wait_for,
    with_ports,
)

SITE = "docs/site.md"
TODAY = server.utc_day
PASSWORD = {"Authorization": "Basic " + b64encode(b"owner:secret").decode()}


@pytest.fixture(autouse=True)
def tools() -> None:
    for program in ("nginx", "jq", "curl", "openssl"):
        if not shutil.which(program):
            missing(program)


# --- A site that exists ---------------------------------------------------------------------


@dataclass
class Site:
    """A site behind nginx, which tells the tracker of each visit."""

    redis: RedisServer
    tracker: Server
    nginx: Nginx
    files: Http  # a second site, with an index and an error page

    async def counts(self) -> Counter[str]:
        """Of the site's URLs, when the tracker has counted all that nginx tells it."""
        await asyncio.to_thread(self.nginx.restart)
        await settled(self.tracker)
        return Counter({url.removeprefix("/api"): n for url, n in self.redis.counts().items()})


def line_of_doc(words: str) -> str:
    """What the text shows as a line to add."""
    (line,) = re.findall(rf"`(\S*{words}[^`]*;)`", (HERE / SITE).read_text())
    return str(line)


SiteOf = Callable[..., Site]


@pytest.fixture
def site_of(tmp_path: Path, redis_server: RedisServer, serve: Serve, stack: ExitStack) -> SiteOf:
    """A function that starts a Site; `edit` changes a line of what is to be included."""

    def start(edit: tuple[str, str] = ("", ""), more: str = "") -> Site:
        tracker = serve(redis_server.url)
        ports = {80: free_port(), 8000: free_port()}
        shared = {5000: tracker.port, 5080: free_port()}
        conf = with_ports(block(SITE, "nginx", "tracker_door {"), shared)
        conf = conf.replace('xml)$" 1;\n', f'xml)$" 1;\n{line_of_doc("intern")}\n')
        conf += with_ports(block(SITE, "nginx", "include count-site.conf"), ports)
        assert edit[0] in block(SITE, "nginx", "mirror /-/count")
        folder = tmp_path / "nginx"
        folder.mkdir()
        included = block(SITE, "nginx", "mirror /-/count").replace(*edit)
        (folder / "count-site.conf").write_text(included)
        for name in ("index.html", "404.html", "style.css"):
            (tmp_path / name).touch()
        files = Http()
        files.port = free_port()
        conf += f"""
            server {{ listen 127.0.0.1:{ports[8000]}; access_log off;
                location / {{ return 200 "the site"; }} }}
            server {{ listen 127.0.0.1:{files.port}; server_name files.example.com;
                root {tmp_path}; error_page 404 /404.html; include count-site.conf; {more}
                location /moved {{ return 301 /; }} }}"""
        nginx = Nginx(stack, folder, ports[80], conf)
        return Site(redis_server, tracker, nginx, files)

    return start


async def test_a_mirrored_site_is_counted_and_no_visitor_notices_a_dead_tracker(
    site_of: SiteOf, serve: Serve
) -> None:
    site = site_of()
    async with Load(site.nginx.port) as up:
        await up.more(1000)
    assert await site.counts() == up.answered
    async with Load(site.nginx.port) as load:
        site.tracker.kill()
        await load.more(1000)
        site.tracker = serve(site.redis.url, wait=False, PORT=str(site.tracker.port))
        await settled(site.tracker)
        await load.more(500)
    async with Load(site.nginx.port) as again:
        await again.more(500)
    for each in (up, load, again):
        assert not each.failed + each.unknown
        print(f"{each.answered.total()} visits, slowest {each.slowest:.3f} s")
    counts = await site.counts() - up.answered
    assert again.answered <= counts <= load.answered + again.answered
    site.redis.check_index()
    assert "upstream" not in site.nginx.log.read_text()


async def test_a_dead_tracker_would_fill_the_error_log_but_for_the_door(site_of: SiteOf) -> None:
    """The control of the last line above."""
    site = site_of(("http://tracker_door/", "http://tracker/"))
    site.tracker.kill()
    assert await site.nginx.visit() == 200
    wait_for(lambda: "upstream" in site.nginx.log.read_text())


async def test_a_visit_waits_for_a_tracker_that_hangs_at_most_its_timeout(site_of: SiteOf) -> None:
    site = site_of()
    async with Load(site.nginx.port) as normal:
        pass
    site.tracker.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    async with Load(site.nginx.port) as load:  # 200 visits by 16 clients: 12 of each in turn
        pass
    assert time.monotonic() - started > 0.3, "it did not hang"
    print(f"slowest {normal.slowest:.3f} s, with a tracker that hangs {load.slowest:.3f} s")
    assert load.slowest < normal.slowest + 3  # 0.2 s, on a busy machine more
    assert not load.failed + load.unknown


async def test_a_visit_counts_once_under_the_url_as_nginx_reads_it(site_of: SiteOf) -> None:
    site = site_of()
    spelled = {"/": "/", "/a?x=/b/": "/a/", "/x//y": "/x/y/", "//x": "/x/", "/a%2Fb": "/a/b/",
        "/%C3%A9": "/é/", "/é2": "/é2/", "/q?q=ü": "/q/", "/r?\udcff": "/r/", "/\udcfe": "/%FE/",
        "/e/../f/": "/f/", "/g/%2E%2e/h": "/h/", "/%FF": "/%FF/", "/%0A": "/\n/",
        "/+%2B": "/++/", "/api/a": "/api/a/", "/%3Fx%23": "/?x#/", "/100%25": "/100%/",
        '/"|\\^{}': '/"|\\^{}/', "/%20b": "/ b/", "/" + "x" * 2042: f"/{'x' * 2042}/",
    }  # fmt: skip
    for target in spelled:
        for method in ("GET", "HEAD", "POST", "PURGE"):
            assert await site.nginx.visit(target, method) == 200, target
    assert await site.nginx.visit("/-/count") == 404  # nobody counts from outside
    agent = {"User-Agent": "Mozilla/5.0"}
    for path, status in ("/?1", 200), ("/none", 404):  # index and error page
        assert (await site.files.ask(path, headers=agent)).status == status
    assert b" 301 " in talk(site.files.port, b"GET /moved HTTP/1.0\r\n\r\n")
    expected = Counter(dict.fromkeys(spelled.values(), 4)) + Counter(["/", "/none/"])
    assert await site.counts() == expected
    assert "uninitialized" not in site.nginx.log.read_text()


async def test_files_and_bots_do_not_count(site_of: SiteOf) -> None:
    site = site_of()
    for file in ("/style.css", "/A.JPG?v=2", "/font.woff2", "/robots.txt", "/intern/x"):
        assert await site.nginx.visit(file) == 200
    for bot in ("Googlebot/2.1", "curl/8.0", "python-requests/2", "Mozilla (X; bingbot/2.0)"):
        assert await site.nginx.visit("/page", agent=bot) == 200
    assert await site.nginx.visit("/css/page.html") == 200
    assert await site.counts() == Counter(["/css/page.html/"])


async def test_two_sites_count_each_under_its_name(site_of: SiteOf) -> None:
    line = block(SITE, "nginx", "$server_name")
    site = site_of(("    proxy_pass http://tracker_door/api$path_only;\n", line))
    names = ("www.example.com", "evil.example.com")  # a name that nobody has is the first site's
    for host in names:
        assert await site.nginx.visit("/shop?x", host=host) == 200
    await site.files.ask("/none", headers={"User-Agent": "Mozilla/5.0"})
    counts = {"/www.example.com/shop/": 2, "/files.example.com/none/": 1}
    assert await site.counts() == counts
    found = await site.tracker.stats("?contains=/www.example.com/")
    assert found == {"/api/www.example.com/shop/": 2}


# --- A look at it ---------------------------------------------------------------------------


def passwords(folder: Path) -> str:
    """The file that the documented command makes."""
    command = block(SITE, "sh", "openssl passwd").replace("/etc/nginx/", f"{folder}/")
    command = command.replace("-apr1", "-apr1 -stdin")  # there is no terminal here
    assert run("bash", "-ec", command, given="secret\n").returncode == 0
    return str(folder / "tracker.passwords")


async def check_page(nginx: Nginx, tracker: Server, prefix: str) -> None:
    """With the password the page works. Without it nothing does, and nothing counts with it."""
    await tracker.hit(a=2)
    for path in ("", "stats/", "health", "metrics", "stats/api/a/"):
        assert (await nginx.ask(prefix + path)).status == 401
        assert (await nginx.ask(prefix + path, headers=PASSWORD)).status == 200
    page = (await nginx.ask(prefix, headers=PASSWORD)).body
    assert page == (HERE / "dashboard.html").read_bytes()
    found = (await nginx.ask(f"{prefix}stats/?contains=/api/a", headers=PASSWORD)).json
    assert found == [{"count": 2, "url": "/api/a/"}]
    for path in ("api/b", "api//b", "%61pi/b", "stats/../api/b", "/api/b", "test/5", "t%65st/5/"):
        for method in ("GET", "POST"):
            refused = await nginx.ask(prefix + path, method, headers=PASSWORD)
            assert refused.status == 404, path
    assert await tracker.stats() == {"/api/a/": 2}


async def test_the_page_has_a_name_of_its_own_and_a_password(
    tmp_path: Path, redis_server: RedisServer, serve: Serve, stack: ExitStack
) -> None:
    tracker = serve(redis_server.url)
    port = free_port()
    conf = with_ports(block(SITE, "nginx", "server_name stats.example.com"), {80: port})
    conf = conf.replace("/etc/nginx/tracker.passwords", passwords(tmp_path))
    upstream = f"upstream tracker {{ server 127.0.0.1:{tracker.port}; }}\n"
    nginx = Nginx(stack, tmp_path / "nginx", port, upstream + conf)
    await check_page(nginx, tracker, "/")


async def test_the_page_works_under_a_path_of_the_site(site_of: SiteOf, tmp_path: Path) -> None:
    more = block(SITE, "nginx", "location /tracker/ {")
    more = more.replace("/etc/nginx/tracker.passwords", passwords(tmp_path))
    site = site_of(more=more)
    nginx = site.nginx
    nginx.port = site.files.port
    await check_page(nginx, site.tracker, "/tracker/")
    assert (await nginx.ask("/tracker")).status == 401  # nginx leads to /tracker/ by itself
    assert await site.counts() == {"/a/": 2}  # a look is no visit


async def test_the_world_reaches_nothing_but_api(
    tmp_path: Path, redis_server: RedisServer, serve: Serve, stack: ExitStack
) -> None:
    tracker = serve(redis_server.url)
    port = free_port()
    conf = with_ports(block(SITE, "nginx", "server_name count.example.com"), {80: port})
    upstream = f"upstream tracker {{ server 127.0.0.1:{tracker.port}; keepalive 8; }}\n"
    nginx = Nginx(stack, tmp_path / "nginx", port, upstream + conf)
    for path in ("", "stats/", "stats/api/a", "health", "metrics", "test/5", "api/../stats/",
        "api%2F../health", "api/%2e%2e/metrics"):  # fmt: skip
        for method in ("GET", "POST"):
            assert (await nginx.ask("/" + path, method)).status == 404, path
    async with Load(port) as load:
        await load.more(500)
    assert not load.failed + load.unknown
    await settled(tracker)
    assert redis_server.counts() == load.answered


async def test_a_page_counts_itself_when_a_browser_shows_it(
    tmp_path: Path, redis_server: RedisServer, serve: Serve, stack: ExitStack
) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        missing("chromium")
    tracker = serve(redis_server.url)
    line = block(SITE, "html", "sendBeacon").replace("https://count.example.com", tracker.base)
    (tmp_path / "page.html").write_text(line)
    port = free_port()
    conf = f"server {{ listen 127.0.0.1:{port}; default_type text/html; root {tmp_path};"
    conf += " location / { try_files /page.html =404; } }"
    nginx = Nginx(stack, tmp_path / "nginx", port, conf)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    flags += ["--remote-debugging-port=0"]  # or it would end at once
    launched(stack, [str(chromium), *flags, f"{nginx.base}/shop/7"])
    async with asyncio.timeout(PATIENCE):
        while not await tracker.stats():
            await asyncio.sleep(0.1)
    assert await tracker.stats() == {"/api/shop/7/": 1}


def test_ssh_understands_the_tunnel() -> None:
    if not shutil.which("ssh"):
        missing("ssh")
    _, *arguments = shlex.split(block(SITE, "sh", "ssh "))
    parsed = run("ssh", "-G", *arguments)
    assert parsed.returncode == 0
    assert "localforward 8080 [127.0.0.1]:5000\n" in parsed.stdout


def test_the_unit_starts_a_tracker(
    tmp_path: Path, redis_server: RedisServer, stack: ExitStack
) -> None:
    text = block(SITE, "ini", "tracker.service")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    command = unit["Service"]["ExecStart"].replace("/opt/request-stats/.venv/bin/python", "python")
    command = command.replace("/opt/request-stats", str(HERE))
    if shutil.which("systemd-analyze"):
        here = text.replace("/opt/request-stats/.venv/bin/python", sys.executable)
        (tmp_path / "tracker.service").write_text(here)
        verified = run("systemd-analyze", "verify", str(tmp_path / "tracker.service"))
        assert "tracker.service" not in verified.stderr, verified.stderr
    settings = with_ports(unit["Service"]["Environment"], {6379: redis_server.port})
    env = dict(setting.split("=", 1) for setting in settings.split())
    tracker = Http()
    tracker.port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as file:
        start = [sys.executable, *shlex.split(command)[1:]]
        launched(stack, start, file, {**env, "PORT": str(tracker.port)}, tmp_path)
    wait_for(lambda: "started" in log.read_text())
    report = asyncio.run(settled(tracker))
    assert (report["redis"], report["max_test_requests"]) == ("connected", 0)


# --- The questions of an owner --------------------------------------------------------------


@pytest.fixture
def tracker(redis_server: RedisServer, serve: Serve) -> Server:
    return serve(redis_server.url)


def shell(words: str, tracker: Server, edit: tuple[str, str] = ("", "")) -> list[str]:
    """The lines that a documented command prints."""
    command = with_ports(block(SITE, "sh", words), {5000: tracker.port}).replace(*edit)
    done = run("bash", "-ec", f"set -o pipefail\n{command}")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


async def yesterday(redis_server: RedisServer, tracker: Server, **counts: int) -> None:
    """What was counted then."""
    await tracker.hit(**counts)
    await settled(tracker)
    for name in ("url_rank", "url_total"):
        redis_server.client.rename(f"{name}:{TODAY()}", f"{name}:{TODAY(ago=1)}")


async def test_each_question_of_the_table_has_an_answer(
    redis_server: RedisServer, tracker: Server
) -> None:
    await yesterday(redis_server, tracker, old=1, blog=3)
    for page in ("shop/7", "blog/x", "blog/x", "blog/pricing"):
        await tracker.ask(f"/api/{page}")
    table = block_between("| What is requested most?", "A day is one of UTC")
    commands = re.findall(r"`(curl .*?)`", table.replace("\\|", "|"))
    found = []
    for command in commands:
        local = with_ports(command.replace("curl ", "curl -s ", 1), {5000: tracker.port})
        done = run("bash", "-ec", local)
        assert done.returncode == 0
        found.append(done.stdout.split())
    expected = [
        "/api/blog/ 3 /api/blog/x/ 2",
        "/api/blog/x/ 2",
        "/api/blog/ 3 /api/old/ 1",
        "",
        "/api/shop/7/ 1",
        "/api/blog/pricing/ 1",
        "/api/blog/ 3 /api/blog/x/ 2 /api/blog/pricing/ 1",
    ]
    assert len(found) == len(expected)
    for words, wanted in zip(found, expected, strict=True):
        rows = re.findall(r'"count": (\d+), "url": "(.*?)"', " ".join(words))
        assert " ".join(f"{url} {n}" for n, url in rows).startswith(wanted)
    assert found[3] == ["X-Total-Hits:", "4", "X-Total-Count:", "3"]


def block_between(first: str, last: str) -> str:
    text = (HERE / SITE).read_text()
    return text[text.index(first) : text.index(last)]


async def test_what_is_new_today_was_never_requested_before(
    redis_server: RedisServer, tracker: Server
) -> None:
    await yesterday(redis_server, tracker, old=1, both=2)
    await tracker.hit(both=3, new=2, newer=1)
    assert shell("$ever", tracker) == ["2 /api/new/", "1 /api/newer/"]


async def test_what_is_requested_now_leaves_out_what_was_before(tracker: Server) -> None:
    await tracker.hit(a=5, b=1)
    requests = f"curl -s 127.0.0.1:{tracker.port}/api/{{b,b,c}} > /dev/null"
    assert shell("now()", tracker, ("sleep 60", requests)) == ["2 /api/b/", "1 /api/c/"]


async def test_hits_add_up_for_each_part_of_the_site_and_go_into_a_spreadsheet(
    tracker: Server, tmp_path: Path
) -> None:
    for page in ("", "blog/a", "blog/b", "blog/b", "shop/%22a,b%22"):
        await tracker.ask(f"/api/{page}")
    assert shell("group_by", tracker) == ["3 /blog", "1 /", "1 /shop"]
    file = tmp_path / "pages.csv"
    shell("@csv", tracker, ("pages.csv", str(file)))
    with file.open(newline="") as opened:
        rows = list(csv.reader(opened))
    assert rows[:2] == [["hits", "url"], ["2", "/api/blog/b/"]]
    assert ["1", '/api/shop/"a,b"/'] in rows


async def test_what_is_forgotten_is_in_no_list_and_the_totals_stay_right(
    redis_server: RedisServer, tracker: Server
) -> None:
    await yesterday(redis_server, tracker, keep=2, old=3)
    await tracker.hit(keep=1, old=4)
    await tracker.ask('/api/it\'s $HOME "ü*"/')
    report = (await tracker.ask("/test/50/?seed=1", "POST")).json
    functions = with_redis(block(SITE, "sh", "forget() {"), redis_server)
    start = ["bash", "-ec", 'set -o pipefail; eval "$functions"; eval "$1"', "bash"]
    for url in ("/api/old/", "/api/never/", '/api/it\'s $HOME "ü*"/'):
        assert run(*start, f"forget {shlex.quote(url)}", functions=functions).returncode == 0
    for segment in report["segments"]:
        command = with_ports(block(SITE, "sh", "read -r url"), {5000: tracker.port})
        done = run(*start, command.replace("a5cd68", segment), functions=functions)
        assert (done.returncode, done.stderr) == (0, "")
    assert redis_server.counts() == {"/api/keep/": 3}
    assert redis_server.days() == {TODAY(): {"/api/keep/": 1}, TODAY(ago=1): {"/api/keep/": 2}}
    await tracker.hit(old=1)
    assert await tracker.stats() == {"/api/keep/": 3, "/api/old/": 1}
    redis_server.check_index()


def with_redis(command: str, redis_server: RedisServer) -> str:
    changed = command.replace("redis-cli ", f"redis-cli -p {redis_server.port} ")
    assert changed != command
    return changed


async def test_an_old_access_log_counts_line_by_line(
    site_of: SiteOf, tmp_path: Path, stack: ExitStack
) -> None:
    """What nginx logged counts as what nginx had told the tracker, and in no day."""
    site = site_of()
    paths = ["/", "/a?x=1", "/b/%C3%A9", "/é", "/\udcff", "/q?ü", '/"x"', "/\\", "/100%25", "/%0A",
        "/[1-3]{a,b}", "/a%2Fb", "/x//y", "//x", "/e/../f", "/style.css",
        "/A.JPG?v=2", "/#"]  # fmt: skip
    for path in paths:
        await site.nginx.visit(path)
    await site.nginx.visit("/bot", agent="Googlebot")
    await site.nginx.visit("/quoted", agent='Mozilla "5.0" x')
    await site.files.ask("/none", headers={"User-Agent": "Mozilla"})  # a 404: mirrored, not found
    expected = await site.counts() - Counter(["/none/"])
    site.redis.client.flushall()
    folder = site.nginx.log.parent
    log = folder / "access.log"
    lines = log.read_bytes() + b'1.2.3.4 - - [x] "\\x16\\x03\\x01" 400 1 "-" "-"\n'
    with gzip.open(folder / "access.log.2.gz", "wb") as older:
        older.write(lines * 5)
    page = b'1.2.3.4 - - [x] "GET /many/%d?x HTTP/1.1" 200 1 "-" "Mozilla/5.0"\n'
    log.write_bytes(b"".join(page % (n % 10) for n in range(300)))
    expected = Counter({url: n * 5 for url, n in expected.items()})
    expected.update(f"/many/{n % 10}/" for n in range(300))
    command = block(SITE, "sh", "KEEP_DAYS=0").replace("/var/log/nginx", str(folder))
    port = free_port()
    command = with_ports(command, {6379: site.redis.port, 5999: port})
    command = command.replace("PORT=5999", f"PORT={port}")
    command = command.replace(".venv/bin/python", f"exec {sys.executable}")
    started = time.monotonic()
    done = run("bash", "-e", "-c", f"set -o pipefail\n{command}")
    print(f"{expected.total()} lines in {time.monotonic() - started:.1f} s\n{done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(expected.total()), "200"]
    assert await site.counts() == expected
    assert site.redis.days() == {}
    site.redis.check_index()


# --- Pairs ----------------------------------------------------------------------------------


@dataclass
class Pairs:
    redis: list[RedisServer]
    servers: list[Server]
    nginx: Nginx

    def merged(self) -> tuple[int, list[dict[str, Any]]]:
        """What the documented command returns and prints."""
        ports = {5001: self.servers[0].port, 5002: self.servers[1].port}
        command = "set -o pipefail\n" + with_ports(block("docs/operations.md", "sh", "jq"), ports)
        done = run("bash", "-c", command)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


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
        self.rng = random.Random(1)
        self.spelled: dict[str, set[str]] = {}
        picks = (self.rng.choices(PIECES.split(), k=self.rng.randint(0, 5)) for _ in range(400))
        self.paths = TRAPS + ["/api/" + "".join(pick) for pick in picks]

    def target(self, number: int) -> str:
        path = re.sub("%..|[^%/]", self.respelled, self.rng.choice(self.paths))
        return path + self.rng.choice(["", "", "/", "?q=1", "/?q=/"])

    def respelled(self, token: re.Match[str]) -> str:
        spelling = token[0]
        chance = self.rng.random()
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
    nginx = pairs.nginx
    async with Spellings(nginx.port) as load:
        await load.more(1500)
        pairs.redis[0].kill()
        await load.more(500)
        await settled(pairs.servers[0], 503)  # by now its server waits no more
        await load.more(500)
        await asyncio.to_thread(pairs.redis[0].start)
        await load.more(500)
    for each in pairs.servers:
        await settled(each)
    print(f"{load.answered.total()} hits, slowest {load.slowest:.2f} s")
    assert not load.failed + load.unknown
    first, second = (each.counts() for each in pairs.redis)
    assert not [load.spelled[url] for url in first.keys() & second.keys()]
    assert first | second == load.answered
    assert min(len(first), len(second)) > 50

    for url, targets in list(load.spelled.items())[:150]:
        for target in list(targets)[:3]:
            answer = await nginx.ask(f"/stats{target.partition('?')[0]}")
            assert (answer.status, answer.json["count"]) == (200, load.answered[url]), target
    rows = sorted(load.answered.items(), key=lambda row: (row[1], row[0]), reverse=True)
    assert pairs.merged() == (0, [{"count": n, "url": url} for url, n in rows])

    assert (await nginx.ask("/test/5/", "POST")).status == 403
    pairs.servers[1].kill()
    assert {(await nginx.ask(f"/api/{n}")).status for n in range(20)} == {200, 502}
    code, rows_of_one = pairs.merged()
    assert (code != 0, rows_of_one) == (True, [])
