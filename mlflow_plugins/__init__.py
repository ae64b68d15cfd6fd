"""What MLflow loads through entry points; thin, no detection logic. Empty in this release: the audit itself comes first."""
