"""The privacy ledger and the report that is computed from it: their public face."""

from __future__ import annotations

from dp_curriculum.privacy.ledger import (
    SCHEMA_VERSION,
    PrivacyLedger,
    ledger_held,
)


__all__ = [
    "PrivacyLedger",
    "SCHEMA_VERSION",
    "ledger_held",
]
