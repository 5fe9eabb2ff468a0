"""What Redis does for the index in one step each: Lua scripts, which run atomically.

A stream's record is a hash with the fields of `StreamRecord`. An engine's blocks are a set of
names, and beside it a hash that says which instance of the engine they are of, which batch of its
events is next, and how many there must be: Redis may evict one of the two keys when its memory
is full, and a set that is not whole is as good as none.

All values come in ARGV and all keys in KEYS, so that the scripts work in a Cluster.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cache_index.index import EXACT_NAMES, NAME_BYTES

SLICE_NAMES = 256
"""Names handed to one command: Lua's stack is not made for thousands."""


@dataclass(frozen=True, slots=True)
class Script:
    text: str

    @property
    def sha(self) -> str:
        """What Redis calls it once it has seen it."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


RECORD = """
local epoch, version, holder = unpack(redis.call('HMGET', KEYS[1], 'epoch', 'version', 'holder'))
local stale = {epoch or '-1', version or '-1', holder or ''}
"""

PUT = Script(
    RECORD
    + """
local lease_ms, new_epoch, new_version = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if epoch then
  epoch, version = tonumber(epoch), tonumber(version)
  if epoch > new_epoch or (epoch == new_epoch and version >= new_version) then return stale end
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'version', ARGV[3], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], lease_ms)
"""
)
"""KEYS: record. ARGV: lease, epoch, version, the other fields and their values.
Returns nothing, or epoch, version and holder of a record that is not older."""

CHANGE = Script(
    RECORD
    + """
if epoch ~= ARGV[1] or version ~= ARGV[2] then return stale end
local pairs = {'version', version + 1}
for i = 4, #ARGV, 4 do
  local field, drop, keep, add = unpack(ARGV, i, i + 3)
  local last = keep == '' and -1 or drop + keep
  pairs[#pairs + 1] = field
  pairs[#pairs + 1] = redis.call('HGET', KEYS[1], field):sub(drop + 1, last) .. add
end
redis.call('HSET', KEYS[1], unpack(pairs))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""
)
"""KEYS: record. ARGV: epoch, version, lease, and for each field that changes: its name, bytes to
drop, bytes to keep ('' for all that are left), bytes to add. Returns as `PUT` does."""

CLAIM = Script(
    RECORD
    + """
if epoch ~= ARGV[1] then return stale end
redis.call('HSET', KEYS[1], 'epoch', epoch + 1, 'version', version + 1, 'holder', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return redis.call('HMGET', KEYS[1], unpack(ARGV, 4))
"""
)
"""KEYS: record. ARGV: epoch, new holder, lease, names of all fields.
Returns all fields, or only the three that `PUT` returns."""

DELETE = Script(
    """
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
)
"""KEYS: record. ARGV: epoch."""

LONGEST = Script(
    f"""
local packed, names = ARGV[1], {{}}
local total = #packed / {NAME_BYTES}
local exact = math.min({EXACT_NAMES}, total)

local function name(i) return packed:sub((i - 1) * {NAME_BYTES} + 1, i * {NAME_BYTES}) end

for i = 1, exact do names[i] = name(i) end

local function held_of(key)
  local held, size = 0, 1
  while held < exact do
    local last = math.min(held + size, exact)
    local found = redis.call('SMISMEMBER', key, unpack(names, held + 1, last))
    for i = 1, #found do
      if found[i] == 0 then return held end
      held = held + 1
    end
    size = size * 4
  end
  local missing = total + 1
  while missing - held > 1 do
    local middle = math.floor((held + missing + 1) / 2)
    if redis.call('SISMEMBER', key, name(middle)) == 1 then held = middle else missing = middle end
  end
  return held
end

local counts = {{}}
for i = 1, #KEYS do counts[i] = held_of(KEYS[i]) end
return counts
"""
)
"""KEYS: sets of names. ARGV: packed names. Returns how many of them each set has, from the first.
Most sets have none or few, so each is asked about one name first, and then about ever more. Where
the last one held comes late it is found by halving: to ask 64 engines about every name of a long
prompt that all of them hold would keep Redis from everybody else for tens of milliseconds."""

EACH_SLICE = f"""
local function each_slice(command, packed)
  for from = 1, #packed, {SLICE_NAMES * NAME_BYTES} do
    local names = {{}}
    for i = from, math.min(from + {SLICE_NAMES * NAME_BYTES}, #packed + 1) - 1, {NAME_BYTES} do
      names[#names + 1] = packed:sub(i, i + {NAME_BYTES - 1})
    end
    redis.call(command, KEYS[1], unpack(names))
  end
end
"""

APPLY = Script(
    EACH_SLICE
    + """
local instance, expected, count = unpack(
  redis.call('HMGET', KEYS[2], 'instance', 'expected', 'count'))
if instance ~= ARGV[1] or tonumber(count) ~= redis.call('SCARD', KEYS[1]) then return -1 end
if expected ~= ARGV[2] then return tonumber(expected) end
each_slice('SREM', ARGV[5])
each_slice('SADD', ARGV[4])
redis.call('HSET', KEYS[2], 'expected', ARGV[3], 'count', redis.call('SCARD', KEYS[1]))
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
"""
)
"""KEYS: set of names, what it is of. ARGV: instance, first batch, batch after the last, names
stored, names removed, lease. Returns nothing, or the batch expected, or -1 to begin anew."""

REBUILD = Script(
    EACH_SLICE
    + """
redis.call('UNLINK', KEYS[1])
each_slice('SADD', ARGV[3])
redis.call('HSET', KEYS[2], 'instance', ARGV[1], 'expected', ARGV[2],
           'count', redis.call('SCARD', KEYS[1]))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
"""
)
"""KEYS: set of names, what it is of. ARGV: instance, next batch, names, lease."""

NOW_MS = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
"""

BEAT = Script(
    NOW_MS
    + """
local before = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
redis.call('ZADD', KEYS[1], now_ms + ARGV[2], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return (before and tonumber(before) > now_ms) and 1 or 0
"""
)
"""KEYS: replicas by the time at which their leases end. ARGV: replica, lease. Returns 1 if it was
alive already."""

ALIVE = Script(NOW_MS + "return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now_ms, '+inf')")
"""KEYS: replicas by the time at which their leases end. Returns those that are alive."""
