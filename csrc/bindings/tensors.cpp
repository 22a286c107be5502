#include "bindings/tensors.h"

#include <cstring>

#include "core/packing.h"
#include "cpu/ops/linear.h"

namespace py = pybind11;

namespace sparseprune {
namespace {

struct DlTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // null: contiguous
  std::uint64_t byte_offset;
};

struct DlExchange {
  struct {
    std::uint32_t major, minor;
  } version;
  DlExchange* previous;
  void *allocate, *managed_from_object, *object_from_managed;
  int (*tensor_from_object)(void* object, DlTensor* out);  // 0, or -1 with a Python error set; may be null
  void* stream;
};

constexpr int kDlCpu = 1;
constexpr std::uint8_t kDlUint = 1, kDlFloat = 2, kDlBfloat = 4;
constexpr int kMaxDims = 8;

// Filled once by use_tensors, never freed: the interpreter is gone before this library is.
struct Torch {
  const DlExchange* exchange = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* empty = nullptr;
  PyObject* dtypes[kDTypes] = {};
  PyObject* names = nullptr;  // ("dtype",)
} g_torch;

bool read(py::handle object, DlTensor* out, const PyTypeObject* type = g_torch.tensor) {
  if (Py_TYPE(object.ptr()) != type) return false;
  if (g_torch.exchange->tensor_from_object(object.ptr(), out) == 0) return out->device_type == kDlCpu && out->lanes == 1;
  PyErr_Clear();
  return false;
}

bool is_dtype(const DlTensor& t, DType dtype) {
  if (dtype == DType::f32) return t.code == kDlFloat && t.bits == 32;
  return t.bits == 16 && t.code == (dtype == DType::bf16 ? kDlBfloat : kDlFloat);
}

bool is_contiguous(const DlTensor& t) {
  if (t.strides == nullptr) return true;
  std::int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

template <typename T>
T* data_of(const DlTensor& t) {
  return reinterpret_cast<T*>(static_cast<std::uint8_t*>(t.data) + t.byte_offset);
}

// torch.empty(shape, dtype=dtype)
py::object empty(const std::int64_t* shape, int ndim, DType dtype) {
  py::tuple sizes(ndim);
  for (int i = 0; i < ndim; ++i) PyTuple_SET_ITEM(sizes.ptr(), i, PyLong_FromLongLong(shape[i]));
  PyObject* arguments[] = {nullptr, sizes.ptr(), g_torch.dtypes[static_cast<int>(dtype)]};
  PyObject* made = PyObject_Vectorcall(g_torch.empty, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, g_torch.names);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

}  // namespace

bool use_tensors(py::type tensor, py::type parameter, py::object empty, py::list dtypes) {
  const char* attribute = "__dlpack_c_exchange_api__";
  if (!py::hasattr(tensor, attribute)) return false;
  const auto* exchange =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(tensor.attr(attribute).ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->version.major != 1 || exchange->tensor_from_object == nullptr) return false;
  for (int i = 0; i < kDTypes; ++i) g_torch.dtypes[i] = Py_NewRef(PyList_GET_ITEM(dtypes.ptr(), i));
  g_torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  g_torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
  g_torch.empty = empty.release().ptr();
  g_torch.names = py::make_tuple("dtype").release().ptr();
  g_torch.exchange = exchange;
  return true;
}

py::object linear_of_tensors(py::handle x, py::handle packed, py::handle bias, std::int64_t rows, std::int64_t cols,
                             std::int64_t packing, int threads) {
  if (g_torch.exchange == nullptr) return py::none();
  const Packing how = to_packing(packing);
  DlTensor in, weight, add{}, out;
  if (!read(x, &in) || !is_dtype(in, how.dtype) || in.ndim < 1 || in.ndim > kMaxDims) return py::none();
  if (cols < 1 || in.shape[in.ndim - 1] != cols || !is_contiguous(in)) return py::none();
  if (!read(packed, &weight) || weight.code != kDlUint || weight.bits != 8) return py::none();
  if (weight.ndim != 1 || !is_contiguous(weight)) return py::none();
  if (!bias.is_none()) {
    if (!read(bias, &add) && !read(bias, &add, g_torch.parameter)) return py::none();
    if (!is_dtype(add, how.dtype) || add.ndim != 1 || add.shape[0] != rows) return py::none();
    if (!is_contiguous(add)) return py::none();
  }
  std::int64_t shape[kMaxDims], batch = 1;
  for (int i = 0; i < in.ndim - 1; ++i) batch *= shape[i] = in.shape[i];
  shape[in.ndim - 1] = rows;
  py::object made = empty(shape, in.ndim, how.dtype);
  if (!read(made, &out)) return py::none();  // a default device that is not the CPU
  {
    const py::gil_scoped_release release;
    linear({data_of<const std::uint8_t>(weight), weight.shape[0], rows, cols, how, data_of<const void>(in), batch, cols,
            bias.is_none() ? nullptr : data_of<const void>(add), data_of<void>(out), threads, -1});
  }
  return made;
}

}  // namespace sparseprune
