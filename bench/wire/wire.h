/* What the engine and the load share: time, bytes, sockets. Linux only. */
#ifndef WIRE_H
#define WIRE_H

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#define SECOND 1000000000ull

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* Nanoseconds of one clock for all processes of this machine. */
static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

/* Bytes that grow at their end and are taken from their beginning; a 0 follows them. */
struct bytes {
    char *data;
    size_t used, size;
};

static void bytes_room(struct bytes *b, size_t more) {
    size_t need = b->used + more + 1;
    if (need <= b->size) return;
    size_t size = b->size ? b->size : 1024;
    while (size < need) size *= 2;
    if (!(b->data = realloc(b->data, size))) die("realloc");
    b->size = size;
}

static void bytes_add(struct bytes *b, const char *data, size_t length) {
    bytes_room(b, length);
    memcpy(b->data + b->used, data, length);
    b->used += length;
    b->data[b->used] = 0;
}

__attribute__((format(printf, 2, 3)))
static void bytes_print(struct bytes *b, const char *format, ...) {
    char line[1024];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (length < 0 || (size_t)length >= sizeof line) die("a line is too long");
    bytes_add(b, line, (size_t)length);
}

static void bytes_take(struct bytes *b, size_t length) {
    b->used -= length;
    if (b->used) memmove(b->data, b->data + length, b->used);
    if (b->size) b->data[b->used] = 0;
}

/* The value of a header in a head that ends with an empty line, or NULL. */
static const char *header(const char *head, const char *name) {
    size_t length = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (!strncmp(line, "\r\n\r\n", 4)) return NULL;
        if (strncasecmp(line + 2, name, length) || line[2 + length] != ':') continue;
        const char *value = line + 3 + length;
        return value + strspn(value, " \t");
    }
    return NULL;
}

static void watch(int epoll, int how, int fd, uint32_t events, void *data) {
    struct epoll_event event = {.events = events, .data.ptr = data};
    if (epoll_ctl(epoll, how, fd, &event)) die("epoll_ctl");
}

/* Let the timer fire at this moment; 0 stops it. */
static void timer_set(int timer, uint64_t at) {
    struct itimerspec when = {
        .it_value = {.tv_sec = (time_t)(at / SECOND), .tv_nsec = (long)(at % SECOND)}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL)) die("timerfd_settime");
}

static int timer_new(int epoll) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (timer < 0) die("timerfd_create");
    watch(epoll, EPOLL_CTL_ADD, timer, EPOLLIN, NULL);
    return timer;
}

static struct sockaddr_in loopback(int port) {
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

/* Nothing is left behind when the harness is killed. */
static void end_with_parent(void) {
    if (prctl(PR_SET_PDEATHSIG, SIGTERM)) die("prctl");
}

static int socket_new(void) {
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

#endif
