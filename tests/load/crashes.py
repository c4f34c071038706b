"""The service, killed under load and started again in the same place, again and again."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from octoai.server.store import Place
from tests.load.accounts import Books, Findings, hold
from tests.load.clients import Load, Request, Target, Told, mixed
from tests.load.places import serve
from tests.load.upstream import MODEL, Upstream
from tests.running import Serve


class Crashes:
    def __init__(self, place: Path, upstream: Upstream, *, settings: str = "", num_clients: int = 12) -> None:
        self.place, self.upstream, self.settings = place, upstream, settings
        self.num_clients = num_clients
        self.told: list[Told] = []
        self.num_kills = 0
        self._numbers = itertools.count()
        self.service = self.started()

    @property
    def target(self) -> Target:
        return Target(self.service.url, self.service.token, MODEL)

    def started(self) -> Serve:
        return serve(self.place, self.upstream, settings=self.settings)

    def load(self, next_request: Callable[[int], Request] = mixed, total: int | None = None) -> Load:
        return Load(self.target, next_request, num_clients=self.num_clients, numbers=self._numbers, total=total).start()

    def kill(self, load: Load) -> None:
        """Under this load, which ends with it."""
        killed_at = time.monotonic()
        self.service.stop(signal.SIGKILL)
        self.num_kills += 1
        told = load.stop()
        for each in told:
            if not each.is_finished and (each.left_at is None or each.left_at > killed_at - 1):
                each.killed_at = killed_at
        self.told += told

    def kill_worker(self, load: Load, pid: int) -> None:
        """One of the processes that serve: what it was answering breaks off, and the load goes on."""
        told = tuple(load.told)
        running = [each for each in told if not each.is_over]
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        just_left = [each for each in told if each.left_at is not None and each.left_at > killed_at - 1]
        for each in running + just_left:
            each.killed_at = killed_at
        self.num_kills += 1

    def round(self, chance: random.Random) -> None:
        """Some seconds of load, the end at a random moment, and the next start."""
        load = self.load()
        time.sleep(chance.uniform(0.2, 2.5))
        self.kill(load)
        self.service = self.started()

    def findings(self, place: Place | None = None, num_others: int = 0) -> Findings:
        """`num_others` requests were made beside the load."""
        books = Books.read(place or Place(self.service.data_dir))
        return hold(books, self.told, self.upstream.at_rest(), num_others)

    def close(self) -> None:
        self.service.stop(signal.SIGKILL)
