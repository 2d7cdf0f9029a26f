/* A mock engine: OpenAI's chat completions without a model, for measurements.
 *
 *     engine PORTS       listens on so many free ports of loopback and prints them, in one line
 *
 * How an answer is made stands in the prompt: "@chunks=8 @every_us=10000" is an answer of eight
 * tokens, the first at once, then 10 ms apart; with 0, or where nothing is said, all come at once. A token is
 * "~NUMBER:NANOSECONDS~ ", its number in the answer and the moment when it was made, so that who
 * reads it can tell that none is missing and how long it was under way.
 *
 * One thread, epoll, keep-alive. Streams that wait are in a heap by the moment of their next token.
 */
#define _GNU_SOURCE
#include "wire.h"

#include <ctype.h>

#define EVENTS 256
#define BODY_MAX (16u << 20)
#define CHUNKS_MAX 1000000

struct conn {
    int fd;
    bool writing;    /* waits until the other side reads */
    bool usage;      /* was asked for in the stream */
    bool asleep;     /* is in the heap */
    struct bytes in, out;
    size_t prompt;   /* tokens of the prompt, about */
    long number, chunks;
    uint64_t every, due;
};

static int epoll_fd, timer_fd;
static struct conn **heap;
static size_t sleeping, heap_size;

/* The heap: whose token is due first is at its top. */

static void sleep_until(struct conn *c, uint64_t due) {
    if (sleeping == heap_size) {
        heap_size = heap_size ? heap_size * 2 : 64;
        if (!(heap = realloc(heap, heap_size * sizeof *heap))) die("realloc");
    }
    c->due = due;
    c->asleep = true;
    size_t at = sleeping++;
    for (; at && heap[(at - 1) / 2]->due > due; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = c;
}

static struct conn *wake_first(void) {
    struct conn *first = heap[0], *last = heap[--sleeping];
    size_t at = 0;
    for (size_t next = 1; next < sleeping; next = 2 * at + 1) {
        if (next + 1 < sleeping && heap[next + 1]->due < heap[next]->due) next++;
        if (heap[next]->due >= last->due) break;
        heap[at] = heap[next];
        at = next;
    }
    heap[at] = last;
    first->asleep = false;
    return first;
}

/* Closed at once, but freed only when it has left the heap. */
static void hang_up(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    if (c->asleep) return;
    free(c->in.data);
    free(c->out.data);
    free(c);
}

/* What is answered */

static void answer(struct conn *c, const char *status, const char *body, size_t length) {
    bytes_print(&c->out,
                "HTTP/1.1 %s\r\nserver: wire\r\ncontent-type: application/json\r\n"
                "content-length: %zu\r\n\r\n", status, length);
    bytes_add(&c->out, body, length);
}

static void chunk(struct conn *c, const char *data) {
    bytes_print(&c->out, "%zx\r\ndata: %s\n\n\r\n", strlen(data) + 8, data);
}

static void event(struct conn *c, const char *choices, const char *usage) {
    char data[512];
    snprintf(data, sizeof data,
             "{\"id\":\"chatcmpl-wire\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
             "\"model\":\"wire\",\"choices\":[%s]%s}", choices, usage);
    chunk(c, data);
}

static void token(struct conn *c) {
    char choice[160];
    snprintf(choice, sizeof choice,
             "{\"index\":0,\"delta\":{\"content\":\"~%ld:%llu~ \"},\"finish_reason\":null}",
             c->number++, (unsigned long long)now_ns());
    event(c, choice, "");
}

static void usage(const struct conn *c, char *text, size_t size) {
    snprintf(text, size,
             ",\"usage\":{\"prompt_tokens\":%zu,\"completion_tokens\":%ld,\"total_tokens\":%zu}",
             c->prompt, c->chunks, c->prompt + (size_t)c->chunks);
}

static void stream_begin(struct conn *c) {
    bytes_print(&c->out, "HTTP/1.1 200 OK\r\nserver: wire\r\ncontent-type: text/event-stream\r\n"
                         "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n");
    event(c, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
             "\"finish_reason\":null}", "");
}

static void stream_end(struct conn *c) {
    char text[160];
    event(c, "{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}", "");
    usage(c, text, sizeof text);
    if (c->usage) event(c, "", text);
    chunk(c, "[DONE]");
    bytes_add(&c->out, "0\r\n\r\n", 5);
}

static void whole(struct conn *c) {
    struct bytes body = {0};
    char text[160];
    bytes_print(&body, "{\"id\":\"chatcmpl-wire\",\"object\":\"chat.completion\","
                       "\"created\":1700000000,\"model\":\"wire\",\"choices\":[{\"index\":0,"
                       "\"message\":{\"role\":\"assistant\",\"content\":\"");
    while (c->number < c->chunks)
        bytes_print(&body, "~%ld:%llu~ ", c->number++, (unsigned long long)now_ns());
    usage(c, text, sizeof text);
    bytes_print(&body, "\"},\"finish_reason\":\"stop\"}]%s}", text);
    answer(c, "200 OK", body.data, body.used);
    free(body.data);
}

/* What is asked */

static long asked(const char *body, const char *name, long otherwise, long most) {
    const char *found = strstr(body, name);
    long value = found ? atol(found + strlen(name)) : otherwise;
    return value < 0 ? 0 : value > most ? most : value;
}

/* Whether the body has this field with the value true; in a prompt, its quotes would be escaped. */
static bool is_true(const char *body, const char *field) {
    const char *found = strstr(body, field);
    if (!found) return false;
    for (found += strlen(field); isspace((unsigned char)*found) || *found == ':';) found++;
    return !strncmp(found, "true", 4);
}

static void complete(struct conn *c, const char *body, size_t length) {
    c->number = 0;
    c->chunks = asked(body, "@chunks=", 8, CHUNKS_MAX);
    c->every = (uint64_t)asked(body, "@every_us=", 0, 3600000000) * 1000;
    c->usage = is_true(body, "\"include_usage\"");
    c->prompt = length / 4 + 1;
    if (!is_true(body, "\"stream\"")) {
        whole(c);
        return;
    }
    stream_begin(c);
    do {
        if (c->chunks) token(c);
    } while (!c->every && c->number < c->chunks);
    if (c->number < c->chunks) sleep_until(c, now_ns() + c->every);
    else stream_end(c);
}

static void handle(struct conn *c, const char *head, const char *body, size_t length) {
    static const char models[] =
        "{\"object\":\"list\",\"data\":[{\"id\":\"wire\",\"object\":\"model\","
        "\"created\":1700000000,\"owned_by\":\"wire\",\"max_model_len\":131072}]}";
    if (!strncmp(head, "POST /v1/chat/completions ", 26)) complete(c, body, length);
    else if (!strncmp(head, "GET /v1/models ", 15)) answer(c, "200 OK", models, sizeof models - 1);
    else if (!strncmp(head, "GET /health ", 12)) answer(c, "200 OK", "{}", 2);
    else answer(c, "404 Not Found", "{}", 2);
}

/* Take whole requests from the bytes that came; false: it cannot be understood. */
static bool take(struct conn *c) {
    char *end;
    while (!c->asleep && c->in.used && (end = strstr(c->in.data, "\r\n\r\n"))) {
        const char *value = header(c->in.data, "content-length");
        size_t head = (size_t)(end - c->in.data) + 4, length = value ? strtoul(value, NULL, 10) : 0;
        if (length > BODY_MAX || header(c->in.data, "transfer-encoding")) return false;
        if (c->in.used < head + length) return true;
        char after = c->in.data[head + length];
        c->in.data[head + length] = 0;
        handle(c, c->in.data, c->in.data + head, length);
        c->in.data[head + length] = after;
        bytes_take(&c->in, head + length);
    }
    return true;
}

/* Sockets */

static bool flush(struct conn *c) {
    while (c->out.used) {
        ssize_t sent = send(c->fd, c->out.data, c->out.used, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && errno != EAGAIN) return false;
        if (sent < 0) break;
        bytes_take(&c->out, (size_t)sent);
    }
    if (c->writing != (c->out.used > 0)) {
        c->writing = !c->writing;
        watch(epoll_fd, EPOLL_CTL_MOD, c->fd, EPOLLIN | (c->writing ? EPOLLOUT : 0), c);
    }
    return true;
}

static bool receive(struct conn *c) {
    for (;;) {
        bytes_room(&c->in, 4096);
        size_t room = c->in.size - c->in.used - 1;
        ssize_t got = recv(c->fd, c->in.data + c->in.used, room, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno == EAGAIN;
        if (got == 0 || c->in.used + (size_t)got > BODY_MAX + (64u << 10)) return false;
        c->in.used += (size_t)got;
        c->in.data[c->in.used] = 0;
        if ((size_t)got < room) return true;
    }
}

static void welcome(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(epoll_fd, EPOLL_CTL_ADD, fd, EPOLLIN, c);
    }
    if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR) die("accept");
}

/* Make the tokens that are due, and set the timer for the next. */
static void make_tokens(void) {
    uint64_t now = now_ns();
    while (sleeping && heap[0]->due <= now) {
        struct conn *c = wake_first();
        if (c->fd < 0) {
            hang_up(c);
            continue;
        }
        token(c);
        if (c->number < c->chunks) sleep_until(c, c->due + c->every);
        else stream_end(c);
        if (!take(c) || !flush(c)) hang_up(c);
    }
    timer_set(timer_fd, sleeping ? heap[0]->due : 0);
}

static void listen_on(int ports, struct conn *listeners) {
    for (int i = 0; i < ports; i++) {
        struct sockaddr_in address = loopback(0);
        socklen_t size = sizeof address;
        int fd = socket_new();
        if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, 4096)) die("listen");
        if (getsockname(fd, (struct sockaddr *)&address, &size)) die("getsockname");
        listeners[i] = (struct conn){.fd = fd};
        watch(epoll_fd, EPOLL_CTL_ADD, fd, EPOLLIN, &listeners[i]);
        printf("%d ", ntohs(address.sin_port));
    }
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    int ports = argc == 2 ? atoi(argv[1]) : 0;
    if (ports < 1 || ports > 1000) {
        fprintf(stderr, "usage: engine PORTS\n");
        return 2;
    }
    end_with_parent();
    struct conn *listeners = calloc((size_t)ports, sizeof *listeners);
    struct epoll_event events[EVENTS];
    if (!listeners || (epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    timer_fd = timer_new(epoll_fd);
    listen_on(ports, listeners);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, EVENTS, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < count; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c) continue; /* the timer: make_tokens sets it anew */
            if (c >= listeners && c < listeners + ports) welcome(c->fd);
            else if (!((events[i].events & EPOLLIN) == 0 || receive(c)) || !take(c) || !flush(c) ||
                     (events[i].events & (EPOLLERR | EPOLLHUP)))
                hang_up(c);
        }
        make_tokens();
    }
}
