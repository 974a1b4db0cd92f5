"""What all readings share: the jaxpr with parameters named, and what each of its values has to do with them."""
