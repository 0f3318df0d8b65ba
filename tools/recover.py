"""Adds the hits of a log to Redis: those of its lines "hits not committed".

    REDIS_URL=redis://localhost:6379/0 python tools/recover.py server.log

A server that is told to end while Redis is away writes such lines. The log may be what the
server wrote to a file, or what `docker compose logs server` or journalctl print.

No hit is added twice, however often this runs. But run it within 24 hours of the server's end:
then Redis forgets which lines it has. The hits count on the day on which they are added, as held
hits always do. MAX_URLS and KEEP_DAYS should be those of the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import redis

sys.path.append(str(Path(__file__).resolve().parents[1]))
from server import LONG_PATIENCE, RedisStore, configure_logging, read_settings


class LogError(Exception):
    """The log cannot be used, and the text says why."""


@dataclass(frozen=True)
class Batch:
    """Hits that a server has sent, or would have sent, under one number."""

    instance: str
    sequence: int
    hits: dict[str, int]


def batches_in(log: Path) -> list[Batch]:
    """Those of its lines "hits not committed", by their number."""
    found = []
    with log.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            # Cut off at one end, a line lacks one of the two.
            if '"urls": {' in line or '"hits not committed"' in line:
                found.append(batch_of(number, line))
    if not found:
        raise LogError(f'no line of {log} says "hits not committed"')
    return sorted(found, key=lambda each: each.sequence)


def batch_of(number: int, line: str) -> Batch:
    with suppress(ValueError, KeyError):
        # docker compose and journald put a name before the JSON.
        said = json.loads(line[line.index("{") :])
        if sum(said["urls"].values()) == said["hits"]:
            return Batch(said["instance"], said["sequence"], said["urls"])
    raise LogError(f"line {number} is cut or damaged: nothing is added. Mend it, or delete it")


async def recover(store: RedisStore, batches: list[Batch]) -> int:
    """Commit each as its server would have done. Returns the number of hits added."""
    added = 0
    try:
        for each in batches:
            store.instance = each.instance
            async with asyncio.timeout(LONG_PATIENCE):
                last = await store.call("GET", f"url_commit:{each.instance}")
                if int(last or 0) < each.sequence:
                    hits, _ = await store.commit(each.sequence, each.hits)
                    added += hits
    finally:
        await store.close()
    return added


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    if not os.environ.get("REDIS_URL"):
        sys.exit("recover.py: set REDIS_URL to the Redis that shall have the hits")
    settings = read_settings([])
    configure_logging()
    try:
        batches = batches_in(Path(sys.argv[1]))
    except OSError as error:
        sys.exit(f"recover.py: the log cannot be read: {error.strerror}")
    except LogError as error:
        sys.exit(f"recover.py: {error}")
    try:
        store = RedisStore(settings)
        print(f"{asyncio.run(recover(store, batches))} hits added")
    except (redis.RedisError, OSError) as error:
        reason = str(error) or "Redis gives no answer"
        sys.exit(f"recover.py: {reason} (run this again: no hit is added twice)")


if __name__ == "__main__":
    main()
