"""One trained network, made small by every family of methods: what is compared, and on what."""
