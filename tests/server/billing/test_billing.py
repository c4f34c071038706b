"""Money is exact: how it is written and read, and what tokens cost at the price of the day."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.billing.money import Price, PriceBook, nanos, usd
from octoai.server.engines.base import Usage
from octoai.server.store.prices import PriceRow

amounts = st.integers(-(2**63) + 1, 2**63 - 1)
counts = st.integers(0, 10**7)
per_token = st.integers(0, 10**6)


@given(amounts)
def test_what_is_written_is_read_again(amount: int) -> None:
    assert nanos(usd(amount)) == amount


@given(amounts)
def test_dollars_are_written_exactly(amount: int) -> None:
    assert Decimal(usd(amount)) == Decimal(amount) / 10**9
    assert len(usd(amount).partition(".")[2]) in range(2, 10)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("25", 25 * 10**9),
        ("$25", 25 * 10**9),
        (" 0.50 ", 5 * 10**8),
        ("-1.5", -15 * 10**8),
        ("-$1", -(10**9)),
        ("0.000000001", 1),
        ("0", 0),
        ("-0", 0),
    ],
)
def test_amounts_are_read(text: str, amount: int) -> None:
    assert nanos(text) == amount


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "1.",
        ".5",
        "1,5",
        "1e3",
        "+1",
        "--1",
        "$",
        "$-1",
        "1.0000000001",
        "nan",
        "١",
        "9300000000",
        "12345678901",
    ],
)
def test_what_is_no_amount_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^an amount is .*, not .*$") as caught:
        nanos(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0.00"), (1500, "0.0000015"), (-(10**9), "-1.00"), (12 * 10**8, "1.20"), (-1, "-0.000000001")],
)
def test_dollars_have_two_digits_or_as_many_as_they_need(amount: int, text: str) -> None:
    assert usd(amount) == text


def test_a_price_is_by_the_token() -> None:
    price = Price(input_nanos=150, cached_input_nanos=75, output_nanos=600)
    assert price.charge(Usage(1000, 400, 10)) == 600 * 150 + 400 * 75 + 10 * 600
    assert price.charge(Usage()) == 0
    assert Price().charge(Usage(5, 1, 7)) == 0


@given(st.builds(Price, per_token, per_token, per_token), counts, counts, counts, counts)
def test_no_request_costs_more_than_the_most(
    price: Price, prompt: int, cached: int, completion: int, more: int
) -> None:
    usage = Usage(prompt, min(cached, prompt), completion)
    assert 0 <= price.charge(usage) <= price.most(prompt, completion + more)


@given(st.builds(Price, per_token, per_token, per_token), st.lists(st.tuples(counts, counts), max_size=5))
def test_a_whole_costs_as_much_as_its_parts(price: Price, parts: list[tuple[int, int]]) -> None:
    whole = Usage(sum(prompt for prompt, _ in parts), 0, sum(completion for _, completion in parts))
    assert price.charge(whole) == sum(price.charge(Usage(prompt, 0, completion)) for prompt, completion in parts)


def row(valid_from_us: int, input_nanos: int = 1, model: str = "small") -> PriceRow:
    return PriceRow(model, valid_from_us, input_nanos, 1, 1, "operator")


def test_a_price_applies_from_its_moment_until_the_next() -> None:
    early, late = row(100, 1), row(200, 2)
    book = PriceBook([late, early])
    assert [book.of("small", at_us) for at_us in (99, 100, 199, 200, 10**18)] == [None, early, early, late, late]
    assert book.of("large", 150) is None
    assert book.rows("small") == (early, late) and book.rows("large") == ()
    assert book.models == ("small",)


def test_a_price_that_is_heard_of_again_is_kept_once() -> None:
    book = PriceBook([row(100)])
    book.add([row(100), row(50, 9), row(100, model="large")])
    assert book.rows("small") == (row(50, 9), row(100))
    assert set(book.models) == {"small", "large"}


def test_a_price_is_compared_with_few_of_those_there_are() -> None:
    """With all of them, 5,000 of one model took more than a second at each start."""
    num_compared = 0

    class Counted(PriceRow):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal num_compared
            num_compared += 1
            return self.valid_from_us == getattr(other, "valid_from_us", None)

        __hash__ = None  # type: ignore[assignment]

    rows = [Counted("small", moment, 1, 1, 1, "operator") for moment in range(200)]
    book = PriceBook([*rows, *rows])
    assert len(book.rows("small")) == 200
    assert num_compared < 1000


@given(st.sets(st.integers(0, 50)), st.integers(0, 60), st.randoms())
def test_the_price_is_the_newest_that_has_begun(moments: set[int], at_us: int, random: object) -> None:
    rows = [row(moment, moment) for moment in moments]
    random.shuffle(rows)  # type: ignore[attr-defined]
    begun = [each for each in rows if each.valid_from_us <= at_us]
    expected = max(begun, key=lambda each: each.valid_from_us, default=None)
    assert PriceBook(rows).of("small", at_us) == expected
