/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A small process that virtd takes for a QEMU: monitors, event journal, console, exit statuses. A thousand of them fit
 * into a small machine. It takes virtd's own command line; of the kernel's (-append) it knows virtd.rate=N, so many of
 * the lab's numbered lines a second (tests/lab/lines.py checks them). A line on its console is answered, if it is
 * `echo WORD`, and obeyed, if it is `poweroff` or `lines RATE`.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#define MONITORS 2
#define GREETING "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 0, \"major\": 10}, \"package\": \"\"}, \"capabilities\": []}}"

struct monitor {
    int listener, client, ready;
    size_t length;
    char buffer[1 << 14];
};

static struct monitor monitors[MONITORS];
static int journal = -1, timer = -1;
static unsigned long number;
static char input[1 << 12];
static size_t typed;

static void all(int fd, const char *text, size_t size)
{
    while (size) {
        ssize_t done = write(fd, text, size);
        if (done < 0 && errno != EINTR && errno != EAGAIN)
            return;
        if (done > 0)
            text += done, size -= (size_t)done;
    }
}

static void tell(int fd, const char *message)
{
    char line[1 << 10];
    all(fd, line, (size_t)snprintf(line, sizeof line, "%s\r\n", message));
}

static void event(const char *name, const char *data)
{
    char message[512];
    snprintf(message, sizeof message,
             "{\"event\": \"%s\", \"data\": %s, \"timestamp\": {\"seconds\": 0, \"microseconds\": 0}}", name, data);
    tell(journal, message);
    for (int i = 0; i < MONITORS; i++)
        if (monitors[i].client >= 0 && monitors[i].ready)
            tell(monitors[i].client, message);
}

/* `words` is what QEMU says of it on stderr: its trace, or what it says of a signal. */
static void off(const char *data, const char *words)
{
    tell(2, words);
    event("SHUTDOWN", data);
    exit(0);
}

/* The text of the member `key` of a flat command, with its quotes; nothing if there is none. */
static void member(const char *command, const char *key, char *value, size_t size)
{
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *at = strstr(command, quoted);
    *value = 0;
    if (!at || !(at = strchr(at + strlen(quoted), '"')))
        return;
    const char *end = strchr(at + 1, '"');
    if (end && (size_t)(end - at) + 2 <= size) {
        memcpy(value, at, (size_t)(end - at) + 1);
        value[end - at + 1] = 0;
    }
}

static void obey(struct monitor *monitor, const char *command)
{
    char verb[128], id[128], reply[512];
    member(command, "execute", verb, sizeof verb);
    member(command, "id", id, sizeof id);
    if (!strcmp(verb, "\"qmp_capabilities\""))
        monitor->ready = 1;
    const char *value = "{}";
    if (!strcmp(verb, "\"query-status\""))
        value = "{\"status\": \"running\", \"running\": true}";
    if (!strcmp(verb, "\"qom-get\"")) /* asked of the machine's type only */
        value = "\"pc-q35-10.0-machine\"";
    snprintf(reply, sizeof reply, "{\"return\": %s%s%s}", value, *id ? ", \"id\": " : "", id);
    tell(monitor->client, reply);
    if (!strcmp(verb, "\"quit\""))
        off("{\"guest\": false, \"reason\": \"host-qmp-quit\"}", "qemu_system_shutdown_request reason=2");
    if (!strcmp(verb, "\"system_powerdown\""))
        off("{\"guest\": true, \"reason\": \"guest-shutdown\"}", "qemu_system_shutdown_request reason=6");
}

/* Commands are objects one after the other; none that virtd sends has a brace in a string. */
static void listen_to(struct monitor *monitor)
{
    ssize_t got = read(monitor->client, monitor->buffer + monitor->length, sizeof monitor->buffer - 1 - monitor->length);
    if (got <= 0) {
        close(monitor->client);
        monitor->client = -1;
        monitor->length = 0;
        monitor->ready = 0;
        return;
    }
    monitor->length += (size_t)got;
    size_t begin = 0;
    int depth = 0;
    for (size_t i = 0; i < monitor->length; i++) {
        depth += (monitor->buffer[i] == '{') - (monitor->buffer[i] == '}');
        if (monitor->buffer[i] == '}' && depth == 0) {
            char command[1 << 12];
            size_t size = i + 1 - begin < sizeof command ? i + 1 - begin : sizeof command - 1;
            memcpy(command, monitor->buffer + begin, size);
            command[size] = 0;
            obey(monitor, command);
            begin = i + 1;
        }
    }
    memmove(monitor->buffer, monitor->buffer + begin, monitor->length - begin);
    monitor->length -= begin;
}

static void rate(unsigned long lines)
{
    unsigned long every = lines ? 1000000000UL / lines : 0;
    struct itimerspec spec = { { (time_t)(every / 1000000000UL), (long)(every % 1000000000UL) },
                               { (time_t)(every / 1000000000UL), (long)(every % 1000000000UL) } };
    timerfd_settime(timer, 0, &spec, 0);
}

static void numbered(void)
{
    char line[128];
    int at = sprintf(line, "line %010lu ", ++number);
    for (int i = 0; i < 60; i++)
        line[at++] = (char)('a' + (number % 26 + (unsigned long)i) % 26);
    all(1, line, (size_t)(at + sprintf(line + at, " .\r\n")));
}

/* Nothing comes on a console that nobody has open to write: then it is left alone. */
static int hear(void)
{
    ssize_t got = read(0, input + typed, sizeof input - 1 - typed);
    if (got <= 0)
        return 0;
    typed += (size_t)got;
    input[typed] = 0;
    char *begin = input, *end;
    while ((end = strchr(begin, '\n'))) {
        *end = 0;
        if (!strncmp(begin, "echo ", 5)) {
            char line[1 << 12];
            all(1, line, (size_t)snprintf(line, sizeof line, "%s\r\n", begin + 5));
        } else if (!strncmp(begin, "lines ", 6)) {
            rate(strtoul(begin + 6, 0, 10));
        } else if (!strcmp(begin, "poweroff")) {
            off("{\"guest\": true, \"reason\": \"guest-shutdown\"}", "qemu_system_shutdown_request reason=6");
        }
        begin = end + 1;
    }
    typed = strlen(begin);
    memmove(input, begin, typed + 1);
    return 1;
}

static int listener(const char *path, size_t length)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (length >= sizeof address.sun_path)
        return -1;
    memcpy(address.sun_path, path, length);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1))
        return -1;
    return fd;
}

int main(int argc, char **argv)
{
    int found = 0, console = 1;
    unsigned long lines = 0;
    for (int i = 1; i + 1 < argc; i++) {
        const char *path = strstr(argv[i + 1], ",path=");
        if (!strcmp(argv[i], "-chardev") && path) {
            path += 6;
            if (!strncmp(argv[i + 1], "socket,", 7) && found < MONITORS) {
                monitors[found].client = -1;
                if ((monitors[found++].listener = listener(path, strcspn(path, ","))) < 0)
                    return 1;
            } else if (!strncmp(argv[i + 1], "pipe,", 5)) {
                char name[512];
                snprintf(name, sizeof name, "%s.out", path);
                journal = open(name, O_WRONLY | O_APPEND | O_CLOEXEC);
            }
        } else if (!strcmp(argv[i], "-append") && strstr(argv[i + 1], "virtd.rate=")) {
            lines = strtoul(strstr(argv[i + 1], "virtd.rate=") + 11, 0, 10);
        }
    }
    if (found != MONITORS)
        return 1;
    if (journal >= 0) {
        tell(journal, GREETING);
        tell(journal, "{\"return\": {}}");
    }
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigprocmask(SIG_BLOCK, &ends, 0);
    int signals = signalfd(-1, &ends, SFD_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    tell(1, "virtd-lab ready");
    rate(lines);
    for (;;) {
        struct pollfd fds[3 + MONITORS];
        fds[0] = (struct pollfd){ .fd = console ? 0 : -1, .events = POLLIN };
        fds[1] = (struct pollfd){ .fd = signals, .events = POLLIN };
        fds[2] = (struct pollfd){ .fd = timer, .events = POLLIN };
        for (int i = 0; i < MONITORS; i++)
            fds[3 + i].fd = monitors[i].client >= 0 ? monitors[i].client : monitors[i].listener, fds[3 + i].events = POLLIN;
        if (poll(fds, 3 + MONITORS, -1) < 0)
            continue;
        if (fds[0].revents)
            console = hear();
        if (fds[1].revents)
            off("{\"guest\": false, \"reason\": \"host-signal\"}", "terminating on signal 15");
        unsigned long times;
        if (fds[2].revents && read(timer, &times, sizeof times) == sizeof times)
            while (times--)
                numbered();
        for (int i = 0; i < MONITORS; i++)
            if (fds[3 + i].revents) {
                if (monitors[i].client >= 0) {
                    listen_to(&monitors[i]);
                } else if ((monitors[i].client = accept4(monitors[i].listener, 0, 0, SOCK_CLOEXEC)) >= 0) {
                    tell(monitors[i].client, GREETING);
                }
            }
    }
}
