"""Flags of XLA:CPU for programs that are compiled to be run once or twice."""

# No machine-code optimisation halves the time of the tests, which compile far more than they
# compute; the quick preset, with the older emitters of fusions, takes another fifth of it.
FLAGS = ' '.join(
  [
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_opt_preset=FAST_COMPILE',
    '--xla_cpu_use_fusion_emitters=false',
  ]
)
