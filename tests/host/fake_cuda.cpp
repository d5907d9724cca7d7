// A stand-in for libcuda.so.1, as far as the doctor asks: two H200 that are not there.
//
// It has no other function, so whoever calls one (a context, multicast) fails. FAKE_CUDA_INIT is
// what cuInit returns, FAKE_CUDA_PEERS whether the GPUs reach each other.
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

int setting(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return setting("FAKE_CUDA_INIT", 0); }

int cuDriverGetVersion(int* version) {
    *version = 13010;
    return 0;
}

int cuDeviceGetCount(int* count) {
    *count = 2;
    return 0;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, length, "NVIDIA H200");
    return 0;
}

int cuDeviceGetUuid(char* uuid, int device) {
    std::memset(uuid, 0, 16);
    uuid[15] = static_cast<char>(device);
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16:  // MULTIPROCESSOR_COUNT
            *value = 132;
            return 0;
        case 75:  // COMPUTE_CAPABILITY_MAJOR
            *value = 9;
            return 0;
        case 76:  // COMPUTE_CAPABILITY_MINOR
            *value = 0;
            return 0;
        case 128:  // HANDLE_TYPE_FABRIC_SUPPORTED
            *value = 0;
            return 0;
        default:
            *value = 1;
            return 0;
    }
}

int cuDeviceCanAccessPeer(int* can, int, int) {
    *can = setting("FAKE_CUDA_PEERS", 1);
    return 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status) {
    const struct {
        const char* name;
        void* function;
    } known[] = {
        {"cuInit", reinterpret_cast<void*>(cuInit)},
        {"cuDriverGetVersion", reinterpret_cast<void*>(cuDriverGetVersion)},
        {"cuDeviceGetCount", reinterpret_cast<void*>(cuDeviceGetCount)},
        {"cuDeviceGet", reinterpret_cast<void*>(cuDeviceGet)},
        {"cuDeviceGetName", reinterpret_cast<void*>(cuDeviceGetName)},
        {"cuDeviceGetUuid", reinterpret_cast<void*>(cuDeviceGetUuid)},
        {"cuDeviceGetAttribute", reinterpret_cast<void*>(cuDeviceGetAttribute)},
        {"cuDeviceCanAccessPeer", reinterpret_cast<void*>(cuDeviceCanAccessPeer)},
        {"cuGetProcAddress", reinterpret_cast<void*>(cuGetProcAddress_v2)},
    };
    for (const auto& each : known) {
        if (std::strcmp(name, each.name) == 0) {
            *function = each.function;
            if (status) *status = 0;
            return 0;
        }
    }
    *function = nullptr;
    if (status) *status = 1;
    return 500;  // CUDA_ERROR_NOT_FOUND
}

int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
