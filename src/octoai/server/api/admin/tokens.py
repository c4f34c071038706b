"""API tokens."""

from __future__ import annotations

from octoai.server import accounts, tokens
from octoai.server.api import views
from octoai.server.api.admin.bodies import split_limits
from octoai.server.api.admin.calls import Call, Json, listed, once, page
from octoai.server.store import tokens as table
from octoai.server.store.database import Connection


async def list_tokens(call: Call) -> Json:
    limit, after, account = call.limit, call.after, call.request.query_params.get("account")

    def read(db: Connection) -> Json:
        owner = None if account is None else accounts.find(db, account).id
        rows, has_more = page([(row.id, row) for row in table.all_(db, owner)], limit, after)
        return listed([views.token(row) for row in rows], has_more)

    return await call.service.read(read)


async def create_token(call: Call) -> Json:
    given, limits = split_limits(call.body)

    def write(db: Connection) -> Json:
        minted = tokens.mint(
            db,
            given["name"],
            given.get("account", accounts.DEFAULT_ACCOUNT),
            scopes=given.get("scopes", tokens.DEFAULT_SCOPES),
            models=given.get("models"),
            expires_at=given.get("expires_at"),
            limits=limits,
        )
        return views.token(tokens.find(db, minted.id)) | {"token": minted.text}

    return await call.service.write(lambda db: once(db, call, write, shown_once="token"))


async def show_token(call: Call) -> Json:
    return await call.service.read(lambda db: views.token(tokens.find(db, call.id)))


async def update_token(call: Call) -> Json:
    given, limits = split_limits(call.body)
    return await call.service.write(lambda db: views.token(tokens.update(db, call.id, {**given, **limits})))


async def revoke_token(call: Call) -> Json:
    def write(db: Connection) -> Json:
        tokens.revoke(db, call.id)
        return views.token(tokens.find(db, call.id))

    return await call.service.write(write)
