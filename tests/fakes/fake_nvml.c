/* A libnvidia-ml.so.1 without hardware: the real nvidia-ml-py binding on scripted GPUs.
 *
 * The file that FAKE_NVML_STATE names is read again at every call, one fact a line (no file: no GPU):
 *
 *   gpu <total_MiB> <used_MiB> <utilisation> <temperature> <mig 0|1> <name_with_underscores>
 *   mig <gpu> <position> <total_MiB> <used_MiB>            an instance of a GPU in MIG mode
 *   proc <gpu> <pid> <used_MiB>                            a compute process; its memory adds to the GPU's
 *   migproc <gpu> <position> <pid> <used_MiB>              the same on an instance
 *   error <function> <code> [gpu] [position]               that function fails (on that GPU, on that instance only)
 *   hang <function> [gpu]                                  that function does not return while this line stands
 *   ecc <gpu> <count>                                      uncorrectable memory errors
 *   keep <pid>                                             what a process of the second file had stays when it ends
 *   host <offset>                                          processes of the second file are shown by pids so much higher
 *
 * A second file beside it, with ".live" at the end of its name, has lines of processes that really exist:
 *
 *   live <gpu> <pid> <used_MiB>                            like proc, but for as long as that process lives
 *
 * <function> may be "*". A used_MiB of -1 is memory that the driver does not tell. Error codes are NVML's: 3 not
 * supported, 4 no permission, 9 driver not loaded, 15 GPU lost, 16 reset required, 999 unknown. GPU i has the uuid
 * GPU-fa4e0000-0000-4000-8000-<i>, its instance p MIG-fa4e0000-0000-5000-8000-<i><p>. Only what gpu_pool and torch ask
 * about discovery is there.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int Result;

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_GPUS = 16, MAX_INSTANCES = 7, MAX_PROCESSES = 256, MAX_ERRORS = 64, WHOLE = -1, HANG = -1, POLL_MICROSECONDS = 10000 };

typedef struct {
    int exists;
    unsigned long long total, used;
} Instance;

typedef struct {
    unsigned long long total, used;
    unsigned utilization, temperature, mig;
    unsigned long long uncorrectable;
    char name[64];
    Instance instances[MAX_INSTANCES];
} Gpu;

typedef struct {
    unsigned pid;
    long long used_mib;
    int gpu, instance;
} Process;

typedef struct {
    char function[64];
    Result code;
    int gpu, instance;
} Error;

/* What a handle points to: a GPU, or (instance >= 0) a part of one. */
typedef struct {
    int gpu, instance;
} Device;

static Gpu gpus[MAX_GPUS];
static Process processes[MAX_PROCESSES];
static Error errors[MAX_ERRORS];
static Device devices[MAX_GPUS][MAX_INSTANCES + 1];
static unsigned kept[MAX_PROCESSES];
static int gpu_count, process_count, error_count, kept_count, host_offset, initialized;

static unsigned long long mib(unsigned long long count) { return count << 20; }

static void add_gpu(const char *line) {
    unsigned long long total, used;
    Gpu gpu = {0};
    if (gpu_count == MAX_GPUS ||
        sscanf(line, "gpu %llu %llu %u %u %u %63s", &total, &used, &gpu.utilization, &gpu.temperature, &gpu.mig,
               gpu.name) != 6)
        return;
    gpu.total = mib(total);
    gpu.used = mib(used);
    for (char *c = gpu.name; *c; c++)
        if (*c == '_') *c = ' ';
    gpus[gpu_count++] = gpu;
}

static void add_instance(const char *line) {
    unsigned gpu, position;
    unsigned long long total, used;
    if (sscanf(line, "mig %u %u %llu %llu", &gpu, &position, &total, &used) == 4 && gpu < MAX_GPUS &&
        position < MAX_INSTANCES)
        gpus[gpu].instances[position] = (Instance){1, mib(total), mib(used)};
}

/* Whether a process has this number and has not ended, or is to be taken for one. */
static int lives(unsigned pid) {
    char path[32], state = 'Z';
    for (int i = 0; i < kept_count; i++)
        if (kept[i] == pid) return 1;
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 'Z';
        fclose(file);
    }
    return state != 'Z' && state != 'X';
}

static void add_process(const char *line) {
    Process process = {.instance = WHOLE};
    int is_live = sscanf(line, "live %d %u %lld", &process.gpu, &process.pid, &process.used_mib) == 3;
    if (process_count == MAX_PROCESSES) return;
    if (!is_live && sscanf(line, "proc %d %u %lld", &process.gpu, &process.pid, &process.used_mib) != 3 &&
        sscanf(line, "migproc %d %d %u %lld", &process.gpu, &process.instance, &process.pid, &process.used_mib) != 4)
        return;
    if (process.gpu < 0 || process.gpu >= MAX_GPUS || process.instance >= MAX_INSTANCES) return;
    if (is_live && !lives(process.pid)) return;
    if (is_live) process.pid += host_offset;
    processes[process_count++] = process;
    if (process.used_mib < 0) return;
    Gpu *gpu = &gpus[process.gpu];
    *(process.instance == WHOLE ? &gpu->used : &gpu->instances[process.instance].used) += mib(process.used_mib);
}

static void add_error(const char *line) {
    Error error = {.gpu = -1, .instance = WHOLE};
    if (error_count == MAX_ERRORS) return;
    if (sscanf(line, "error %63s %d %d %d", error.function, &error.code, &error.gpu, &error.instance) >= 2)
        errors[error_count++] = error;
    else if (sscanf(line, "hang %63s %d", error.function, &error.gpu) >= 1) {
        error.code = HANG;
        errors[error_count++] = error;
    }
}

static void add_ecc(const char *line) {
    unsigned gpu;
    unsigned long long count;
    if (sscanf(line, "ecc %u %llu", &gpu, &count) == 2 && gpu < MAX_GPUS) gpus[gpu].uncorrectable = count;
}

static void add_kept(const char *line) {
    unsigned pid;
    if (kept_count < MAX_PROCESSES && sscanf(line, "keep %u", &pid) == 1) kept[kept_count++] = pid;
}

static void add_host(const char *line) { sscanf(line, "host %d", &host_offset); }

static void read_file(const char *path) {
    char line[256];
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        add_gpu(line);
        add_instance(line);
        add_process(line);
        add_error(line);
        add_ecc(line);
        add_kept(line);
        add_host(line);
    }
    if (file) fclose(file);
}

static void read_state(void) {
    char live_path[512];
    const char *path = getenv("FAKE_NVML_STATE");
    gpu_count = process_count = error_count = kept_count = host_offset = 0;
    if (!path) return;
    read_file(path);
    snprintf(live_path, sizeof live_path, "%s.live", path);
    read_file(live_path);
}

/* The scripted error of `function` on `gpu` (-1: on none) or an instance of it, or SUCCESS. */
static Result scripted(const char *function, int gpu, int instance) {
    for (int i = 0; i < error_count; i++)
        if ((!strcmp(errors[i].function, function) || !strcmp(errors[i].function, "*")) &&
            (errors[i].gpu < 0 || errors[i].gpu == gpu) && (errors[i].instance < 0 || errors[i].instance == instance))
            return errors[i].code;
    return SUCCESS;
}

/* Every call begins here: the state is read, until it says no more that the call hangs. */
static Result begin(const char *function, int gpu, int instance) {
    Result result;
    for (read_state(); (result = scripted(function, gpu, instance)) == HANG; read_state()) usleep(POLL_MICROSECONDS);
    if (result != SUCCESS) return result;
    if (!initialized && strcmp(function, "nvmlInitWithFlags")) return UNINITIALIZED;
    return gpu < gpu_count ? SUCCESS : INVALID_ARGUMENT;
}

#define BEGIN_ON(gpu, instance)                             \
    do {                                                    \
        Result result = begin(__func__, (gpu), (instance)); \
        if (result != SUCCESS) return result;               \
    } while (0)
#define BEGIN(gpu) BEGIN_ON(gpu, WHOLE)

static Result copy(char *buffer, unsigned size, const char *text) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return SUCCESS;
}

static Device *handle_of(int gpu, int instance) {
    Device *device = &devices[gpu][instance + 1];
    *device = (Device){gpu, instance};
    return device;
}

/* ---- the library and the driver */

Result nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    BEGIN(-1);
    initialized++;
    return SUCCESS;
}

Result nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

Result nvmlShutdown(void) {
    if (!initialized) return UNINITIALIZED;
    initialized--;
    return SUCCESS;
}

const char *nvmlErrorString(Result result) {
    static char text[40];
    snprintf(text, sizeof text, "fake NVML error %d", result);
    return text;
}

Result nvmlSystemGetDriverVersion(char *buffer, unsigned size) {
    BEGIN(-1);
    return copy(buffer, size, "999.99.fake");
}

/* ---- finding devices */

Result nvmlDeviceGetCount_v2(unsigned *count) {
    BEGIN(-1);
    *count = gpu_count;
    return SUCCESS;
}

Result nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **handle) {
    BEGIN((int)index);
    *handle = handle_of(index, WHOLE);
    return SUCCESS;
}

Result nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    BEGIN_ON(device->gpu, device->instance);
    *current = *pending = gpus[device->gpu].mig;
    return SUCCESS;
}

Result nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    BEGIN_ON(device->gpu, device->instance);
    *count = gpus[device->gpu].mig ? MAX_INSTANCES : 0;
    return SUCCESS;
}

Result nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned position, Device **handle) {
    BEGIN_ON(device->gpu, device->instance);
    if (position >= MAX_INSTANCES || !gpus[device->gpu].instances[position].exists) return NOT_FOUND;
    *handle = handle_of(device->gpu, position);
    return SUCCESS;
}

/* ---- describing one device */

Result nvmlDeviceGetUUID(Device *device, char *buffer, unsigned size) {
    char uuid[64];
    BEGIN_ON(device->gpu, device->instance);
    if (device->instance == WHOLE)
        snprintf(uuid, sizeof uuid, "GPU-fa4e0000-0000-4000-8000-%012d", device->gpu);
    else
        snprintf(uuid, sizeof uuid, "MIG-fa4e0000-0000-5000-8000-%06d%06d", device->gpu, device->instance);
    return copy(buffer, size, uuid);
}

Result nvmlDeviceGetName(Device *device, char *buffer, unsigned size) {
    char name[96];
    BEGIN_ON(device->gpu, device->instance);
    snprintf(name, sizeof name, "%s%s", gpus[device->gpu].name, device->instance == WHOLE ? "" : " MIG");
    return copy(buffer, size, name);
}

typedef struct {
    unsigned long long total, free, used;
} Memory;

Result nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    BEGIN_ON(device->gpu, device->instance);
    Gpu *gpu = &gpus[device->gpu];
    Instance whole = {1, gpu->total, gpu->used};
    Instance part = device->instance == WHOLE ? whole : gpu->instances[device->instance];
    memory->total = part.total;
    memory->used = part.used < part.total ? part.used : part.total;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

Result nvmlDeviceGetUtilizationRates(Device *device, unsigned *rates) {
    BEGIN_ON(device->gpu, device->instance);
    if (gpus[device->gpu].mig) return NOT_SUPPORTED;
    rates[0] = gpus[device->gpu].utilization; /* of the processors */
    rates[1] = rates[0] / 2;                  /* of the memory bus */
    return SUCCESS;
}

Result nvmlDeviceGetTemperature(Device *device, unsigned sensor, unsigned *temperature) {
    (void)sensor;
    BEGIN_ON(device->gpu, device->instance);
    *temperature = gpus[device->gpu].temperature;
    return SUCCESS;
}

Result nvmlDeviceGetTotalEccErrors(Device *device, unsigned kind, unsigned since, unsigned long long *count) {
    enum { UNCORRECTED = 1, VOLATILE = 0 };
    BEGIN_ON(device->gpu, device->instance);
    *count = kind == UNCORRECTED && since == VOLATILE ? gpus[device->gpu].uncorrectable : 0;
    return SUCCESS;
}

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} ProcessInfo;

Result nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, ProcessInfo *infos) {
    BEGIN_ON(device->gpu, device->instance);
    unsigned room = infos ? *count : 0;
    *count = 0;
    for (int i = 0; i < process_count; i++) {
        Process *process = &processes[i];
        if (process->gpu != device->gpu || process->instance != device->instance) continue;
        unsigned long long used = process->used_mib < 0 ? ~0ULL : mib(process->used_mib);
        if (*count < room) infos[*count] = (ProcessInfo){process->pid, used, ~0U, ~0U};
        (*count)++;
    }
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}
