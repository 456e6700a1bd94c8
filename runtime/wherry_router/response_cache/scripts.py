"""The store in Redis: each step one script, so that several routers keep one bound. Times are Redis' own.

By tenant: a sorted set of its answers by when they were used last, and a hash of their sizes. Of all: a sorted set of
tenants by the bytes they take, and the sum of these. Should Redis itself evict one of them, the rest is put right as it
is met, and all of it ends with the answers' time.
"""

# KEYS: the answer, the tenant's order. ARGV: the answer's name there.
GET = """
local value = redis.call('GET', KEYS[1])
if value then
  local time = redis.call('TIME')
  redis.call('ZADD', KEYS[2], 'XX', time[1] * 1000 + math.floor(time[2] / 1000), ARGV[1])
end
return value
"""

# KEYS: tenants, their sum. ARGV: what names begin with, tenant, answer's name, answer, its size, bytes for all, ms that
# it is kept, how many may go for it. Returns the sum of bytes.
PUT = """
local prefix, tenant, name, value = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local size, room, ttl, most = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local tenants, sum = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function order(of) return prefix .. ':order:' .. of end
local function sizes(of) return prefix .. ':sizes:' .. of end
local function answer(of, which) return prefix .. ':answer:' .. of .. ':' .. which end

local total = tonumber(redis.call('GET', sum))
if not total then
  total = 0
  local all = redis.call('ZRANGE', tenants, 0, -1, 'WITHSCORES')
  for i = 2, #all, 2 do total = total + tonumber(all[i]) end
end

local function lighter(of, bytes)
  total = total - bytes
  if tonumber(redis.call('ZINCRBY', tenants, -bytes, of)) <= 0 then redis.call('ZREM', tenants, of) end
end

local function forget(of, which)
  local bytes = tonumber(redis.call('HGET', sizes(of), which) or 0)
  redis.call('ZREM', order(of), which)
  redis.call('HDEL', sizes(of), which)
  redis.call('UNLINK', answer(of, which))
  if bytes > 0 then lighter(of, bytes) end
end

forget(tenant, name)
-- What nobody used for the time that answers are kept has ended.
for _, which in ipairs(redis.call('ZRANGEBYSCORE', order(tenant), '-inf', now - ttl, 'LIMIT', 0, most)) do
  forget(tenant, which)
end

local gone = 0
while total + size > room and gone < most do
  local found = redis.call('ZREVRANGE', tenants, 0, 0, 'WITHSCORES')
  local heaviest, bytes = found[1], tonumber(found[2])
  if not heaviest then
    total = 0
    break
  end
  local mine = tonumber(redis.call('ZSCORE', tenants, tenant) or 0)
  if mine > 0 and mine + size > bytes then heaviest, bytes = tenant, mine end
  local oldest = redis.call('ZRANGE', order(heaviest), 0, 0)[1]
  if oldest then
    forget(heaviest, oldest)
  else
    lighter(heaviest, bytes)
    redis.call('DEL', sizes(heaviest))
  end
  gone = gone + 1
end

if total + size <= room then
  redis.call('SET', answer(tenant, name), value, 'PX', ttl)
  redis.call('ZADD', order(tenant), now, name)
  redis.call('HSET', sizes(tenant), name, size)
  redis.call('ZINCRBY', tenants, size, tenant)
  total = total + size
  for _, key in ipairs({order(tenant), sizes(tenant), tenants}) do redis.call('PEXPIRE', key, 2 * ttl) end
end
redis.call('SET', sum, total, 'PX', 2 * ttl)
return total
"""
