"""The tables, as numbered migrations that run once each, in order, and are never edited after a release.

Written in what SQLite and PostgreSQL share; `{blob}`, `{strict}`, `{keyed}` (a table kept in the order of its key) and
`{limits}` are filled in. Money is integer nano-dollars; names ending in `_us` are microseconds since 1970 (UTC), in
`_at` whole seconds.

    accounts ─┬─ tokens          who may ask, and what for
              ├─ reservations    what limited requests hold back until they end, and what counts against rate limits
              │    └─ rates      the same by the second, by account and by token
              ├─ requests        one row per request: its tokens, its price, what it cost
              │    └─ entries    the ledger: append-only, chained by hash; requests, grants, adjustments, refunds
              ├─ balances        the sum of an account's entries
              ├─ spending        the charges of a calendar month, by account and by token
              ├─ usage           requests and tokens by minute, account, token and model
              └─ keys            Idempotency-Keys and the answers given under them
    prices       by model, each from a date on
    journals     how far each process's journal has been applied
    head         the newest entry
    versions     counted up with every change of accounts, tokens or prices, for those who keep copies
"""

from __future__ import annotations

from collections.abc import Iterator

_LIMITS = """
    soft_budget_nanos             INTEGER,
    hard_budget_nanos             INTEGER,
    requests_per_minute           INTEGER,
    prompt_tokens_per_minute      INTEGER,
    completion_tokens_per_minute  INTEGER,
    concurrent_requests           INTEGER,
"""

MIGRATIONS = (
    """
    CREATE TABLE tokens (
        id          TEXT PRIMARY KEY,
        account     TEXT NOT NULL,
        name        TEXT NOT NULL,
        hash        {blob} NOT NULL UNIQUE,
        hint        TEXT NOT NULL,
        created_at  INTEGER NOT NULL,
        revoked_at  INTEGER
    ) {strict};
    """,
    """
    CREATE TABLE versions (name TEXT PRIMARY KEY, value INTEGER NOT NULL) {strict};
    INSERT INTO versions VALUES ('directory', 1);

    CREATE TABLE accounts (
        id          TEXT PRIMARY KEY,
        name        TEXT NOT NULL,
        plan        TEXT NOT NULL,
        is_prepaid  INTEGER NOT NULL,
        {limits}
        created_at  INTEGER NOT NULL,
        closed_at   INTEGER,
        version     INTEGER NOT NULL
    ) {strict};

    ALTER TABLE tokens RENAME TO old_tokens;
    CREATE TABLE tokens (
        id            TEXT PRIMARY KEY,
        account       TEXT NOT NULL REFERENCES accounts (id),
        name          TEXT NOT NULL,
        hash          {blob} NOT NULL UNIQUE,
        hint          TEXT NOT NULL,
        scopes        TEXT NOT NULL,
        models        TEXT,
        {limits}
        created_at    INTEGER NOT NULL,
        expires_at    INTEGER,
        revoked_at    INTEGER,
        last_used_at  INTEGER,
        version       INTEGER NOT NULL
    ) {strict};
    INSERT INTO accounts (id, name, plan, is_prepaid, created_at, version)
        SELECT DISTINCT account, account, 'unlimited', 0, 0, 1 FROM old_tokens;
    INSERT INTO tokens (id, account, name, hash, hint, scopes, created_at, revoked_at, version)
        SELECT id, account, name, hash, hint,
            CASE name WHEN 'bootstrap' THEN 'inference usage admin' ELSE 'inference usage' END,
            created_at, revoked_at, 1
        FROM old_tokens;
    DROP TABLE old_tokens;

    CREATE TABLE prices (
        model               TEXT NOT NULL,
        valid_from_us       INTEGER NOT NULL,
        input_nanos         INTEGER NOT NULL,
        cached_input_nanos  INTEGER NOT NULL,
        output_nanos        INTEGER NOT NULL,
        origin              TEXT NOT NULL,
        version             INTEGER NOT NULL,
        PRIMARY KEY (model, valid_from_us)
    ) {strict};

    CREATE TABLE requests (
        id                  TEXT PRIMARY KEY,
        request_id          TEXT NOT NULL,
        account             TEXT NOT NULL,
        token_id            TEXT NOT NULL,
        model               TEXT NOT NULL,
        served_model        TEXT NOT NULL,
        status              TEXT NOT NULL,
        outcome             TEXT,
        input_nanos         INTEGER NOT NULL,
        cached_input_nanos  INTEGER NOT NULL,
        output_nanos        INTEGER NOT NULL,
        prompt_tokens       INTEGER NOT NULL,
        cached_tokens       INTEGER NOT NULL,
        completion_tokens   INTEGER NOT NULL,
        cost_nanos          INTEGER NOT NULL,
        waived_nanos        INTEGER NOT NULL,
        opened_us           INTEGER NOT NULL,
        settled_us          INTEGER,
        journal             TEXT NOT NULL,
        is_reserved         INTEGER NOT NULL,
        lease_us            INTEGER NOT NULL
    ) {keyed};
    CREATE INDEX requests_by_request_id ON requests (request_id);
    CREATE INDEX requests_by_account ON requests (account, opened_us);
    CREATE INDEX requests_by_time ON requests (opened_us);
    CREATE INDEX requests_open ON requests (lease_us) WHERE status = 'open';

    CREATE TABLE entries (
        seq                INTEGER PRIMARY KEY,
        at_us              INTEGER NOT NULL,
        account            TEXT NOT NULL,
        token_id           TEXT,
        kind               TEXT NOT NULL,
        amount_nanos       INTEGER NOT NULL,
        request            TEXT,
        model              TEXT,
        prompt_tokens      INTEGER NOT NULL,
        cached_tokens      INTEGER NOT NULL,
        completion_tokens  INTEGER NOT NULL,
        note               TEXT,
        hash               TEXT NOT NULL
    ) {strict};
    CREATE INDEX entries_by_account ON entries (account, at_us);
    CREATE INDEX entries_by_request ON entries (request);

    CREATE TABLE head (
        id     INTEGER PRIMARY KEY,
        seq    INTEGER NOT NULL,
        at_us  INTEGER NOT NULL,
        hash   TEXT NOT NULL
    ) {strict};
    INSERT INTO head VALUES (1, 0, 0, '');

    CREATE TABLE balances (account TEXT PRIMARY KEY, nanos INTEGER NOT NULL) {keyed};

    CREATE TABLE spending (
        payer  TEXT NOT NULL,
        month  TEXT NOT NULL,
        nanos  INTEGER NOT NULL,
        PRIMARY KEY (payer, month)
    ) {keyed};

    CREATE TABLE usage (
        minute_at          INTEGER NOT NULL,
        account            TEXT NOT NULL,
        token_id           TEXT NOT NULL,
        model              TEXT NOT NULL,
        num_requests       INTEGER NOT NULL,
        prompt_tokens      INTEGER NOT NULL,
        cached_tokens      INTEGER NOT NULL,
        completion_tokens  INTEGER NOT NULL,
        cost_nanos         INTEGER NOT NULL,
        PRIMARY KEY (minute_at, account, token_id, model)
    ) {keyed};

    CREATE TABLE reservations (
        id                 TEXT PRIMARY KEY,
        account            TEXT NOT NULL,
        token_id           TEXT NOT NULL,
        at_us              INTEGER NOT NULL,
        nanos              INTEGER NOT NULL,
        prompt_tokens      INTEGER NOT NULL,
        completion_tokens  INTEGER NOT NULL,
        is_open            INTEGER NOT NULL,
        lease_us           INTEGER NOT NULL
    ) {keyed};
    CREATE INDEX reservations_by_account ON reservations (account, at_us);
    CREATE INDEX reservations_by_token ON reservations (token_id, at_us);
    CREATE INDEX reservations_open ON reservations (account) WHERE is_open = 1;

    CREATE TABLE keys (
        account       TEXT NOT NULL,
        key           TEXT NOT NULL,
        body_hash     {blob} NOT NULL,
        request       TEXT NOT NULL,
        request_id    TEXT NOT NULL,
        num_attempts  INTEGER NOT NULL,
        answer        {blob},
        journal       TEXT NOT NULL,
        claimed_us    INTEGER NOT NULL,
        PRIMARY KEY (account, key)
    ) {keyed};
    CREATE INDEX keys_by_age ON keys (claimed_us);

    CREATE TABLE journals (
        id       TEXT PRIMARY KEY,
        segment  INTEGER NOT NULL,
        byte     INTEGER NOT NULL
    ) {strict};
    """,
    # A minute's requests are counted from the index alone: an account may have thousands.
    """
    DROP INDEX reservations_by_account;
    DROP INDEX reservations_by_token;
    CREATE INDEX reservations_by_account ON reservations (account, at_us, prompt_tokens, completion_tokens);
    CREATE INDEX reservations_by_token ON reservations (token_id, at_us, prompt_tokens, completion_tokens);
    """,
    # The request before under the same key, until this one runs.
    """
    ALTER TABLE keys ADD COLUMN replaces TEXT;
    """,
    # What a limit counts must not take longer the more there is of it.
    """
    CREATE TABLE rates (
        payer              TEXT NOT NULL,
        second             INTEGER NOT NULL,
        num_requests       INTEGER NOT NULL,
        prompt_tokens      INTEGER NOT NULL,
        completion_tokens  INTEGER NOT NULL,
        newest_us          INTEGER NOT NULL,
        PRIMARY KEY (payer, second)
    ) {keyed};
    INSERT INTO rates
        SELECT account, at_us / 1000000, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), MAX(at_us)
        FROM reservations GROUP BY 1, 2;
    INSERT INTO rates
        SELECT token_id, at_us / 1000000, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), MAX(at_us)
        FROM reservations GROUP BY 1, 2;
    DROP INDEX reservations_open;
    CREATE INDEX reservations_open_by_account ON reservations (account, lease_us, nanos) WHERE is_open = 1;
    CREATE INDEX reservations_open_by_token ON reservations (token_id, lease_us, nanos) WHERE is_open = 1;
    """,
    # What a process left behind must be found among all that was ever asked.
    """
    CREATE INDEX requests_open_by_journal ON requests (journal) WHERE status = 'open';
    CREATE INDEX keys_unanswered ON keys (journal) WHERE answer IS NULL;
    """,
    # Answers that were generated are text of users, and may be kept for less time than what an administrator has done.
    """
    ALTER TABLE keys ADD COLUMN answered_us INTEGER;
    UPDATE keys SET answered_us = claimed_us WHERE answer IS NOT NULL AND journal <> '';
    CREATE INDEX keys_answered ON keys (answered_us) WHERE answered_us IS NOT NULL;
    """,
    # A report on one account must not go through what all others have used.
    """
    CREATE INDEX usage_by_account ON usage (account, minute_at);
    """,
    # What counts for nothing any more is found without looking through all that counts.
    """
    CREATE INDEX reservations_by_age ON reservations (at_us);
    CREATE INDEX rates_by_age ON rates (second);
    """,
)

_TYPES = {
    "sqlite": {"blob": "BLOB", "strict": "STRICT", "keyed": "STRICT, WITHOUT ROWID"},
    "postgres": {"blob": "BYTEA", "strict": "", "keyed": ""},
}


def statements(migration: str, database: str) -> Iterator[str]:
    """The single statements of a migration, in the words of that database ("sqlite" or "postgres")."""
    types = _TYPES[database]
    text = migration.format(limits=_LIMITS, **types)
    if database == "postgres":
        text = text.replace(" INTEGER", " BIGINT")
    yield from (statement.strip() for statement in text.split(";") if statement.strip())
