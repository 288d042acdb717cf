// What tests can set and ask: defined in the Python module beside the entry points of csrc/python/module.cc.

#ifndef TFOPS_SIMT_CONTROLS_H_
#define TFOPS_SIMT_CONTROLS_H_

#include <pybind11/pybind11.h>

namespace simt {

void DefineControls(pybind11::module_& module);

}  // namespace simt

#endif  // TFOPS_SIMT_CONTROLS_H_
