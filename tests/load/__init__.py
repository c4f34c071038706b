"""A load on the service and its ledger, with an account of it on both sides: the clients' and the engine's.

`bench/ledger_crashes.py` uses it as well.
"""
