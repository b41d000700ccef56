"""Parts of `benchmarks.scaling`: inputs with their sources, the model of a cluster, runs over gloo, plans."""
