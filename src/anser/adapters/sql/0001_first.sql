-- The first form of the store: members, keys, nodes, receipts in signed batches.

CREATE TABLE members (
    id                TEXT PRIMARY KEY,
    weight            INTEGER NOT NULL,
    in_flight_max     INTEGER,
    queued_max        INTEGER,
    tokens_per_minute INTEGER,
    tokens_per_day    INTEGER,
    created_at        REAL NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    id         TEXT PRIMARY KEY,
    hash       BLOB NOT NULL,
    member     TEXT NOT NULL,
    label      TEXT NOT NULL,
    scope      TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    revoked_at REAL
) STRICT, WITHOUT ROWID;

CREATE TABLE nodes (
    id           TEXT PRIMARY KEY,
    url          TEXT NOT NULL,
    model        TEXT,
    slots        INTEGER,
    key_file     TEXT,
    jurisdiction TEXT,
    draining     INTEGER NOT NULL CHECK (draining IN (0, 1))
) STRICT, WITHOUT ROWID;

-- A batch has the number of its first receipt; the others follow without a gap.
CREATE TABLE batches (
    id         INTEGER PRIMARY KEY,
    size       INTEGER NOT NULL CHECK (size > 0),
    root       BLOB NOT NULL,
    public_key BLOB NOT NULL,
    signature  BLOB NOT NULL,
    signed_ms  INTEGER NOT NULL
) STRICT;

-- The leaf is the receipt, as it was signed; the other columns are copies, to look up and to sum.
CREATE TABLE receipts (
    id                INTEGER PRIMARY KEY,
    batch             INTEGER NOT NULL REFERENCES batches (id),
    request           TEXT NOT NULL UNIQUE,
    member            TEXT NOT NULL,
    model             TEXT NOT NULL,
    outcome           TEXT NOT NULL,
    ended_ms          INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    cached_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    leaf              BLOB NOT NULL
) STRICT;

-- The newest of one member: entries are (member, id).
CREATE INDEX receipts_newest ON receipts (member);

-- Sums of one member over a time, from the index alone.
CREATE INDEX receipts_usage ON receipts (
    member, ended_ms, model, outcome, prompt_tokens, cached_tokens, completion_tokens
);
