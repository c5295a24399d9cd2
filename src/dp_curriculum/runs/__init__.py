"""The folder of a run: where its files lie, and that they belong to its ledger."""
