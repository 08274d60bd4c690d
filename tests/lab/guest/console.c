/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The guest's only program after init: everything that is said and heard on its serial console goes through this one
 * process, so that no line is ever broken by another. It is freestanding (no C library), so that any host's compiler
 * makes it, and small enough for a guest of 96 MB.
 *
 * Lines are 80 bytes, CR and LF included: "line ", ten digits, a space, 60 letters that start at another one for each
 * number, " .". A checker can so tell a lost, repeated or cut line; tests/lab/lines.py is one.
 */

typedef unsigned long u64;
typedef long s64;

enum { SYS_read = 0, SYS_write = 1, SYS_open = 2, SYS_close = 3, SYS_poll = 7, SYS_ioctl = 16, SYS_pipe = 22,
       SYS_dup2 = 33, SYS_nanosleep = 35, SYS_fork = 57, SYS_execve = 59, SYS_exit = 60, SYS_wait4 = 61, SYS_reboot = 169, SYS_iopl = 172, SYS_clock_gettime = 228 };

static s64 call(s64 number, s64 a, s64 b, s64 c, s64 d)
{
    s64 result;
    register s64 fourth __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}

/* The compiler may call these for copies and comparisons of its own. */
void *memcpy(void *to, const void *from, u64 size)
{
    char *t = to;
    const char *f = from;
    while (size--)
        *t++ = *f++;
    return to;
}

void *memset(void *to, int byte, u64 size)
{
    char *t = to;
    while (size--)
        *t++ = (char)byte;
    return to;
}

static u64 length(const char *text)
{
    u64 n = 0;
    while (text[n])
        n++;
    return n;
}

static int starts(const char *text, const char *with)
{
    while (*with)
        if (*text++ != *with++)
            return 0;
    return 1;
}

static u64 now(void)
{
    s64 spec[2];
    call(SYS_clock_gettime, 1, (s64)spec, 0, 0);
    return (u64)spec[0] * 1000000000UL + (u64)spec[1];
}

static void doze(u64 nanoseconds)
{
    s64 spec[2] = { (s64)(nanoseconds / 1000000000UL), (s64)(nanoseconds % 1000000000UL) };
    call(SYS_nanosleep, (s64)spec, 0, 0, 0);
}

/* ---- the kernel command line ---- */

static char cmdline[4096];

static const char *option(const char *name)
{
    const char *at = cmdline;
    for (; *at; at++)
        if ((at == cmdline || at[-1] == ' ') && starts(at, name))
            return at + length(name);
    return 0;
}

/* ---- the terminal, and past it the UART itself ---- */

#define UART 0x3f8
#define MAX_RATE (~0UL)

struct termios { unsigned iflag, oflag, cflag, lflag; unsigned char line, control[19]; };

static int direct; /* 1: bytes go to the UART's ports: the terminal driver in between is far too slow for a flood */

static unsigned char port_in(unsigned short port)
{
    unsigned char value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* The UART takes 16 bytes once it says that its queue is empty; QEMU says so only while somebody takes its output. */
static void uart_put(const char *text, u64 size)
{
    while (size) {
        unsigned spins = 0;
        u64 part = size < 16 ? size : 16;
        while (!(port_in(UART + 5) & 0x20))
            if (++spins > 50)
                doze(200000);
        size -= part;
        __asm__ volatile("rep outsb" : "+S"(text), "+c"(part) : "d"((unsigned short)UART) : "memory");
    }
}

static void put(const char *text, u64 size)
{
    if (direct) {
        uart_put(text, size);
        return;
    }
    while (size) {
        s64 done = call(SYS_write, 1, (s64)text, (s64)size, 0);
        if (done <= 0)
            continue;
        text += done;
        size -= (u64)done;
    }
}

/* One whole line; the longest is what a terminal line can hold. */
static void say(const char *first, const char *second)
{
    static char buffer[8192];
    u64 a = length(first), b = length(second);
    if (a + b > sizeof(buffer) - 2)
        b = sizeof(buffer) - 2 - a;
    memcpy(buffer, first, a);
    memcpy(buffer + a, second, b);
    memcpy(buffer + a + b, "\r\n", 2);
    put(buffer, a + b + 2);
}

static void drain(void)
{
    if (!direct)
        call(SYS_ioctl, 1, 0x5409 /* TCSBRK */, 1, 0);
}

/* Every byte as it comes: echo and line editing are done here too, where they cannot cut a numbered line in two. */
static void raw_terminal(void)
{
    struct termios mode;
    call(SYS_ioctl, 0, 0x5401 /* TCGETS */, (s64)&mode, 0);
    mode.iflag = mode.oflag = mode.lflag = 0;
    mode.control[5] = 0; /* VTIME */
    mode.control[6] = 1; /* VMIN */
    call(SYS_ioctl, 0, 0x5402 /* TCSETS */, (s64)&mode, 0);
}

/* ---- numbered lines ---- */

static u64 rate, sent, wanted, began, began_at;
static char line[] = "line 0000000000 abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefgh .\r\n";

static char *next_line(void)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"
                                  "abcdefghijklmnopqrstuvwxyz";
    int digit = 14;
    while (digit > 4 && ++line[digit] > '9')
        line[digit--] = '0';
    sent++;
    memcpy(line + 16, letters + sent % 26, 60);
    return line;
}

static void decimal(u64 value, char *text)
{
    char digits[24];
    int n = 0;
    do
        digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n)
        *text++ = digits[--n];
    *text = 0;
}

static void stream(u64 new_rate, u64 count)
{
    drain();
    rate = count == 0 ? 0 : new_rate;
    wanted = count;
    began = now();
    began_at = sent;
    direct = rate == MAX_RATE && !option("console=hvc") && call(SYS_iopl, 3, 0, 0, 0) == 0;
}

/* Writes the lines that are due and returns for how many milliseconds nothing will be; -1 for ever. */
static int lines_due(void)
{
    static char batch[100 * 80];
    u64 due = 100, n;
    if (!rate)
        return -1;
    if (rate != MAX_RATE) {
        u64 passed = now() - began;
        u64 target = passed / 1000000000UL * rate + passed % 1000000000UL * rate / 1000000000UL;
        if (target > sent - began_at + rate) { /* held up for over a second: go on at the rate, don't catch up */
            began = now();
            began_at = sent;
            target = 0;
        }
        due = target > sent - began_at ? target - (sent - began_at) : 0;
        if (due > 100)
            due = 100;
    }
    if (due > wanted)
        due = wanted;
    for (n = 0; n < due; n++)
        memcpy(batch + n * 80, next_line(), 80);
    put(batch, due * 80);
    wanted -= due;
    if (!wanted) {
        char text[24];
        decimal(sent, text);
        say("virtd-lab end ", text);
        stream(0, 0);
        return -1;
    }
    if (rate == MAX_RATE || due == 100)
        return 0;
    return rate >= 100 ? 10 : (int)(1000 / rate) / 4 + 1;
}

/* ---- programs: one at a time, under busybox's shell; what they say comes as whole lines, each with a mark ---- */

static int output = -1; /* the end of the running command's pipe that we read */
static s64 child;
static char said[1024];
static u64 said_size;

static void tell(void)
{
    said[said_size] = 0;
    say("sh: ", said);
    said_size = 0;
}

static void run(const char *command)
{
    static char script[8192];
    static const char links[] = "[ -e /bin/sh ] || /bin/busybox --install -s /bin; ";
    const char *argv[] = { "sh", "-c", script, 0 };
    const char *environment[] = { "PATH=/bin", "HOME=/", "TERM=dumb", 0 };
    int ends[2];
    if (output >= 0) {
        say("virtd-lab: ", "a command is running");
        return;
    }
    memcpy(script, links, sizeof(links) - 1);
    memcpy(script + sizeof(links) - 1, command, length(command) + 1);
    call(SYS_pipe, (s64)ends, 0, 0, 0);
    child = call(SYS_fork, 0, 0, 0, 0);
    if (child == 0) {
        call(SYS_dup2, call(SYS_open, (s64)"/dev/null", 0, 0, 0), 0, 0, 0);
        call(SYS_dup2, ends[1], 1, 0, 0);
        call(SYS_dup2, ends[1], 2, 0, 0);
        call(SYS_close, ends[0], 0, 0, 0);
        call(SYS_close, ends[1], 0, 0, 0);
        call(SYS_execve, (s64)"/bin/busybox", (s64)argv, (s64)environment, 0);
        call(SYS_exit, 127, 0, 0, 0);
    }
    call(SYS_close, ends[1], 0, 0, 0);
    output = ends[0];
}

/* A command that leaves something in the background ends when that does, or lets go of the pipe. */
static void hear_program(void)
{
    char part[512], text[24];
    unsigned status = 0;
    s64 n = call(SYS_read, output, (s64)part, sizeof(part), 0), i;
    for (i = 0; i < n; i++) {
        if (part[i] == '\n' || said_size == sizeof(said) - 1)
            tell();
        if (part[i] != '\n')
            said[said_size++] = part[i];
    }
    if (n > 0)
        return;
    if (said_size)
        tell();
    call(SYS_close, output, 0, 0, 0);
    output = -1;
    call(SYS_wait4, child, (s64)&status, 0, 0);
    decimal(status & 127 ? 128 + (status & 127) : status >> 8 & 255, text);
    say("sh exit ", text);
}

/* ---- commands ---- */

static u64 number(const char **text)
{
    u64 value = 0;
    if (starts(*text, "max")) {
        *text += 3;
        return MAX_RATE;
    }
    while (**text >= '0' && **text <= '9')
        value = value * 10 + (u64)(*(*text)++ - '0');
    return value;
}

static void leave(const char *words, u64 how)
{
    say("virtd-lab: ", words);
    drain();
    call(SYS_reboot, 0xfee1dead, 672274793, (s64)how, 0);
}

static void obey(char *text)
{
    const char *rest = text;
    if (starts(text, "echo ")) {
        say(text + 5, "");
    } else if (starts(text, "lines ")) {
        u64 new_rate, count = ~0UL;
        rest += 6;
        new_rate = number(&rest);
        if (*rest == ' ') {
            rest++;
            count = number(&rest);
        }
        stream(new_rate, count);
    } else if (starts(text, "sh ")) {
        run(text + 3);
    } else if (starts(text, "poweroff")) {
        leave("powering off", 0x4321fedc);
    } else if (starts(text, "reboot")) {
        leave("rebooting", 0x01234567);
    } else if (starts(text, "panic")) {
        s64 trigger = call(SYS_open, (s64)"/proc/sysrq-trigger", 1, 0, 0);
        say("virtd-lab: ", "panicking");
        drain();
        call(SYS_write, trigger, (s64)"c", 1, 0);
    } else if (*text) {
        say("virtd-lab: no such command: ", text);
    }
}

/* What is typed is shown while no lines run; Enter ends a line, Backspace takes a byte back, too long a line is cut. */
static void hear(void)
{
    static char text[4200];
    static u64 have;
    char part[512];
    s64 n = call(SYS_read, 0, (s64)part, sizeof(part), 0), i;
    for (i = 0; i < n; i++) {
        int echo = rate == 0;
        if (part[i] == '\n' || part[i] == '\r') {
            if (echo)
                put("\r\n", 2);
            text[have] = 0;
            have = 0;
            obey(text);
        } else if (part[i] == 8 || part[i] == 127) {
            if (have && echo)
                put("\b \b", 3);
            have -= have > 0;
        } else if (have < sizeof(text) - 1) {
            text[have++] = part[i];
            if (echo)
                put(part + i, 1);
        }
    }
}

/* ---- the power button, and the loop ---- */

struct input_event { u64 seconds, microseconds; unsigned short type, code; int value; };
struct pollfd { int fd; short events, revents; };

static void begin(void)
{
    char path[] = "/dev/input/event0";
    struct pollfd fds[10];
    int count = 1, programs, ignore_button, i;
    const char *asked;
    s64 file = call(SYS_open, (s64)"/proc/cmdline", 0, 0, 0);
    s64 size = call(SYS_read, file, (s64)cmdline, sizeof(cmdline) - 1, 0);
    cmdline[size > 0 ? size : 0] = 0;
    fds[0].fd = 0;
    for (i = 0; i < 8; i++) {
        path[16] = (char)('0' + i);
        fds[count].fd = (int)call(SYS_open, (s64)path, 0, 0, 0);
        if (fds[count].fd >= 0)
            count++;
    }
    ignore_button = option("virtd.button=ignore") != 0;
    raw_terminal();
    say("virtd-lab ready", "");
    asked = option("virtd.rate=");
    if (asked) {
        u64 first_rate = number(&asked), lines = ~0UL;
        asked = option("virtd.lines=");
        if (asked)
            lines = number(&asked);
        if (first_rate)
            stream(first_rate, lines);
    }
    for (;;) {
        int wait = lines_due();
        fds[count].fd = output;
        programs = output >= 0;
        for (i = 0; i < count + programs; i++) {
            fds[i].events = 1;
            fds[i].revents = 0;
        }
        if (call(SYS_poll, (s64)fds, count + programs, wait, 0) <= 0)
            continue;
        if (programs && fds[count].revents)
            hear_program();
        if (fds[0].revents)
            hear();
        for (i = 1; i < count; i++) {
            struct input_event event;
            if (!fds[i].revents || call(SYS_read, fds[i].fd, (s64)&event, sizeof(event), 0) != sizeof(event))
                continue;
            if (event.type != 1 || event.code != 116 || event.value != 1)
                continue;
            if (ignore_button)
                say("virtd-lab: power button ignored", "");
            else
                leave("power button", 0x4321fedc);
        }
    }
}

/* The kernel enters with the stack aligned to 16 bytes, a function expects it after a call. */
__asm__(".globl _start\n_start:\n  xor %ebp, %ebp\n  call entry\n");
__attribute__((used)) void entry(void)
{
    begin();
    call(SYS_exit, 1, 0, 0, 0);
}
