#include "recording.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/pool.h"
#include "cpu/weights.h"

namespace bnfast {
namespace {

namespace py = pybind11;
using at::Tensor;
using c10::IValue;
using OptionalTensor = std::optional<Tensor>;

// What operators that were chosen for one tensor depend on in another.
class Likeness {
 public:
  explicit Likeness(const OptionalTensor& t) : is_given_(t.has_value()) {
    if (!t) return;
    keys_ = t->key_set();
    dtype_ = t->scalar_type();
    sizes_ = t->sizes().vec();
    strides_ = t->strides().vec();
  }
  bool fits(const OptionalTensor& t) const {
    if (t.has_value() != is_given_) return false;
    return !is_given_ || (t->key_set() == keys_ && t->scalar_type() == dtype_ && t->sizes() == sizes_ && t->strides() == strides_);
  }

 private:
  bool is_given_;
  c10::DispatchKeySet keys_;   // device, and what wraps a tensor
  at::ScalarType dtype_ = at::kFloat;
  std::vector<int64_t> sizes_, strides_;
};

// A frozen weight of which a transformed form is among the constants: see bnfast/weights.py.
struct Weight {
  size_t input;
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  const void* data;
  std::optional<uint32_t> version;
  int64_t checksum;

  static std::optional<uint32_t> version_of(const Tensor& t) {
    return t.is_inference() ? std::nullopt : std::optional<uint32_t>(t._version());
  }
  Weight(size_t input, const Tensor& t)
      : input(input), tensor(t.getIntrusivePtr()), data(t.const_data_ptr()), version(version_of(t)), checksum(weight_checksum(t)) {}
  bool is_same(const Tensor& t) const {
    return tensor._unsafe_get_target() == t.unsafeGetTensorImpl() && t.const_data_ptr() == data && version_of(t) == version &&
           weight_checksum(t) == checksum;
  }
};

IValue constant_of(py::handle value, const c10::TypePtr& type) {
  const bool is_number = PyBool_Check(value.ptr()) || PyLong_Check(value.ptr()) || PyFloat_Check(value.ptr());
  if (!is_number || !c10::TensorType::get()->isSubtypeOf(*type)) return torch::jit::toIValue(value, type);
  // A number in place of a tensor does not count for the dtype of what comes of it.
  Tensor number = c10::scalar_to_tensor(torch::jit::toIValue(value, c10::NumberType::get()).toScalar());
  number.unsafeGetTensorImpl()->set_wrapped_number(true);
  return number;
}

// Values are held in slots: the inputs first, then constants and results. A value is let go at its last use.
class Recording {
 public:
  explicit Recording(const std::vector<OptionalTensor>& inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      likenesses_.emplace_back(inputs[i]);
      slots_.emplace_back();
      for (size_t j = i + 1; inputs[i] && j < inputs.size(); ++j) {
        if (inputs[j] && inputs[j]->is_same(*inputs[i])) same_.emplace_back(i, j);
      }
    }
  }

  int64_t constant(Tensor value) {
    slots_.emplace_back(std::move(value));
    return static_cast<int64_t>(slots_.size()) - 1;
  }

  // An input on whose content constants depend.
  void depends_on(int64_t input, const Tensor& weight) { weights_.emplace_back(input, weight); }

  // arguments: all of the schema's. slots: in place of an argument, -1 where it is what it says. Returns the slots of its results.
  std::vector<int64_t> call(const std::string& name, const std::string& overload, const py::list& arguments,
                            const std::vector<int64_t>& slots) {
    Call call = {c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}};
    const auto& schema = call.op.schema();
    TORCH_CHECK(arguments.size() == schema.arguments().size() && slots.size() == arguments.size(), "bnfast: ", name, " takes ",
                schema.arguments().size(), " arguments; ", arguments.size(), " were recorded");
    for (size_t i = 0; i < slots.size(); ++i) {
      if (slots[i] >= 0) call.arguments.push_back({slots[i], {}});
      else call.arguments.push_back({-1, constant_of(arguments[i], schema.arguments()[i].type())});
    }
    std::vector<int64_t> results;
    for (size_t i = 0; i < schema.returns().size(); ++i) {
      results.push_back(static_cast<int64_t>(slots_.size()));
      slots_.emplace_back();
    }
    call.results = results;
    calls_.push_back(std::move(call));
    return results;
  }

  // outputs: slots, -1 for None. Nothing is added after this.
  void finish(std::vector<int64_t> outputs) {
    outputs_ = std::move(outputs);
    std::vector<bool> is_needed(slots_.size());
    for (const int64_t slot : outputs_) {
      if (slot >= 0) is_needed[slot] = true;
    }
    for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
      for (int64_t& slot : call->results) {
        if (!is_needed[slot]) slot = -1;
      }
      for (auto argument = call->arguments.rbegin(); argument != call->arguments.rend(); ++argument) {
        if (argument->slot < 0) continue;
        argument->is_last = !is_needed[argument->slot];
        is_needed[argument->slot] = true;
      }
    }
    for (size_t i = 0; i < likenesses_.size(); ++i) is_read_.push_back(is_needed[i]);
  }

  // The outputs for these inputs, which are taken out of the list; None, with everything as it was, where they are not like those that
  // this was recorded for or a weight has changed.
  py::object run(py::list inputs) const {
    if (inputs.size() != likenesses_.size()) return py::none();
    std::vector<OptionalTensor> given;
    given.reserve(inputs.size());
    for (size_t i = 0; i < likenesses_.size(); ++i) {
      given.push_back(inputs[i].cast<OptionalTensor>());
      if (!likenesses_[i].fits(given.back())) return py::none();
    }
    for (const auto& [one, other] : same_) {
      if (!given[one]->is_same(*given[other])) return py::none();
    }
    for (const Weight& weight : weights_) {
      if (!weight.is_same(*given[weight.input])) return py::none();
    }
    PyList_SetSlice(inputs.ptr(), 0, PyList_GET_SIZE(inputs.ptr()), nullptr);
    std::vector<IValue> slots = slots_;
    for (size_t i = 0; i < given.size(); ++i) {
      if (given[i] && is_read_[i]) slots[i] = std::move(*given[i]);
    }
    given.clear();
    {
      const py::gil_scoped_release others_may_run;
      const PoolScope pooled;
      torch::jit::Stack stack;
      for (const Call& call : calls_) {
        for (const Argument& argument : call.arguments) {
          if (argument.slot < 0) stack.push_back(argument.value);
          else if (argument.is_last) stack.push_back(std::move(slots[argument.slot]));
          else stack.push_back(slots[argument.slot]);
        }
        call.op.callBoxed(stack);
        for (size_t i = 0; i < call.results.size(); ++i) {
          if (call.results[i] >= 0) slots[call.results[i]] = std::move(stack[i]);
        }
        stack.clear();
      }
    }
    py::list outputs(outputs_.size());
    for (size_t i = 0; i < outputs_.size(); ++i) {
      outputs[i] = outputs_[i] < 0 ? py::none() : py::cast(slots[outputs_[i]].toTensor());
    }
    return outputs;
  }

 private:
  struct Argument {
    int64_t slot;
    IValue value;
    bool is_last = false;
  };
  struct Call {
    c10::OperatorHandle op;
    std::vector<Argument> arguments;
    std::vector<int64_t> results;   // slots, -1 for what nobody asks for
  };

  std::vector<Likeness> likenesses_;
  std::vector<std::pair<size_t, size_t>> same_;   // inputs that were one tensor: either may stand for both
  std::vector<bool> is_read_;                      // of the inputs
  std::vector<Weight> weights_;
  std::vector<IValue> slots_;
  std::vector<Call> calls_;
  std::vector<int64_t> outputs_;
};

}  // namespace

void define_recording(py::module& m) {
  py::class_<Recording>(m, "Recording", "Operators of one call, to be run again on tensors like those that it was recorded for.")
      .def(py::init<const std::vector<OptionalTensor>&>(), py::arg("inputs"))
      .def("constant", &Recording::constant, py::arg("value"))
      .def("depends_on", &Recording::depends_on, py::arg("input"), py::arg("weight"))
      .def("call", &Recording::call, py::arg("name"), py::arg("overload"), py::arg("arguments"), py::arg("slots"))
      .def("finish", &Recording::finish, py::arg("outputs"))
      .def("run", &Recording::run, py::arg("inputs"));
}

}  // namespace bnfast
