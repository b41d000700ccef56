"""Parts of the benchmarks of the fused operations: where a model has them, and what a machine allows."""
