/* Faults of a disk, for LD_PRELOAD: EARLYSIFT_DISK=fault:part strikes all files whose path contains this part.
 * full: half of a first write, then no space; read-only; failed fsync; error of the device; short writes; slow writes.
 * EARLYSIFT_DISK=clock: lets the clock of the day jump by an hour, forth and back, at every look.
 * What strikes is read at every call, so that a process can set it for itself, or for a child. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int strikes(const char *fault, const char *path) {
    const char *told = getenv("EARLYSIFT_DISK");
    size_t length = strlen(fault);
    return told && path && !strncmp(told, fault, length) && told[length] == ':' && strstr(path, told + length + 1);
}

static int strikes_open(const char *fault, int file) {
    char link[64], path[4096];
    if (!getenv("EARLYSIFT_DISK")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strikes(fault, path);
}

static int fails(int number) {
    errno = number;
    return -1;
}

/* How much of a write at this place goes to the disk; -1 if none does. */
static ssize_t allowed(int file, size_t count, off_t place) {
    if (strikes_open("slow", file)) usleep(20000);
    if (strikes_open("error", file)) return fails(EIO);
    if (strikes_open("short", file)) return count > 1 ? count / 2 : count;
    if (strikes_open("full", file)) return place > 0 || count < 2 ? fails(ENOSPC) : (ssize_t)count / 2;
    return count;
}

ssize_t write(int file, const void *content, size_t count) {
    ssize_t now = allowed(file, count, lseek(file, 0, SEEK_CUR));
    return now < 0 ? now : REAL(write)(file, content, now);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    for (int i = 0; i < count; i++)
        if (parts[i].iov_len) return write(file, parts[i].iov_base, parts[i].iov_len);
    return 0;
}

ssize_t pwrite(int file, const void *content, size_t count, off_t place) {
    ssize_t now = allowed(file, count, place);
    return now < 0 ? now : REAL(pwrite)(file, content, now, place);
}

ssize_t pwrite64(int file, const void *content, size_t count, off_t place) { return pwrite(file, content, count, place); }

int fsync(int file) { return strikes_open("fsync", file) ? fails(EIO) : REAL(fsync)(file); }

int fdatasync(int file) { return strikes_open("fsync", file) ? fails(EIO) : REAL(fdatasync)(file); }

static int refused(const char *path, int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && strikes("read-only", path);
}

#define OPENING(name)                                             \
    int name(const char *path, int flags, ...) {                  \
        va_list rest;                                             \
        va_start(rest, flags);                                    \
        mode_t mode = va_arg(rest, mode_t);                       \
        va_end(rest);                                             \
        return refused(path, flags) ? fails(EROFS) : REAL(name)(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

FILE *fopen(const char *path, const char *mode) {
    if (strpbrk(mode, "wa+") && strikes("read-only", path)) return fails(EROFS), NULL;
    return REAL(fopen)(path, mode);
}

FILE *fopen64(const char *path, const char *mode) { return fopen(path, mode); }

#define CHANGING(name, parameters, arguments) \
    int name parameters { return strikes("read-only", path) ? fails(EROFS) : REAL(name) arguments; }
CHANGING(mkdir, (const char *path, mode_t mode), (path, mode))
CHANGING(unlink, (const char *path), (path))
CHANGING(rename, (const char *path, const char *other), (path, other))

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int looks;
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && clock == CLOCK_REALTIME && strikes("clock", "")) now->tv_sec += looks++ % 2 ? 3600 : -3600;
    return failed;
}
