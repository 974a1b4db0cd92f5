"""Changes that keep the function: scales, rotations and norms folded into neighbours, biases and kernels refitted."""
