"""The fastest way to run a model on this machine, found by measurement."""
