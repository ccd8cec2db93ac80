"""Commands of the command line that need more than a ledger; each imports what it needs when it runs."""
