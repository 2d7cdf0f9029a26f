-- name: nodes
SELECT id, url, model, slots, key_file, jurisdiction, draining
FROM nodes
ORDER BY id;

-- name: put_node
INSERT INTO nodes (id, url, model, slots, key_file, jurisdiction, draining)
VALUES (:id, :url, :model, :slots, :key_file, :jurisdiction, :draining)
ON CONFLICT (id) DO UPDATE SET
    url = excluded.url,
    model = excluded.model,
    slots = excluded.slots,
    key_file = excluded.key_file,
    jurisdiction = excluded.jurisdiction,
    draining = excluded.draining;

-- name: forget_node
DELETE FROM nodes
WHERE id = ?;
