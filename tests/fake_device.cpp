// What a CPU build of PyTorch lacks so that tensors may say "cuda:0" or "mps:0": a device guard and the hooks that autograd asks.
// None of them does anything. tests/fake_device.py compiles this file, once for each kind, with -DFAKE_CUDA or -DFAKE_MPS.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using namespace c10;

#ifdef FAKE_MPS
constexpr DeviceType kind = DeviceType::MPS;
#else
constexpr DeviceType kind = DeviceType::CUDA;
#endif

struct Guard final : public impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kind; }
  Device exchangeDevice(Device) const override { return Device(kind, 0); }
  Device getDevice() const override { return Device(kind, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, Device(kind, 0)); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, Device(kind, 0)); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, Device(kind, 0)); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, Device(kind, 0)); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

#ifdef FAKE_MPS
C10_REGISTER_GUARD_IMPL(MPS, Guard)
using Interface = at::MPSHooksInterface;
#else
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
using Interface = at::CUDAHooksInterface;
#endif

// PyTorch finds hooks by the name of their class.
#ifdef FAKE_MPS
#define HOOKS MPSHooks
#else
#define HOOKS CUDAHooks
#endif
struct HOOKS final : public Interface {
#ifdef FAKE_MPS
  bool hasMPS() const override { return true; }
  void deviceSynchronize() const override {}
#else
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  long versionCuDNN() const override { return 0; }
#endif
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};

using namespace at;            // the macros below need the registries' bare names
#ifdef FAKE_MPS
REGISTER_MPS_HOOKS(MPSHooks)
#else
REGISTER_CUDA_HOOKS(CUDAHooks)
#endif
}  // namespace
