# sparseprune_add_cpu(target): the drivers and the kernels of every instruction set, for the extension and the C++ tests.
#
# Flags belong to a folder. No flag reaches the code that runs before the level is chosen, and no link-time optimisation
# crosses the folders.
function(sparseprune_add_cpu target)
  set(cpu ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cpu)
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  target_sources(${target} PRIVATE
    ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/core/header.cpp
    ${cpu}/ops/convert.cpp
    ${cpu}/dispatch/isa.cpp
    ${cpu}/dispatch/x86.cpp
    ${cpu}/ops/linear.cpp
    ${cpu}/ops/lookup.cpp
    ${cpu}/ops/pack.cpp
    ${cpu}/ops/pack_codes.cpp
    ${cpu}/ops/parallel.cpp
    ${cpu}/ops/plan.cpp
    ${cpu}/ops/rounding.cpp
    ${cpu}/scalar/table.cpp)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    set(AVX2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt)
    set(AVX512 ${AVX2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512)
    set(AVX512_VBMI2 ${AVX512} -mavx512vbmi -mavx512vbmi2 -mavx512vnni)
    set(AVX512_BF16 ${AVX512_VBMI2} -mavx512bf16)
    set(AMX ${AVX512_BF16} -mamx-tile -mamx-bf16)
    # GCC 12 sees an uninitialised register in its own intrinsics (GCC bug 105593).
    set(QUIET)
    if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
      set(QUIET -Wno-maybe-uninitialized -Wno-uninitialized)
    endif()
    foreach(isa IN ITEMS avx2 avx512 avx512_vbmi2 avx512_bf16 amx)
      string(TOUPPER ${isa} flags)
      target_sources(${target} PRIVATE ${cpu}/x86/${isa}/table.cpp)
      set_source_files_properties(${cpu}/x86/${isa}/table.cpp PROPERTIES COMPILE_OPTIONS "${${flags}};${QUIET}")
    endforeach()
    target_compile_definitions(${target} PRIVATE SPARSEPRUNE_X86)
  endif()
endfunction()

# What nvcc compiles, and what any host compiler does; tests/simt compiles the same files for the emulator.
set(SPARSEPRUNE_CUDA_KERNELS
  convert/convert.cu
  linear/bitmap8.cu
  linear/bitmap8_f32.cu
  linear/fragments.cu
  linear/fragments24_int4.cu
  linear/fragments24_int8.cu
  linear/fragments_int4.cu
  linear/fragments_int4_minimum.cu
  linear/fragments_int8.cu
  linear/sparse24.cu
  linear/sparse24_large.cu
  linear/sparse24_medium.cu
  linear/sparse24_small.cu
  masks/masks.cu
  pack/bitmap8.cu
  pack/fragments.cu
  pack/sparse24.cu
  linear/splits.cu)
set(SPARSEPRUNE_CUDA_HOST
  linear/linear.cpp
  linear/plan.cpp)
list(TRANSFORM SPARSEPRUNE_CUDA_KERNELS PREPEND ${CMAKE_CURRENT_LIST_DIR}/cuda/)
list(TRANSFORM SPARSEPRUNE_CUDA_HOST PREPEND ${CMAKE_CURRENT_LIST_DIR}/cuda/)

# sparseprune_add_cuda(target): launchers, kernels and bindings. The CUDA runtime is linked statically and looks for the
# driver when it is first called, so the extension loads on a machine that has none.
#
# The kernels are a library of their own: their compilation, the longest part of a build, does not depend on Python.
function(sparseprune_add_cuda target)
  set(csrc ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  add_library(sparseprune_cuda OBJECT ${SPARSEPRUNE_CUDA_KERNELS} ${SPARSEPRUNE_CUDA_HOST} ${csrc}/cuda/device.cpp)
  target_include_directories(sparseprune_cuda PRIVATE ${csrc})
  target_include_directories(sparseprune_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_options(sparseprune_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-fvisibility=hidden>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-fvisibility=hidden;-Xptxas=--warn-on-spills,--warn-on-local-memory-usage>)
  if(SPARSEPRUNE_WERROR)
    target_compile_options(sparseprune_cuda PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Werror>
      $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror>)
  endif()
  target_sources(${target} PRIVATE ${csrc}/bindings/cuda.cpp $<TARGET_OBJECTS:sparseprune_cuda>)
  target_compile_definitions(${target} PRIVATE SPARSEPRUNE_CUDA
    SPARSEPRUNE_CUDA_TOOLKIT="${SPARSEPRUNE_CUDA_TOOLKIT}" SPARSEPRUNE_CUDA_TARGETS="${SPARSEPRUNE_CUDA_TARGETS}")
  target_include_directories(${target} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
endfunction()
