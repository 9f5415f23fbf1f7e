"""Steps after writing: engines, audit, receipt, card, upload."""
