# Finds the TensorFlow package beside this Python, without importing it: TensorFlow_VERSION and the imported target
# TensorFlow::Framework (headers, libtensorflow_framework, and the definitions of tf.sysconfig.get_compile_flags());
# TensorFlow::Xla (those of XLA, and libtensorflow_cc) as well, where the package holds it.

execute_process(
  COMMAND ${Python_EXECUTABLE} -c [[
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("tensorflow")
if spec:
    distribution = importlib.metadata.packages_distributions()["tensorflow"][0]
    print(spec.submodule_search_locations[0], importlib.metadata.version(distribution), sep=";")
]]
  OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE)
if(found)
  list(GET found 0 TensorFlow_ROOT_DIR)
  list(GET found 1 TensorFlow_VERSION)
endif()
find_path(TensorFlow_INCLUDE_DIR tensorflow/core/framework/op.h PATHS ${TensorFlow_ROOT_DIR}/include NO_DEFAULT_PATH)
find_file(TensorFlow_FRAMEWORK libtensorflow_framework.so.2 PATHS ${TensorFlow_ROOT_DIR} NO_DEFAULT_PATH)
find_file(TensorFlow_CC libtensorflow_cc.so.2 PATHS ${TensorFlow_ROOT_DIR} NO_DEFAULT_PATH)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorFlow
  REQUIRED_VARS TensorFlow_FRAMEWORK TensorFlow_INCLUDE_DIR
  VERSION_VAR TensorFlow_VERSION
  REASON_FAILURE_MESSAGE "install tensorflow-cpu 2.21 beside ${Python_EXECUTABLE}, or set TFOPS_TENSORFLOW=OFF")

if(TensorFlow_FOUND AND NOT TARGET TensorFlow::Framework)
  add_library(TensorFlow::Framework SHARED IMPORTED)
  set_target_properties(TensorFlow::Framework PROPERTIES
    IMPORTED_LOCATION ${TensorFlow_FRAMEWORK}
    INTERFACE_INCLUDE_DIRECTORIES ${TensorFlow_INCLUDE_DIR}
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES ${TensorFlow_INCLUDE_DIR}
    INTERFACE_COMPILE_OPTIONS "-ffile-prefix-map=${TensorFlow_INCLUDE_DIR}/="
    INTERFACE_COMPILE_DEFINITIONS "_GLIBCXX_USE_CXX11_ABI=1;EIGEN_MAX_ALIGN_BYTES=64")
endif()
if(TensorFlow_FOUND AND TensorFlow_CC AND NOT TARGET TensorFlow::Xla)
  add_library(TensorFlow::Xla SHARED IMPORTED)
  # What XLA's headers include, beside TensorFlow's own.
  set(folders ${TensorFlow_INCLUDE_DIR}/external/highwayhash ${TensorFlow_INCLUDE_DIR}/external/farmhash_archive/src)
  set_target_properties(TensorFlow::Xla PROPERTIES
    IMPORTED_LOCATION ${TensorFlow_CC}
    INTERFACE_INCLUDE_DIRECTORIES "${folders}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${folders}"
    INTERFACE_LINK_LIBRARIES TensorFlow::Framework)
endif()
