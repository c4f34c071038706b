"""Metrics for Prometheus: counted, named, and added up over processes."""
