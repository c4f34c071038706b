"""The HTTP API: what is asked decoded, handed on, and the answer encoded. Decides nothing, knows no SQL."""
