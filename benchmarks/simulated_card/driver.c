/* A libcuda.so.1 for a computer without a card: one device whose memory is this computer's, up to a budget.
 *
 * It has the calls that backend.cpp and comfy-aimdo (ComfyUI's dynamic VRAM) make: memory, addresses reserved and mapped
 * page by page, copies, events. Streams do their work at once. Memory that nobody writes to costs nothing (MAP_NORESERVE).
 * Built with -fpatchable-function-entry, because comfy-aimdo replaces the allocation calls in place.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 }; /* of CUresult */
enum { PAGE = 4096, GRAIN = 512 };                                       /* PyTorch hands out multiples of 512 bytes */

typedef unsigned long long Address;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t budget, used, peak, moved;
static int numbers;

/* What Python sets and asks. `with_numbers`: 0 computes shapes only, so that networks of any size run in seconds. */
void card_set(uint64_t bytes, int with_numbers) { budget = bytes, numbers = with_numbers; }
void card_reset_peak(void) { peak = used; }
uint64_t card_budget(void) { return budget; }
uint64_t card_used(void) { return used; }
uint64_t card_peak(void) { return peak; }
uint64_t card_moved(void) { return moved; } /* to the card, since the process began */
void card_count_move(uint64_t bytes) { __atomic_fetch_add(&moved, bytes, __ATOMIC_RELAXED); }
int card_has_numbers(void) { return numbers; }

static int take(uint64_t bytes) {
    pthread_mutex_lock(&lock);
    int fits = used + bytes <= budget;
    if (fits && (used += bytes) > peak) peak = used;
    pthread_mutex_unlock(&lock);
    return fits ? OK : OUT_OF_MEMORY;
}

static void give(uint64_t bytes) {
    pthread_mutex_lock(&lock);
    used -= bytes;
    pthread_mutex_unlock(&lock);
}

static char *map(void *at, size_t bytes, int rights, int flags) {
    void *start = mmap(at, bytes, rights, flags | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

/* The device. */
int cuInit(unsigned flags) { return OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, OK; }
int cuDeviceGetName(char *name, int length, int device) { return snprintf(name, length, "simulated card"), OK; }
int cuDeviceGetUuid_v2(char *uuid, int device) { return memset(uuid, 0, 16), OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 0, OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = budget, OK; }
int cuCtxGetDevice(int *device) { return *device = 0, OK; }
int cuCtxSynchronize(void) { return OK; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { return *free_bytes = budget - used, *total = budget, OK; }
int cuGetErrorString(int error, const char **text) {
    return *text = error == OUT_OF_MEMORY ? "out of memory" : "invalid value", OK;
}

/* Memory. The page before an allocation holds its size. */
int cuMemAlloc_v2(Address *address, size_t bytes) {
    uint64_t whole = (bytes + GRAIN - 1) / GRAIN * GRAIN;
    if (take(whole)) return OUT_OF_MEMORY;
    char *start = map(NULL, whole + PAGE, PROT_READ | PROT_WRITE, 0);
    if (!start) return give(whole), OUT_OF_MEMORY;
    *(uint64_t *)start = whole;
    *address = (Address)(uintptr_t)(start + PAGE);
    return OK;
}
int cuMemFree_v2(Address address) {
    if (!address) return OK;
    char *start = (char *)(uintptr_t)address - PAGE;
    uint64_t whole = *(uint64_t *)start;
    munmap(start, whole + PAGE);
    return give(whole), OK;
}
int cuMemAllocAsync(Address *address, size_t bytes, void *stream) { return cuMemAlloc_v2(address, bytes); }
int cuMemFreeAsync(Address address, void *stream) { return cuMemFree_v2(address); }
int cuMemAllocAsync_ptsz(Address *address, size_t bytes, void *stream) { return cuMemAlloc_v2(address, bytes); }
int cuMemFreeAsync_ptsz(Address address, void *stream) { return cuMemFree_v2(address); }
int cuMemAllocHost_v2(void **host, size_t bytes) { return (*host = malloc(bytes)) ? OK : OUT_OF_MEMORY; }
int cuMemFreeHost(void *host) { return free(host), OK; }
int cuMemHostRegister_v2(void *host, size_t bytes, unsigned flags) { return OK; }
int cuMemHostUnregister(void *host) { return OK; }
int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *stream) {
    card_count_move(bytes);
    if (numbers) memcpy((void *)(uintptr_t)to, from, bytes);
    return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *stream) {
    if (numbers) memcpy(to, (void *)(uintptr_t)from, bytes);
    return OK;
}

/* Addresses and the memory behind them. A handle is its size: nobody maps the same memory at two places. */
int cuMemAddressReserve(Address *address, size_t bytes, size_t alignment, Address wanted, unsigned long long flags) {
    *address = (Address)(uintptr_t)map(NULL, bytes, PROT_NONE, 0);
    return *address ? OK : OUT_OF_MEMORY;
}
int cuMemAddressFree(Address address, size_t bytes) { return munmap((void *)(uintptr_t)address, bytes), OK; }
int cuMemCreate(uint64_t *handle, size_t bytes, const void *properties, unsigned long long flags) {
    return *handle = bytes, take(bytes);
}
int cuMemRelease(uint64_t handle) { return give(handle), OK; }
int cuMemMap(Address address, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags) {
    return mprotect((void *)(uintptr_t)address, bytes, PROT_READ | PROT_WRITE) ? INVALID_VALUE : OK;
}
int cuMemSetAccess(Address address, size_t bytes, const void *access, size_t count) { return OK; }
int cuMemUnmap(Address address, size_t bytes) {
    return map((void *)(uintptr_t)address, bytes, PROT_NONE, MAP_FIXED) ? OK : INVALID_VALUE;
}

int cuEventCreate(void **event, unsigned flags) { return *event = &lock, OK; }
int cuEventDestroy_v2(void *event) { return OK; }
int cuEventRecord(void *event, void *stream) { return OK; }
int cuEventSynchronize(void *event) { return OK; }

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    char newest[96];
    snprintf(newest, sizeof newest, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, newest);
    if (!*function) *function = dlsym(RTLD_DEFAULT, name);
    if (status) *status = !*function;
    return *function ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags, int *status) {
    return cuGetProcAddress_v2(name, function, version, flags, status);
}
