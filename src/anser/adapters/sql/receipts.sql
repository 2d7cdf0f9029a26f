-- name: next_id
SELECT coalesce(max(id), 0) + 1
FROM receipts;

-- name: add_batch
INSERT INTO batches (id, size, root, public_key, signature, signed_ms)
VALUES (?, ?, ?, ?, ?, ?);

-- name: add_receipt
INSERT INTO receipts (
    id, batch, request, member, model, outcome,
    ended_ms, prompt_tokens, cached_tokens, completion_tokens, leaf, owner, credit
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (request) DO NOTHING;

-- name: leaf
SELECT leaf
FROM receipts
WHERE request = ?;

-- name: find
SELECT b.id, r.id - b.id, b.size, b.root, b.public_key, b.signature, b.signed_ms
FROM receipts AS r
INNER JOIN batches AS b ON b.id = r.batch
WHERE r.request = ?;

-- name: leaves
SELECT leaf
FROM receipts
WHERE id >= :batch AND id < :batch + :size
ORDER BY id;

-- name: usage
-- Walks the members from one to the next by the index, then sums each one's span of time.
-- A member's subtree is itself and the paths from 'member/' up to 'member0', since '0' follows '/'.
WITH RECURSIVE below (member) AS (
    SELECT (SELECT min(member) FROM receipts WHERE member >= :low AND member < :high)
    UNION ALL
    SELECT (
        SELECT min(r.member)
        FROM receipts AS r
        WHERE r.member > below.member AND r.member < :high
    )
    FROM below
    WHERE below.member IS NOT NULL
),
subtree (member) AS (
    SELECT :member WHERE :member IS NOT NULL
    UNION ALL
    SELECT member FROM below WHERE member IS NOT NULL
)
SELECT
    r.member,
    r.model,
    count(*),
    sum(r.outcome = 'failed'),
    sum(r.outcome = 'cancelled'),
    sum(r.prompt_tokens),
    sum(r.cached_tokens),
    sum(r.completion_tokens)
FROM subtree
CROSS JOIN receipts AS r INDEXED BY receipts_usage ON r.member = subtree.member
WHERE r.ended_ms >= :since_ms AND r.ended_ms < :until_ms
GROUP BY r.member, r.model
ORDER BY r.member, r.model;

-- name: recent
SELECT leaf
FROM receipts
ORDER BY id DESC
LIMIT :limit;

-- name: recent_of
-- The newest of each member in the subtree, then the newest of these; leaves are read last.
WITH RECURSIVE below (member) AS (
    SELECT (SELECT min(member) FROM receipts WHERE member >= :low AND member < :high)
    UNION ALL
    SELECT (
        SELECT min(r.member)
        FROM receipts AS r
        WHERE r.member > below.member AND r.member < :high
    )
    FROM below
    WHERE below.member IS NOT NULL
),
subtree (member) AS (
    SELECT :member
    UNION ALL
    SELECT member FROM below WHERE member IS NOT NULL
)
SELECT leaf
FROM receipts
WHERE id IN (
    SELECT r.id
    FROM subtree
    CROSS JOIN receipts AS r INDEXED BY receipts_newest
        ON r.member = subtree.member AND r.id >= coalesce(
            (
                SELECT newest.id
                FROM receipts AS newest INDEXED BY receipts_newest
                WHERE newest.member = subtree.member
                ORDER BY newest.id DESC
                LIMIT 1 OFFSET :limit - 1
            ),
            0
        )
    ORDER BY r.id DESC
    LIMIT :limit
)
ORDER BY id DESC;

-- name: credits
-- One row for each owner and span of `step_ms`; its time is the mean, weighted by the credit.
SELECT
    owner,
    total(credit),
    :since_ms + total(credit * 1.0 * (ended_ms - :since_ms)) / total(credit)
FROM receipts
WHERE credit > 0 AND ended_ms >= :since_ms AND ended_ms < :until_ms
GROUP BY owner, (ended_ms - :since_ms) / :step_ms
ORDER BY owner, (ended_ms - :since_ms) / :step_ms;
