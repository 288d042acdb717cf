# Which GPUs nvcc compiles for, by what it knows: that of CUDA 12 begins with older architectures than that of CUDA 13,
# and does not know the newest before 12.8.
#
# tfops_cuda_architectures(<nvcc> [<GPU>...]): machine code for each generation that this nvcc knows, and PTX for those
# to come. With GPUs, such as 90 for compute capability 9.0, code for them alone: machine code, or the newest PTX that
# both know where this nvcc has none for the GPU. Sets
#   TFOPS_CUDA_LEAST          the least compute capability of a GPU that there can be code for, such as "7.5"
#   TFOPS_CUDA_OPTIONS        options for nvcc; empty if there is code for none of the GPUs
#   TFOPS_CUDA_ARCHITECTURES  the same, as CMake names them: 90-real is machine code, 90-virtual PTX
function(tfops_cuda_architectures nvcc)
  foreach(kind code arch)
    execute_process(COMMAND ${nvcc} --list-gpu-${kind} OUTPUT_VARIABLE known_${kind} ERROR_QUIET)
  endforeach()
  string(REGEX MATCHALL "sm_[0-9]+[a-z]?" known_code "${known_code}")
  string(REGEX MATCHALL "compute_[0-9]+[a-z]?" known_arch "${known_arch}")

  # What takes the time is PTX, so generations share it. (From that of 9.0, kernels of 12.0 would spill registers.)
  set(virtuals 70 75 80 90 100)
  foreach(virtual IN LISTS virtuals)
    if(NOT compute_${virtual} IN_LIST known_arch)
      list(REMOVE_ITEM virtuals ${virtual})
    endif()
  endforeach()
  set(least "")
  set(options "")
  set(architectures "")
  if(virtuals)
    list(GET virtuals 0 first)
    string(REGEX REPLACE "(.)$" ".\\1" least ${first})

    set(ptx "")
    set(generations ${ARGN})
    if(NOT generations)
      set(generations 70 75 80 86 89 90 100 110 120)
      list(GET virtuals -1 ptx)
    endif()
    foreach(generation IN LISTS generations)
      foreach(candidate IN LISTS virtuals)
        if(candidate LESS_EQUAL generation)
          set(virtual ${candidate})
        endif()
      endforeach()
      if(generation LESS first)
        continue()
      elseif(sm_${generation} IN_LIST known_code)
        list(APPEND options -gencode=arch=compute_${virtual},code=sm_${generation})
        list(APPEND architectures ${generation}-real)
      else()
        list(APPEND ptx ${virtual})
      endif()
    endforeach()
    list(REMOVE_DUPLICATES ptx)
    foreach(virtual IN LISTS ptx)
      list(APPEND options -gencode=arch=compute_${virtual},code=compute_${virtual})
      list(APPEND architectures ${virtual}-virtual)
    endforeach()
    if(70-real IN_LIST architectures)
      list(PREPEND options -Wno-deprecated-gpu-targets)  # from 12.8 on, nvcc warns that 13 will not know it
    endif()
  endif()
  set(TFOPS_CUDA_LEAST "${least}" PARENT_SCOPE)
  set(TFOPS_CUDA_OPTIONS "${options}" PARENT_SCOPE)
  set(TFOPS_CUDA_ARCHITECTURES "${architectures}" PARENT_SCOPE)
endfunction()
