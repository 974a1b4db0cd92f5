"""A leaf as a layer sees it: a matrix over what it contracts, the units of coupled groups, rounding inside a sweep."""
