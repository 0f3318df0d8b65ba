"""What README and docs/operations.md say is so: their examples, tables, blocks and links."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis

import server
from conftest import (
    HERE,
    Load,
    MakeRedis,
    Nginx,
    RedisServer,
    Serve,
    block,
    end,
    free_port,
    launched,
    missing,
    run,
    talk,
    wait_for,
    with_ports,
)

README = (HERE / "README.md").read_text()
OPERATIONS = (HERE / "docs/operations.md").read_text()
DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((HERE / "docs").glob("*.md"))]
HERE_PYTHON = (".venv/bin/python", sys.executable)


def shell(command: str, cwd: Path = HERE, **env: str) -> subprocess.CompletedProcess[str]:
    """A block of the docs, whose every line must work."""
    return run("bash", "-euo", "pipefail", "-c", command.replace(*HERE_PYTHON), cwd=cwd, **env)


def on(own: RedisServer, command: str) -> str:
    """The same block, for a Redis of ours."""
    command = command.replace("redis-cli ", f"redis-cli -p {own.port} ")
    return re.sub(r"(localhost:|--port )6379", rf"\g<1>{own.port}", command)


def table(document: str, columns: int) -> list[tuple[str, ...]]:
    """The rows of all tables in a document that have so many columns."""
    cell = r" (.+?) \|"
    return re.findall(r"^\|" + cell * columns + "$", document, re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub("```.*?```", "", text, flags=re.DOTALL)


# --- README ---------------------------------------------------------------------------------

VOLATILE = {"duration_s", "requests_per_s", "latency_ms", "uptime_s"}


def steady(text: str) -> object:
    """An answer without the figures that differ from run to run."""
    data = json.loads(text)
    if isinstance(data, dict):
        return {key: type(value) if key in VOLATILE else value for key, value in data.items()}
    return data


async def test_the_readme_shows_what_the_server_says(serve: Serve) -> None:
    shown = block("README.md", "console", "curl")
    process = serve()
    examples = re.findall(r"^\$ (curl .*)\n((?:(?!\$ ).+\n)*)", shown, re.MULTILINE)
    assert len(examples) >= 3
    for command, expected in examples:
        local = command.replace("localhost:5000", f"127.0.0.1:{process.port}")
        said = await asyncio.to_thread(run, "bash", "-c", local)
        assert (said.returncode, steady(said.stdout)) == (0, steady(expected)), command


def test_the_settings_table_is_what_help_says_and_names_the_defaults() -> None:
    said = " ".join(run(sys.executable, "server.py", "--help").stdout.split())
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(--[a-z-]+)` \| (.+) \|$", README, re.MULTILINE)
    assert [name for name, _, _ in rows] == [name for name, *_ in server.OPTIONS]
    for (name, flag, meaning), (_, default, *_) in zip(rows, server.OPTIONS, strict=True):
        assert f"{flag} {name} {meaning}" in said
        assert meaning.startswith(str(default or "unset"))


def test_the_readme_takes_minutes_to_read() -> None:
    words = [word for word in without_code(README).split() if re.search(r"\w", word)]
    assert len(words) <= 1000


def test_uv_run_needs_the_file_alone(tmp_path: Path, stack: ExitStack) -> None:
    """Its header names the packages of requirements.txt, so that uv can find them."""
    source = (HERE / "server.py").read_text()
    header = re.search(r"# /// script\n(.*?)# ///\n", source, re.DOTALL)
    assert header
    found = tomllib.loads(header[1].replace("# ", ""))
    assert found["requires-python"] == ">=3.11"
    assert found["dependencies"] == (HERE / "requirements.txt").read_text().splitlines()
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
    said = talk(port, b"GET / HTTP/1.0\r\n\r\n")
    assert said.startswith(b"HTTP/1.0 404")
    assert b"dashboard.html" in said  # which is not there
    process.terminate()
    assert process.wait(timeout=20) == 0


# --- All documents --------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall("^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = HERE / document
    for link in re.findall(r"\]\(([^)]+)\)", without_code(path.read_text())):
        name, _, anchor = link.partition("#")
        if "://" not in link:
            target = (path.parent / name) if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_make_that_a_document_names_is_a_target(document: str) -> None:
    named = re.findall(r"(?:`|^|=\S* )make ([a-z-]+)", (HERE / document).read_text(), re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search("^## (.*)$", (HERE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1].split()[0] == server.__version__


# --- Several servers behind nginx -----------------------------------------------------------


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd")
    text = block("docs/operations.md", "ini", "ExecStart").replace("/opt/request-stats", str(HERE))
    unit = tmp_path / "tracker@5001.service"
    unit.write_text(text.replace(f"{HERE}/{HERE_PYTHON[0]}", sys.executable))
    said = run("systemd-analyze", "verify", "--man=no", str(unit), SYSTEMD_LOG_LEVEL="warning")
    assert (said.returncode, said.stderr.count(unit.name)) == (0, 0), said.stderr


async def test_servers_started_as_the_unit_says_count_as_one_behind_nginx(
    tmp_path: Path, stack: ExitStack, redis_server: RedisServer
) -> None:
    if not shutil.which("nginx"):
        missing("nginx")
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(block("docs/operations.md", "ini", "ExecStart"))
    command = unit["Service"]["execstart"].replace("/opt/request-stats/", "")
    variables = on(redis_server, unit["Service"]["environment"])
    ports = {80: free_port(), 5001: free_port(), 5002: free_port()}
    logs = [tmp_path / str(port) for port in (5001, 5002)]
    processes = []
    for log in logs:
        env = dict(each.split("=", 1) for each in variables.split())
        env["PORT"] = env["PORT"].replace("%i", str(ports[int(log.name)]))
        with log.open("wb") as file:
            start = shlex.split(command.replace(*HERE_PYTHON))
            processes.append(launched(stack, start, file, env))
    conf = with_ports(block("docs/operations.md", "nginx", "trackers"), ports)
    Nginx(stack, tmp_path / "nginx", ports[80], conf)
    wait_for(lambda: all("started" in log.read_text() for log in logs))

    async with Load(ports[80]) as load:
        await load.more(1000)
    assert not load.failed + load.unknown
    wait_for(lambda: redis_server.counts() == load.answered)
    redis_server.check_index()
    for port in (ports[5001], ports[5002]):
        said = talk(port, b"GET /metrics HTTP/1.0\r\n\r\n").decode()
        counted = re.search(r"^url_hits_total (\S+)$", said, re.MULTILINE)
        assert counted
        assert 0 < float(counted[1]) < load.answered.total()
    for path in ("/stats/", "/metrics", "/health", "/", "/api/../stats/", "/api%2F../stats/"):
        said = talk(ports[80], f"GET {path} HTTP/1.0\r\n\r\n".encode()).decode()
        assert said.startswith("HTTP/1.1 404"), path

    end(processes[0])  # soon nginx sends it nothing more
    request = b"GET /api/a/ HTTP/1.0\r\n\r\n"
    codes = [talk(ports[80], request).split()[1] for _ in range(20)]
    assert set(codes[10:]) == {b"200"}


# --- Redis ----------------------------------------------------------------------------------


@pytest.fixture
def plain_redis(own_redis: MakeRedis, tmp_path: Path) -> RedisServer:
    """A Redis as a package installs it: with a configuration file and few settings."""
    own = own_redis()
    own.kill()
    own.stack.callback(shut_down, own)  # what a block has started
    conf = f"port {own.port}\nbind 127.0.0.1\ndir {own.folder}\nrepl-diskless-sync-delay 0\n"
    (tmp_path / "redis.conf").write_text(conf)
    start(own, tmp_path / "redis.conf")
    return own


def start(own: RedisServer, conf: Path) -> None:
    own.process = launched(own.stack, ["redis-server", str(conf)])
    wait_for(own.answers)


def shut_down(own: RedisServer) -> None:
    with suppress(redis.RedisError):
        own.client.shutdown(nosave=True)


WANTED = {
    "appendonly": "yes",
    "maxmemory-policy": "noeviction",
    "lazyfree-lazy-expire": "yes",
}


def settings_of(own: RedisServer) -> Mapping[str, str]:
    return {name: own.client.config_get(name)[name] for name in WANTED}


def test_redis_takes_the_settings_from_its_file(plain_redis: RedisServer, tmp_path: Path) -> None:
    plain_redis.kill()
    with (tmp_path / "redis.conf").open("a") as file:
        file.write(block("docs/operations.md", "conf", "appendonly"))
    start(plain_redis, tmp_path / "redis.conf")
    assert settings_of(plain_redis) == WANTED


def test_redis_takes_the_settings_while_it_runs(plain_redis: RedisServer, tmp_path: Path) -> None:
    assert settings_of(plain_redis) != WANTED
    said = shell(on(plain_redis, block("docs/operations.md", "sh", "CONFIG REWRITE")))
    assert said.stdout.split() == ["OK"] * 4
    plain_redis.kill()
    start(plain_redis, tmp_path / "redis.conf")
    assert settings_of(plain_redis) == WANTED


async def test_what_was_backed_up_can_be_restored(
    plain_redis: RedisServer, tmp_path: Path, serve: Serve
) -> None:
    shell(on(plain_redis, block("docs/operations.md", "sh", "CONFIG REWRITE")))
    process = serve(plain_redis.url)
    await process.hit(a=3, b=1)
    made = shell(on(plain_redis, block("docs/operations.md", "sh", "--rdb")), tmp_path)
    assert made.returncode == 0
    await process.hit(c=1)
    assert await process.stop() == 0
    plain_redis.client.shutdown()

    restore = on(plain_redis, block("docs/operations.md", "sh", "appendonlydir.old"))
    restore = restore.replace("/backup/", f"{tmp_path}/")
    done = await asyncio.to_thread(shell, restore, plain_redis.folder)
    assert done.returncode == 0, done
    start(plain_redis, tmp_path / "redis.conf")
    assert settings_of(plain_redis) == WANTED
    assert plain_redis.counts() == plain_redis.day_counts() == {"/api/a/": 3, "/api/b/": 1}
    plain_redis.check_index()


def test_the_documented_repair_runs(redis_server: RedisServer) -> None:
    redis_server.client.set("url_count:/api/a/", 3)
    redis_server.client.zadd("url_rank", {"/api/z/": 9})
    done = shell(on(redis_server, block("docs/operations.md", "sh", "DEL url_rank url_total")))
    assert done.stdout == "1\n1 URLs are listed\n", done
    redis_server.check_index()


def test_the_documented_tools_run(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.client.set("url_count:/api/a/", 3)
    blocks = re.findall("```sh\n(REDIS_URL=.*reindex.py)\n```", OPERATIONS)
    (reindex,) = blocks
    assert shell(on(redis_server, reindex)).stdout == "1 URLs are listed\n"
    recover = on(redis_server, block("docs/operations.md", "sh", "recover.py"))
    log = tmp_path / "server.log"
    log.write_text(
        '{"hits": 2, "urls": {"/api/a/": 2}, "instance": "x", "sequence": 1,'
        ' "event": "hits not committed"}\n'
    )
    recover = recover.replace("tools/", f"{HERE}/tools/")
    assert shell(recover, tmp_path).stdout == "2 hits added\n"
    assert redis_server.ranking() == {"/api/a/": 5}


# --- Watching it ----------------------------------------------------------------------------


def promtool(*arguments: str, cwd: Path = HERE) -> None:
    if not shutil.which("promtool"):
        missing("promtool (apt: prometheus)")
    said = run("promtool", *arguments, cwd=cwd)
    assert said.returncode == 0, said.stdout + said.stderr


def test_prometheus_takes_the_scrape_config(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(block("docs/operations.md", "yaml", "scrape_configs"))
    shutil.copy(HERE / "docs/alerts.yml", tmp_path)
    promtool("check", "config", "prometheus.yml", cwd=tmp_path)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("check", "rules", "docs/alerts.yml")
    promtool("test", "rules", "tests/alerts_test.yml")


def test_each_alert_has_its_row() -> None:
    rules = re.findall("alert: (.*)", (HERE / "docs/alerts.yml").read_text())
    rows = [name.strip("`") for name, _ in table(OPERATIONS, 2) if name.startswith("`Tracker")]
    assert rows == rules


async def test_metrics_are_those_of_the_table_and_of_the_alerts(serve: Serve) -> None:
    process = serve()
    await process.hit(a=1)
    said = (await process.ask("/metrics")).body.decode()
    ours = set(re.findall(r"^# HELP ((?:url|http)\w+)", said, re.MULTILINE))
    ours = {name for name in ours if not name.endswith("_created")}
    rows = {name.strip("`") for name, _, _ in table(OPERATIONS, 3) if re.match("`(url|http)", name)}
    assert rows == ours
    alerts = (HERE / "docs/alerts.yml").read_text()
    asked = set(re.findall(r"\b(?:url|http)_\w+", alerts))
    assert {name.removesuffix("_count") for name in asked} <= ours


def test_each_log_event_has_its_row() -> None:
    source = (HERE / "server.py").read_text()
    assert 'f"redis {state}, hits are held"' in source
    source += "redis disconnected, hits are held; redis refuses, hits are held"
    events = re.findall(r"""log(?:_once|\.\w+)\(\s*(["'])(.+?)\1""", source)
    levels = "info|warning|error"
    rows = {name.strip("`") for name, level, _ in table(OPERATIONS, 3) if level in levels}
    missed = {event for _, event in events if event not in rows and "{" not in event}
    assert not missed
    for row in rows:  # and no row of what it never says
        assert row in source, row
