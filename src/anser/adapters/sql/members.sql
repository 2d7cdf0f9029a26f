-- name: members
SELECT id, weight, in_flight_max, queued_max, tokens_per_minute, tokens_per_day, created_at
FROM members
ORDER BY id; -- a parent's path is a prefix of its children's, so it comes first

-- name: put_member
INSERT INTO members (
    id, weight, in_flight_max, queued_max, tokens_per_minute, tokens_per_day, created_at
)
VALUES (
    :id, :weight, :in_flight_max, :queued_max, :tokens_per_minute, :tokens_per_day, :created_at
)
ON CONFLICT (id) DO UPDATE SET
    weight = excluded.weight,
    in_flight_max = excluded.in_flight_max,
    queued_max = excluded.queued_max,
    tokens_per_minute = excluded.tokens_per_minute,
    tokens_per_day = excluded.tokens_per_day,
    created_at = excluded.created_at;

-- name: keys
SELECT id, hash, member, label, scope, created_at, expires_at, revoked_at
FROM keys
ORDER BY id;

-- name: put_key
INSERT INTO keys (id, hash, member, label, scope, created_at, expires_at, revoked_at)
VALUES (:id, :hash, :member, :label, :scope, :created_at, :expires_at, :revoked_at)
ON CONFLICT (id) DO UPDATE SET
    hash = excluded.hash,
    member = excluded.member,
    label = excluded.label,
    scope = excluded.scope,
    created_at = excluded.created_at,
    expires_at = excluded.expires_at,
    revoked_at = excluded.revoked_at;

-- name: forget_key
DELETE FROM keys
WHERE id = ?;
