// Gives the CPU build of PyTorch one CUDA device: its memory is driver.c's, its operations are the processor's own.
//
// A tensor of that device is a real one with a real address, and may not be mixed with the CPU's, as on a card. Each
// operation runs on CPU tensors over the same memory; what it makes is copied into memory of the device, which can run
// out. Without numbers (driver.c) large operations run on torch's meta device, and only what they make is allocated.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

extern "C" int cuMemAlloc_v2(unsigned long long *, size_t);
extern "C" int cuMemFree_v2(unsigned long long);
extern "C" int card_has_numbers();
extern "C" void card_count_move(uint64_t);

namespace {
using at::Tensor;
constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device CARD(CUDA, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);
constexpr int64_t SMALL = 1 << 16;      // bytes up to which numbers are always computed: noise levels, positions
constexpr int64_t FRESH = 1 << 25;      // bytes from which malloc's memory is new, and so zero

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    unsigned long long address = 0;
    if (bytes && cuMemAlloc_v2(&address, bytes))
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory: the simulated card has no ", bytes, " bytes left");
    return {(void *)address, (void *)address, &free, CARD};
  }
  static void free(void *address) { cuMemFree_v2((unsigned long long)address); }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void *to, const void *from, size_t bytes) const override { memcpy(to, from, bytes); }
} memory;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  const c10::Stream stream{c10::Stream::DEFAULT, CARD};
  c10::Device exchangeDevice(c10::Device) const override { return CARD; }
  c10::Device getDevice() const override { return CARD; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Device getDeviceFromPtr(void *) const override { return CARD; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Allocator *getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

int64_t size_of(const Tensor &t) { return t.defined() ? t.numel() * int64_t(t.itemsize()) : 0; }
bool on_card(const Tensor &t) { return t.defined() && t.device().type() == CUDA; }

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

// The same memory as a tensor of the CPU.
Tensor host(const Tensor &t) {
  c10::DataPtr data(t.storage().mutable_data(), c10::Device(c10::DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  auto view = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, t.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  view._set_conj(t.is_conj());
  view._set_neg(t.is_neg());
  return view;
}

Tensor elsewhere(const Tensor &t, bool compute) {
  if (t.device().type() == CUDA && t.numel() && compute) return host(t);
  if (t.device().type() != CUDA && (compute || !t.dim())) return t;
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(compute ? at::kCPU : at::kMeta));
}

// Without numbers every test is passed: isfinite(x).all().
void pass(const Tensor &t) {
  if (t.scalar_type() == at::kBool) host(t).fill_(true);
}

Tensor to_card(const Tensor &t) {
  auto made = at::empty_strided(t.sizes(), t.strides(), t.options().device(CARD));
  if (t.device().type() == c10::DeviceType::Meta) pass(made);
  else if (card_has_numbers() || size_of(t) < SMALL) host(made).copy_(t);
  return made;
}

Tensor &copy_(Tensor &self, const Tensor &source, bool) {
  if (on_card(self) && !on_card(source)) card_count_move(size_of(source));
  if (card_has_numbers() || size_of(self) < SMALL) {
    auto to = on_card(self) ? host(self) : self;
    to.copy_(on_card(source) ? host(source) : source);
  } else if (!on_card(self) && size_of(self) < FRESH) {
    self.zero_();
  }
  return self;
}

// Where a card takes tensors of the CPU too: indices.
bool may_mix(const std::string &name) { return name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0; }

template <typename F>
c10::IValue each_tensor(const c10::IValue &value, F change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor t : value.toTensorList()) list.push_back(change(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor> t : value.toOptionalTensorList())
      list.push_back(t ? std::optional<Tensor>(change(*t)) : std::nullopt);
    return list;
  }
  return value;
}

void run_elsewhere(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *stack) {
  const auto &schema = op.schema();
  const auto start = stack->size() - schema.arguments().size();
  const std::vector<c10::IValue> given(stack->begin() + start, stack->end());
  const bool strict = !may_mix(schema.name());
  int64_t bytes = 0;
  for (const auto &value : given) each_tensor(value, [&](const Tensor &t) { return bytes += size_of(t), t; });

  auto run = [&](bool compute) {
    stack->resize(start);
    for (const auto &value : given) {
      if (value.isDevice()) stack->emplace_back(c10::Device(compute ? at::kCPU : at::kMeta));
      else stack->push_back(each_tensor(value, [&](const Tensor &t) {
        TORCH_CHECK(!strict || !t.defined() || on_card(t) || !t.dim(),
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                    t.device(), " (", schema.name(), ", a tensor of shape ", t.sizes(), ")");
        return t.defined() ? elsewhere(t, compute) : t;
      }));
    }
    op.callBoxed(stack);
  };
  bool computed = card_has_numbers() || bytes < SMALL;
  try {
    run(computed);
  } catch (const c10::NotImplementedError &) {  // no such operation on meta, or none on the CPU
    if (card_has_numbers()) throw;
    run(computed = !computed);
  }

  const auto end = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto &value = (*stack)[end + i];
    const auto *alias = schema.returns()[i].alias_info();
    if (!alias) {
      value = each_tensor(value, [](const Tensor &t) { return t.defined() ? to_card(t) : t; });
      continue;
    }
    TORCH_CHECK(alias->isWrite(), "simulated card: ", schema.name(), " makes a view; backend.cpp has to name it");
    for (size_t j = 0; j < given.size(); ++j) {  // give back the argument that was written to
      const auto *theirs = schema.arguments()[j].alias_info();
      if (!theirs || theirs->beforeSets() != alias->beforeSets()) continue;
      auto written = given[j].toTensor();
      const auto result = value.toTensor();
      if (on_card(written) && result.sizes() != written.sizes()) written.set_(to_card(result));  // an empty out=
      else if (on_card(written) && !computed) pass(written);
      value = written;
      break;
    }
  }
}

// As the fused kernels of cards do, keeps no scores.
Tensor attention(const Tensor &q, const Tensor &k, const Tensor &v, const std::optional<Tensor> &mask, double dropout,
                 bool causal, std::optional<double> scale, bool grouped) {
  for (const auto &t : {q, k, v, mask.value_or(q)})
    TORCH_CHECK(on_card(t), "Expected all tensors to be on the same device, but found attention's on ", t.device());
  if (!card_has_numbers()) {
    auto size = q.sizes().vec();
    size.back() = v.size(-1);
    return at::empty(size, q.options());
  }
  const auto their_mask = mask ? std::optional<Tensor>(host(*mask)) : std::nullopt;
  return to_card(at::scaled_dot_product_attention(host(q), host(k), host(v), their_mask, dropout, causal, scale, grouped));
}

at::Scalar scalar(const Tensor &self) { return at::native::_local_scalar_dense_cpu(host(self)); }
bool is_pinned(const Tensor &, std::optional<at::Device>) { return false; }
void record_stream(Tensor &, c10::Stream) {}
const bool allocates = (c10::SetAllocator(CUDA, &memory, 200), true);
}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_elsewhere>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", scalar);
  m.impl("is_pinned", is_pinned);
  m.impl("record_stream", record_stream);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("scaled_dot_product_attention", attention);
  // Composite ones that choose by device: the CPU chooses.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_elsewhere>());
}
