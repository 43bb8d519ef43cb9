// A network of hosts with chosen delays and rates, where the kernel has no `tc netem`; needs root and Linux.
//
//   switch run HOSTS MTU GROUP…      makes HOSTS network namespaces without a name and joins them; prints "up FD FD …"
//   switch exec NAMESPACE GROUP… -- COMMAND…   runs COMMAND in a namespace (a path) and control groups (directories)
//
// Host k owns 10.99.0.(k+1)/24 on its TAP device lan0. A namespace lives as long as a process in it or the switch, which
// holds it open. Commands come on stdin, one a line, each answered by "ok" or a number:
//   delay A B MICROSECONDS   one way        rate A MBPS   of what A sends, 0: no limit
//   cut A B 0|1              1: lose frames from A to B        bytes A B   sent so far
// When stdin ends (close, or death of who started it), every process in GROUP… is killed and the groups go, then it ends.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { HOSTS = 32, FRAMES = 1 << 16, LARGEST = 9216, BURST = 64 };
static const uint64_t BACKLOG_NS = 200000000;  // what a limited link buffers before it drops

typedef struct {
    uint64_t due_ns, order;
    int from, to, length;
    unsigned char *bytes;
} frame;

static frame heap[FRAMES];
static int waiting, hosts;
static uint64_t orders, delay_ns[HOSTS][HOSTS], last_due[HOSTS][HOSTS], sent[HOSTS][HOSTS], free_at[HOSTS];
static double rate_mbps[HOSTS];
static int cut[HOSTS][HOSTS], tap[HOSTS];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int earlier(const frame *a, const frame *b) {
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->order < b->order;
}

static void push(frame f) {
    int at = waiting++;
    for (int up; at && earlier(&f, &heap[up = (at - 1) / 2]); at = up) heap[at] = heap[up];
    heap[at] = f;
}

static frame pop(void) {
    frame top = heap[0], f = heap[--waiting];
    int at = 0;
    for (int down; (down = 2 * at + 1) < waiting; at = down) {
        if (down + 1 < waiting && earlier(&heap[down + 1], &heap[down])) down++;
        if (!earlier(&heap[down], &f)) break;
        heap[at] = heap[down];
    }
    heap[at] = f;
    return top;
}

static void hardware_address(unsigned char *bytes, int host) {
    memcpy(bytes, (unsigned char[]){2, 0x6f, 0x73, 0x79, 0, host + 1}, 6);
}

static struct sockaddr address(const char *text, int host) {
    char full[32];
    snprintf(full, sizeof full, text, host + 1);
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(full)};
    struct sockaddr out;
    memcpy(&out, &in, sizeof out);
    return out;
}

// Leaves this process in a new namespace with its TAP device up; the neighbours are known, so nobody asks for them.
static int make_host(int host, int mtu) {
    if (unshare(CLONE_NEWNET)) die("unshare");
    int six = open("/proc/sys/net/ipv6/conf/all/disable_ipv6", O_WRONLY | O_CLOEXEC);
    if (six >= 0) {
        if (write(six, "1", 1) < 0) perror("disable_ipv6");
        close(six);
    }
    tap[host] = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq r = {.ifr_flags = IFF_TAP | IFF_NO_PI, .ifr_name = "lan0"};
    if (tap[host] < 0 || ioctl(tap[host], TUNSETIFF, &r)) die("/dev/net/tun");
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    r.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    hardware_address((unsigned char *)r.ifr_hwaddr.sa_data, host);
    if (s < 0 || ioctl(s, SIOCSIFHWADDR, &r)) die("hardware address");
    r.ifr_mtu = mtu;
    if (ioctl(s, SIOCSIFMTU, &r)) die("mtu");
    r.ifr_addr = address("10.99.0.%d", host);
    if (ioctl(s, SIOCSIFADDR, &r)) die("address");
    r.ifr_netmask = address("255.255.255.0", 0);
    if (ioctl(s, SIOCSIFNETMASK, &r)) die("netmask");
    r.ifr_flags = IFF_UP | IFF_RUNNING | IFF_MULTICAST | IFF_BROADCAST;
    if (ioctl(s, SIOCSIFFLAGS, &r)) die("up");
    struct ifreq loopback = {.ifr_flags = IFF_UP | IFF_RUNNING | IFF_LOOPBACK, .ifr_name = "lo"};
    if (ioctl(s, SIOCSIFFLAGS, &loopback)) die("lo");
    for (int other = 0; other < hosts; other++) {
        if (other == host) continue;
        struct arpreq known = {.arp_pa = address("10.99.0.%d", other), .arp_flags = ATF_COM | ATF_PERM, .arp_dev = "lan0"};
        hardware_address((unsigned char *)known.arp_ha.sa_data, other);
        if (ioctl(s, SIOCSARP, &known)) die("neighbour");
    }
    struct rtentry multicast = {.rt_dst = address("224.0.0.0", 0), .rt_genmask = address("240.0.0.0", 0),
                                .rt_flags = RTF_UP, .rt_dev = "lan0"};
    if (ioctl(s, SIOCADDRT, &multicast)) die("multicast route");
    close(s);
    int namespace = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (namespace < 0) die("/proc/self/ns/net");
    return namespace;
}

static void forward(int from, int to, const unsigned char *bytes, int length, uint64_t leaves) {
    sent[from][to] += length;
    if (cut[from][to] || waiting == FRAMES) return;
    uint64_t due = leaves + delay_ns[from][to];
    if (due < last_due[from][to]) due = last_due[from][to];  // a shorter delay does not reorder
    last_due[from][to] = due;
    frame f = {due, orders++, from, to, length, malloc(length)};
    if (!f.bytes) die("malloc");
    memcpy(f.bytes, bytes, length);
    push(f);
}

static void take(int from) {
    unsigned char bytes[LARGEST], own[6];
    for (int burst = 0; burst < BURST; burst++) {
        int length = read(tap[from], bytes, sizeof bytes);
        if (length < 14) return;
        uint64_t leaves = now_ns();
        if (rate_mbps[from] > 0) {
            if (free_at[from] < leaves) free_at[from] = leaves;
            if (free_at[from] - leaves > BACKLOG_NS) continue;
            leaves = free_at[from] += (uint64_t)(length * 8000.0 / rate_mbps[from]);
        }
        hardware_address(own, from);
        if (bytes[0] & 1) {
            for (int to = 0; to < hosts; to++)
                if (to != from) forward(from, to, bytes, length, leaves);
        } else if (!memcmp(bytes, own, 5) && bytes[5] >= 1 && bytes[5] <= hosts && bytes[5] - 1 != from) {
            forward(from, bytes[5] - 1, bytes, length, leaves);
        }
    }
}

static void deliver(void) {
    while (waiting && heap[0].due_ns <= now_ns()) {
        frame f = pop();
        if (!cut[f.from][f.to] && write(tap[f.to], f.bytes, f.length) < 0) { /* its queue is full: the frame is lost */ }
        free(f.bytes);
    }
}

static void command(const char *line) {
    int a, b;
    double value;
    if (sscanf(line, "delay %d %d %lf", &a, &b, &value) == 3 && a >= 0 && b >= 0 && a < hosts && b < hosts) {
        delay_ns[a][b] = value * 1000;
    } else if (sscanf(line, "cut %d %d %lf", &a, &b, &value) == 3 && a >= 0 && b >= 0 && a < hosts && b < hosts) {
        cut[a][b] = value != 0;
    } else if (sscanf(line, "rate %d %lf", &a, &value) == 2 && a >= 0 && a < hosts) {
        rate_mbps[a] = value;
    } else if (sscanf(line, "bytes %d %d", &a, &b) == 2 && a >= 0 && b >= 0 && a < hosts && b < hosts) {
        printf("%llu\n", (unsigned long long)sent[a][b]);
        return;
    } else {
        puts("error");
        return;
    }
    puts("ok");
}

static int commands(void) {
    static char text[4096];
    static size_t held;
    ssize_t got = read(0, text + held, sizeof text - 1 - held);
    if (got <= 0) return 0;
    text[held += got] = 0;
    char *end, *at = text;
    for (; (end = strchr(at, '\n')); at = end + 1) {
        *end = 0;
        command(at);
    }
    memmove(text, at, held -= at - text);
    fflush(stdout);
    return held < sizeof text - 1;
}

// A group goes once its dead are reaped; who started them may be dead too, and init takes a moment.
static void clean(const char *group, int depth) {
    char path[512];
    DIR *inner = opendir(group);
    if (!inner) return;
    for (struct dirent *e; depth < 4 && (e = readdir(inner));) {
        if (e->d_type != DT_DIR || e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", group, e->d_name);
        clean(path, depth + 1);
    }
    closedir(inner);
    for (int attempt = 0; attempt < 200; attempt++) {
        snprintf(path, sizeof path, "%s/cgroup.procs", group);
        FILE *processes = fopen(path, "r");
        if (!processes) return;
        for (long id; fscanf(processes, "%ld", &id) == 1;) kill(id, SIGKILL);
        fclose(processes);
        if (!rmdir(group)) return;
        usleep(10000);
    }
    perror(group);
}

static int run(int argc, char **argv) {
    hosts = atoi(argv[2]);
    if (hosts < 1 || hosts > HOSTS) return fprintf(stderr, "1 to %d hosts\n", HOSTS), 2;
    signal(SIGINT, SIG_IGN);  // Ctrl-C is for who started it; the end of stdin follows
    signal(SIGTERM, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_TIMERSLACK, 1);
    char up[HOSTS * 12] = "up";
    for (int i = 0; i < hosts; i++) sprintf(up + strlen(up), " %d", make_host(i, atoi(argv[3])));
    struct sched_param first = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_FIFO, &first)) perror("SCHED_FIFO");  // late frames would be measured as delay
    puts(up);
    fflush(stdout);
    struct pollfd fds[HOSTS + 1];
    for (int i = 0; i < hosts; i++) fds[i] = (struct pollfd){.fd = tap[i], .events = POLLIN};
    fds[hosts] = (struct pollfd){.fd = 0, .events = POLLIN};
    for (;;) {
        deliver();
        struct timespec wait, *timeout = NULL;
        if (waiting) {
            uint64_t now = now_ns(), left = heap[0].due_ns > now ? heap[0].due_ns - now : 0;
            wait = (struct timespec){left / 1000000000ull, left % 1000000000ull};
            timeout = &wait;
        }
        if (ppoll(fds, hosts + 1, timeout, NULL) < 0) continue;
        for (int i = 0; i < hosts; i++)
            if (fds[i].revents & POLLIN) take(i);
        if (fds[hosts].revents && !commands()) break;
    }
    for (int i = 4; i < argc; i++) clean(argv[i], 0);
    return 0;
}

static int execute(int argc, char **argv) {
    int namespace = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (namespace < 0 || setns(namespace, CLONE_NEWNET)) die(argv[2]);
    int at = 3;
    for (; at < argc && strcmp(argv[at], "--"); at++) {
        char path[512];
        snprintf(path, sizeof path, "%s/cgroup.procs", argv[at]);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 || write(fd, "0", 1) < 0) die(path);
        close(fd);
    }
    if (at + 1 >= argc) return 2;
    execvp(argv[at + 1], argv + at + 1);
    perror(argv[at + 1]);
    return 127;
}

int main(int argc, char **argv) {
    if (argc >= 4 && !strcmp(argv[1], "run")) return run(argc, argv);
    if (argc >= 4 && !strcmp(argv[1], "exec")) return execute(argc, argv);
    fprintf(stderr, "usage: %s run HOSTS MTU GROUP… | exec NAMESPACE GROUP… -- COMMAND…\n", argv[0]);
    return 2;
}
