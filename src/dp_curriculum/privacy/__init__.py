"""The guarantee in numbers: the accountant, the ledger, the report, its verification, and secret randomness."""
