"""Engines that are reached over OpenAI's HTTP API, over TCP or a unix socket."""
