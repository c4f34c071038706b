"""Prices as the world sees them: `GET /v1/pricing`, and the price of each model in `/v1/models`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from octoai.server.api import views
from octoai.server.billing.prices import current_and_upcoming, priced
from octoai.server.catalogue import Model
from octoai.server.service import Service
from octoai.server.times import now_us


async def pricing(request: Request) -> Response:
    """`GET /v1/pricing`, for everybody, also while the database is away."""
    service: Service = request.state.service
    now = now_us()
    known = priced(service.router.catalogue, service.directory.prices)
    listed = [views.model_prices(model, *current_and_upcoming(rows, now)) for model, rows in known]
    return JSONResponse({"object": "list", "currency": "USD", "unit": "1M tokens", "data": listed})


def price_json(service: Service, model: Model, served: Model | None = None) -> dict[str, Any] | None:
    """The price in force, as `/v1/models` shows it: of the model, or of the one that is `served` in its place, where it
    has none of its own. None where neither has one."""
    prices, now = service.directory.prices, now_us()
    row = prices.of(model.id, now) or (prices.of(served.id, now) if served else None)
    if row is None:
        return None
    shown = views.price(row)
    return {
        "input_usd_per_million": shown["input"],
        "cached_input_usd_per_million": shown["cached_input"],
        "output_usd_per_million": shown["output"],
        "valid_from": shown["valid_from"],
    }


def paths() -> dict[str, Any]:
    """For /openapi.json."""
    summary = (
        "What every model costs, in USD per million tokens: `input`, `cached_input`, `output`, and what is to come."
    )
    answer = {"description": "`data` has one object per model"}
    return {"/v1/pricing": {"get": {"summary": summary, "security": [], "responses": {"200": answer}}}}
