"""Floor 1, what can be computed: op schemas, fakes, autograd, references, block maps, kernels, one file per backend."""
