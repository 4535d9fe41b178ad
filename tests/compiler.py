"""Flags of XLA:CPU for programs that are compiled to be run once or twice."""

# No machine-code optimisation halves the time of the tests, which compile far more than they
# compute. The preset FAST_COMPILE is none: with it device counts agree to seven digits only.
FLAGS = ' '.join(
  [
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
  ]
)
