-- Who owns a node, and what owners have earned by what their nodes served to others.

ALTER TABLE nodes ADD COLUMN member TEXT NOT NULL DEFAULT '';

-- Copies of what follows from the leaf: null where nobody has earned anything.
ALTER TABLE receipts ADD COLUMN owner TEXT;
ALTER TABLE receipts ADD COLUMN credit INTEGER;

-- Sums over a time, from the index alone.
CREATE INDEX receipts_contributed ON receipts (ended_ms, owner, credit) WHERE credit > 0;
