"""How a router speaks to Redis or Valkey: nobody waits long for it, and nothing is tried again."""

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# What one operation may take; over it Redis is lost, and nobody waits for it until it answers again.
TIMEOUT_S = 0.25
FAILURES = (RedisError, OSError, TimeoutError)


def connect(url: str, connections: int) -> redis.asyncio.Redis:
    """A client with so many connections at most; they are made when they are needed."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    return redis.asyncio.Redis.from_pool(pool)
