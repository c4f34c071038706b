"""Every type that crosses the network, in both directions. Imports nothing else of this package."""
