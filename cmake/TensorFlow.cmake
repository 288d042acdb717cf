# Which TensorFlow to build ops for: sets TFOPS_TENSORFLOW_VERSIONS (2.21.0, say), TFOPS_TENSORFLOW_RELEASES (2.21), and for
# each release the imported targets TensorFlow::<release>::Framework (headers, libtensorflow_framework, and the definitions
# of tf.sysconfig.get_compile_flags()) and, where the package has XLA's interface for custom calls,
# TensorFlow::<release>::Xla (with libtensorflow_cc).
#
# It is the package beside this Python, or those in TFOPS_TENSORFLOW_PACKAGES, a folder that tensorflow_packages.py has
# filled. None is imported.

set(TFOPS_TENSORFLOW_VERSIONS "")
set(TFOPS_TENSORFLOW_RELEASES "")
if(TFOPS_TENSORFLOW MATCHES "^(OFF|NO|FALSE|0)$")
  return()
endif()
if(NOT TFOPS_TENSORFLOW MATCHES "^(ON|YES|TRUE|1|[0-9]+\\.[0-9]+)$")
  message(FATAL_ERROR "TFOPS_TENSORFLOW must be ON, OFF or a release such as 2.21, but it is '${TFOPS_TENSORFLOW}'")
endif()

if(TFOPS_TENSORFLOW_PACKAGES)
  cmake_path(ABSOLUTE_PATH TFOPS_TENSORFLOW_PACKAGES BASE_DIRECTORY ${CMAKE_SOURCE_DIR})
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/tensorflow_packages.py find ${TFOPS_TENSORFLOW_PACKAGES}
  OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_VARIABLE said)
if(failed)
  message(FATAL_ERROR "${said}")
endif()
string(REPLACE "\n" ";" found "${found}")
if(NOT found)
  message(FATAL_ERROR "the ops need TensorFlow's headers, but there is no TensorFlow beside ${Python_EXECUTABLE} or in "
                      "TFOPS_TENSORFLOW_PACKAGES='${TFOPS_TENSORFLOW_PACKAGES}': install tensorflow-cpu or another "
                      "package of it, or set TFOPS_TENSORFLOW=OFF")
endif()

foreach(package IN LISTS found)
  string(REGEX REPLACE "\\|.*" "" folder "${package}")
  string(REGEX REPLACE ".*\\|" "" version "${package}")
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" release "${version}")
  if(version VERSION_LESS 2.18)  # or none; tfops/_library.py says the same of what is running
    message(FATAL_ERROR "tfops needs TensorFlow 2.18 or later, but ${folder} holds version '${version}'")
  endif()
  if(release IN_LIST TFOPS_TENSORFLOW_RELEASES)
    message(FATAL_ERROR "TFOPS_TENSORFLOW_PACKAGES='${TFOPS_TENSORFLOW_PACKAGES}' holds TensorFlow ${release} twice")
  endif()
  if(TFOPS_TENSORFLOW MATCHES "\\." AND NOT TFOPS_TENSORFLOW STREQUAL release)
    message(FATAL_ERROR "TFOPS_TENSORFLOW=${TFOPS_TENSORFLOW}, but ${folder} holds TensorFlow ${version}")
  endif()
  list(APPEND TFOPS_TENSORFLOW_VERSIONS ${version})
  list(APPEND TFOPS_TENSORFLOW_RELEASES ${release})

  set(include ${folder}/include)
  set(framework TensorFlow::${release}::Framework)
  add_library(${framework} SHARED IMPORTED)
  set_target_properties(${framework} PROPERTIES
    IMPORTED_LOCATION ${folder}/libtensorflow_framework.so.2
    INTERFACE_INCLUDE_DIRECTORIES ${include}
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES ${include}
    INTERFACE_COMPILE_OPTIONS "-ffile-prefix-map=${include}/="
    INTERFACE_COMPILE_DEFINITIONS "_GLIBCXX_USE_CXX11_ABI=1;EIGEN_MAX_ALIGN_BYTES=64")
  if(EXISTS ${include}/xla/ffi/api/ffi.h AND EXISTS ${folder}/libtensorflow_cc.so.2)
    # What XLA's headers include, beside TensorFlow's own.
    set(folders ${include}/external/highwayhash ${include}/external/farmhash_archive/src)
    add_library(TensorFlow::${release}::Xla SHARED IMPORTED)
    set_target_properties(TensorFlow::${release}::Xla PROPERTIES
      IMPORTED_LOCATION ${folder}/libtensorflow_cc.so.2
      INTERFACE_INCLUDE_DIRECTORIES "${folders}"
      INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${folders}"
      INTERFACE_LINK_LIBRARIES ${framework})
  endif()
endforeach()
list(JOIN TFOPS_TENSORFLOW_VERSIONS ", " versions)
message(STATUS "TensorFlow ops: for ${versions}")
