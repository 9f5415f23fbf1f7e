"""What follows the writing: engines, audit, receipt, card, upload."""
