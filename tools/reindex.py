"""Lists in url_rank and url_total what the url_count: keys of a Redis hold.

    REDIS_URL=redis://localhost:6379/0 python tools/reindex.py

Run it once for a Redis that has counts but no list, as an earlier version left it. It is the
repair, too, after `redis-cli DEL url_rank url_total`.

It works beside running servers and stays exact. It may be broken off and run again. The lists
of single days are left as they are: nothing else in Redis knows the hits of a day.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import redis
from redis.connection import parse_url

SLICE = 250  # keys in one call of the script, which takes about a millisecond of Redis's time
PROGRESS = 100_000  # keys from one line of progress to the next

# What REDIS_URL may say, as for the server: where Redis is. Other options are ignored.
PLACE = ("connection_class", "host", "port", "path", "db", "username", "password")
TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")

# KEYS: url_rank, url_total, then url_count:<url> for each URL. Returns the keys that hold no
# count. url_total is the sum of url_rank, before and after. So it need not be known what the
# servers, or an earlier run, have listed already.
REINDEX = """
local rank, total = KEYS[1], KEYS[2]
local values = redis.call('MGET', unpack(KEYS, 3))
local counts, bad = {}, {}
local change = 0
for i, value in ipairs(values) do
  local key = KEYS[i + 2]
  local url = key:sub(#'url_count:' + 1)
  local count = 0
  if value and #value < 16 and value:match('^[1-9]%d*$') then
    count = tonumber(value)
  elseif value ~= '0' and redis.call('EXISTS', key) == 1 then
    table.insert(bad, key)
  end
  local listed = tonumber(redis.call('ZSCORE', rank, url) or 0)
  if count ~= listed then
    counts[url] = count
    change = change + count - listed
  end
end

if next(counts) then
  if redis.call('EXISTS', rank) == 0 then redis.call('SET', total, 0) end
  redis.call('INCRBY', total, change)  -- first, for it raises an error if this is no number
end
for url, count in pairs(counts) do
  if count > 0 then redis.call('ZADD', rank, count, url) else redis.call('ZREM', rank, url) end
end
return bad
"""


def reindex(client: redis.Redis) -> int:
    """List every count. Returns the number of URLs in the list."""
    done = 0
    for keys in slices(client.scan_iter("url_count:?*", SLICE)):
        for key in index(client, keys):
            print(f"holds no count, and is not listed: {key.decode(errors='backslashreplace')!r}")
        before = done
        done += len(keys)
        if done // PROGRESS > before // PROGRESS:
            print(f"{done:,} counts so far", flush=True)
    return int(client.zcard("url_rank"))


def slices(keys: Iterable[bytes]) -> Iterator[list[bytes]]:
    rest = iter(keys)
    while found := list(islice(rest, SLICE)):
        yield found


def index(client: redis.Redis, keys: list[bytes]) -> list[bytes]:
    bad: list[bytes] = client.eval(REINDEX, len(keys) + 2, "url_rank", "url_total", *keys)
    return bad


def connect(url: str) -> redis.Redis:
    """A client for the address in url. Raises what redis-py likes if that is no good."""
    # In redis://:12/34@host the password is 12/34, but redis-py would take 12 for a port, and it
    # would be shown. So there must be no @ behind the host, and no # at all.
    if not re.fullmatch(r"\w+://[^/?#]*([/?][^@#]*)?", url):
        raise ValueError
    said: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
    options = {name: said[name] for name in PLACE + TLS if name in said}
    pool = redis.ConnectionPool(protocol=2, socket_timeout=30, socket_connect_timeout=5, **options)
    return redis.Redis.from_pool(pool)


def main() -> None:
    if sys.argv[1:]:
        # An argument is not repeated: it may be a REDIS_URL with its password.
        print(__doc__)
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
    url = os.environ.get("REDIS_URL")
    if not url:
        sys.exit("reindex.py: set REDIS_URL to the Redis that has the counts")
    try:
        client = connect(url)
    except Exception:  # redis-py's words may quote a part of the password
        sys.exit("reindex.py: REDIS_URL is no address like redis://host:6379/0")
    try:
        with client:
            print(f"{reindex(client):,} URLs are listed")
    except (redis.RedisError, OSError) as error:
        sys.exit(f"reindex.py: Redis: {error} (what was done stays: run this again)")
    except KeyboardInterrupt:
        sys.exit("reindex.py: broken off (what was done stays: run this again)")


if __name__ == "__main__":
    main()
