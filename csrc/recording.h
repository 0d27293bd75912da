// A call's operators, recorded once and run again without the Python that chose them (bnfast/recording.py).
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace bnfast {

// Adds the class Recording to the module.
void define_recording(pybind11::module& m);

}  // namespace bnfast
