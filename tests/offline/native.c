/* No network for what does not ask Python: connect, sendto and getaddrinfo of the C library, as sitecustomize.py has them.
   Preloaded by tests/test_offline.py: what leaves this machine is refused, and written down in the file that
   IMGADAPT_NETWORK names. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *where) {
    const char *path = getenv("IMGADAPT_NETWORK");
    char line[512];
    int length = snprintf(line, sizeof line, "native %s %s\n", what, where);
    int file = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (file >= 0) {
        if (write(file, line, length < (int)sizeof line ? length : (int)sizeof line - 1) < 0) abort();
        close(file);
    }
}

/* Whether an address is this machine's own; `where` gets it as text. */
static int here(const struct sockaddr *address, char *where, size_t size) {
    strcpy(where, "?");
    if (address == NULL) return 1;
    if (address->sa_family == AF_INET) {
        const struct in_addr *ip = &((const struct sockaddr_in *)address)->sin_addr;
        inet_ntop(AF_INET, ip, where, size);
        return ntohl(ip->s_addr) >> 24 == 127;
    }
    if (address->sa_family == AF_INET6) {
        const struct in6_addr *ip = &((const struct sockaddr_in6 *)address)->sin6_addr;
        inet_ntop(AF_INET6, ip, where, size);
        return IN6_IS_ADDR_LOOPBACK(ip) || (IN6_IS_ADDR_V4MAPPED(ip) && ip->s6_addr[12] == 127);
    }
    return 1;
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
    char where[INET6_ADDRSTRLEN];
    if (!here(address, where, sizeof where)) {
        note("connect", where);
        errno = ENETUNREACH;
        return -1;
    }
    return ((int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "connect"))(fd, address, size);
}

ssize_t sendto(int fd, const void *data, size_t length, int flags, const struct sockaddr *address, socklen_t size) {
    char where[INET6_ADDRSTRLEN];
    if (!here(address, where, sizeof where)) {
        note("sendto", where);
        errno = ENETUNREACH;
        return -1;
    }
    return ((ssize_t (*)(int, const void *, size_t, int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "sendto"))(
        fd, data, length, flags, address, size);
}

int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    struct in6_addr ip;
    if (host != NULL && strcmp(host, "localhost") != 0 && inet_pton(AF_INET, host, &ip) != 1 &&
        inet_pton(AF_INET6, host, &ip) != 1) {
        note("getaddrinfo", host);
        return EAI_NONAME;
    }
    return ((int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(RTLD_NEXT, "getaddrinfo"))(
        host, service, hints, found);
}
