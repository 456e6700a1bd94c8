"""The same in Redis, each as one script: nothing comes between looking and counting. Times are Redis' own.

Two keys a bound: a hash of amounts by second (`r123` requests, `t123` tokens), and a sorted set of running requests by
the time until which their router vouches for them.
"""

RESERVE = """
local id, lease_ms, window = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = tonumber(time[1])
local now_ms = now * 1000 + math.floor(tonumber(time[2]) / 1000)

local function read(key)
  local found = {r = {used = 0, newest = 0, at = {}}, t = {used = 0, newest = 0, at = {}}}
  local flat = redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    local kind, second, amount = string.sub(flat[i], 1, 1), tonumber(string.sub(flat[i], 2)), tonumber(flat[i + 1])
    if second < now - window then
      redis.call('HDEL', key, flat[i])
    elseif amount > 0 then
      local counts = found[kind]
      counts.used = counts.used + amount
      counts.newest = math.max(counts.newest, second)
      counts.at[#counts.at + 1] = {second, amount}
    end
  end
  return found
end

local function wait(counts, over)
  table.sort(counts.at, function(a, b) return a[1] < b[1] end)
  for _, entry in ipairs(counts.at) do
    over = over - entry[2]
    if over <= 0 then return entry[1] + window + 1 - now end
  end
  return window + 1
end

local refused, what, longest, all = -1, '', 0, {}
for i = 1, #KEYS / 2 do
  local base = 3 + (i - 1) * 4
  local requests, tokens, concurrent, need = tonumber(ARGV[base + 1]), tonumber(ARGV[base + 2]),
    tonumber(ARGV[base + 3]), tonumber(ARGV[base + 4])
  local counts, leases = read(KEYS[2 * i - 1]), KEYS[2 * i]
  all[i] = counts
  local function lacks(seconds, name)
    if seconds > longest then refused, what, longest = i - 1, name, seconds end
  end
  if concurrent > 0 then
    redis.call('ZREMRANGEBYSCORE', leases, '-inf', now_ms)
    if redis.call('ZCARD', leases) >= concurrent then lacks(1, 'concurrent') end
  end
  local over = counts.r.used + 1 - requests
  if requests > 0 and over > 0 then lacks(wait(counts.r, over), 'requests') end
  over = counts.t.used + need - tokens
  if tokens > 0 and over > 0 then lacks(wait(counts.t, over), 'tokens') end
end

local answer = {refused, what, longest, now}
for i, counts in ipairs(all) do
  if refused == -1 then
    local base = 3 + (i - 1) * 4
    local need = tonumber(ARGV[base + 4])
    redis.call('HINCRBY', KEYS[2 * i - 1], 'r' .. now, 1)
    redis.call('HINCRBY', KEYS[2 * i - 1], 't' .. now, need)
    redis.call('EXPIRE', KEYS[2 * i - 1], window * 2)
    counts.r.used, counts.r.newest = counts.r.used + 1, now
    counts.t.used, counts.t.newest = counts.t.used + need, now
    if tonumber(ARGV[base + 3]) > 0 then
      redis.call('ZADD', KEYS[2 * i], now_ms + lease_ms, id)
      redis.call('PEXPIRE', KEYS[2 * i], lease_ms * 2)
    end
  end
  answer[#answer + 1] = counts.r.used
  answer[#answer + 1] = counts.r.newest
  answer[#answer + 1] = counts.t.used
  answer[#answer + 1] = counts.t.newest
end
return answer
"""

# ARGV: the request ('' while it goes on), the window, the second it began to count in (0: now), and for each bound by
# how many tokens to put it right.
SETTLE = """
local id, window, second = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = tonumber(redis.call('TIME')[1])
for i = 1, #KEYS / 2 do
  local counts, change = KEYS[2 * i - 1], tonumber(ARGV[3 + i])
  if id ~= '' then redis.call('ZREM', KEYS[2 * i], id) end
  local at = second
  if second < now - window then at = now end
  if change > 0 or (change < 0 and at == second) then
    if redis.call('HINCRBY', counts, 't' .. at, change) <= 0 then redis.call('HDEL', counts, 't' .. at) end
    redis.call('EXPIRE', counts, window * 2)
  end
end
return 1
"""

# KEYS: sorted sets; ARGV: for how long the router vouches, then the request of each.
RENEW = """
local time = redis.call('TIME')
local until_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) + tonumber(ARGV[1])
for i = 1, #KEYS do
  redis.call('ZADD', KEYS[i], until_ms, ARGV[i + 1])
  redis.call('PEXPIRE', KEYS[i], tonumber(ARGV[1]) * 2)
end
return 1
"""
