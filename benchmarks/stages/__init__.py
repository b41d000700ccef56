"""Parts of `benchmarks.bottleneck`: stages measured alone, the model of them, what is said."""
