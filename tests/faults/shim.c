/* A disk that fails: preloaded, it counts the calls that change what is under one folder (or read it), and lets the n-th
   fail, come up short, or be the last before the power goes. Anything else passes through untouched.

   arm(prefix, n, error, mode, kinds), then disarm(): how many calls there were; seen(k): the name of the k-th. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <pthread.h>

enum mode { ONCE, STAYS, SHORT, DIES, POWER, POWER_BACK };
enum kind { GROWS = 1, NAMES = 2, SYNCS = 4, CLOSES = 8, READS = 16 };

#define MOST 65536
static atomic_int armed;
static char prefix[PATH_MAX];
static size_t prefix_length;
static long at, count, hit;
static int failing, how, wanted;
static const char *names[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct dirty { dev_t device; ino_t inode; int descriptor; off_t safe; }; /* safe: bytes that were there before */
static struct dirty unsynced[1024];
static int unsynced_count;
struct change { char from[PATH_MAX], to[PATH_MAX], kept[PATH_MAX]; int exchange; };
static struct change *changes;
static int change_count;

#define NEXT(result, name, ...) \
    static result (*next_##name)(__VA_ARGS__); \
    static void find_##name(void) { if (!next_##name) next_##name = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name); }
#define CALL(name) (find_##name(), next_##name)

NEXT(int, open, const char *, int, ...)
NEXT(int, open64, const char *, int, ...)
NEXT(int, openat, int, const char *, int, ...)
NEXT(int, openat64, int, const char *, int, ...)
NEXT(ssize_t, write, int, const void *, size_t)
NEXT(ssize_t, pwrite, int, const void *, size_t, off_t)
NEXT(ssize_t, pwrite64, int, const void *, size_t, off_t)
NEXT(ssize_t, writev, int, const struct iovec *, int)
NEXT(ssize_t, pwritev, int, const struct iovec *, int, off_t)
NEXT(ssize_t, read, int, void *, size_t)
NEXT(ssize_t, pread, int, void *, size_t, off_t)
NEXT(ssize_t, pread64, int, void *, size_t, off_t)
NEXT(ssize_t, preadv, int, const struct iovec *, int, off_t)
NEXT(ssize_t, preadv64, int, const struct iovec *, int, off_t)
NEXT(ssize_t, preadv2, int, const struct iovec *, int, off_t, int)
NEXT(ssize_t, preadv64v2, int, const struct iovec *, int, off_t, int)
NEXT(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned)
NEXT(ssize_t, sendfile, int, int, off_t *, size_t)
NEXT(ssize_t, sendfile64, int, int, off_t *, size_t)
NEXT(int, ftruncate, int, off_t)
NEXT(int, ftruncate64, int, off_t)
NEXT(int, fallocate, int, int, off_t, off_t)
NEXT(int, posix_fallocate, int, off_t, off_t)
NEXT(int, fsync, int)
NEXT(int, fdatasync, int)
NEXT(int, close, int)
NEXT(int, rename, const char *, const char *)
NEXT(int, renameat2, int, const char *, int, const char *, unsigned)
NEXT(int, unlink, const char *)
NEXT(int, unlinkat, int, const char *, int)
NEXT(int, rmdir, const char *)
NEXT(int, mkdir, const char *, mode_t)
NEXT(int, mkdirat, int, const char *, mode_t)
NEXT(int, link, const char *, const char *)
NEXT(int, linkat, int, const char *, int, const char *, int)
NEXT(int, symlink, const char *, const char *)
NEXT(int, fchmod, int, mode_t)
NEXT(int, chmod, const char *, mode_t)
NEXT(void *, mmap, void *, size_t, int, int, int, off_t)
NEXT(void *, mmap64, void *, size_t, int, int, int, off_t)

/* Whether a path is under the folder; `full` becomes it. */
static int under(int folder, const char *path, char *full) {
    if (!armed || !path) return 0;
    if (path[0] == '/') snprintf(full, PATH_MAX, "%s", path);
    else {
        char start[PATH_MAX / 2];
        if (folder == AT_FDCWD) { if (!getcwd(start, sizeof start)) return 0; }
        else {
            char place[64];
            snprintf(place, sizeof place, "/proc/self/fd/%d", folder);
            ssize_t length = readlink(place, start, sizeof start - 1);
            if (length < 0) return 0;
            start[length] = 0;
        }
        snprintf(full, PATH_MAX, "%s/%s", start, path);
    }
    return !strncmp(full, prefix, prefix_length) && (full[prefix_length] == '/' || !full[prefix_length]);
}

static int under_fd(int descriptor, char *full) {
    if (!armed) return 0;
    char place[64];
    snprintf(place, sizeof place, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(place, full, PATH_MAX - 1);
    if (length < 0) return 0;
    full[length] = 0;
    return !strncmp(full, prefix, prefix_length) && (full[prefix_length] == '/' || !full[prefix_length]);
}

static void power(void) {
    for (int k = 0; k < unsynced_count; k++) {
        struct stat about;
        if (fstat(unsynced[k].descriptor, &about)) continue;
        off_t safe = unsynced[k].safe < about.st_size ? unsynced[k].safe : about.st_size;
        CALL(ftruncate)(unsynced[k].descriptor, how == POWER ? safe : safe + (about.st_size - safe) / 2);
    }
    if (how != POWER_BACK) return;
    for (int k = change_count - 1; k >= 0; k--) {
        struct change *one = &changes[k];
        if (one->exchange) CALL(renameat2)(AT_FDCWD, one->to, AT_FDCWD, one->from, 2);
        else if (one->to[0]) {
            CALL(rename)(one->to, one->from);
            if (one->kept[0]) CALL(rename)(one->kept, one->to);
        }
        else CALL(link)(one->kept, one->from);
    }
}

/* What becomes of a call: 0, it is made; -1, half of it; else the error. */
static int fate(const char *name, int kind) {
    if (!(kind & wanted)) return 0;
    pthread_mutex_lock(&lock);
    long mine = ++count;
    if (mine <= MOST) names[mine - 1] = name;
    int result = 0;
    if (mine == at) {
        hit = 1;
        if (how >= DIES) {
            armed = 0;
            power();
            _exit(137);
        }
        result = how == SHORT && !strcmp(name, "write") ? -1 : failing;
    } else if (at && mine > at && (how == STAYS || how == SHORT))
        result = failing == ENOSPC && kind != GROWS && kind != SYNCS ? 0 : failing;
    pthread_mutex_unlock(&lock);
    return result;
}

/* done: bytes; of a file that is only added to, what was there before is safe. */
static void wrote(int descriptor, ssize_t done) {
    struct stat about;
    if (how < POWER || fstat(descriptor, &about) || !S_ISREG(about.st_mode)) return;
    int added = fcntl(descriptor, F_GETFL) & O_APPEND;
    pthread_mutex_lock(&lock);
    int k = 0;
    while (k < unsynced_count && !(unsynced[k].device == about.st_dev && unsynced[k].inode == about.st_ino)) k++;
    if (k == unsynced_count && k < 1024) {
        unsynced[k] = (struct dirty){about.st_dev, about.st_ino, dup(descriptor), added ? about.st_size - done : 0};
        unsynced_count++;
    }
    pthread_mutex_unlock(&lock);
}

static void synced(int descriptor, const char *path) {
    struct stat about;
    if (how < POWER || fstat(descriptor, &about)) return;
    pthread_mutex_lock(&lock);
    if (S_ISDIR(about.st_mode)) {
        int left = 0;
        for (int k = 0; k < change_count; k++) {
            const char *of = changes[k].to[0] ? changes[k].to : changes[k].from;
            size_t length = strlen(path);
            int inside = !strncmp(of, path, length) && of[length] == '/' && !strchr(of + length + 1, '/');
            if (!inside) changes[left++] = changes[k];
        }
        change_count = left;
    } else
        for (int k = 0; k < unsynced_count; k++)
            if (unsynced[k].device == about.st_dev && unsynced[k].inode == about.st_ino) {
                CALL(close)(unsynced[k].descriptor);
                unsynced[k--] = unsynced[--unsynced_count];
            }
    pthread_mutex_unlock(&lock);
}

/* Remember a change of names, and keep what it overwrites, until its folder is synced. */
static void changing(const char *from, const char *to, int exchange) {
    if (how != POWER_BACK) return;
    pthread_mutex_lock(&lock);
    if (!changes) changes = malloc(256 * sizeof *changes);
    if (change_count < 256) {
        struct change *one = &changes[change_count];
        snprintf(one->from, PATH_MAX, "%s", from);
        snprintf(one->to, PATH_MAX, "%s", to ? to : "");
        one->exchange = exchange;
        one->kept[0] = 0;
        if (!exchange) {
            char kept[PATH_MAX];
            snprintf(kept, PATH_MAX, "%.3900s.kept.%ld", prefix, count);
            if (!CALL(link)(to ? to : from, kept)) snprintf(one->kept, PATH_MAX, "%s", kept);
        }
        change_count++;
    }
    pthread_mutex_unlock(&lock);
}

void arm(const char *folder, long n, int error, int mode, int kinds) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    prefix_length = strlen(prefix);
    at = n; count = hit = 0; failing = error; how = mode; wanted = kinds;
    unsynced_count = change_count = 0;
    armed = 1;
}

long disarm(void) {
    armed = 0;
    for (int k = 0; k < unsynced_count; k++) CALL(close)(unsynced[k].descriptor);
    unsynced_count = 0;
    return count;
}

long was_hit(void) { return hit; }

const char *seen(long k) { return k < count && k < MOST ? names[k] : ""; }

#define FAIL(code) do { errno = (code); return -1; } while (0)
#define GATE(name, kind) do { int code_ = fate(name, kind); if (code_ > 0) FAIL(code_); } while (0)

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define OPEN_BODY(folder, path, made) \
    char full[PATH_MAX]; \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
    if (under(folder, path, full)) GATE("open", writes(flags) ? (flags & O_CREAT ? GROWS : NAMES) : READS); \
    return made

int open(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD, path, CALL(open)(path, flags, mode)); }
int open64(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD, path, CALL(open64)(path, flags, mode)); }
int openat(int folder, const char *path, int flags, ...) { OPEN_BODY(folder, path, CALL(openat)(folder, path, flags, mode)); }
int openat64(int folder, const char *path, int flags, ...) { OPEN_BODY(folder, path, CALL(openat64)(folder, path, flags, mode)); }
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define WRITE_BODY(whole, half) \
    char full[PATH_MAX]; \
    if (!under_fd(descriptor, full)) return whole; \
    int code = fate("write", GROWS); \
    if (code > 0) FAIL(code); \
    ssize_t done = code < 0 ? half : whole; \
    if (done >= 0) wrote(descriptor, done); \
    return done

ssize_t write(int descriptor, const void *data, size_t size) {
    WRITE_BODY(CALL(write)(descriptor, data, size), CALL(write)(descriptor, data, (size + 1) / 2));
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t place) {
    WRITE_BODY(CALL(pwrite)(descriptor, data, size, place), CALL(pwrite)(descriptor, data, (size + 1) / 2, place));
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t place) {
    WRITE_BODY(CALL(pwrite64)(descriptor, data, size, place), CALL(pwrite64)(descriptor, data, (size + 1) / 2, place));
}
ssize_t writev(int descriptor, const struct iovec *rows, int size) {
    WRITE_BODY(CALL(writev)(descriptor, rows, size), CALL(writev)(descriptor, rows, 1));
}
ssize_t pwritev(int descriptor, const struct iovec *rows, int size, off_t place) {
    WRITE_BODY(CALL(pwritev)(descriptor, rows, size, place), CALL(pwritev)(descriptor, rows, 1, place));
}
ssize_t copy_file_range(int source, off64_t *first, int descriptor, off64_t *place, size_t size, unsigned flags) {
    WRITE_BODY(CALL(copy_file_range)(source, first, descriptor, place, size, flags),
               CALL(copy_file_range)(source, first, descriptor, place, (size + 1) / 2, flags));
}
ssize_t sendfile(int descriptor, int source, off_t *first, size_t size) {
    WRITE_BODY(CALL(sendfile)(descriptor, source, first, size), CALL(sendfile)(descriptor, source, first, (size + 1) / 2));
}
ssize_t sendfile64(int descriptor, int source, off_t *first, size_t size) {
    WRITE_BODY(CALL(sendfile64)(descriptor, source, first, size), CALL(sendfile64)(descriptor, source, first, (size + 1) / 2));
}

#define READ_BODY(whole) \
    char full[PATH_MAX]; \
    if (under_fd(descriptor, full)) GATE("read", READS); \
    return whole

ssize_t read(int descriptor, void *data, size_t size) { READ_BODY(CALL(read)(descriptor, data, size)); }
ssize_t pread(int descriptor, void *data, size_t size, off_t place) { READ_BODY(CALL(pread)(descriptor, data, size, place)); }
ssize_t pread64(int descriptor, void *data, size_t size, off_t place) { READ_BODY(CALL(pread64)(descriptor, data, size, place)); }
ssize_t preadv(int descriptor, const struct iovec *rows, int size, off_t place) { READ_BODY(CALL(preadv)(descriptor, rows, size, place)); }
ssize_t preadv64(int descriptor, const struct iovec *rows, int size, off_t place) { READ_BODY(CALL(preadv64)(descriptor, rows, size, place)); }
ssize_t preadv2(int descriptor, const struct iovec *rows, int size, off_t place, int flags) { READ_BODY(CALL(preadv2)(descriptor, rows, size, place, flags)); }
ssize_t preadv64v2(int descriptor, const struct iovec *rows, int size, off_t place, int flags) { READ_BODY(CALL(preadv64v2)(descriptor, rows, size, place, flags)); }

void *mmap(void *where, size_t size, int protection, int flags, int descriptor, off_t place) {
    char full[PATH_MAX];
    int code;
    if (descriptor >= 0 && under_fd(descriptor, full) && (code = fate("mmap", READS)) > 0) { errno = code; return MAP_FAILED; }
    return CALL(mmap)(where, size, protection, flags, descriptor, place);
}
void *mmap64(void *where, size_t size, int protection, int flags, int descriptor, off_t place) {
    char full[PATH_MAX];
    int code;
    if (descriptor >= 0 && under_fd(descriptor, full) && (code = fate("mmap", READS)) > 0) { errno = code; return MAP_FAILED; }
    return CALL(mmap64)(where, size, protection, flags, descriptor, place);
}

#define SIZE_BODY(name, made) \
    char full[PATH_MAX]; \
    if (!under_fd(descriptor, full)) return made; \
    GATE(name, GROWS); \
    int done = made; \
    wrote(descriptor, 0); \
    return done

int ftruncate(int descriptor, off_t size) { SIZE_BODY("ftruncate", CALL(ftruncate)(descriptor, size)); }
int ftruncate64(int descriptor, off_t size) { SIZE_BODY("ftruncate", CALL(ftruncate64)(descriptor, size)); }
int fallocate(int descriptor, int mode, off_t place, off_t size) {
    SIZE_BODY("fallocate", CALL(fallocate)(descriptor, mode, place, size));
}
int posix_fallocate(int descriptor, off_t place, off_t size) {
    char full[PATH_MAX];
    int code;
    if (under_fd(descriptor, full) && (code = fate("fallocate", GROWS)) > 0) return code;
    return CALL(posix_fallocate)(descriptor, place, size);
}

#define SYNC_BODY(made) \
    char full[PATH_MAX]; \
    if (!under_fd(descriptor, full)) return made; \
    GATE("fsync", SYNCS); \
    int done = made; \
    synced(descriptor, full); \
    return done

int fsync(int descriptor) { SYNC_BODY(CALL(fsync)(descriptor)); }
int fdatasync(int descriptor) { SYNC_BODY(CALL(fdatasync)(descriptor)); }

int close(int descriptor) {
    char full[PATH_MAX];
    int code = 0;
    if (armed && under_fd(descriptor, full)) {
        int flags = fcntl(descriptor, F_GETFL);
        if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) code = fate("close", CLOSES);
    }
    int done = CALL(close)(descriptor);
    if (code > 0) FAIL(code);
    return done;
}

static int renamed(int first, const char *from, int second, const char *to, unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    int mine = under(first, from, old), theirs = under(second, to, new);
    if (mine || theirs) { GATE("rename", NAMES); changing(old, new, flags & 2); }
    return CALL(renameat2)(first, from, second, to, flags);
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int first, const char *from, int second, const char *to) { return renamed(first, from, second, to, 0); }
int renameat2(int first, const char *from, int second, const char *to, unsigned flags) { return renamed(first, from, second, to, flags); }

int unlink(const char *path) {
    char full[PATH_MAX];
    if (under(AT_FDCWD, path, full)) { GATE("unlink", NAMES); changing(full, NULL, 0); }
    return CALL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    char full[PATH_MAX];
    if (under(folder, path, full)) { GATE("unlink", NAMES); if (!flags) changing(full, NULL, 0); }
    return CALL(unlinkat)(folder, path, flags);
}

#define NAME_BODY(name, folder, path, kind, made) \
    char full[PATH_MAX]; \
    if (under(folder, path, full)) GATE(name, kind); \
    return made

int rmdir(const char *path) { NAME_BODY("rmdir", AT_FDCWD, path, NAMES, CALL(rmdir)(path)); }
int mkdir(const char *path, mode_t mode) { NAME_BODY("mkdir", AT_FDCWD, path, GROWS, CALL(mkdir)(path, mode)); }
int mkdirat(int folder, const char *path, mode_t mode) { NAME_BODY("mkdir", folder, path, GROWS, CALL(mkdirat)(folder, path, mode)); }
int link(const char *from, const char *to) { NAME_BODY("link", AT_FDCWD, to, GROWS, CALL(link)(from, to)); }
int linkat(int first, const char *from, int second, const char *to, int flags) {
    NAME_BODY("link", second, to, GROWS, CALL(linkat)(first, from, second, to, flags));
}
int symlink(const char *from, const char *to) { NAME_BODY("symlink", AT_FDCWD, to, GROWS, CALL(symlink)(from, to)); }
int chmod(const char *path, mode_t mode) { NAME_BODY("chmod", AT_FDCWD, path, NAMES, CALL(chmod)(path, mode)); }
int fchmod(int descriptor, mode_t mode) {
    char full[PATH_MAX];
    if (under_fd(descriptor, full)) GATE("chmod", NAMES);
    return CALL(fchmod)(descriptor, mode);
}
