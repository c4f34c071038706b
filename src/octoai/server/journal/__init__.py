"""The local journal: what the service must not forget, on this machine's disk before a client hears of it.

A process appends to a `Journal` of its own; whoever applies the records elsewhere reads them behind, in order, through
a `Tail`, and keeps the `Position` it has reached together with what it applied. A process that died leaves an `Orphan`,
for any other to finish. It knows neither what the records mean nor where they go.

On disk. `<instance>.lock` is locked as long as the process lives; `<instance>-<number>.journal` are segments of fixed
size, allocated ahead, so that a full disk stops no running request. A line is the CRC-32 of a record in eight
hexadecimal digits, `>` or a space, the record (one JSON object), and a newline; zeros follow the last. `>` begins a
batch: everything before it was durable when it was written. The first line of a segment says after which position it
goes on; what its predecessor holds beyond that was given up, after a failed write.

Hence what a bad line means. In the last batch of all it is a write that a power cut or a kill has torn: nobody was told
that its records are durable, and they end the journal silently, from the bad line on. Where another batch or segment
comes later, it is damage, and reading it raises. (Damage within the last batch cannot be told from a tear.)

A segment goes when the database has it. Where that is older (a copy was restored), there is a gap between the two, and
whoever starts is told; `<instance>.incomplete`, which a person makes, says to go on behind it.

For local file systems: processes tell that others live by `flock`.
"""

from __future__ import annotations

from octoai.server.journal.files import instances
from octoai.server.journal.followed import Followed
from octoai.server.journal.lines import (
    START,
    JournalDamaged,
    JournalError,
    JournalFailed,
    JournalFull,
    JournalGap,
    Position,
)
from octoai.server.journal.orphans import Orphan, orphans
from octoai.server.journal.tail import Tail, gap
from octoai.server.journal.writer import SEGMENT_BYTES, Journal

__all__ = [
    "SEGMENT_BYTES",
    "START",
    "Followed",
    "Journal",
    "JournalDamaged",
    "JournalError",
    "JournalFailed",
    "JournalFull",
    "JournalGap",
    "Orphan",
    "Position",
    "Tail",
    "gap",
    "instances",
    "orphans",
]
