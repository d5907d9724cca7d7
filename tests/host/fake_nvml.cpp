// A stand-in for libnvidia-ml.so.1, as far as the doctor asks: two H200 that are not there.
//
// What is missing here (MIG, virtualization) is missing in old drivers, too.
#include <cstdint>
#include <cstdio>
#include <cstring>

struct Memory {
    unsigned long long total, free, used;
};

struct FabricInfo {  // nvmlGpuFabricInfo_v2_t
    unsigned version;
    std::uint8_t cluster[16];
    unsigned status;
    std::uint32_t clique;
    unsigned state;
    std::uint32_t health;
};

extern "C" {

int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }

int nvmlSystemGetDriverVersion(char* text, unsigned length) {
    std::snprintf(text, length, "580.65.06");
    return 0;
}

int nvmlDeviceGetCount_v2(unsigned* count) {
    *count = 2;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, std::uintptr_t* device) {
    *device = index + 1;
    return 0;
}

int nvmlDeviceGetUUID(std::uintptr_t device, char* text, unsigned length) {
    std::snprintf(text, length, "GPU-00000000-0000-0000-0000-%012x", unsigned(device - 1));
    return 0;
}

int nvmlDeviceGetMemoryInfo(std::uintptr_t, Memory* memory) {
    *memory = {141ull << 30, 140ull << 30, 1ull << 30};
    return 0;
}

int nvmlDeviceGetNvLinkState(std::uintptr_t, unsigned link, unsigned* is_active) {
    if (link >= 18) return 2;  // NVML_ERROR_INVALID_ARGUMENT
    *is_active = 1;
    return 0;
}

int nvmlDeviceGetGpuFabricInfoV(std::uintptr_t, FabricInfo* info) {
    info->status = 0;
    info->clique = 7;
    info->state = 2;                     // in progress: the fabric manager is not done
    info->health = 2 | 2 << 2 | 1 << 4;  // an unhealthy route
    return 0;
}

const char* nvmlErrorString(int) { return "error of the stand-in"; }
}
