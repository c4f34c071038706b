"""Prices from when on: the catalogue's, the operator's, and how they are shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octoai.server.api import pricing
from octoai.server.billing import prices
from octoai.server.billing.money import Price, PriceBook
from octoai.server.billing.prices import BadPrice
from octoai.server.catalogue import Catalogue, Model
from octoai.server.engines.scripted import ScriptedEngine
from octoai.server.store import Connection, Place, connect
from octoai.server.store import prices as table
from octoai.server.store.prices import PriceRow
from tests.postgres import PostgresServer
from tests.running import InProcess
from tests.talking import ask

HOUR = 3_600_000_000


def model(model_id: str, cost: int | None, output: int | None, cached: int | None = None) -> Model:
    return Model(model_id, input_price_nanos=cost, cached_input_price_nanos=cached, output_price_nanos=output)


def synced(db: Connection, at_us: int, *models: Model) -> list[PriceRow]:
    with db.transaction():
        return prices.sync(db, Catalogue(models), at_us)


def price_at(db: Connection, model_id: str, at_us: int) -> tuple[int, int, int] | None:
    row = PriceBook(table.all_(db)).of(model_id, at_us)
    return None if row is None else (row.input_nanos, row.cached_input_nanos, row.output_nanos)


@pytest.fixture
def db(place: Place) -> Iterator[Connection]:
    connection = connect(place)
    yield connection
    connection.close()


def test_a_models_first_price_has_always_been_its_price(db: Connection) -> None:
    added = synced(db, 5 * HOUR, model("a", 150, 600, 15), model("b", 20, 20), model("c", None, 3), model("d", 3, None))
    assert added == [
        PriceRow("a", 0, 150, 15, 600, "catalogue"),
        PriceRow("b", 0, 20, 20, 20, "catalogue"),
    ]
    assert price_at(db, "a", 0) == price_at(db, "a", 9 * HOUR) == (150, 15, 600)
    assert price_at(db, "c", 9 * HOUR) is None


def test_a_start_with_the_same_prices_changes_nothing(db: Connection) -> None:
    synced(db, HOUR, model("a", 1, 2))
    before = db.row("SELECT value FROM versions")
    assert synced(db, 2 * HOUR, model("a", 1, 2)) == []
    assert db.row("SELECT value FROM versions") == before


def test_a_change_of_the_catalogue_applies_from_the_start_that_found_it(db: Connection) -> None:
    synced(db, HOUR, model("a", 1, 2))
    synced(db, 2 * HOUR, model("a", 3, 2))
    synced(db, 3 * HOUR, model("a", 1, 2))
    assert [price_at(db, "a", at * HOUR) for at in (0, 1, 2, 3)] == [(1, 1, 2), (1, 1, 2), (3, 3, 2), (1, 1, 2)]
    # A model that is no longer in the catalogue keeps what it had.
    assert synced(db, 4 * HOUR) == []
    assert price_at(db, "a", 5 * HOUR) == (1, 1, 2)


def test_a_start_that_changes_a_price_says_so(db: Connection, caplog: pytest.LogCaptureFixture) -> None:
    synced(db, HOUR, model("a", 150, 600), model("b", 1, 1))
    synced(db, 2 * HOUR, model("a", 150, 600), model("b", 1, 1))
    assert caplog.messages == []
    synced(db, 3 * HOUR, model("a", 200, 600), model("b", 1, 1))
    (said,) = caplog.messages
    assert said.startswith("a costs 0.20, 0.20 (cached) and 0.60 (output) USD per million tokens from now on")


def test_a_clock_that_goes_back_does_not_change_the_order(db: Connection) -> None:
    synced(db, HOUR, model("a", 1, 1))
    synced(db, 9 * HOUR, model("a", 2, 2))
    added = synced(db, 5 * HOUR, model("a", 3, 3))
    assert [row.valid_from_us for row in added] == [5 * HOUR, 9 * HOUR + 1]
    assert synced(db, 6 * HOUR, model("a", 3, 3)) == []
    assert price_at(db, "a", 6 * HOUR) == price_at(db, "a", 10 * HOUR) == (3, 3, 3)


def test_a_price_that_a_start_with_a_wrong_clock_set_for_later_is_in_force_from_the_next_start_on(
    db: Connection,
) -> None:
    synced(db, HOUR, model("a", 1, 1))
    synced(db, 9000 * HOUR, model("a", 2, 2))
    (row,) = synced(db, 2 * HOUR, model("a", 2, 2))
    assert (row.valid_from_us, row.output_nanos) == (2 * HOUR, 2)
    assert synced(db, 3 * HOUR, model("a", 2, 2)) == []
    assert price_at(db, "a", 3 * HOUR) == price_at(db, "a", 9001 * HOUR) == (2, 2, 2)


def test_an_operators_price_stays_until_the_catalogue_itself_changes(db: Connection) -> None:
    known = model("a", 1, 1)
    synced(db, HOUR, known)
    with db.transaction():
        prices.set_price(db, known, Price(7, 6, 5), None, 2 * HOUR)
    assert synced(db, 3 * HOUR, known) == []
    assert price_at(db, "a", 3 * HOUR) == (7, 6, 5)
    assert price_at(db, "a", 2 * HOUR - 1) == (1, 1, 1)
    synced(db, 4 * HOUR, replace(known, output_price_nanos=2))
    assert price_at(db, "a", 4 * HOUR) == (1, 1, 2)


def test_an_operators_price_from_before_the_first_start_stays_too(db: Connection) -> None:
    known = model("a", 1, 1)
    with db.transaction():
        prices.set_price(db, known, Price(7, 6, 5), None, 2 * HOUR)
    synced(db, 3 * HOUR, known)
    assert price_at(db, "a", 3 * HOUR) == (7, 6, 5)
    assert price_at(db, "a", HOUR) == (1, 1, 1)


def test_a_price_applies_from_a_moment_to_come_and_never_changes(db: Connection) -> None:
    known = model("a", 1, 1)
    with db.transaction():
        prices.set_price(db, known, Price(2, 2, 2), 3 * HOUR, HOUR)
    with pytest.raises(BadPrice, match="never changes"), db.transaction():
        prices.set_price(db, known, Price(4, 4, 4), 3 * HOUR, HOUR)
    with pytest.raises(BadPrice, match="over"), db.transaction():
        prices.set_price(db, known, Price(4, 4, 4), HOUR - 1, HOUR)
    assert price_at(db, "a", 3 * HOUR - 1) is None
    assert price_at(db, "a", 3 * HOUR) == (2, 2, 2)


def test_services_that_start_at_one_moment_add_a_price_once(place: Place) -> None:
    with closing(connect(place)) as db:
        synced(db, HOUR, model("a", 1, 1), model("b", 1, 1))
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def start(number: int) -> None:
        try:
            with closing(connect(place)) as own:
                barrier.wait()
                synced(own, 2 * HOUR + number, model("a", 2, 2), model("b", 1, 1), model("c", 3, 3))
        except BaseException as error:  # noqa: BLE001  # told below
            errors.append(error)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with closing(connect(place)) as db:
        rows = table.all_(db)
    assert [(row.model, row.input_nanos) for row in rows] == [("a", 1), ("a", 2), ("b", 1), ("c", 3)]


def test_what_stands_is_told_from_what_is_to_come() -> None:
    rows = [PriceRow("a", at, at, at, at, "operator") for at in (0, 10, 20, 30)]
    assert prices.current_and_upcoming(rows, 10) == (rows[1], rows[2:])
    assert prices.current_and_upcoming(rows, 99) == (rows[3], [])
    assert prices.current_and_upcoming(rows[1:], 9) == (None, rows[1:])
    assert prices.current_and_upcoming([], 9) == (None, [])


def listed(service: InProcess, path: str = "/v1/pricing", **headers: str) -> dict[str, Any]:
    status, _, text = ask(service, path, **headers)
    assert status == 200
    answer: dict[str, Any] = json.loads(text)
    return answer


def test_pricing_is_public_and_exact(in_process: Callable[..., InProcess]) -> None:
    service = in_process(ScriptedEngine())
    answer = listed(service, authorization="")
    data = {each.pop("id"): each for each in answer.pop("data")}
    assert answer == {"object": "list", "currency": "USD", "unit": "1M tokens"}
    catalogue = Catalogue.load()
    priced = [each.id for each in catalogue.values() if each.input_price_nanos is not None]
    assert sorted(data) == sorted(priced)
    assert data["meta-llama-3.1-405b-instruct"] == {
        "object": "price",
        "aliases": list(catalogue["meta-llama-3.1-405b-instruct"].aliases),
        "input": "3.00",
        "cached_input": "3.00",
        "output": "9.00",
        "valid_from": 0,
        "upcoming": [],
    }


def test_a_price_to_come_is_announced_and_models_show_the_one_in_force(in_process: Callable[..., InProcess]) -> None:
    service = in_process(ScriptedEngine())
    now_us = time.time_ns() // 1000
    known, later = Catalogue.load()[service.model], now_us + 24 * HOUR
    service.books(lambda db: prices.set_price(db, known, Price(100, 10, 1000), None, now_us))
    service.books(lambda db: prices.set_price(db, known, Price(200, 20, 2000), later, now_us))
    time.sleep(0.4)
    (shown,) = [each for each in listed(service)["data"] if each["id"] == service.model]
    assert (shown["input"], shown["cached_input"], shown["output"]) == ("0.10", "0.01", "1.00")
    assert shown["valid_from"] == now_us // 1_000_000
    assert shown["upcoming"] == [
        {"input": "0.20", "cached_input": "0.02", "output": "2.00", "valid_from": later // 1_000_000}
    ]
    assert pricing.price_json(service.service, known) == {
        "input_usd_per_million": "0.10",
        "cached_input_usd_per_million": "0.01",
        "output_usd_per_million": "1.00",
        "valid_from": now_us // 1_000_000,
    }
    unpriced = model("x", None, None)
    assert pricing.price_json(service.service, unpriced) is None
    stood_in = pricing.price_json(service.service, unpriced, served=known)
    assert stood_in is not None
    assert stood_in["input_usd_per_million"] == "0.10"


def test_pricing_works_while_the_database_is_away(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    service = InProcess(ScriptedEngine(), tmp_path, url=postgres_url)
    try:
        postgres_server.stop("immediate")
        try:
            assert len(listed(service, authorization="")["data"]) > 5
            status, headers, text = ask(service, "/v1/admin/prices")
            assert (status, json.loads(text)["error"]["code"]) == (503, "database_away")
            assert int(headers["retry-after"]) >= 1
        finally:
            postgres_server.start()
    finally:
        service.close()
