/* A load for gateways: OpenAI's chat completions over kept-alive connections, each answer checked.
 *
 *     load port=8000 connections=64 seconds=2 [warm_ms=500] [rate=100] [stream=1] [chunks=8]
 *          [every_us=0] [idle=0] [idle_us=20000000] [prompt=750] [model=wire] [key=...]
 *
 * Without a rate, each connection sends its next request when it has its answer. With one, requests
 * are sent at even moments by whichever connection is free, and waits count from the moment when
 * they were due. When all connections have answered once, it says "open", warms up, says "begin",
 * counts for so many seconds, says "end", and what it counted, as JSON. Streams that are under way at the
 * end are cut; nothing else may be.
 *
 * An answer is right if its status is 200, its body is whole, it has each token of the engine once
 * and in order (see engine.c), and a stream ends with [DONE]. Anything else is an error. How long a
 * chunk was under way is the time since the moment written in it. One thread, epoll.
 */
#define _GNU_SOURCE
#include "wire.h"

#define EVENTS 256
#define HEAD_MAX 65536
#define OPENING_MAX 64      /* connections that have not answered yet */
#define OPEN_MAX (300 * SECOND) /* until all connections have answered once */
#define SILENCE_MAX (30 * SECOND)
#define TAIL 16

static struct {
    long port, connections, seconds, warm_ms, rate, stream, chunks, every_us, idle, idle_us, prompt;
    const char *model, *key;
} ask = {.connections = 64, .seconds = 2, .warm_ms = 500, .chunks = 8, .idle_us = 20000000,
         .prompt = 750, .model = "wire", .key = ""};

enum body { LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, CLOSE };
enum token { OUTSIDE, NUMBER, STAMP };

struct conn {
    int fd;
    bool asking, answered, in_body, closing;
    uint64_t due, heard;          /* when the request was due; when something came last */
    struct bytes in;              /* a head, or the line of a chunk's size */
    size_t unsent;                /* of the request */
    struct bytes out;
    enum body body;
    unsigned long left;           /* bytes of the body, or of its chunk */
    enum token token;
    unsigned long number, stamp;  /* of the token that is read */
    long tokens;
    char tail[TAIL];              /* the end of the text so far */
};

/* Nanoseconds, to be sorted. */
struct sample {
    uint64_t *data;
    size_t used, size;
};

static int epoll_fd, timer_fd;
static struct conn *conns, **idle;
static long opened, opening, answered, idling;
static uint64_t started, begun, window_begin, window_end, next_due, serial;
static bool counting;
static struct sample waits, delays;
static long requests, chunks, errors;
static char first_error[200] = "";

static void sample_add(struct sample *s, uint64_t value) {
    if (s->used == s->size) {
        s->size = s->size ? s->size * 2 : 4096;
        if (!(s->data = realloc(s->data, s->size * sizeof *s->data))) die("realloc");
    }
    s->data[s->used++] = value;
}

static int smaller(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static double percentile_us(struct sample *s, double part) {
    if (!s->used) return 0;
    qsort(s->data, s->used, sizeof *s->data, smaller);
    return (double)s->data[(size_t)(part * (double)(s->used - 1) + 0.5)] / 1000;
}

static void dial(struct conn *c);
static void send_request(struct conn *c, uint64_t due);

/* Count an error, and begin anew with this connection. */
static void fail(struct conn *c, const char *what) {
    if (!errors++) {
        snprintf(first_error, sizeof first_error, "%s%s%.120s", what, c->in.used ? ": " : "",
                 c->in.used ? c->in.data : "");
        for (char *at = first_error; *at; at++)
            if ((unsigned char)*at < ' ' || (unsigned char)*at > '~' || strchr("\"\\", *at))
                *at = ' ';
    }
    if (errors > 100) {
        fprintf(stderr, "load: too many errors, first: %s\n", first_error);
        exit(1);
    }
    close(c->fd);
    dial(c);
}

/* Requests */

static bool push(struct conn *c) {
    while (c->unsent) {
        const char *from = c->out.data + c->out.used - c->unsent;
        ssize_t sent = send(c->fd, from, c->unsent, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && errno != EAGAIN && errno != ENOTCONN) return false;
        if (sent < 0) break;
        c->unsent -= (size_t)sent;
        if (!c->unsent) watch(epoll_fd, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
    }
    return true;
}

/* Prompts differ from their beginning on, as those of strangers do. */
static void write_request(struct conn *c) {
    static struct bytes body;
    body.used = 0;
    bytes_print(&body, "{\"model\":\"%s\",\"max_tokens\":%ld,\"stream\":%s,", ask.model,
                ask.chunks ? ask.chunks : 1, ask.stream ? "true" : "false");
    bytes_print(&body, "\"messages\":[{\"role\":\"user\",\"content\":\"%016llx @chunks=%ld "
                       "@every_us=%ld", (unsigned long long)++serial, ask.chunks,
                c - conns < ask.idle ? ask.idle_us : ask.every_us);
    while (body.used + 4 < (size_t)ask.prompt) bytes_add(&body, " lorem ipsum", 12);
    bytes_print(&body, "\"}]}");
    c->out.used = 0;
    bytes_print(&c->out, "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%ld\r\n"
                         "content-type: application/json\r\ncontent-length: %zu\r\n", ask.port,
                body.used);
    if (*ask.key) bytes_print(&c->out, "authorization: Bearer %s\r\n", ask.key);
    bytes_add(&c->out, "\r\n", 2);
    bytes_add(&c->out, body.data, body.used);
    c->unsent = c->out.used;
}

static void send_request(struct conn *c, uint64_t due) {
    c->asking = true;
    c->in_body = c->closing = false;
    c->due = due;
    c->heard = now_ns();
    c->in.used = 0;
    c->token = OUTSIDE;
    c->tokens = 0;
    memset(c->tail, 0, TAIL);
    write_request(c);
    if (c->answered) watch(epoll_fd, EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLOUT, c);
    if (c->answered && !push(c)) fail(c, "the connection broke while it was asked");
}

/* The first request goes out as soon as the connection is there. */
static void dial(struct conn *c) {
    struct sockaddr_in address = loopback((int)ask.port);
    if (c->answered) answered--, opening++;
    c->answered = false;
    c->fd = socket_new();
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        die("connect");
    watch(epoll_fd, EPOLL_CTL_ADD, c->fd, EPOLLIN | EPOLLOUT, c);
    send_request(c, now_ns());
}

static void dial_more(void) {
    while (opened < ask.connections && opening < OPENING_MAX) {
        opening++;
        dial(&conns[opened++]);
    }
}

static void first_answer(struct conn *c) {
    if (c->answered) return;
    c->answered = true;
    answered++;
    opening--;
}

/* Answers */

static void token_done(struct conn *c) {
    uint64_t now = now_ns();
    if ((long)c->number != c->tokens++) c->tokens = -1000000000; /* none after it is right */
    if (!counting) return;
    chunks++;
    sample_add(&delays, now - c->stamp);
}

/* Find tokens in a piece of the text, which may begin and end anywhere in one. */
static void read_text(struct conn *c, const char *data, size_t length) {
    if (length >= TAIL) memcpy(c->tail, data + length - TAIL, TAIL);
    else {
        memmove(c->tail, c->tail + length, TAIL - length);
        memcpy(c->tail + TAIL - length, data, length);
    }
    const char *end = data + length;
    while (data < end) {
        if (c->token == OUTSIDE) {
            if (!(data = memchr(data, '~', (size_t)(end - data)))) return;
            c->token = NUMBER;
            c->number = c->stamp = 0;
        } else if (*data >= '0' && *data <= '9') {
            unsigned long *value = c->token == NUMBER ? &c->number : &c->stamp;
            *value = *value * 10 + (unsigned long)(*data - '0');
        } else if (*data == ':') c->token = STAMP;
        else {
            if (*data == '~' && c->token == STAMP) token_done(c);
            c->token = OUTSIDE;
        }
        data++;
    }
}

static bool answer_done(struct conn *c) {
    uint64_t now = now_ns();
    if (c->tokens != ask.chunks) {
        fail(c, "an answer has not the tokens that it should");
        return false;
    }
    if (ask.stream && !memmem(c->tail, TAIL, "[DONE]", 6)) {
        fail(c, "a stream has no end");
        return false;
    }
    first_answer(c);
    if (counting && c->due >= window_begin) sample_add(&waits, now - c->due);
    if (counting) requests++;
    c->asking = false;
    if (c->closing) {
        close(c->fd);
        dial(c);
        return false;
    }
    if (!ask.rate) send_request(c, now);
    else idle[idling++] = c;
    return true;
}

/* The head is whole: how long is the body? */
static const char *read_head(struct conn *c) {
    const char *value = header(c->in.data, "connection");
    if (strncmp(c->in.data, "HTTP/1.1 200", 12)) return "not answered";
    c->closing = value && !strncasecmp(value, "close", 5);
    c->in_body = true;
    c->in.used = 0;
    if ((value = header(c->in.data, "transfer-encoding"))) c->body = CHUNK_SIZE;
    else if ((value = header(c->in.data, "content-length"))) {
        c->body = LENGTH;
        c->left = strtoul(value, NULL, 10);
    } else {
        c->body = CLOSE;
        c->closing = true;
    }
    return NULL;
}

/* Take bytes up to a line's end; true when the line is whole, in c->in. */
static bool read_line(struct conn *c, const char **data, const char *end) {
    const char *feed = memchr(*data, '\n', (size_t)(end - *data));
    const char *until = feed ? feed + 1 : end;
    bytes_add(&c->in, *data, (size_t)(until - *data));
    *data = until;
    return feed != NULL;
}

/* Read a piece of the body; true when it is whole. */
static bool read_body(struct conn *c, const char **data, const char *end) {
    if (c->body == LENGTH || c->body == CHUNK_DATA || c->body == CLOSE) {
        size_t length = (size_t)(end - *data);
        if (c->body != CLOSE && length > c->left) length = c->left;
        read_text(c, *data, length);
        *data += length;
        c->left -= length;
        if (c->body == CHUNK_DATA && !c->left) c->body = CHUNK_END;
        return c->body == LENGTH && !c->left;
    }
    if (!read_line(c, data, end)) return false;
    if (c->body == CHUNK_SIZE) {
        c->left = strtoul(c->in.data, NULL, 16);
        c->body = c->left ? CHUNK_DATA : TRAILER;
    } else if (c->body == CHUNK_END) c->body = CHUNK_SIZE;
    else if (c->in.used <= 2) {
        c->in.used = 0;
        return true;
    }
    c->in.used = 0;
    return false;
}

static void read_bytes(struct conn *c, const char *data, size_t length) {
    const char *end = data + length, *wrong;
    if (!c->asking) {
        fail(c, "bytes that nobody asked for");
        return;
    }
    while (data < end) {
        if (c->in_body) {
            if (!read_body(c, &data, end)) {
                if (c->tokens) first_answer(c);
                continue;
            }
            if (data < end) fail(c, "bytes after an answer");
            else answer_done(c);
            return;
        }
        while (data < end && read_line(c, &data, end) && c->in.used >= 4 &&
               memcmp(c->in.data + c->in.used - 4, "\r\n\r\n", 4)) {}
        if (c->in.used > HEAD_MAX) {
            fail(c, "a head without an end");
            return;
        }
        if (c->in.used < 4 || memcmp(c->in.data + c->in.used - 4, "\r\n\r\n", 4)) continue;
        if ((wrong = read_head(c))) {
            bytes_add(&c->in, data, (size_t)(end - data));
            fail(c, wrong);
            return;
        }
    }
}

static void read_some(struct conn *c) {
    static char data[65536];
    ssize_t got = recv(c->fd, data, sizeof data, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    c->heard = now_ns();
    if (got > 0) read_bytes(c, data, (size_t)got);
    else if (got == 0 && c->asking && c->in_body && c->body == CLOSE) answer_done(c);
    else fail(c, got ? "the connection broke" : "the connection was closed");
}

/* The run */

static void send_due(uint64_t now) {
    while (idling && next_due <= now) {
        send_request(idle[--idling], next_due);
        next_due += SECOND / (uint64_t)ask.rate;
    }
}

static void report(uint64_t now) {
    for (long i = 0; i < opened; i++)
        if (conns[i].asking && now - conns[i].heard > SILENCE_MAX && !errors++)
            snprintf(first_error, sizeof first_error, "nothing was heard for half a minute");
    printf("{\"seconds\":%.6f,\"requests\":%ld,\"chunks\":%ld,\"errors\":%ld,\"error\":\"%s\","
           "\"connections\":%ld,", (double)(now - window_begin) / SECOND, requests, chunks, errors,
           first_error, answered);
    printf("\"p50_us\":%.2f,\"p99_us\":%.2f,\"delay_p50_us\":%.2f,\"delay_p99_us\":%.2f}\n",
           percentile_us(&waits, .5), percentile_us(&waits, .99), percentile_us(&delays, .5),
           percentile_us(&delays, .99));
}

/* What the clock says is to be done; true at the end. */
static bool on_time(uint64_t now) {
    if (!begun && answered == ask.connections) {
        begun = next_due = now;
        window_begin = now + (uint64_t)ask.warm_ms * 1000000;
        window_end = window_begin + (uint64_t)ask.seconds * SECOND;
        puts("open");
        fflush(stdout);
    }
    if (!begun && now - started > OPEN_MAX) {
        fprintf(stderr, "load: only %ld of %ld connections have answered\n", answered,
                ask.connections);
        exit(1);
    }
    if (begun && !counting && now >= window_begin) {
        counting = true;
        window_begin = now;
        puts("begin");
        fflush(stdout);
    }
    if (begun && ask.rate) send_due(now);
    return counting && now >= window_end;
}

static void set_clock(void) {
    uint64_t next = !begun ? started + OPEN_MAX : counting ? window_end : window_begin;
    if (begun && ask.rate && idling && next_due < next) next = next_due;
    timer_set(timer_fd, next);
}

static bool option(const char *word) {
    static const struct { const char *name; long *value; } numbers[] = {
        {"port=", &ask.port}, {"connections=", &ask.connections}, {"seconds=", &ask.seconds},
        {"warm_ms=", &ask.warm_ms}, {"rate=", &ask.rate}, {"stream=", &ask.stream},
        {"chunks=", &ask.chunks}, {"every_us=", &ask.every_us}, {"idle=", &ask.idle}, {"idle_us=", &ask.idle_us},
        {"prompt=", &ask.prompt}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        size_t length = strlen(numbers[i].name);
        if (strncmp(word, numbers[i].name, length)) continue;
        *numbers[i].value = atol(word + length);
        return *numbers[i].value >= 0;
    }
    if (!strncmp(word, "model=", 6)) ask.model = word + 6;
    else if (!strncmp(word, "key=", 4)) ask.key = word + 4;
    else return false;
    return true;
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS];
    for (int i = 1; i < argc; i++)
        if (!option(argv[i])) {
            fprintf(stderr, "load: not an option: %s\n", argv[i]);
            return 2;
        }
    end_with_parent();
    conns = calloc((size_t)ask.connections, sizeof *conns);
    idle = calloc((size_t)ask.connections, sizeof *idle);
    if (!conns || !idle || (epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    timer_fd = timer_new(epoll_fd);
    started = now_ns();
    do {
        dial_more();
        set_clock();
        int count = epoll_wait(epoll_fd, events, EVENTS, (int)(SILENCE_MAX / 1000000));
        if (count < 0 && errno != EINTR) die("epoll_wait");
        if (count == 0) {
            fprintf(stderr, "load: nothing was heard for half a minute\n");
            return 1;
        }
        for (int i = 0; i < count; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c) continue;
            if ((events[i].events & EPOLLOUT) && !push(c)) fail(c, "the connection broke");
            else if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) read_some(c);
        }
    } while (!on_time(now_ns()));
    uint64_t now = now_ns();
    puts("end"); /* before the sorting, whose time is nobody's */
    fflush(stdout);
    report(now);
    return 0;
}
