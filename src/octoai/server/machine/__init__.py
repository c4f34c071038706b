"""The machine that the service runs on: cores, memory, descriptors, processes, directories. Knows no requests."""
