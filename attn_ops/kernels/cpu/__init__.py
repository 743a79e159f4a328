"""CPU kernels, through torch's own CPU operators."""
