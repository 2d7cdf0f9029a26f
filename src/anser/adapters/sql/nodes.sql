-- name: nodes
SELECT id, url, model, slots, key_file, jurisdiction, draining, member
FROM nodes
ORDER BY id;

-- name: put_node
INSERT INTO nodes (id, url, model, slots, key_file, jurisdiction, draining, member)
VALUES (:id, :url, :model, :slots, :key_file, :jurisdiction, :draining, :member)
ON CONFLICT (id) DO UPDATE SET
    url = excluded.url,
    model = excluded.model,
    slots = excluded.slots,
    key_file = excluded.key_file,
    jurisdiction = excluded.jurisdiction,
    draining = excluded.draining,
    member = excluded.member;

-- name: forget_node
DELETE FROM nodes
WHERE id = ?;
