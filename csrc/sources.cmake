# sparseprune_add_cpu(target): the drivers and the kernels of every instruction set, for the extension and the C++ tests.
#
# Flags belong to a folder. No flag reaches the code that runs before the level is chosen, and no link-time optimisation
# crosses the folders.
function(sparseprune_add_cpu target)
  set(cpu ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cpu)
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  target_sources(${target} PRIVATE
    ${cpu}/convert.cpp
    ${cpu}/isa.cpp
    ${cpu}/linear.cpp
    ${cpu}/pack.cpp
    ${cpu}/parallel.cpp
    ${cpu}/plan.cpp
    ${cpu}/scalar/table.cpp)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    set(AVX2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt)
    set(AVX512 ${AVX2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mprefer-vector-width=512)
    set(AVX512_BF16 ${AVX512} -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mavx512bf16)
    set(AMX ${AVX512_BF16} -mamx-tile -mamx-bf16)
    # GCC 12 sees an uninitialised register in its own intrinsics (GCC bug 105593).
    set(QUIET)
    if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
      set(QUIET -Wno-maybe-uninitialized -Wno-uninitialized)
    endif()
    foreach(isa IN ITEMS avx2 avx512 avx512_bf16 amx)
      string(TOUPPER ${isa} flags)
      target_sources(${target} PRIVATE ${cpu}/${isa}/table.cpp)
      set_source_files_properties(${cpu}/${isa}/table.cpp PROPERTIES COMPILE_OPTIONS "${${flags}};${QUIET}")
    endforeach()
    target_compile_definitions(${target} PRIVATE SPARSEPRUNE_X86)
  endif()
endfunction()
