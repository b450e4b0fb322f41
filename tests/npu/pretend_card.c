/* What a pretend card can do on a machine without one: one device whose memory is the host's, so that tensors on device "npu" can be made, copied
   and freed, and torch_npu's own checks of arguments run. It has no kernels: whatever would compute answers REFUSED, so that nothing can look like
   a result. Names and signatures are those that torch_npu asks for; functions that do not stand here are made empty by stand_ins.py. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#define OK 0
#define REFUSED 507899       /* the runtime's "internal error of the driver" */
#define NO_CONTEXT 107002    /* nobody has chosen a device in this thread yet */
#define NO_MEMORY 207001
#define YES(f) int f() { return OK; }
#define NO(f) int f() { return REFUSED; }

/* one device, chosen per thread */
static _Thread_local int32_t chosen = -1;
static int context;
int aclrtGetDeviceCount(uint32_t *n) { *n = 1; return OK; }
int aclrtSetDevice(int32_t d) { chosen = d; return OK; }
int aclrtGetDevice(int32_t *d) { *d = chosen; return chosen < 0 ? NO_CONTEXT : OK; }
int aclrtGetCurrentContext(void **c) { *c = &context; return OK; }
const char *aclrtGetSocName() { return "Ascend910B2"; }
const char *aclGetRecentErrMsg() { return "a pretend card has no kernels"; }
int aclGetDeviceCapability(uint32_t d, int which, int64_t *n) { *n = 24; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 0; return OK; }
int aclrtGetMemInfo(int kind, size_t *rest, size_t *all) { *all = (size_t)64 << 30; *rest = (size_t)60 << 30; return OK; }

/* memory is the host's */
static int take(void **p, size_t n) { return posix_memalign(p, 512, n + 32) ? NO_MEMORY : OK; }
static int copy(void *to, const void *from, size_t n) { memcpy(to, from, n); return OK; }
static int fill(void *to, int v, size_t n) { memset(to, v, n); return OK; }
int aclrtMalloc(void **p, size_t n, int policy) { return take(p, n); }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return take(p, n); }
int aclrtMallocHost(void **p, size_t n) { return take(p, n); }
int aclrtFree(void *p) { free(p); return OK; }
int aclrtFreeHost(void *p) { free(p); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) { return copy(to, from, n); }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) { return copy(to, from, n); }
int aclrtMemset(void *to, size_t room, int32_t v, size_t n) { return fill(to, v, n); }
int aclrtMemsetAsync(void *to, size_t room, int32_t v, size_t n, void *stream) { return fill(to, v, n); }
NO(aclrtMallocPhysical) NO(aclrtReserveMemAddress) NO(aclrtMapMem)

/* streams do what they are told at once; an event is a time */
static int handle(void **p) { *p = calloc(1, sizeof(struct timespec)); return OK; }
int aclrtCreateStream(void **s) { return handle(s); }
int aclrtCreateStreamWithConfig(void **s, uint32_t priority, uint32_t flag) { return handle(s); }
int aclrtStreamQuery(void *s, int *done) { *done = 0; return OK; }
int aclrtGetStreamOverflowSwitch(void *s, uint32_t *on) { *on = 0; return OK; }
int aclrtCreateEventWithFlag(void **e, uint32_t flag) { return handle(e); }
int aclrtCreateEventExWithFlag(void **e, uint32_t flag) { return handle(e); }
int aclrtRecordEvent(void *e, void *s) { clock_gettime(CLOCK_MONOTONIC, e); return OK; }
int aclrtQueryEvent(void *e, int *done) { *done = 0; return OK; }
int aclrtQueryEventStatus(void *e, int *done) { *done = 1; return OK; }
int aclrtEventElapsedTime(float *ms, void *from, void *to) {
  struct timespec *a = from, *b = to; *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) * 1e-6f; return OK; }

/* options are remembered */
static int64_t option[64];
int aclrtSetSysParamOpt(int i, int64_t v) { option[i & 63] = v; return OK; }
int aclrtGetSysParamOpt(int i, int64_t *v) { *v = option[i & 63]; return OK; }
int aclrtCtxSetSysParamOpt(int i, int64_t v) { option[i & 63] = v; return OK; }
int aclrtCtxGetSysParamOpt(int i, int64_t *v) { *v = option[i & 63]; return OK; }
int aclGetCompileoptSize(int i) { return 256; }
int aclGetCompileopt(int i, char *text, size_t n) { if (n) text[0] = 0; return OK; }

/* no kernels */
NO(aclopCompileAndExecute) NO(aclopCompileAndExecuteV2) NO(aclopExecuteV2) NO(aclrtBinaryLoadFromData) NO(aclrtBinaryGetFunction) NO(rtKernelLaunch)
NO(aclrtLaunchKernel) NO(aclrtLaunchCallback)

/* looked up by name at run time */
YES(aclrtDestroyStreamForce) YES(aclrtSetOpWaitTimeout) YES(aclrtSetDeviceSatMode) YES(aclrtSetOpExecuteTimeOut) YES(aclrtSetStreamOverflowSwitch)
YES(aclrtSetCurrentContext) YES(aclrtResetDevice) YES(aclrtDestroyStream) YES(aclrtDestroyEvent) YES(aclrtSynchronizeDevice)
YES(aclrtSynchronizeDeviceWithTimeout) YES(aclrtSynchronizeStreamWithTimeout) YES(aclrtSynchronizeStream) YES(aclSetCompileopt) YES(aclGenGraphAndDumpForOp)
YES(aclInit) YES(aclFinalize) YES(aclrtStreamWaitEvent) YES(aclrtResetEvent)
