"""The tools bring the lists into line with the counts, and add what a log holds, exactly."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import redis

from conftest import (
    ClientOf,
    Load,
    MakeRedis,
    RedisServer,
    RigOf,
    Serve,
    block,
    run,
    settings_of,
    settled,
)
from server import RedisStore
from tools import recover, reindex

REINDEX = "tools/reindex.py"
RECOVER = "tools/recover.py"


def tool(script: str, redis_url: str, *arguments: str) -> CompletedProcess[str]:
    return run(sys.executable, script, *arguments, REDIS_URL=redis_url)


def old_counts(server: RedisServer, urls: Iterable[str]) -> dict[str, int]:
    """What version 1 of long ago left behind: counts, and no list."""
    counts = {url: number % 97 + 1 for number, url in enumerate(urls)}
    server.client.mset({f"url_count:{url}": count for url, count in counts.items()})
    return counts


async def opened(server: RedisServer) -> RedisStore:
    store = RedisStore(settings_of(server.url))
    await store.connect()
    return store


# --- reindex.py -----------------------------------------------------------------------------


async def test_counts_without_a_list_are_listed(redis_server: RedisServer, serve: Serve) -> None:
    counts = old_counts(redis_server, (f"/api/products/{n}/" for n in range(2500)))
    process = serve(redis_server.url)
    assert process.says("counts without a list: run tools/reindex.py") == 1
    assert await process.stats() == {}
    ended = tool(REINDEX, redis_server.url)
    assert (ended.returncode, ended.stdout) == (0, "2,500 URLs are listed\n")
    assert await process.stats() == counts
    redis_server.check_index()
    assert not serve(redis_server.url).says("counts without a list")


def test_what_is_no_count_is_named_and_in_no_list(redis_server: RedisServer) -> None:
    client = redis_server.client
    bad = {"/many/": "many", "/minus/": "-1", "/long/": "9" * 19, "/zeros/": "007"}
    client.mset({f"url_count:{url}": text for url, text in bad.items()})
    client.rpush("url_count:/list/", 1)
    client.mset({"url_count:/zero/": 0, "url_count:": 7, "other:url_count:/x/": 7})
    client.set("url_count:/api/a/", 3)
    client.zadd("url_rank", {"/many/": 5})
    client.set("url_total", 5)
    said = tool(REINDEX, redis_server.url).stdout
    assert sorted(re.findall("'url_count:(.*)'", said)) == sorted([*bad, "/list/"])
    assert redis_server.ranking() == {"/api/a/": 3}
    assert redis_server.total() == 3


def test_it_is_exact_when_it_was_broken_off(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = old_counts(redis_server, (f"/api/{n}/" for n in range(5000)))
    index = reindex.index
    done = []

    def dies(client: redis.Redis, keys: list[bytes]) -> list[bytes]:
        done.extend(keys)
        if len(done) > 1000:
            raise redis.ConnectionError("died")
        return index(client, keys)

    with reindex.connect(redis_server.url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(reindex, "index", dies)
            with pytest.raises(redis.ConnectionError):
                reindex.reindex(client)
        assert 0 < len(redis_server.ranking()) < 5000
        for _ in range(2):
            assert reindex.reindex(client) == 5000
            assert redis_server.ranking() == counts
            redis_server.check_index()


async def beside_load(redis_server: RedisServer, serve: Serve, work: Callable[[], object]) -> None:
    """Let this run three times at once while a server counts. No count is touched by that."""
    counts = old_counts(redis_server, (f"/api/{n}/" for n in range(10_000)))
    process = serve(redis_server.url)
    async with Load(process.port) as load:
        tools = [asyncio.to_thread(work) for _ in range(3)]
        await asyncio.gather(load.more(500), *tools)
    await settled(process)
    assert redis_server.counts() == {
        url: counts.get(url, 0) + load.answered[url] for url in counts | load.answered
    }


async def test_it_is_exact_beside_a_server_and_others_of_its_kind(
    redis_server: RedisServer, serve: Serve
) -> None:
    await beside_load(redis_server, serve, lambda: tool(REINDEX, redis_server.url))
    redis_server.check_index()


async def test_control_a_tool_without_a_script_is_not(
    redis_server: RedisServer, serve: Serve
) -> None:
    def naive() -> None:
        client = redis_server.client
        for key in list(client.scan_iter("url_count:*", 1000))[:1000]:
            url = key.removeprefix("url_count:")
            listed = int(client.zscore("url_rank", url) or 0)
            count = int(client.get(key))
            client.zadd("url_rank", {url: count})
            client.incrby("url_total", count - listed)

    await beside_load(redis_server, serve, naive)
    with pytest.raises(AssertionError):
        redis_server.check_index()


HARMS: dict[str, Callable[[Any], object]] = {
    "the list is lost": lambda client: client.delete("url_rank"),
    "the total is wrong": lambda client: client.set("url_total", 7),
    "the total is text": lambda client: client.set("url_total", "many"),
    "the list is another type": lambda client: client.set("url_rank", "x"),
    "a count is lost": lambda client: client.delete("url_count:/api/b/"),
    "a count was edited": lambda client: client.set("url_count:/api/b/", 40),
    "a score is no number": lambda client: client.zadd("url_rank", {"/api/a/": "inf"}),
    "a list has a URL too many": lambda client: client.zadd("url_rank", {"/api/z/": 4}),
}


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "stands still"])
@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
async def test_the_documented_repair_mends_whatever_hands_did(
    redis_server: RedisServer, harm: Callable[[Any], object], goes_on: bool
) -> None:
    store = await opened(redis_server)
    await store.commit(1, {"/api/a/": 3, "/api/b/": 1})
    harm(redis_server.client)
    redis_server.client.delete("url_rank", "url_total")
    if goes_on:  # a server that was not stopped has listed some of it
        await store.commit(2, {"/api/a/": 1})
    await store.close()
    with reindex.connect(redis_server.url) as client:
        reindex.reindex(client)
    redis_server.check_index()
    assert redis_server.counts()["/api/a/"] == 3 + goes_on


def test_a_lost_list_alone_needs_no_other_repair(redis_server: RedisServer) -> None:
    """Version 1 told people to delete url_rank only."""
    counts = old_counts(redis_server, ["/api/a/", "/api/b/"])
    redis_server.client.set("url_total", 99)
    tool(REINDEX, redis_server.url)
    assert redis_server.ranking() == counts
    redis_server.check_index()


FAILS = {
    "": "set REDIS_URL",
    "redis://:secret@127.0.0.1:1/0": "connecting to 127.0.0.1:1",
    "redis://:secret@127.0.0.1:no/0": "REDIS_URL is no address like redis://host:6379/0",
    "redis://:p@secret#word@127.0.0.1/0": "REDIS_URL is no address like redis://host:6379/0",
    ":secret@127.0.0.1": "REDIS_URL is no address like redis://host:6379/0",
    "http://u:secret@h/": "REDIS_URL is no address like redis://host:6379/0",
    "redis://bob:secret@{}/0": "invalid username-password pair",
    "redis://127.0.0.1:1/0?encoding=nope&credential_provider=x": "connecting to 127.0.0.1:1",
}


@pytest.mark.parametrize("script", [REINDEX, RECOVER])
@pytest.mark.parametrize("url", FAILS)
def test_what_fails_says_why_in_one_line_without_the_password(
    redis_server: RedisServer, tmp_path: Path, url: str, script: str
) -> None:
    log = tmp_path / "log"
    log.write_text(LINE)
    arguments = [str(log)] if script == RECOVER else []
    ended = tool(script, url.format(f"127.0.0.1:{redis_server.port}"), *arguments)
    assert ended.returncode != 0
    assert re.fullmatch(r"(reindex|recover|server)\.py: .*\n", ended.stderr)
    assert FAILS[url] in ended.stderr
    assert "secret" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("script", [REINDEX, RECOVER])
def test_a_wrong_argument_is_not_repeated(script: str) -> None:
    ended = tool(script, "", "--redis_url", "redis://:secret@127.0.0.1/0")
    assert ended.returncode == 2
    assert "REDIS_URL=redis://localhost:6379/0 python tools/" in ended.stdout
    assert "secret" not in ended.stdout + ended.stderr


def test_help_says_that_days_are_not_made_again() -> None:
    assert "nothing else in Redis knows the hits of a day" in run(
        sys.executable, REINDEX, "--help"
    ).stdout.replace("\n", " ")


# --- recover.py -----------------------------------------------------------------------------

LINE = (
    '{"event": "hits not committed", "level": "error", "timestamp": "2026-11-26T12:00:00+00:00",'
    ' "instance": "ab", "sequence": 5, "hits": 3, "urls": {"/api/a/": 2, "/api/b/": 1}}\n'
)


async def test_recover_gives_up_a_redis_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "LONG_PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = RedisStore(settings_of(f"redis://127.0.0.1:{silent.getsockname()[1]}"))
        with pytest.raises(TimeoutError):
            await recover.recover(store, [recover.Batch("a", 1, {"/api/a/": 1})])


@pytest.mark.parametrize("sent_is_there", [False, True])
async def test_what_a_server_could_not_commit_is_added_once(
    rig_of: RigOf, tmp_path: Path, sent_is_there: bool
) -> None:
    rig = await rig_of(code="server.TAKEN_ALONG = 2000; server.main()")
    async with rig.load:
        if sent_is_there:
            rig.proxy.swallow = 10**9  # Redis has it, but its replies never arrive
        else:
            rig.proxy.delay = 10**9  # what is sent never arrives
        await rig.logs("redis disconnected")
        await rig.load.more(1000)
        assert await rig.server.stop() == 0
    assert rig.server.says("hits not committed") > 2
    missing = rig.load.answered.total() - sum(rig.redis.counts().values())
    assert (rig.server.uncommitted().total() > missing) is sent_is_there
    for text, expected in [(rig.server.log.read_text(), missing), (LINE, 3), (LINE, 0)]:
        log = tmp_path / "server.log"
        log.write_text(text)
        for hits in (expected, 0):  # the second time it has nothing to do
            ended = await asyncio.to_thread(tool, RECOVER, rig.redis.url, str(log))
            assert (ended.returncode, ended.stdout) == (0, f"{hits} hits added\n"), ended.stderr
    rig.load.answered.update({"/api/a/": 2, "/api/b/": 1})
    rig.check()


@pytest.mark.parametrize(
    "before",
    ["", "server-1  | ", "Nov 26 12:00:00 host python[77]: ", "\x1b[36mserver-1  |\x1b[0m "],
    ids=["a file", "docker compose", "journald", "a terminal"],
)
def test_a_log_may_have_a_name_before_each_line(
    redis_server: RedisServer, tmp_path: Path, before: str
) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        f'{before}INFO: more\r\n{before}{{"event": "stopped"}}\n{before}{LINE}'.encode()
    )
    assert tool(RECOVER, redis_server.url, str(log)).stdout == "3 hits added\n"
    assert redis_server.counts() == {"/api/a/": 2, "/api/b/": 1}


LOGS = {
    '{"event": "stopped"}\n': 'no line of {} says "hits not committed"',
    LINE[:50]: "line 1 is cut or damaged",
    LINE + LINE[40:]: "line 2 is cut or damaged",
    LINE.replace(": 2,", ": 1,"): "line 1 is cut or damaged",
    LINE.replace('"sequence": 5, ', ""): "line 1 is cut or damaged",
}


@pytest.mark.parametrize("text", LOGS, ids=["none", "end", "begin", "hit lost", "number lost"])
def test_nothing_is_added_of_a_log_that_is_not_whole(
    redis_server: RedisServer, tmp_path: Path, text: str
) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    ended = tool(RECOVER, redis_server.url, str(log))
    assert ended.returncode == 1
    assert LOGS[text].format(log) in ended.stderr
    assert redis_server.client.dbsize() == 0


def test_a_log_that_is_not_there_is_said_in_one_line(redis_server: RedisServer) -> None:
    ended = tool(RECOVER, redis_server.url, "redis://:secret@nowhere/")
    assert ended.stderr == "recover.py: the log cannot be read: No such file or directory\n"


# --- What the operations page says ----------------------------------------------------------


async def test_start_over_takes_every_key_of_ours_and_no_other(redis_server: RedisServer) -> None:
    store = await opened(redis_server)
    await store.commit(1, dict.fromkeys(["/api/a/", "/api/a\nb/", "/api/\0 '\"\\ü/"], 1))
    await store.close()
    assert len(redis_server.client.keys("url_*")) == 8  # two of the day
    redis_server.client.set("other:url_count:", "7")
    command = block("docs/operations.md", "sh", "--scan")
    command = command.replace("redis-cli", f"redis-cli -p {redis_server.port}")
    assert (await asyncio.to_thread(run, "bash", "-c", command)).returncode == 0
    assert redis_server.client.keys() == ["other:url_count:"]


async def test_the_client_lists_what_the_tool_has_listed(
    client_of: ClientOf, own_redis: MakeRedis
) -> None:
    own = own_redis()
    counts = old_counts(own, ["/api/a/", "/api/b/", "(other)"])
    tool(REINDEX, own.url)
    client = await client_of(own.url)
    assert await client.stats() == counts
    assert (await client.ask("/stats/api/b/")).json["count"] == counts["/api/b/"]
