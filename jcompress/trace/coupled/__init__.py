"""Which axes of which parameters are cut together, and the same function at the smaller shapes."""
